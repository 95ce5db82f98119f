"""The nodes in a real ComfyUI: COMFYUI_PATH is a checkout, COMFYUI_PYTHON has its packages."""

import importlib.util
import json
import os
import re
import socket
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
COMFYUI = os.environ.get("COMFYUI_PATH")
FAMILIES = ("wan", "hunyuan_video", "flux", "cosmos", "cosmos2")
SPARSE = "GenAccelSparseAttention"
ALWAYS = {"start_percent": 0.0, "end_percent": 1.0, "min_tokens": 0}
# A node, its settings, and whether the density it reports is the one it was asked for.
SETTINGS = {
    "pooled": (SPARSE, {"select": "pooled", "order": "auto", "density": 0.3, "tail": "joint/4"}),
    "static": (SPARSE, {"select": "static", "order": "curve", "density": 0.3, "tail": "drop"}),
    "window": (SPARSE, {"select": "window", "order": "tile", "density": 0.25, "tail": "joint"}),
    "paro": (
        "GenAccelParo",
        {"density": 0.3, "plan": "none: calibrate", "order": "axis", "tail": "drop"},
    ),
    "spaattn": (
        "GenAccelSpaAttn",
        {"preset": "none", "density": 0.3, "top_p": 0.0, "tail": "rectified+gapr"}
        | {"neighbours": False, "first_frame": False, "refresh": 2},
    ),
    "gna": (
        "GenAccelGna",
        {"window": "3, 4, 4", "stride": "1", "dilation": "1", "density": 0.25, "tile": "auto"}
        | {"border": "shift", "tail": "drop"},
    ),
}

pytestmark = pytest.mark.skipif(not COMFYUI, reason="COMFYUI_PATH is not set")


def load_tool(name):
    spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    tool = load_tool("comfyui")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    packs = (ROOT / "tests" / "comfyui" / "tiny_pack",)
    work = tmp_path_factory.mktemp("comfyui")
    with tool.Server(Path(COMFYUI), work, python, port, packs) as running:
        yield running


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def graph(family, *patches, seed=0, steps=4, height=16, width=24):
    """TinyModel, the patches one behind the other, KSampler, SaveLatent."""
    if family == "flux":
        height, width = 2 * height, 2 * width
    nodes = {"tiny": node("TinyModel", family=family, height=height, width=width)}
    model = ["tiny", 0]
    for number, (kind, settings) in enumerate(patches):
        nodes[f"patch{number}"] = node(kind, **settings | {"model": model})
        model = [f"patch{number}", 0]
    # HunyuanVideo has its guidance embedded; ComfyUI cannot batch two prompts with masks for it.
    cfg = 1.0 if family == "hunyuan_video" else 4.0
    nodes["sample"] = node(
        "KSampler", model=model, seed=seed, steps=steps, cfg=cfg, sampler_name="euler",
        scheduler="simple", positive=["tiny", 2], negative=["tiny", 3], latent_image=["tiny", 1],
        denoise=1.0,
    )  # fmt: skip
    nodes["save"] = node("SaveLatent", samples=["sample", 0], filename_prefix="test")
    return nodes


def with_report(nodes):
    model = nodes["sample"]["inputs"]["model"]
    return nodes | {"report": node("GenAccelReport", model=model, after=["sample", 0])}


def run(server, nodes):
    entry = server.run(nodes)
    assert "status" in entry, entry
    assert entry["status"]["status_str"] == "success", errors(entry)
    return entry["outputs"]


def errors(entry):
    """Node and message of what went wrong."""
    found = [x for kind, x in entry["status"]["messages"] if kind == "execution_error"]
    return [(x["node_id"], x["exception_message"].strip()) for x in found]


def latent(server, outputs):
    (file,) = outputs["save"]["latents"]
    return load_file(server.work / "output" / file["subfolder"] / file["filename"])["latent_tensor"]


def sampled(server, *arguments, **settings):
    return latent(server, run(server, graph(*arguments, **settings)))


def failure(server, nodes):
    """Node and message of a run that must fail."""
    entry = server.run(nodes)
    assert entry["status"]["status_str"] == "error"
    (error,) = errors(entry)
    return error


def forget(server):
    """Empty ComfyUI's caches, so that the next graph runs all its nodes anew."""
    import urllib.request

    body = b'{"free_memory": true, "unload_models": true}'
    request = urllib.request.Request(
        server.url + "/free", body, {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request, timeout=30).close()
    run(server, {"image": node("EmptyImage", width=8, height=8, batch_size=1, color=0)}
        | {"look": node("PreviewImage", images=["image", 0])})  # fmt: skip


def text_of(outputs, name="report"):
    (text,) = outputs[name]["text"]
    return text


def video_share(report, density):
    """The density of a report, and the one it has where text is always seen (32 tokens)."""
    found = float(re.search(r"^density ([\d.]+)", report, re.M).group(1))
    frames, height, width = map(int, re.search(r"grid (\d+)x(\d+)x(\d+)", report).groups())
    return found, frames * height * width


def test_every_node_explains_itself(server):
    ours = {n: x for n, x in server.get("/object_info").items() if n.startswith("GenAccel")}
    assert len(ours) == 10
    for name, info in ours.items():
        assert info["description"] and info["display_name"] and "gen_accel" in info["category"]
        assert all(info["output_tooltips"]), name
        for inputs in (info["input"]["required"], info["input"].get("optional", {})):
            for key, (_, options) in inputs.items():
                assert options["tooltip"], f"{name}.{key}"


@pytest.mark.parametrize("family", FAMILIES)
def test_all_dense_is_the_model_itself_and_sparse_is_not(server, family):
    plain = sampled(server, family)
    dense = (SPARSE, SETTINGS["pooled"][1] | ALWAYS | {"start_percent": 1.0})
    assert plain.isfinite().all() and plain.std() > 0.01
    assert (sampled(server, family, dense) - plain).abs().max() < 1e-5
    outputs = run(server, with_report(graph(family, (SPARSE, SETTINGS["pooled"][1] | ALWAYS))))
    assert (latent(server, outputs) - plain).abs().max() > 1e-4
    found, video = video_share(text_of(outputs), 0.3)
    assert "8 sparse calls, 0 dense" in text_of(outputs)
    if family in ("wan", "cosmos", "cosmos2"):
        assert found == pytest.approx(0.3, abs=0.005)
    else:  # blocks with text are always seen, in both directions
        blocks = video // 16
        rows, text = blocks + 2, blocks**2 * 0.3
        keys = blocks + 2
        assert found == pytest.approx((text + rows * keys - blocks**2) / (rows * keys), abs=0.01)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SETTINGS)
def test_every_sparse_node_on_every_family(server, family, name):
    kind, settings = SETTINGS[name]
    if (family, name) == ("flux", "gna"):
        settings = settings | {"window": "4, 4"}
    outputs = run(server, with_report(graph(family, (kind, settings | ALWAYS), steps=3)))
    report = text_of(outputs)
    assert re.search(r"self-attention: [1-9]\d* sparse calls", report), report
    assert latent(server, outputs).isfinite().all()


@pytest.mark.parametrize("name", ["pooled", "paro"])
@pytest.mark.parametrize("family", ["wan_i2v", "wan_vace", "wan22"])
def test_other_wans(server, family, name):
    kind, settings = SETTINGS[name]
    plain = sampled(server, family)
    dense = (kind, settings | ALWAYS | {"start_percent": 1.0})
    assert torch.equal(sampled(server, family, dense), plain)
    patch = (kind, settings | ALWAYS | {"start_percent": 0.5})
    outputs = run(server, with_report(graph(family, patch)))
    calls = 6 if family == "wan_vace" else 4  # its own block is one more
    assert f"{calls} sparse calls, {calls} dense" in text_of(outputs)
    assert (latent(server, outputs) - plain).abs().max() > 1e-5


def test_a_run_split_between_two_samplers(server):
    """As Wan 2.2 does it: percent is of the whole schedule, not of each part."""
    nodes = graph("wan", (SPARSE, SETTINGS["pooled"][1] | ALWAYS | {"start_percent": 0.5}))
    shared = nodes.pop("sample")["inputs"]
    shared |= {"noise_seed": shared.pop("seed"), "return_with_leftover_noise": "enable"}
    del shared["denoise"]
    first = shared | {"add_noise": "enable", "start_at_step": 0, "end_at_step": 2}
    last = shared | {"add_noise": "disable", "start_at_step": 2, "end_at_step": 4}
    nodes["sample"] = node("KSamplerAdvanced", **last | {"latent_image": ["report1", 0]})
    nodes["sample1"] = node("KSamplerAdvanced", **first)
    nodes["report1"] = node("GenAccelReport", model=shared["model"], after=["sample1", 0])
    outputs = run(server, with_report(nodes))
    assert "0 sparse calls, 4 dense" in text_of(outputs, "report1")
    assert "4 sparse calls, 0 dense" in text_of(outputs)
    whole = sampled(server, "wan", (SPARSE, nodes["patch0"]["inputs"] | {"model": None}))
    assert (latent(server, outputs) - whole).abs().max() < 1e-4


def test_dense_backends(server):
    info = server.get("/object_info")["GenAccelDenseBackend"]["input"]["required"]["backend"]
    options = info[1].get("options") or info[0]
    plain = sampled(server, "wan")
    assert {"ComfyUI's", "pytorch", "split", "gen_accel int8+int8"} <= set(options)
    for backend in ("ComfyUI's", "pytorch", "split", "sub_quad", "gen_accel int8+int8"):
        nodes = with_report(graph("wan", ("GenAccelDenseBackend", {"backend": backend})))
        outputs = run(server, nodes)
        assert "0 sparse calls, 8 dense" in text_of(outputs)
        off = (latent(server, outputs) - plain).abs().max()
        assert 0 < off < 0.05 if "int8" in backend else off < 1e-4, backend


def test_precisions(server):
    kind, settings = SETTINGS["pooled"]
    exact = sampled(server, "wan", (kind, settings | ALWAYS))
    for precision in ("fp32", "bf16", "int8", "int8+int8", "int8+fp8", "int4"):
        out = sampled(server, "wan", (kind, settings | ALWAYS | {"precision": precision}))
        off = (out - exact).norm() / exact.norm()
        assert off == 0 if precision == "fp32" else 0 < off < 0.05, (precision, off)


def test_nodes_chain(server):
    """The dense backend keeps what the sparse node before it set, and the other way round."""
    sparse = (SPARSE, SETTINGS["pooled"][1] | ALWAYS | {"start_percent": 0.5})
    dense = ("GenAccelDenseBackend", {"backend": "gen_accel int8+int8"})
    alone = sampled(server, "wan", sparse)
    both = sampled(server, "wan", sparse, dense)
    assert torch.equal(both, sampled(server, "wan", dense, sparse))
    assert 0 < (both - alone).abs().max() < 0.05


@pytest.mark.parametrize("chains", [False, True])
@pytest.mark.parametrize("place", ["before", "after"])
def test_other_peoples_overrides(server, place, chains):
    label = f"{place}-{chains}"
    ours = (SPARSE, SETTINGS["pooled"][1] | ALWAYS | {"start_percent": 0.5})
    theirs = ("ForeignOverride", {"label": label, "chains": chains})
    patches = (theirs, ours) if place == "before" else (ours, theirs)
    nodes = graph("wan", *patches)
    nodes["calls"] = node("ForeignCalls", after=["sample", 0], label=label)
    outputs = run(server, with_report(nodes))
    assert "4 sparse calls, 4 dense" in text_of(outputs)
    # 8 of cross-attention and 4 that are dense.
    assert text_of(outputs, "calls") == "12"
    assert torch.equal(latent(server, outputs), sampled(server, "wan", ours))


@pytest.mark.parametrize("name", ["pooled", "paro"])
def test_runs_do_not_leak_into_each_other(server, name):
    kind, settings = SETTINGS[name]
    patch = (kind, settings | ALWAYS | {"start_percent": 0.25})
    alone = {}
    for family, seed in (("wan", 1), ("wan", 2), ("flux", 1)):
        forget(server)
        alone[family, seed] = sampled(server, family, patch, seed=seed)
    forget(server)
    for key in (("wan", 1), ("flux", 1), ("wan", 2), ("wan", 1)):
        assert torch.equal(sampled(server, key[0], patch, seed=key[1]), alone[key])
    assert torch.equal(sampled(server, "wan", height=16), sampled(server, "wan", height=16))


def test_a_plan_is_saved_and_used(server):
    kind, settings = SETTINGS["paro"]
    patch = (kind, settings | ALWAYS | {"start_percent": 0.5})
    nodes = graph("wan", patch)
    nodes["plan"] = node("GenAccelSavePlan", model=["patch0", 0], after=["sample", 0], name="tiny")
    outputs = run(server, nodes)
    assert "tiny.safetensors" in text_of(outputs, "plan")
    loaded = (kind, patch[1] | {"plan": "tiny.safetensors"})
    assert torch.equal(sampled(server, "wan", loaded), latent(server, outputs))

    who, message = failure(server, graph("cosmos", loaded))
    assert who == "sample" and "plan was made for WanTransformer3DModel/2x2x24" in message
    outputs = run(server, with_report(graph("wan", loaded, height=20)))
    assert "plan was made for grid 5x8x12, this run has 5x10x12" in text_of(outputs)
    assert "0 sparse calls" in text_of(outputs)


def test_sizes_that_patches_do_not_divide(server):
    outputs = run(server, with_report(graph("wan", (SPARSE, SETTINGS["pooled"][1] | ALWAYS),
                                            height=15, width=23)))  # fmt: skip
    assert "grid 5x8x12" in text_of(outputs) and "8 sparse calls" in text_of(outputs)


def test_context_windows(server):
    kind, settings = SETTINGS["pooled"]
    windows = ("ContextWindowsManual", {
        "context_length": 3, "context_overlap": 1, "context_schedule": "standard_static",
        "context_stride": 1, "closed_loop": False, "fuse_method": "pyramid", "dim": 2,
    })  # fmt: skip
    outputs = run(server, with_report(graph("wan", (kind, settings | ALWAYS), windows)))
    assert "grid 3x8x12" in text_of(outputs)
    assert "16 sparse calls, 0 dense" in text_of(outputs)


@pytest.mark.parametrize("name, ours", [("pooled", True), ("paro", False)])
def test_skip_layer_guidance(server, name, ours):
    kind, settings = SETTINGS[name]
    skip = ("SkipLayerGuidanceDiT", {
        "double_layers": "0", "single_layers": "", "scale": 3.0, "start_percent": 0.0,
        "end_percent": 1.0, "rescaling_scale": 0.0,
    })  # fmt: skip
    patch = (kind, settings | ALWAYS | {"start_percent": 0.5})
    report = text_of(run(server, with_report(graph("wan", patch, skip))))
    declined = "a node replaces blocks, and which of them calls is not known" in report
    assert declined != ours and re.search(r"[1-9]\d* sparse calls", report)


def test_area_conditioning(server):
    nodes = graph("flux", (SPARSE, SETTINGS["pooled"][1] | ALWAYS))
    nodes["area"] = node("ConditioningSetArea", conditioning=["tiny", 2], width=192, height=256,
                         x=0, y=0, strength=1.0)  # fmt: skip
    nodes["both"] = node("ConditioningCombine", conditioning_1=["tiny", 2],
                         conditioning_2=["area", 0])  # fmt: skip
    nodes["sample"]["inputs"]["positive"] = ["both", 0]
    report = text_of(run(server, with_report(nodes)))
    assert "1x16x24" in report and "1x16x12" in report and " 0 dense" in report


def test_pictures(server):
    def image(color, count):
        return node("EmptyImage", width=64, height=64, batch_size=count, color=color)

    nodes = {"grey": image(0x808080, 4), "black": image(0, 4)}
    nodes["same"] = node("GenAccelFidelity", images=["grey", 0], reference=["grey", 0])
    nodes["other"] = node("GenAccelFidelity", images=["black", 0], reference=["grey", 0])
    nodes["guard"] = node("GenAccelGuard", images=["black", 0], on_broken="report")
    outputs = run(server, nodes)
    assert "PSNR 100.00 dB, SSIM 1.0000, flicker +0.00000, 4 frames" in text_of(outputs, "same")
    assert "PSNR 5.99 dB" in text_of(outputs, "other")
    assert "frames 0 to 3: black" in text_of(outputs, "guard")

    nodes["guard"]["inputs"]["on_broken"] = "stop the run"
    who, message = failure(server, nodes)
    assert who == "guard" and message.startswith("images: frames 0 to 3: black")
    nodes = {"a": image(0, 4), "b": image(0, 5)}
    nodes["look"] = node("GenAccelFidelity", images=["a", 0], reference=["b", 0])
    assert failure(server, nodes)[0] == "look"


def test_gna_suggest(server):
    nodes = graph("wan")
    nodes["suggest"] = node("GenAccelGnaSuggest", model=["tiny", 0], latent=["tiny", 1],
                            density=0.25, border="shift", choice=1)  # fmt: skip
    settings = SETTINGS["gna"][1] | ALWAYS
    settings |= {"window": ["suggest", 0], "stride": ["suggest", 1]}
    nodes["gna"] = node("GenAccelGna", model=["tiny", 0], **settings)
    nodes["sample"]["inputs"]["model"] = ["gna", 0]
    nodes["table"] = node("PreviewAny", source=["suggest", 2])
    outputs = run(server, with_report(nodes))
    best = re.search(r"1\. .*density ([\d.]+)", text_of(outputs, "table")).group(1)
    assert float(re.search(r"^density ([\d.]+)", text_of(outputs), re.M).group(1)) == pytest.approx(
        float(best), abs=1e-3
    )


@pytest.mark.parametrize(
    "kind, settings, message",
    [
        (SPARSE, {"order": "tile"}, "order='tile' with select='pooled': its orders are"),
        (SPARSE, {"start_percent": 0.9, "end_percent": 0.1}, "give 0 <= start <= end <= 1"),
        (SPARSE, {"dense_blocks": "0, last"}, "dense_blocks='0, last': 'last' is neither"),
        (SPARSE, {"tail": "ball"}, "tail='ball': choose from"),
        (SPARSE, {"precision": "int3"}, "precision='int3': it must be one of"),
        ("GenAccelParo", {"plan": "../secret"}, "plan='../secret': use letters"),
        ("GenAccelParo", {"plan": "gone"}, "gone.safetensors: no such file"),
        ("GenAccelDenseBackend", {"backend": "magic"}, "backend='magic': this ComfyUI has"),
        ("GenAccelGna", {"window": "wide"}, "window='wide': write auto, one whole number"),
        ("GenAccelGna", {"window": "9, 9"}, "2 entries for a grid of 3 axes"),
        ("GenAccelGna", {"window": "99, 4, 4"}, "99"),
    ],
)
def test_bad_settings_are_a_red_node_with_one_line(server, kind, settings, message):
    base = {SPARSE: "pooled", "GenAccelGna": "gna", "GenAccelParo": "paro"}.get(kind)
    good = SETTINGS[base][1] | ALWAYS if base else {"backend": "pytorch"}
    who, said = failure(server, graph("wan", (kind, good | settings)))
    assert who in ("patch0", "sample")
    assert message in said and "\n" not in said
    assert sampled(server, "wan", (kind, good)).isfinite().all(), "the server lives on"


def test_what_the_server_itself_refuses(server):
    for settings in ({"density": 2.0}, {"density": 0.0}, {"start_percent": 7}, {"min_tokens": -1}):
        nodes = graph("wan", (SPARSE, SETTINGS["pooled"][1] | ALWAYS | settings))
        answer = server.run(nodes)
        (problem,) = answer["node_errors"]["patch0"]["errors"]
        assert next(iter(settings)) in problem["details"]
    nodes = graph("wan")
    nodes["report"] = node("GenAccelReport", model=["tiny", 0], after=["sample", 0])
    assert "no gen_accel node has patched it" in failure(server, nodes)[1]


WORKFLOWS = sorted((ROOT / "example_workflows" / "api").glob("*.json"))
STANDS_FOR = {
    "UNETLoader": ("tiny", 0), "CLIPTextEncode": ("tiny", 2), "EmptySD3LatentImage": ("tiny", 1),
    "EmptyHunyuanLatentVideo": ("tiny", 1), "EmptyCosmosLatentVideo": ("tiny", 1),
    "VAEDecode": ("image", 0),
}  # fmt: skip


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_example_workflows_run_on_tiny_models(server, path):
    """Nothing but the checkpoints, their text encoders and VAEs is replaced."""
    example = json.loads(path.read_text())
    family = next(f for f in sorted(FAMILIES, key=len) if path.stem.startswith(f))
    scale = 2 if family == "flux" else 1
    nodes = {
        "tiny": node("TinyModel", family=family, height=16 * scale, width=24 * scale),
        "image": node("EmptyImage", width=64, height=64, batch_size=5, color=0x406080),
    }
    for key, entry in example.items():
        if entry["class_type"] in STANDS_FOR or entry["class_type"].endswith("Loader"):
            continue
        inputs = dict(entry["inputs"])
        for name, value in inputs.items():
            if isinstance(value, list):
                inputs[name] = list(STANDS_FOR.get(example[value[0]]["class_type"], value))
        inputs |= {"steps": 3} if "steps" in inputs else {}
        inputs |= {"min_tokens": 0} if "min_tokens" in inputs else {}
        if "cfg" in inputs and family in ("flux", "hunyuan_video"):
            inputs["cfg"] = 1.0
        nodes[key] = node(entry["class_type"], **inputs)
    outputs = run(server, nodes)
    texts = [str(o.get("text")) for o in outputs.values()]
    assert any(re.search(r"[1-9]\d* sparse calls", text) for text in texts), texts


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_example_workflows_lack_only_model_files(server, path):
    answer = server.run(json.loads(path.read_text()))
    for found in answer["node_errors"].values():
        assert found["class_type"].endswith("Loader")
        assert {error["type"] for error in found["errors"]} == {"value_not_in_list"}
    for entry in json.loads(path.read_text()).values():
        info = server.get("/object_info/" + entry["class_type"])[entry["class_type"]]
        known = {**info["input"]["required"], **info["input"].get("optional", {})}
        assert set(entry["inputs"]) <= set(known), entry


def test_example_workflows_are_in_the_ui_too(server):
    tool = load_tool("comfyui_workflow")
    info = server.get("/object_info")
    assert {p.name for p in WORKFLOWS} == {p.name for p in (WORKFLOWS[0].parents[1]).glob("*.json")}
    for path in WORKFLOWS:
        written = json.loads((path.parents[1] / path.name).read_text())
        assert written == tool.convert(json.loads(path.read_text()), info, path.stem), path.name
    assert server.get("/workflow_templates")["gen_accel"]
