"""How fast responses were decoded."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Speed:
    """
    Speed over several prompts.

    Attributes:
        tokens_per_second (`float`): median over the prompts.
        tokens_per_forward (`float`): all tokens over all forward passes.
        speedup (`float`, *optional*): median over the prompts of the tokens per second over those of the baseline.
    """

    tokens_per_second: float
    tokens_per_forward: float
    speedup: float | None = None


def measure_speed(
    tokens: Sequence[int],
    seconds: Sequence[float],
    forwards: Sequence[int],
    baseline_seconds: Sequence[float] | None = None,
    baseline_tokens: Sequence[int] | None = None,
) -> Speed:
    """
    Put the speeds of single prompts together.

    Args:
        tokens (`Sequence[int]`): generated tokens of each prompt; prompts without any are left out of the medians.
        seconds (`Sequence[float]`): time of the whole `generate`, prefill included.
        forwards (`Sequence[int]`): calls of the model, prefill included.
        baseline_seconds (`Sequence[float]`, *optional*): time of another way to decode the same prompts.
        baseline_tokens (`Sequence[int]`, *optional*): the tokens that it generated; by default as many as `tokens`,
            which is so where both decode the same model greedily.

    Returns:
        `Speed`.

    Raises:
        ValueError: if the sequences differ in length, hold times or forward passes that are not positive or numbers of
            tokens below 0, or if there is no prompt with tokens.
    """
    baseline_tokens = tokens if baseline_tokens is None else baseline_tokens
    columns = {"tokens": tokens, "seconds": seconds, "forwards": forwards, "baseline_tokens": baseline_tokens}
    if baseline_seconds is not None:
        columns["baseline_seconds"] = baseline_seconds
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"There must be one number of each kind for each prompt, got {lengths}.")
    for name, column in columns.items():
        lowest = 0 if "tokens" in name else None
        for value in column:
            if value < 0 or (value == 0 and lowest is None) or value != value:
                rule = "at least 0" if lowest == 0 else "above 0"
                raise ValueError(f"`{name}` must be {rule} for each prompt, got {value}.")
    kept = [index for index in range(len(tokens)) if tokens[index] and baseline_tokens[index]]
    if not kept:
        raise ValueError("There must be at least one prompt for which tokens were generated, got none.")
    rates = [tokens[index] / seconds[index] for index in kept]
    speedup = None
    if baseline_seconds is not None:
        baseline_rates = (baseline_tokens[index] / baseline_seconds[index] for index in kept)
        speedup = statistics.median(rate / baseline for rate, baseline in zip(rates, baseline_rates))
    return Speed(statistics.median(rates), sum(tokens) / sum(forwards), speedup)
