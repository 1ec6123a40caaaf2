"""
Make a real pretrained story model a CLLM, with nothing but the model itself as data.

    python examples/stories.py --model ../shared/models/stories260k

Prompts are sampled from the model, its greedy continuations are the responses. Prints tokens per forward before and
after, on held-out prompts, and checks that Jacobi decoding returns the greedy tokens for every one of them.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from cllm_hf import CLLMConfig, CLLMTrainer, TrajectoryBuilder
from cllm_hf.evaluation.benchmark import DecodingMethod, DecodingResult, benchmark_decoding
from cllm_hf.evaluation.report import format_table


def sample_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, length: int, batch_size: int = 128
) -> list[str]:
    """Distinct story beginnings of `length` tokens, sampled from the model."""
    start = torch.full((batch_size, 1), model.config.bos_token_id)
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        # Without its stop tokens: one of them also begins a story.
        sampled = model.generate(
            start, do_sample=True, min_new_tokens=length, max_new_tokens=length, decoding="autoregressive"
        )
        prompts.update(dict.fromkeys(tokenizer.batch_decode(sampled, skip_special_tokens=True)))
    return list(prompts)[:count]


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], arguments: argparse.Namespace
) -> list[DecodingResult]:
    """Decode held-out prompts by `generate()` and by Jacobi; the tokens must be equal."""
    options = {"decoding": "jacobi", "jacobi_block_size": arguments.block_size}
    methods = [
        DecodingMethod("generate()", model, {"decoding": "autoregressive"}),
        DecodingMethod("jacobi", model, options),
    ]
    prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    results = benchmark_decoding(methods, prompt_ids, arguments.max_new_tokens)
    num_equal = sum(a == b for a, b in zip(results[0].responses, results[1].responses))
    print(f"Jacobi equals greedy on {num_equal} of {len(prompts)} held-out prompts.")
    return results


def agreement(result: DecodingResult, reference: DecodingResult) -> float:
    """Share of the reference's tokens that stand at the same place."""
    pairs = list(zip(result.responses, reference.responses))
    return sum(a == b for ours, theirs in pairs for a, b in zip(ours, theirs)) / reference.num_tokens


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder or Hub id of a causal language model")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/stories"), help="where to save the CLLM")
    parser.add_argument("--num-prompts", type=int, default=2048, help="prompts to train on")
    parser.add_argument("--num-held-out", type=int, default=64, help="prompts to measure on")
    parser.add_argument("--prompt-length", type=int, default=16, help="sampled tokens of a prompt")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens of a response")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--updates", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--ar-loss-weight", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    set_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    count = arguments.num_held_out + arguments.num_prompts
    prompts = sample_prompts(model, tokenizer, count, arguments.prompt_length)
    held_out, prompts = prompts[: arguments.num_held_out], prompts[arguments.num_held_out :]
    before = evaluate(model, tokenizer, held_out, arguments)

    builder = TrajectoryBuilder(
        model,
        processing_class=tokenizer,
        block_size=arguments.block_size,
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
        batch_size=64,
    )
    dataset = builder.build(prompts)
    print(f"Trajectories: {dict(builder.counts)}")

    args = CLLMConfig(
        output_dir=str(arguments.output_dir),
        max_steps=arguments.updates,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(40, arguments.updates // 10),
        ar_loss_weight=arguments.ar_loss_weight,
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

    after = evaluate(trainer.model.eval(), tokenizer, held_out, arguments)
    rows, report = [], []
    for name, results in (("before", before), ("after", after)):
        for result in results:
            figures = {
                "tokens/s": round(result.tokens_per_second),
                "tokens per forward": round(result.tokens_per_forward, 3),
                "speed-up": round(result.speedup_over(results[0]), 2),
                "agreement with the target model": round(agreement(result, before[0]), 3),
            }
            rows.append([f"{name}, {result.name}", *map(str, figures.values())])
            report.append({"method": rows[-1][0], **figures})
    print(format_table(("method", *list(report[0])[1:]), rows))
    path = arguments.output_dir / "report.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"Saved the CLLM and {path.name} to {arguments.output_dir}.")


if __name__ == "__main__":
    main()
