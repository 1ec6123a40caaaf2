"""CLLMTrainer: its loss against slow references, equivalences, adapters, what it saves and what it refuses."""

import copy
import math
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import make_word_model
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, AutoTokenizer

import cllm_hf
from cllm_hf import CleaningRules, CLLMConfig, CLLMTrainer, TrajectoryBuilder, load_cllm
from cllm_hf.demo.problems import make_problems
from cllm_hf.training.collator import TrajectoryCollator
from cllm_hf.training.losses import ar_cross_entropy, forward_kl
from cllm_hf.training.states import wrong_context
from cllm_hf.trajectories.augmentation import augment_states
from cllm_hf.trajectories.schema import features


BLOCK_SIZE = 5


@pytest.fixture(scope="module")
def dataset(tokenizer):
    builder = TrajectoryBuilder(
        make_word_model(tokenizer),
        processing_class=tokenizer,
        block_size=BLOCK_SIZE,
        max_new_tokens=18,
        cleaning=CleaningRules(max_token_run=None, max_sentence_repeats=None, drop_empty=False),
        show_progress=False,
    )
    return builder.build([problem.prompt for problem in make_problems(16, seed=5)])


def make_trainer(model, dataset, tokenizer, output_dir, peft_config=None, **options):
    defaults = {
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    args = CLLMConfig(output_dir=str(output_dir), **{**defaults, **options})
    return CLLMTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer, peft_config=peft_config)


def reference_losses(model, batch):
    """Plain forwards, one block at a time: sums over positions and their numbers."""
    consistency, ar, num_consistency, num_ar = 0.0, 0.0, 0, 0
    for row in range(len(batch["clean_ids"])):
        sequence = batch["clean_ids"][row, : int(batch["clean_mask"][row].sum())]
        clean = model(sequence[None]).logits[0]
        for position in (batch["labels"][row] != -100).nonzero()[:, 0].tolist():
            ar = ar - clean[position - 1].log_softmax(-1)[batch["labels"][row, position]]
            num_ar += 1
        drafts, prompt_length = batch["draft_blocks"], int(batch["prompt_lengths"][row])
        for block in drafts.mask[row].nonzero()[:, 0].tolist():
            anchor, state = prompt_length - 1 + int(drafts.offsets[row, block]), drafts.states[row, block]
            logits = model(torch.cat([sequence[: anchor + 1], state[:-1]])[None]).logits[0, anchor:]
            fixed_point = sequence[anchor + 1 : anchor + 1 + BLOCK_SIZE]
            for i in range(1, len(fixed_point)):
                if (state[:i] != fixed_point[:i]).any():
                    p, q = clean[anchor + i].detach().log_softmax(-1), logits[i].log_softmax(-1)
                    consistency = consistency + (p.exp() * (p - q)).sum()
                    num_consistency += 1
    return consistency, ar, num_consistency, num_ar


@pytest.mark.parametrize("weight", [0.0, 1.0, 7.5])
def test_loss_and_gradient_equal_the_slow_reference(word_model, tokenizer, dataset, tmp_path, weight):
    trainer = make_trainer(word_model, dataset, tokenizer, tmp_path, ar_loss_weight=weight)
    trainer.model.train()
    batch = trainer._prepare_batch(word_model, trainer.data_collator(list(dataset.select(range(6)))))
    loss = trainer.compute_loss(trainer.model.train(), batch)
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in word_model.named_parameters()}
    word_model.zero_grad()
    consistency, ar, num_consistency, num_ar = reference_losses(word_model, batch)
    assert num_consistency > 20 and num_ar > 20
    expected = consistency / num_consistency + weight * ar / num_ar
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in word_model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-4)


def test_gradient_accumulation_equals_a_larger_batch(word_model, tokenizer, dataset, tmp_path):
    """Responses differ in length, so that a mean of means would be another gradient."""
    assert len({len(record["response_ids"]) for record in dataset}) > 1
    weights, logs = [], []
    for batch_size, steps in ((8, 1), (2, 4), (1, 8)):
        model = copy.deepcopy(word_model)
        trainer = make_trainer(
            model,
            dataset,
            tokenizer,
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
            max_steps=2,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
        )
        # States are drawn in the order of the records, so the same seed draws the same ones.
        trainer.train()
        weights.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
        logs.append([log for log in trainer.state.log_history if "consistency_loss" in log])
    assert not torch.allclose(weights[0], torch.cat([p.flatten() for p in word_model.parameters()]), atol=1e-3)
    for other, log in zip(weights[1:], logs[1:]):
        torch.testing.assert_close(weights[0], other, atol=1e-5, rtol=1e-4)
        for ours, theirs in zip(logs[0], log):
            for name in ("loss", "consistency_loss", "ar_loss", "consistency_tokens", "ar_tokens"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4)


def test_losses_and_counts_are_logged_and_add_up(word_model, tokenizer, dataset, tmp_path):
    trainer = make_trainer(word_model, dataset, tokenizer, tmp_path, ar_loss_weight=3.0, max_steps=3)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 3
    for log in logs:
        assert log["loss"] == pytest.approx(log["consistency_loss"] + 3.0 * log["ar_loss"], rel=1e-3)
        assert log["consistency_tokens"] > 0 and log["ar_tokens"] > 0
    metrics = trainer.evaluate(dataset)
    assert metrics["eval_loss"] > 0
    assert {"eval_consistency_loss", "eval_ar_loss"} <= set(trainer.state.log_history[-1])


def test_training_makes_blocks_converge_sooner(word_model, tokenizer, dataset, tmp_path):
    def tokens_per_forward():
        num_tokens = num_forwards = 0
        for record in dataset:
            ids = torch.tensor([record["prompt_ids"]])
            options = {"do_sample": False, "max_new_tokens": 18}
            greedy = word_model.generate(ids, decoding="autoregressive", **options)
            output = word_model.generate(ids, return_dict_in_generate=True, jacobi_block_size=BLOCK_SIZE, **options)
            assert output.sequences.tolist() == greedy.tolist()
            num_tokens += output.jacobi_stats.num_generated[0]
            num_forwards += output.jacobi_stats.num_forwards
        return num_tokens / num_forwards

    before = tokens_per_forward()
    make_trainer(
        word_model, dataset, tokenizer, tmp_path, max_steps=100, per_device_train_batch_size=16, learning_rate=5e-3
    ).train()
    word_model.eval()
    assert tokens_per_forward() > 1.3 * before


def test_saved_model_decodes_by_jacobi(word_model, tokenizer, dataset, tmp_path):
    trainer = make_trainer(word_model, dataset, tokenizer, tmp_path)
    trainer.train()
    trainer.save_model()
    ids = torch.tensor([dataset[0]["prompt_ids"]])
    for model in (AutoModelForCausalLM.from_pretrained(tmp_path), load_cllm(str(tmp_path))):
        output = model.generate(ids, max_new_tokens=10, return_dict_in_generate=True)
        assert isinstance(output, cllm_hf.JacobiOutput)
        assert model.generation_config.jacobi_block_size == BLOCK_SIZE
    assert AutoTokenizer.from_pretrained(tmp_path).decode([5]) == tokenizer.decode([5])
    with pytest.raises(ValueError, match="Drop `base_model`"):
        load_cllm(tmp_path, base_model=word_model)


def test_missing_folder_is_reported(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        load_cllm(tmp_path / "nowhere")


def test_model_by_name(word_model, tokenizer, dataset, tmp_path):
    word_model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    trainer = make_trainer(str(tmp_path / "base"), dataset, None, tmp_path)
    trainer.train()
    assert trainer.block_size == BLOCK_SIZE


def test_collator_draws_any_state_but_the_fixed_point(dataset):
    collator = TrajectoryCollator(BLOCK_SIZE)
    record = dataset[0]
    seen = [set() for _ in record["states"]]
    for _ in range(200):
        for number, state in enumerate(collator([record])["states"][0].tolist()):
            seen[number].add(tuple(state))
    for states, drawn in zip(record["states"], seen):
        assert drawn == {tuple(state) for state in states[:-1]}


def test_collator_draws_augmented_states_as_often_as_others(dataset):
    record = max(dataset, key=lambda record: len(record["states"]))
    states = [[[number, j, 0, 0, 0] for j in range(3)] + [block[-1]] for number, block in enumerate(record["states"])]
    augmented = [[[number, 5 + j, 0, 0, 0] for j in range(number % 3)] for number in range(len(states))]
    record = {**record, "states": states, "augmented_states": augmented}
    collator = TrajectoryCollator(BLOCK_SIZE)
    torch.manual_seed(0)
    drawn = [Counter() for _ in states]
    for _ in range(600):
        batch = collator([record])
        for number, state in enumerate(batch["states"][0].tolist()):
            drawn[number][tuple(state)] += 1
    for counts, block, extra in zip(drawn, states, augmented):
        candidates = {tuple(state) for state in block[:-1] + extra}
        assert counts.keys() == candidates
        assert min(counts.values()) > 600 / len(candidates) * 0.7
    assert sorted(map(len, drawn))[-1] == 5
    # The targets are the fixed points still, and a response that is cut loses the augmented states of its last blocks.
    fixed_points = torch.tensor([block[-1] for block in states])
    mask, expected = batch["consistency_mask"][0], wrong_context(batch["states"][0], fixed_points)
    length = len(record["response_ids"])
    assert torch.equal(mask.flatten()[:length], expected.flatten()[:length]) and mask.any()
    short = TrajectoryCollator(BLOCK_SIZE, max_length=len(record["prompt_ids"]) + 2 * BLOCK_SIZE)([record])
    assert short["states"].shape == (1, 2, BLOCK_SIZE)


def test_augmented_states_of_a_dataset_reach_the_collator(word_model, tokenizer, dataset, tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for record in dataset:
        lengths = [len(record["response_ids"]) - BLOCK_SIZE * number for number in range(len(record["states"]))]
        augmented = [
            augment_states(block, min(length, BLOCK_SIZE), rng) for block, length in zip(record["states"], lengths)
        ]
        rows.append({**record, "augmented_states": augmented})
    assert sum(len(block) for row in rows for block in row["augmented_states"]) > 20
    trainer = make_trainer(
        word_model, Dataset.from_list(rows, features=features(augmented=True)), tokenizer, tmp_path, max_steps=2
    )
    collate, seen = trainer.data_collator, []
    trainer.data_collator = lambda records: seen.extend(records) or collate(records)
    trainer.train()
    assert len(seen) >= 8 and all(record["augmented_states"] is not None for record in seen)
    assert list(features(augmented=True)) == [*cllm_hf.FEATURES, "augmented_states"] and features() == cllm_hf.FEATURES


def test_without_augmented_states_the_same_states_are_drawn(dataset):
    rows = list(dataset)
    none = [{**row, "augmented_states": None} for row in rows]
    empty = [{**row, "augmented_states": [[] for _ in row["states"]]} for row in rows]
    batches = []
    for same in (rows, none, empty):
        torch.manual_seed(0)
        batches.append(TrajectoryCollator(BLOCK_SIZE)(same))
    for batch in batches[1:]:
        assert all(torch.equal(batch[name], batches[0][name]) for name in batch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda extra: extra[:-1],
            "`augmented_states` must have a list of states for each block, with 5 tokens",
        ),
        (lambda extra: [[[1, 2, 3]], *extra[1:]], r"lengths \[3\] in record"),
        (lambda extra: [*extra, []], "`augmented_states` must have"),
    ],
)
def test_augmented_states_that_do_not_fit_are_refused(dataset, change, message):
    record = dataset[0]
    record = {**record, "augmented_states": change([[] for _ in record["states"]])}
    with pytest.raises(ValueError, match=message):
        TrajectoryCollator(BLOCK_SIZE)([record])


def test_consistency_mask_is_where_the_context_holds_a_wrong_token(dataset):
    batch = TrajectoryCollator(BLOCK_SIZE)(list(dataset))
    for row, record in enumerate(dataset):
        for number in range(batch["states"].shape[1]):
            fixed_point = record["response_ids"][number * BLOCK_SIZE : (number + 1) * BLOCK_SIZE]
            state = batch["states"][row, number].tolist()
            expected = [state[:i] != fixed_point[:i] for i in range(len(fixed_point))]
            expected += [False] * (BLOCK_SIZE - len(expected))
            assert batch["consistency_mask"][row, number].tolist() == expected
    assert not wrong_context(torch.tensor([[1, 2, 3]]), torch.tensor([[1, 2, 4]])).any()


def test_long_responses_lose_their_last_blocks(dataset):
    record = max(dataset, key=lambda record: len(record["response_ids"]))
    prompt_length = len(record["prompt_ids"])
    batch = TrajectoryCollator(BLOCK_SIZE, max_length=prompt_length + 2 * BLOCK_SIZE + 1)([record])
    assert batch["states"].shape == (1, 2, BLOCK_SIZE)
    assert batch["clean_ids"].shape[1] == prompt_length + 2 * BLOCK_SIZE
    with pytest.raises(ValueError, match="leaves no room"):
        TrajectoryCollator(BLOCK_SIZE, max_length=prompt_length + 1)([record])


def test_forward_kl_limits_and_gradient():
    torch.manual_seed(0)
    logits = torch.randn(6, 9, dtype=torch.float64).float().requires_grad_()
    target = torch.randn(6, 9).requires_grad_()
    loss = forward_kl(logits, target)
    p, q = target.softmax(-1), logits.softmax(-1)
    torch.testing.assert_close(loss, (p * (p / q).log()).sum(-1))
    loss.sum().backward()
    assert target.grad is None
    torch.testing.assert_close(logits.grad, q - p)
    torch.testing.assert_close(forward_kl(logits, logits), torch.zeros(6), atol=1e-6, rtol=0)
    certain = torch.full((1, 4), -math.inf)
    certain[0, 2] = 0.0
    torch.testing.assert_close(forward_kl(torch.zeros(1, 4), certain), torch.tensor([math.log(4)]))


def test_ar_cross_entropy():
    logits, tokens = torch.randn(5, 7), torch.tensor([0, 6, 3, 3, 1])
    expected = torch.stack([-row.log_softmax(-1)[token] for row, token in zip(logits, tokens)])
    torch.testing.assert_close(ar_cross_entropy(logits, tokens), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": True}, "`packing=True` has no place in consistency training"),
        ({"assistant_only_loss": True}, "assistant_only_loss"),
        ({"loss_type": "dft"}, "loss_type"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"pad_to_multiple_of": 64}, "pad_to_multiple_of"),
        ({"dataset_kwargs": {"add_special_tokens": False}}, "dataset_kwargs"),
        ({"ar_loss_weight": -1.0}, "`ar_loss_weight` must be at least 0, got -1.0"),
        ({"block_size": 0}, "`block_size` must be an integer of at least 1, got 0"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        CLLMConfig(output_dir=str(tmp_path), bf16=False, **options)


def test_datasets_that_are_refused(word_model, tokenizer, dataset, tmp_path):
    longest = max(dataset, key=lambda record: len(record["response_ids"]))
    for bad, message in (
        (dataset.remove_columns("states"), "states missing"),
        (dataset.select([]), "empty"),
        (None, "`train_dataset` is required"),
        (Dataset.from_list([{**longest, "states": longest["states"][:-1]}]), "blocks of states"),
        (
            Dataset.from_list(
                [dataset[0], {**dataset[1], "states": [[s[:-1] for s in b] for b in dataset[1]["states"]]}]
            ),
            "Every state must have `block_size` tokens",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(word_model, bad, tokenizer, tmp_path)
    with pytest.raises(ValueError, match="Every state must have `block_size` tokens, 16"):
        make_trainer(word_model, dataset, tokenizer, tmp_path, block_size=16)


def test_other_arguments_that_are_refused(word_model, tokenizer, dataset, tmp_path):
    from transformers import TrainingArguments

    with pytest.raises(ValueError, match="must be a `cllm_hf.CLLMConfig`, got TrainingArguments"):
        CLLMTrainer(word_model, args=TrainingArguments(output_dir=str(tmp_path)), train_dataset=dataset)
    with pytest.raises(OSError, match="The output folder must be writable, got '/proc/cllm'"):
        make_trainer(word_model, dataset, tokenizer, "/proc/cllm")
    args = CLLMConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True)
    for name in ("data_collator", "compute_loss_func", "compute_metrics", "formatting_func"):
        with pytest.raises(ValueError, match=f"own collator, loss and metrics, got a `{name}`"):
            CLLMTrainer(word_model, args=args, train_dataset=dataset, **{name: lambda *_: {}})


def test_a_dictionary_of_splits_is_refused(word_model, dataset, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="got a dictionary of train, test. Pass one of them"):
        make_trainer(word_model, DatasetDict(train=dataset, test=dataset), tokenizer, tmp_path)
