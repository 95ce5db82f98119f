"""The ``gen-accel`` command. Sub-commands import torch and diffusers when they run, not before."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from types import ModuleType

from gen_accel import __version__
from gen_accel.cli.options import Parser, UsageError, dotted, nearest, resolve

# A module per sub-command: add_parser(subparsers) and run(args) -> exit code. One with SECTIONS
# takes --config and dotted overrides as well.
COMMANDS = (
    "demo", "generate", "calibrate", "eval", "verdict", "doctor", "bench", "simulate", "world",
    "wipe", "ground",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run a sub-command; user errors are one line on stderr and exit code 2."""
    debug = False
    try:
        parser, commands, parsers = _build()
        words = sys.argv[1:] if argv is None else argv
        command = next((word for word in words if not word.startswith("-")), None)
        if command is not None and command not in commands:
            raise UsageError(f"unknown command {command!r}; {nearest(command, commands)}")
        args, extra = parser.parse_known_args(words)
        debug = args.debug
        if args.command is None:
            parser.print_help()
            return 0
        logging.basicConfig(format="%(message)s", level=logging.DEBUG if debug else logging.WARNING)
        module, own = commands[args.command], parsers[args.command]
        sections = getattr(module, "SECTIONS", None)
        if sections is not None:
            args = resolve(own, args, extra, sections)
        elif extra:
            known = {n[2:] for a in own._actions for n in a.option_strings if n[:2] == "--"}
            dotted(extra, (), known)
        return module.run(args)
    except KeyboardInterrupt:
        print("gen-accel: stopped", file=sys.stderr)
        return 130
    except (UsageError, ValueError, OSError, ImportError) as error:
        # What the library raises for bad input already says value, rule and way out.
        if debug:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"gen-accel: error: {message}", file=sys.stderr)
        return 2


def _build() -> tuple[argparse.ArgumentParser, dict[str, ModuleType], dict[str, Parser]]:
    parser = Parser(
        prog="gen-accel",
        description="Sparse attention for diffusers pipelines.",
        epilog="Every sub-command has its own --help.",
    )
    parser.add_argument("--version", action="version", version=f"gen-accel {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and debug logs")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    commands = {}
    for name in COMMANDS:
        module = _import(f"gen_accel.cli.{name}")
        if module is not None:
            module.add_parser(subparsers)
            commands[name] = module
    return parser, commands, dict(subparsers.choices)


def _import(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return None
