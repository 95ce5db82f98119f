"""``gen-accel bench wipe``: Object-WIPER against the truth of the procedural world.

Every clip is drawn twice, with and without its target, so errors are exact. Settings were chosen on
the ``val`` split (`SETTING`); numbers come from ``test``. A clip's results are appended when it is
done, and clips that the file already holds, of the same weights and settings, are not run again.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gen_accel.cli.bench.options import TOY_MODEL, add, positive
from gen_accel.eval.grounding import iou
from gen_accel.eval.removal import tok_sim
from gen_accel.eval.world.caption import Caption, describe
from gen_accel.eval.world.render import Clip, render
from gen_accel.eval.world.scene import EFFECTS, SHAPES, TOY, Scene, WorldConfig, sample_scene
from gen_accel.pipelines.effects import EffectSetting, find_effects
from gen_accel.pipelines.flow import Text, VideoFlow
from gen_accel.pipelines.masks import dilate, pack_mask, unpack_mask
from gen_accel.pipelines.remover import Inversion, Remover
from gen_accel.pipelines.wipe_setting import WipeSetting
from gen_accel.pipelines.words import text_spans, word_tokens

BEGIN, END = "<!-- wipe: begin -->", "<!-- wipe: end -->"
TOKENS = 32  # of text
COVERED = 0.25  # share of a token's pixels an effect must change for the token to count as effect
SPEED_DENSITY = 0.2
# Chosen on clips of the val split. Layers are the toy's.
SETTING = WipeSetting(
    steps=24,
    solver="euler",
    shift=1.0,
    scaling="bias",
    background_scale=0.2,
    foreground_scale=1.0,
    growth=12.0,
    effects=EffectSetting(
        response_sigma=0.05,
        word_layers=(3, 4),
        response_layers=(4,),
        region="object",
        clip=0.98,
        word_contrast=8.0,
        contrast=7.0,
        attached=True,
    ),
)
_ONE = replace(TOY, empty=0.0, counts=(1.0,), effect=1.0, backgrounds=(0.6, 0.4, 0, 0, 0, 0))
_SHADOW = replace(_ONE, effects=(1.0, 0.0, 0.0, 0.0))
# Kind of clip -> where it is drawn from, and how its share of all clips compares.
KINDS: dict[str, WorldConfig] = {
    "shadow": _SHADOW,
    "reflection": replace(_ONE, effects=(0.0, 1.0, 0.0, 0.0)),
    "glow": replace(_ONE, effects=(0.0, 0.0, 1.0, 0.0)),
    "trail": replace(_ONE, effects=(0.0, 0.0, 0.0, 1.0), motions=(1.0, 0.0, 0.0)),
    "none": replace(_ONE, effect=0.0),
    "decoy": replace(_SHADOW, decoy=1.0),
    "neighbour": replace(_SHADOW, counts=(0.0, 1.0)),
}
REMOVED = {"shadow": 8, "reflection": 5, "glow": 2, "trail": 2, "none": 3}  # of 20 clips
FIRST = {"val": 0, "test": 500_000}  # seeds; the gate uses others


@dataclass
class Batch:
    """Some clips, everything the method sees and everything it does not."""

    clips: list[Clip]
    kinds: list[str]
    video: Tensor
    clean: Tensor
    object_pixels: Tensor
    effect_pixels: Tensor
    latents: Tensor
    text: Text
    target: Text
    queries: list[list[tuple[int, ...]]]
    object_: Tensor
    effect: Tensor
    noise: Tensor

    @property
    def seeds(self) -> list[int]:
        """Seeds of the scenes."""
        return [clip.scene.seed for clip in self.clips]


def scenes(kind: str, split: str, count: int) -> list[Scene]:
    """``count`` scenes of a kind; seeds without one (no room for a neighbour) are passed over."""
    config, found = KINDS[kind], []
    wanted = 2 if kind == "neighbour" else 1
    first = FIRST[split] + 10_000 * list(KINDS).index(kind)
    for seed in range(first, first + 10_000):
        scene = sample_scene(seed, config, split)
        if len(scene.things) == wanted:
            found.append(scene)
        if len(found) == count:
            break
    return found


def prepare(flow: VideoFlow, kind_scenes: list[tuple[str, Scene]], absent: bool = False) -> Batch:
    """Draw and encode; with ``absent`` prompt and query name an object that is not there."""
    clips = [render(scene) for _, scene in kind_scenes]
    captions = [_absent(c.scene) if absent else describe(c.scene) for c in clips]
    video, clean = (
        torch.from_numpy(np.stack([getattr(c, name) for c in clips])).permute(0, 1, 4, 2, 3)
        for name in ("video", "clean")
    )
    object_pixels = torch.from_numpy(np.stack([c.target for c in clips]))
    effect_pixels = torch.from_numpy(np.stack([c.target_effect for c in clips]))
    latents = flow.encode(video)
    text = flow.text([c.text for c in captions])
    target = flow.text([describe(c.scene.without(0)).text for c in clips])
    grid = flow.layout(latents, text).grid
    object_ = pack_mask(object_pixels, grid, flow.temporal)
    queries = []
    for caption in captions:
        spans = text_spans(flow.pipe, caption.text, max_sequence_length=TOKENS)
        named = [s for s in caption.spans if s.thing == 0 and s.role in ("shape", "effect")]
        queries.append([word_tokens(spans, [(s.start, s.end)]) for s in named])
    noise = torch.stack(
        [
            torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(c.scene.seed))
            for c in clips
        ]
    )
    return Batch(
        clips, [kind for kind, _ in kind_scenes], video, clean, object_pixels, effect_pixels,
        latents, text, target, queries, object_, _on_tokens(effect_pixels, object_), noise,
    )  # fmt: skip


def _absent(scene: Scene) -> Caption:
    """A caption of another shape, with a shadow; neither is in the clip."""
    from gen_accel.eval.world.scene import COLOURS

    thing = scene.things[0]
    shape = SHAPES[(SHAPES.index(thing.shape) + 1) % len(SHAPES)]
    colours = list(COLOURS)
    colour = colours[(colours.index(thing.colour) + 3) % len(colours)]
    other = replace(thing, shape=shape, colour=colour, effect="shadow")
    return describe(replace(scene, things=(other,)))


def _on_tokens(pixels: Tensor, object_: Tensor) -> Tensor:
    """Tokens that an effect changes and that the object does not touch."""
    _, frames, height, width = object_.shape
    share = F.adaptive_avg_pool3d(pixels.float(), (frames, height, width))
    return (share >= COVERED) & ~object_


# -- the effect mask ---------------------------------------------------------------------------


def mask_rows(flow: VideoFlow, batch: Batch, setting: EffectSetting, what: str) -> list[dict]:
    """IoU with the truth, and what was taken that must not be."""
    found = find_effects(
        flow, batch.latents, batch.text, batch.queries, batch.object_, setting, batch.noise
    )
    pixels = unpack_mask(found.mask, *batch.video.shape[1:2], *batch.video.shape[3:], flow.temporal)
    pixels = pixels & ~batch.object_pixels
    ideal = unpack_mask(batch.effect, *batch.video.shape[1:2], *batch.video.shape[3:], 1)
    rows = []
    for i, clip in enumerate(batch.clips):
        mask, truth = found.mask[i], batch.effect[i]
        row = {
            "part": "mask", "set": what, "seed": clip.scene.seed,
            "iou": float(iou(mask, truth)),
            "pixel_iou": float(iou(pixels[i], batch.effect_pixels[i])),
            "pixel_ceiling": float(iou(ideal[i] & ~batch.object_pixels[i], batch.effect_pixels[i])),
            "precision": _share(mask & truth, mask), "recall": _share(mask & truth, truth),
            "area": float(mask.float().mean()),
        }  # fmt: skip
        apart = ~batch.object_[i : i + 1] & ~batch.effect[i : i + 1]
        if what == "decoy":
            spot = _on_tokens(_decoy(clip)[None], batch.object_[i : i + 1]) & apart
            row["decoy_taken"] = _share(mask & spot[0], spot[0])
        if what == "neighbour":
            other = torch.from_numpy(clip.effects["shadow"][1])[None]
            kept = _on_tokens(other, batch.object_[i : i + 1]) & apart
            row["neighbour_kept"] = _share(~mask & kept[0], kept[0])
        rows.append(row)
    return rows


def _decoy(clip: Clip) -> Tensor:
    x, y, rx, ry = (v * clip.scene.size for v in clip.scene.decoy or ())
    rows, columns = np.mgrid[0 : clip.scene.size, 0 : clip.scene.size] + 0.5
    spot = np.hypot((columns - x) / rx, (rows - y) / ry) < 0.8
    return torch.from_numpy(np.broadcast_to(spot, clip.video.shape[:3]).copy())


def _share(part: Tensor, whole: Tensor) -> float | None:
    return float(part.sum() / whole.sum()) if whole.any() else None


# -- removal -----------------------------------------------------------------------------------

FULL = "full"
# What the ablations change: of the way back only, or of the inversion too.
BACK: dict[str, dict[str, Any]] = {
    "latent blending": {"preserve": "latent"},
    "KV freeze": {"preserve": "freeze"},
}
ABLATIONS_BACK: dict[str, dict[str, Any]] = {
    "preserve none": {"preserve": "none"},
    "preserve attn_kv": {"preserve": "attn_kv"},
    "no re-initialisation": {"reinit": "none"},
    "foreground scale 2": {"foreground_scale": 2.0},
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "no scaling": {"background_scale": 1.0},
    "no adaptive mask": {"adaptive": False},
    "key scaling": {"scaling": "key", "background_scale": 0.5},
}


def removal_rows(
    flow: VideoFlow, batch: Batch, setting: WipeSetting, network: Any, ablate: bool
) -> list[dict]:
    """All arms on one batch."""
    found = find_effects(
        flow, batch.latents, batch.text, batch.queries, batch.object_, setting.effects, batch.noise
    )
    shown: dict[str, Tensor] = dict(_painted(flow, batch, found.mask))
    inverted = _invert(flow, batch, replace(setting, preserve="freeze"))
    nothing = torch.zeros_like(found.mask)
    run = partial(_come_back, flow, batch, inverted)
    # What does without our masks must not have the adaptive one either.
    alone = replace(inverted, masks=[batch.object_] * setting.steps)
    fixed = partial(_come_back, flow, batch, alone, setting)
    shown[FULL] = run(setting, found.mask)
    for name, options in BACK.items():
        shown[name] = run(replace(setting, **options), found.mask)
    shown["object mask only"] = fixed(nothing)
    shown["object mask dilated"] = fixed(_dilated(batch.object_, found.mask))
    shown["random mask"] = fixed(_random(batch.object_, found.mask, batch.seeds))
    if ablate:
        shown["true mask"] = run(setting, batch.effect)
        shown["no effect mask"] = run(setting, nothing)
        for name, options in ABLATIONS_BACK.items():
            shown[name] = run(replace(setting, **options), found.mask)
        for name, options in ABLATIONS.items():
            changed = replace(setting, **options)
            shown[name] = _come_back(
                flow, batch, _invert(flow, batch, changed), changed, found.mask
            )
    used = unpack_mask(
        found.mask | inverted.masks[0],
        *batch.video.shape[1:2],
        *batch.video.shape[3:],
        flow.temporal,
    )
    rows = []
    for i, clip in enumerate(batch.clips):
        arms = {
            name: _errors(batch, i, frames[i], used[i], network if ablate else None)
            for name, frames in shown.items()
        }
        kind = batch.kinds[i]
        row = {"part": "removal", "set": kind, "seed": clip.scene.seed, "arms": arms}
        rows.append(row)
    return rows


def _invert(flow: VideoFlow, batch: Batch, setting: WipeSetting) -> Inversion:
    return Remover(flow, setting).invert(batch.latents, batch.text, batch.object_)


def _come_back(
    flow: VideoFlow, batch: Batch, inverted: Inversion, setting: WipeSetting, effect: Tensor
) -> Tensor:
    done = Remover(flow, setting).remove(inverted, batch.target, effect, batch.noise)
    return flow.decode(done.latents)


def _painted(flow: VideoFlow, batch: Batch, effect: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What needs no model: the user's mask filled, and for comparison ours filled as well."""
    size = (*batch.video.shape[1:2], *batch.video.shape[3:])
    ours = unpack_mask(effect | batch.object_, *size, flow.temporal)
    yield "identity", batch.video
    for name, fill in (("mean fill", _mean_fill), ("temporal median", _median_fill)):
        yield name, fill(batch.video, batch.object_pixels)
        yield f"{name}, our mask", fill(batch.video, ours)


def _mean_fill(video: Tensor, mask: Tensor) -> Tensor:
    """Each frame's mean outside the mask."""
    outside = ~mask[:, :, None]
    mean = (video * outside).sum((-1, -2), keepdim=True) / outside.sum((-1, -2), keepdim=True)
    return torch.where(outside, video, mean)


def _median_fill(video: Tensor, mask: Tensor) -> Tensor:
    """Median over the frames in which a pixel is uncovered; the mean fill where none is."""
    seen = torch.where(mask[:, :, None], torch.nan, video).nanmedian(1, keepdim=True).values
    filled = torch.where(mask[:, :, None], seen.expand_as(video), video)
    return torch.where(filled.isnan(), _mean_fill(video, mask), filled)


def _dilated(object_: Tensor, effect: Tensor) -> Tensor:
    """The object grown ring by ring until it covers as many tokens as the effect."""
    out = torch.zeros_like(effect)
    for i, wanted in enumerate(effect.flatten(1).sum(1).tolist()):
        grown = object_[i : i + 1]
        while wanted > 0:
            ring = (dilate(grown) & ~grown).flatten().nonzero().flatten()
            if not len(ring):
                break
            step = max(1, len(ring) // max(1, min(wanted, len(ring))))
            taken = ring[::step][:wanted]
            out[i].view(-1)[taken] = True
            wanted -= len(taken)
            grown = grown | out[i : i + 1]
    return out & ~object_


def _random(object_: Tensor, effect: Tensor, seeds: list[int]) -> Tensor:
    """As many tokens as the effect, anywhere outside the object."""
    out = torch.zeros_like(effect)
    for i, seed in enumerate(seeds):
        free = (~object_[i]).flatten().nonzero().flatten()
        order = torch.randperm(len(free), generator=torch.Generator().manual_seed(seed))
        out[i].view(-1)[free[order[: int(effect[i].sum())]]] = True
    return out


def _errors(batch: Batch, i: int, frames: Tensor, used: Tensor, network: Any) -> dict[str, Any]:
    """PSNR to the clean twin by region, what is left of object and effect, TokSim-toy."""
    clean, video = batch.clean[i], batch.video[i]
    object_, effect = batch.object_pixels[i], batch.effect_pixels[i]
    error = (frames - clean).square().mean(1)

    def psnr(where: Tensor) -> float | None:
        if not where.any():
            return None
        return round(float(-10 * error[where].mean().clamp(min=1e-10).log10()), 3)

    def residue(where: Tensor) -> float | None:
        if not where.any():
            return None
        gone = (video - clean).movedim(1, -1)[where]
        left = (frames - clean).movedim(1, -1)[where]
        return round(float((left * gone).sum() / gone.square().sum()), 4)

    out = {
        "foreground": psnr(object_ | effect), "object": psnr(object_), "effect": psnr(effect),
        "background": psnr(~(object_ | effect)), "untouched": psnr(~(object_ | effect | used)),
        "object_left": residue(object_), "effect_left": residue(effect),
    }  # fmt: skip
    if network is not None:
        try:
            out["tok_sim"] = round(float(tok_sim(frames.clamp(0, 1), video, object_, network)), 3)
        except ValueError:  # the object fills its crop in every frame
            out["tok_sim"] = None
    return out


def toy_tokens() -> Callable[[Tensor], Tensor]:
    """Tokens of TokSim-toy: the first layers of fvd-toy, four pixels a token, on single frames."""
    from gen_accel.eval.encoder import load_encoder

    layers = load_encoder().layers[:2]

    def tokens(crops: Tensor) -> Tensor:
        still = crops[:, :, None].expand(-1, -1, 3, -1, -1) * 2 - 1
        return layers(still).mean(2).movedim(1, -1)

    return tokens


def reconstruction_rows(flow: VideoFlow, batch: Batch, setting: WipeSetting) -> list[dict]:
    """There and back with the same prompt, nothing scaled and no foreground."""
    plain = replace(
        setting, adaptive=False, reinit="none", background_scale=1.0, foreground_scale=1.0
    )
    nothing = torch.zeros_like(batch.object_)
    inverted = Remover(flow, replace(plain, preserve="freeze")).invert(
        batch.latents, batch.text, nothing
    )
    rows: list[dict] = [
        {"part": "reconstruction", "set": k, "seed": s} for k, s in zip(batch.kinds, batch.seeds)
    ]
    for preserve in ("none", "attn_v", "attn_kv", "freeze"):
        remover = Remover(flow, replace(plain, preserve=preserve))
        back = remover.remove(inverted, batch.text, nothing, batch.noise).latents
        error = ((back - batch.latents) / 2).square().flatten(1).mean(1)
        same = (back == batch.latents).flatten(1).all(1)
        for row, value, exact in zip(rows, error.clamp(min=1e-12), same):
            row[preserve] = round(float(-10 * value.log10()), 3)
            row[f"{preserve}_exact"] = bool(exact)
    return rows


# -- time --------------------------------------------------------------------------------------


def speed_row(flow: VideoFlow, rounds: int) -> dict:
    """Inversion and way back on more tokens than the toy's own, dense and sparse in turn."""
    from gen_accel import SparseProcessor, apply
    from gen_accel.eval.harness import measure

    latents = torch.randn(1, 3, 5, 128, 128, generator=torch.Generator().manual_seed(0))
    text = flow.text(["a red circle with a shadow"])
    grid = flow.layout(latents, text).grid
    object_ = torch.zeros(1, *grid, dtype=torch.bool)
    object_[:, :, 8:16, 8:16] = True
    remover = Remover(flow, replace(SETTING, steps=3))

    def wipe() -> None:
        inversion = remover.invert(latents, text, object_)
        remover.remove(inversion, text, torch.zeros_like(object_), latents)

    def sparse() -> None:
        policy = SparseProcessor(density=SPEED_DENSITY, dense_steps=0.0, min_tokens=0)
        with apply(flow.pipe.transformer, policy):
            wipe()

    times = measure({"dense": wipe, "sparse": sparse}, repeats=rounds, warmup=0)
    return {
        "part": "speed", "set": f"{grid} tokens", "seed": 0, "density": SPEED_DENSITY,
        "rounds": rounds, "ratio": times["sparse"].speedup_over(times["dense"]),
    }  # fmt: skip


# -- the command -------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    add(parser, *TOY_MODEL, "clips", "docs")
    parser.add_argument("--split", default="test", choices=("val", "test"), help="of the world")
    parser.add_argument("--ablate", type=int, default=0, help="how many of them for ablations too")
    parser.add_argument("--batch", type=positive, default=10, help="clips at once")
    parser.add_argument("--rounds", type=positive, help="also time it, dense and sparse")


def run(args: argparse.Namespace) -> int:
    """Run what the file does not hold yet, then print all tables of the split."""
    from tqdm import tqdm

    from gen_accel.cli.bench.wipe_table import tables
    from gen_accel.eval.files import put_between
    from gen_accel.eval.harness import append_rows, read_rows
    from gen_accel.eval.toys import load_toy

    if args.model != "hunyuan-video":
        raise ValueError(f"--model {args.model}: its settings are toy-hunyuan-video's")
    page = Path(args.docs) if args.docs else None
    if page is not None:
        put_between(page, BEGIN, END)
    path = Path(args.out) if args.out else None
    rows = read_rows(path) if path is not None and path.is_file() else []
    flow = VideoFlow(load_toy(args.model, args.folder), max_sequence_length=TOKENS)
    of = made_of(flow.pipe)
    others = len(rows)
    rows = [row for row in rows if row["split"] == args.split and row.get("made_of") == of]
    if others > len(rows):
        print(f"{path}: {others - len(rows)} rows of other splits, weights or settings left out")
    finish = partial(_row, args, of)
    jobs = _jobs(args, rows)
    network = toy_tokens()
    with torch.no_grad(), tqdm(jobs, unit="batch", disable=not jobs) as bar:
        for part, what, chosen in bar:
            bar.set_description(f"{part} {what}")
            batch = prepare(flow, chosen, absent=what == "absent")
            if part == "mask":
                made = mask_rows(flow, batch, SETTING.effects, what)
            elif part == "reconstruction":
                made = reconstruction_rows(flow, batch, SETTING)
            else:
                made = removal_rows(flow, batch, SETTING, network, what == "ablated")
            made = [finish(row) for row in made]
            rows += made
            if path is not None:
                append_rows(path, made)
    if args.rounds:
        with torch.no_grad():
            row = speed_row(flow, args.rounds)
        rows.append(finish(row))
        if path is not None:
            append_rows(path, rows[-1:])
    text = tables(rows)
    print(text)
    if page is not None:
        put_between(page, BEGIN, END, text)
    return 0


def made_of(pipe: Any) -> str:
    """Hash of the weights and of `SETTING`: what results of other ones are told apart by."""
    digest = hashlib.sha256(repr((SETTING, TOKENS)).encode())
    for name, module in sorted(pipe.components.items()):
        if isinstance(module, torch.nn.Module):
            for key, value in module.state_dict().items():
                digest.update(f"{name}.{key}".encode())
                digest.update(value.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:12]


def _row(args: argparse.Namespace, of: str, row: dict) -> dict:
    """A row as all result files have it, with what the tables read beside it."""
    from gen_accel.eval.harness import result_row

    name, value, unit = _headline(row)
    config = {"split": args.split, "made_of": of}
    model = f"toy-{args.model}"
    full = result_row(
        "wipe", name, value, unit, config=config, model=model, seed=row["seed"], device="cpu"
    )
    return {**full, **config, **row}


def _headline(row: dict) -> tuple[str, float, str]:
    """Name, number and unit of a row."""
    part = row["part"]
    key, unit = {
        "mask": ("iou", "IoU"), "reconstruction": ("attn_v", "dB"), "speed": ("ratio", "x"),
    }.get(part, ("", "dB"))  # fmt: skip
    value = row[key] if key else row["arms"][FULL]["foreground"]
    return f"{part} {row['set']}", value, unit


def _jobs(
    args: argparse.Namespace, rows: list[dict]
) -> list[tuple[str, str, list[tuple[str, Scene]]]]:
    """Batches of clips that are still to run: (part, what, scenes with their kinds)."""
    done = {(row["part"], row["set"], row["seed"]) for row in rows if row["split"] == args.split}
    plan: list[tuple[str, str, list[tuple[str, Scene]]]] = []
    each = max(1, args.clips // 2)
    for what in ("shadow", "reflection", "decoy", "neighbour", "absent", "glow", "trail", "none"):
        kind = "none" if what == "absent" else what
        plan.append(("mask", what, [(kind, s) for s in scenes(kind, args.split, each)]))
    mixed = _mixed(args.split, args.clips)
    ablated = mixed[: args.ablate]
    plan.append(("reconstruction", "", ablated[: args.batch]))
    plan.append(("removal", "ablated", ablated))
    plan.append(("removal", "", mixed[args.ablate :]))
    jobs = []
    for part, what, chosen in plan:
        key = what if part == "mask" else None
        left = [(k, s) for k, s in chosen if (part, key or k, s.seed) not in done]
        for start in range(0, len(left), args.batch):
            jobs.append((part, what, left[start : start + args.batch]))
    return jobs


def _mixed(split: str, count: int) -> list[tuple[str, Scene]]:
    """Clips of all kinds in turn, so that any first part of them has the same shares."""
    pools = {kind: iter(scenes(kind, split, count)) for kind in REMOVED}
    order = [kind for kind, share in REMOVED.items() for _ in range(share)]
    order = [order[(7 * i) % len(order)] for i in range(len(order))]  # shuffled: 7 is prime to 20
    return [(kind, next(pools[kind])) for kind in (order[i % len(order)] for i in range(count))]


assert set(REMOVED) <= set(KINDS) and set(EFFECTS) < set(KINDS)
