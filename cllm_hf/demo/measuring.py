"""What the demo measures and draws of its models."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..evaluation.benchmark import DecodingMethod, DecodingResult, benchmark_decoding
from ..text import format_table
from ..trajectories.block import BlockTrajectory
from ..trajectories.inspection import format_blocks
from ..trajectories.showing import token_decoder
from .options import DemoOptions
from .problems import Problem, read_answer
from .training import make_builder


def measure(
    target: PreTrainedModel,
    cllm: PreTrainedModel | None,
    lossless: Any,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    options: DemoOptions,
) -> list[DecodingResult]:
    """
    Decode problems with all models, in every way that makes sense.

    Args:
        target (`transformers.PreTrainedModel`): the target model.
        cllm (`transformers.PreTrainedModel`, *optional*): the CLLM.
        lossless (`peft.PeftModel`, *optional*): a copy of the target model with the lossless adapter.
        tokenizer (`transformers.PreTrainedTokenizerBase`): their tokenizer.
        problems (`list[Problem]`): what to decode.
        options (`DemoOptions`): sizes.

    Returns:
        `list[DecodingResult]`: target by `generate()`, target by Jacobi, target with the lossless adapter, CLLM by
        `generate()`, CLLM by Jacobi; without those of models that there are not.
    """
    greedy: dict[str, Any] = {"decoding": "autoregressive"}
    jacobi = {"decoding": "jacobi", "jacobi_block_size": options.block_size}
    drafting = {"decoding": "lossless", "jacobi_block_size": options.lossless_block_size}
    methods = [
        DecodingMethod(name, model, generate_options)
        for name, model, generate_options in (
            ("target model, generate()", target, greedy),
            ("target model, jacobi", target, jacobi),
            ("target model, lossless", lossless, drafting),
            ("CLLM, generate()", cllm, greedy),
            ("CLLM, jacobi", cllm, jacobi),
        )
        if model is not None
    ]
    prompts = [tokenizer(problem.prompt)["input_ids"] for problem in problems]
    return benchmark_decoding(methods, prompts, options.max_new_tokens)


def accuracy(result: DecodingResult, tokenizer: PreTrainedTokenizerBase, problems: list[Problem]) -> float:
    """
    Share of problems that a method solves.

    Args:
        result (`DecodingResult`): its responses.
        tokenizer (`transformers.PreTrainedTokenizerBase`): to read them.
        problems (`list[Problem]`): what they answer.

    Returns:
        `float`: from 0 to 1.
    """
    answers = [read_answer(str(tokenizer.decode(ids, skip_special_tokens=True))) for ids in result.responses]
    return sum(answer == problem.answer for answer, problem in zip(answers, problems)) / len(problems)


def report_table(results: list[DecodingResult], accuracies: list[float]) -> str:
    """
    Format what was measured; the speed-up is over the first result.

    Args:
        results (`list[DecodingResult]`): of one run.
        accuracies (`list[float]`): of each.

    Returns:
        `str`: a Markdown table.
    """
    rows = [
        [
            result.name,
            f"{result.tokens_per_second:.0f}",
            f"{result.tokens_per_forward:.2f}",
            f"{result.speedup_over(results[0]):.2f}x",
            f"{100 * share:.1f}%",
        ]
        for result, share in zip(results, accuracies)
    ]
    return format_table(
        ("method", "tokens/s", "tokens per forward pass", "speed-up over generate()", "accuracy"), rows
    )


def draw_block(
    target: PreTrainedModel,
    cllm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    options: DemoOptions,
    color: bool,
) -> str:
    """
    Draw how both models solve the second block of an answer, from the same first draft.

    A trajectory that does not end in its answer is not kept, so the first problem that both models keep is drawn.

    Args:
        target (`transformers.PreTrainedModel`): the target model.
        cllm (`transformers.PreTrainedModel`): the CLLM.
        tokenizer (`transformers.PreTrainedTokenizerBase`): their tokenizer.
        problems (`list[Problem]`): a few, of which one is drawn.
        options (`DemoOptions`): sizes.
        color (`bool`): whether to use colors.

    Returns:
        `str`: right tokens blue, wrong ones red; without color, wrong ones in brackets.
    """
    prompts = [problem.prompt for problem in problems]
    records = []
    for model in (target, cllm):
        builder = make_builder(model, tokenizer, options, show_progress=False)
        records.append({record["prompt"]: record for record in builder.build(prompts)})
    shown = next((prompt for prompt in prompts if all(prompt in kept for kept in records)), None)
    if shown is None:
        return ""
    blocks = []
    for name, kept in zip(("Target model", "CLLM"), records):
        last = len(kept[shown]["states"]) - 1
        blocks.append(BlockTrajectory.of(kept[shown], min(1, last), name))
    return format_blocks(blocks, token_decoder(tokenizer), color)
