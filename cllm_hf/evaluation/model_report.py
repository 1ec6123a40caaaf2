"""The result of `compare_models` as Markdown and as a picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..cards import code, format_table
from ..files import check_writable_file, save_figure
from ..trajectories.statistics import TrajectoryStatistics, format_statistics
from .agreement import COLUMNS, format_gap
from .reporting import (
    describe_prompts,
    format_environment,
    format_line,
    format_number,
    format_rate,
    format_rows,
)
from .sides import TITLES


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


def format_models(report: dict[str, Any]) -> str:
    """
    Write the result of `compare_models` as Markdown.

    Args:
        report (`dict`): the result, or what `json.loads` has made of it.

    Returns:
        `str`: table of the methods, how both models' blocks converge, how their responses compare, settings, machine
        and notes.
    """
    parts = [
        _format_methods(report),
        _explain_columns(report),
        _format_convergence(report),
        _format_responses(report),
        _explain_agreement(report) or _explain_responses(report["comparison"], _titles(report)["cllm"]),
        _format_settings(report),
        format_environment(report["environment"]),
        *report["notes"],
    ]
    return "\n\n".join(part for part in parts if part)


def _format_methods(report: dict[str, Any]) -> str:
    return format_rows(report["rows"], _columns(report["settings"]["num_prompts"]))


def format_model_row(row: dict[str, Any], num_prompts: int) -> str:
    """A row of `compare_models` as a line."""
    return format_line(row, _columns(num_prompts))


def _columns(num_prompts: int) -> dict[str, Callable[[dict[str, Any]], str | None]]:
    return {
        "method": lambda row: row["name"],
        "tokens/s": format_rate,
        "over target's generate()": lambda row: format_number(row["speedup_over_target"], "x"),
        "over own generate()": lambda row: format_number(row["speedup_over_own"], "x"),
        "tokens per forward pass": lambda row: format_number(row["tokens_per_forward"]),
        "equal to own generate()": lambda row: f"{row['num_equal']}/{num_prompts}",
        **COLUMNS,
        "accuracy": _accuracy,
        "parameters, M": _parameters,
        "peak MiB": _peak_memory,
    }


def _accuracy(row: dict[str, Any]) -> str | None:
    if row["accuracy"] is None:
        return None
    share, low, high = (100 * value for value in (row["accuracy"]["share"], *row["accuracy"]["interval"]))
    return f"{share:.1f}% ({low:.1f} to {high:.1f})"


def _parameters(row: dict[str, Any]) -> str:
    sizes = [row["num_parameters"], row["num_assistant_parameters"]]
    millions = [size / 1e6 for size in sizes if size is not None]
    return " + ".join(f"{size:,.{0 if size >= 1000 else 1 if size >= 10 else 2}f}" for size in millions)


def _peak_memory(row: dict[str, Any]) -> str | None:
    return None if row["peak_memory"] is None else f"{(row['weight_bytes'] + row['peak_memory']) / 2**20:.1f}"


def _explain_columns(report: dict[str, Any]) -> str:
    rows, settings = report["rows"], report["settings"]
    sentences = ["Speed-ups are medians over the prompts."]
    if any(row["accuracy"] is not None for row in rows):
        also = f" and of its model's generate() to {settings['num_more_prompts']} more, which are not timed"
        sentences.append(
            f"Accuracy is that of a row's own responses to the {settings['num_prompts']} timed prompts"
            f"{also if settings['num_more_prompts'] else ''}, with Wilson's interval at 95%."
        )
        if settings["num_more_prompts"] and any(row["name"].endswith(", compiled") for row in rows):
            sentences.append("The latter are decoded in batches and not compiled, for compiled rows too.")
    if any(row["peak_memory"] is not None for row in rows):
        sentences.append(
            "Peak MiB is the weights that a row uses and the most memory that a run of it took beside them."
        )
    if any(row["num_assistant_parameters"] is not None for row in rows):
        sentences.append(
            "The assistant's parameters stand after the +; its forward passes do not count in tokens per forward pass."
        )
    return " ".join(sentences)


def _format_convergence(report: dict[str, Any]) -> str:
    titles = _titles(report)
    named = {
        titles[name]: TrajectoryStatistics.from_dict(values)
        for name, values in report["convergence"].items()
        if values is not None
    }
    return format_statistics(named) if named else ""


def _format_responses(report: dict[str, Any]) -> str:
    compared, titles = report["comparison"], _titles(report)
    total, kinds = compared["num_responses"], compared["kinds"]
    rows = [
        ["tokens a response", *(f"{compared['mean_tokens'][name]:.1f}" for name in TITLES)],
        ["cut off, without a stop token", *(f"{compared['num_cut_off'][name]:,}" for name in TITLES)],
    ]
    if kinds is not None:
        counts = {kind: [kinds[name].get(kind, 0) for name in TITLES] for name in TITLES for kind in kinds[name]}
        for kind, numbers in sorted(counts.items(), key=lambda item: (-sum(item[1]), item[0])):
            rows.append([f"answers: {kind}", *(f"{number:,}" for number in numbers)])
    by = "" if compared.get("is_one_model") else "generate(), "
    return format_table([f"{by}{total:,} {_plural('response', total)}", *titles.values()], rows)


def _explain_agreement(report: dict[str, Any]) -> str | None:
    """What is to be said of an adapter that drafts for the target model, whose texts it is to give."""
    if not report["comparison"].get("is_one_model"):
        return None
    rows, title = [row for row in report["rows"] if row["model"] == "cllm"], _titles(report)["cllm"]
    equal, near, other = (sum(row[name] for row in rows) for name in ("num_equal", "num_near_ties", "num_differing"))
    total = equal + near + other
    text = f"Of the {total:,} timed {_plural('response', total)} of the {title}, {equal:,} equal the target model's"
    if equal == total:
        return f"{text}, token for token: it loses nothing."
    widest = max(rows, key=lambda row: row["largest_gap_in_bounds"] or 0.0)
    gap = "" if format_gap(widest) is None else f"; the largest gap between logits is {format_gap(widest)}"
    return f"{text}, {near:,} part from it at near ties, and {other:,} elsewhere{gap}."


def _explain_responses(compared: dict[str, Any], title: str) -> str:
    total, equal = compared["num_responses"], compared["num_equal"]
    text = (
        f"By generate(), both models give the same response, token for token, to {equal:,} of {total:,} "
        f"{_plural('prompt', total)} ({equal / total:.1%})."
    )
    paired = compared["paired"]
    if paired is None:
        return text
    alone = [paired["num_only_first"], paired["num_only_second"]]
    text = (
        f"{text} Solved are {paired['num_both']:,} by both, {alone[0]:,} by the target model alone, {alone[1]:,} by "
        f"the {title} alone and {paired['num_neither']:,} by neither"
    )
    if not any(alone):
        return f"{text}."
    probability = f"{paired['p_value']:.2g}" if paired["p_value"] >= 0.001 else "less than 0.001"
    return (
        f"{text}: a difference of {100 * paired['difference']:+.1f} points for the {title}. A fair coin splits "
        f"{sum(alone):,} {_plural('prompt', sum(alone))} at least as unevenly with a probability of "
        f"{probability} (exact two-sided sign test)."
    )


def _format_settings(report: dict[str, Any]) -> str:
    settings, lengths, models = report["settings"], report["prompt_lengths"], report["models"]
    named = {**_titles(report), "assistant": "assistant"}
    names = [
        f"{named[name]} {code(str(model['name']))}" + (" with an adapter" if model["has_adapter"] else "")
        for name, model in models.items()
        if model["name"]
    ]
    models_text = f"{', '.join(names)}. " if names else ""
    more = settings["num_more_prompts"]
    size = settings["batch_size"]
    in_batches = "in batches that fit the memory" if size is None else f"in batches of {size}"
    more_text = f", and {more} more {in_batches}" if more else ""
    text = (
        f"{models_text}Prompts: {describe_prompts(lengths)}, one at a time{more_text}. New tokens: at "
        f"most {settings['max_new_tokens']}. Block size: {settings['block_size']}. Rounds: {settings['repeats']}."
    )
    return text[:1].upper() + text[1:]


def _titles(report: dict[str, Any]) -> dict[str, str]:
    """What the two models are called; results of version 0.1.0 do not say it."""
    return report.get("titles", TITLES)


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else f"{noun}s"


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
    from matplotlib.figure import Figure

    path = Path(path)
    check_writable_file(path)
    rows = report["rows"]
    has_accuracy = all(row["accuracy"] is not None for row in rows)
    with style.context("default"):  # whatever the user has set for plots of their own
        height = 4.4 if has_accuracy else 1.2 + 0.42 * len(rows)
        figure = Figure(figsize=(9, height), dpi=150, layout="constrained")
        axes = figure.subplots()
        if has_accuracy:
            _draw_points(axes, rows)
        else:
            _draw_bars(axes, rows)
        axes.set_xlabel("tokens/s, one prompt at a time")
        axes.set_xlim(0, 1.1 * max(max(row["tokens_per_second"] for row in rows), 1e-9))
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        save_figure(figure, path)


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
            label=f"{row['name']}: {_speedup(row)}".removesuffix(": "),
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


def _speedup(row: dict[str, Any]) -> str:
    return format_number(row["speedup_over_target"], "x") or ""
