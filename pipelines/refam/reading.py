"""What one forward tells about the words of its prompt; several noise draws are averaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gen_accel.layout import TokenGrid
from gen_accel.pipelines.probe import Call, probe
from gen_accel.pipelines.refam.backbone import Backbone
from gen_accel.pipelines.refam.sinks import SinkRule, find_sinks, merge_heads
from gen_accel.pipelines.words import text_spans, word_tokens

Heads = dict[int, tuple[int, ...] | None]  # block -> its heads, None for all


@dataclass(frozen=True, eq=False)
class Reading:
    """Attention between video and prompt tokens, for a batch of samples.

    Attributes:
        pairs: (block, head) of each map.
        columns: ``[batch, pairs, video, tokens + 1]``: share of a video token's attention (or of
            its attention to text, see `read`) that goes to each prompt token; the last column is
            all text, padding that is attended to included.
        rows: ``[batch, pairs, tokens, video]``: where prompt tokens look in the video, or None.
        sinks: ``[batch, video + text]`` bool, video first: tokens that everybody looks at.
        mass: ``[batch, video + text]``, what a token receives, mean over the blocks, in units of an
            average key.
        grid: Token grid.
    """

    pairs: tuple[tuple[int, int], ...]
    columns: Tensor
    rows: Tensor | None
    sinks: Tensor
    mass: Tensor
    grid: TokenGrid

    def sample(self, index: int) -> Reading:
        """One sample, still with a batch axis."""
        at = slice(index, index + 1)
        rows = None if self.rows is None else self.rows[at]
        return Reading(self.pairs, self.columns[at], rows, self.sinks[at], self.mass[at], self.grid)


def token_table(
    backbone: Backbone, prompt: str, words: Sequence[tuple[int, int]]
) -> list[tuple[int, ...]]:
    """Prompt tokens of each word, given by its characters; words may have several tokens.

    Raises:
        ValueError: The prompt is longer than the encoder takes, or a word has no token.
    """
    spans = text_spans(backbone.pipe, prompt, **backbone.options)
    table = [word_tokens(spans, [word]) for word in words]
    for (start, end), tokens in zip(words, table):
        if not tokens:
            raise ValueError(f"word {prompt[start:end]!r} has no token of its own")
    return table


def prompt_length(backbone: Backbone, prompt: str) -> int:
    """Tokens of a prompt, special ones included, padding not."""
    return len(text_spans(backbone.pipe, prompt, **backbone.options))


def read(
    backbone: Backbone,
    latents: Tensor,
    prompts: list[str],
    *,
    heads: Heads,
    sigma: float = 0.5,
    seeds: Sequence[int] = (0,),
    rows: bool = True,
    joint: bool = True,
    rule: SinkRule | None = None,
    queries: int = 64,
) -> Reading:
    """Noise the latents, run the transformer once per seed, and read its attention.

    Args:
        backbone: Model.
        latents: Clean latents of the batch.
        prompts: One per sample.
        heads: Blocks whose words are read, and which of their heads.
        sigma: Noise level: ``x = (1 - sigma) latents + sigma noise``.
        seeds: One noise draw each; their readings are averaged.
        rows: Also read text-to-video rows.
        joint: Columns are shares of all attention; else of attention to text, which is all that
            ``direction="text"`` needs and several times cheaper.
        rule: How sinks are told, from all blocks; None: not looked for.
        queries: Random queries that incoming attention is measured on.

    Raises:
        ValueError: ``sigma`` outside (0, 1), or no seed.
    """
    if not 0 < sigma < 1 or not seeds:
        raise ValueError(f"sigma={sigma}, {len(seeds)} seeds: sigma in (0, 1), at least one seed")
    tokens = max(prompt_length(backbone, p) for p in prompts)
    text = backbone.text(prompts)
    reader = _Reader(heads, tokens, rows, joint, rule is not None, queries)
    blocks = None if rule is not None else sorted(heads)
    with probe(backbone.transformer, reader, blocks=blocks):
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            # One noise for every sample: what a clip gets must not depend on its batch.
            noise = torch.randn(latents.shape[1:], generator=generator).to(latents)
            noised = (1 - sigma) * latents + sigma * noise
            backbone.forward(noised, sigma, text)
    return reader.reading(len(seeds), rule or SinkRule(), backbone.grid(latents))


class _Reader:
    """Collects what calls tell, summed over the draws."""

    def __init__(
        self, heads: Heads, tokens: int, rows: bool, joint: bool, incoming: bool, queries: int
    ) -> None:
        self.heads = heads
        self.tokens = tokens
        self.rows = rows
        self.keys = "all" if joint else "text"
        self.incoming = incoming
        self.queries = queries
        self.maps: dict[int, tuple[Tensor, Tensor | None]] = {}
        self.received: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(self, call: Call) -> None:
        if call.kind != "self" and call.block in self.heads:
            chosen = self.heads[call.block]
            index = list(range(call.k.shape[2]) if chosen is None else chosen)
            maps = self._words(_some_heads(call, index))
            self.maps[call.block] = _add(self.maps.get(call.block), maps)
        if self.incoming:
            self._receive(call)

    def _words(self, call: Call) -> tuple[Tensor, Tensor | None]:
        each = torch.eye(call.text, self.tokens, device=call.k.device)
        everything = torch.ones(call.text, 1, device=call.k.device)
        columns = call.to_text(torch.cat([each, everything], 1), keys=self.keys)
        if not self.rows:
            return columns, None
        # Padding of shorter prompts is asked too; no word is ever looked up there.
        return columns, call.from_text(torch.arange(self.tokens))

    def _receive(self, call: Call) -> None:
        got = call.incoming(self.queries)
        mass, uniformity = merge_heads(got.mass, got.uniformity)
        if call.kind == "joint":  # video first
            parts = [call.video, call._text()]
            mass, uniformity = (torch.cat([x[:, p] for p in parts], 1) for x in (mass, uniformity))
        valid = call.layout.text_valid or (call.text,) * len(call.q)
        video = 0 if call.kind == "cross" else call.grid.numel
        keys = torch.tensor(valid, device=mass.device) + video
        # In Wan a block's words are keys of one call and its video of another.
        half = {"joint": 0, "self": 0, "cross": 1}[call.kind]
        key = 2 * call.block + half
        new = mass * keys[:, None], uniformity, keys
        old = self.received.get(key)
        self.received[key] = new if old is None else (old[0] + new[0], old[1] + new[1], keys)

    def reading(self, draws: int, rule: SinkRule, grid: TokenGrid) -> Reading:
        pairs: list[tuple[int, int]] = []
        for block in sorted(self.maps):
            chosen = self.heads[block]
            count = self.maps[block][0].shape[1]
            pairs += [(block, h) for h in (range(count) if chosen is None else chosen)]
        order = sorted(self.maps)
        columns = torch.cat([self.maps[b][0] for b in order], 1) / draws
        rows = None
        if self.rows:
            rows = torch.cat([self.maps[b][1] for b in order], 1) / draws  # type: ignore[misc]
        batch, video = len(columns), grid.numel
        if not self.received:
            nothing = columns.new_zeros(batch, video + self.tokens)
            return Reading(tuple(pairs), columns, rows, nothing > 0, nothing, grid)
        sinks, mass = zip(*(self._sinks(half, draws, rule) for half in (0, 1)))
        some = [i for i in (0, 1) if mass[i] is not None]
        return Reading(
            tuple(pairs), columns, rows,
            torch.cat([sinks[i] for i in some], 1), torch.cat([mass[i] for i in some], 1), grid,
        )  # fmt: skip

    def _sinks(self, half: int, draws: int, rule: SinkRule) -> tuple[Tensor | None, Tensor | None]:
        found = [self.received[k] for k in sorted(self.received) if k % 2 == half]
        if not found:
            return None, None
        mass = torch.stack([m for m, _, _ in found]) / draws
        uniformity = torch.stack([u for _, u, _ in found]) / draws
        keys = found[0][2]
        return find_sinks(mass / keys[:, None], uniformity, keys, rule), mass.mean(0)


def _some_heads(call: Call, heads: list[int]) -> Call:
    return Call(call.q[:, :, heads], call.k[:, :, heads], call.layout, call.kind, block=call.block)


def _add(
    old: tuple[Tensor, Tensor | None] | None, new: tuple[Tensor, Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    if old is None:
        return new
    rows = None if old[1] is None or new[1] is None else old[1] + new[1]
    return old[0] + new[0], rows
