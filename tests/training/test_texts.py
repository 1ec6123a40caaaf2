"""Training on prompts and responses as text: the tokens are those that a tokenizer makes of the whole."""

import copy
import json

import pytest
from conftest import make_model, make_word_model
from datasets import Dataset, IterableDataset

from cllm_hf import CLLMConfig, CLLMTrainer
from cllm_hf.cli import main
from cllm_hf.demo.problems import make_problems
from cllm_hf.training.texts import tokenize_texts
from cllm_hf.trajectories import prompts as prompts_module
from cllm_hf.trajectories.prompts import read_rows


PROBLEMS = make_problems(12, seed=3)
TEXTS = [{"prompt": problem.prompt, "response": problem.response} for problem in PROBLEMS]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COLUMNS = ["data_id", "prompt", "response", "prompt_ids", "response_ids"]


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / ".cache")


@pytest.fixture(scope="module")
def chat_tokenizer(byte_tokenizer):
    """One whose chats end a response with another token than its stop token."""
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def config(folder="unused", **options):
    options = {"trajectory_source": "online", "max_steps": 1, "report_to": [], "use_cpu": True, **options}
    return CLLMConfig(str(folder), **options)


def tokenize(records, tokenizer, **options):
    dataset = records if isinstance(records, (Dataset, IterableDataset)) else Dataset.from_list(records)
    return tokenize_texts(dataset, config(**options), lambda: tokenizer)


def test_a_text_becomes_the_tokens_of_the_whole_and_the_stop_token(tokenizer):
    dataset = tokenize(TEXTS, tokenizer)
    assert dataset.column_names == COLUMNS and dataset["data_id"][:] == [str(number) for number in range(12)]
    for record, text in zip(dataset, TEXTS):
        whole = tokenizer(f"{text['prompt']} {text['response']}")["input_ids"]
        assert record["prompt_ids"] + record["response_ids"] == [*whole, tokenizer.eos_token_id]
        assert (record["prompt"], record["response"]) == (text["prompt"], text["response"])


def test_a_chat_goes_through_the_template_and_ends_as_the_template_ends_it(chat_tokenizer):
    end = chat_tokenizer.convert_tokens_to_ids("<|im_end|>")
    asked = [{"role": "system", "content": "Short."}, {"role": "user", "content": "2 + 2?"}]
    reply = {"role": "assistant", "content": "It is 4."}
    rendered = chat_tokenizer.apply_chat_template([*asked, reply], tokenize=False)
    expected = chat_tokenizer(rendered.removesuffix("\n"), add_special_tokens=False)["input_ids"]
    for response in ({"response": reply["content"]}, {"completion": [reply]}, {"completion": reply["content"]}):
        (record,) = tokenize([{"prompt": asked, **response}], chat_tokenizer)
        assert record["prompt_ids"] + record["response_ids"] == expected and expected[-1] == end
        assert record["response"] == "It is 4."
    (whole,) = tokenize([{"messages": [*asked, reply]}], chat_tokenizer)
    assert whole == record
    for template in ("{{ messages[-1]['content'] }}", "{{ raise_exception('no chats') }}"):
        other = copy.deepcopy(chat_tokenizer)
        other.chat_template = "{% if add_generation_prompt %}Q:{{ messages[-1]['content'] }}A:{% else %}" + template
        other.chat_template += "{% endif %}"
        (record,) = tokenize([{"prompt": asked, "response": " 4"}], other)
        assert record["response_ids"][-1] == other.eos_token_id, "where the template says nothing"


def test_tokens_and_stop_tokens_that_are_there_stay(byte_tokenizer):
    prompt, stop = byte_tokenizer("Hm?")["input_ids"], byte_tokenizer.eos_token_id
    dataset = tokenize([{"prompt": prompt, "response": [7, 8]}, {"prompt": prompt, "response": [9]}], byte_tokenizer)
    assert dataset["prompt_ids"][:] == [prompt, prompt] and dataset["response_ids"][:] == [[7, 8], [9]]
    (record,) = tokenize([{"prompt": "Hm?", "response": "Yes.<eos>", "data_id": 7}], byte_tokenizer)
    assert record["response_ids"] == [*byte_tokenizer("Yes.")["input_ids"], stop] and record["data_id"] == "7"
    endless = copy.deepcopy(byte_tokenizer)
    endless.eos_token = None
    (record,) = tokenize([{"prompt": "Hm?", "response": "Yes."}], endless)
    assert record["response_ids"] == byte_tokenizer("Yes.")["input_ids"]


def test_labels_stay_and_other_columns_go(tokenizer):
    dataset = tokenize([{**text, "label_ids": [4, 5], "image": "x", "messages": []} for text in TEXTS], tokenizer)
    assert dataset.column_names == ["label_ids", *COLUMNS] or set(dataset.column_names) == {"label_ids", *COLUMNS}
    assert dataset["label_ids"][3] == [4, 5]


def test_a_stream_gives_the_same(tokenizer):
    expected = tokenize(TEXTS, tokenizer)
    for stream in (
        Dataset.from_list(TEXTS).to_iterable_dataset(),
        IterableDataset.from_generator(lambda: iter(TEXTS)),
    ):
        assert list(tokenize(stream, tokenizer)) == list(expected)


def test_what_is_tokens_already_stays(tokenizer):
    dataset = Dataset.from_list([{"prompt": "a", "response": "b", "prompt_ids": [1], "response_ids": [2]}])
    assert tokenize(dataset, tokenizer) is dataset and tokenize_texts(None, config(), None) is None


def test_rows_are_tokenized_in_parts(tokenizer, monkeypatch):
    asked, given = [text["prompt"] for text in TEXTS], [text["response"] for text in TEXTS]
    whole = read_rows(asked, given, tokenizer)
    monkeypatch.setattr(prompts_module, "_ROWS_AT_ONCE", 5)
    assert read_rows(asked, given, tokenizer) == whole
    for wrong, message in (
        ({"prompts": [*asked[:11], 3.5]}, "prompt 11"),
        ({"responses": [*given[:11], 3.5]}, "response 11"),
    ):
        with pytest.raises(ValueError, match=message):
            read_rows(**{"prompts": asked, "responses": given, "tokenizer": tokenizer, **wrong})


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (
            [{"prompt": "a", "response": None}],
            "A response must be a text or a list of token ids, got None as response 0",
        ),
        ([{"prompt": "a", "response": "b"}] * 2 + [{"prompt": None, "response": "b"}], "got None as prompt 2"),
        ([{"prompt": "a", "completion": [{"role": "user", "content": "b"}] * 2}], "got 2 messages as response 0"),
        ([{"prompt": "a", "response": "b"}, {"prompt": "a", "response": ""}], "got an empty one as response 1"),
        ([{"messages": [{"role": "user", "content": "b"}] * 2}], "`messages` must end in a message of the assistant"),
    ],
)
def test_records_that_are_refused(tokenizer, records, message):
    with pytest.raises(ValueError, match=message):
        tokenize(records, tokenizer)


def test_stored_states_are_needed_by_default(tokenizer, tmp_path, capsys):
    with pytest.raises(
        ValueError, match=r"`trajectory_source='dataset'` takes states, got .*prompt, response.*lossless"
    ):
        CLLMTrainer("a model that is not loaded", CLLMConfig("unused", use_cpu=True), Dataset.from_list(TEXTS))
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, TEXTS)))
    make_word_model(tokenizer).save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    arguments = ["--trajectories", str(tmp_path / "texts.jsonl"), "--output-dir", str(tmp_path / "out")]
    assert main(["train", *arguments, "--model", str(tmp_path / "target")]) == 1
    assert "takes states, got prompts and responses" in capsys.readouterr().err
    assert main(["train", *arguments, "--lossless"]) == 1
    assert "does not say which model it was made by. Pass it as `--model`" in capsys.readouterr().err


def losses(trainer):
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("options", [pytest.param({"block_size": 5}, marks=pytest.mark.slow), {"lossless": True}])
def test_it_trains_as_on_the_tokens(tokenizer, tmp_path, options):
    make_word_model(tokenizer).save_pretrained(tmp_path / "target")
    found = []
    for dataset in (Dataset.from_list(TEXTS), tokenize(TEXTS, tokenizer).remove_columns(["prompt", "response"])):
        args = config(tmp_path / "new", logging_steps=1, num_monitored_prompts=0, **options)
        held_out = {"held_out": dataset.select(range(2))}
        trainer = CLLMTrainer(str(tmp_path / "target"), args, dataset, held_out, tokenizer)
        found.append([losses(trainer), trainer.evaluate(), trainer.evaluate(dataset.select(range(3)))["eval_loss"]])
    for part in found:
        part[1] = {name: value for name, value in part[1].items() if name.endswith(("loss", "tokens"))}
    assert found[0] == found[1] and found[0][1]


def test_the_tokenizer_is_found_beside_the_model(tokenizer, tmp_path):
    make_word_model(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    trainer = CLLMTrainer(str(tmp_path), config(tmp_path / "out"), Dataset.from_list(TEXTS))
    assert list(trainer.train_dataset) == list(tokenize(TEXTS, tokenizer))


@pytest.mark.parametrize("kind", ["jsonl", pytest.param("saved", marks=pytest.mark.slow)])
def test_the_command_trains_and_goes_on(tokenizer, tmp_path, capsys, kind):
    source = tmp_path / "texts.jsonl"
    source.write_text("\n".join(json.dumps({"prompt": t["prompt"], "completion": t["response"]}) for t in TEXTS))
    if kind == "saved":
        source = tmp_path / "saved"
        Dataset.from_list(TEXTS).save_to_disk(str(source))
    make_word_model(tokenizer).save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    arguments = ["train", "--lossless", "--trajectories", str(source), "--model", str(tmp_path / "target")]
    arguments += ["--output-dir", str(tmp_path / "out"), "--save-steps", "1", "--logging-steps", "1"]
    assert main([*arguments, "--max-steps", "1"]) == 0
    assert main([*arguments, "--max-steps", "2", "--resume-from-checkpoint", "last"]) == 0
    assert "Trained for 2 optimizer steps" in capsys.readouterr().out
    assert (tmp_path / "out" / "drafter.safetensors").is_file()
    assert main([*arguments, "--trajectories-revision", "v1"]) == 1


@pytest.mark.slow
def test_a_model_of_chats_learns_from_texts(chat_tokenizer, tmp_path):
    model = make_model("llama", vocab_size=len(chat_tokenizer), max_position_embeddings=512)
    rows = [
        {"prompt": [{"role": "user", "content": text["prompt"]}], "completion": text["response"]} for text in TEXTS
    ]
    trainer = CLLMTrainer(model, config(tmp_path, lossless=True), Dataset.from_list(rows), None, chat_tokenizer)
    assert losses(trainer)[0] > 0
