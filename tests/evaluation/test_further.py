"""Responses to judge are those of `generate()`, whichever way they are decoded, and each group is decoded once."""

import pytest
import torch
from conftest import make_word_model
from peft import LoraConfig, get_peft_model

from cllm_hf.demo.problems import make_problems
from cllm_hf.evaluation import further
from cllm_hf.evaluation.benchmark import DecodingMethod, decode_all
from cllm_hf.evaluation.further import decode_further
from cllm_hf.evaluation.progress import Progress
from cllm_hf.journal import Journal


GREEDY = {"decoding": "autoregressive", "use_cache": True}
LONGEST = 14


@pytest.fixture
def ways(monkeypatch):
    """Which way is taken, a letter a group."""
    taken = []
    for letter, name in (("c", "_decode_continuously"), ("g", "_decode_by_generate")):
        decode = getattr(further, name)
        monkeypatch.setattr(
            further, name, lambda *args, decode=decode, letter=letter: taken.append(letter) or decode(*args)
        )
    return taken


@pytest.fixture
def prompts(tokenizer):
    return [tokenizer(problem.prompt)["input_ids"] for problem in make_problems(7, seed=3)]


def decode(model, prompts, tokenizer, batch_size=None, journal=None, say=None):
    method = DecodingMethod("target model, generate()", model, GREEDY)
    journal, progress = journal or Journal(), Progress(say=say)
    return decode_further("target", method, prompts, LONGEST, tokenizer.pad_token_id, batch_size, journal, progress)


def alone(model, prompts):
    return decode_all(DecodingMethod("", model, GREEDY), prompts, LONGEST, show_progress=False)


@pytest.mark.parametrize(
    ("change", "batch_size"),
    [
        ("plain", None),
        ("plain", 3),
        ("adapter", None),
        ("sampling defaults", None),
        ("processor", None),
        ("unpackable", None),
    ],
)
def test_they_are_those_of_single_prompts(tokenizer, prompts, ways, monkeypatch, change, batch_size):
    model = make_word_model(tokenizer)
    if change == "adapter":
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    elif change == "sampling defaults":  # as real models have them
        model.generation_config.update(do_sample=True, temperature=0.7, top_p=0.9)
    elif change == "processor":
        model.generation_config.repetition_penalty = 1.7
    elif change == "unpackable":

        def refuse(model):
            raise ValueError("no packed forward passes")

        monkeypatch.setattr(further, "check_packable", refuse)
    found = decode(model, prompts, tokenizer, batch_size)
    assert found == alone(model, prompts)
    assert len({len(response) for response in found}) > 1 or change == "adapter"  # a random one does not stop
    assert ways == ([] if batch_size else ["g" if change in ("processor", "unpackable") else "c"])


def test_a_group_is_decoded_once(tokenizer, prompts, ways, tmp_path, monkeypatch):
    monkeypatch.setattr(further, "_PROMPTS_AT_ONCE_ON_CPU", 3)
    model = make_word_model(tokenizer)
    expected = alone(model, prompts)
    for removed, num_decoded, num_kept in ((0, 3, 0), (0, 0, 7), (1, 1, 4)):
        for file in sorted(tmp_path.glob("*.json"))[:removed]:
            file.unlink()
        said: list[str] = []
        del ways[:]
        assert decode(model, prompts, tokenizer, journal=Journal(tmp_path), say=said.append) == expected
        assert ways == ["c"] * num_decoded
        assert any(f": {num_kept} of 7 prompts are of an earlier run" in line for line in said) == (num_kept > 0)


def test_no_prompts_no_responses(tokenizer, ways):
    assert decode(make_word_model(tokenizer), [], tokenizer) == [] and ways == []


def test_where_memory_runs_out_there_are_fewer_rows(tokenizer, prompts, monkeypatch):
    """Both ways go on with half as many."""
    sizes, run = [], further.ContinuousBatch.run

    def limited(self, *args):
        sizes.append(self.num_rows)
        if self.num_rows > 20:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return run(self, *args)

    monkeypatch.setattr(further.ContinuousBatch, "run", limited)
    model = make_word_model(tokenizer)
    assert decode(model, prompts, tokenizer) == alone(model, prompts) and sizes == [64, 32, 16]
