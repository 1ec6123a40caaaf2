"""Tokens per second and per forward pass of several ways to decode, in one run, on the same prompts, in turns."""

from __future__ import annotations

import itertools
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm.auto import tqdm

from .._host import base_model_of
from ..blocks.rules import count_until_stop
from ..options import JacobiOptions
from ..trajectories.responding import split_batches
from .forwards import synchronize


@dataclass
class DecodingMethod:
    """
    A way to decode.

    Attributes:
        name (`str`): how tables call it.
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): the model.
        options (`dict`): arguments of its `generate`, such as `{"decoding": "jacobi"}`.
        is_compiled (`bool`): whether the model's forward pass may be compiled. A hook would then become part of the
            compiled code, so that forward passes are taken from `jacobi_stats`, or else are one a token.
    """

    name: str
    model: Any
    options: dict[str, Any]
    is_compiled: bool = False


@dataclass
class DecodingResult:
    """
    What a method did. Prompts are decoded in batches of `batch_size`; a run is one `generate` of one batch.

    Attributes:
        name (`str`): of the method.
        responses (`list[list[int]]`): generated token ids, for each prompt, of the first round.
        num_forwards (`list[int]`): calls of the model, prefill included, for each batch, in the first round.
        seconds (`list[float]`): time of the whole `generate`, prefill included, for each run: all batches of the first
            round, then those of the second, and so on.
        batch_size (`int`): prompts of a batch; the last batch may have fewer.
        widths (`collections.Counter`): how many forward passes after the prefill fed how many tokens a row; empty for
            a compiled method.
        peak_memory (`int`, *optional*): most bytes that tensors took on a CUDA device in a run, weights included.
    """

    name: str
    responses: list[list[int]] = field(default_factory=list)
    num_forwards: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    batch_size: int = 1
    widths: Counter[int] = field(default_factory=Counter)
    peak_memory: int | None = None

    @property
    def num_tokens(self) -> int:
        """`int`: generated tokens, of all prompts."""
        return sum(map(len, self.responses))

    @property
    def tokens_per_forward(self) -> float:
        """`float`: tokens a row gains in a forward pass of its batch; in batches of 1, tokens over forward passes."""
        rows = (len(batch) for batch in self._batches())
        return self.num_tokens / sum(forwards * size for forwards, size in zip(self.num_forwards, rows))

    @property
    def tokens_per_second(self) -> float:
        """`float`: of all rows of a batch together; the median over the runs."""
        return statistics.median(self._rates())

    def speedup_over(self, baseline: DecodingResult) -> float:
        """
        Tokens per second over those of another method: the median over the runs of the ratio in each run.

        Args:
            baseline (`DecodingResult`): a result of the same call of `benchmark_decoding`.

        Returns:
            `float`.
        """
        return statistics.median(ours / theirs for ours, theirs in zip(self._rates(), baseline._rates()))

    def num_equal_to(self, baseline: DecodingResult) -> int:
        """
        Count the prompts whose responses are the same, token for token.

        Args:
            baseline (`DecodingResult`): a result of the same call of `benchmark_decoding`.

        Returns:
            `int`.
        """
        return sum(ours == theirs for ours, theirs in zip(self.responses, baseline.responses))

    def _batches(self) -> list[list[list[int]]]:
        return split_batches(self.responses, self.batch_size)

    def _rates(self) -> list[float]:
        tokens = itertools.cycle([sum(map(len, batch)) for batch in self._batches()])
        return [num_tokens / seconds for num_tokens, seconds in zip(tokens, self.seconds)]


def benchmark_decoding(
    methods: Sequence[DecodingMethod],
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    show_progress: bool = True,
    batch_size: int = 1,
    repeats: int = 1,
    pad_token_id: int = 0,
) -> list[DecodingResult]:
    """
    Decode the same prompts in several ways, greedily.

    The methods take turns on every batch, so that a change of the machine's speed meets all of them, and a ratio is
    taken between neighbors. Before the clocks start, each method decodes the first batch once; a compiled one decodes
    a batch of every shape that comes, since each may be compiled anew. All clocks are around the whole `generate`.

    Args:
        methods (`Sequence[DecodingMethod]`): what to compare.
        prompts (`Sequence[list[int]]`): token ids of each prompt.
        max_new_tokens (`int`): longest response.
        show_progress (`bool`): whether to draw a progress bar.
        batch_size (`int`): prompts that are decoded together, padded on the left.
        repeats (`int`): rounds over all prompts.
        pad_token_id (`int`): what pads prompts; it is masked.

    Returns:
        `list[DecodingResult]`: one for each method, in their order.

    Raises:
        ValueError: if there are no prompts, or `batch_size` or `repeats` is below 1.
    """
    if not prompts:
        raise ValueError("`prompts` must hold at least one prompt, got none.")
    for name, value in (("batch_size", batch_size), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    batches = split_batches(prompts, batch_size)
    results = [DecodingResult(method.name, batch_size=batch_size) for method in methods]
    for method in methods:
        for batch in _shapes(batches) if method.is_compiled else batches[:1]:
            _run(method, batch, max_new_tokens, pad_token_id)
    progress = tqdm(total=repeats * len(batches), desc="Decoding", unit="batch", disable=not show_progress)
    with progress:
        for is_first, batch in [(turn == 0, batch) for turn in range(repeats) for batch in batches]:
            for method, result in zip(methods, results):
                run = _run(method, batch, max_new_tokens, pad_token_id)
                result.seconds.append(run.seconds)
                if run.peak_memory is not None:
                    result.peak_memory = max(run.peak_memory, result.peak_memory or 0)
                if is_first:
                    result.responses += run.responses
                    result.num_forwards.append(run.num_forwards)
                    result.widths.update(run.widths)
            progress.update()
    return results


def decode_all(
    method: DecodingMethod,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int = 1,
    pad_token_id: int = 0,
    show_progress: bool = True,
) -> list[list[int]]:
    """
    Decode prompts greedily in batches of similar lengths, when the time does not matter.

    Args:
        method (`DecodingMethod`): the way to decode.
        prompts (`Sequence[list[int]]`): token ids of each prompt; there may be none.
        max_new_tokens (`int`): longest response.
        batch_size (`int`): prompts that are decoded together, padded on the left.
        pad_token_id (`int`): what pads prompts; it is masked.
        show_progress (`bool`): whether to draw a progress bar.

    Returns:
        `list[list[int]]`: generated token ids, a stop token included, in the order of the prompts.
    """
    # The longest first, so that memory that does not suffice shows at once.
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    responses: dict[int, list[int]] = {}
    with tqdm(total=len(prompts), desc=method.name, unit="prompt", disable=not show_progress) as progress:
        for batch in split_batches(order, batch_size):
            run = _run(method, [prompts[index] for index in batch], max_new_tokens, pad_token_id)
            responses.update(zip(batch, run.responses))
            progress.update(len(batch))
    return [responses[index] for index in range(len(prompts))]


def stop_ids_of(method: DecodingMethod) -> set[int]:
    """
    Find the tokens that end a response.

    Args:
        method (`DecodingMethod`): the way to decode.

    Returns:
        `set[int]`: those of its options, otherwise those of the model's generation config; empty if there are none.
    """
    stop = method.options.get("eos_token_id")
    stop = base_model_of(method.model).generation_config.eos_token_id if stop is None else stop
    return set() if stop is None else {stop} if isinstance(stop, int) else set(stop)


@dataclass
class _Run:
    """One `generate` of one batch."""

    responses: list[list[int]]
    num_forwards: int
    seconds: float
    widths: list[int]
    peak_memory: int | None


def _run(method: DecodingMethod, batch: list[list[int]], max_new_tokens: int, pad_token_id: int) -> _Run:
    device = method.model.device
    length = max(map(len, batch))
    input_ids = torch.tensor([[pad_token_id] * (length - len(row)) + row for row in batch], device=device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in batch], device=device)
    widths: list[int] = []

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        fed = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        widths.append(0 if fed is None else fed.shape[1])

    options = {"return_dict_in_generate": True, **method.options} if method.is_compiled else method.options
    # The wrapper of an adapter hands `generate` on to its base model, whose calls are those to count.
    base_model = base_model_of(method.model)
    handle = None if method.is_compiled else base_model.register_forward_pre_hook(count, with_kwargs=True)
    is_cuda = device.type == "cuda"
    try:
        if is_cuda:
            torch.cuda.reset_peak_memory_stats(device)
        synchronize(device)
        start = time.perf_counter()
        output = method.model.generate(
            input_ids, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens, **options
        )
        synchronize(device)
        seconds = time.perf_counter() - start
    finally:
        if handle is not None:
            handle.remove()
    peak_memory = torch.cuda.max_memory_allocated(device) if is_cuda else None
    sequences = getattr(output, "sequences", output)
    responses = sequences[:, length:].tolist()
    num_forwards = len(widths)
    if method.is_compiled:
        stats = getattr(output, "jacobi_stats", None)
        num_forwards = len(responses[0]) if stats is None else stats.num_forwards
    if len(batch) > 1:  # rows that end early are padded
        stop_ids = stop_ids_of(method)
        responses = [response[: count_until_stop(response, stop_ids)] for response in responses]
    return _Run(responses, num_forwards, seconds, widths[1:], peak_memory)


def compile_notes(methods: Sequence[DecodingMethod]) -> list[str]:
    """
    Say where a method with a compiled forward pass has none.

    Args:
        methods (`Sequence[DecodingMethod]`): what is measured.

    Returns:
        `list[str]`: sentences for the report.
    """
    static = [method for method in methods if method.options.get("cache_implementation") == "static"]
    if any(method.model.device.type == "cpu" for method in static):
        return ["`generate(), compiled` is not compiled here: transformers does so on accelerators only."]
    return []


def check_candidates(candidates: Sequence[object]) -> None:
    """
    Refuse numbers of candidates that `generate` refuses.

    Args:
        candidates (`Sequence[object]`): what the user passed.

    Raises:
        ValueError: if one of them is no integer of at least 0.
    """
    for count in candidates:
        JacobiOptions(candidates=count)  # type: ignore[arg-type]


def has_candidates(method: DecodingMethod) -> bool:
    """
    Whether a way to decode has candidates beside the draft.

    Args:
        method (`DecodingMethod`): the way to decode.

    Returns:
        `bool`.
    """
    return bool(method.options.get("jacobi_candidates"))


def find_refusal(
    methods: Sequence[DecodingMethod], prompts: Sequence[list[int]], max_new_tokens: int, pad_token_id: int = 0
) -> str | None:
    """
    Decode a prompt with candidates, to learn whether the model takes them.

    Args:
        methods (`Sequence[DecodingMethod]`): ways to decode with one model, with candidates or without.
        prompts (`Sequence[list[int]]`): token ids of each prompt; the first one is decoded.
        max_new_tokens (`int`): longest response.
        pad_token_id (`int`): the model's.

    Returns:
        `str`, *optional*: why the model refuses candidates; `None` if it takes them, or no method has any.
    """
    method = next(filter(has_candidates, methods), None)  # what is refused is any tree, whatever its size
    if method is None:
        return None
    try:
        decode_all(method, prompts[:1], max_new_tokens, 1, pad_token_id, show_progress=False)
    except ValueError as error:
        return str(error)
    return None


def _shapes(batches: list[list[list[int]]]) -> list[list[list[int]]]:
    """A batch of every shape, the longest first: a cache that is large enough is not made anew."""
    shapes = {(len(batch), max(map(len, batch))): batch for batch in batches}
    return [shapes[key] for key in sorted(shapes, key=lambda key: (-key[1], -key[0]))]
