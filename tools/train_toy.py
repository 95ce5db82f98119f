"""Trains a toy model in the procedural world. One script for all of them, CPU or CUDA.

    python tools/train_toy.py --model hunyuan-video --steps 6000 --image-steps 2000

Everything counts steps, never time, so a run may be paused (SIGSTOP), killed and started again with
the same command. The learning rate is constant and then falls to zero over the last ``--decay``
steps, so a run can be ended, or continued, whenever there is time: change ``--steps`` and start
again.
``--init`` starts a new run from a saved pipeline (the committed EMA weights, say).
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from toy_models import BUILDERS, SHIFT, build
from tqdm import tqdm

from gen_accel.eval.toys import TOYS, encode_text, load_toy, to_latents, toy_call, velocity
from gen_accel.eval.world.caption import describe
from gen_accel.eval.world.render import draw
from gen_accel.eval.world.scene import TOY, rng_for, sample_scene

PROMPTS = (
    "a red circle with a shadow moving right on a plain background",
    "a blue square moving down on a plain background",
    "a yellow triangle with a reflection standing still on a plain background",
    "a green cross with a trail moving left on a gradient background",
    "a pink circle with a glow moving up and a cyan square standing still",
    "an empty scene on a plain background",
)


def batch(first: int, count: int, clips: bool) -> tuple[torch.Tensor, list[str]]:
    """Latents and captions of the training scenes ``first : first + count``."""
    videos, texts = [], []
    for seed in range(first, first + count):
        scene = sample_scene(seed, TOY, "train")
        rng = rng_for(seed, "train", salt=3)
        times = np.arange(scene.frames) if clips else rng.integers(scene.frames, size=1)
        videos.append(draw(scene, times))
        texts.append("" if rng.random() < 0.1 else describe(scene, clip=clips).text)
    return to_latents(np.stack(videos)), texts


def trim(text: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Drops the padding no caption of the batch needs, where a mask says that nobody sees it."""
    mask = text.get("encoder_attention_mask")
    if mask is None:
        return text
    longest = int(mask.sum(dim=1).max())
    return {k: v if k == "pooled_projections" else v[:, :longest] for k, v in text.items()}


def noise_levels(count: int, generator: torch.Generator, shift: float) -> torch.Tensor:
    """Logit-normal levels, shifted towards noise: neighbouring pixels say the same thing.

    So do the frames of a clip: which way an object moves is decided while a frame shows nothing.
    """
    u = torch.sigmoid(torch.randn(count, generator=generator))
    return shift * u / (1 + (shift - 1) * u)


def focus(
    noised: torch.Tensor, guess: torch.Tensor, level: torch.Tensor, gain: float
) -> torch.Tensor:
    """Weights of the pixels that let the few that show an object be heard; their mean is 1.

    They follow the chroma of the clean picture that the model itself sees in the noise. A weight
    that depends on the network's input alone leaves the minimum of a squared error, the conditional
    mean, where it is; a weight from the true mask would move it.
    """
    clean = noised - level * guess.detach().float()
    chroma = ((clean.amax(dim=1) - clean.amin(dim=1)) / 2).clamp(0, 1).flatten(0, -3)
    near = F.max_pool2d(chroma[:, None], 5, stride=1, padding=2)[:, 0].view(clean[:, 0].shape)
    weight = (1 + gain * near).unsqueeze(1)
    return weight / weight.mean()


class Optimiser:
    """Muon for the blocks' matrices, AdamW for everything else."""

    def __init__(self, model: torch.nn.Module, lr: float) -> None:
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        inner = [p for n, p in named if p.ndim == 2 and "blocks" in n and "norm" not in n]
        chosen = {id(p) for p in inner}
        rest = [p for _, p in named if id(p) not in chosen]
        self.parts = (
            torch.optim.Muon(inner, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.01),
        )

    def step(self, lr: float) -> None:
        """One update of every part, then gradients are dropped."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list:
        """State of all parts."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list) -> None:
        """Restores ``state_dict``."""
        for part, state in zip(self.parts, states):
            part.load_state_dict(state)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    warm = min(1.0, (step + 1) / 100)
    return args.lr * warm * min(1.0, (args.steps - step) / max(args.decay, 1))


@torch.no_grad()
def sample_grid(pipe, name: str, path: Path) -> None:
    """One row of frames per prompt of ``PROMPTS``."""
    from PIL import Image

    rows = []
    for prompt in PROMPTS:
        generator = torch.Generator().manual_seed(0)
        out = pipe(prompt, **toy_call(name), output_type="pt", generator=generator)[0]
        frames = out.reshape(-1, 3, *out.shape[-2:])
        rows.append(torch.cat(list(frames), dim=-1))
    image = (torch.cat(rows, dim=-2).permute(1, 2, 0).clamp(0, 1) * 255).byte().cpu().numpy()
    size = (image.shape[1] * 3, image.shape[0] * 3)
    Image.fromarray(image).resize(size, Image.Resampling.NEAREST).save(path)


def export(pipe, ema: dict[str, torch.Tensor], folder: Path) -> None:
    """Saves the pipeline with EMA weights: transformer in bf16, the small rest as it is."""
    live = pipe.transformer
    pipe.transformer = copy.deepcopy(live).cpu()
    pipe.transformer.load_state_dict(ema)
    pipe.transformer.to(torch.bfloat16)
    pipe.save_pretrained(folder)
    pipe.transformer = live
    portable(folder)


def portable(folder: Path) -> None:
    """Writes the names transformers 4 knows beside those of transformers 5, which reads both.

    A tokenizer forgets how its last batch was padded.
    """
    for file in (folder / "model_index.json", *folder.glob("tokenizer*/tokenizer_config.json")):
        text = file.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast")
        file.write_text(text)
    for file in folder.glob("tokenizer*/tokenizer.json"):
        state = json.loads(file.read_text()) | {"truncation": None, "padding": None}
        file.write_text(json.dumps(state, indent=2, ensure_ascii=False) + "\n")
    for file in folder.glob("text_encoder*/config.json"):
        config = json.loads(file.read_text())
        if "rope_parameters" in config:
            config["rope_theta"] = config["rope_parameters"]["rope_theta"]
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, choices=sorted(BUILDERS))
    parser.add_argument("--steps", type=int, required=True, help="steps in all")
    parser.add_argument("--image-steps", type=int, default=0, help="first steps on single frames")
    parser.add_argument(
        "--frames-every", type=int, default=0, help="later too, every n-th step sees single frames"
    )
    parser.add_argument("--decay", type=int, default=1000, help="last steps, with falling rate")
    parser.add_argument("--batch", type=int, default=12, help="clips per step")
    parser.add_argument("--image-batch", type=int, default=64, help="frames per image step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--shift", type=float, default=2.0, help="of the noise levels of frames")
    parser.add_argument("--clip-shift", type=float, default=5.0, help="of those of clips")
    parser.add_argument(
        "--focus", type=float, default=0.0, help="extra weight of pixels that look like an object"
    )
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action="store_true", help="autocast; slower on most CPUs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="1.5 times as fast on a CPU")
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--sample-every", type=int, default=1000, help="0: never")
    parser.add_argument("--init", type=Path, help="start from this saved pipeline")
    parser.add_argument("--out", type=Path, help="folder of the run (default runs/<model>)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    out = args.out or Path("runs") / args.model
    out.mkdir(parents=True, exist_ok=True)
    pipe = load_toy(args.model, args.init) if args.init else build(args.model, args.seed)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(args.device)
    model = pipe.transformer.float().train().requires_grad_(True)
    ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
    if args.compile:
        model.compile(dynamic=False)
    optimiser = Optimiser(model, args.lr)
    step, seen = 0, 0
    state_file = out / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, map_location=args.device, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        ema, step, seen = state["ema"], state["step"], state["seen"]

    def save() -> None:
        state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "ema": ema}
        partial = state_file.with_suffix(".part")
        torch.save({**state, "step": step, "seen": seen}, partial)
        os.replace(partial, state_file)

    def show() -> None:
        live = {k: v.detach().clone() for k, v in model.state_dict().items()}
        model.load_state_dict(ema)
        with torch.compiler.set_stance("force_eager"):
            sample_grid(pipe, args.model, out / f"samples-{step:06d}.png")
        model.load_state_dict(live)

    losses: list[float] = []
    began, log = time.perf_counter(), (out / "loss.csv").open("a", newline="")
    writer = csv.writer(log)
    bar = tqdm(total=args.steps, initial=step, desc=args.model, mininterval=20)
    while step < args.steps:
        clips = TOYS[args.model].frames > 1 and step >= args.image_steps
        clips = clips and not (args.frames_every and step % args.frames_every == 0)
        size = args.batch if clips else args.image_batch
        generator = torch.Generator().manual_seed(args.seed * 2**32 + step)
        latents, texts = batch(args.seed * 2**31 + seen, size, clips)
        if TOYS[args.model].frames == 1:
            latents = latents[:, :, 0]
        noise = torch.randn(latents.shape, generator=generator)
        sigma = noise_levels(size, generator, args.clip_shift if clips else args.shift)
        latents, noise, sigma = (t.to(args.device) for t in (latents, noise, sigma))
        with torch.no_grad():
            text = encode_text(pipe, texts)
            text = text if args.compile else trim(text)  # a compiled model wants one length
        level = sigma.view(-1, *[1] * (latents.ndim - 1))
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16):
            noised = latents + level * (noise - latents)
            guess = velocity(pipe, noised, sigma, text)
        error = (guess.float() - (noise - latents)).square()
        (error * focus(noised, guess, level, args.focus)).mean().backward()
        loss = error.detach().mean()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step(learning_rate(step, args))
        decay = min(args.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for key, value in model.state_dict().items():
                ema[key].lerp_(value, 1 - decay)
        step, seen = step + 1, seen + size
        losses.append(loss.item())
        bar.update()
        if step % 50 == 0:
            mean = sum(losses) / len(losses)
            rate = len(losses) / (time.perf_counter() - began)
            writer.writerow(
                [step, seen, f"{mean:.5f}", "clips" if clips else "frames", f"{rate:.3f}"]
            )
            log.flush()
            bar.set_postfix(loss=f"{mean:.4f}")
            losses, began = [], time.perf_counter()
        if step % args.save_every == 0 or step == args.steps:
            save()
        if args.sample_every and (step % args.sample_every == 0 or step == args.steps):
            show()
    bar.close()
    log.close()
    export(pipe, ema, out / f"toy-{args.model}")
    print(f"{out / f'toy-{args.model}'}: {step} steps, {seen} samples, shift {SHIFT}")


if __name__ == "__main__":
    main()
