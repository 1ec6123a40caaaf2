"""The published step trains on what the trainer trains on, and what is counted is right; nothing looks at a time."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmarks import command, loss_check, training
from benchmarks.command import main
from benchmarks.loss_check import compare_losses, draw_examples
from benchmarks.published_training import (
    StateExample,
    draw_example,
    published_losses,
    published_step,
    soft_cross_entropy,
    trainable_blocks,
)
from benchmarks.training import TrainingResult, compare_training, format_training, measure_training
from benchmarks.training_methods import (
    TrainingMethod,
    TrainingSetting,
    make_methods,
    make_trainer,
    num_draft_tokens,
    random_trajectories,
    usable_records,
)
from conftest import VOCAB_SIZE, make_model, make_word_model
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from cllm_hf import CleaningRules, CLLMConfig, CLLMTrainer, TrajectoryBuilder
from cllm_hf.demo.problems import make_problems
from cllm_hf.evaluation import benchmark, shapes
from cllm_hf.trajectories.schema import FEATURES, check_dataset, features


BLOCK_SIZE = 5
# Blocks of 5, 5 and 1 tokens; the second has nothing to learn, the third no position after its first wrong token.
RECORD = {
    "data_id": "seven",
    "prompt_ids": [11, 12, 13],
    "response_ids": [21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31],
    "states": [
        [[21, 5, 23, 6, 7], [21, 22, 23, 24, 25]],
        [[26, 27, 28, 29, 30]],
        [[4, 9, 9, 9, 9], [31, 0, 0, 0, 0]],
    ],
}


@pytest.fixture(autouse=True)
def no_garbage(monkeypatch):
    """Looking for garbage takes a large process a third of a second each time."""
    monkeypatch.setattr(benchmark, "gc", SimpleNamespace(collect=lambda: None))


@pytest.fixture
def tiny_shape(monkeypatch):
    tiny = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    monkeypatch.setitem(shapes.SHAPES, "4m", {**tiny, "vocab_size": VOCAB_SIZE})


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
    return builder.build([problem.prompt for problem in make_problems(12, seed=5)])


@pytest.fixture(scope="module")
def single_states(dataset):
    """Each block has one state before the fixed point, so that nothing is left to chance, and some have none."""
    rows = usable_records(dataset, 6)
    for row in rows:
        row["states"] = [
            [block[0], block[-1]] if number != 1 else block[-1:] for number, block in enumerate(row["states"])
        ]
    return Dataset.from_list([row for row in rows if trainable_blocks(row)], features=FEATURES)


def example_of(record, block, state):
    start = len(record["prompt_ids"]) + BLOCK_SIZE * block
    return StateExample(record["prompt_ids"], record["response_ids"], block, state, start)


def wrong_contexts(state, fixed_point):
    return sum(state[:place] != fixed_point[:place] for place in range(len(state)))


def slow_losses(model, record, block, state):
    """Sum of divergences after the first wrong token, sum of entropies of the targets from there on, mean AR loss."""
    prompt, response = record["prompt_ids"], record["response_ids"]
    fixed_point = response[BLOCK_SIZE * block :][:BLOCK_SIZE]
    context = prompt + response[: BLOCK_SIZE * block]
    divergence = entropy = 0.0
    for place in range(len(fixed_point)):
        p = model(torch.tensor([context + fixed_point[:place]])).logits[0, -1].detach().log_softmax(-1)
        q = model(torch.tensor([context + state[:place]])).logits[0, -1].log_softmax(-1)
        if state[: place + 1] != fixed_point[: place + 1]:
            entropy = entropy - (p.exp() * p).sum()
            divergence = divergence + (p.exp() * (p - q)).sum()
    ar = 0.0
    for place, token in enumerate(response):
        ar = ar - model(torch.tensor([prompt + response[:place]])).logits[0, -1].log_softmax(-1)[token] / len(response)
    return divergence, entropy, ar


def gradients(model):
    taken = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return taken


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=2e-5)


# The published step


@pytest.mark.parametrize(("block", "state"), [(0, [21, 5, 23, 6, 7]), (1, [8, 27, 28, 9, 30]), (2, [4])])
@pytest.mark.parametrize("keeps_target_graph", [False, True])
def test_losses_and_gradient_equal_the_slow_reference(llama, block, state, keeps_target_graph):
    example = example_of(RECORD, block, state)
    divergence, entropy, ar = slow_losses(llama, RECORD, block, state)
    mean_divergence = divergence.item() / max(example.num_loss_positions, 1)
    # From the first wrong token on; at that one itself the divergence is 0, and the gradient too.
    consistency = (divergence + entropy) / (example.num_loss_positions + 1)
    (0.5 * (consistency + 3.0 * ar)).backward()
    expected = gradients(llama)
    ours = published_step(llama, example, 3.0, scale=0.5, keeps_target_graph=keeps_target_graph)
    torch.testing.assert_close(torch.stack(ours), torch.stack([consistency, ar]).detach())
    assert not ours[0].requires_grad and not ours[1].requires_grad
    assert_same(gradients(llama), expected)
    mean, same_ar = published_losses(llama, example)
    assert mean == pytest.approx(mean_divergence, abs=1e-5) and same_ar == pytest.approx(ar.item(), abs=1e-5)


def test_gradients_add_up(llama):
    first, second = (example_of(RECORD, 0, state) for state in ([21, 5, 23, 6, 7], [1, 2, 3, 4, 5]))
    published_step(llama, first, 1.0)
    published_step(llama, second, 1.0)
    both = gradients(llama)
    published_step(llama, first, 1.0)
    one = gradients(llama)
    published_step(llama, second, 1.0)
    assert_same({name: one[name] + gradient for name, gradient in gradients(llama).items()}, both)


@pytest.mark.parametrize("keeps_target_graph", [False, True])
def test_a_step_is_three_forwards_and_two_backwards(llama, keeps_target_graph):
    seen = []
    llama.register_forward_hook(
        lambda module, args, output: seen.append((args[0].tolist(), output.logits.requires_grad))
    )
    llama.lm_head.register_full_backward_hook(lambda *_: seen.append("backward"))
    published_step(llama, example_of(RECORD, 0, [21, 5, 23, 6, 7]), 1.0, keeps_target_graph=keeps_target_graph)
    sequence = RECORD["prompt_ids"] + RECORD["response_ids"]
    whole = ([sequence], True)
    fixed_point = ([sequence[:8]], keeps_target_graph)
    order = [whole, fixed_point, "backward"] if keeps_target_graph else [whole, "backward", fixed_point]
    assert seen == [*order, ([[11, 12, 13, 21, 5, 23, 6, 7]], True), "backward"]


def test_a_state_that_is_right_gives_no_consistency_loss(llama):
    """As where the states differ after the end of the response only."""
    example = example_of(RECORD, 0, [21, 22, 23, 24, 25])
    assert example.first_wrong == 5 and example.num_loss_positions == 0
    consistency, ar = published_step(llama, example, 0.0)
    assert consistency == 0 and ar > 0 and published_losses(llama, example)[0] == 0
    assert all(not gradient.any() for gradient in gradients(llama).values())


def test_soft_cross_entropy_is_the_divergence_but_for_a_constant():
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn((2, 7, 11), generator=generator).requires_grad_()
    entropies = torch.distributions.Categorical(logits=targets).entropy()
    divergences = torch.nn.functional.kl_div(
        logits.log_softmax(-1), targets.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    torch.testing.assert_close(soft_cross_entropy(logits, targets), divergences + entropies)
    assert soft_cross_entropy(logits.bfloat16(), targets.bfloat16()).dtype == torch.float32


# Which states are drawn


def test_every_state_but_the_last_is_drawn():
    torch.manual_seed(0)
    block = [[1, 2, 3, 4, 5], [21, 2, 3, 4, 5], [21, 22, 23, 24, 25]]
    record = {**RECORD, "states": [block, *RECORD["states"][1:]]}
    drawn = {(example.block, tuple(example.state)) for example in (draw_example(record) for _ in range(60))}
    assert drawn == {(0, (1, 2, 3, 4, 5)), (0, (21, 2, 3, 4, 5)), (2, (4,))}
    assert {draw_example(record, 2).start for _ in range(3)} == {13}
    record["augmented_states"] = [[], [[9, 9, 9, 9, 9]], []]
    assert {draw_example(record).block for _ in range(60)} == {0, 1, 2}
    assert draw_example(record, 1).state == [9, 9, 9, 9, 9]


@pytest.mark.parametrize("block", [None, 1])
def test_records_with_nothing_to_draw_are_refused(block):
    record = {**RECORD, "states": [block[-1:] for block in RECORD["states"]]}
    with pytest.raises(ValueError, match="Record seven has no state before the fixed point"):
        draw_example(record, block)


def test_draft_tokens_are_those_with_something_to_learn():
    assert num_draft_tokens(RECORD) == 5 + 1 and num_draft_tokens(RECORD, states_per_block=4) == 5 + 1
    more = {**RECORD, "augmented_states": [[[1, 1, 1, 1, 1]], [[2, 2, 2, 2, 2], [3, 3, 3, 3, 3]], []]}
    assert num_draft_tokens(more) == 11 and num_draft_tokens(more, states_per_block=2) == 2 * 5 + 2 * 5 + 1


def test_random_trajectories_are_trajectories():
    records = random_trajectories(50, 30, 9, 21, 4, seed=1)
    dataset = Dataset.from_list(records, features=features())
    assert check_dataset(dataset) == 4 and records == random_trajectories(50, 30, 9, 21, 4, seed=1)
    assert {len(record["prompt_ids"]) for record in records} == set(range(5, 10))
    assert {len(record["response_ids"]) for record in records} <= set(range(11, 22))
    assert {len(block) for record in records for block in record["states"]} == {5}
    assert usable_records(dataset, 30) == records
    with pytest.raises(ValueError, match="takes 31 records with a state before the fixed point, got 30"):
        usable_records(dataset, 31)


# Trainer and published step


def make_tiny_trainer(model, dataset, tokenizer, tmp_path):
    options = {"bf16": False, "use_cpu": True, "gradient_checkpointing": False, "report_to": []}
    args = CLLMConfig(output_dir=str(tmp_path), **options)
    return CLLMTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer)


def test_the_trainer_has_the_gradient_of_the_published_step(word_model, tokenizer, dataset, tmp_path):
    """Only the number of positions that the consistency loss is a mean over differs by one."""
    record, example = draw_examples(usable_records(dataset, 4), seed=1, count=4)[-1]
    count = example.num_loss_positions
    assert count > 0
    trainer = make_tiny_trainer(word_model, dataset, tokenizer, tmp_path)
    batch = trainer.data_collator([loss_check._only_state(record, example)])
    word_model.train()
    for weight in (0.0, 2.0):
        trainer.args.ar_loss_weight = weight
        trainer.compute_loss(word_model, batch).backward()
        ours = gradients(word_model)
        published_step(word_model, example, weight * count / (count + 1), scale=(count + 1) / count)
        assert_same(ours, gradients(word_model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_have_the_same_losses_in_float32(tokenizer, dataset, tmp_path, dtype):
    model = make_word_model(tokenizer).to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = make_tiny_trainer(model, dataset, tokenizer, tmp_path)
    examples = draw_examples(usable_records(dataset, 5), seed=0, count=5)
    differences = compare_losses(trainer, examples)
    assert differences.keys() == {"consistency_loss", "ar_loss"} and max(differences.values()) < 1e-5
    reference = make_word_model(tokenizer)
    assert max(published_losses(reference, example)[0] for _, example in examples) > 0.01
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == dtype and torch.equal(tensor, before[name])


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("error", [0.01, float("nan")])
def test_losses_that_differ_are_refused(word_model, tokenizer, dataset, monkeypatch, index, error):
    def wrong_losses(model, example):
        losses = list(published_losses(model, example))
        losses[index] += error
        return losses

    monkeypatch.setattr(loss_check, "published_losses", wrong_losses)
    monkeypatch.setattr(training, "measure_training", None)  # nothing long has begun
    name = ("consistency_loss", "ar_loss")[index]
    with pytest.raises(ValueError, match=f"Both steps must have the same losses, got `{name}` .* cannot be compared"):
        compare(word_model, tokenizer, dataset)


# Measuring


def test_methods_take_turns_and_begin_with_one_update():
    calls = []

    def method(name, with_count):
        def update(records):
            calls.append((name, records))
            return 2 * len(records), 0 if with_count else len(records)

        def count():
            calls.append((name, "counted"))
            return 7

        updates = [[f"{name}1"], [f"{name}2"]]
        return TrainingMethod(
            name, updates, update, lambda: calls.append((name, "most")), count if with_count else None
        )

    methods = [method("a", False), method("b", True)]
    results = measure_training(methods, TrainingSetting(rounds=2), torch.device("cpu"))
    first = [("a", ["a1"]), ("b", ["b1"]), ("b", "counted")]
    turn = [("a", ["a1"]), ("a", ["a2"]), ("a", "most"), ("b", ["b1"]), ("b", ["b2"]), ("b", "counted")]
    assert calls == first + 2 * [*turn, ("b", "most"), ("b", "counted")]
    assert [result.num_tokens for result in results] == [[4, 4], [4, 4]]
    assert [result.num_loss_positions for result in results] == [[2, 2], [7, 7]]
    assert [len(result.seconds) for result in results] == [2, 2]


def test_rates_are_medians_over_rounds():
    method = TrainingMethod("", [], None, None)
    slow = TrainingResult(method, [10, 10, 10], [9, 9, 9], [1.0, 2.0, 4.0])
    fast = TrainingResult(method, [60, 60, 60], [50, 50, 50], [1.0, 1.0, 3.0])
    assert slow.tokens_per_second == 5 and fast.tokens_per_second == 60
    assert fast.speedup_over(slow) == 8.0  # of 6, 12 and 8


def test_an_update_moves_the_weights_and_leaves_no_gradient(word_model, tokenizer, single_states, tmp_path):
    setting = TrainingSetting(batch_size=2, steps=2)
    trainer = make_trainer(word_model, tokenizer, single_states, setting, str(tmp_path))
    records = usable_records(single_states, 4)
    methods = make_methods(trainer, records, setting)
    assert [len(method.updates) for method in methods] == [4, 4, 2, 4, 2]
    assert [records for method in methods[3:] for update in method.updates for records in update] == 2 * records
    word_model.train()
    for method in methods:
        before = {name: tensor.clone() for name, tensor in word_model.state_dict().items()}
        method.update(method.updates[0])
        after = word_model.state_dict()
        changes = {name: (after[name] - before[name]).abs().max() for name in after}
        assert all(0 < change < 1e-4 for change in changes.values())
        assert all(parameter.grad is None for parameter in word_model.parameters())


def test_the_most_memory_is_that_of_the_longest_records(word_model, tokenizer, single_states, tmp_path):
    setting = TrainingSetting(batch_size=2, steps=2)
    trainer = make_trainer(word_model, tokenizer, single_states, setting, str(tmp_path))
    records = usable_records(single_states, 4)
    records[1] = {**records[1], "prompt_ids": records[1]["prompt_ids"] * 3}
    longest, widths = len(records[1]["prompt_ids"] + records[1]["response_ids"]), []

    def note(module, args, kwargs):
        widths.append((args[0] if args else kwargs["input_ids"]).shape)

    word_model.register_forward_pre_hook(note, with_kwargs=True)
    published, with_graph, accumulated, one, batch = make_methods(trainer, records, setting)
    for method in (published, with_graph, accumulated):
        widths.clear()
        method.update_largest()
        assert len(widths) == 3 * len(trainable_blocks(records[1])) and max(widths) == (1, longest)
    widths.clear()
    one.update_largest()
    batch.update_largest()
    assert [width[0] for width in widths] == [1, 2] and all(width[1] > longest for width in widths)


# The report


def compare(model, tokenizer, dataset, **options):
    setting = TrainingSetting(**{"batch_size": 2, "steps": 2, "rounds": 1, **options})
    return compare_training(model, tokenizer, dataset, setting, show_progress=False)


def test_both_ways_train_on_the_same(word_model, tokenizer, single_states, capsys):
    report = json.loads(json.dumps(compare(word_model, tokenizer, single_states, batch_size=1, steps=4, rounds=2)))
    assert not word_model.training
    published, with_graph, accumulated, trainer = report["rows"]
    assert [row["name"] for row in report["rows"]] == [
        "published procedure",
        "published procedure, target graph kept",
        "published procedure, accumulated",
        "CLLMTrainer",
    ]
    records = usable_records(single_states, 4)
    pairs = [
        (state[: len(response)], response[: len(state)])
        for record in records
        for number, (state, *rest) in enumerate(record["states"])
        for response in [record["response_ids"][BLOCK_SIZE * number :]]
        if rest
    ]
    tokens = [sum(len(state) for state, _ in pairs)] * 2
    positions = [sum(wrong_contexts(*pair) for pair in pairs)] * 2
    assert positions[0] > 0
    for row in (accumulated, trainer):  # the trainer counts in its own way
        assert row["num_tokens"] == tokens and row["num_loss_positions"] == positions
        assert row["num_updates"] == 4 and row["tokens_per_update"] == tokens[0] / 4
    # The same states are drawn with and without the graph, a block a record.
    assert published["num_tokens"] == with_graph["num_tokens"] and 4 <= published["num_tokens"][0] < tokens[0]
    assert published["speedup"] == accumulated["speedup_over_accumulated"] == 1.0
    assert report["prompt_lengths"] == [len(record["prompt_ids"]) for record in records]
    text = format_training(report)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 4 and f"| {tokens[0] / 4:.1f} | {positions[0] / 4:.1f} |" in " ".join(lines[-1].split())
    assert "without gradient checkpointing" in text and capsys.readouterr().out == ""


def test_batches_are_a_row_of_their_own(word_model, tokenizer, single_states):
    report = compare(word_model.train(), tokenizer, single_states, gradient_checkpointing=True)
    assert word_model.training and not any(getattr(m, "gradient_checkpointing", 0) for m in word_model.modules())
    *_, accumulated, one, batch = report["rows"]
    assert one["num_records"] == 1 and batch["num_records"] == 2
    assert one["num_tokens"] == batch["num_tokens"] and one["num_updates"] == 2 * batch["num_updates"] == 4
    assert accumulated["num_updates"] == 2
    assert "with gradient checkpointing" in format_training(report)


def test_every_method_has_gradient_checkpointing(word_model, tokenizer, single_states, monkeypatch):
    """Each layer runs once more in each backward."""
    calls, inside = [], []
    word_model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))

    def look(methods, setting, device, on_turn):
        for method in methods:
            calls.clear()
            method.update(method.updates[0][:1])
            blocks = len(trainable_blocks(method.updates[0][0])) if "accumulated" in method.name else 1
            inside.append(len(calls) / blocks)
        return []

    monkeypatch.setattr(training, "measure_training", look)
    compare(word_model, tokenizer, single_states, gradient_checkpointing=True)
    assert inside == [5, 5, 5, 2, 2]


def test_figures_that_nobody_knows_are_dashes(word_model, tokenizer, single_states, monkeypatch):
    monkeypatch.setattr(benchmark, "_PROCESS", Path("/none"))
    report = compare(word_model, tokenizer, single_states, steps=1)
    assert [row["peak_memory"] for row in report["rows"]] == [None] * 5
    # Peak memory of a process may not show what a tiny model takes: there is nothing to compare then.
    rows = [{**row, "peak_memory": 0} for row in report["rows"]]
    assert "peak memory of the published procedure" not in format_training({**report, "rows": rows})
    text = format_training(report)
    assert text.splitlines()[2].endswith(" - |") and "times the peak memory" not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"steps": 0}, "`steps` must be at least 1, got 0"),
        ({"rounds": 0}, "`rounds` must be at least 1, got 0"),
        ({"states_per_block": 0}, "`states_per_block` must be at least 1, got 0"),
        ({"steps": 50}, "takes 100 records with a state before the fixed point, got"),
    ],
)
def test_settings_that_are_refused(word_model, tokenizer, dataset, monkeypatch, options, message):
    monkeypatch.setattr(training, "make_trainer", None)  # nothing long has begun
    with pytest.raises(ValueError, match=message):
        compare(word_model, tokenizer, dataset, **options)


def test_models_that_are_refused(word_model, tokenizer, dataset, monkeypatch):
    monkeypatch.setattr(training, "make_trainer", None)
    with pytest.raises(ValueError, match="must be of the model, whose vocabulary has 30 tokens, got token"):
        compare(make_model("llama", vocab_size=30), tokenizer, dataset)
    with pytest.raises(ValueError, match=r"do not fit into the model's 8 positions\. Drop such records"):
        compare(make_model("llama", vocab_size=len(tokenizer), max_position_embeddings=8), tokenizer, dataset)
    with pytest.raises(ValueError, match="Whole models are compared, got one with an adapter"):
        compare(get_peft_model(word_model, LoraConfig(task_type="CAUSAL_LM")), tokenizer, dataset)


def test_states_per_block_are_passed_on_where_the_config_knows_them(word_model, tokenizer, dataset, tmp_path):
    setting = TrainingSetting(states_per_block=2)
    if "states_per_block" in CLLMConfig.__dataclass_fields__:
        trainer = make_trainer(word_model, tokenizer, dataset, setting, str(tmp_path))
        assert trainer.args.states_per_block == 2
    else:
        with pytest.raises(ValueError, match="`CLLMConfig` has no option `states_per_block`, got 2"):
            make_trainer(word_model, tokenizer, dataset, setting, str(tmp_path))


# The command


def test_train_of_a_shape(tiny_shape, tmp_path, capsys):
    arguments = ["train", "--shape", "4m", "--batch-size", "2", "--steps", "1", "--rounds", "1"]
    arguments += ["--prompt-length", "6", "--response-length", "11", "--block-size", "4", "--gradient-checkpointing"]
    files = ["--json", str(tmp_path / "new" / "out.json"), "--markdown", str(tmp_path / "out.md")]
    assert main([*arguments, *files]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "new" / "out.json").read_text())
    assert format_training(report) + "\n" == printed
    assert (tmp_path / "out.md").read_text() == f"    {report['command']}\n\n{printed}"
    assert report["kind"] == "train" and report["name"] == "4m" and report["schema_version"] == 1
    assert report["settings"]["block_size"] == 4 and report["settings"]["gradient_checkpointing"]
    assert report["settings"]["num_records"] == 2 and max(report["response_lengths"]) <= 11


def test_train_of_a_model(tmp_path, tokenizer, dataset, capsys):
    make_word_model(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    dataset.save_to_disk(str(tmp_path / "data"))
    arguments = ["--model", str(tmp_path / "model"), "--trajectories", str(tmp_path / "data"), "--rounds", "1"]
    assert main(["train", *arguments, "--batch-size", "2", "--steps", "1", "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert "2 records, without gradient checkpointing" in printed and "bfloat16" in printed
    assert main(["train", *arguments]) == 1
    assert "`batch_size` times `steps` takes 32 records" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Exactly one of `--model` and `--shape` .* got neither"),
        (["--shape", "4m", "--model", "m"], "got both"),
        (["--model", "m"], "`--model` without `--trajectories`"),
        (["--shape", "4m", "--trajectories", "t"], "`--trajectories` with `--shape`"),
        (["--model", "m", "--trajectories", "t", "--block-size", "8"], "sizes of their own, got `--block-size` with"),
        (["--model", "./missing", "--trajectories", "t"], "`--model` must be a folder, .*'./missing'"),
        (["--shape", "4m", "--json", "x", "--markdown", "x"], "must be two files"),
        (["--shape", "4m", "--device", "tpu9"], "must be a device of this machine, got 'tpu9'"),
    ],
)
def test_errors_are_explained(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "make_random_model", None)  # nothing long has begun
    assert main(["train", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("benchmark.py: ") and error.count("\n") == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--batch-size", "--steps", "--rounds", "--states-per-block", "--response-length"])
def test_numbers_that_are_refused(option, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--shape", "4m", option, "0"])
    assert stop.value.code == 2 and "integer of at least 1, got '0'" in capsys.readouterr().err
