"""Trainers of trl that generate: `GRPOTrainer` samples by Jacobi decoding where its model or its options say so."""

import pytest
from conftest import make_word_model
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

import cllm_hf
from cllm_hf.decoding import loop
from cllm_hf.demo.problems import make_problems


@pytest.mark.slow
@pytest.mark.parametrize("options", [None, {"jacobi_block_size": 8, "jacobi_candidates": 2}], ids=str)
def test_samples_of_grpo(tokenizer, tmp_path, monkeypatch, options):
    model, gains, texts, lay_out = make_word_model(tokenizer), [], [], loop.lay_out_sequences
    if options is None:
        cllm_hf.set_jacobi_defaults(model, block_size=8)

    def watched(input_ids, rows, pad_id):
        gains.extend(row.gains for row in rows)
        return lay_out(input_ids, rows, pad_id)

    monkeypatch.setattr(loop, "lay_out_sequences", watched)

    def reward(completions, **_):
        texts.extend(completions)
        return [float(len(text)) for text in completions]

    trainer = GRPOTrainer(
        model,
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=24,
            generation_kwargs=options,
            report_to=[],
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_list([{"prompt": problem.prompt} for problem in make_problems(4, 0, 9)]),
        processing_class=tokenizer,
    )
    trainer.train()
    assert len(texts) == 8 and len(set(texts)) > 1
    assert len(gains) == 8 and max(map(max, gains)) > 1
