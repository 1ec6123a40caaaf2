"""What reports consist of: a table of methods, on what was measured, and notes on what to bear in mind."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from .._host import attention_implementation, base_model_of
from .._version import __version__
from ..cards import format_table
from .benchmark import DecodingMethod


# From when on it is noted that more of the CLLM's responses are cut off than of the target model's: as a share of all
# responses, and at least how many, since of a few prompts one may be an accident.
_MANY_CUT_OFF = 0.05
_FEW_CUT_OFF = 2
_OPTIONAL_COLUMNS = ("accuracy", "peak MiB", "near ties", "differ", "largest gap")


def format_rows(rows: Sequence[dict[str, Any]], columns: Mapping[str, Callable[[dict[str, Any]], str | None]]) -> str:
    """A table with a function of the row for each column. `None` is "-"; an optional column of these is left out."""
    cells = {title: [cell(row) for row in rows] for title, cell in columns.items()}
    shown = {title: column for title, column in cells.items() if title not in _OPTIONAL_COLUMNS or any(column)}
    return format_table(list(shown), [[cell or "-" for cell in row] for row in zip(*shown.values())])


def format_line(row: dict[str, Any], columns: Mapping[str, Callable[[dict[str, Any]], str | None]]) -> str:
    """A row of such a table by itself, to be told as soon as it is done."""
    name, *others = ((title, column(row)) for title, column in columns.items())
    return f"{name[1]}: " + ", ".join(f"{title} {cell}" for title, cell in others if cell is not None)


def format_rate(row: dict[str, Any]) -> str:
    """Tokens per second."""
    rate = row["tokens_per_second"]
    return f"{rate:.{0 if rate >= 100 else 1}f}"


def format_number(value: float | None, unit: str = "") -> str | None:
    return None if value is None else f"{value:.2f}{unit}"


def describe_environment(model: Any) -> dict[str, Any]:
    """Versions, machine and model, ready for JSON."""
    device = model.device
    return {
        "cllm_hf": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": attention_implementation(base_model_of(model).config),
        "architecture": type(base_model_of(model)).__name__,
        "num_parameters": model.num_parameters(),
    }


def format_environment(environment: dict[str, Any]) -> str:
    """What `describe_environment` says as a sentence."""
    e = environment
    device = "" if e["device"] == "cpu" else f"{e['device']}; "
    return (
        f"{e['architecture']} of {e['num_parameters']:,} parameters, {e['dtype']}, {e['attention']} attention; "
        f"{device}CPU {e['cpu']}, threads: {e['threads']}; cllm_hf {e['cllm_hf']}, torch {e['torch']}, transformers "
        f"{e['transformers']}, Python {e['python']}."
    )


def _cpu_name() -> str:
    try:  # `platform.processor` says no more than the kind of machine on Linux
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def compile_notes(methods: Sequence[DecodingMethod]) -> list[str]:
    """Say where a method with a compiled forward pass has none."""
    static = [method for method in methods if method.options.get("cache_implementation") == "static"]
    if any(method.model.device.type == "cpu" for method in static):
        return ["`generate(), compiled` is not compiled here: transformers does so on accelerators only."]
    return []


def difference_notes(described: dict[str, dict[str, Any]], title: str) -> list[str]:
    """Say in what the target model and the model of some title differ, by what is described of both."""
    target, cllm = described["target"], described["cllm"]
    return [
        f"The target model and the {title} differ in more than their weights: {name} {target[name]} and {cllm[name]}."
        for name in ("device", "dtype", "attention", "architecture")
        if target[name] != cllm[name]
    ]


def window_notes(models: dict[str, Any], longest: int, max_new_tokens: int) -> list[str]:
    """Beyond the window of a model transformers goes on decoding, so that what is written there says little."""
    notes = []
    for title, model in models.items():
        window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if window is not None and longest + max_new_tokens > window:
            notes.append(
                f"A prompt of {longest} tokens and a response of {max_new_tokens} are more than the {window} "
                f"positions of the {title}."
            )
    return notes


def collapse_notes(compared: dict[str, Any], max_new_tokens: int, ended: str) -> list[str]:
    """Repetition is easy to decode in parallel: many tokens per forward pass, which are worth nothing."""
    cut_off, total = compared["num_cut_off"], compared["num_responses"]
    if cut_off["cllm"] - cut_off["target"] <= max(_FEW_CUT_OFF, _MANY_CUT_OFF * total):
        return []
    note = (
        f"**Read the CLLM's responses before its speed**: {cut_off['cllm']:,} of {total:,} run on to the "
        f"{max_new_tokens} new tokens at which they are cut off, and {cut_off['target']:,} of the target model's. A "
        "CLLM that repeats itself decodes fast and says nothing. A higher `ar_loss_weight`, a lower learning rate or "
        "more prompts help it to keep the texts of its target model."
    )
    return [f"{note} {ended}".strip()]


def describe_prompts(lengths: Sequence[int]) -> str:
    """How many prompts there are, and of how many tokens."""
    sizes = f"{min(lengths)} to {max(lengths)}" if min(lengths) < max(lengths) else f"{lengths[0]}"
    return f"{len(lengths)} of {sizes} tokens"
