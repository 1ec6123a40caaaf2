"""
What each option of consistency training brings: the same short training with one option changed, row by row.

    python examples/ablations.py --model ../shared/models/stories260k --output-dir runs/ablations/stories
    python examples/ablations.py --demo runs/demo --output-dir runs/ablations/demo --rows defaults online
    python examples/ablations.py --demo runs/demo --output-dir runs/ablations/lossless --lossless
    python examples/ablations.py --model MODEL --responses responses.jsonl --output-dir runs/ablations/own --lossless

The first trains on stories of the model itself (see stories.py), the second on the task of `cllm demo`, whose output
folder it takes, the last on responses of the model that are there already: JSON lines with `prompt_ids` and
`response_ids`, of which the first ones are held out. With `--lossless`, rows are lossless adapters. A row is trained
from the target model anew; finished rows are kept in `results.json`, so that the same command goes on where it was.
Prints a table and draws tokens per forward pass against quality.
"""

import argparse
import copy
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from stories import agreement, sample_prompts
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from cllm_hf import CLLMConfig, CLLMTrainer, TrajectoryBuilder, load_trajectories
from cllm_hf.cards import format_table
from cllm_hf.demo.problems import make_problems, read_answer
from cllm_hf.demo.run import DemoOptions
from cllm_hf.evaluation.benchmark import DecodingMethod, benchmark_decoding
from cllm_hf.files import check_writable, write_whole


# What a row changes in the options of the trainer. Other block sizes are cut or joined from the trajectories.
ROWS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "local": {"consistency": "local"},
    "reverse_kl": {"divergence": "reverse_kl"},
    "jensen_shannon": {"divergence": "jensen_shannon"},
    "total_variation": {"divergence": "total_variation"},
    "ar_weight_0.3": {"ar_loss_weight": 0.3},
    "ar_weight_3": {"ar_loss_weight": 3.0},
    "ar_weight_10": {"ar_loss_weight": 10.0},
    "two_states": {"states_per_block": 2},
    "decay_4": {"position_decay": 4.0},
    "progressive": {"state_sampling": "progressive", "noise_window": 4},
    "noisy_context": {"state_sampling": "progressive", "noise_window": 4, "context": "noisy"},
    "online": {"trajectory_source": "online"},
    "online_decay_4": {"trajectory_source": "online", "position_decay": 4.0},
    "block_8": {"block_size_schedule": [8]},
    "block_32": {"block_size_schedule": [32]},
    "block_64": {"block_size_schedule": [64]},
    "curriculum": {"block_size_schedule": [4, 8, 16]},
}


# What a row of `--lossless` changes; options of its LoRA stand under "lora".
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]
LOSSLESS_ROWS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "total_variation": {"divergence": "total_variation"},
    "hybrid": {"divergence": "acceptance_hybrid"},
    "log_acceptance": {"divergence": "negative_log_acceptance"},
    "no_decay": {"position_decay": None},
    "decay_3": {"position_decay": 3.0},
    "no_markov": {"markov_rank": 0},
    "markov_256": {"markov_rank": 256},
    "drafts_6": {"drafts_per_response": 6},
    "drafts_24": {"drafts_per_response": 24},
    "block_5": {"block_size": 5},
    "block_13": {"block_size": 13},
    "curriculum": {"block_size_schedule": [3, 5, 9]},
    "rank_16": {"lora": {"r": 16, "lora_alpha": 32}},
    "rank_128": {"lora": {"r": 128, "lora_alpha": 256}},
    "alpha_64": {"lora": {"r": 64, "lora_alpha": 64}},
    "attention": {"lora": {"target_modules": _ATTENTION}},
    "feed_forward": {"lora": {"target_modules": _FEED_FORWARD}},
    "outputs": {"lora": {"target_modules": ["o_proj", "down_proj"]}},
    "outputs_128": {"lora": {"target_modules": ["o_proj", "down_proj"], "r": 128, "lora_alpha": 256}},
    "q_o_down": {"lora": {"target_modules": ["q_proj", "o_proj", "down_proj"]}},
    "q_v_o_down": {"lora": {"target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"]}},
    "o_gate_down": {"lora": {"target_modules": ["o_proj", "gate_proj", "down_proj"]}},
}
LOSSLESS_OPTIONS: dict[str, Any] = {"lossless": True, "block_size": 9, "position_decay": 6.0, "adam_beta2": 0.95}
LOSSLESS_LORA: dict[str, Any] = {"r": 64, "lora_alpha": 128, "target_modules": "all-linear"}


# Of `--demo`: problems whose trajectories are collected, and held-out ones.
NUM_TRAJECTORIES, NUM_SOLVED = 2400, 200
# What is the same for all rows of an output folder.
SETTINGS = ("updates", "batch_size", "learning_rate", "ar_loss_weight", "seed", "lossless")


@dataclass
class Task:
    """What is trained and measured: `measure_quality(model, responses)` is from 0 to 1."""

    target: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    trajectories: Any
    held_out: list[list[int]]
    max_new_tokens: int
    quality: str
    measure_quality: Callable[[PreTrainedModel, list[list[int]]], float]


def make_stories(arguments: argparse.Namespace) -> Task:
    """Stories of a pretrained model: quality is agreement with the target model's greedy tokens."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    target = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    prompts_file = arguments.output_dir / "prompts.json"
    if not prompts_file.exists():
        set_seed(arguments.seed)
        prompts = sample_prompts(target, tokenizer, 64 + arguments.num_prompts, length=16)
        write_whole(prompts_file, json.dumps(prompts).encode())
    prompts = json.loads(prompts_file.read_text())
    folder = arguments.output_dir / "trajectories"
    builder = TrajectoryBuilder(target, tokenizer, block_size=16, max_new_tokens=128, seed=arguments.seed)
    builder.collect(prompts[64:], folder)
    held_out = [tokenizer(prompt)["input_ids"] for prompt in prompts[:64]]
    greedy = decode(target, held_out, 128, block_size=16).responses
    return Task(
        target,
        tokenizer,
        load_trajectories(folder),
        held_out,
        128,
        "agreement",
        lambda model, responses: agreement(model, held_out, greedy),
    )


def make_word_problems(arguments: argparse.Namespace) -> Task:
    """The task of `cllm demo`: quality is the share of held-out problems that are solved."""
    options = DemoOptions()
    tokenizer = AutoTokenizer.from_pretrained(arguments.demo / "target")
    # The target model has seen the first problems in its training.
    seen = options.num_held_out + max(options.num_responses, options.target_updates * options.target_batch_size)
    problems = make_problems(seen + NUM_SOLVED, options.seed, options.largest_number)
    asked, problems = problems[options.num_held_out :][:NUM_TRAJECTORIES], problems[seen:]

    def solved(model: PreTrainedModel, responses: list[list[int]]) -> float:
        answers = [read_answer(str(tokenizer.decode(ids, skip_special_tokens=True))) for ids in responses]
        return sum(answer == problem.answer for answer, problem in zip(answers, problems)) / len(problems)

    target = AutoModelForCausalLM.from_pretrained(arguments.demo / "target").eval()
    folder = arguments.output_dir / "trajectories"
    builder = TrajectoryBuilder(target, tokenizer, options.block_size, options.max_new_tokens, options.seed)
    builder.collect([problem.prompt for problem in asked], folder)
    return Task(
        target,
        tokenizer,
        load_trajectories(folder),
        [tokenizer(problem.prompt)["input_ids"] for problem in problems],
        options.max_new_tokens,
        "solved",
        solved,
    )


def make_own(arguments: argparse.Namespace) -> Task:
    """Responses of a model that are there already: quality is agreement with them."""
    records = [json.loads(line) for line in arguments.responses.read_text().splitlines()]
    held_out, others = records[: arguments.num_held_out], records[arguments.num_held_out :]
    prompts = [record["prompt_ids"] for record in held_out]
    longest = max(len(record["response_ids"]) for record in held_out)
    rows = [
        {"data_id": str(number), "prompt": "", "response": ""}
        | {name: record[name] for name in ("prompt_ids", "response_ids")}
        for number, record in enumerate(others)
    ]
    return Task(
        AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype).eval(),
        AutoTokenizer.from_pretrained(arguments.model),
        Dataset.from_list(rows),
        prompts,
        longest,
        "agreement",
        lambda model, responses: agreement(model, prompts, [record["response_ids"] for record in held_out]),
    )


def decode(
    model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int, block_size: int, decoding: str = "jacobi"
) -> Any:
    """Decode prompts one at a time; the tokens are the greedy ones."""
    method = DecodingMethod(decoding, model, {"decoding": decoding, "jacobi_block_size": block_size})
    return benchmark_decoding([method], prompts, max_new_tokens, show_progress=False)[0]


def run_row(task: Task, changes: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Train a copy of the target model, or an adapter on it, and measure it."""
    model, lora = copy.deepcopy(task.target), None
    options: dict[str, Any] = {"ar_loss_weight": arguments.ar_loss_weight}
    if arguments.lossless:
        options = dict(LOSSLESS_OPTIONS)
        lora = LoraConfig(**{**LOSSLESS_LORA, **changes.get("lora", {})}, task_type="CAUSAL_LM")
    options |= {
        "max_steps": arguments.updates,
        "per_device_train_batch_size": arguments.batch_size,
        "learning_rate": arguments.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": min(40, arguments.updates // 10),
        "bf16": False,
        "gradient_checkpointing": False,
        "num_monitored_prompts": 0,
        "logging_steps": arguments.updates,
        "save_strategy": "no",
        "report_to": [],
        "seed": arguments.seed,
        "use_cpu": True,
    }
    options |= {name: value for name, value in changes.items() if name != "lora"}
    args = CLLMConfig(output_dir=str(arguments.output_dir / "unused"), **options)
    trainer = CLLMTrainer(
        model, args=args, train_dataset=task.trajectories, processing_class=task.tokenizer, peft_config=lora
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    model = trainer.model.eval()
    decoding = "lossless" if arguments.lossless else "jacobi"
    result = decode(model, task.held_out, task.max_new_tokens, trainer.block_size, decoding)
    return {
        "options": changes,
        **{name: getattr(arguments, name) for name in SETTINGS},
        "block_size": trainer.block_size,
        "tokens_per_forward": result.tokens_per_forward,
        "quality": task.measure_quality(model, result.responses),
        "seconds": seconds,
    }


def check_same_run(results: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Rows can be compared only if nothing but their own options differs."""
    for name, row in results.items():
        for setting in SETTINGS:
            if row.get(setting, False) != getattr(arguments, setting):  # `lossless` came later than the others
                raise SystemExit(
                    f"`{setting}` must be that of the finished rows, {row[setting]} in {name}, got "
                    f"{getattr(arguments, setting)}. Choose another output folder."
                )


def draw(results: dict[str, dict[str, Any]], quality: str, path: Path) -> None:
    """Quality over tokens per forward pass, a point a row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    by_speed = sorted(results, key=lambda name: results[name]["tokens_per_forward"])
    for number, (name, row) in enumerate(results.items(), start=1):
        point = (row["tokens_per_forward"], row["quality"])
        color = "tab:red" if name == "defaults" else "tab:blue"
        axes.plot(*point, "o", color=color, label=f"{number}  {name}")
        # By turns above and below, so that those of neighbors do not meet.
        offset = (0, 6) if by_speed.index(name) % 2 else (0, -14)
        axes.annotate(str(number), point, xytext=offset, textcoords="offset points", ha="center", fontsize=9)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9, markerscale=0.6)
    axes.set_xlabel("tokens per forward pass")
    axes.set_ylabel(quality)
    axes.margins(0.12)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Software": None})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="folder or Hub id of a causal language model, for stories of its own")
    source.add_argument("--demo", type=Path, help="output folder of `cllm demo`, for its word problems")
    parser.add_argument("--responses", type=Path, help="JSON lines of responses of `--model`, instead of stories")
    parser.add_argument("--num-held-out", type=int, default=16, help="of `--responses`, to measure on")
    parser.add_argument("--dtype", default="float32", help="of the weights of `--model` with `--responses`")
    parser.add_argument("--lossless", action="store_true", help="train lossless adapters")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="which rows; all by default")
    parser.add_argument("--num-prompts", type=int, default=2048, help="prompts of the stories")
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--ar-loss-weight", type=float, default=1.0, help="of the rows that do not set it")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rows = LOSSLESS_ROWS if arguments.lossless else ROWS
    arguments.rows = arguments.rows or list(rows)
    if unknown := [name for name in arguments.rows if name not in rows]:
        parser.error(f"`--rows` must be among {', '.join(rows)}, got {', '.join(unknown)}")
    if arguments.responses is not None and arguments.model is None:
        parser.error("`--responses` must come with the `--model` whose they are")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    all_rows = LOSSLESS_ROWS if arguments.lossless else ROWS
    check_writable(arguments.output_dir)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    random.seed(arguments.seed)
    make = make_own if arguments.responses else make_stories if arguments.model else make_word_problems
    task = make(arguments)
    path = arguments.output_dir / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    check_same_run(results, arguments)
    for name in arguments.rows:
        if name not in results:
            results[name] = run_row(task, all_rows[name], arguments)
            write_whole(path, (json.dumps(results, indent=2) + "\n").encode())
            print(name, json.dumps(results[name]), flush=True)
    shown = {name: results[name] for name in all_rows if name in results}
    rows = [
        [name, str(row["block_size"]), f"{row['tokens_per_forward']:.2f}", f"{row['quality']:.3f}"]
        for name, row in shown.items()
    ]
    print(format_table(("row", "n", "tokens per forward pass", task.quality), rows))
    draw(shown, task.quality, arguments.output_dir / "ablations.png")


if __name__ == "__main__":
    main()
