"""What ``bench ground`` measures: expressions, conditions, and the score of one answer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gen_accel.eval.grounding import (
    areas,
    average_precision,
    iou,
    j_and_f,
    pointing,
)
from gen_accel.eval.toys import to_latents
from gen_accel.eval.world.caption import Expression, expressions
from gen_accel.eval.world.gate import token_mask
from gen_accel.eval.world.render import render
from gen_accel.eval.world.scene import COLOURS, SHAPES, TOY, Scene, sample_scene
from gen_accel.pipelines.refam.expression import (
    Prompt,
    default_magnets,
    make_prompt,
    word_lists,
)
from gen_accel.pipelines.refam.heatmap import (
    aggregate,
    find_point,
    flood_fill,
    normalise,
    otsu_mask,
    to_pixels,
    word_shares,
)
from gen_accel.pipelines.refam.reading import Heads, Reading, read, token_table
from gen_accel.pipelines.refam.sinks import SinkRule

if TYPE_CHECKING:
    from gen_accel.pipelines.refam.backbone import Backbone
    from gen_accel.pipelines.refam.pipeline import Choice

# Words of the toy's vocabulary that are no answer: what an uninformed user might append.
CONTENT = ("trail", "striped", "glow", "bouncing", "cloudy", "reflection", "small", "gradient",
           "moving")  # fmt: skip
LEARNED = ("on", "a", "plain", "background")  # how captions of the toy's training end
BASELINES = ("centre point", "random point", "random point in the box", "point on the target")


@dataclass(frozen=True)
class Readout:
    """One condition.

    Attributes:
        name: Row of the table.
        prompt: Which prompt is read, see `make`.
        words: Roles of the words whose maps are joined.
        direction: As in `gen_accel.pipelines.refam.heatmap.word_shares`.
        drop: ``""``, ``"sinks"``, ``"heaviest"`` (the token that receives most) or ``"random"``.
        over: Renormalise over content and appended words alone.
        masks: Also measure masks.
    """

    name: str
    prompt: str
    words: tuple[str, ...] = ("content",)
    direction: str = "text"
    drop: str = ""
    over: bool = False
    masks: bool = False


READOUTS = (
    Readout("bare", "bare", ("content", "stop"), masks=True),
    Readout("filter", "bare", masks=True),
    Readout("append, no filter", "magnets", ("content", "stop", "magnet"), masks=True),
    Readout("append + filter", "magnets", masks=True),
    Readout("+ sink drop", "magnets", drop="sinks", masks=True),
    Readout("+ redirect", "magnets", masks=True),
    Readout("full (drop, 2 draws)", "magnets 2", drop="sinks", masks=True),
    Readout("background list", "background", over=True, masks=True),
    Readout("joint: filter", "bare", direction="joint"),
    Readout("joint: append + filter", "magnets", direction="joint", masks=True),
    Readout(
        "joint: full (drop, 2 draws)", "magnets 2", direction="joint", drop="sinks", masks=True
    ),
    Readout("rows: filter", "bare", direction="rows", masks=True),
    Readout("rows: append + filter", "magnets", direction="rows", masks=True),
    Readout("magnets first", "first"),
    Readout("content words", "content"),
    Readout("pads", "pads"),
    Readout("nonsense", "nonsense"),
    Readout("absent object", "absent"),
    Readout("colour of another object", "present"),
    Readout("drop heaviest token", "magnets", drop="heaviest"),
    Readout("drop random token", "magnets", drop="random"),
    Readout("learned background", "learned"),
    Readout("learned background + magnets", "learned magnets"),
)


@dataclass(frozen=True, eq=False)
class Item:
    """An expression of a clip, and the mask of what it means; None: nothing answers.

    Attributes:
        scene: The scene.
        expression: The expression.
        target: bool ``[frames, height, width]``.
        video: ``[frames, 3, height, width]``.
        objects: bool ``[objects, frames, height, width]``.
    """

    scene: Scene
    expression: Expression
    target: Tensor | None
    video: Tensor
    objects: Tensor


def items(split: str, count: int, *, targets: bool = True, pictures: bool = False) -> list[Item]:
    """Expressions of scenes with two to four objects, seeds from 0; five tiers.

    Pictures have one frame, nothing in them has moved, and no expression says that it does.
    """
    world = replace(TOY, empty=0.0, counts=(0.0, 0.5, 0.3, 0.2))
    if pictures:
        world = replace(world, motions=(0.0, 0.0, 1.0))
    found: list[Item] = []
    seed = 0
    while len(found) < count:
        scene = sample_scene(seed, world, split)
        seed += 1
        if len(scene.things) < 2:  # no room was found
            continue
        clip, frames = render(scene), slice(1 if pictures else None)
        video = torch.from_numpy(clip.video[frames]).movedim(-1, 1)
        objects = torch.from_numpy(clip.objects[:, frames])
        for e in expressions(scene):
            if (e.thing is None) == targets or (pictures and e.tier == "motion"):
                continue
            mask = None if e.thing is None else objects[e.thing]
            if mask is None or bool(mask.any()):
                found.append(Item(scene, e, mask, video, objects))
    return found[:count]


def make(item: Item, kind: str) -> Prompt:
    """The prompt of a condition; controls append as many words as the magnets are."""
    text, things = item.expression.text, item.scene.things
    magnets = default_magnets(text)
    count = len(magnets)
    if kind == "present":
        named = text.split()
        others = [t.colour for t in things if t.colour not in named]
        # Not that of the object that is meant.
        meant = None if item.expression.thing is None else things[item.expression.thing].colour
        others = [c for c in others if c != meant] or others
        magnets = (*magnets[:-1], *(others[:1] or magnets[-1:]))
    elif kind == "absent":
        colour = next(c for c in COLOURS if c not in [t.colour for t in things])
        shape = next((s for s in SHAPES if s not in [t.shape for t in things]), "cross")
        magnets = ("and", "a", "large", colour, shape, "with", "its", "own", "shadow")
    else:
        magnets = {
            "bare": (),
            "content": CONTENT[:count],
            "pads": ("<pad>",) * count,
            "nonsense": ("zqx",) * count,
            "background": word_lists()["background"],
            "learned": LEARNED,
            "learned magnets": (*LEARNED, *magnets),
        }.get(kind, magnets)
    return make_prompt(text, magnets=magnets, place="first" if kind == "first" else "last")


def latents_of(backbone: Backbone, part: list[Item]) -> Tensor:
    """The toys' latents are pixels; those of an image model have no frames."""
    latents = to_latents(torch.stack([item.video.movedim(1, -1) for item in part]))
    return latents[:, :, 0] if backbone.flow is None else latents


def read_batch(
    backbone: Backbone, part: list[Item], kind: str, choice: Choice, rows: bool = False
) -> tuple[list[Prompt], Reading]:
    """One forward (two for ``"magnets 2"``) of a batch of expressions; ``rows`` reads those too."""
    prompts = [make(item, kind) for item in part]
    latents = latents_of(backbone, part)
    reading = read(
        backbone,
        latents,
        [p.text for p in prompts],
        heads=choice.heads,
        sigma=choice.sigma,
        seeds=(0, 1) if kind.endswith(" 2") else (0,),
        rows=rows,
        rule=SinkRule() if kind.startswith("magnets") else None,
    )
    return prompts, reading


def only(reading: Reading, heads: Heads) -> Reading:
    """The part of a reading that some blocks gave."""
    keep = [i for i, (block, _) in enumerate(reading.pairs) if block in heads]
    rows = None if reading.rows is None else reading.rows[:, keep]
    pairs = tuple(reading.pairs[i] for i in keep)
    return replace(reading, pairs=pairs, columns=reading.columns[:, keep], rows=rows)


def heat(
    backbone: Backbone, reading: Reading, prompt: Prompt, readout: Readout, number: int = 0
) -> Tensor:
    """The joined map ``[video]`` of one sample under a condition."""
    words = prompt.words
    table = token_table(backbone, prompt.text, [(w.start, w.end) for w in words])
    mine = [table[i] for i, w in enumerate(words) if w.role in readout.words]
    own = {t for tokens in mine for t in tokens}
    video = reading.grid.numel
    length = max(max(tokens) for tokens in table) + 1
    others = [t for t in range(length) if t not in own]
    drop: list[int] = []
    if readout.drop == "sinks":
        found = reading.sinks[0].nonzero().flatten().tolist()
        rows = readout.direction == "rows"
        drop = [s for s in found if s < video] if rows else [
            s - video for s in found if s >= video and s - video not in own]  # fmt: skip
    elif readout.drop == "heaviest":
        drop = [max(others, key=lambda t: float(reading.mass[0, video + t]))]
    elif readout.drop == "random":
        generator = torch.Generator().manual_seed(number)
        drop = [others[int(torch.randint(len(others), (), generator=generator))]]
    over = None
    if readout.over:
        over = [t for i, w in enumerate(words) if w.role != "stop" for t in table[i]]
    maps = word_shares(reading, mine, direction=readout.direction, drop=drop, over=over)
    return aggregate(normalise(maps), 0)


def pixels(backbone: Backbone, heatmap: Tensor, item: Item, blur: float) -> Tensor:
    """The heatmap on the clip's pixels."""
    grid = backbone.grid(latents_of(backbone, [item]))
    frames = backbone.frames(grid, len(item.video))
    return to_pixels(heatmap, grid, frames, tuple(item.video.shape[2:]), blur)


def score(item: Item, name: str, number: int, heatmap: Tensor, masks: bool) -> dict[str, Any]:
    """Numbers of one answer."""
    target = item.target
    assert target is not None
    point = find_point(heatmap)
    record = {
        "item": number, "scene": item.scene.seed, "tier": item.expression.tier, "name": name,
        "pointing": float(pointing(heatmap, target)),
        "robust": float(target[point]),
        "ap": float(average_precision(heatmap, target)),
    }  # fmt: skip
    if masks:
        otsu = otsu_mask(heatmap, point)
        half = heatmap > 0.5 * heatmap.max()
        record |= {"iou": float(iou(otsu, target)), "half": float(iou(half, target))}
        record["areas"] = areas(otsu, target).tolist()
        record["jf"] = float(j_and_f(otsu, target))
        record |= _flooded(item, point)
    return record


def baseline(item: Item, name: str, number: int) -> dict[str, Any]:
    """Points that need no model."""
    target = item.target
    assert target is not None
    frames, height, width = target.shape
    generator = torch.Generator().manual_seed(number)

    def any_of(choices: Tensor) -> tuple[int, int, int]:
        pick = choices[int(torch.randint(len(choices), (), generator=generator))]
        return tuple(pick.tolist())  # type: ignore[return-value]

    shown = target.nonzero()
    if name == "centre point":
        point = (frames // 2, height // 2, width // 2)
    elif name == "random point":
        point = any_of(torch.ones_like(target).nonzero())
    elif name == "random point in the box":
        frame = int(shown[len(shown) // 2, 0])
        inside = target[frame].nonzero()
        low, high = inside.amin(0), inside.amax(0)
        box = torch.zeros_like(target)
        box[frame, low[0] : high[0] + 1, low[1] : high[1] + 1] = True
        point = any_of(box.nonzero())
    else:
        point = any_of(shown)
    hit = float(target[point])
    record = {
        "item": number, "scene": item.scene.seed, "tier": item.expression.tier, "name": name,
        "pointing": hit, "robust": hit, "ap": float(target.float().mean()),
    }  # fmt: skip
    return record | _flooded(item, point)


def attention_mass(
    backbone: Backbone, reading: Reading, prompt: Prompt, item: Item
) -> tuple[float, float]:
    """Share of attention to text that goes to content words: on the target, on the background."""
    assert item.target is not None
    words = prompt.of("content")
    table = token_table(backbone, prompt.text, [(w.start, w.end) for w in words])
    share = word_shares(reading, table).mean(0)
    patch = item.video.shape[-1] // reading.grid.width
    target = torch.from_numpy(token_mask(item.target.numpy(), patch))
    objects = item.objects.any(0).float()
    background = torch.nn.functional.max_pool2d(objects, patch).flatten() == 0
    return float(share[target].mean()), float(share[background].mean())


def _flooded(item: Item, point: tuple[int, int, int]) -> dict[str, Any]:
    assert item.target is not None
    mask = flood_fill(item.video, point)
    return {
        "flood": float(iou(mask, item.target)),
        "flood_areas": areas(mask, item.target).tolist(),
    }
