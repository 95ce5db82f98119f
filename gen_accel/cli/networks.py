"""The networks metrics need, from options; loaded once, when the first metric asks."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen_accel.cli.options import UsageError, check_names

if TYPE_CHECKING:
    from gen_accel.eval.metric import Metric

# Network of a metric -> option that says where it is, and what the option takes.
OPTIONS = {
    "clip": ("--clip", "CLIP: folder or Hub id (openai/clip-vit-large-patch14)"),
    "i3d": ("--i3d", "i3d_torchscript.pt, for fvd"),
    "videomae": ("--videomae", "VideoMAE: folder or Hub id (MCG-NJU/videomae-base)"),
    "lpips": ("--lpips", "weights of LPIPS; several files with commas between"),
    "dino": ("--dino", "DINO of subject_consistency: folder or Hub id"),
    "dino-tokens": ("--dino-tokens", "DINO of tok_sim: folder or Hub id"),
}

# Metrics that compare frames with each other.
OVER_TIME = (
    "flicker", "flicker_compensated", "warp_error", "tof", "subject_consistency", "tok_sim",
    "foreground_flicker", "clip_temp", "fvd", "fvd_videomae", "fvd_toy",
)  # fmt: skip
STILL = "compares frames, and the clips have one each"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options that say where networks are, and where their answers are kept."""
    group = parser.add_argument_group("networks", "Nothing is downloaded.")
    for option, text in OPTIONS.values():
        group.add_argument(option, metavar="PATH", help=text, default=argparse.SUPPRESS)
    group.add_argument(
        "--feature-cache", metavar="DIR", help="keep features of clips there",
        default=argparse.SUPPRESS,
    )  # fmt: skip


class Networks:
    """Loads what was asked for.

    Args:
        args: With the options of `add_options`.
        device: Where networks run.
    """

    def __init__(self, args: argparse.Namespace, device: str) -> None:
        self.args = args
        self.device = device
        self._loaded: dict[str, Any] = {}

    def get(self, metric: Metric) -> Any:
        """The network of a metric.

        Raises:
            ValueError: It is not there; the message says how to get it.
        """
        name = str(metric.network)
        if name not in self._loaded:
            try:
                self._loaded[name] = self._load(metric)
            except ValueError as error:
                self._loaded[name] = error
        found = self._loaded[name]
        if isinstance(found, ValueError):
            raise ValueError(str(found))
        return found

    def all(self, metrics: Iterable[Metric]) -> dict[str, Any]:
        """Network name -> network, for these metrics."""
        return {m.network: self.get(m) for m in metrics if m.network is not None}

    def identity(self, metric: Metric) -> str:
        """Hash of the weights where the network knows it, or where it came from."""
        return getattr(self.get(metric), "sha256", str(self._place(metric)))

    def _place(self, metric: Metric) -> str | None:
        return getattr(self.args, str(metric.network).replace("-", "_"), None)

    def _load(self, metric: Metric) -> Any:
        from gen_accel.eval.features import Cache
        from gen_accel.eval.metrics import load_network

        network = load_network(metric, self._place(metric), self.device)
        folder = getattr(self.args, "feature_cache", None)
        if folder is not None and hasattr(network, "cache"):
            network.cache = Cache(Path(folder))
        return network


def choose(
    names: str,
    given: Iterable[str],
    networks: Networks,
    clips: int,
    option: str = "--metrics",
    *,
    stills: bool = False,
) -> tuple[dict[str, Metric], dict[str, str]]:
    """Metrics to compute, and why the others of ``all`` are not.

    Args:
        names: Names with commas between, or ``all``.
        given: What there is of a metric's needs.
        networks: Where theirs come from.
        clips: How many clips a candidate has.
        option: Where the names stand, for messages.
        stills: The clips have one frame, and what compares frames is left out.

    Returns:
        Metrics by name; name -> reason of those that were left out.

    Raises:
        UsageError: A name is unknown, or a metric that was named cannot be computed.
    """
    from gen_accel.eval.metrics import METRICS

    everything = names.strip() == "all"
    # Those that compare masks take no video; they are called from Python.
    videos = [name for name, metric in METRICS.items() if "video" in metric.needs]
    wanted = videos if everything else [n.strip() for n in names.split(",") if n.strip()]
    check_names("metric", wanted, videos)
    chosen, left = {}, {}
    for name in wanted:
        still = stills and name in OVER_TIME
        reason = STILL if still else _missing(METRICS[name], {*given, "network"}, networks, clips)
        if reason is None:
            chosen[name] = METRICS[name]
        elif everything or still:
            left[name] = reason
        else:
            raise UsageError(f"{option} {name}: {reason}")
    if not chosen:
        why = f" ({next(iter(left.values()))})" if left else ""
        raise UsageError(f"{option}: nothing to compute{why}; name at least one metric")
    return chosen, left


def _missing(metric: Metric, given: set[str], networks: Networks, clips: int) -> str | None:
    missing = [need for need in metric.needs if need not in given and need != "video"]
    if missing:
        return f"needs --{missing[0]}"
    if metric.axes and clips < 2:
        return f"is measured on a set of clips, and there are {clips}"
    if metric.network is not None:
        try:
            networks.get(metric)
        except ValueError as error:
            option = OPTIONS.get(metric.network)
            return f"{error}" + (f" ({option[0]} PATH)" if option else "")
    return None
