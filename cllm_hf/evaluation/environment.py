"""On what a measurement was made."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
import transformers

from .._host import attention_implementation, base_model_of
from .._version import __version__


def describe_environment(model: Any) -> dict[str, Any]:
    """
    Describe versions, machine and model.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): the model that is measured.

    Returns:
        `dict`: text and numbers, ready for JSON.
    """
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
    """
    Write an environment as a sentence.

    Args:
        environment (`dict`): result of `describe_environment`.

    Returns:
        `str`.
    """
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
