"""The probe reads what the blocks compute, and changes nothing."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gen_accel import ParoProcessor, SpaAttnProcessor, apply
from gen_accel.layout import TokenGrid, TokenLayout
from gen_accel.pipelines.probe import _SCORES, Call, block_names, probe, probe_bytes
from helpers import tiny

PIPES = {
    "hunyuan": tiny.tiny_hunyuan,
    "wan": tiny.tiny_wan,
    "wan-i2v": tiny.tiny_wan_i2v,
    "flux": tiny.tiny_flux,
    "cosmos": tiny.tiny_cosmos,
}
TWO = {"prompt": ["a cat runs", "an elephant goes home"]}


def built(case, prompts=1):
    pipe, call = PIPES[case]()
    call["num_inference_steps"] = 1
    if prompts == 2:
        call["prompt"] = TWO["prompt"]
        if "negative_prompt" in call:
            call["negative_prompt"] = ["bad", "bad and ugly"]
    return pipe, call


def kinds(case):
    if case in ("hunyuan", "flux"):
        return ["joint"] * 4
    return ["self", "cross"] * 2 * 2  # two layers, two branches


def expected_rows(call):
    """The block's own weights, formed whole: ``[batch, heads, queries, keys]``."""
    scores = torch.einsum("bqhd,bkhd->bhqk", call.q, call.k) * call.q.shape[-1] ** -0.5
    for sample, n in enumerate(call.layout.text_valid or ()):
        scores[sample, ..., call.k.shape[1] - call.text + n :] = float("-inf")
    return scores.softmax(-1)


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize("case", PIPES)
def test_probed_weights_times_values_are_the_output(case, prompts):
    pipe, call = built(case, prompts)
    seen = []

    def read(c):
        values = c.attend(c.v, queries="all" if c.kind == "joint" else "video")
        torch.testing.assert_close(values.transpose(1, 2), c.out, atol=2e-5, rtol=1e-4)
        # Words as queries: their rows times the values of what they see.
        if c.kind == "joint":
            rows = c.from_text([0, 2], keys="all")
            text = c._text().start
            video = torch.einsum("bhqk,bkhd->bqhd", rows, c.v[:, c.video])
            full = expected_rows(c)[:, :, [text, text + 2]]
            rest = full.clone()
            rest[..., c.video] = 0
            video += torch.einsum("bhqk,bkhd->bqhd", rest, c.v)
            torch.testing.assert_close(video, c.out[:, [text, text + 2]], atol=2e-5, rtol=1e-4)
        seen.append(c.kind)

    with probe(pipe.transformer, read):
        tiny.run(pipe, **call)
    assert seen == kinds(case)


@pytest.mark.parametrize("case", PIPES)
def test_columns_and_incoming_mass_equal_the_whole_matrix(case):
    pipe, call = built(case, 2)

    def read(c):
        full = expected_rows(c)
        count = c.k.shape[1] - c.text + min(c.layout.text_valid or (c.text,))
        got = c.incoming(None)
        if len(set(c.layout.text_valid or ())) < 2:
            queries = full if c.kind != "joint" else full[:, :, :count]
            torch.testing.assert_close(got.mass, queries.mean(2), atol=1e-6, rtol=1e-4)
            torch.testing.assert_close(
                got.spread, queries.std(2, correction=0), atol=1e-5, rtol=1e-3
            )
        if c.kind == "self":
            region = torch.rand(c.grid.numel, 3) < 0.3
            share = c.share(c.columns(video=region))
            torch.testing.assert_close(share, full @ region.float(), atol=1e-5, rtol=1e-4)
            return
        words = [[0], [1, 2]]
        video = full if c.kind == "cross" else full[:, :, c.video]
        columns = video if c.kind == "cross" else video[..., c._text()]
        joint = torch.stack([columns[..., 0], columns[..., 1:3].mean(-1)], -1)
        torch.testing.assert_close(c.to_text(words, keys="all"), joint, atol=1e-6, rtol=1e-4)
        renormalised = joint / columns.sum(-1, keepdim=True)
        torch.testing.assert_close(c.to_text(words), renormalised, atol=1e-5, rtol=1e-3)

    with probe(pipe.transformer, read):
        tiny.run(pipe, **call)


@pytest.mark.parametrize("case", PIPES)
@pytest.mark.parametrize(
    "policy",
    [
        None,
        ParoProcessor(dense_steps=1.0),
        SpaAttnProcessor(dense_steps=0, min_tokens=0, block=16),
    ],
    ids=["stock", "dense", "hoisted"],
)
def test_the_forward_is_bit_identical(case, policy):
    pipe, call = built(case)
    if policy is not None:
        apply(pipe, policy)
    plain = tiny.run(pipe, **call)
    with probe(pipe.transformer, lambda c: c.incoming(16)) as results:
        probed = tiny.run(pipe, **call)
    assert torch.equal(plain, probed) and results
    assert torch.equal(tiny.run(pipe, **call), plain)


def test_a_hoisted_order_is_read_as_raster():
    pipe, call = built("hunyuan")
    maps = []
    for policy in (None, SpaAttnProcessor(dense_steps=1.0, min_tokens=0, block=16, order="curve")):
        if policy is not None:
            handle = apply(pipe, policy)
        with probe(pipe.transformer, lambda c: c.to_text([[0], [1]])) as got:
            tiny.run(pipe, **call)
        maps.append(got)
    assert handle.components[0].hoist.reason == ""
    for a, b in zip(*maps):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_blocks_are_chosen_and_hooks_go_away():
    pipe, call = built("hunyuan")
    assert block_names(pipe.transformer) == [
        "transformer_blocks.0", "transformer_blocks.1",
        "single_transformer_blocks.0", "single_transformer_blocks.1",
    ]  # fmt: skip
    with probe(pipe.transformer, lambda c: (c.block, c.name), blocks=[1, -1]) as seen:
        tiny.run(pipe, **call)
    assert seen == [(1, "transformer_blocks.1.attn"), (3, "single_transformer_blocks.1.attn")]
    tiny.run(pipe, **call)
    assert len(seen) == 2
    with pytest.raises(ValueError, match=r"blocks=\[4\]: HunyuanVideoTransformer3DModel has 4"):
        probe(pipe.transformer, print, blocks=[4]).__enter__()


def test_an_error_in_the_reader_leaves_nothing_behind():
    pipe, call = built("flux")
    plain = tiny.run(pipe, **call)
    with pytest.raises(ZeroDivisionError), probe(pipe.transformer, lambda c: 1 / 0):
        tiny.run(pipe, **call)
    assert torch.equal(tiny.run(pipe, **call), plain)


def test_what_cannot_be_read_is_said():
    pipe, call = built("flux")
    pipe.transformer.compile_repeated_blocks(backend="eager")
    with pytest.raises(ValueError, match="before compiling"), probe(pipe.transformer, print):
        pass
    pipe, call = built("hunyuan")
    with (
        pytest.raises(RuntimeError, match="no attention call came by"),
        probe(pipe.transformer, print),
    ):
        for block in pipe.transformer.transformer_blocks:
            block.attn.set_processor(_Deaf(block.attn.processor))
        for block in pipe.transformer.single_transformer_blocks:
            block.attn.set_processor(_Deaf(block.attn.processor))
        tiny.run(pipe, **call)


class _Deaf:
    """A processor that was put there behind the probe's back."""

    def __init__(self, stock):
        self.stock = stock

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None,
        image_rotary_emb=None,
    ):  # fmt: skip
        return hidden_states, encoder_hidden_states


def planted(grid=(2, 4, 4), text=6, heads=3, dim=8, before=False, valid=None, batch=1):
    generator = torch.Generator().manual_seed(0)
    grid = TokenGrid(*grid)
    layout = TokenLayout(
        grid, **{"text_before" if before else "text_after": text}, text_valid=valid
    )
    q, k = torch.randn(2, batch, layout.tokens, heads, dim, generator=generator)
    return Call(q, k, layout)


def test_ratios_to_a_region_per_frame():
    """Object-WIPER's response of every token to a mask, frame by frame."""
    call = planted()
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, 3:6] = mask[1, 8:9] = True
    frames = torch.eye(2).repeat_interleave(16, 0)
    columns = torch.cat([frames * mask.flatten()[:, None], frames], 1)
    share = call.share(call.columns(video=columns)).mean(1)
    ratio = share[..., :2] / share[..., 2:]
    full = expected_rows(call).mean(1)[:, :32, :32].unflatten(-1, (2, 16))
    torch.testing.assert_close(ratio, (full * mask).sum(-1) / full.sum(-1), atol=1e-5, rtol=1e-4)


def test_columns_per_sample_and_more_columns_than_a_head_is_wide():
    call = planted(batch=2, valid=(3, 6))
    weights = torch.rand(2, 32, 20)
    share = call.share(call.columns(video=weights), keys="video", queries="text")
    rows = torch.einsum("bqhd,bkhd->bhqk", call.q[:, 32:], call.k[:, :32]) * 8**-0.5
    expected = rows.softmax(-1) @ weights[:, None]
    torch.testing.assert_close(share, expected, atol=1e-5, rtol=1e-4)
    # Padding is no key: its columns hold nothing.
    padding = call.to_text(torch.eye(6), keys="all")[0, :, :, 3:]
    assert padding.abs().max() == 0


def test_planted_sinks_are_seen_in_a_sample_of_the_queries():
    call = planted(grid=(4, 8, 8))
    call.k[:, 77] = call.q.mean(1) + 40 * torch.nn.functional.normalize(torch.ones(3, 8), dim=-1)
    call.q[:] += 2.0
    got = call.incoming(32)
    assert (got.mass.argmax(-1) == 77).all()
    assert (got.uniformity[..., 77] < 1).all()


def test_bad_requests_are_one_line():
    call = planted()
    with pytest.raises(ValueError, match="give video=, text= or both"):
        call.columns()
    with pytest.raises(ValueError, match="video columns of 40 tokens: this joint call has 32"):
        call.columns(video=torch.ones(40, 1))
    with pytest.raises(ValueError, match="keys='image'"):
        call.share(torch.ones(38, 1), keys="image")
    with pytest.raises(ValueError, match=r"text tokens \[6\]: there are 6"):
        call.from_text([6])
    alone = Call(call.q, call.k, TokenLayout(TokenGrid(2, 4, 4)), "self")
    with pytest.raises(ValueError, match="a self call has no text"):
        alone.to_text([[0]])


class _Peak(TorchDispatchMode):
    """Largest sum of live bytes, and largest single tensor, of what is made inside."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.largest = 0
        self._known = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.untyped_storage() not in self._known:
                storage, size = x.untyped_storage(), x.untyped_storage().nbytes()
                self._known[storage] = size
                weakref.finalize(storage, self._free, size)
                self.now += size
                self.peak = max(self.peak, self.now)
                self.largest = max(self.largest, size)
        return out

    def _free(self, size):
        self.now -= size


@pytest.mark.parametrize("tokens", [1024, 4096])
def test_memory_grows_with_tokens_not_with_their_square(tokens):
    call = planted(grid=(1, tokens // 64, 64), text=64, heads=2, dim=32, before=True)
    with _Peak() as peak:
        call.to_text(torch.eye(64), keys="all")
        call.from_text([3, 4])
        call.incoming(512)
    bound = probe_bytes(tokens + 64, heads=2, head_dim=32, columns=64, rows=2)
    assert peak.peak <= bound
    assert bound < 96 * 2**20
    assert peak.largest <= 4 * max(_SCORES, 2 * tokens * 64 + 2 * 64 * 64)


def test_a_flux_sized_call_needs_less_than_its_scores():
    """1024 x 1024 pixels, 60 words: 4096 image and 512 text tokens, 24 heads of 128."""
    bound = probe_bytes(4608, heads=24, head_dim=128, columns=60, rows=8)
    assert bound < 0.6 * 2**30 < 24 * 4608**2 * 4 / 3
