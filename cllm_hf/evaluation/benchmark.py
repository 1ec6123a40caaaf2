"""Tokens per second and per forward of several ways to decode, in one run, one prompt at a time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm.auto import tqdm

from .._host import base_model_of


@dataclass
class DecodingMethod:
    """
    A way to decode.

    Attributes:
        name (`str`): how tables call it.
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): the model.
        options (`dict`): arguments of its `generate`, such as `{"decoding": "jacobi"}`.
    """

    name: str
    model: Any
    options: dict[str, Any]


@dataclass
class DecodingResult:
    """
    What a method did.

    Attributes:
        name (`str`): of the method.
        responses (`list[list[int]]`): generated token ids, for each prompt.
        num_forwards (`list[int]`): calls of the model, prefill included, for each prompt.
        seconds (`list[float]`): time of the whole `generate`, prefill included, for each prompt.
    """

    name: str
    responses: list[list[int]] = field(default_factory=list)
    num_forwards: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """`int`: generated tokens, of all prompts."""
        return sum(map(len, self.responses))

    @property
    def tokens_per_forward(self) -> float:
        """`float`: all generated tokens over all forwards."""
        return self.num_tokens / sum(self.num_forwards)

    @property
    def tokens_per_second(self) -> float:
        """`float`: median over the prompts."""
        return statistics.median(self._rates())

    def speedup_over(self, baseline: DecodingResult) -> float:
        """
        Tokens per second over those of another method: the median over the prompts of the ratio for each prompt.

        Args:
            baseline (`DecodingResult`): a result of the same run.

        Returns:
            `float`.
        """
        return statistics.median(ours / theirs for ours, theirs in zip(self._rates(), baseline._rates()))

    def _rates(self) -> list[float]:
        return [len(response) / seconds for response, seconds in zip(self.responses, self.seconds)]


def benchmark_decoding(
    methods: Sequence[DecodingMethod],
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    show_progress: bool = True,
) -> list[DecodingResult]:
    """
    Decode the same prompts in several ways, greedily and one at a time.

    The methods take turns on every prompt, so that a change of the machine's speed meets all of them, and a ratio is
    taken between neighbors. The first prompt is decoded once by each before the clocks start. All clocks are around
    the whole `generate`.

    Args:
        methods (`Sequence[DecodingMethod]`): what to compare.
        prompts (`Sequence[list[int]]`): token ids of each prompt.
        max_new_tokens (`int`): longest response.
        show_progress (`bool`): whether to draw a progress bar.

    Returns:
        `list[DecodingResult]`: one for each method, in their order.

    Raises:
        ValueError: if there are no prompts.
    """
    if not prompts:
        raise ValueError("`prompts` must hold at least one prompt, got none.")
    results = [DecodingResult(method.name) for method in methods]
    for method in methods:
        _timed_generate(method, prompts[0], max_new_tokens)
    for prompt in tqdm(prompts, desc="Decoding", unit="prompt", disable=not show_progress):
        for method, result in zip(methods, results):
            response, num_forwards, seconds = _timed_generate(method, prompt, max_new_tokens)
            result.responses.append(response)
            result.num_forwards.append(num_forwards)
            result.seconds.append(seconds)
    return results


def _timed_generate(method: DecodingMethod, prompt: list[int], max_new_tokens: int) -> tuple[list[int], int, float]:
    input_ids = torch.tensor([prompt], device=method.model.device)
    mask = torch.ones_like(input_ids)
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    # The wrapper of an adapter hands `generate` on to its base model, whose calls are those to count.
    handle = base_model_of(method.model).register_forward_pre_hook(count)
    try:
        _synchronize(input_ids.device)
        start = time.perf_counter()
        output = method.model.generate(
            input_ids, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens, **method.options
        )
        _synchronize(input_ids.device)
        seconds = time.perf_counter() - start
    finally:
        handle.remove()
    return output[0, len(prompt) :].tolist(), calls[0], seconds


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
