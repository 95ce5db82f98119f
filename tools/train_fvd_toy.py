"""Trains ``models/fvd-toy``, the video encoder of `gen_accel.eval.encoder`, on one CPU core.

    OMP_NUM_THREADS=1 python tools/train_fvd_toy.py --steps 700

It learns to name what a clip of the world shows: which colours, shapes, effects and motions, which
background, and whether the frames were shuffled. A third of the clips is damaged slightly (noise,
blur, brightness), so that its features do not depend on pixel-exact rendering.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

from gen_accel.eval.encoder import FOLDER, HEADS, ONE, SEVERAL, SIZE, VideoEncoder
from gen_accel.eval.world.render import draw
from gen_accel.eval.world.scene import FULL, TOY, Scene, rng_for, sample_scene


def clip(seed: int, split: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Frames ``[T, S, S, 3]`` and their labels; one clip in four is shuffled."""
    scene = sample_scene(seed, TOY if seed % 2 else FULL, split)
    rng = rng_for(seed, split, salt=11)
    times = np.arange(scene.frames)
    if rng.random() < 0.25:
        times = rng.permutation(times)
    frames = draw(scene, times)
    return damage(frames, rng), labels(scene, times)


def labels(scene: Scene, times: np.ndarray) -> dict[str, np.ndarray]:
    """Which values of every attribute the clip has."""
    shown = {
        "colour": {thing.colour for thing in scene.things},
        "shape": {thing.shape for thing in scene.things},
        "effect": {thing.effect for thing in scene.things},
        "motion": {thing.direction or "still" for thing in scene.things},
        "background": {scene.backdrop.kind},
        # Nothing tells the order of a clip in which nothing moves.
        "order": {"shuffled"} if bool((np.diff(times) != 1).any()) and _moves(scene) else set(),
    }
    return {
        name: np.array([value in shown[name] for value in values], np.float32)
        for name, values in HEADS.items()
    }


def _moves(scene: Scene) -> bool:
    return any(thing.direction for thing in scene.things) or any(scene.backdrop.pan)


def damage(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A third of the clips with a little noise, blur or another brightness."""
    kind = rng.integers(9)
    if kind == 0:
        frames = frames + rng.normal(0, rng.uniform(0, 0.05), frames.shape)
    elif kind == 1:
        frames = frames * rng.uniform(0.8, 1.1) + rng.uniform(-0.05, 0.05)
    elif kind == 2:
        neighbours = sum(np.roll(frames, shift, axis) for axis in (1, 2) for shift in (-1, 1))
        frames = frames + rng.uniform(0, 0.5) * (neighbours / 4 - frames)
    return np.clip(frames, 0, 1).astype(np.float32)


def batch(seeds: range, split: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Videos ``[B, T, 3, S, S]`` and labels ``[B, values]``."""
    clips = [clip(seed, split) for seed in seeds]
    video = torch.from_numpy(np.stack([frames for frames, _ in clips])).permute(0, 1, 4, 2, 3)
    return video, {n: torch.from_numpy(np.stack([row[n] for _, row in clips])) for n in HEADS}


def loss(logits: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sum over the attributes."""
    several = sum(F.binary_cross_entropy_with_logits(logits[n], wanted[n]) for n in SEVERAL)
    return several + sum(0.5 * F.cross_entropy(logits[n], wanted[n]) for n in ONE)


@torch.inference_mode()
def measure(encoder: VideoEncoder, clips: int) -> dict[str, float]:
    """Balanced accuracy on held-out clips: mean of both classes' recall, over the values."""
    logits: dict[str, list[torch.Tensor]] = {name: [] for name in HEADS}
    wanted: dict[str, list[torch.Tensor]] = {name: [] for name in HEADS}
    for first in range(0, clips, 50):
        video, labelled = batch(range(first, first + 50), "val")
        for name, values in encoder.attributes(encoder(video)).items():
            logits[name].append(values)
            wanted[name].append(labelled[name])
    found = {}
    for name in HEADS:
        said, right = torch.cat(logits[name]), torch.cat(wanted[name]) > 0.5
        if name in ONE:  # recall of each class; guessing reaches one in six
            hit = (said.argmax(1)[:, None] == torch.arange(said.shape[1])) & right
            found[name] = float((hit.sum(0) / right.sum(0)).mean())
        else:  # guessing reaches one half
            yes = ((said > 0) & right).sum(0) / right.sum(0)
            no = ((said <= 0) & ~right).sum(0) / (~right).sum(0)
            found[name] = float((yes + no).mean() / 2)
    return found


def main() -> None:
    """Train, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=FOLDER)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    encoder = VideoEncoder()
    optimiser = torch.optim.AdamW(encoder.parameters(), args.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, args.rate, args.steps, pct_start=0.1)
    started, spent = time.time(), time.process_time()
    bar = tqdm(range(args.steps))
    for step in bar:
        first = args.batch * step
        video, wanted = batch(range(first, first + args.batch), "train")
        value = loss(encoder.attributes(encoder(video)), wanted)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        schedule.step()
        if step % 25 == 0:
            bar.set_postfix_str(f"loss {value.detach():.3f}", refresh=False)
    minutes, cpu = (time.time() - started) / 60, (time.process_time() - spent) / 60
    right = measure(encoder.eval(), 500)
    for name, share in right.items():
        print(f"{name:12} {share:.3f}")
    args.output.mkdir(parents=True, exist_ok=True)
    save_file(encoder.state_dict(), args.output / "model.safetensors")
    config = {
        "widths": encoder.widths,
        "size": SIZE,
        "heads": HEADS,
        "seed": args.seed,
        "steps": args.steps,
        "batch": args.batch,
        "rate": args.rate,
        "cpu_minutes": round(cpu, 1),
        "wall_minutes": round(minutes, 1),
        "torch": torch.__version__,
        "held_out": {name: round(share, 4) for name, share in right.items()},
    }
    (args.output / "config.json").write_text(json.dumps(config, indent=1) + "\n")


if __name__ == "__main__":
    main()
