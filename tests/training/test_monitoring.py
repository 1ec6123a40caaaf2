"""Decoding in evaluation: what it counts, by slow references; that it changes nothing; where it is logged."""

import json
import logging
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model, make_word_model
from peft import LoraConfig, get_peft_model
from processes import TWO_PROCESSES
from transformers import TrainerCallback
from watched_runs import BLOCK_SIZE, good_responses, make_dataset, make_record, make_trainer

from cllm_hf import CLLMConfig
from cllm_hf.training.monitoring import METRICS, count_repeated, decoding_metrics, measure_decoding, to_metrics
from cllm_hf.trajectories.collector import draw_first_states


ROOT = Path(__file__).parents[2]


@pytest.fixture
def lively_model(tokenizer):
    """One of few stop tokens, whose responses are longer."""
    return make_model("llama", vocab_size=len(tokenizer), eos_token_id=[40, 41])


@pytest.fixture(scope="module")
def records():
    rng = np.random.default_rng(3)
    prompts = [rng.integers(3, 40, rng.integers(2, 8)).tolist() for _ in range(7)]
    made = [make_record(rng.integers(3, 40, 6 + 2 * n).tolist(), n, prompt) for n, prompt in enumerate(prompts)]
    made[2]["is_greedy"] = False
    return made


def slow_block(model, context, target, draft):
    """Fast-forwarded and stationary tokens of a block, by plain forward passes and by their definitions."""
    states, length = [draft[: len(target)]], len(target)
    while states[-1] != target:
        logits = model(torch.tensor([context + states[-1]])).logits[0]
        states.append(logits[len(context) - 1 : -1].argmax(-1).tolist())
    right = [[token == end for token, end in zip(state, target)] for state in states]
    leading = [next((i for i, is_right in enumerate(state) if not is_right), length) for state in right]
    stationary = sum(
        any(s[i] and not all(s[:i]) and all(later[i] for later in right[n:]) for n, s in enumerate(right))
        for i in range(length)
    )
    return sum(max(after - before - 1, 0) for before, after in zip(leading, leading[1:])), stationary


def by_name(measures):
    return dict(zip(METRICS, measures.tolist()))


@torch.no_grad()
def slow_measures(model, records, limit, stop_ids):
    """One prompt at a time, by public `generate` and plain forward passes."""
    counts = {name: [0, 0] for name in METRICS}

    def add(name, part, whole):
        counts[name][0] += part
        counts[name][1] += whole

    for record in records:
        prompt, target = record["prompt_ids"], record["response_ids"]
        output = model.generate(
            torch.tensor([prompt]),
            decoding="jacobi",
            jacobi_block_size=BLOCK_SIZE,
            max_new_tokens=limit,
            do_sample=False,
            return_dict_in_generate=True,
            eos_token_id=stop_ids,
        )
        response = output.sequences[0, len(prompt) :].tolist()
        add("response_tokens", len(response), 1)
        add("tokens_per_forward", len(response), output.jacobi_stats.num_forwards)
        first = draw_first_states(prompt, len(response), BLOCK_SIZE, 0, (0, 0)).tolist()
        for number, draft in enumerate(first):
            start = number * BLOCK_SIZE
            fast_forwarded, stationary = slow_block(
                model, prompt + response[:start], response[start : start + BLOCK_SIZE], draft
            )
            add("fast_forwarded", fast_forwarded, 1)
            add("stationary", stationary, 1)
        if record["is_greedy"]:
            for position, token in enumerate(target):
                logits = model(torch.tensor([prompt + target[:position]])).logits[0, -1]
                add("agreement", int(logits.argmax()) == token, 1)
                add("near_ties", 0, 1)
        for tokens, name in ((response, ""), (target[:limit], "target_")):
            ngrams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
            add(f"{name}repetition", sum(ngram in ngrams[:i] for i, ngram in enumerate(ngrams)), len(ngrams))
        add("target_response_tokens", len(target[:limit]), 1)
    return counts


@pytest.mark.parametrize("limit", [None, 11])
def test_counts_equal_the_slow_reference(lively_model, records, limit):
    # Half of each response is what the model says itself, so that it agrees on some tokens.
    mixed = []
    for record in records:
        said = lively_model.generate(
            torch.tensor([record["prompt_ids"]]), decoding="autoregressive", max_new_tokens=5, do_sample=False
        )[0, len(record["prompt_ids"]) :].tolist()
        mixed.append({**record, "response_ids": (said + record["response_ids"])[: len(record["response_ids"])]})
    expected = slow_measures(lively_model, mixed, limit or 18, [40, 41])
    for batch_size in (1, 3, 8):
        measured = by_name(
            measure_decoding(lively_model, mixed, BLOCK_SIZE, 0, [40, 41], max_new_tokens=limit, batch_size=batch_size)
        )
        # Random tokens of first drafts are drawn for a batch as a whole.
        speed = pytest.approx(expected["tokens_per_forward"], rel=0.1 if batch_size > 1 else 0)
        assert measured.pop("tokens_per_forward") == speed
        assert measured == {name: counts for name, counts in expected.items() if name != "tokens_per_forward"}
    assert 0 < expected["agreement"][0] < expected["agreement"][1]
    num_tokens, num_forwards = expected["tokens_per_forward"]
    assert num_forwards < num_tokens and expected["fast_forwarded"][0] > 0


def test_shares_of_processes_add_up(lively_model, records):
    options = (BLOCK_SIZE, 0, [40, 41], 12, 1)
    whole = measure_decoding(lively_model, records, *options)
    parts = [measure_decoding(lively_model, records[place::9], *options) for place in range(9)]
    assert torch.equal(sum(parts), whole)
    assert not parts[-1].any() and to_metrics(parts[-1]) == {}
    assert list(to_metrics(whole, "test_a")) == [f"test_a_{name}" for name in METRICS]
    num_agreed, num_compared = by_name(whole)["agreement"]
    assert to_metrics(whole)["eval_agreement"] == num_agreed / num_compared


def test_repeated_ngrams():
    assert count_repeated([1, 2, 3]) == (0, 0)
    assert count_repeated([7] * 10) == (6, 7)
    assert count_repeated([1, 2, 3, 4, 1, 2, 3, 4]) == (1, 5)
    assert count_repeated([1, 2, 1, 2], length=2) == (1, 3)


def test_the_model_is_left_as_it_was(tokenizer, records):
    options = {"vocab_size": len(tokenizer), "eos_token_id": [40, 41]}
    model = make_model("llama", attention_dropout=0.5, **options).train()
    model.model.layers[1].eval()
    model.config.use_cache = False
    model.generation_config.update(do_sample=True, temperature=0.3, repetition_penalty=7.0, use_cache=False)
    model.gradient_checkpointing_enable()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    config, defaults, had = model.config.to_dict(), model.generation_config, model.generation_config.to_dict()

    def random_states():
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()

    before = random_states()
    measured = measure_decoding(model, records, BLOCK_SIZE, 0, [40, 41])
    assert random_states() == before
    assert [module.training for module in model.modules()] == modes and True in modes and False in modes
    assert model.generation_config is defaults and defaults.to_dict() == had and model.config.to_dict() == config
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    # Neither its defaults nor its mode change what it says.
    assert torch.equal(measure_decoding(make_model("llama", **options), records, BLOCK_SIZE, 0, [40, 41]), measured)


def test_modes_come_back_after_an_error(lively_model, records):
    lively_model.train()
    with pytest.raises(IndexError):
        measure_decoding(lively_model, [{**records[0], "prompt_ids": [10**6]}], BLOCK_SIZE)
    assert all(module.training for module in lively_model.modules())


def test_texts_that_fill_all_positions():
    model = make_model("gpt2", n_positions=24)
    records = [make_record(list(range(3, 18)), 0, list(range(3, 12))), make_record([5, 6], 1)]
    measured = measure_decoding(model, records, BLOCK_SIZE)
    assert by_name(measured)["response_tokens"] == [30, 2]


def test_an_adapter_is_measured_with_its_weights(lively_model, records):
    bare = measure_decoding(lively_model, records, BLOCK_SIZE, 0, [40, 41])
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(lively_model, config)
    adapted = measure_decoding(model, records, BLOCK_SIZE, 0, [40, 41])
    assert not torch.equal(adapted, bare)
    assert torch.equal(measure_decoding(model.merge_and_unload(), records, BLOCK_SIZE, 0, [40, 41]), adapted)


def train_and_evaluate(tokenizer, tmp_path, peft=False, **options):
    torch.manual_seed(0)
    dataset = make_dataset(good_responses(12))
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", lora_dropout=0.1) if peft else None
    trainer = make_trainer(
        make_word_model(tokenizer),
        dataset.select(range(8)),
        tokenizer,
        tmp_path,
        dataset.select(range(8, 12)),
        config,
        eval_strategy="steps",
        eval_steps=1,
        max_steps=2,
        **options,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "kind",
    [
        "plain",
        "adapter",
        pytest.param("checkpointing", marks=pytest.mark.slow),
        pytest.param("bf16", marks=pytest.mark.slow),
    ],
)
def test_a_run_with_monitoring_gives_the_same_weights(tokenizer, tmp_path, kind):
    options = {
        "plain": {},
        "adapter": {"peft": True, "gradient_checkpointing": True, "bf16": True},
        "checkpointing": {"gradient_checkpointing": True},
        "bf16": {"bf16": True},
    }[kind]
    watched = train_and_evaluate(tokenizer, tmp_path / "a", **options)
    alone = train_and_evaluate(tokenizer, tmp_path / "b", num_monitored_prompts=0, on_collapse="ignore", **options)
    for (name, ours), theirs in zip(watched.model.named_parameters(), alone.model.parameters()):
        assert torch.equal(ours, theirs), name
    logs = [[log for log in one.state.log_history if "eval_loss" in log] for one in (watched, alone)]
    assert len(logs[0]) == len(logs[1]) == 2
    for ours, theirs in zip(*logs):
        measured = {f"eval_{name}" for name in METRICS}
        assert measured <= ours.keys() and not measured & theirs.keys()
        assert ours["eval_loss"] == theirs["eval_loss"]
        assert 1 / BLOCK_SIZE < ours["eval_tokens_per_forward"] <= BLOCK_SIZE
        assert 0 <= ours["eval_agreement"] <= 1 and 0 <= ours["eval_repetition"] <= 1
    assert not torch.distributed.is_initialized()


class Reporter(TrainerCallback):
    """What a service under `report_to` gets."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def test_measures_are_returned_logged_and_reported_in_one_entry(word_model, tokenizer, tmp_path):
    reporter = Reporter()
    dataset = make_dataset(good_responses(6))
    trainer = make_trainer(word_model, dataset, tokenizer, tmp_path, dataset, callbacks=[reporter])
    metrics = trainer.evaluate()
    entry = {name: value for name, value in trainer.state.log_history[-1].items() if name != "step"}
    assert entry == reporter.seen[-1]
    for name in ("loss", *METRICS):
        assert metrics[f"eval_{name}"] == entry[f"eval_{name}"]
    expected = measure_decoding(word_model, list(dataset), BLOCK_SIZE, 0, word_model.generation_config.eos_token_id)
    assert {name: metrics[name] for name in to_metrics(expected)} == to_metrics(expected)
    assert {f"late_{name}" for name in METRICS} <= trainer.evaluate(metric_key_prefix="late").keys()


def test_several_evaluation_datasets_have_names(word_model, tokenizer, tmp_path):
    dataset = make_dataset(good_responses(6))
    parts = {"first": dataset.select([0, 1]), "second": dataset.select([2, 3, 4])}
    metrics = make_trainer(word_model, dataset, tokenizer, tmp_path, parts).evaluate()
    for part, rows in parts.items():
        expected = measure_decoding(word_model, list(rows), BLOCK_SIZE, 0, word_model.generation_config.eos_token_id)
        for name, value in to_metrics(expected, f"eval_{part}").items():
            assert metrics[name] == value


def test_options_choose_prompts_and_length(word_model, tokenizer, tmp_path):
    dataset = make_dataset(good_responses(6))
    stop_ids = word_model.generation_config.eos_token_id
    trainer = make_trainer(
        word_model, dataset, tokenizer, tmp_path, dataset, num_monitored_prompts=2, monitored_max_new_tokens=3
    )
    metrics = trainer.evaluate()
    expected = to_metrics(measure_decoding(word_model, list(dataset)[:2], BLOCK_SIZE, 0, stop_ids, 3))
    assert {name: metrics[name] for name in expected} == expected and metrics["eval_target_response_tokens"] == 3
    streamed = trainer.evaluate(dataset.to_iterable_dataset())
    assert {name: streamed[name] for name in expected} == expected


def test_none_is_decoded_if_none_is_asked_for(word_model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(type(word_model), "generate", lambda *_, **__: pytest.fail("decoded"))
    dataset = make_dataset(good_responses(4))
    trainer = make_trainer(word_model, dataset, tokenizer, tmp_path, dataset, num_monitored_prompts=0)
    assert "eval_tokens_per_forward" not in trainer.evaluate()


def test_agreement_is_left_out_where_nothing_is_greedy(word_model, tokenizer, tmp_path):
    dataset = make_dataset(good_responses(4))
    other = dataset.map(lambda row: {"is_greedy": False})
    metrics = make_trainer(word_model, dataset, tokenizer, tmp_path, other).evaluate()
    assert "eval_agreement" not in metrics and metrics["eval_tokens_per_forward"] > 0
    without = make_trainer(word_model, dataset, tokenizer, tmp_path, dataset.remove_columns("is_greedy")).evaluate()
    assert without["eval_agreement"] >= 0


def test_the_best_checkpoint_by_tokens_per_forward(word_model, tokenizer, tmp_path):
    dataset = make_dataset(good_responses(8))
    trainer = make_trainer(
        word_model,
        dataset,
        tokenizer,
        tmp_path,
        dataset,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="tokens_per_forward",
    )
    trainer.train()
    measured = {log["step"]: log["eval_tokens_per_forward"] for log in trainer.state.log_history if "eval_loss" in log}
    assert trainer.state.best_metric == max(measured.values()) and len(measured) == 3
    assert measured[trainer.state.best_global_step] == trainer.state.best_metric
    assert trainer.evaluate()["eval_tokens_per_forward"] == trainer.state.best_metric


def test_weights_spread_over_processes_are_left_alone(word_model, tokenizer, tmp_path, monkeypatch, caplog):
    dataset = make_dataset(good_responses(4))
    trainer = make_trainer(word_model, dataset, tokenizer, tmp_path, dataset)
    dataloader = trainer.get_eval_dataloader()
    assert decoding_metrics(trainer, dataloader, "eval")
    monkeypatch.setattr(type(word_model), "generate", lambda *_, **__: pytest.fail("decoded"))
    trainer.is_fsdp_enabled = True
    with caplog.at_level(logging.WARNING):
        assert decoding_metrics(trainer, dataloader, "eval") == decoding_metrics(trainer, dataloader, "eval") == {}
    assert caplog.text.count("Prompts are not decoded in evaluation") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_monitored_prompts": -1}, "`num_monitored_prompts`"),
        ({"num_monitored_prompts": 1.5}, "`num_monitored_prompts`"),
        ({"num_monitored_prompts": True}, "`num_monitored_prompts`"),
        ({"num_monitored_prompts": None}, "`num_monitored_prompts`"),
        ({"monitored_max_new_tokens": 0}, "`monitored_max_new_tokens`"),
        ({"on_collapse": "die"}, "`on_collapse`"),
    ],
)
def test_options_that_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        CLLMConfig(output_dir=str(tmp_path), bf16=False, **options)


SCRIPT = """
import json, sys
import torch
from accelerate import PartialState
from conftest import make_word_model
from cllm_hf.demo.problems import make_tokenizer
from tasks.models import leave_others, release
from watched_runs import good_responses, make_dataset, make_trainer

folder, tokenizer = sys.argv[1], make_tokenizer()
dataset = make_dataset(good_responses(7))
found = {}
for count in (7, 3, 1):
    model = make_word_model(tokenizer)
    trainer = make_trainer(model, dataset, tokenizer, folder, dataset, num_monitored_prompts=count)
    found[count] = trainer.evaluate()
# Stopped together: a learning rate that destroys the model.
trainer = make_trainer(
    make_word_model(tokenizer), dataset, tokenizer, folder, dataset, learning_rate=1.0, max_steps=30,
    per_device_train_batch_size=2, eval_strategy="steps", eval_steps=1, on_collapse="stop", plot_run=True,
)
trainer.train()
trainer.save_model()
found["steps"] = trainer.state.global_step
state = PartialState()
with open(f"{folder}/{state.num_processes}-{state.process_index}.json", "w") as file:
    json.dump(found, file)
# A process that ends while gloo's threads run may abort.
release(trainer)
leave_others()
"""


@pytest.mark.slow
def test_two_processes_measure_what_one_does_and_stop_together(tmp_path):
    (tmp_path / "run.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'examples'}", "OMP_NUM_THREADS": "1"}
    for launcher in ([sys.executable], TWO_PROCESSES):
        command = [*launcher, str(tmp_path / "run.py"), str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    one, first, second = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("1-0", "2-0", "2-1"))
    for count in ("7", "3", "1"):
        for name in METRICS:
            if f"eval_{name}" not in one[count]:
                assert name.endswith("repetition") and f"eval_{name}" not in {**first[count], **second[count]}
                continue
            value = one[count][f"eval_{name}"]
            assert first[count][f"eval_{name}"] == second[count][f"eval_{name}"]
            # Random tokens of first drafts are drawn for a batch as a whole.
            rel = 0.1 if name == "tokens_per_forward" else 1e-9
            assert first[count][f"eval_{name}"] == pytest.approx(value, rel=rel)
    assert first["steps"] == second["steps"] < 30
    assert (tmp_path / "training.png").is_file()
