"""Write the UI format of a ComfyUI workflow from its API format, which says less and reads better.

    python tools/comfyui_workflow.py http://127.0.0.1:8399 example_workflows/api/*.json

The files go one folder up. The server's ``/object_info`` tells sockets from widgets.
"""

from __future__ import annotations

import argparse
import json
import urllib.request
import uuid
from pathlib import Path
from typing import Any

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
COLUMN, ROW, GAP = 380, 22, 50  # pixels


def convert(graph: dict[str, Any], nodes: dict[str, Any], name: str) -> dict[str, Any]:
    """The UI format.

    Args:
        graph: API format; its keys are numbers.
        nodes: ``/object_info``.
        name: What the workflow's id is made from.
    """
    links: list[list[Any]] = []
    made = {key: _node(int(key), entry, nodes[entry["class_type"]]) for key, entry in graph.items()}
    for key, entry in graph.items():
        for socket, port in enumerate(made[key]["inputs"]):
            source, slot = entry["inputs"][port["name"]]
            port["link"] = len(links) + 1
            made[source]["outputs"][slot]["links"].append(port["link"])
            links.append([port["link"], int(source), slot, int(key), socket, port["type"]])
    _place(made, links)
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, name)),
        "revision": 0,
        "last_node_id": max(map(int, graph)),
        "last_link_id": len(links),
        "nodes": list(made.values()),
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def widgets_of(info: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> options of the inputs that are widgets, in the frontend's order."""
    found = {}
    for group in ("required", "optional"):
        for name, (kind, *options) in info["input"].get(group, {}).items():
            settings = options[0] if options else {}
            if (isinstance(kind, list) or kind in WIDGETS) and not settings.get("forceInput"):
                found[name] = settings
    return found


def _node(number: int, entry: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    kinds = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    widgets, given = widgets_of(info), entry["inputs"]
    inputs: list[dict[str, Any]] = []
    for name in given:
        if isinstance(given[name], list):
            kind = kinds[name][0]
            port = {"name": name, "type": kind if isinstance(kind, str) else "COMBO", "link": None}
            inputs.append({**port, "widget": {"name": name}} if name in widgets else port)
    values: list[Any] = []
    for name, settings in widgets.items():
        value = given.get(name, settings.get("default"))
        values.append(settings.get("default") if isinstance(value, list) else value)
        if settings.get("control_after_generate"):
            values.append("fixed")
    outputs = zip(info["output_name"], info["output"], strict=True)
    node = {
        "id": number,
        "type": entry["class_type"],
        "pos": [0, 0],
        "size": [320, ROW * (len(inputs) + len(values) + len(info["output"])) + GAP],
        "flags": {},
        "order": number - 1,
        "mode": 0,
        "inputs": inputs,
        "outputs": [{"name": name, "type": kind, "links": []} for name, kind in outputs],
        "properties": {"Node name for S&R": entry["class_type"]},
        "widgets_values": values,
    }
    title = entry.get("_meta", {}).get("title")
    return {**node, "title": title} if title else node


def _place(nodes: dict[str, dict[str, Any]], links: list[list[Any]]) -> None:
    """In columns: each node right of all it needs."""
    depth = dict.fromkeys(nodes, 0)
    for _ in nodes:
        for _, source, _, target, *_ in links:
            depth[str(target)] = max(depth[str(target)], depth[str(source)] + 1)
    heights: dict[int, int] = {}
    for key, node in nodes.items():
        column = depth[key]
        node["pos"] = [column * COLUMN, heights.get(column, 0)]
        heights[column] = heights.get(column, 0) + node["size"][1] + GAP


def main() -> int:
    """Convert the files named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("server")
    parser.add_argument("files", nargs="+", type=Path)
    args = parser.parse_args()
    with urllib.request.urlopen(args.server + "/object_info", timeout=30) as answer:
        nodes = json.load(answer)
    for path in args.files:
        workflow = convert(json.loads(path.read_text()), nodes, path.stem)
        (path.parent.parent / path.name).write_text(json.dumps(workflow, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
