"""The result of `compare_models` as Markdown."""

from __future__ import annotations

from typing import Any

from ..cards import code
from ..text import format_table
from ..trajectories.statistics import TrajectoryStatistics, format_statistics
from .environment import format_environment
from .model_comparison import TITLES


_MEBIBYTE = 2**20


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
        _explain_responses(report["comparison"], _titles(report)["cllm"]),
        _format_settings(report),
        format_environment(report["environment"]),
        *report["notes"],
    ]
    return "\n\n".join(part for part in parts if part)


def _format_methods(report: dict[str, Any]) -> str:
    rows = report["rows"]
    with_accuracy = any(row["accuracy"] is not None for row in rows)
    with_memory = any(row["peak_memory"] is not None for row in rows)
    header = [
        "method",
        "tokens/s",
        "over target's generate()",
        "over own generate()",
        "tokens per forward pass",
        "equal to own generate()",
        *["accuracy"] * with_accuracy,
        "parameters, M",
        *["peak MiB"] * with_memory,
    ]
    return format_table(
        header, [_cells(row, report["settings"]["num_prompts"], with_accuracy, with_memory) for row in rows]
    )


def _cells(row: dict[str, Any], num_prompts: int, with_accuracy: bool, with_memory: bool) -> list[str]:
    rate, accuracy = row["tokens_per_second"], row["accuracy"]
    cells = [
        row["name"],
        f"{rate:.{0 if rate >= 100 else 1}f}",
        _number(row["speedup_over_target"], "x"),
        _number(row["speedup_over_own"], "x"),
        _number(row["tokens_per_forward"]),
        f"{row['num_equal']}/{num_prompts}",
    ]
    if with_accuracy:
        low, high = accuracy["interval"]
        cells.append(f"{100 * accuracy['share']:.1f}% ({100 * low:.1f} to {100 * high:.1f})")
    sizes = [row["num_parameters"], row["num_assistant_parameters"]]
    cells.append(" + ".join(_millions(size) for size in sizes if size is not None))
    if with_memory:
        peak = row["peak_memory"]
        cells.append("-" if peak is None else f"{(row['weight_bytes'] + peak) / _MEBIBYTE:.1f}")
    return cells


def _explain_columns(report: dict[str, Any]) -> str:
    rows, settings = report["rows"], report["settings"]
    sentences = ["Speed-ups are medians over the prompts."]
    if any(row["accuracy"] is not None for row in rows):
        also = f" and of its model's generate() to {settings['num_more_prompts']} more, which are not timed"
        sentences.append(
            f"Accuracy is that of a row's own responses to the {settings['num_prompts']} timed prompts"
            f"{also if settings['num_more_prompts'] else ''}, with Wilson's interval at 95%."
        )
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
    return format_table([f"generate(), {total:,} {_plural('response', total)}", *titles.values()], rows)


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
    return (
        f"{text}: a difference of {100 * paired['difference']:+.1f} points for the {title}. A fair coin splits "
        f"{sum(alone):,} {_plural('prompt', sum(alone))} at least as unevenly with a probability of "
        f"{_probability(paired['p_value'])} (exact two-sided sign test)."
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
    sizes = f"{min(lengths)} to {max(lengths)}" if min(lengths) < max(lengths) else f"{lengths[0]}"
    more = settings["num_more_prompts"]
    more_text = f", and {more} more in batches of {settings['batch_size']}" if more else ""
    text = (
        f"{models_text}Prompts: {settings['num_prompts']} of {sizes} tokens, one at a time{more_text}. New tokens: at "
        f"most {settings['max_new_tokens']}. Block size: {settings['block_size']}. Rounds: {settings['repeats']}."
    )
    return text[:1].upper() + text[1:]


def _titles(report: dict[str, Any]) -> dict[str, str]:
    """What the two models are called; results of versions before 0.3 do not say it."""
    return report.get("titles", TITLES)


def _millions(count: int) -> str:
    millions = count / 1e6
    return f"{millions:,.0f}" if millions >= 1000 else f"{millions:.1f}" if millions >= 10 else f"{millions:.2f}"


def _number(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{value:.2f}{unit}"


def _probability(value: float) -> str:
    return f"{value:.2g}" if value >= 0.001 else "less than 0.001"


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else f"{noun}s"
