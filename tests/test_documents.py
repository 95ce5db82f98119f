"""What the documents say: numbers are those of the committed rows, commands parse, names exist."""

import ast
import importlib
import json
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from gen_accel.cli import main as cli
from gen_accel.cli.bench.e2e_page import BEGIN, END, e2e_tables, newest
from gen_accel.cli.bench.wipe import BEGIN as WIPE_BEGIN
from gen_accel.cli.bench.wipe import END as WIPE_END
from gen_accel.cli.bench.wipe_table import tables as wipe_tables
from gen_accel.eval.harness import read_rows

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "eval" / "results"
E2E = RESULTS / "e2e_cpu.jsonl"


@cache
def rows(name):
    return read_rows(RESULTS / f"{name}.jsonl")


def the(found):
    """The newest of rows for the same thing; there has to be one."""
    assert found, "no such row"
    return found[-1]


def call(file, kind, dim, dtype, **wanted):
    """Speed-up of whole calls over SDPA and over the fastest dense form."""
    both = []
    for over in ("SDPA", "fastest dense"):
        config = {**wanted, "dtype": dtype, "over": over}
        both.append(
            the(
                [
                    row
                    for row in rows(file)
                    if row["kind"] == f"{kind} speed-up"
                    and row["name"] == "whole call"
                    and row["shape"][3] == dim
                    and config.items() <= row["config"].items()
                ]
            )["value"]
        )
    return both


def static_call(row, column):
    dim, dtype = re.fullmatch(r"d (\d+), (\w+)", row).groups()
    mask = column.replace("unbalanced", "calibrated")
    return "{:.2f}x ({:.2f}x)".format(
        *call("attention_cpu", "attention", int(dim), dtype, mask=mask)
    )


def chosen_call(row, column):
    dim, dtype, density = re.fullmatch(r"d (\d+), (\w+), ([\d.]+)", row).groups()
    tail, _, parts = column.partition(", ")
    mask = f"{density}, {parts or 'block means'}, {tail}"
    return "{:.2f}x".format(call("pooled_cpu", "pooled", int(dim), dtype, mask=mask)[0])


def named(file, name, kind=None, **config):
    return the(
        [
            row
            for row in rows(file)
            if row["name"] == name
            and kind in (None, row["kind"])
            and config.items() <= row["config"].items()
        ]
    )


def selection(row, column):
    found = named("tails_toy", row, "selection", density=float(column))
    config = found["config"]
    # One that keeps more than it was asked for says so.
    keeps = f", keeps {config['kept']:.2f}" if config["kept"] > 1.2 * config["density"] else ""
    return f"{found['value']:.3f} ({config['share']:.2f}{keeps})"


def tail(row, column):
    density, name = row.split(" ", 1)
    return f"{named('tails_toy', name, 'tail', density=float(density), tail=column)['value']:.3f}"


def interval(found):
    low, high = found["spread"]
    return f"{found['value']:.1f} ± {(high - low) / 2:.1f}"


def mixture(row, column):
    return interval(named("mixtures_toy", row.replace("sub-blocks", "pooled"), tail=column))


def damage(row, column):
    return f"{named('damage_cpu', row, damage=column)['value']:.2f}"


ORDERS = {
    "none (raster)": "raster",
    "mass kept (default)": "mass",
    "paper, incoherence alone": "paper, incoherence only",
    "mass kept, masks from 4 of 16 rows": "mass, 4 of 16 rows",
    "mass kept, masks from 1 of 16 rows": "mass, 1 of 16 rows",
}


def orders(row, column):
    density = float(column.removeprefix("density "))
    name, choice = "mass kept on held-out runs", ORDERS.get(row, row)
    return f"{named('orders_toy', name, choice=choice, density=density)['value']:.3f}"


def precision(row, column):
    found = named("precision_toy", row, "precision", data=column)
    return f"{found['value']:.4f} ({found['config']['worst']:.4f})"


def weights(row, column):
    found = named("precision_toy", row, "weights", order=column)["value"]
    return f"{found:.1f}" if row == "incoherence" else f"{found:.4f}"


def precise_clips(row, column):
    found = named("precision_toy", row, "clip", attention=column)
    return "equal" if found["value"] == 100 else interval(found)


def grounded(row, column, file="ground_toy"):
    found = named(file, row, "ground", tier=column.partition(" (")[0])
    numbers = [found["config"].get(key) for key in ("flood", "iou")]
    assert f"({found['n']})" in column
    points = f"{100 * found['value']:.0f}"
    return " / ".join([points, *("–" if n is None else f"{n:.2f}" for n in numbers)])


def grounded_in_pictures(row, column):
    return grounded(row, column, "ground_flux")


def grounding_control(row, column):
    found = named("ground_toy", row, "ground", tier=column)
    return f"{100 * found['value']:.0f} / {found['config']['ap']:.2f}"


# Page and beginning of the table's head -> what a cell has to say.
TABLES = {
    ("docs/benchmarks.md", "| | uniform 0.25 |"): static_call,
    ("docs/benchmarks.md", "| | drop | rectified | joint |"): chosen_call,
    ("docs/methods.md", "| | 0.25 | 0.125 |"): selection,
    ("docs/methods.md", "| density, order + selection |"): tail,
    ("docs/methods.md", "| | drop | rectified+gapr |"): mixture,
    ("docs/metrics.md", "| | noise | blur |"): damage,
    ("docs/paro.md", "| order chosen by |"): orders,
    ("docs/precision.md", "| mean (worst call) |"): precision,
    ("docs/precision.md", "|  | raster | axis | curve |"): weights,
    ("docs/precision.md", "|  | all blocks | PARO 0.3 |"): precise_clips,
    ("docs/refam.md", "| | all (520) |"): grounded,
    ("docs/refam.md", "| | all | colour |"): grounding_control,
    ("docs/refam.md", "| pictures | all (520) |"): grounded_in_pictures,
}
# Tables whose numbers are not measurements, or are checked elsewhere.
OTHERS = {
    "README.md": ["| | |"],  # versions of models
    "docs/comfyui.md": ["| model |"],  # versions of models
    "docs/evaluation.md": [
        "| limit | means |",  # a default
        "| setting | density run |",  # an example of `verdict`, whose report has every clip
    ],
    "docs/gna.md": ["| model, grid, window |"],  # counted, not timed: tests/test_simulate.py
    "docs/metrics.md": ["| | definition |"],
    "docs/object_wiper.md": [
        "| known | what we chose |",  # settings
        "| | default: 50 midpoint steps |",  # counted: `WipeSetting` and the shapes
        "| bar |",  # sentences; the tables behind them are checked below
    ],
    "docs/paro.md": ["| | |", "| | paper and its public code |"],  # defaults
    "docs/precision.md": ["| layer |"],  # what a command prints, as an example
    "docs/refam.md": [
        "| | what we do | where from |",  # settings
        "| | | answer |",  # sentences; their differences are checked below
    ],
    "docs/spaattn.md": ["| beyond the paper |"],
    "docs/world.md": ["| | bar | how |"],
}


def tables(page):
    """Lines of every table outside the marks between which a command writes from its rows."""
    written = r"<!-- (\w+): ?begin -->.*?<!-- \1: ?end -->"
    text = re.sub(written, "", (ROOT / page).read_text(), flags=re.DOTALL)
    return [part.splitlines() for part in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)]


def cells(line):
    return [cell.strip().strip("*`") for cell in line.strip().strip("|").split("|")]


PAGES = ["README.md", *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").glob("*.md")))]


@pytest.mark.parametrize(("page", "head"), TABLES, ids=str)
def test_a_table_is_what_its_rows_say(page, head):
    found = [lines for lines in tables(page) if lines[0].startswith(head)]
    assert len(found) == 1, f"{page} has {len(found)} tables that begin with {head}"
    columns = [cell.strip("`") for cell in cells(found[0][0])[1:]]
    for line in found[0][2:]:
        row, *values = cells(line)
        row = row.replace("**", "")
        expected = [TABLES[page, head](row, column) for column in columns]
        assert [value.strip("*") for value in values] == expected, row


@pytest.mark.parametrize("page", PAGES)
def test_every_table_with_numbers_is_checked_or_explained(page):
    heads = [head for known, head in TABLES if known == page] + OTHERS.get(page, [])
    for lines in tables(page):
        if re.search(r"\d\.\d", "".join(lines[2:])):
            assert any(lines[0].startswith(head) for head in heads), (
                f"{page}: {lines[0]} has numbers; say in this file which rows they come from"
            )


@pytest.mark.parametrize(
    ("better", "worse", "tier", "said"),
    [
        ("append + filter", "filter", "all in pictures", "-0.8, -2.9 .. 1.4"),
        ("append + filter", "filter", "all", "+6.4 (3.1 .. 9.8)"),
        ("append + filter", "filter", "colour", "+21.8 (15.1 .. 28.2)"),
        ("rows: append + filter", "rows: filter", "all", "+0.9, -0.7 .. 2.3"),
        ("drop heaviest token", "drop random token", "all", "8.0 (5.2 .. 10.9)"),
        ("joint: append + filter", "joint: filter", "all", "-1.6, -2.9 .. -0.4"),
        ("append + filter", "content words", "all", "-2.5, -5.4 .. 0.5"),
        ("append + filter", "content words", "colour", "+2.2, -4.3 .. 8.5"),
        ("append + filter", "pads", "colour", "+7.0, 3.0 .. 11.2"),
        ("append + filter", "nonsense", "colour", "+12.2, 6.9 .. 17.4"),
        ("append + filter", "absent object", "all", "+4.7, 2.0 .. 7.2"),
    ],
)
def test_differences_of_refam(better, worse, tier, said):
    tier, _, pictures = tier.partition(" in ")
    found = the(
        [
            row
            for row in rows("ground_flux" if pictures else "ground_toy")
            if row["unit"] == "pointing"
            and {"better": better, "worse": worse, "tier": tier}.items() <= row["config"].items()
        ]
    )
    assert said in (ROOT / "docs" / "refam.md").read_text()
    numbers = [float(x) for x in re.findall(r"-?\d+\.\d", said)]
    assert numbers == [round(100 * x, 1) for x in (found["value"], *found["spread"])]


def test_the_tables_of_whole_steps_are_rendered_from_their_rows():
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    between = page.split(BEGIN)[1].split(END)[0].strip()
    written = e2e_tables(newest(read_rows(E2E))) if E2E.exists() else ""
    assert between == written


def test_the_readme_says_what_whole_steps_took():
    page = (ROOT / "docs" / "benchmarks.md").read_text().split(BEGIN)[1]
    # The first case, 20,160 tokens, on every machine.
    parts = [part for part in page.split("\n**")[1:] if part.startswith("Wan, narrow**")]
    steps: dict[str, list[float]] = {"paro": [], "gna": [], "sparse": []}
    whole = []
    for part in parts:
        for line in map(cells, part.splitlines()):
            if line[0] in steps:
                steps[line[0]].append(float(line[2]))
                whole.append(float(line[-1]))
    span = {name: f"{min(x):.1f} to {max(x):.1f} times" for name, x in steps.items()}
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert len(parts) == 2
    assert f"{span['paro']} (PARO), {span['gna']} (GNA) and {span['sparse']}" in readme
    assert (
        f"a whole run with its dense first steps {min(whole):.1f} to {max(whole):.1f} times"
        in readme
    )


def test_the_tables_of_wiping_are_rendered_from_their_rows():
    page = (ROOT / "docs" / "object_wiper.md").read_text()
    between = page.split(WIPE_BEGIN)[1].split(WIPE_END)[0].strip()
    assert between == wipe_tables([row for row in rows("wipe_toy") if row["split"] == "test"])


def test_rows_say_on_which_code_and_machine_they_were_measured():
    """``+`` marks a tree with changes; a copy without history has the hash of its sources."""
    for path in sorted(RESULTS.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            commit = row["commit"] or row["config"].get("code", "")
            assert re.fullmatch(r"[0-9a-f]{7,40}\+?", commit) and row["device"], path


WITH_CODE = [
    *PAGES,
    "CHANGELOG.md",
    *(str(p.relative_to(ROOT)) for p in ROOT.glob("models/*/*.md")),
]


def commands(page):
    """Every ``gen-accel`` command of a page, in fences and in running text."""
    text = (ROOT / page).read_text()
    lines = []
    for fence in re.findall(r"^```(?:bash|sh)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        lines += fence.replace("\\\n", " ").splitlines()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    for line in lines:
        found = re.search(r"(?:\bgen-accel|-m gen_accel) ([a-z].*)", line)
        if found and not re.match(r"\s*(pip|git|from|import) ", line):
            words = shlex.split(found[1].replace("NAME", "e2e"), comments=True)
            if words[-1] == "...":
                words.pop()
            # A name alone is a mention: it has to exist, not to be complete.
            yield words if len(words) > 1 else [*words, "--help"]


@pytest.mark.parametrize("page", WITH_CODE)
def test_every_documented_command_parses(page, monkeypatch, capsys):
    for name in cli.COMMANDS:
        monkeypatch.setattr(f"gen_accel.cli.{name}.run", lambda args: 0)
    for words in commands(page):
        try:
            code = cli.main(words)
        except SystemExit as end:  # --help, --version
            code = end.code
        assert code == 0, f"{page}: gen-accel {shlex.join(words)}: {capsys.readouterr().err}"


def test_a_documented_command_with_an_unknown_option_would_be_found(monkeypatch):
    monkeypatch.setattr("gen_accel.cli.generate.run", lambda args: 0)
    assert cli.main(["generate", "--densty", "0.3"]) == 2
    assert sum(len(list(commands(page))) for page in WITH_CODE) > 30


@pytest.mark.parametrize("page", WITH_CODE)
def test_python_in_the_documents_compiles_and_imports_what_exists(page):
    text = (ROOT / page).read_text()
    for code in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{page}: {node.module}.{alias.name}"
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)
