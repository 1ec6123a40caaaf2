"""Heads change no text, whatever they have learned; those that have learned it need fewer forward passes."""

import json
from types import SimpleNamespace

import pytest
import torch
from benchmarks import heads_comparison
from benchmarks.command import main
from benchmarks.heads import EAGLE, MEDUSA, load_heads, make_heads, save_heads
from benchmarks.heads_decoding import make_strategy, register_heads
from benchmarks.heads_training import (
    HeadsSetting,
    eagle_losses,
    make_batch,
    medusa_losses,
    read_prompt_ids,
    read_records,
    train_heads,
)
from benchmarks.training_methods import random_trajectories
from conftest import make_model, make_prompts
from datasets import Dataset
from lossless_adapters import save_base, save_lossless_adapter
from test_compiled import graphs  # noqa: F401  # a fixture

from cllm_hf.decoding import strategy as strategy_module
from cllm_hf.evaluation import benchmark
from cllm_hf.trajectories.schema import FEATURES


KINDS = [MEDUSA, EAGLE]
OPTIONS = {"do_sample": False, "max_new_tokens": 30, "return_dict_in_generate": True}


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """Strategies are registered for one test; looking for garbage takes a large process long."""
    monkeypatch.setattr(strategy_module, "_FACTORIES", dict(strategy_module._FACTORIES))
    monkeypatch.setattr(benchmark, "gc", SimpleNamespace(collect=lambda: None))


def greedy_records(model, count=12, new_tokens=24):
    prompts = make_prompts(count, padding=False)[0]
    sequences = model.generate(prompts, do_sample=False, max_new_tokens=new_tokens).tolist()
    length = prompts.shape[1]
    return [{"prompt_ids": row[:length], "response_ids": row[length:]} for row in sequences]


def random_heads(kind, model, **options):
    torch.manual_seed(1)
    heads = make_heads(kind, model, **options)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return heads


@pytest.fixture(scope="module")
def trained():
    """A model, and heads of both kinds that have learned its texts by heart."""
    model = make_model("llama")
    records = greedy_records(model)
    found = {}
    for kind in KINDS:
        heads = make_heads(kind, model)
        setting = HeadsSetting(max_steps=60, batch_size=12, learning_rate=1e-2)
        found[kind] = heads, train_heads(heads, model, records, setting, show_progress=False)
    return model, records, found


def check_equal(model, prompts, **options):
    input_ids, mask = prompts
    plain = {name: value for name, value in options.items() if not name.startswith(("jacobi", "decoding"))}
    expected = model.generate(input_ids, attention_mask=mask, **{**OPTIONS, **plain}).sequences
    output = model.generate(input_ids, attention_mask=mask, **{**OPTIONS, **options})
    assert torch.equal(output.sequences, expected)
    return output.jacobi_stats.tokens_per_forward


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["llama", "gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "mistral", "gemma3"))]
)
def test_heads_of_any_weights_leave_the_text_as_it_is(kind, name):
    model = make_model(name)
    register_heads("test", random_heads(kind, model), model)
    for batch_size, candidates in ((1, 0), (3, 2)):
        options = {"decoding": "test", "jacobi_block_size": 4, "jacobi_candidates": candidates}
        check_equal(model, make_prompts(batch_size), max_new_tokens=12, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("candidates", [0, 3])
def test_trained_heads_need_fewer_forward_passes(trained, kind, candidates):
    model, records, found = trained
    register_heads("test", found[kind][0], model)
    prompts = torch.tensor([record["prompt_ids"] for record in records[:3]])
    options = {"decoding": "test", "jacobi_block_size": 5, "jacobi_candidates": candidates, "max_new_tokens": 16}
    together = check_equal(model, (prompts, torch.ones_like(prompts)), **options)
    alone = [check_equal(model, (row[None], torch.ones_like(row[None])), **options) for row in prompts]
    assert min(together, sum(alone) / 3) > 1.5


@pytest.mark.parametrize(
    "options", [{"use_cache": False}, {"eos_token_id": [20, 30, 40]}, {"repetition_penalty": 1.3}]
)
def test_other_ways_to_decode(trained, options):
    model, _, found = trained
    for kind in KINDS:
        register_heads("test", found[kind][0], model)
        check_equal(model, make_prompts(2), decoding="test", jacobi_block_size=4, max_new_tokens=12, **options)


def test_prompts_of_embeddings(trained):
    model, _, found = trained
    register_heads("test", found[EAGLE][0], model)
    embeds = model.get_input_embeddings()(make_prompts(1)[0])
    expected = model.generate(inputs_embeds=embeds, **OPTIONS).sequences
    output = model.generate(inputs_embeds=embeds, decoding="test", jacobi_block_size=4, **OPTIONS)
    assert torch.equal(output.sequences, expected)


@torch.no_grad()
def test_eagle_drafts_what_its_head_says_of_the_whole_text(trained):
    """The cache of the head, rolled back to the text, is that of reading it from scratch."""
    model, records, found = trained
    head, drafted = found[EAGLE][0], []

    class Watched(type(make_strategy(head, model))):
        def _draft(self, row, depth, num_candidates):
            one = super()._draft(row, depth, num_candidates)
            drafted.append((list(row.text), one.token_ids))
            return one

    strategy_module._FACTORIES["test"] = lambda options: Watched(head, model)
    model.generate(torch.tensor([records[0]["prompt_ids"]]), decoding="test", jacobi_block_size=5, **OPTIONS)
    assert len({len(text) for text, _ in drafted}) > 3
    for text, tokens in drafted:
        states = model.model(torch.tensor([text]))[0][:, :-1]
        for token in tokens:
            ids = torch.tensor([text[1:]])
            guessed = head(model.get_input_embeddings()(ids), states)[:, -1:]
            assert token == model.lm_head(guessed).argmax()
            states, text = torch.cat([states, guessed], dim=1), [*text, token]


@torch.no_grad()
def test_the_losses_are_those_of_single_places(llama):
    """A slow reference, place by place."""
    records = greedy_records(llama, 2, 6)
    records[1] = {"prompt_ids": records[1]["prompt_ids"][:4], "response_ids": records[1]["response_ids"][:5]}
    batch = make_batch(records, 100, llama.device)
    batch.hidden_states = llama.model(batch.input_ids, attention_mask=batch.mask.long())[0]
    medusa, eagle = random_heads(MEDUSA, llama, num_heads=2), random_heads(EAGLE, llama).eval()
    found = {1: [], 2: []}
    distances, entropies = [], []
    for record in records:
        text, first = record["prompt_ids"] + record["response_ids"], len(record["prompt_ids"])
        states = llama.model(torch.tensor([text]))[0][0]
        for number in (1, 2):
            for place in range(first - 1, len(text) - 1 - number):
                logits = medusa.logits(number - 1, states[place], llama.lm_head)
                found[number].append(-logits.log_softmax(-1)[text[place + 1 + number]])
        embeddings = llama.get_input_embeddings()(torch.tensor([text[1:]]))
        guessed = eagle(embeddings, states[None, :-1])[0]
        for place in range(first, len(text)):
            distances.append(torch.nn.functional.smooth_l1_loss(guessed[place - 1], states[place]))
            says, is_true = llama.lm_head(guessed[place - 1]).log_softmax(-1), llama.lm_head(states[place]).softmax(-1)
            entropies.append(-(is_true * says).sum())
    mean = {number: torch.stack(values).mean() for number, values in found.items()}
    losses = torch.stack(list(medusa_losses(medusa, llama, batch)))
    assert torch.allclose(losses, torch.stack([0.8 * mean[1], 0.64 * mean[2]]), atol=1e-4)
    (loss,) = eagle_losses(eagle, llama, batch)
    assert torch.allclose(loss, torch.stack(distances).mean() + 0.1 * torch.stack(entropies).mean(), atol=1e-4)


def test_training_makes_the_loss_smaller_and_leaves_the_model_alone(trained):
    model, records, found = trained
    for kind in KINDS:
        losses = found[kind][1]["losses"]
        assert found[kind][1]["steps"] == len(losses) == 60
        assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), make_model("llama").parameters()))


def test_training_ends_after_its_time(llama):
    records = greedy_records(llama, 4, 6)
    known = train_heads(make_heads(MEDUSA, llama), llama, records, HeadsSetting(max_seconds=0.05), show_progress=False)
    assert 0.05 <= known["seconds"] < 5 and known["steps"] >= 1
    with pytest.raises(ValueError, match="`max_seconds`"):
        train_heads(make_heads(MEDUSA, llama), llama, records, HeadsSetting(), show_progress=False)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_what_is_loaded(tmp_path, llama, kind):
    heads = random_heads(kind, llama, own_projections=True)
    for _ in range(2):
        save_heads(heads, tmp_path / "heads", llama, {"steps": 3})
    loaded, training = load_heads(tmp_path / "heads", llama, kind)
    assert training == {"steps": 3}
    assert loaded.state_dict().keys() == heads.state_dict().keys()
    assert all(torch.equal(value, heads.state_dict()[name]) for name, value in loaded.state_dict().items())
    register_heads("test", loaded, llama)
    check_equal(llama, make_prompts(1), decoding="test", jacobi_block_size=4)


def test_a_save_that_is_interrupted_leaves_the_earlier_heads(tmp_path, llama, monkeypatch):
    folder = tmp_path / "heads"
    save_heads(make_heads(MEDUSA, llama), folder, llama, {"steps": 1})
    monkeypatch.setattr(json, "dumps", lambda *args, **kwargs: exec("raise KeyboardInterrupt"))
    with pytest.raises(KeyboardInterrupt):
        save_heads(make_heads(EAGLE, llama), folder, llama, {"steps": 2})
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["heads"]
    assert load_heads(folder, llama, MEDUSA)[1] == {"steps": 1}


def test_heads_that_do_not_fit_are_refused(tmp_path, llama):
    with pytest.raises(OSError, match="heads.json"):
        load_heads(tmp_path / "missing", llama)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(OSError, match="`--output-dir`"):
        save_heads(make_heads(MEDUSA, llama), tmp_path / "full", llama, {})
    save_heads(make_heads(MEDUSA, llama), tmp_path / "heads", llama, {})
    with pytest.raises(ValueError, match="kind eagle"):
        load_heads(tmp_path / "heads", llama, EAGLE)
    with pytest.raises(ValueError, match="`hidden_size`"):
        load_heads(tmp_path / "heads", make_model("llama", hidden_size=64))
    with pytest.raises(ValueError, match="`vocab_size`"):
        load_heads(tmp_path / "heads", make_model("llama", vocab_size=70))


@pytest.mark.slow
def test_compiled_rows(trained, graphs):  # noqa: F811
    model, records, found = trained
    contestants = heads_comparison.Contestants(model, found, cllm=make_model("llama"))
    prompts = [record["prompt_ids"] for record in records[:2]]
    report = heads_comparison.compare_heads(
        contestants, prompts, 4, max_new_tokens=12, is_compiled=True, show_progress=False
    )
    rows = {row["name"]: row for row in report["rows"]}
    assert {"generate(), compiled", "medusa 4, compiled", "eagle 4, compiled", "CLLM: jacobi 4, compiled"} <= set(rows)
    assert all(row["num_equal"] == 2 for row in rows.values())
    for kind in KINDS:
        compiled, plain = rows[f"{kind} 4, compiled"], rows[f"{kind} 4"]
        assert compiled["tokens_per_forward"] == plain["tokens_per_forward"] > 1.5


def test_records_and_prompts(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"prompt_ids": [1], "response_ids": [2, 3]}\n\n{"prompt_ids": [4], "response_ids": [5]}\n')
    assert read_records(path, 6)[1] == {"prompt_ids": [4], "response_ids": [5]}
    assert read_prompt_ids(path, 1) == [[1]] and read_prompt_ids(path, 9) == [[1], [4]]
    with pytest.raises(ValueError, match="from 0 to 4 in `response_ids`"):
        read_records(path, 5)
    trajectories = Dataset.from_list(random_trajectories(60, 3, 9, 16, 8, seed=0), features=FEATURES)
    trajectories.save_to_disk(tmp_path / "trajectories")
    assert [record["response_ids"] for record in read_records(tmp_path / "trajectories", 60)] == [
        row["response_ids"] for row in trajectories
    ]
    path.write_text('{"prompt": "text"}\n')
    assert read_prompt_ids(path, 1) is None
    for text in ("{curly} prompt\n", '{"prompt": "one\u2028line"}\n'):
        path.write_text(text)
        assert read_prompt_ids(path, 1) is None
    path.write_text('{"prompt_ids": [1], "note": "one\u2028line"}\n{"prompt_ids": "text"}\n')
    assert read_prompt_ids(path, 1) == [[1]]
    with pytest.raises(ValueError, match="Record 2 of .* must have token ids in `prompt_ids`"):
        read_prompt_ids(path, 2)
    path.write_text('{"prompt": "text"}\n')
    with pytest.raises(ValueError, match="`prompt_ids`"):
        read_records(path, 5)
    path.write_text("")
    with pytest.raises(ValueError, match="at least one record"):
        read_records(path, 5)
    with pytest.raises(OSError):
        read_records(tmp_path / "missing", 5)


@pytest.fixture
def model_and_records(tmp_path, tokenizer):
    model = make_model("llama", vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    lines = [json.dumps(record) + "\n" for record in greedy_records(model, 4, 12)]
    (tmp_path / "records.jsonl").write_text("".join(lines))
    return tmp_path / "model", tmp_path / "records.jsonl"


def test_the_command_trains_and_compares(tmp_path, model_and_records, capsys):
    model, records = map(str, model_and_records)
    folders = {kind: str(tmp_path / kind) for kind in KINDS}
    for kind, folder in folders.items():
        options = ["--model", model, "--dataset", records, "--output-dir", folder, "--max-steps", "2"]
        assert main(["heads", "train", "--kind", kind, *options]) == 0
        assert "2 optimizer steps" in capsys.readouterr().out
    options = ["--model", model, "--prompts", records, "--num-prompts", "2", "--max-new-tokens", "8"]
    heads = [text for kind, folder in folders.items() for text in (f"--{kind}", folder)]
    written = ["--json", str(tmp_path / "heads.json")]
    assert main(["heads", "compare", *options, *heads, "--cllm", model, "--candidates", "2", *written]) == 0
    text = capsys.readouterr().out
    report = json.loads((tmp_path / "heads.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == [
        "generate()",
        "prompt lookup",
        "medusa 5",
        "medusa 5, 2 candidates",
        "eagle 8",
        "eagle 8, 2 candidates",
        "CLLM: generate()",
        "CLLM: jacobi 8",
        "CLLM: jacobi 8, 2 candidates",
    ]
    assert all(row["num_equal"] == 2 and row["num_differing"] == 0 for row in rows.values())
    assert all(name in text for name in rows)
    assert rows["medusa 5"]["trained_parameters"] == 4 * 32 * 33
    assert text.strip() == heads_comparison.format_heads(report)


def test_the_command_explains_what_is_missing(tmp_path, model_and_records, capsys):
    model, records = map(str, model_and_records)
    missing = str(tmp_path / "missing")
    assert main(["heads", "compare", "--model", model, "--prompts", records, "--medusa", missing]) == 1
    assert "heads.json" in capsys.readouterr().err
    options = ["--kind", EAGLE, "--model", model, "--dataset", records, "--output-dir", missing]
    assert main(["heads", "train", *options]) == 1
    assert "`max_seconds`" in capsys.readouterr().err


@pytest.mark.slow
def test_a_lossless_adapter_stands_beside_the_heads(tmp_path, tokenizer, model_and_records, capsys):
    base = save_base(tmp_path / "base", tokenizer, vocab_size=len(tokenizer))
    adapter = save_lossless_adapter(tmp_path / "adapter", base, tokenizer)
    options = ["--model", base, "--prompts", model_and_records[1], "--lossless", adapter, "--assistant", base]
    options += ["--num-prompts", 2, "--max-new-tokens", 12, "--json", tmp_path / "heads.json"]
    assert main(["heads", "compare", *map(str, options)]) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "heads.json").read_text())["rows"]}
    assert list(rows) == ["generate()", "prompt lookup", "assisted", "lossless 7"]
    assert all(row["num_equal"] == 2 for row in rows.values())
    assert rows["lossless 7"]["tokens_per_forward"] > 2 and rows["lossless 7"]["trained_parameters"] > 1000
