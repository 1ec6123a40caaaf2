"""A picture of a training run: its losses, tokens per forward pass and quality, over optimizer steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import check_writable_file, save_figure


PLOT_NAME = "training.png"
# Told apart also by those who are color-blind.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_LOSSES = (("consistency_loss", "consistency loss"), ("ar_loss", "AR loss"), ("drafting_loss", "drafting loss"))
_QUALITY = (
    ("agreement", "agreement", _COLORS[2], "-"),
    ("draft_accuracy", "drafted tokens that are right", _COLORS[0], "-"),
    ("repetition", "repetition", _COLORS[1], "--"),
    ("target_repetition", "repetition of the dataset", _COLORS[3], ":"),
)
_WIDEST_RATIO = 20  # of the values of an axis; beyond, a logarithmic one shows more


def plot_run(log_history: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """
    Plot the losses of a run and, if prompts were decoded in evaluation, tokens per forward pass and quality.

    The same log gives the same bytes. Nothing is written if nothing was logged at two optimizer steps or more.
    """
    curves = read_curves(log_history)
    panels = _panels(curves)
    if not panels:
        return False
    from matplotlib import style
    from matplotlib.figure import Figure

    check_writable_file(path)
    with style.context("default"):  # whatever the user has set for plots of their own
        figure = Figure(figsize=(5 * len(panels) + 1, 4.2), dpi=150, layout="constrained")
        most = max(step for curve in curves.values() for step in curve)
        for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
            _draw_panel(axes, title, lines, most)
        save_figure(figure, path)
    return True


def read_curves(log_history: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """
    Sort a log by name and optimizer step; `nan` is a value that was not finite.

    A step that was logged twice, as by a run that was resumed, has its last value.
    """
    curves: dict[str, dict[int, float]] = {}
    for entry in log_history:
        for name, value in entry.items():
            if name not in ("step", "epoch") and "step" in entry and isinstance(value, int | float):
                curves.setdefault(name, {})[int(entry["step"])] = value if math.isfinite(value) else math.nan
    return {name: dict(sorted(curve.items())) for name, curve in curves.items()}


@dataclass
class _Line:
    """A curve and how it looks."""

    label: str
    curve: Mapping[int, float]
    color: str
    style: str = "-"
    is_measured: bool = False  # in evaluation: a few points, each worth a mark

    @property
    def finite(self) -> list[float]:
        """The values that are numbers."""
        return [value for value in self.curve.values() if math.isfinite(value)]


def _panels(curves: Mapping[str, Mapping[int, float]]) -> list[tuple[str, list[_Line]]]:
    """The panels that have something to show, with their lines."""
    losses = []
    for (name, label), color in zip(_LOSSES, _COLORS):
        if name in curves:
            losses.append(_Line(label, curves[name], color))
        if f"eval_{name}" in curves:
            losses.append(_Line(f"{label}, evaluation", curves[f"eval_{name}"], color, ":", True))
    ending = "_tokens_per_forward"
    prefixes = sorted({name.removesuffix(ending) for name in curves if name.endswith(ending)})
    speed = [
        _Line(_label("tokens per forward pass", prefix, prefixes), curves[prefix + ending], color, is_measured=True)
        for prefix, color in zip(prefixes, itertools.cycle(_COLORS))
    ]
    quality = [
        # Of one dataset, colors tell the measures apart, of several the datasets, as in the panel of speed.
        _Line(_label(label, prefix, prefixes), curve, color if len(prefixes) == 1 else own, style, style != ":")
        for prefix, own in zip(prefixes, itertools.cycle(_COLORS))
        for name, label, color, style in _QUALITY
        if (curve := curves.get(f"{prefix}_{name}")) is not None
    ]
    panels = [("loss, nats per token", losses), ("tokens per forward pass", speed), ("share of tokens", quality)]
    shown = [(title, [line for line in lines if line.finite]) for title, lines in panels]
    if not any(len(line.curve) > 1 for _, lines in shown for line in lines):
        return []
    return [(title, lines) for title, lines in shown if lines]


def _draw_panel(axes: Any, title: str, lines: list[_Line], most: int) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    is_share = title.startswith("share")
    for line in lines:
        values = list(line.curve.values())
        last = f"{values[-1]:.1%}" if is_share else f"{values[-1]:.3g}"
        axes.plot(
            list(line.curve),
            values,
            color=line.color,
            linestyle=line.style,
            linewidth=1.6 if line.is_measured else 1.2,
            marker="o" if line.is_measured else None,
            markersize=4.5,
            markerfacecolor="white",  # what it lies upon shows
            markeredgewidth=1.4,
            zorder=3 if line.is_measured else 2,
            # A dollar sign would begin a formula.
            label=f"{line.label}, last {last}".replace("$", r"\$"),
            clip_on=False,
        )
    values = [value for line in lines for value in line.finite]
    if is_share:
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    elif title.startswith("loss") and min(values) > 0 and max(values) > _WIDEST_RATIO * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axes.set_ylim(0, 1.08 * max(max(values), 0.01))
    if title.startswith("tokens"):
        axes.axhline(1, color="0.6", linewidth=1)
        note = {"textcoords": "offset points", "ha": "right", "color": "0.45", "fontsize": 9}
        axes.annotate("one token at a time", (most, 1), (0, 3), **note)
    axes.set_xlim(0, most * 1.02)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel(title)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    # Above the panel, where it covers nothing.
    axes.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1))


def _label(text: str, prefix: str, prefixes: list[str]) -> str:
    """The name of a dataset is said only where there are several."""
    return text if len(prefixes) == 1 else f"{prefix.removeprefix('eval_')}: {text}"
