"""The demo's steps: problems, target model, trajectories, CLLM, measurement."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from ..evaluation.benchmark import DecodingMethod, DecodingResult, benchmark_decoding
from ..files import check_writable, save_whole
from ..quiet import quiet_hosts
from ..text import format_table
from ..training.config import CLLMConfig
from ..training.progress import show_progress
from ..training.trainer import CLLMTrainer
from ..trajectories.block import BlockTrajectory
from ..trajectories.builder import TrajectoryBuilder
from ..trajectories.inspection import format_blocks
from ..trajectories.loading import load_trajectories
from ..trajectories.showing import KEEP_ALL, token_decoder
from .clock import Clock
from .problems import Problem, make_problems, make_tokenizer, read_answer


# What is kept, in this order, and a file that each part always holds.
_PARTS = {"target": "config.json", "trajectories": "manifest.json", "cllm": "config.json"}


@dataclass(frozen=True)
class DemoOptions:
    """
    Sizes of the demo.

    Attributes:
        seed (`int`): of the problems, the weights and the order of the data.
        hidden_size (`int`): width of the model; it has four layers.
        target_updates (`int`): updates of the target model, on `target_batch_size` new problems each.
        target_batch_size (`int`): problems in an update of the target model.
        num_trajectories (`int`): problems whose trajectories are collected.
        cllm_updates (`int`): updates of the CLLM, on `cllm_batch_size` trajectories each.
        cllm_batch_size (`int`): trajectories in an update of the CLLM.
        cllm_learning_rate (`float`): highest learning rate of the CLLM.
        ar_loss_weight (`float`): weight of the CLLM's AR loss.
        position_decay (`float`, *optional*): see `CLLMConfig`.
        trajectory_source (`str`): `"dataset"` for the states that were collected, `"online"` for those that the model
            makes while it learns.
        num_held_out (`int`): problems for the measurement, in no training data.
        block_size (`int`): tokens of a block.
        max_new_tokens (`int`): longest answer; a worked answer has at most 68 tokens.
    """

    seed: int = 0
    hidden_size: int = 128
    target_updates: int = 650
    target_batch_size: int = 32
    num_trajectories: int = 2400
    cllm_updates: int = 300
    cllm_batch_size: int = 32
    cllm_learning_rate: float = 1.5e-3
    ar_loss_weight: float = 10.0
    position_decay: float | None = 4.0
    trajectory_source: str = "online"
    num_held_out: int = 200
    block_size: int = 16
    max_new_tokens: int = 96


@dataclass(frozen=True)
class DemoReport:
    """
    What the demo measured.

    Attributes:
        results (`list[DecodingResult]`): the target model and the CLLM, each by `generate()` and by Jacobi.
        accuracies (`list[float]`): share of held-out problems that each solves, from 0 to 1.
        table (`str`): both as a table.
        trajectories (`str`): one block of both models, state by state.
        seconds (`dict[str, float]`): time of each step.
    """

    results: list[DecodingResult]
    accuracies: list[float]
    table: str
    trajectories: str
    seconds: dict[str, float]


def run_demo(
    options: DemoOptions, output_dir: Path | None = None, say: Callable[[str], None] = print, color: bool = True
) -> DemoReport:
    """
    Run all steps.

    Args:
        options (`DemoOptions`): sizes.
        output_dir (`pathlib.Path`, *optional*): where to keep `target`, `trajectories` and `cllm`; each appears there
            when it is complete. They take the place of those of an earlier run. By default nothing is kept.
        say (`Callable[[str], None]`): prints a line.
        color (`bool`): whether the picture of the trajectories may use colors.

    Returns:
        `DemoReport`.

    Raises:
        OSError: if `output_dir` is not writable.
        ValueError: if it holds something else under a name that the demo uses.
    """
    if output_dir is not None:
        check_writable(output_dir)
        _check_parts(output_dir)

    def keep(name: str, save: Callable[[Path], object]) -> None:
        if output_dir is not None:
            save_whole(output_dir / name, save)

    set_seed(options.seed)
    clock = Clock()
    tokenizer = make_tokenizer()
    needed = options.num_held_out + options.num_trajectories + options.target_updates * options.target_batch_size
    problems = make_problems(needed, options.seed)
    held_out = problems[: options.num_held_out]
    training = problems[options.num_held_out :]
    say(f"{len(problems)} distinct problems, {len(held_out)} of them held out. One of them:")
    say(f"  {held_out[0].prompt}\n  {held_out[0].response}")

    with quiet_hosts():
        target = _make_model(tokenizer, options.hidden_size)
        say(f"\n[1/4] Training a target model of {target.num_parameters():,} parameters from nothing")
        train_target(target, tokenizer, training, options)
        keep("target", lambda folder: _save(target, tokenizer, folder))
        if output_dir is not None:
            for name in list(_PARTS)[1:]:  # of an earlier run, whose target model is gone
                shutil.rmtree(output_dir / name, ignore_errors=True)
        clock.lap("target model")

        say("\n[2/4] Collecting the Jacobi trajectories of its answers")
        builder = _make_builder(target, tokenizer, options)
        prompts = [problem.prompt for problem in training[: options.num_trajectories]]
        if output_dir is None:
            dataset: Any = builder.build(prompts)
        else:
            # The folder says by whom its trajectories are.
            target.name_or_path = tokenizer.name_or_path = str(output_dir / "target")
            keep("trajectories", lambda folder: builder.collect(prompts, folder))
            dataset = load_trajectories(output_dir / "trajectories")
        clock.lap("trajectories")

        say("\n[3/4] Training the CLLM on them")
        cllm = _make_model(tokenizer, options.hidden_size)
        cllm.load_state_dict(target.state_dict())
        trainer = make_cllm_trainer(cllm, tokenizer, dataset, options)
        trainer.train()
        keep("cllm", lambda folder: trainer.save_model(str(folder)))
        clock.lap("CLLM")

        say("\n[4/4] Decoding the held-out problems, one at a time, in turns")
        results = measure(target, cllm.eval(), tokenizer, held_out, options)
        clock.lap("measurement")
    accuracies = [accuracy(result, tokenizer, held_out) for result in results]
    return DemoReport(
        results,
        accuracies,
        report_table(results, accuracies),
        draw_block(target, cllm, tokenizer, held_out[:4], options, color),
        clock.laps,
    )


def train_target(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: list[Problem], options: DemoOptions
) -> None:
    """
    Train the target model on worked answers with `trl.SFTTrainer`.

    Args:
        model (`transformers.PreTrainedModel`): trained in place.
        tokenizer (`transformers.PreTrainedTokenizerBase`): its tokenizer.
        problems (`list[Problem]`): what to train on.
        options (`DemoOptions`): sizes.
    """
    dataset = Dataset.from_list([{"prompt": f"{p.prompt} ", "completion": p.response} for p in problems])
    args = SFTConfig(
        max_steps=options.target_updates,
        per_device_train_batch_size=options.target_batch_size,
        **_training_options(options.seed, learning_rate=2e-3),
    )
    trainer = SFTTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer)
    show_progress(trainer, "loss")
    trainer.train()
    # Training turns the cache off for good; the comparison is with decoding as it should be.
    model.config.use_cache = model.generation_config.use_cache = True
    model.eval()


def make_cllm_trainer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, options: DemoOptions
) -> CLLMTrainer:
    """
    Make the trainer of the CLLM.

    Args:
        model (`transformers.PreTrainedModel`): starts as the target model.
        tokenizer (`transformers.PreTrainedTokenizerBase`): its tokenizer.
        dataset (`datasets.Dataset`): the target model's trajectories.
        options (`DemoOptions`): sizes.

    Returns:
        `CLLMTrainer`.
    """
    args = CLLMConfig(
        max_steps=options.cllm_updates,
        per_device_train_batch_size=options.cllm_batch_size,
        ar_loss_weight=options.ar_loss_weight,
        position_decay=options.position_decay,
        trajectory_source=options.trajectory_source,
        block_size=options.block_size,
        plot_run=False,
        **_training_options(options.seed, options.cllm_learning_rate),
    )
    trainer = CLLMTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer)
    show_progress(trainer, "consistency_loss")
    return trainer


def measure(
    target: PreTrainedModel,
    cllm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    options: DemoOptions,
) -> list[DecodingResult]:
    """
    Decode problems with both models, both ways.

    Args:
        target (`transformers.PreTrainedModel`): the target model.
        cllm (`transformers.PreTrainedModel`): the CLLM.
        tokenizer (`transformers.PreTrainedTokenizerBase`): their tokenizer.
        problems (`list[Problem]`): what to decode.
        options (`DemoOptions`): sizes.

    Returns:
        `list[DecodingResult]`: target by `generate()`, target by Jacobi, CLLM by `generate()`, CLLM by Jacobi.
    """
    ways: dict[str, dict[str, Any]] = {
        "generate()": {"decoding": "autoregressive"},
        "jacobi": {"decoding": "jacobi", "jacobi_block_size": options.block_size},
    }
    methods = [
        DecodingMethod(f"{name}, {way}", model, generate_options)
        for name, model in (("target model", target), ("CLLM", cllm))
        for way, generate_options in ways.items()
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
    return format_table(("method", "tokens/s", "tokens per forward", "speed-up over generate()", "accuracy"), rows)


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
        builder = _make_builder(model, tokenizer, options, show_progress=False)
        records.append({record["prompt"]: record for record in builder.build(prompts)})
    shown = next((prompt for prompt in prompts if all(prompt in kept for kept in records)), None)
    if shown is None:
        return ""
    blocks = []
    for name, kept in zip(("Target model", "CLLM"), records):
        last = len(kept[shown]["states"]) - 1
        blocks.append(BlockTrajectory.of(kept[shown], min(1, last), name))
    return format_blocks(blocks, token_decoder(tokenizer), color)


def _make_builder(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: DemoOptions, show_progress: bool = True
) -> TrajectoryBuilder:
    return TrajectoryBuilder(
        model,
        tokenizer,
        options.block_size,
        options.max_new_tokens,
        options.seed,
        # Whatever the target model says: if it was trained for too short, the demo shows that.
        cleaning=KEEP_ALL,
        show_progress=show_progress,
    )


def _check_parts(output_dir: Path) -> None:
    """Refuse to replace a folder that no demo has made, which a common name such as `target` may well be."""
    for name, file in _PARTS.items():
        part = output_dir / name
        if part.exists() and not (part / file).is_file():
            raise ValueError(
                f"The demo would replace {str(part)!r}, which is not from an earlier demo. Choose another output "
                "folder."
            )


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _make_model(tokenizer: PreTrainedTokenizerBase, hidden_size: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def _training_options(seed: int, learning_rate: float) -> dict[str, Any]:
    return {
        # Nothing is saved there: `save_strategy="no"`.
        "output_dir": tempfile.gettempdir(),
        "save_strategy": "no",
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 40,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 10,
        "report_to": [],
        "seed": seed,
    }
