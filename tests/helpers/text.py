"""Tokenizers and text encoders with random weights, built in memory: no files, no hub.

Not called tokenizers.py: run as a script, a file of that name would shadow the package.
"""

from __future__ import annotations

import string
from functools import cache

import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    LlamaConfig,
    LlamaModel,
    LlamaTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

CHARACTERS = string.ascii_letters + string.digits + string.punctuation


@cache
def t5_tokenizer() -> T5TokenizerFast:
    """One token per character. transformers wires ids 0, 1, 2 to pad, eos and unk."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -1.0)]
    vocab += [(character, -2.0) for character in CHARACTERS]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=512)


@cache
def clip_tokenizer() -> CLIPTokenizer:
    """One token per character, each with and without the end-of-word suffix."""
    pieces = [piece for c in CHARACTERS for piece in (c, c + "</w>")]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


@cache
def llama_tokenizer() -> LlamaTokenizer:
    """One token per character; the 256 byte tokens are what byte fallback needs."""
    pieces = ["<unk>", "<s>", "</s>", "<pad>"]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)] + ["\u2581", *CHARACTERS]
    # transformers 5 pads Llama prompts on the left by default; HunyuanVideo needs the right.
    return LlamaTokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=[],
        pad_token="<pad>",
        padding_side="right",
        model_max_length=1024,
    )


def t5_encoder(width: int, *, umt5: bool = False) -> T5EncoderModel:
    model, config = (UMT5EncoderModel, UMT5Config) if umt5 else (T5EncoderModel, T5Config)
    return _seeded(
        model,
        config(
            vocab_size=len(t5_tokenizer()),
            d_model=width,
            d_kv=8,
            d_ff=37,
            num_layers=2,
            num_heads=4,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
            feed_forward_proj="gated-gelu",
            relative_attention_num_buckets=8,
        ),
    )


def clip_encoder(width: int) -> CLIPTextModel:
    tokenizer = clip_tokenizer()
    return _seeded(
        CLIPTextModel,
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            projection_dim=width,
            intermediate_size=37,
            num_attention_heads=4,
            num_hidden_layers=2,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
    )


def llama_encoder(width: int) -> LlamaModel:
    tokenizer = llama_tokenizer()
    return _seeded(
        LlamaModel,
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=37,
            num_attention_heads=4,
            num_key_value_heads=4,
            num_hidden_layers=4,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=tokenizer.pad_token_id,
            max_position_embeddings=2048,
        ),
    )


def _seeded(model, config):
    torch.manual_seed(0)
    return model(config).eval()  # a new encoder is in train mode, with dropout
