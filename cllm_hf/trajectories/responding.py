"""What goes into a batch, and where a response ends."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


logger = logging.getLogger(__name__)
_Result = TypeVar("_Result")


def batch_by_tokens(sizes: Sequence[tuple[int, int]], budget: int) -> list[list[int]]:
    """
    Put items of similar size together, and return the indices of each batch.

    The two sizes of an item are padded apart in a batch. Padding included, it holds no more tokens than the budget,
    unless it is one item alone. The largest items come first, so that memory that does not suffice shows at once.
    """
    order = sorted(range(len(sizes)), key=lambda index: (sum(sizes[index]), sizes[index], -index), reverse=True)
    batches: list[list[int]] = []
    first = second = 0
    for index in order:
        first, second = max(first, sizes[index][0]), max(second, sizes[index][1])
        if batches and (len(batches[-1]) + 1) * (first + second) <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
            first, second = sizes[index]
    return batches


def split_batches(rows: Sequence[Any], batch_size: int) -> list[list[Any]]:
    """Split rows into batches, in their order; the last one may be smaller."""
    return [list(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]


class Fitting:
    """
    Computes with as many rows at once as fit the memory of a device: with half of them where it runs out, and so on,
    and no more than that later.
    """

    def __init__(self) -> None:
        self._most: int | None = None

    def run(self, compute: Callable[[int], _Result], num_rows: int) -> _Result:
        """What `compute` returns for that number of rows at once, or for a smaller one."""
        while True:
            num_rows = num_rows if self._most is None else min(num_rows, self._most)
            try:
                return compute(num_rows)
            except RuntimeError as error:
                if num_rows == 1 or not should_reduce_batch_size(error):
                    raise
            clear_device_cache(garbage_collection=True)  # when nothing holds the tensors of the failure any more
            self._most = num_rows // 2
            logger.warning("Memory ran out with %d rows at once. Going on with %d.", num_rows, self._most)


def find_stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a response: those of the model's generation config, otherwise that of the tokenizer."""
    ids = model.generation_config.eos_token_id
    if ids is None:
        ids = tokenizer.eos_token_id
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)


@contextmanager
def without_generation_defaults(model: PreTrainedModel) -> Iterator[None]:
    """Leave out the model's own generation defaults: a fixed point is the plain argmax, without any processor."""
    defaults = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = defaults
