"""The overhead of an iteration: what is compared with what; nothing here looks at a time."""

import json

import pytest
import torch
import transformers
from benchmarks import command, overhead
from benchmarks.command import main
from conftest import VOCAB_SIZE, make_model
from peft import LoraConfig, get_peft_model

from cllm_hf._host import CACHE_NAME
from cllm_hf.evaluation import shapes


def random_ids(*lengths):
    return [shapes.random_prompts(VOCAB_SIZE, 1, length, seed=length)[0] for length in lengths]


class RecordingForward(overhead.BareForward):
    """Remembers what it was asked for, in `asked`."""

    asked: list

    def seconds(self, cache_length):
        self.asked.append((self.width, cache_length))
        return super().seconds(cache_length)


@pytest.mark.parametrize("pairs", [True, False])
def test_overhead_compares_the_same_forwards(monkeypatch, pairs):
    model, prompt = make_model("llama"), random_ids(9)[0]
    RecordingForward.asked = []
    monkeypatch.setattr(overhead, "BareForward", RecordingForward)
    methods = overhead.overhead_methods(model, [1, 4])
    report = overhead.measure_overhead(methods, prompt, iterations=6, rounds=2, pairs=pairs, show_progress=False)
    # The forward passes of `generate` at block size 4, as a hook sees them.
    seen = []

    def look(module, args, kwargs):
        seen.append((kwargs["input_ids"].shape[1], kwargs[CACHE_NAME].get_seq_length()))

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    ids = torch.tensor([prompt])
    model.generate(ids, jacobi_block_size=4, do_sample=False, max_new_tokens=11 if pairs else 10)
    handle.remove()
    full = [forward for forward in seen[1:] if forward[0] == 4][:6]
    one_by_one = [(1, length) for length in range(9, 15)]
    assert RecordingForward.asked == 3 * (one_by_one + one_by_one + full)  # in turns, one of them to warm up

    assert [(row["method"], row["n"]) for row in report["rows"]] == [("generate()", 1), ("jacobi", 1), ("jacobi", 4)]
    for row, num_forwards in zip(report["rows"], (6, 6, len(full))):
        assert len(row["rounds"]) == 2
        for turn in row["rounds"]:
            assert len(turn["forward_seconds"]) == num_forwards
            assert len(turn["iteration_seconds"]) == (num_forwards if pairs else 1)


def test_bare_forwards_leave_the_text_alone(monkeypatch):
    model, prompt, outputs = make_model("llama"), random_ids(9)[0], []
    generate = type(model).generate

    def record(self, *args, **kwargs):
        outputs.append(generate(self, *args, **kwargs))
        return outputs[-1]

    monkeypatch.setattr(type(model), "generate", record)
    methods = overhead.overhead_methods(model, [4])
    overhead.measure_overhead(methods, prompt, iterations=6, rounds=1, pairs=True, show_progress=False)
    monkeypatch.undo()
    expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=11)
    for output in outputs:
        assert output.sequences.equal(expected[:, : output.sequences.shape[1]])


def test_ratios_are_medians_of_pairs_or_of_means():
    assert overhead._summary([2.0, 6.0, 4.0], [1.0, 2.0, 8.0]) == (4.0, 2.0, 2.0)
    assert overhead._summary([3.0], [1.0, 2.0, 3.0]) == (3.0, 2.0, 1.5)


def test_overhead_of_too_short_responses(monkeypatch):
    model, prompt = make_model("llama"), random_ids(9)[0]
    monkeypatch.setattr(overhead, "_generate", lambda method, prompt, length: (1.0, [length]))
    methods = overhead.overhead_methods(model, [4])
    for pairs in (True, False):
        with pytest.raises(ValueError, match="Raise `--iterations`"):
            overhead.measure_overhead(methods, prompt, 2, pairs=pairs, show_progress=False)


def test_compiled_methods_are_added():
    model = make_model("llama")
    names = [(m.name, m.is_compiled) for m in overhead.overhead_methods(model, [8], is_compiled=True)]
    assert names == [
        ("generate()", False),
        ("jacobi", False),
        ("generate(), compiled", True),
        ("jacobi, compiled", True),
    ]


def test_overhead_of_shape_and_model(tiny_shape, model_folder, tmp_path, capsys):
    arguments = ["overhead", "--iterations", "3", "--rounds", "2", "--prompt-length", "5"]
    arguments += ["--block-sizes", "1", "3", "--json", str(tmp_path / "o.json")]
    for source in (["--shape", "4m"], ["--model", str(model_folder)]):
        assert main([*arguments, *source]) == 0
        printed = capsys.readouterr().out
        report = json.loads((tmp_path / "o.json").read_text())
        assert overhead.format_overhead(report["reports"]) + "\n" == printed
        assert [row["n"] for row in report["reports"][0]["rows"]] == [1, 1, 3]
        assert report["reports"][0]["name"] == source[1]


def test_overhead_of_an_adapter(model_folder, tokenizer, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    adapter = tmp_path / "adapter"
    get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False)).save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)
    arguments = ["--model", str(adapter), "--block-sizes", "4", "--json", str(tmp_path / "a.json")]
    assert main(["overhead", "--rounds", "1", "--iterations", "3", *arguments]) == 0
    environment = json.loads((tmp_path / "a.json").read_text())["reports"][0]["environment"]
    assert environment["architecture"] == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "4m", "--model", "m"], "got both"),
        (["--model", "./none"], "'./none', which is not there"),
    ],
)
def test_errors_are_explained(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(command, "make_random_model", None)  # nothing long has begun
    assert main(["overhead", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("benchmark.py: ") and error.count("\n") == 1 and message in error
