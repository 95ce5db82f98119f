"""What ComfyUI promises an attention override, without ComfyUI: wrap_attn, patchers, a sampler.

Written from its contract (0.3.64 and what later versions add); test_server.py has the real one.
"""

import copy
import functools
import types

import torch
import torch.nn.functional as F

OVERRIDE = "optimized_attention_override"


class CallbacksMP:
    ON_PRE_RUN, ON_PREPARE_STATE, ON_CLEANUP = "on_pre_run", "on_prepare_state", "on_cleanup"


class WrappersMP:
    DIFFUSION_MODEL = "diffusion_model"


def modules():
    """``comfy`` and the parts of it and of ``comfy_api`` that our nodes import."""
    extension = types.ModuleType("comfy.patcher_extension")
    extension.CallbacksMP, extension.WrappersMP = CallbacksMP, WrappersMP
    attention = types.ModuleType("comfy.ldm.modules.attention")
    attention.REGISTERED_ATTENTION_FUNCTIONS = {"pytorch": optimized_attention}
    latest = types.ModuleType("comfy_api.latest")
    latest.io, latest.ui = _Io(), types.SimpleNamespace(PreviewText=lambda text: {"text": (text,)})
    latest.ComfyExtension = object
    found = {"comfy.patcher_extension": extension, "comfy.ldm.modules.attention": attention}
    found["comfy_api.latest"] = latest
    for name in ("comfy", "comfy.ldm", "comfy.ldm.modules", "comfy_api"):
        found[name] = types.ModuleType(name)
    return found


class _Io:
    """``comfy_api.latest.io``, which writes down what a schema is made of."""

    ComfyNode = object

    def __getattr__(self, kind):
        def port(role):
            def make(name, **settings):
                return types.SimpleNamespace(id=name, kind=kind, role=role, **settings)

            return make

        return types.SimpleNamespace(Input=port("input"), Output=port("output"))

    @staticmethod
    def Schema(**settings):  # noqa: N802
        return types.SimpleNamespace(**settings)

    @staticmethod
    def NodeOutput(*values, ui=None):  # noqa: N802
        return types.SimpleNamespace(values=values, ui=ui)


def wrap_attn(function):
    """Hand a call to the override of its ``transformer_options``, once."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if "_inside_attn_wrapper" in kwargs:
            return function(*args, **kwargs)
        kwargs["_inside_attn_wrapper"] = True
        options = kwargs.get("transformer_options")
        if options is not None and OVERRIDE in options:
            return options[OVERRIDE](function, *args, **kwargs)
        return function(*args, **kwargs)

    return wrapper


@wrap_attn
def optimized_attention(
    q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False,
    **kwargs,
):  # fmt: skip
    """Dense attention in ComfyUI's layouts."""
    assert kwargs["_inside_attn_wrapper"]
    if not skip_reshape:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    if mask is not None and mask.ndim == 3:
        mask = mask[:, None]
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        scale=kwargs.get("scale"),
        enable_gqa=kwargs.get("enable_gqa", False),
    )
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


class Executor:
    def __init__(self, original, class_obj, wrappers):
        self.original, self.class_obj, self.wrappers = original, class_obj, wrappers

    def __call__(self, *args, **kwargs):
        if not self.wrappers:
            return self.original(*args, **kwargs)
        inner = Executor(self.original, self.class_obj, self.wrappers[1:])
        return self.wrappers[0](inner, *args, **kwargs)


class Transformer:
    """A diffusion model that is nothing but attention; subclasses say how they call it."""

    patch_size = (1, 2, 2)
    heads, head_dim = 2, 16
    layers = 2

    def __init__(self):
        self.blocks = [None] * self.layers

    def forward(self, x, timestep, context, transformer_options={}, **kwargs):  # noqa: B006
        wrappers = transformer_options.get("wrappers", {}).get(WrappersMP.DIFFUSION_MODEL, {})
        wrappers = [wrapper for each in wrappers.values() for wrapper in each]
        executor = Executor(self._forward, self, wrappers)
        return executor(x, timestep, context, transformer_options, **kwargs)

    def _forward(self, x, timestep, context, transformer_options={}, **kwargs):  # noqa: B006
        tokens = self.tokens(x, context)
        for layer in range(self.layers):
            generator = torch.Generator().manual_seed(layer)
            q, k, v = (
                torch.randn(len(x), tokens, self.heads, self.head_dim, generator=generator)
                + x.mean()
                for _ in range(3)
            )
            x = x + self.attend(q, k, v, context, transformer_options).mean()
        return x

    def tokens(self, x, context):
        frames, height, width = x.shape[2:]
        return frames * -(-height // 2) * -(-width // 2)


class WanModel(Transformer):
    def attend(self, q, k, v, context, options):
        flat = (x.flatten(2) for x in (q, k, v))
        out = optimized_attention(*flat, heads=self.heads, transformer_options=options)
        text = context[..., : self.heads * self.head_dim]
        cross = optimized_attention(
            q.flatten(2), text, text, self.heads, transformer_options=options
        )
        assert out.shape == cross.shape == (*q.shape[:2], self.heads * self.head_dim)
        return out * 1.5 + cross


class HunyuanVideo(Transformer):
    """Text behind the video, heads apart, an additive mask handed over by position."""

    def __init__(self):
        self.double_blocks, self.single_blocks = [None], [None]

    def tokens(self, x, context):
        return super().tokens(x, context) + context.shape[1]

    def attend(self, q, k, v, context, options):
        mask = torch.zeros(1, 1, q.shape[1])
        mask[..., -10:] = torch.finfo(mask.dtype).min
        apart = [x.transpose(1, 2) for x in (q, k, v)]
        text = [x[:, :, -context.shape[1] :] for x in apart]  # the token refiner
        optimized_attention(*text, self.heads, skip_reshape=True, transformer_options=options)
        out = optimized_attention(
            *apart, self.heads, mask, skip_reshape=True, transformer_options=options
        )
        assert out.shape == (*q.shape[:2], self.heads * self.head_dim)
        return out[:, : -context.shape[1]]


class GeneralDIT(Transformer):
    """Cosmos: heads apart on the way in and out; its options travel among the keywords."""

    patch_spatial, patch_temporal = 2, 1

    def forward(self, x, timestep, context, **kwargs):
        options = kwargs["transformer_options"]
        wrappers = options.get("wrappers", {}).get(WrappersMP.DIFFUSION_MODEL, {})
        wrappers = [wrapper for each in wrappers.values() for wrapper in each]
        return Executor(self._forward, self, wrappers)(x, timestep, context, None, **kwargs)

    def _forward(self, x, timestep, context, fps=None, **kwargs):
        return super()._forward(x, timestep, context, kwargs["transformer_options"])

    def attend(self, q, k, v, context, options):
        out = optimized_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), self.heads, skip_reshape=True,
            skip_output_reshape=True, transformer_options=options,
        )  # fmt: skip
        assert out.shape == (q.shape[0], self.heads, q.shape[1], self.head_dim)
        return out


class Flux(HunyuanVideo):
    """Text in front of an image."""

    patch_size = 2

    def tokens(self, x, context):
        return -(-x.shape[2] // 2) * -(-x.shape[3] // 2) + context.shape[1]

    def attend(self, q, k, v, context, options):
        return optimized_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), self.heads, skip_reshape=True,
            transformer_options=options,
        )  # fmt: skip


class ModelPatcher:
    def __init__(self, model):
        self.model = model
        self.model_options = {"transformer_options": {}}
        self.attachments, self.wrappers, self.callbacks = {}, {}, {}

    def clone(self):
        other = ModelPatcher(self.model)
        other.model_options = copy.deepcopy(self.model_options)
        other.attachments = dict(self.attachments)
        for mine, theirs in ((self.wrappers, other.wrappers), (self.callbacks, other.callbacks)):
            theirs |= {kind: {k: list(v) for k, v in by.items()} for kind, by in mine.items()}
        return other

    def get_attachment(self, key):
        return self.attachments.get(key)

    def set_attachments(self, key, attachment):
        self.attachments[key] = attachment

    def add_wrapper_with_key(self, kind, key, function):
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(function)

    def remove_wrappers_with_key(self, kind, key):
        self.wrappers.get(kind, {}).pop(key, None)

    def add_callback_with_key(self, kind, key, function):
        self.callbacks.setdefault(kind, {}).setdefault(key, []).append(function)

    def remove_callbacks_with_key(self, kind, key):
        self.callbacks.get(kind, {}).pop(key, None)

    def get_model_object(self, name):
        if name == "diffusion_model":
            return self.model
        return types.SimpleNamespace(percent_to_sigma=lambda percent: 1 - percent)

    def call_back(self, kind, *args):
        for functions in list(self.callbacks.get(kind, {}).values()):
            for function in functions:
                function(self, *args)


def sample(patcher, latent, *, steps=4, text=24, batched=False, fail_at=None, pieces=None):
    """A run: cond and uncond in one call or one by one; ``pieces`` are windows of the latent."""
    context = torch.randn(1, text, 32, generator=torch.Generator().manual_seed(7))
    sigmas = torch.linspace(1, 0, steps + 1)
    patcher.call_back(CallbacksMP.ON_PRE_RUN)
    try:
        for step in range(steps):
            patcher.call_back(CallbacksMP.ON_PREPARE_STATE, sigmas[step : step + 1], {}, "later")
            outs = []
            for piece in pieces or (slice(None),):
                for who in [[1, 0]] if batched else [[1], [0]]:
                    options = {**patcher.model_options["transformer_options"]}
                    options |= {
                        "wrappers": patcher.wrappers, "sigmas": sigmas[step : step + 1],
                        "sample_sigmas": sigmas, "cond_or_uncond": who, "uuids": list(who),
                    }  # fmt: skip
                    if fail_at == step:
                        raise InterruptedError("stopped")
                    x = latent[:, :, piece].repeat(len(who), *[1] * (latent.ndim - 1))
                    y = context.repeat(len(who), 1, 1)
                    out = patcher.model.forward(x, sigmas[step], y, transformer_options=options)
                    outs.append(out.mean(0, keepdim=True))
            latent = latent * 0.5 + 0.1 * torch.cat(outs, 2).mean() + 0.1 * outs[0].mean()
    finally:
        patcher.call_back(CallbacksMP.ON_CLEANUP)
    return latent
