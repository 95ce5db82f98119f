"""Object-WIPER's stages B and C on latents: invert and remember, re-noise, come back.

Foreground masks are bool ``[batch, *grid]`` on the token grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gen_accel.pipelines.effects import middle, outside, response
from gen_accel.pipelines.flow import Text, VideoFlow, step, tokens_to_latents
from gen_accel.pipelines.intercept import intercept
from gen_accel.pipelines.probe import probe
from gen_accel.pipelines.surgery import Scaling, Surgery
from gen_accel.pipelines.value_store import Call, ValueStore, check_fits, estimate
from gen_accel.pipelines.wipe_setting import WipeSetting


@dataclass
class Inversion:
    """The way from a clip to noise.

    Attributes:
        nodes: Latents at every noise level, from data to noise, ``steps + 1`` of them.
        sigmas: The noise levels.
        object_: The object.
        masks: The adaptive mask of every step, which holds the object.
        store: Values, and keys where they are wanted.
        moved: Per step, the share of the background's attention to the object before and after it
            was scaled, ``[batch]`` each; empty where nothing was.
    """

    nodes: list[Tensor]
    sigmas: list[float]
    object_: Tensor
    masks: list[Tensor]
    store: ValueStore
    moved: list[list[tuple[Tensor, Tensor]]] = field(default_factory=list)


@dataclass
class Removal:
    """The way back.

    Attributes:
        latents: ``[batch, channels, frames, height, width]``.
        drift: Per step, root mean square distance of the background's latents to the inversion's,
            ``[batch]``.
        moved: As for `Inversion`: the foreground's attention to the background.
    """

    latents: Tensor
    drift: list[Tensor]
    moved: list[list[tuple[Tensor, Tensor]]]


class Remover:
    """Runs the stages for one model and one setting.

    Args:
        flow: The model.
        setting: How.
        tick: Called after every evaluation of the network.
    """

    def __init__(
        self, flow: VideoFlow, setting: WipeSetting, tick: Callable[[], None] = lambda: None
    ) -> None:
        self.flow = flow
        self.setting = setting
        self.tick = tick

    def check(self, latents: Tensor, text: Text) -> None:
        """Refuse what cannot be done before the transformer runs.

        Args:
            latents: As for `invert`.
            text: As for `invert`.

        Raises:
            ValueError: What has to be kept does not fit into memory, the transformer has no such
                layers, or its scheduler no shift.
        """
        effects = self.setting.effects
        for layers in (effects.word_layers, effects.response_layers):
            middle(self.flow.layers, layers)
        self.flow.sigmas(self.setting.steps, self.setting.shift)
        self._store(latents, text)

    def invert(self, latents: Tensor, text: Text, object_: Tensor) -> Inversion:
        """Follow the flow from a clip to noise and remember what is needed on the way back.

        Args:
            latents: ``[batch, channels, frames, height, width]`` of the clip.
            text: Of the prompt that describes it.
            object_: The object.

        Raises:
            ValueError: What has to be kept does not fit into memory.
        """
        setting, flow = self.setting, self.flow
        store = self._store(latents, text)
        surgery = self._surgery(latents, text, store)
        surgery.save = True
        done = Inversion([latents], flow.sigmas(setting.steps, setting.shift), object_, [], store)
        mask = object_
        read = response(_per_frame(object_))
        layers = sorted(middle(flow.layers, setting.effects.response_layers))

        def velocity(x: Tensor, sigma: float, stage: int) -> Tensor:
            nonlocal mask
            surgery.call = Call(len(done.masks), stage)
            surgery.scaling = self._scaling(~mask, mask, setting.background_scale)
            if not setting.adaptive or stage:
                out = flow.velocity(x, sigma, text, setting.inversion_guidance)
            else:
                with probe(flow.pipe.transformer, read, layers) as seen:
                    out = flow.velocity(x, sigma, text, setting.inversion_guidance)
                masses = torch.stack([mass for mass in seen if mass is not None]).mean(0)
                mask = self._grown(mask, object_, masses)
            self.tick()
            return out

        flow.announce(done.sigmas[:-1])
        with intercept(flow.pipe.transformer, surgery):
            for i in range(setting.steps):
                flow.pipe.scheduler.set_begin_index(i)
                now, after = done.sigmas[i : i + 2]
                latents = step(latents, now, after, setting.solver, velocity)
                done.nodes.append(latents)
                done.masks.append(mask)
                done.moved.append(surgery.moved)
                surgery.moved = []
        return done

    def remove(
        self,
        inversion: Inversion,
        text: Text,
        effect: Tensor,
        noise: Tensor,
        negative: Text | None = None,
    ) -> Removal:
        """Come back without the foreground.

        Args:
            inversion: From `invert`, of the same setting but for what only matters here.
            text: Of the prompt that describes the clip without the object.
            effect: The object's effects.
            noise: What the foreground begins from, the shape of the latents.
            negative: Text of the other side of classifier-free guidance.
        """
        setting, flow = self.setting, self.flow
        latents, sigmas = inversion.nodes[-1], inversion.sigmas
        if setting.reinit != "none":
            grown = setting.reinit == "adaptive"
            fresh = (inversion.masks[-1] if grown else inversion.object_) | effect
            latents = torch.where(tokens_to_latents(fresh, flow.patch), noise, latents)
        keep_values = setting.preserve in ("attn_v", "attn_kv", "freeze")
        surgery = self._surgery(latents, text, inversion.store)
        surgery.load_keys = setting.preserve in ("attn_kv", "freeze")
        done = Removal(latents, [], [])
        flow.announce(sigmas[:0:-1])
        with intercept(flow.pipe.transformer, surgery):
            for i in reversed(range(len(inversion.masks))):
                flow.pipe.scheduler.set_begin_index(len(inversion.masks) - 1 - i)
                foreground = inversion.masks[i] | effect
                surgery.load = ~foreground.flatten(1) if keep_values else None
                surgery.scaling = self._scaling(foreground, ~foreground, setting.foreground_scale)

                def velocity(x: Tensor, sigma: float, stage: int, i: int = i) -> Tensor:
                    surgery.call = Call(i, stage)
                    out = flow.velocity(x, sigma, text, setting.guidance_scale)
                    if negative is not None and setting.true_cfg_scale != 1:
                        other = flow.velocity(x, sigma, negative, setting.guidance_scale)
                        out = other + setting.true_cfg_scale * (out - other)
                    self.tick()
                    return out

                latents = step(latents, sigmas[i + 1], sigmas[i], setting.solver, velocity)
                background = tokens_to_latents(~foreground, flow.patch)
                node = inversion.nodes[i]
                if setting.preserve in ("latent", "freeze"):
                    latents = torch.where(background, node, latents)
                done.drift.append(_rms(latents - node, background))
                done.moved.append(surgery.moved)
                surgery.moved = []
        done.latents = latents
        return done

    def _surgery(self, latents: Tensor, text: Text, store: ValueStore) -> Surgery:
        layout = self.flow.layout(latents, text)
        video = slice(layout.text_before, layout.text_before + layout.grid.numel)
        return Surgery(video, store, measure=frozenset({self.flow.layers // 2}))

    def _store(self, latents: Tensor, text: Text) -> ValueStore:
        """An empty store, once it is known that what it will hold fits."""
        setting, config = self.setting, self.flow.pipe.transformer.config
        calls, keys = setting.calls(), setting.preserve in ("attn_kv", "freeze")
        layers = None
        if setting.value_layers is not None:
            layers = middle(self.flow.layers, setting.value_layers)
        kept = self.flow.layers if layers is None else len(layers)
        needed = estimate(
            len(calls),
            kept,
            len(latents) * self.flow.layout(latents, text).grid.numel,
            config.num_attention_heads * config.attention_head_dim,
            self.flow.pipe.transformer.dtype.itemsize,
            keys,
        )
        device = torch.device("cpu") if setting.offload_cache else latents.device
        steps = len(calls) // setting.evaluations
        check_fits(needed, device, setting.cache_limit, steps=steps, layers=kept)
        return ValueStore(calls=calls, layers=layers, keys=keys, offload=setting.offload_cache)

    def _scaling(self, queries: Tensor, keys: Tensor, factor: float) -> Scaling | None:
        if factor == 1.0:
            return None
        return Scaling(queries.flatten(1), keys.flatten(1), factor, self.setting.scaling)

    def _grown(self, mask: Tensor, object_: Tensor, masses: Tensor) -> Tensor:
        """The mask and the tokens that respond to the object, mean over its frames; never less.

        ``masses`` are the attention to each frame's object, then to each frame.
        """
        on, of = masses.chunk(2, dim=1)
        shown = object_.flatten(2).any(2)[:, :, None]
        score = (on / of.clamp(min=1e-12) * shown).sum(1) / shown.sum(1)
        setting = self.setting
        grown = outside(score, object_.flatten(1), "otsu", setting.effects.clip, setting.growth)
        return mask | grown.view_as(mask)


def _per_frame(object_: Tensor) -> Tensor:
    """``[batch, tokens, 2 frames]``: the object in each frame, then each frame."""
    frame = torch.eye(object_.shape[1], dtype=torch.bool, device=object_.device)
    frame = frame[:, :, None, None].expand(-1, -1, *object_.shape[2:])
    columns = torch.cat([frame & object_[:, None], frame.expand(len(object_), -1, -1, -1, -1)], 1)
    return columns.flatten(2).movedim(1, 2)


def _rms(x: Tensor, where: Tensor) -> Tensor:
    """Root mean square over the chosen latents, per clip; 0 where none is."""
    count = where.flatten(1).sum(1).clamp(min=1) * x.shape[1]
    return ((x.square() * where).flatten(1).sum(1) / count).sqrt()
