import logging
import weakref

import pytest
import torch

from gen_accel.kernels import api
from gen_accel.kernels.api import available, block_sparse_attention
from gen_accel.kernels.blocks import RULES, Blocks
from helpers.attention_cases import CASES, Case, banded, causal, every, random


def tensors(*shape, dtype=torch.float32):
    return [torch.randn(*(shape or (1, 128, 2, 16)), dtype=dtype) for _ in range(3)]


def blocks(**changes):
    settings = {"q_len": 128, "kv_len": 128, "heads": 2, "dim": 16, **changes}
    return Case("checks", every, **settings).blocks()


def bad(change):
    """Arguments of a good call after ``change``."""
    q, k, v = tensors()
    arguments = {"q": q, "k": k, "v": v, "blocks": blocks()}
    arguments.update(change(q))
    return arguments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: {"q": q[0]}, r"q has shape \(128, 2, 16\): it must be \[batch, tokens"),
        (lambda q: {"q": q[..., :0]}, r"q has shape \(1, 128, 2, 0\): no axis may be empty"),
        (lambda q: {"k": q[:, :0]}, r"k has shape \(1, 0, 2, 16\): no axis may be empty"),
        (lambda q: {"q": q.int()}, r"q is torch.int32: it must be fp64, fp32, bf16 or fp16"),
        (lambda q: {"k": q.half()}, r"k is torch.float16, q is torch.float32: cast"),
        (lambda q: {"v": q.to("meta")}, r"v is on meta, q on cpu: move"),
        (lambda q: {"v": q[:, :9]}, r"k \(1, 128, 2, 16\) and v \(1, 9, 2, 16\)"),
        (lambda q: {"q": q[..., :8]}, r"head_dim of q is 8, of k 16"),
        (lambda q: {"q": q[:, :, :1]}, r"heads of q is 1, of k 2"),
        (lambda q: {"q": q.expand(3, -1, -1, -1)}, r"batch of q is 3, of k 1"),
        (lambda q: {"blocks": blocks(q_len=64)}, r"q_len=64 in blocks, but .* 128 tokens"),
        (lambda q: {"blocks": blocks(kv_len=64)}, r"kv_len=64 in blocks, but .* 128 tokens"),
        (
            lambda q: {"blocks": Case("", random(1, 3, 0.5), 128, 128).blocks()},
            r"block lists for 1 samples and 3 heads, q has 1 and 2",
        ),
        (
            lambda q: {"blocks": blocks().to("meta")},
            r"on meta, q on cpu: use blocks.to\(q.device\)",
        ),
        (lambda q: {"scale": float("nan")}, r"scale=nan: it must be finite"),
        (lambda q: {"scale": float("inf")}, r"scale=inf: it must be finite"),
        (lambda q: {"impl": "gathr"}, r"impl='gathr': .*'auto', 'gather'.*did you mean 'gather'"),
        (lambda q: {"precision": "int7"}, r"precision='int7': it must be one of 'auto', 'fp32'"),
        (lambda q: {"tail": "rectify"}, r"tail='rectify': it must be one of 'drop'.*'rectified'\?"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message) as error:
        block_sparse_attention(**bad(change))
    assert "\n" not in str(error.value)


def test_wrong_types():
    q, k, v = tensors()
    with pytest.raises(TypeError, match=r"k is a list: it must be a torch.Tensor"):
        block_sparse_attention(q, [1], v)
    with pytest.raises(TypeError, match=r"blocks is a Tensor: it must be a Blocks"):
        block_sparse_attention(q, k, v, q)
    with pytest.raises(TypeError, match="attn_mask"):
        block_sparse_attention(q, k, v, attn_mask=None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_check_finite(value):
    q, k, v = tensors()
    k[0, 3, 1, :2] = value
    block_sparse_attention(q, k, v, blocks())
    with pytest.raises(ValueError, match=r"k holds 2 NaN or infinite values of 4096"):
        block_sparse_attention(q, k, v, blocks(), check_finite=True)


def test_default_scale_and_tail():
    q, k, v = tensors()
    out = block_sparse_attention(q, k, v, blocks(), tail="drop")
    torch.testing.assert_close(out, block_sparse_attention(q, k, v, blocks(), scale=0.25))


@pytest.mark.parametrize("impl", ["reference", "gather"])
@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16", "fp16"])
def test_precision_rounds_the_inputs_and_keeps_the_dtype(impl, precision):
    q, k, v = tensors()
    out = block_sparse_attention(q, k, v, blocks(), impl=impl, precision=precision)
    assert out.dtype == q.dtype
    error = (out - block_sparse_attention(q, k, v, blocks(), impl="reference")).abs().max()
    assert (error < 1e-5) == (precision in ("auto", "fp32"))
    assert error < 0.05


def test_available_names_every_carrier():
    carriers = available()
    assert carriers["reference"] is None and carriers["gather"] is None
    assert set(carriers) == set(api._CARRIERS)


def test_a_named_carrier_never_falls_back(monkeypatch):
    from gen_accel.kernels import gather

    monkeypatch.setattr(gather, "limits", lambda call: "too hot; open a window")
    with pytest.raises(ValueError, match="impl='gather': too hot; open a window"):
        block_sparse_attention(*tensors(), blocks(), impl="gather")


def test_auto_says_once_what_it_took(caplog):
    api._announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="gen_accel"):
        for _ in range(3):
            block_sparse_attention(*tensors(), blocks())
    assert [r.message for r in caplog.records] == [
        "block_sparse_attention runs on carrier 'gather' on cpu"
    ]


# ---- torch.compile -------------------------------------------------------------------------------


class Layer(torch.nn.Module):
    def __init__(self, blocks, **options):
        super().__init__()
        self.blocks, self.options = blocks, options

    def forward(self, q, k, v):
        return block_sparse_attention(2 * q, k, v, self.blocks, **self.options)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize(
    "case", [None, *(CASES[i] for i in (3, 8, -2))], ids=lambda c: c and c.name
)
def test_compiles_into_one_graph(case, impl):
    torch._dynamo.reset()
    q, k, v = (case or CASES[0]).tensors()
    layer = Layer(case and case.blocks(), impl=impl, return_lse=True)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for got, want in zip(compiled(q, k, v), layer(q, k, v)):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_many_layers_share_few_graphs():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(
        lambda *args: block_sparse_attention(*args), backend=backend, fullgraph=True
    )
    q, k, v = tensors()
    for width in range(20):
        rule = lambda b, h, q, k, w=width: (q - k).abs() <= w  # noqa: E731
        case = Case("", every, 128, 128, 2, 16, partial=every, mask_mod=rule)
        lists = case.blocks()
        torch.testing.assert_close(
            compiled(q, k, v, lists), block_sparse_attention(q, k, v, lists), rtol=0, atol=0
        )
    assert len(graphs) <= 3


def test_lists_can_be_made_in_compiled_code():
    """As a selection does that looks at q and k."""
    torch._dynamo.reset()

    def select_and_attend(q, k, v):
        means = [x.unflatten(1, (-1, 16)).mean(2).transpose(1, 2) for x in (q, k)]
        lists = (means[0] @ means[1].mT).topk(3).indices.sort().values.int()
        counts = torch.full_like(lists[..., 0], 3)
        return block_sparse_attention(q, k, v, Blocks(counts, lists, 128, 128, 16, 16))

    q, k, v = tensors()
    compiled = torch.compile(select_and_attend, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), select_and_attend(q, k, v), rtol=0, atol=0)


def test_the_opaque_operation_is_registered_correctly():
    case = CASES[8]
    q, k, v = case.tensors()
    arguments = ([], 0, 0.125, "auto", "gather", True, False)
    torch.library.opcheck(
        torch.ops.gen_accel.block_sparse_attention.default,
        (q, k, v, *api._flatten(case.blocks()), *arguments),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_rules_are_not_kept_alive():
    def rule(b, h, q, k):
        return q >= k

    lists = Case("", every, 128, 128, partial=every, mask_mod=rule).blocks()
    number, gone = lists.rule, weakref.ref(rule)
    assert RULES[number] is rule
    del lists, rule
    assert gone() is None and number not in RULES


def test_rules_are_told_apart():
    a = Case("", every, 128, 128, partial=every, mask_mod=causal).blocks()
    b = Case("", every, 128, 128, partial=every, mask_mod=banded).blocks()
    assert a.rule != b.rule and blocks().rule == 0


def test_emulation_is_announced_once(caplog):
    api._announce_emulation.cache_clear()
    q, k, v = tensors()
    with caplog.at_level(logging.WARNING):
        for precision, impl in (("int8", "auto"), ("int8+int8", "auto"), ("int8", "reference")):
            block_sparse_attention(q, k, v, blocks(), precision=precision, impl=impl)
    assert [r.getMessage() for r in caplog.records] == [
        "quantised attention is emulated: accuracy only, no speed; "
        "gen-accel doctor lists what runs how"
    ]
    assert api.emulates("gather", "int8") and not api.emulates("gather", "bf16")
    assert api.choose(q, k, v, None, precision="int8") == "gather"


def test_quantised_calls_compile():
    q, k, v = tensors()
    lists = blocks()
    call = lambda q: block_sparse_attention(q, k, v, lists, precision="int8+fp8")  # noqa: E731
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q), call(q), rtol=0, atol=0)
