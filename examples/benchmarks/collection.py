"""What `examples/benchmark.py collect` does: how fast trajectories are collected, next to the published procedure."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tqdm.auto import tqdm

from cllm_hf._host import base_model_of
from cllm_hf.blocks.limits import check_packable
from cllm_hf.cards import format_table
from cllm_hf.evaluation.benchmark import PeakMemory, synchronize
from cllm_hf.evaluation.reporting import describe_environment, format_environment

from .collectors import (
    BUILDER,
    PUBLISHED,
    CollectionMethod,
    CollectionSetting,
    Trajectories,
    builder_method,
    published_method,
)


_WARM_UP_BLOCKS = 2


@dataclass
class CollectionResult:
    """
    What a method did.

    Attributes:
        method (`CollectionMethod`): the method.
        trajectories (`dict[int, tuple]`): response and states by the number of the prompt, of the first round.
        dropped (`dict[str, int]`): prompts whose trajectories were not recorded, by reason, in the first round.
        seconds (`list[float]`): time of each round.
        peak_memory (`int`, *optional*): most bytes that a round took beside what was there before it.
    """

    method: CollectionMethod
    trajectories: Trajectories = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    peak_memory: int | None = None

    @property
    def num_tokens(self) -> int:
        """`int`: tokens of the responses whose trajectories were recorded."""
        return sum(len(response) for response, _ in self.trajectories.values())

    @property
    def num_state_tokens(self) -> int:
        """`int`: tokens of all their states, without what stands after the end of a response."""
        total = 0
        for response, states in self.trajectories.values():
            block_size = len(states[0][0])
            for number, block in enumerate(states):
                total += len(block) * min(block_size, len(response) - number * block_size)
        return total

    @property
    def tokens_per_second(self) -> float:
        """`float`: recorded tokens of responses per second; the median over the rounds."""
        return statistics.median(self.num_tokens / seconds for seconds in self.seconds)

    def speedup_over(self, baseline: CollectionResult) -> float:
        """
        Tokens per second over those of another method: the median over the rounds of the ratio in each round.

        Args:
            baseline (`CollectionResult`): a result of the same call of `measure_collection`.

        Returns:
            `float`.
        """
        ratios = (theirs / ours for ours, theirs in zip(self.seconds, baseline.seconds))
        return statistics.median(ratios) * self.num_tokens / baseline.num_tokens

    def num_equal_to(self, baseline: CollectionResult) -> int:
        """
        Count the prompts of another method for which response and all states are the same, token for token.

        Args:
            baseline (`CollectionResult`): a result of the same call of `measure_collection`.

        Returns:
            `int`.
        """
        return sum(self.trajectories.get(index) == theirs for index, theirs in baseline.trajectories.items())


def compare_collection(
    model: Any,
    processing_class: Any,
    prompts: Sequence[str],
    setting: CollectionSetting,
    num_published: int = 4,
    rounds: int = 3,
    response_lengths: Sequence[int] = (),
    block_sizes: Sequence[int] = (),
    show_progress: bool = True,
) -> dict[str, Any]:
    """
    Measure `cllm_hf.TrajectoryBuilder` and the published procedure on the same prompts, from the same first drafts.

    The model is in evaluation mode meanwhile.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): the target model.
        processing_class (`transformers.PreTrainedTokenizerBase`): its tokenizer.
        prompts (`Sequence[str]`): texts; the builder has all of them.
        setting (`CollectionSetting`): what is collected.
        num_published (`int`): the published procedure, which is slow, has the first so many of the prompts; where the
            setting is varied, half as many.
        rounds (`int`): turns of each method, after one with short responses that is left out.
        response_lengths (`Sequence[int]`): values of `max_new_tokens` to vary it over.
        block_sizes (`Sequence[int]`): values of `block_size` to vary it over.
        show_progress (`bool`): whether to draw a progress bar.

    Returns:
        `dict`: everything that was measured, ready for JSON; `format_collection` makes a text of it.

    Raises:
        ValueError: if there are no prompts, a prompt has no tokens or does not fit into the model's positions with its
            response, a number is below 1, or the model cannot be packed.
    """
    prompt_ids = [list(processing_class(prompt)["input_ids"]) for prompt in prompts]
    _check(model, prompt_ids, num_published, rounds, [setting.max_new_tokens, *response_lengths])
    num_published = min(num_published, len(prompts))
    num_varied = max(num_published // 2, 1)

    def method(name: str, count: int) -> CollectionMethod:
        if name == PUBLISHED:
            return published_method(model, processing_class, prompt_ids[:count])
        return builder_method(model, processing_class, prompts[:count])

    methods = [method(PUBLISHED, num_published), method(BUILDER, num_published)]
    if num_published < len(prompts):
        methods.append(method(BUILDER, len(prompts)))
    varied = [method(PUBLISHED, num_varied), method(BUILDER, len(prompts))]
    lengths = [replace(setting, max_new_tokens=length) for length in response_lengths]
    sizes = [replace(setting, block_size=size) for size in block_sizes]
    num_turns = (rounds + 1) * (len(methods) + len(varied) * len(lengths + sizes))
    was_training = model.training
    model.eval()
    try:
        with tqdm(total=num_turns, desc="Measuring", unit="turn", disable=not show_progress) as bar:
            results = measure_collection(methods, setting, rounds, model.device, bar.update)
            points = [
                _point(measure_collection(varied, point, rounds, model.device, bar.update), point)
                for point in lengths + sizes
            ]
    finally:
        model.train(was_training)
    return {
        "kind": "collect",
        "environment": describe_environment(model),
        "settings": {
            "block_size": setting.block_size,
            "max_new_tokens": setting.max_new_tokens,
            "seed": setting.seed,
            "max_tokens_per_batch": setting.max_tokens_per_batch,
            "rounds": rounds,
            "num_prompts": len(prompts),
            "num_published": num_published,
            "num_published_varied": num_varied,
        },
        "prompt_lengths": [len(ids) for ids in prompt_ids],
        "rows": [_row(result, results[0]) for result in results],
        "response_lengths": points[: len(lengths)],
        "block_sizes": points[len(lengths) :],
    }


def measure_collection(
    methods: Sequence[CollectionMethod],
    setting: CollectionSetting,
    rounds: int,
    device: torch.device,
    on_turn: Callable[[], object] = lambda: None,
) -> list[CollectionResult]:
    """
    Collect in several ways, in turns, so that a change of the machine's speed meets all of them.

    Before the clocks start, each method collects once, with responses of two blocks. A clock is around all that a
    method does, from prompts to trajectories.

    Args:
        methods (`Sequence[CollectionMethod]`): what to compare.
        setting (`CollectionSetting`): what is collected.
        rounds (`int`): turns of each method.
        device (`torch.device`): of the model.
        on_turn (`Callable`): called after each turn.

    Returns:
        `list[CollectionResult]`: one for each method, in their order.
    """
    results = [CollectionResult(method) for method in methods]
    short = replace(setting, max_new_tokens=min(setting.max_new_tokens, _WARM_UP_BLOCKS * setting.block_size))
    for turn in range(rounds + 1):
        for result in results:
            with PeakMemory(device) as memory:
                synchronize(device)
                start = time.perf_counter()
                collected = result.method.collect(setting if turn > 0 else short)
                synchronize(device)
                seconds = time.perf_counter() - start
            if turn > 0:
                result.seconds.append(seconds)
                if memory.num_bytes is not None:
                    result.peak_memory = max(memory.num_bytes, result.peak_memory or 0)
            if turn == 1:
                result.trajectories, result.dropped = result.method.read(collected)
            on_turn()
    return results


def format_collection(report: dict[str, Any]) -> str:
    """
    Write the result of `compare_collection` as Markdown.

    Args:
        report (`dict`): the result, or what `json.loads` has made of it.

    Returns:
        `str`: tables, setting, machine and notes.
    """
    settings, lengths = report["settings"], report["prompt_lengths"]
    header = ["method", "prompts", "response tokens", "tokens/s", "tokens of states/s"]
    header += ["speed-up", "equal", "dropped", "peak MiB"]
    rows = [
        [
            row["name"],
            str(row["num_prompts"]),
            str(row["num_tokens"]),
            _rate(row["tokens_per_second"]),
            _rate(row["state_tokens_per_second"]),
            f"{row['speedup']:.1f}x",
            f"{row['num_equal']}/{settings['num_published']}",
            str(sum(row["dropped"].values())),
            "-" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**20:.0f}",
        ]
        for row in report["rows"]
    ]
    sizes = f"{min(lengths)} to {max(lengths)}" if min(lengths) < max(lengths) else f"{lengths[0]}"
    setting = (
        f"Prompts of {sizes} tokens, responses of at most {settings['max_new_tokens']}, blocks of "
        f"{settings['block_size']}. Rounds: {settings['rounds']}. Peak memory is beside what was there before, as the "
        "weights were. Equal: prompts of the published procedure for which response and all states are the same, from "
        "the same first drafts. The published procedure, written anew from its description, takes one prompt and one "
        "block at a time, without a cache."
    )
    varied = [
        *_format_points("at most", report["response_lengths"], "max_new_tokens", settings),
        *_format_points("block size", report["block_sizes"], "block_size", settings),
    ]
    reasons = [
        f"Dropped by {row['name']} of {row['num_prompts']} prompts: "
        + ", ".join(f"{count} {reason}" for reason, count in row["dropped"].items())
        + "."
        for row in report["rows"]
        if row["dropped"]
    ]
    table = format_table(header, rows)
    return "\n\n".join([table, *reasons, setting, *varied, format_environment(report["environment"])])


def _format_points(title: str, points: list[dict[str, Any]], key: str, settings: dict[str, Any]) -> list[str]:
    if not points:
        return []
    header = [title, "tokens a response", f"{PUBLISHED}, tokens/s", f"{BUILDER}, tokens/s", "speed-up", "equal"]
    rows = []
    for point in points:
        published, builder = point["rows"]
        num_recorded = builder["num_prompts"] - sum(builder["dropped"].values())
        rows.append(
            [
                str(point[key]),
                f"{builder['num_tokens'] / max(num_recorded, 1):.0f}",
                _rate(published["tokens_per_second"]),
                _rate(builder["tokens_per_second"]),
                f"{builder['speedup']:.1f}x",
                f"{builder['num_equal']}/{published['num_prompts']}",
            ]
        )
    what = "Longer responses" if key == "max_new_tokens" else "Larger blocks"
    numbers = f"{PUBLISHED} on {settings['num_published_varied']} and {BUILDER} on {settings['num_prompts']} prompts"
    return [f"{what}, {numbers}:", format_table(header, rows)]


def _rate(value: float) -> str:
    return f"{value:.{0 if value >= 100 else 1}f}"


def _row(result: CollectionResult, baseline: CollectionResult) -> dict[str, Any]:
    return {
        "name": result.method.name,
        "num_prompts": result.method.num_prompts,
        "num_tokens": result.num_tokens,
        "num_state_tokens": result.num_state_tokens,
        "tokens_per_second": result.tokens_per_second,
        "state_tokens_per_second": statistics.median(result.num_state_tokens / seconds for seconds in result.seconds),
        "speedup": result.speedup_over(baseline),
        "num_equal": result.num_equal_to(baseline),
        "dropped": result.dropped,
        "peak_memory": result.peak_memory,
        "seconds": result.seconds,
    }


def _point(results: Sequence[CollectionResult], setting: CollectionSetting) -> dict[str, Any]:
    rows = [_row(result, results[0]) for result in results]
    return {"max_new_tokens": setting.max_new_tokens, "block_size": setting.block_size, "rows": rows}


def _check(
    model: Any, prompt_ids: list[list[int]], num_published: int, rounds: int, max_new_tokens: Sequence[int]
) -> None:
    for name, value in (("num_published", num_published), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    if not prompt_ids or not all(prompt_ids):
        got = "an empty one" if prompt_ids else "none"
        raise ValueError(f"`prompts` must hold at least one prompt, each with at least one token, got {got}.")
    check_packable(base_model_of(model))
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest, longest_response = max(map(len, prompt_ids)), max(max_new_tokens)
    if limit is not None and longest + longest_response > limit:
        raise ValueError(
            f"A prompt of {longest} tokens and a response of {longest_response} do not fit into the model's {limit} "
            "positions. Drop such prompts, or lower `--max-new-tokens` and `--response-lengths`."
        )
