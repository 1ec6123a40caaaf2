"""What several processes need, so that they train what one process with their batches together would."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator

from .config import CLLMConfig


def check_processes(config: CLLMConfig, accelerator: Accelerator) -> None:
    """
    Check options that only matter with several processes.

    Args:
        config (`CLLMConfig`): options.
        accelerator (`accelerate.Accelerator`): of the run.

    Raises:
        ValueError: if the batches would not be shared out evenly, or by a process that pads them to other lengths.
    """
    if accelerator.num_processes == 1:
        return
    parallelism: Any = accelerator.parallelism_config
    sizes = {name: getattr(parallelism, f"{name}_size", 1) or 1 for name in ("tp", "cp", "sp")}
    if any(size > 1 for size in sizes.values()):
        raise ValueError(
            "Every process must have batches of its own, got tensor, context or sequence parallelism "
            f"({', '.join(f'{name}_size={size}' for name, size in sizes.items())}). Use DDP or FSDP."
        )
    options: Any = config.accelerator_config
    if not options.even_batches:
        raise ValueError(
            "Every process needs a batch of its own for each forward pass, got `even_batches=False` in "
            "`accelerator_config`. Drop it: records that fill up the last batch are not counted twice."
        )
    if options.dispatch_batches:
        raise ValueError(
            "Batches are collated by the process that trains on them, got `dispatch_batches=True` in "
            "`accelerator_config`. Drop it."
        )


def count_own_rows(num_rows: int, accelerator: Accelerator, drop_last: bool = False) -> int:
    """
    Count the records of a batch that are not repeated to fill it up, so that none of an epoch counts twice.

    The data loader repeats records from the start of the epoch until every process has a full batch. Those of the last
    round lie in order over the processes, so that what is left of the dataset comes first and the repeated ones after
    it.

    Args:
        num_rows (`int`): records of the batch that was fetched last.
        accelerator (`accelerate.Accelerator`): of the run.
        drop_last (`bool`): whether the data loader drops what does not fill a batch instead, and repeats nothing.

    Returns:
        `int`: how many, from the first on; 0 for a process that has repeated records only. Of a dataset without a
        length it is not known what was repeated, and all count.
    """
    state: Any = accelerator.gradient_state
    # In this order: outside of a run, another run's options may have taken the processes' state away.
    if drop_last or not state.end_of_dataloader or accelerator.num_processes == 1:
        return num_rows
    try:
        num_records = len(state.active_dataloader.dataset)
    except TypeError:  # a shard of a stream has a `__len__` that fails
        return num_rows
    num_left = num_records % (num_rows * accelerator.num_processes) or num_rows * accelerator.num_processes
    return min(max(num_left - num_rows * accelerator.process_index, 0), num_rows)
