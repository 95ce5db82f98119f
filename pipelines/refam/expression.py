"""A referring expression as words with a role, and the prompt that is made of it.

The lists stand in ``words.json``, with a version. They are ours: the paper's were not found.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROLES = ("content", "stop", "magnet")
PLACES = ("last", "first")


@dataclass(frozen=True)
class Word:
    """A word of a prompt.

    Attributes:
        text: As it stands there.
        start: First character.
        end: One past the last.
        role: ``content`` of the expression; ``stop`` word of it; ``magnet``.
        head: Whether it is the noun that the expression is about.
    """

    text: str
    start: int
    end: int
    role: str
    head: bool = False


@dataclass(frozen=True)
class Prompt:
    """The text a model reads, and the words in it that count. A caption's words do not."""

    text: str
    words: tuple[Word, ...]

    def of(self, *roles: str) -> tuple[Word, ...]:
        """The words with one of these roles."""
        return tuple(word for word in self.words if word.role in roles)


@cache
def word_lists() -> dict[str, tuple[str, ...]]:
    """The lists of ``words.json`` by name; ``version`` holds one entry."""
    lists = json.loads((Path(__file__).parent / "words.json").read_text(encoding="utf-8"))
    return {k: tuple(v) if isinstance(v, list) else (str(v),) for k, v in lists.items()}


def default_magnets(expression: str, count: int = 8) -> tuple[str, ...]:
    """Stop words, and behind them one colour that the expression does not name.

    Args:
        expression: Referring expression.
        count: Stop words.
    """
    named = {word.lower() for word in re.findall(r"\w+", expression)}
    lists = word_lists()
    colour = next(c for c in lists["colours"] if c not in named)
    return (*lists["magnets"][:count], colour)


def make_prompt(
    expression: str,
    *,
    magnets: Sequence[str] = (),
    caption: str | None = None,
    place: str = "last",
    spatial: bool = True,
) -> Prompt:
    """``[caption . ] expression magnets``, with the role of each word.

    Stop words are articles, prepositions, conjunctions, auxiliaries and pronouns, and nouns that
    name nothing ("object", "thing"), unless nothing else is left. Words of place and words that
    turn the meaning ("left", "other", "without") are content.

    Args:
        expression: Referring expression.
        magnets: Words to append.
        caption: What is in the picture, put in front.
        place: ``"last"``, or ``"first"``: magnets in front of the expression.
        spatial: Keep words of place.

    Raises:
        ValueError: The expression holds no word, or stop words only.
    """
    if place not in PLACES:
        raise ValueError(f"place={place!r}: choose {' or '.join(map(repr, PLACES))}")
    expression = " ".join(expression.split())
    found = list(re.finditer(r"\w+(?:['’-]\w+)*", expression))
    if not found:
        raise ValueError(f"expression {expression!r} holds no word; name what to look for")
    lists = word_lists()
    stop = {*lists["stop"], *lists["generic"]} | (set() if spatial else set(lists["spatial"]))
    roles = ["stop" if m.group().lower() in stop else "content" for m in found]
    if "content" not in roles:
        generic = [m.group().lower() in lists["generic"] for m in found]
        roles = ["content" if g else "stop" for g in generic]
    if "content" not in roles:
        raise ValueError(
            f"expression {expression!r} holds stop words only; name a thing, a colour or a place"
        )
    head = _head([m.group().lower() for m in found], roles)
    front = f"{caption.strip().rstrip('.')}. " if caption and caption.strip() else ""
    tail = " ".join(magnets)
    if place == "first" and tail:
        texts, at = [tail, expression], (len(front), len(front) + len(tail) + 1)
    else:
        texts, at = [expression, tail], (len(front) + len(expression) + 1, len(front))
    words = [
        Word(m.group(), at[1] + m.start(), at[1] + m.end(), role, i == head)
        for i, (m, role) in enumerate(zip(found, roles))
    ]
    begin = at[0]
    for magnet in magnets:
        words.append(Word(magnet, begin, begin + len(magnet), "magnet"))
        begin += len(magnet) + 1
    return Prompt(front + " ".join(t for t in texts if t), tuple(words))


def _head(words: Sequence[str], roles: Sequence[str]) -> int:
    """The last content word of the first run of content words that is not a word of place."""
    spatial = set(word_lists()["spatial"])
    best = roles.index("content")
    seen = False
    for i, (word, role) in enumerate(zip(words, roles)):
        if role == "content" and word not in spatial:
            best, seen = i, True
        elif seen:
            break
    return best
