"""
Make a real pretrained story model a CLLM, with nothing but the model itself as data.

    python examples/stories.py --model ../shared/models/stories260k

Prompts are sampled from the model, its greedy continuations are the responses, and the states that it is trained on
are those of its own Jacobi decoding while it learns. Prints tokens per forward pass before and after, on held-out
prompts, and checks that Jacobi decoding returns the greedy tokens for every one of them.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from cllm_hf import CLLMConfig, CLLMTrainer, TrajectoryBuilder
from cllm_hf.cards import format_table
from cllm_hf.evaluation.benchmark import DecodingMethod, DecodingResult, benchmark_decoding
from cllm_hf.files import check_writable


def sample_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, length: int, batch_size: int = 128
) -> list[str]:
    """Distinct story beginnings of `length` tokens, sampled from the model."""
    start = torch.full((batch_size, 1), model.config.bos_token_id, device=model.device)
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        # Without its stop tokens: one of them also begins a story.
        sampled = model.generate(
            start, do_sample=True, min_new_tokens=length, max_new_tokens=length, decoding="autoregressive"
        )
        prompts.update(dict.fromkeys(tokenizer.batch_decode(sampled, skip_special_tokens=True)))
    return list(prompts)[:count]


def evaluate(model: PreTrainedModel, prompts: list[list[int]], arguments: argparse.Namespace) -> list[DecodingResult]:
    """Decode held-out prompts by `generate()` and by Jacobi; the tokens must be equal."""
    options = {"decoding": "jacobi", "jacobi_block_size": arguments.block_size}
    methods = [
        DecodingMethod("generate()", model, {"decoding": "autoregressive"}),
        DecodingMethod("jacobi", model, options),
    ]
    results = benchmark_decoding(methods, prompts, arguments.max_new_tokens)
    num_equal = sum(a == b for a, b in zip(results[0].responses, results[1].responses))
    print(f"Jacobi equals greedy on {num_equal} of {len(prompts)} held-out prompts.")
    return results


@torch.no_grad()
def agreement(model: PreTrainedModel, prompts: list[list[int]], responses: list[list[int]]) -> float:
    """Share of the target model's greedy tokens that the model, given those before, would write too."""
    num_equal = 0
    for prompt, response in zip(prompts, responses):
        logits = model(torch.tensor([prompt + response], device=model.device)).logits[0, len(prompt) - 1 : -1]
        num_equal += int((logits.argmax(-1).cpu() == torch.tensor(response)).sum())
    return num_equal / sum(map(len, responses))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder or Hub id of a causal language model")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/stories"), help="where to save the CLLM")
    parser.add_argument("--num-prompts", type=int, default=6144, help="prompts to train on")
    parser.add_argument("--num-held-out", type=int, default=64, help="prompts to measure on")
    parser.add_argument("--prompt-length", type=int, default=16, help="sampled tokens of a prompt")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens of a response")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--ar-loss-weight", type=float, default=2.0)
    parser.add_argument("--position-decay", type=float, default=4.0)
    parser.add_argument("--trajectory-source", default="online", choices=("dataset", "online"))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    check_writable(arguments.output_dir)
    set_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval().to(device)
    count = arguments.num_held_out + arguments.num_prompts
    prompts = sample_prompts(model, tokenizer, count, arguments.prompt_length)
    held_out = [tokenizer(prompt)["input_ids"] for prompt in prompts[: arguments.num_held_out]]
    before = evaluate(model, held_out, arguments)

    builder = TrajectoryBuilder(
        model,
        processing_class=tokenizer,
        block_size=arguments.block_size,
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
    )
    dataset = builder.build(prompts[arguments.num_held_out :])
    print(f"Trajectories: {dict(builder.counts)}")

    args = CLLMConfig(
        output_dir=str(arguments.output_dir),
        max_steps=arguments.updates,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(40, arguments.updates // 10),
        ar_loss_weight=arguments.ar_loss_weight,
        position_decay=arguments.position_decay,
        trajectory_source=arguments.trajectory_source,
        block_size=arguments.block_size,
        bf16=torch.cuda.is_available(),
        gradient_checkpointing=False,
        logging_steps=50,
        save_strategy="no",
        report_to=[],
        seed=arguments.seed,
    )
    trainer = CLLMTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()

    after = evaluate(trainer.model.eval(), held_out, arguments)
    report = [
        {
            "method": f"{name}, {result.name}",
            "tokens/s": round(result.tokens_per_second),
            "tokens per forward pass": round(result.tokens_per_forward, 2),
            "speed-up": round(result.speedup_over(results[0]), 2),
        }
        for name, results in (("before", before), ("after", after))
        for result in results
    ]
    print(format_table(list(report[0]), [[str(value) for value in row.values()] for row in report]))
    agreed = agreement(trainer.model, held_out, before[0].responses)
    print(f"Agreement with the target model's greedy tokens: {agreed:.3f}")
    path = arguments.output_dir / "report.json"
    path.write_text(json.dumps({"decoding": report, "agreement": agreed}, indent=2) + "\n")
    print(f"Saved the CLLM and {path.name} to {arguments.output_dir}.")


if __name__ == "__main__":
    main()
