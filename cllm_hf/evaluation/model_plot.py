"""The result of `compare_models` as a picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ..files import check_writable_file, write_whole


# Told apart also by those who are color-blind; the shapes of the points tell the ways to decode apart.
_COLORS = {"target": "#0072B2", "cllm": "#D55E00"}
_MARKERS = {
    "generate()": "o",
    "prompt lookup": "^",
    "assisted": "D",
    "jacobi": "s",
    "lossless": "*",
    "candidates": "P",
}
_TITLE = "speed-up over the target model's generate()"


def plot_models(report: dict[str, Any], path: str | Path) -> None:
    """
    Plot accuracy over speed, a point a method; without accuracy, bars of the speed.

    Args:
        report (`dict`): result of `compare_models`, or what `json.loads` has made of it.
        path (`str` or `pathlib.Path`): PNG file to write; the same report gives the same bytes.

    Raises:
        ImportError: if there is no matplotlib.
        OSError: if the file cannot be written.
    """
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    check_writable_file(path)
    rows = report["rows"]
    has_accuracy = all(row["accuracy"] is not None for row in rows)
    with style.context("default"):  # whatever the user has set for plots of their own
        height = 4.4 if has_accuracy else 1.2 + 0.42 * len(rows)
        figure = Figure(figsize=(9, height), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        if has_accuracy:
            _draw_points(axes, rows)
        else:
            _draw_bars(axes, rows)
        axes.set_xlabel("tokens/s, one prompt at a time")
        axes.set_xlim(0, 1.1 * max(max(row["tokens_per_second"] for row in rows), 1e-9))
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", metadata={"Software": None})
    write_whole(path, picture.getvalue())


def _draw_points(axes: Any, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        share, (low, high) = row["accuracy"]["share"], row["accuracy"]["interval"]
        color = _COLORS[row["model"]]
        axes.errorbar(
            row["tokens_per_second"],
            100 * share,
            # At 0 and 100% rounding may put a bound on the wrong side of the share.
            yerr=[[100 * max(share - low, 0)], [100 * max(high - share, 0)]],
            color=color,
            marker=_marker(row["name"]),
            markersize=8,
            markerfacecolor="white" if row["name"].endswith("compiled") else color,
            linestyle="none",
            capsize=4,
            elinewidth=1.2,
            label=_label(row),
        )
    axes.set_ylabel("accuracy, %, with its 95% interval")
    bounds = [100 * bound for row in rows for bound in row["accuracy"]["interval"]]
    room = max(0.08 * (max(bounds) - min(bounds)), 1.0)
    axes.set_ylim(max(min(bounds) - room, -2), min(max(bounds) + room, 102))
    axes.grid(color="0.92", linewidth=0.8)
    # Beside the points, where it covers none.
    title = {"title": _TITLE, "title_fontsize": 9, "alignment": "left"} if _speedup(rows[0]) else {}
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5), **title)


def _draw_bars(axes: Any, rows: list[dict[str, Any]]) -> None:
    places = range(len(rows))
    rates = [row["tokens_per_second"] for row in rows]
    axes.barh(places, rates, color=[_COLORS[row["model"]] for row in rows], height=0.7)
    for place, row in zip(places, rows):
        text = _speedup(row)
        axes.annotate(text, (row["tokens_per_second"], place), (4, 0), textcoords="offset points", va="center")
    axes.set_yticks(places, [row["name"] for row in rows])
    axes.invert_yaxis()
    if _speedup(rows[0]):
        axes.set_title(f"{_TITLE}, at the end of each bar", loc="left", fontsize=10)


def _marker(name: str) -> str:
    way = name.split(", ")[1]
    if "candidate" in name:
        return _MARKERS["candidates"]
    return _MARKERS[way.split(" ")[0] if way.startswith(("jacobi", "lossless")) else way]


def _label(row: dict[str, Any]) -> str:
    speedup = _speedup(row)
    return f"{row['name']}: {speedup}" if speedup else row["name"]


def _speedup(row: dict[str, Any]) -> str:
    value = row["speedup_over_target"]
    return "" if value is None else f"{value:.2f}x"
