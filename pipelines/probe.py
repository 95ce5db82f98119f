"""Read attention while a transformer runs: who looks at which tokens, in O(tokens) memory.

    from gen_accel.pipelines.probe import probe

    def read(call):                                  # once per attention call of the chosen blocks
        return call.to_text([[4], [5, 6]]).mean(1)   # [batch, video tokens, 2 words]

    with probe(pipe.transformer, read, blocks=[2, 3]) as maps:
        pipe.transformer(...)
    maps[0]

The forward computes what it would compute without the probe, bit for bit, with stock processors and
with those of gen_accel. A call is joint (HunyuanVideo, FLUX), self or cross (Wan, Cosmos); queries
and keys are those that are multiplied: norms and RoPE applied. Everything a `Call` answers is a
softmax over all keys that the block attends to, or over the part of them that ``keys`` names:

- `Call.share`: how much of each query's attention goes to sets of tokens, by one fused attention
  with indicator columns as values. ``call.share(call.columns(video=m), keys="video")`` is
  Object-WIPER's ratio to a region; with one column per frame in ``m`` and ``keys="all"``, head
  means divided by those of a column per whole frame are its response per frame.
- `Call.to_text`: image-to-text columns, per word; ``keys="text"`` renormalises over text.
- `Call.from_text`: text-to-image rows of a few tokens.
- `Call.incoming`: what each key receives, and how evenly: attention sinks.

None of them forms tokens x tokens numbers. Where queries and keys come from elsewhere (a capture, a
processor), make a `Call` of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gen_accel.families import family_of
from gen_accel.families.base import FamilyProcessor, argument
from gen_accel.layout import TokenGrid, TokenLayout
from gen_accel.order.axis import inverse_permutation

T = TypeVar("T")

PARTS = ("all", "video", "text")
# Kernels that keep no matrix of scores.
_FUSED = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
]
_SCORES = 1 << 22  # scores held at once where rows are formed: 16 MiB


class Incoming(NamedTuple):
    """What each key receives, ``[batch, heads, keys]`` each.

    Attributes:
        mass: Mean attention over the queries; 1 / keys when all are alike.
        spread: Standard deviation over the queries.
    """

    mass: Tensor
    spread: Tensor

    @property
    def uniformity(self) -> Tensor:
        """Spread over mass: near 0 where every query gives the same, as to a sink."""
        return self.spread / self.mass.clamp(min=1e-12)


@dataclass(frozen=True, eq=False)
class Call:
    """One attention call.

    Attributes:
        q: ``[batch, queries, heads, head_dim]``, norms and RoPE applied, video in raster order.
        k: ``[batch, keys, heads, head_dim]``.
        layout: Grid and text. In a cross call the queries are the video and the keys the text; in
            a self call there is no text.
        kind: ``"joint"``, ``"self"`` or ``"cross"``.
        v: Shape of k, or None.
        out: What the block's attention returned, shape of q, or None.
        block: Index of the block, see `block_names`.
        name: Name of the attention module.
    """

    q: Tensor
    k: Tensor
    layout: TokenLayout
    kind: str = "joint"
    v: Tensor | None = None
    out: Tensor | None = None
    block: int = 0
    name: str = ""

    @property
    def grid(self) -> TokenGrid:
        """The video tokens."""
        return self.layout.grid

    @property
    def text(self) -> int:
        """Number of text tokens, padding included."""
        return self.layout.text

    @property
    def video(self) -> slice:
        """Video tokens among the queries, and among the keys of a joint or self call."""
        before = self.layout.text_before if self.kind == "joint" else 0
        return slice(before, before + self.grid.numel)

    def columns(self, video: Tensor | None = None, text: Tensor | None = None) -> Tensor:
        """Weights of the keys from weights of video and text tokens, 0 where none are given.

        Args:
            video: ``[video tokens, columns]`` or with a batch in front; bool or float.
            text: ``[text tokens, columns]``, the same. Fewer rows are the first tokens.

        Returns:
            ``[keys, columns]`` or ``[batch, keys, columns]``, fp32.

        Raises:
            ValueError: Tokens that this call does not have as keys.
        """
        given = [x for x in (video, text) if x is not None]
        if not given:
            raise ValueError("columns() of nothing: give video=, text= or both")
        shape = torch.broadcast_shapes(*((*x.shape[:-2], 1, x.shape[-1]) for x in given))
        out = self.k.new_zeros((*shape[:-2], self.k.shape[1], shape[-1]), dtype=torch.float32)
        for part, x in (("video", video), ("text", text)):
            if x is None:
                continue
            place = self._keys(part)
            if x.shape[-2] > place.stop - place.start:
                raise ValueError(
                    f"{part} columns of {x.shape[-2]} tokens: this {self.kind} call has "
                    f"{place.stop - place.start}"
                )
            out[..., place.start : place.start + x.shape[-2], :] = x.to(out)
        return out

    def share(self, columns: Tensor, *, queries: str = "video", keys: str = "all") -> Tensor:
        """How much of each query's attention goes to weighted sets of keys.

        Args:
            columns: ``[keys, sets]`` or ``[batch, keys, sets]``, see `columns`.
            queries: ``"video"``, ``"text"`` or ``"all"``.
            keys: Keys the softmax runs over: ``"all"`` the block attends to, or one kind.

        Returns:
            ``[batch, heads, queries, sets]``, fp32.
        """
        columns = columns.float().expand(len(self.q), *columns.shape[-2:])
        return self.attend(columns[:, :, None], queries=queries, keys=keys)

    def attend(self, values: Tensor, *, queries: str = "video", keys: str = "all") -> Tensor:
        """This call's attention with other values; `share` is the case of one for all heads.

        Args:
            values: ``[batch, keys, heads or 1, columns]``.
            queries: As for `share`.
            keys: As for `share`.

        Returns:
            ``[batch, heads, queries, columns]``, fp32.
        """
        q = self.q[:, self._queries(queries)]
        return self._by_text(partial(self._attend, q, values, keys))

    def to_text(self, words: Tensor | Sequence[Sequence[int]], *, keys: str = "text") -> Tensor:
        """How much of each video token's attention goes to words.

        Args:
            words: Text tokens of each word, whose mean is taken; or weights ``[text tokens,
                words]``, with a batch in front where samples differ.
            keys: ``"text"`` renormalises over text (padding that is attended to included),
                ``"all"`` is the block's own attention.

        Returns:
            ``[batch, heads, video tokens, words]``, fp32.

        Raises:
            ValueError: A self call, which has no text.
        """
        if self.kind == "self":
            raise ValueError("a self call has no text tokens")
        weights = words if isinstance(words, Tensor) else self._weights(words)
        return self.share(self.columns(text=weights), keys=keys)

    def from_text(self, tokens: Tensor | Sequence[int], *, keys: str = "video") -> Tensor:
        """Where text tokens look in the video.

        A cross call has no such attention; there it is the softmax over video tokens of the same
        scores.

        Args:
            tokens: Text tokens, ``[tokens]`` or ``[batch, tokens]``.
            keys: ``"video"``, or ``"all"`` for the share of everything the token sees.

        Returns:
            ``[batch, heads, tokens, video tokens]``, fp32.

        Raises:
            ValueError: A self call, which has no text.
        """
        index = torch.as_tensor(tokens, device=self.q.device).expand(len(self.q), -1)
        cross = self.kind == "cross"
        source, place = (self.k, self._keys("text")) if cross else (self.q, self._text())
        if bool((index < 0).any() or (index >= place.stop - place.start).any()):
            raise ValueError(f"text tokens {tokens}: there are {place.stop - place.start}")
        index = (index + place.start)[:, :, None, None].expand(-1, -1, *source.shape[2:])
        rows = source.gather(1, index)
        if cross:
            return _weights(rows, self.q)
        if keys == "video":
            return _weights(rows, self.k[:, self.video])
        full = self._by_text(lambda sample, end: _weights(rows[sample], self.k[sample, :end]), -1)
        return full[..., self.video]

    def incoming(self, queries: int | None = 512, *, seed: int = 0) -> Incoming:
        """What each key receives from the queries, text queries included, padding excluded.

        Args:
            queries: Random queries looked at; None takes all.
            seed: Of their choice.
        """
        both = self._by_text(partial(self._received, queries, seed), -1)
        return Incoming(both[:, 0], both[:, 1])

    # -- how -----------------------------------------------------------------------------------

    def _received(self, queries: int | None, seed: int, sample: slice, end: int) -> Tensor:
        q, k = self.q[sample], self.k[sample, :end]
        count = end if self.kind == "joint" else q.shape[1]
        if queries is not None and queries < count:
            generator = torch.Generator().manual_seed(seed)
            chosen = torch.randperm(count, generator=generator)[:queries].sort().values
            q, count = q[:, chosen.to(q.device)], queries
        else:
            q = q[:, :count]
        first, second = k.new_zeros((2, len(k), k.shape[2], end), dtype=torch.float64)
        rows = max(1, _SCORES // (len(k) * k.shape[2] * end))
        for part in q.split(rows, dim=1):
            weights = _weights(part, k)
            first += weights.sum(2)
            second += weights.square_().sum(2)
        mass = first / count
        spread = (second / count - mass.square()).clamp(min=0).sqrt()
        return torch.stack([mass, spread], dim=1).float()

    def _attend(self, q: Tensor, values: Tensor, keys: str, sample: slice, end: int) -> Tensor:
        place = self._keys(keys)
        stop = min(place.stop, end)
        heads = self.k.shape[2]
        q, k, v = (
            x.float().transpose(1, 2)
            for x in (q[sample], self.k[sample, place.start : stop],
                      values[sample, place.start : stop])
        )  # fmt: skip
        v = v.expand(-1, heads, -1, -1)
        # Fused kernels want values as wide as keys.
        width = q.shape[-1]
        parts = []
        with sdpa_kernel(_FUSED):
            for part in v.split(width, dim=-1):
                padded = F.pad(part, (0, width - part.shape[-1]))
                parts.append(F.scaled_dot_product_attention(q, k, padded)[..., : part.shape[-1]])
        return torch.cat(parts, dim=-1)

    def _by_text(self, run: Callable[[slice, int], Tensor], pad: int | None = None) -> Tensor:
        """``run(samples, keys)`` for samples with as much text; ``pad`` is an axis of all keys."""
        total, valid = self.k.shape[1], self.layout.text_valid
        if valid is None:
            return run(slice(None), total)
        if len(set(valid)) == 1:
            groups = [(slice(None), valid[0])]
        else:
            groups = [(slice(i, i + 1), n) for i, n in enumerate(valid)]
        outs = []
        for sample, n in groups:
            out = run(sample, total - self.text + n)
            if pad is not None:
                out = F.pad(out, (0, total - out.shape[pad]))
            outs.append(out)
        return torch.cat(outs)

    def _text(self) -> slice:
        if self.kind != "joint":
            raise ValueError(f"a {self.kind} call has no text tokens among its queries")
        if self.layout.text_before:
            return slice(0, self.layout.text_before)
        return slice(self.grid.numel, self.layout.tokens)

    def _queries(self, part: str) -> slice:
        _check(part, "queries")
        if part == "all":
            return slice(0, self.q.shape[1])
        return self.video if part == "video" else self._text()

    def _keys(self, part: str) -> slice:
        _check(part, "keys")
        everything = slice(0, self.k.shape[1])
        if part == "all" or (self.kind, part) in (("cross", "text"), ("self", "video")):
            return everything
        if self.kind != "joint":
            raise ValueError(f"a {self.kind} call has no {part} keys")
        return self.video if part == "video" else self._text()

    def _weights(self, words: Sequence[Sequence[int]]) -> Tensor:
        weights = torch.zeros(self.text, len(words), device=self.k.device)
        for column, tokens in enumerate(words):
            weights[list(tokens), column] = 1 / len(tokens)
        return weights


def probe_bytes(
    tokens: int, heads: int, head_dim: int, *, columns: int = 0, rows: int = 0, batch: int = 1
) -> int:
    """Upper bound of the memory that the reading of one call takes for a while, in bytes.

    Linear in the tokens: fp32 copies of q, k, values and output, the columns, the rows, and a
    fixed number of scores.

    Args:
        tokens: Video and text tokens.
        heads: Heads.
        head_dim: Channels of a head.
        columns: Sets of `Call.share`.
        rows: Words of `Call.from_text`.
        batch: Samples.
    """
    wide = head_dim * max(1, -(-columns // head_dim))
    per_token = 4 * head_dim + 2 * wide + 2 * columns + 4 * rows + 10
    return 4 * batch * heads * tokens * per_token + 4 * 4 * max(_SCORES, batch * heads * tokens)


def block_names(transformer: nn.Module) -> list[str]:
    """Names of the blocks whose attention can be read; a `Call`'s ``block`` counts them.

    Raises:
        ValueError: No family serves this transformer.
    """
    return list(dict.fromkeys(name.rpartition(".")[0] for name in _modules(transformer)))


@contextlib.contextmanager
def probe(
    transformer: nn.Module, read: Callable[[Call], T], blocks: Sequence[int] | None = None
) -> Iterator[list[T]]:
    """Show every attention call of some blocks to a function.

    Args:
        transformer: Of a family that gen_accel serves, not compiled.
        read: Called without gradients, after the attention, in the order of the calls. It must
            not write into the tensors it sees.
        blocks: Indices in `block_names`, negative ones from the end; None: all.

    Yields:
        A list that collects what ``read`` returns.

    Raises:
        ValueError: No such block, a compiled transformer, or a processor that cannot be read.
        Unsupported: In the forward, when its tokens are not one grid.
        RuntimeError: A forward ran, and none of its calls came by.
    """
    transformer = getattr(transformer, "_orig_mod", transformer)
    modules = _modules(transformer)
    names = block_names(transformer)
    if blocks is not None and not all(-len(names) <= b < len(names) for b in blocks):
        raise ValueError(f"blocks={list(blocks)}: {type(transformer).__name__} has {len(names)}")
    chosen = set(names) if blocks is None else {names[b] for b in blocks}
    numbers = {n: names.index(n.rpartition(".")[0]) for n in modules}
    watched = {n: m for n, m in modules.items() if n.rpartition(".")[0] in chosen}
    if any(getattr(m, "_compiled_call_impl", None) is not None for m in transformer.modules()):
        raise ValueError("a compiled transformer hides its attention: probe it before compiling")
    reader = _Reader(transformer, read, numbers)
    with contextlib.ExitStack() as stack:
        add = partial(_hooked, stack)
        add(transformer.register_forward_pre_hook(reader.begin, with_kwargs=True))
        add(transformer.register_forward_hook(reader.end))
        for name, module in watched.items():
            add(module.register_forward_pre_hook(partial(reader.enter, name)))
            add(module.register_forward_hook(reader.leave, always_call=True))
        for processor in {id(m.processor): m.processor for m in watched.values()}.values():
            _intercept(stack, processor, reader)
        yield reader.results


class _Reader:
    """What the hooks of one `probe` share."""

    def __init__(
        self, transformer: nn.Module, read: Callable[[Call], Any], numbers: dict[str, int]
    ) -> None:
        self.transformer = transformer
        self.family = family_of(transformer)
        self.read = read
        self.numbers = numbers
        self.results: list[Any] = []
        self.layout: TokenLayout | None = None
        self.text = 0
        self.module = ""
        self.calls = 0

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.layout = self.family.layout(module, args, kwargs)
        self.text = argument(module, args, kwargs, "encoder_hidden_states").shape[1]
        self.calls = 0

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        self.layout = None
        if not self.calls:
            raise RuntimeError(
                f"{type(module).__name__}: no attention call came by the probe; a cache may have "
                "skipped its blocks, or its processors were replaced inside the probe"
            )

    def enter(self, name: str, module: nn.Module, args: Any) -> None:
        self.module = name

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.module = ""

    @torch.no_grad()
    def see(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        if not self.module or self.layout is None:
            return
        layout, queries, keys = self.layout, q.shape[1], k.shape[1]
        if queries == keys == layout.tokens:
            kind = "joint" if layout.text else "self"
        elif queries == layout.grid.numel and keys == self.text:
            kind, layout = "cross", TokenLayout(layout.grid, text_after=keys)
        elif queries == layout.grid.numel:
            return  # Wan I2V looks at image embeddings first
        else:
            raise ValueError(
                f"{self.module}: {queries} queries and {keys} keys are not the tokens of "
                f"{layout}; sharded attention cannot be read"
            )
        q, k, v, out = (x.detach() for x in (q, k, v, out))
        order = self._order(q.device)
        if order is not None:
            q, out = (_raster(x, order, layout, kind) for x in (q, out))
            if kind != "cross":
                k, v = (_raster(x, order, layout, kind) for x in (k, v))
        self.calls += 1
        block = self.numbers[self.module]
        call = Call(q, k, layout, kind, v=v, out=out, block=block, name=self.module)
        self.results.append(self.read(call))

    def _order(self, device: torch.device) -> Tensor | None:
        """Place of each raster token where gen_accel keeps the video in another order."""
        hoist = getattr(getattr(self.transformer, "_gen_accel", None), "hoist", None)
        if hoist is None or not hoist.active:
            return None
        assert self.layout is not None
        permutation = torch.tensor(hoist.order.permutation(self.layout.grid))
        return inverse_permutation(permutation).to(device)


def _raster(x: Tensor, order: Tensor, layout: TokenLayout, kind: str) -> Tensor:
    start = layout.text_before if kind == "joint" else 0
    before, video, after = x.tensor_split([start, start + layout.grid.numel], dim=1)
    return torch.cat([before, video[:, order], after], dim=1)


def _intercept(stack: contextlib.ExitStack, processor: Any, reader: _Reader) -> None:
    """Let the reader see what a processor passes to its attention, and what comes back."""
    if isinstance(processor, FamilyProcessor):
        attend = processor.attend

        def seen(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
            out = attend(q, k, v, **kwargs)
            reader.see(q, k, v, out)
            return out

        processor.attend = seen
        stack.callback(setattr, processor, "attend", attend)
        return
    # Stock processors look the function up in their module, so one name is replaced there.
    namespace = type(processor).__call__.__globals__
    stock = namespace.get("dispatch_attention_fn")
    if stock is None:
        raise ValueError(
            f"{type(processor).__name__} computes attention itself; the probe reads processors "
            "that call dispatch_attention_fn, and those of gen_accel"
        )
    if getattr(stock, "reader", None) is reader:
        return

    def dispatch(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = stock(query, key, value, *args, **kwargs)
        reader.see(query, key, value, out)
        return out

    dispatch.reader = reader  # type: ignore[attr-defined]
    namespace["dispatch_attention_fn"] = dispatch
    stack.callback(namespace.__setitem__, "dispatch_attention_fn", stock)


def _modules(transformer: nn.Module) -> dict[str, Any]:
    """Attention modules that see the video: joint, self and cross."""
    transformer = getattr(transformer, "_orig_mod", transformer)
    family = family_of(transformer)
    kept = (None, "already accelerated", "cross-attention")
    return {
        name: module
        for name, module in transformer.named_modules()
        if hasattr(module, "processor") and family.keep(name, module) in kept
    }


def _hooked(stack: contextlib.ExitStack, handle: Any) -> None:
    stack.callback(handle.remove)


def _weights(rows: Tensor, keys: Tensor) -> Tensor:
    """Softmax rows ``[batch, heads, rows, keys]`` in fp32, of tensors BSHD."""
    scores = torch.einsum("bqhd,bkhd->bhqk", rows.float(), keys.float())
    return (scores * rows.shape[-1] ** -0.5).softmax(-1)


def _check(part: str, name: str) -> None:
    if part not in PARTS:
        raise ValueError(f"{name}={part!r}: choose one of {', '.join(map(repr, PARTS))}")
