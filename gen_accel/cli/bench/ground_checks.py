"""Checks of ``bench ground`` beside the table: sinks that were planted, no-target scores, cost."""

from __future__ import annotations

import math
import statistics
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gen_accel.cli.bench.ground_score import Item, latents_of, make
from gen_accel.eval.harness import result_row
from gen_accel.layout import TokenLayout
from gen_accel.pipelines.probe import Call, probe
from gen_accel.pipelines.refam.reading import read
from gen_accel.pipelines.refam.sinks import SinkRule, find_sinks, merge_heads

if TYPE_CHECKING:
    from gen_accel.pipelines.refam.backbone import Backbone
    from gen_accel.pipelines.refam.pipeline import Choice

KAPPAS = (5.0, 10.0, 20.0, 40.0)
ROUNDS = 30  # of timing


def plant(call: Call, places: Tensor, share: float = 0.1) -> Call:
    """The same call, but every query gives each key at ``places`` the same part of its attention.

    One more channel adds to those keys' logits what every query needs for that.

    Args:
        call: Without padding.
        places: Keys.
        share: Of each query's attention, for one such key alone.
    """
    q, k = call.q.float(), call.k.float()
    dim = q.shape[-1]
    k = torch.cat([k, k.new_zeros(*k.shape[:-1], 1)], -1)
    k[:, places] = 0
    k[:, places, :, -1] = 1
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k[..., :-1]) * dim**-0.5
    scores[..., places] = float("-inf")
    wanted = scores.logsumexp(-1) + math.log(share / (1 - share))  # [batch, heads, queries]
    scale = (dim + 1) ** 0.5  # the scores are divided by it now
    extra = wanted.transpose(1, 2)[..., None] * scale
    q = torch.cat([q * (scale / dim**0.5), extra], -1)
    return Call(q, k, call.layout, call.kind, block=call.block)


def planted(backbone: Backbone, found: list[Item], choice: Choice) -> list[dict[str, Any]]:
    """Recall of planted sinks and false positives on real clips, by kappa."""
    calls: list[list[Call]] = []
    for item in found:
        prompt = make(item, "magnets")
        text = backbone.text([prompt.text])
        latents = latents_of(backbone, [item])
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        noised = (1 - choice.sigma) * latents + choice.sigma * noise
        with probe(backbone.transformer, _valid) as seen:
            backbone.forward(noised, choice.sigma, text)
        # Wan's words and video are keys of different calls: there, sinks are planted in the video.
        calls.append([call for call in seen if call.kind != "cross"])
    hits = {kappa: 0 for kappa in KAPPAS}
    false = {kappa: 0 for kappa in KAPPAS}
    plain = {kappa: 0 for kappa in KAPPAS}
    count = 0
    for number, seen in enumerate(calls):
        generator = torch.Generator().manual_seed(number)
        tokens = seen[0].k.shape[1]
        places = torch.randperm(tokens, generator=generator)[: 1 + number % 3]
        count += len(places)
        with_sinks = _measured([plant(call, places) for call in seen])
        without = _measured(seen)
        for kappa in KAPPAS:
            rule = SinkRule(kappa=kappa)
            got = find_sinks(*with_sinks, torch.tensor([tokens]), rule)[0]
            hits[kappa] += int(got[places].sum())
            false[kappa] += int(got.sum() - got[places].sum())
            plain[kappa] += int(find_sinks(*without, torch.tensor([tokens]), rule)[0].sum())
    large = sum(any(t.size == "large" for t in item.scene.things) for item in found)
    return [
        result_row(
            "ground sinks", f"kappa {kappa:g}", hits[kappa] / count, "recall", n=count,
            config={"false_positives": false[kappa], "unplanted": plain[kappa],
                    "clips": len(found), "clips_with_large_objects": large},
        )
        for kappa in KAPPAS
    ]  # fmt: skip


def _valid(call: Call) -> Call:
    """The call without padding."""
    layout = call.layout
    text = layout.text if layout.text_valid is None else layout.text_valid[0]
    end = layout.tokens - layout.text + text
    cut = TokenLayout(layout.grid, layout.text_before, text - layout.text_before)
    return Call(call.q[:, :end].clone(), call.k[:, :end].clone(), cut, call.kind, block=call.block)


def _measured(calls: list[Call]) -> tuple[Tensor, Tensor]:
    got = [call.incoming(128) for call in calls]
    merged = [merge_heads(g.mass, g.uniformity) for g in got]
    return torch.stack([m for m, _ in merged]), torch.stack([u for _, u in merged])


def abstention(
    answered: list[tuple[str, float]], absent: list[tuple[str, float]]
) -> list[dict[str, Any]]:
    """How well the score tells expressions with a target from those without: area under ROC."""
    rows = []
    for tier in ("all", *dict.fromkeys(t for t, _ in absent)):
        yes = [s for t, s in answered if tier in ("all", t)]
        no = [s for t, s in absent if tier in ("all", t)]
        if not yes:
            continue
        area = statistics.fmean((a > b) + 0.5 * (a == b) for a in yes for b in no)
        counts = {"with_target": len(yes), "without": len(no)}
        rows.append(result_row("ground abstention", tier, area, "AUC", n=len(no), config=counts))
    return rows


def overhead(backbone: Backbone, found: list[Item], choice: Choice) -> list[dict[str, Any]]:
    """CPU time of a forward that is read, over one that is not: median of paired rounds."""
    item = found[0]
    prompt = make(item, "magnets")
    latents = latents_of(backbone, [item])
    text = backbone.text([prompt.text])

    def plain() -> None:
        backbone.forward(latents, choice.sigma, text)

    rows_, joint = (choice.direction == d for d in ("rows", "joint"))

    def reading(rule: SinkRule | None) -> None:
        read(backbone, latents, [prompt.text], heads=choice.heads, sigma=choice.sigma,
             rows=rows_, joint=joint, rule=rule)  # fmt: skip

    def everything_but_attention() -> None:
        backbone.text([prompt.text])
        torch.randn(latents.shape)

    rows = []
    for name, rule in (("words", None), ("words and sinks", SinkRule())):
        ratios = []
        for _ in range(ROUNDS):
            spent = []
            for part in (plain, partial(reading, rule), everything_but_attention):
                start = time.process_time()
                part()
                spent.append(time.process_time() - start)
            ratios.append((spent[1] - spent[2]) / spent[0] - 1)
        rows.append(
            result_row(
                "ground overhead", name, statistics.median(ratios), "share of a forward", n=ROUNDS,
                config={"blocks": sorted(choice.heads), "direction": choice.direction},
            )
        )  # fmt: skip
    return rows
