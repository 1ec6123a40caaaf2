"""CLLMTrainer: its loss against slow references, equivalences, adapters, what it saves and what it refuses."""

import copy
import multiprocessing

import numpy as np
import pytest
import torch
from conftest import make_model, make_word_model
from datasets import Dataset, DatasetDict
from training_cases import BLOCK_SIZE, gradients_of, make_record, prepare, reference_losses
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import cllm_hf
from cllm_hf import CleaningRules, CLLMConfig, CLLMTrainer, TrajectoryBuilder, load_cllm
from cllm_hf.demo.problems import make_problems
from cllm_hf.trajectories.collector import augment_states
from cllm_hf.trajectories.schema import features


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


def make_trainer(model, dataset, tokenizer, output_dir, peft_config=None, eval_dataset=None, **options):
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
    return CLLMTrainer(
        model,
        args=args,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=peft_config,
    )


@pytest.mark.parametrize("weight", [0.0, 7.5])
def test_loss_and_gradient_equal_the_slow_reference(word_model, tokenizer, dataset, tmp_path, weight):
    trainer = make_trainer(word_model, dataset, tokenizer, tmp_path, ar_loss_weight=weight)
    records = list(dataset.select(range(6)))
    batch, objective = prepare(word_model, records, update=0)
    loss = trainer.compute_loss(trainer.model.train(), trainer.data_collator(records))
    consistency, ar, weight_sum, num_ar = reference_losses(word_model, batch, objective)
    assert weight_sum > 20 and num_ar > 20
    expected = consistency / weight_sum + weight * ar / num_ar
    torch.testing.assert_close(loss, expected)
    gradients, expected = gradients_of(loss, word_model), gradients_of(expected, word_model)
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], atol=1e-5, rtol=1e-4)


ACCUMULATED = {
    "global": {},
    "local": {"consistency": "local"},
    "online": {"trajectory_source": "online", "block_size": BLOCK_SIZE},
    "decay": {"position_decay": 2.0, "states_per_block": 2},
    "ground truth": {"ar_labels": "ground_truth", "ar_label_smoothing": 0.1},
}


@pytest.mark.parametrize(
    "setting",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in ("local", "decay"))) for name in ACCUMULATED],
)
def test_gradient_accumulation_equals_a_larger_batch(word_model, tokenizer, dataset, tmp_path, setting):
    """Responses and answers differ in length, so that a mean of means would be another gradient."""
    assert len({len(record["response_ids"]) for record in dataset}) > 1
    dataset = dataset.map(lambda record, row: {"label_ids": record["response_ids"][: 1 + row % 5]}, with_indices=True)
    weights, logs = [], []
    for batch_size, steps in ((8, 1), (2, 4), *[(1, 8)] * (setting == "global")):
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
            **ACCUMULATED[setting],
        )
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


def test_a_stream_trains_and_evaluates_as_the_dataset_does(word_model, tokenizer, dataset, tmp_path):
    """accelerate rebuilds and slices the batches of a stream; the last one of an epoch has one record."""
    dataset, evaluated = dataset.select(range(9)), dataset.select(range(5))
    logs = []
    for is_stream in (False, True):
        trainer = make_trainer(
            copy.deepcopy(word_model),
            dataset.to_iterable_dataset() if is_stream else dataset,
            tokenizer,
            tmp_path,
            eval_dataset=evaluated.to_iterable_dataset() if is_stream else evaluated,
            eval_strategy="steps",
            eval_steps=2,
            max_steps=4,
            train_sampling_strategy="sequential",
            num_monitored_prompts=0,
        )
        trainer.train()
        names = ("consistency_loss", "ar_loss", "consistency_tokens", "ar_tokens", "grad_norm")
        names = (*names, *(f"eval_{name}" for name in names))
        logs.append([{name: log[name] for name in names if name in log} for log in trainer.state.log_history])
    assert logs[0] == logs[1] and sum("eval_ar_loss" in log for log in logs[0]) == 2


def watch_choices(trainer):
    """Update and share of the run of every batch that is prepared, and the batch."""
    seen, objective = [], trainer._objective

    class Watched:
        def __getattr__(self, name):
            return getattr(objective, name)

        def prepare(self, model, base_model, batch, update, progress):
            prepared = objective.prepare(model, base_model, batch, update, progress)
            seen.append((update, progress, prepared))
            return prepared

    trainer._objective = Watched()
    return seen


def test_each_update_has_its_number_also_after_evaluations(word_model, tokenizer, dataset, tmp_path):
    """A model comes in evaluation mode, and goes back to it in every evaluation."""
    trainer = make_trainer(
        word_model,
        dataset,
        tokenizer,
        tmp_path,
        eval_dataset=dataset.select(range(4)),
        eval_strategy="steps",
        eval_steps=2,
        max_steps=4,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
    )
    seen = watch_choices(trainer)
    trainer.train()
    trained = [update for update, _, prepared in seen if update is not None]
    assert trained == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len(seen) == 8 + 2  # the others are the batches of the two evaluations


def test_a_run_goes_through_its_block_sizes_and_is_evaluated_at_the_last(word_model, tokenizer, dataset, tmp_path):
    trainer = make_trainer(
        word_model,
        dataset,
        tokenizer,
        tmp_path,
        eval_dataset=dataset.select(range(4)),
        eval_strategy="steps",
        eval_steps=1,
        max_steps=4,
        block_size_schedule=[2, 4],
    )
    seen = watch_choices(trainer)
    trainer.train()
    sizes = [prepared.blocks.states.shape[-1] for update, _, prepared in seen if update is not None]
    evaluated = [prepared.blocks.states.shape[-1] for update, _, prepared in seen if update is None]
    assert sizes == [2, 2, 4, 4] and evaluated == [4] * 4
    assert trainer.block_size == 4 and word_model.generation_config.jacobi_block_size == 4


@pytest.mark.parametrize("setting", ["global", "online"])
def test_evaluation_is_always_the_same_and_over_all_positions(word_model, tokenizer, dataset, tmp_path, setting):
    """Whatever the batches are, and whatever was trained or computed before."""
    results = []
    for batch_size in (3, 16):
        trainer = make_trainer(
            word_model,
            dataset,
            tokenizer,
            tmp_path,
            per_device_eval_batch_size=batch_size,
            ar_loss_weight=2.0,
            learning_rate=0.0,
            max_steps=2,
            **ACCUMULATED[setting],
        )
        for _ in range(2):
            results.append(trainer.evaluate(dataset))
            trainer.train()
    for metrics in results:
        for name in (
            "eval_loss",
            "eval_consistency_loss",
            "eval_ar_loss",
            "eval_consistency_tokens",
            "eval_ar_tokens",
        ):
            assert metrics[name] == pytest.approx(results[0][name], rel=1e-4)
        assert metrics["eval_loss"] == pytest.approx(metrics["eval_consistency_loss"] + 2 * metrics["eval_ar_loss"])
    assert results[0]["eval_consistency_tokens"] > 50


def test_a_batch_of_ones_own_is_a_mean_over_itself(word_model, tokenizer, dataset, tmp_path):
    trainer = make_trainer(word_model, dataset, tokenizer, tmp_path, learning_rate=0.0, max_steps=2)
    batch = trainer.data_collator(list(dataset.select(range(3))))
    before = trainer.compute_loss(word_model.eval(), batch)
    trainer.train()
    assert trainer.compute_loss(word_model.eval(), batch) == before
    loss, parts = trainer.compute_loss(word_model.train(), batch, return_outputs=True)
    prepared, objective = prepare(word_model, list(dataset.select(range(3))), update=trainer.state.global_step)
    sums = objective.sum_losses(word_model, word_model, prepared)
    torch.testing.assert_close(loss, (sums / prepared.counts).sum())
    torch.testing.assert_close(loss, parts["consistency_loss"] + parts["ar_loss"])


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("setting", ["global", "online"])
def test_a_run_without_any_consistency_position(word_model, tokenizer, tmp_path, setting, weight):
    records = Dataset.from_list([make_record(3 + row, 1, seed=row) for row in range(4)])
    trainer = make_trainer(
        word_model, records, tokenizer, tmp_path, max_steps=2, ar_loss_weight=weight, **ACCUMULATED[setting]
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2 and all(log["consistency_loss"] == log["consistency_tokens"] == 0 for log in logs)
    assert [log["loss"] == 0 for log in logs] == [weight == 0] * 2 and all(log["ar_loss"] > 0 for log in logs)
    assert all(log["grad_norm"] == 0 if weight == 0 else log["grad_norm"] > 0 for log in logs)
    assert all(parameter.isfinite().all() for parameter in word_model.parameters())


@pytest.fixture
def spawned():
    """Processes are started anew: those forked from one with threads may find locks that nobody will release."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.slow
@pytest.mark.usefixtures("spawned")
@pytest.mark.parametrize("setting", ["global", "online"])
def test_workers_of_the_data_loader_change_nothing(word_model, tokenizer, dataset, tmp_path, setting):
    logs = []
    for workers in (0, 2):
        trainer = make_trainer(
            copy.deepcopy(word_model),
            dataset,
            tokenizer,
            tmp_path,
            max_steps=6,
            dataloader_num_workers=workers,
            dataloader_persistent_workers=workers > 0,
            **ACCUMULATED[setting],
        )
        trainer.train()
        logs.append([(log["loss"], log["consistency_tokens"]) for log in trainer.state.log_history if "loss" in log])
    assert logs[0] == logs[1]


@pytest.mark.slow
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


def test_datasets_that_are_refused(word_model, tokenizer, dataset, tmp_path):
    longest = max(dataset, key=lambda record: len(record["response_ids"]))
    for bad, message in (
        (dataset.remove_columns("states"), "states"),
        (dataset.select([]), "empty"),
        (None, "`train_dataset`"),
        (Dataset.from_list([{**longest, "states": longest["states"][:-1]}]), "blocks of states"),
        (
            Dataset.from_list(
                [dataset[0], {**dataset[1], "states": [[s[:-1] for s in b] for b in dataset[1]["states"]]}]
            ),
            "`block_size`",
        ),
        ([dataset], "must be a dataset of `datasets`, got a list"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(word_model, bad, tokenizer, tmp_path)
    with pytest.raises(ValueError, match="must be a dataset of `datasets`, got a list"):
        make_trainer(word_model, dataset, tokenizer, tmp_path, eval_dataset=[dataset])
    texts = dataset.map(lambda record: {"label_ids": "abc"})
    with pytest.raises(ValueError, match="`label_ids` must be a list of token ids, got 'abc'"):
        make_trainer(word_model, texts, tokenizer, tmp_path, ar_labels="ground_truth")
    with pytest.raises(ValueError, match=r"`block_size=16`.*schedule=\[16\]"):
        make_trainer(word_model, dataset, tokenizer, tmp_path, block_size=16)


def test_other_arguments_that_are_refused(word_model, tokenizer, dataset, tmp_path):
    from transformers import TrainingArguments

    with pytest.raises(ValueError, match="`args`.*TrainingArguments"):
        CLLMTrainer(word_model, args=TrainingArguments(output_dir=str(tmp_path)), train_dataset=dataset)
    with pytest.raises(OSError, match="/proc/cllm"):
        make_trainer(word_model, dataset, tokenizer, "/proc/cllm")
    args = CLLMConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True)
    for name in ("data_collator", "compute_loss_func", "compute_metrics", "formatting_func"):
        with pytest.raises(ValueError, match=f"`{name}`"):
            CLLMTrainer(word_model, args=args, train_dataset=dataset, **{name: lambda *_: {}})


def test_a_dictionary_of_splits_is_refused(word_model, dataset, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="`train_dataset`.*train, test"):
        make_trainer(word_model, DatasetDict(train=dataset, test=dataset), tokenizer, tmp_path)


def test_records_of_similar_length_come_together(word_model, tokenizer, dataset, tmp_path):
    assert "length" not in dataset.column_names

    def padding(strategy):
        trainer = make_trainer(word_model, dataset, tokenizer, tmp_path, train_sampling_strategy=strategy)
        masks = [batch["clean_mask"] for batch in trainer.get_train_dataloader()]
        assert sum(len(mask) for mask in masks) == len(dataset)
        return sum(int((mask == 0).sum()) for mask in masks)

    assert padding("group_by_length") < padding("sequential")


def test_formatted_datasets_are_taken(word_model, tokenizer, dataset, tmp_path):
    weights = []
    dataset = dataset.map(lambda record: {"label_ids": record["response_ids"][::-1]})
    for name in (None, "torch", "numpy"):
        model = copy.deepcopy(word_model)
        make_trainer(model, dataset.with_format(name), tokenizer, tmp_path, ar_labels="ground_truth").train()
        weights.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


def test_records_of_similar_length_also_in_evaluation(word_model, tokenizer, dataset, tmp_path):
    options = {"train_sampling_strategy": "group_by_length", "eval_dataset": dataset.select(range(4))}
    trainer = make_trainer(word_model, dataset, tokenizer, tmp_path, **options)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.evaluate(dataset.select(range(4)))["eval_loss"])


def test_predictions_are_losses(word_model, tokenizer, dataset, tmp_path):
    trainer = make_trainer(word_model, dataset, tokenizer, tmp_path, num_monitored_prompts=0)
    output = trainer.predict(dataset.select(range(4)))
    assert output.predictions is None and output.metrics["test_loss"] > 0
    trainer = make_trainer(word_model, dataset, tokenizer, tmp_path, num_monitored_prompts=0, lossless=True)
    texts = Dataset.from_list([{"prompt": "Mia has 7 apples .", "response": "How many ?"}])
    assert trainer.predict(texts).metrics["test_loss"] > 0


# Records whose blocks are right. What stands after a response of four tokens, in blocks of three, is padding.
TOKENS = {"prompt_ids": [5, 6], "response_ids": [8, 9, 7, 4], "label_ids": [7, 3]}
STATES = {
    "states": [[[5, 6, 6], [8, 6, 7], [8, 9, 7]], [[5, -100, 999], [4, 999, 0]]],
    "augmented_states": [[[8, 6, 5]], [[6, 999, -1]]],
}
ALL_TOKENS = {"ar_labels": "ground_truth"}


def with_token(column, token):
    record = copy.deepcopy({**TOKENS, **STATES})
    if column in TOKENS:
        record[column][-1] = token
    else:
        record[column][0][0][1] = token
    if column == "response_ids":
        for state in record["states"][1]:
            state[0] = token
    return record


OUTSIDE = [
    *(("dataset", column, token) for column in (*TOKENS, *STATES) for token in (102, -1)),
    *(("stream", column, 10**6) for column in (*TOKENS, *STATES)),
    *((kind, "states", -100) for kind in ("eval", "evals", "transform", "late stream", "evaluate")),
]


@pytest.mark.parametrize(("kind", "column", "token"), OUTSIDE)
def test_tokens_that_the_model_does_not_have_are_refused(word_model, tokenizer, tmp_path, kind, column, token):
    good = Dataset.from_list([{**TOKENS, **STATES}] * 4)
    bad = Dataset.from_list([{**TOKENS, **STATES}] * 3 + [with_token(column, token)])
    message = rf"102.*{token} in `{column}` of record (3|\?|0)"

    def start(train=good, evaluated=None):
        options = {"num_monitored_prompts": 0, **ALL_TOKENS}
        return make_trainer(word_model, train, tokenizer, tmp_path, eval_dataset=evaluated, **options)

    forward_passes = []
    word_model.register_forward_pre_hook(lambda *_: forward_passes.append(1))
    with pytest.raises(ValueError, match=message):
        if kind == "dataset":
            start(bad)
        elif kind == "eval":
            start(evaluated=bad)
        elif kind == "evals":
            start(evaluated={"one": good, "two": bad})
        elif kind == "stream":
            start(bad.select([3]).to_iterable_dataset())
        elif kind == "transform":
            start(bad.with_transform(lambda rows: rows))
        elif kind == "late stream":
            trainer = start(bad.to_iterable_dataset())
            trainer.train()
        else:
            trainer = start()
            trainer.evaluate(bad)
    assert not forward_passes


def test_padding_may_be_any_number(word_model, tokenizer, tmp_path):
    dataset = Dataset.from_list([{**TOKENS, **STATES}] * 4)
    trainer = make_trainer(word_model, dataset, tokenizer, tmp_path, **ALL_TOKENS)
    assert np.isfinite(trainer.train().training_loss)


def test_columns_that_are_not_used_may_hold_any_number(word_model, tokenizer, tmp_path):
    for column, options in (("states", {"trajectory_source": "online"}), ("label_ids", {})):
        make_trainer(word_model, Dataset.from_list([with_token(column, 999)]), tokenizer, tmp_path, **options)


def test_the_vocabulary_is_that_of_the_embeddings(tokenizer, tmp_path):
    """Not that of the tokenizer, which may have fewer tokens or more."""
    dataset = Dataset.from_list([with_token("prompt_ids", 119)])
    make_trainer(make_model("llama", vocab_size=120), dataset, tokenizer, tmp_path)
    with pytest.raises(ValueError, match="110.*119"):
        make_trainer(make_model("llama", vocab_size=110), dataset, tokenizer, tmp_path)


@pytest.mark.filterwarnings("ignore:`pad_token` is deprecated")
@pytest.mark.parametrize("lora", [False, True])
def test_the_padding_token_is_set_as_by_the_host(word_model, tokenizer, dataset, tmp_path, lora):
    from peft import LoraConfig

    tokenizer, token = copy.deepcopy(tokenizer), tokenizer.convert_ids_to_tokens(7)
    adapter = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]) if lora else None
    trainer = make_trainer(word_model, dataset, tokenizer, tmp_path, peft_config=adapter, pad_token=token)
    for model in (trainer.model, word_model):
        assert model.generation_config.pad_token_id == model.config.pad_token_id == 7
    assert trainer.processing_class.pad_token == tokenizer.pad_token == token
    trainer.train()
    trainer.save_model()
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token_id == 7
    assert GenerationConfig.from_pretrained(tmp_path).pad_token_id == 7


@pytest.mark.filterwarnings("ignore:`pad_token` is deprecated")
def test_a_padding_token_that_there_is_not_is_refused(word_model, tokenizer, dataset, tmp_path):
    before = tokenizer.pad_token
    with pytest.raises(ValueError, match="`pad_token`.*no such token"):
        make_trainer(word_model, dataset, tokenizer, tmp_path, pad_token="no such token")
    make_trainer(word_model, dataset, tokenizer, tmp_path)
    assert tokenizer.pad_token == before


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"response_ids": []}, {"trajectory_source": "online"}, "`response_ids`"),
        ({"label_ids": []}, {"ar_labels": "ground_truth"}, "`label_ids`"),
        ({"prompt_ids": [3] * 60}, {"max_length": 60}, "`max_length=60`.*7"),
    ],
)
def test_bad_records_are_found_before_the_run(word_model, tokenizer, dataset, tmp_path, change, options, message):
    rows = [{**row, "label_ids": [3]} for row in dataset.select(range(8))]
    rows[7].update(change)
    with pytest.raises(ValueError, match=message):
        make_trainer(word_model, Dataset.from_list(rows), tokenizer, tmp_path, **options)
