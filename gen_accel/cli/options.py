"""Options the sub-commands share: diffusers' names, a YAML file, dotted overrides."""

from __future__ import annotations

import argparse
import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any


class UsageError(Exception):
    """What the user asked for cannot be done; the message is one line and says what to do."""


def whole(text: str) -> int:
    """A whole number from 1, as the type of an option."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a positive whole number")
    return int(text)


def positive(text: str) -> float:
    """A number above 0, as the type of an option."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a positive number")
    return value


# Name -> keywords of add_argument. Names are those of the diffusers pipelines.
OPTIONS: dict[str, dict[str, Any]] = {
    "model": {"help": "checkpoint: a folder written by save_pretrained, or a Hub id"},
    "prompt": {"action": "append", "help": "what to show; may be given several times"},
    "prompts": {"metavar": "FILE", "help": "text file with one prompt per line"},
    "negative_prompt": {"help": "what to avoid"},
    "height": {"type": whole, "help": "pixels"},
    "width": {"type": whole, "help": "pixels"},
    "num_frames": {"type": whole, "help": "frames of the video"},
    "num_inference_steps": {"type": whole, "help": "denoising steps"},
    "guidance_scale": {"type": float, "help": "classifier-free guidance"},
    "seed": {"type": int, "help": "seed of the noise, the same for every prompt (default 0)"},
    "dtype": {
        "choices": ("float32", "bfloat16", "float16"),
        "help": "default: bfloat16 on a GPU, float32 on a CPU",
    },
    "device": {"help": "cpu, cuda, cuda:1, mps (default: the GPU when there is one)"},
    "cpu_offload": {"action": "store_true", "help": "keep only the active model on the GPU"},
}

# Options that go into the pipeline's call under their own name, when they were given.
CALL = ("negative_prompt", "height", "width", "num_frames", "num_inference_steps", "guidance_scale")

_DOTTED = re.compile(r"(?:--)?([a-z][\w-]*)\.([\w.-]+)(?:=(.*))?", re.DOTALL)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, raised instead of printed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> Any:
        """Raise `UsageError`."""
        raise UsageError(f"{message}; see {self.prog} --help")


def flag(name: str) -> str:
    """``num_frames`` -> ``--num-frames``."""
    return "--" + name.replace("_", "-")


def add(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add shared options, ``--config``, and no defaults: absence must be told from a default."""
    for name in names:
        settings = dict(OPTIONS[name], default=argparse.SUPPRESS)
        if "action" not in settings and "choices" not in settings:
            settings.setdefault("metavar", "X")
        parser.add_argument(flag(name), **settings)
    parser.add_argument("--config", metavar="FILE", help="YAML with the same names; flags win")


def resolve(
    parser: argparse.ArgumentParser,
    given: argparse.Namespace,
    extra: list[str],
    sections: Iterable[str],
) -> argparse.Namespace:
    """Join the configuration file, the flags and the dotted overrides; later ones win.

    Args:
        parser: Parser of the sub-command.
        given: What it understood.
        extra: What it did not: ``--processor.density 0.2`` or ``processor.density=0.2``.
        sections: Names that may stand before the dot.

    Returns:
        ``given``, with what the file says where no flag did, and one dict per section.

    Raises:
        UsageError: The file is missing or malformed, or a name is unknown.
    """
    options = {n[2:] for action in parser._actions for n in action.option_strings if n[:2] == "--"}
    options -= {"help", "config"}
    nested: dict[str, dict[str, Any]] = {name: {} for name in sections}
    merged: dict[str, Any] = {}
    if getattr(given, "config", None):
        merged, nested = _from_file(parser, Path(given.config), options, nested)
    for section, key, text in dotted(extra, nested, options):
        nested[section][key.replace("-", "_")] = _scalar(text)
    flags = {key: value for key, value in vars(given).items() if value is not None}
    if {"prompt", "prompts"} & flags.keys():
        merged.pop("prompt", None)
        merged.pop("prompts", None)
    return argparse.Namespace(**{**merged, **flags, "sections": nested})


def dotted(
    extra: list[str], sections: Iterable[str], options: Iterable[str]
) -> list[tuple[str, str, str]]:
    """Parse ``--section.key value``, ``--section.key=value`` and ``section.key=value``."""
    sections, names, found = list(sections), list(options), []
    words = iter(extra)
    for word in words:
        match = _DOTTED.fullmatch(word)
        if match is None:
            if word.startswith("-"):
                name = word.lstrip("-").partition("=")[0]
                hint = nearest(name, names, flag)
                if "processor" in sections:
                    from gen_accel.cli.pipeline import processor_settings

                    if name.replace("-", "_") in processor_settings():
                        hint = f"write processor.{name.replace('-', '_')}=VALUE"
                raise UsageError(f"unknown option --{name}; {hint}")
            raise UsageError(f"{word!r}: options are --name value or section.name=value")
        section, key, value = match.groups()
        if section not in sections:
            raise UsageError(f"unknown option {section}.{key}; {nearest(section, sections)}")
        if value is None:
            value = next(words, None)
            if value is None:
                raise UsageError(f"{section}.{key} has no value; write {section}.{key}=VALUE")
        found.append((section, key, value))
    return found


def nearest(name: str, names: Iterable[str], show: Callable[[str], str] = str) -> str:
    """``did you mean X?``, or the list of names when none is near."""
    names = sorted(names)
    folded = {n.replace("_", "-"): n for n in names}
    close = difflib.get_close_matches(name.replace("_", "-"), folded, n=1, cutoff=0.5)
    if close:
        return f"did you mean {show(folded[close[0]])}?"
    return f"choose from {', '.join(map(show, names))}" if names else "there are none here"


def check_names(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise `UsageError` with the nearest name for the first key that is not known."""
    known = set(known)
    for name in given:
        if name not in known:
            raise UsageError(f"unknown {what} {name!r}; {nearest(name, known)}")


def prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of ``--prompt`` and ``--prompts``; at least one, none of them empty."""
    found = list(getattr(args, "prompt", None) or [])
    file = getattr(args, "prompts", None)
    if file is not None:
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--prompts {file}: cannot be read ({error})") from error
        found += [line.strip() for line in lines if line.strip()]
        if not found:
            raise UsageError(f"--prompts {file}: no prompts in it; write one per line")
    if not found:
        raise UsageError('no prompt; give --prompt "..." or --prompts FILE with one per line')
    if not all(prompt.strip() for prompt in found):
        raise UsageError('--prompt "": an empty prompt; describe what to show')
    return found


def require(args: argparse.Namespace, name: str) -> Any:
    """The value of an option that has no default."""
    value = getattr(args, name, None)
    if value is None:
        raise UsageError(f"{flag(name)} is missing: {OPTIONS[name]['help']}")
    return value


def _from_file(
    parser: argparse.ArgumentParser,
    path: Path,
    options: set[str],
    nested: Mapping[str, dict[str, Any]],
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    import yaml  # here, so that commands without a file run where it is not installed

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UsageError(f"--config {path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: not valid YAML ({error})") from error
    if not isinstance(content, dict):
        raise UsageError(f"--config {path}: expected names and values, got {content!r}")
    sections = {name: dict(values) for name, values in nested.items()}
    words: list[str] = []
    for key, value in content.items():
        name = str(key).replace("_", "-")
        if name in sections and isinstance(value, dict):
            sections[name].update({str(k).replace("-", "_"): v for k, v in value.items()})
        elif name in options:
            words += _words(name, value)
        else:
            hint = nearest(name, options | set(sections), lambda n: n.replace("-", "_"))
            raise UsageError(f"--config {path}: unknown key {key!r}; {hint}")
    # Through the parser, so that a file's values meet the same types and choices as flags.
    try:
        parsed = vars(parser.parse_args(words))
    except UsageError as error:
        raise UsageError(f"--config {path}: {error}") from error
    return {k: v for k, v in parsed.items() if v is not None}, sections


def _words(name: str, value: Any) -> list[str]:
    if value is None or value is False:
        return []
    if value is True:
        return [f"--{name}"]
    return [f"--{name}={item}" for item in (value if isinstance(value, list) else [value])]


def _scalar(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
