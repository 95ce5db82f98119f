"""ComfyUI nodes for tests: models of a few thousand random weights, and overrides of others."""

import torch

FAMILIES = (
    "wan", "wan_i2v", "wan_vace", "wan22", "hunyuan_video", "flux", "cosmos", "cosmos2",
)  # fmt: skip
TEXT, WIDTH = 32, 32
CALLS = {}
_MODELS = {}


def _make(family):
    import comfy.model_patcher
    import comfy.supported_models as models

    wan = {
        "image_model": "wan2.1", "model_type": "t2v", "patch_size": (1, 2, 2), "text_len": TEXT,
        "in_dim": 16, "dim": 48, "ffn_dim": 64, "freq_dim": 64, "text_dim": WIDTH, "out_dim": 16,
        "num_heads": 2, "num_layers": 2,
    }  # fmt: skip
    kind, config = {
        "wan": (models.WAN21_T2V, wan),
        "wan_i2v": (models.WAN21_I2V, wan | {"model_type": "i2v", "in_dim": 36}),
        "wan_vace": (models.WAN21_Vace, wan | {"model_type": "vace", "vace_layers": 1}
                     | {"vace_in_dim": 96}),
        "wan22": (models.WAN22_T2V, wan | {"in_dim": 48, "out_dim": 48}),
        "hunyuan_video": (models.HunyuanVideo, {
            "image_model": "hunyuan_video", "in_channels": 16, "patch_size": [1, 2, 2],
            "out_channels": 16, "vec_in_dim": 24, "context_in_dim": WIDTH, "hidden_size": 64,
            "mlp_ratio": 2.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 1,
            "axes_dim": [8, 12, 12], "theta": 256, "qkv_bias": True, "guidance_embed": True,
            "byt5": False, "meanflow": False,
        }),
        "flux": (models.Flux, {
            "image_model": "flux", "in_channels": 16, "patch_size": 2, "out_channels": 16,
            "vec_in_dim": 24, "context_in_dim": WIDTH, "hidden_size": 64, "mlp_ratio": 2.0,
            "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "axes_dim": [8, 12, 12],
            "theta": 10000, "qkv_bias": True, "guidance_embed": True,
        }),
        "cosmos": (models.CosmosT2V, {
            "image_model": "cosmos", "max_img_h": 240, "max_img_w": 240, "max_frames": 128,
            "in_channels": 16, "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1,
            "model_channels": 64, "block_config": "FA-CA-MLP", "concat_padding_mask": True,
            "pos_emb_cls": "rope3d", "pos_emb_learnable": False, "pos_emb_interpolation": "crop",
            "block_x_format": "THWBD", "affline_emb_norm": True, "use_adaln_lora": True,
            "adaln_lora_dim": 4, "num_blocks": 2, "num_heads": 2,
            "extra_per_block_abs_pos_emb": True, "extra_per_block_abs_pos_emb_type": "learnable",
            "rope_h_extrapolation_ratio": 1.0, "rope_w_extrapolation_ratio": 1.0,
            "rope_t_extrapolation_ratio": 2.0, "crossattn_emb_channels": WIDTH,
        }),
        "cosmos2": (models.CosmosT2IPredict2, {
            "image_model": "cosmos_predict2", "max_img_h": 240, "max_img_w": 240,
            "max_frames": 128, "in_channels": 16, "out_channels": 16, "patch_spatial": 2,
            "patch_temporal": 1, "model_channels": 64, "concat_padding_mask": True,
            "crossattn_emb_channels": WIDTH, "pos_emb_cls": "rope3d", "pos_emb_learnable": True,
            "pos_emb_interpolation": "crop", "min_fps": 1, "max_fps": 30,
            "use_adaln_lora": True, "adaln_lora_dim": 4, "num_blocks": 2, "num_heads": 2,
            "extra_per_block_abs_pos_emb": False, "rope_h_extrapolation_ratio": 1.0,
            "rope_w_extrapolation_ratio": 1.0, "rope_t_extrapolation_ratio": 1.0,
            "rope_enable_fps_modulation": False,
        }),
    }[family]  # fmt: skip
    settings = kind(config)
    settings.set_inference_dtype(torch.float32, None)
    model = settings.get_model({})
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():  # ComfyUI leaves them as the memory was
        weight.requires_grad_(False)
        norm = "norm" in name and name.endswith(("weight", "scale"))
        weight.data = (
            torch.ones_like(weight)
            if norm
            else 0.2 * torch.randn(weight.shape, generator=generator)
        )
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


class TinyModel:
    INPUT_TYPES = classmethod(
        lambda cls: {
            "required": {
                "family": (list(FAMILIES),),
                "height": ("INT", {"default": 16, "min": 2, "max": 256}),
                "width": ("INT", {"default": 24, "min": 2, "max": 256}),
            }
        }
    )
    RETURN_TYPES = ("MODEL", "LATENT", "CONDITIONING", "CONDITIONING")
    RETURN_NAMES = ("model", "latent", "positive", "negative")
    FUNCTION, CATEGORY = "make", "gen_accel/tests"

    def make(self, family, height, width):
        if family not in _MODELS:
            _MODELS[family] = _make(family)
        generator = torch.Generator().manual_seed(1)
        extra = {"pooled_output": torch.randn(1, 24, generator=generator), "guidance": 4.0}
        if family == "hunyuan_video":
            extra["attention_mask"] = (torch.arange(TEXT)[None] < 20).long()
        texts = [torch.randn(1, TEXT, WIDTH, generator=generator) for _ in range(2)]
        channels = 48 if family == "wan22" else 16
        shape = (1, channels, *([] if family == "flux" else [5]), height, width)
        conditioning = ([[text, dict(extra)]] for text in texts)
        return _MODELS[family], {"samples": torch.zeros(shape)}, *conditioning


class ForeignOverride:
    """As SageAttention patches do it: overwriting what stands there, or chaining to it."""

    INPUT_TYPES = classmethod(
        lambda cls: {
            "required": {
                "model": ("MODEL",),
                "label": ("STRING", {"default": "theirs"}),
                "chains": ("BOOLEAN", {"default": False}),
            }
        }
    )
    RETURN_TYPES = ("MODEL",)
    FUNCTION, CATEGORY = "patch", "gen_accel/tests"

    def patch(self, model, label, chains):
        model = model.clone()
        options = model.model_options["transformer_options"]
        before = options.get("optimized_attention_override") if chains else None
        CALLS[label] = 0

        def override(func, *args, **kwargs):
            CALLS[label] += 1
            if before is not None:
                return before(func, *args, **kwargs)
            return func(*args, **kwargs)

        options["optimized_attention_override"] = override
        return (model,)


class ForeignCalls:
    INPUT_TYPES = classmethod(
        lambda cls: {"required": {"after": ("LATENT",), "label": ("STRING", {"default": "theirs"})}}
    )
    RETURN_TYPES = ()
    FUNCTION, CATEGORY, OUTPUT_NODE = "count", "gen_accel/tests", True

    def count(self, after, label):
        return {"ui": {"text": (str(CALLS[label]),)}}


NODE_CLASS_MAPPINGS = {
    "TinyModel": TinyModel,
    "ForeignOverride": ForeignOverride,
    "ForeignCalls": ForeignCalls,
}
