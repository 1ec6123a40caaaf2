"""`output_scores` and `output_logits`: what transformers returns for the same tokens."""

from dataclasses import fields

import pytest
import torch
from conftest import make_model, make_prompts
from lossless_models import add_random_adapter
from test_encoder_decoder import make_model as make_encoder_decoder
from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor
from transformers.generation import GenerateEncoderDecoderOutput

import cllm_hf  # noqa: F401
from cllm_hf.decoding.outputs import TokenScores


ASKED = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
NAMES = ("scores", "logits")


def assert_equal_outputs(expected, output, prompt_length):
    """Sequences are equal, and scores of each row are up to its end; after it they are 0."""
    assert output.sequences.tolist() == expected.sequences.tolist()
    for name in NAMES:
        known, ours = torch.stack(expected[name], dim=1), torch.stack(output[name], dim=1)  # [batch, length, vocab]
        assert ours.dtype == torch.float32 and ours.shape == known.shape
        assert ours.shape[1] == output.sequences.shape[1] - prompt_length
        for row, length in enumerate(output.jacobi_stats.num_generated):
            torch.testing.assert_close(ours[row, :length], known[row, :length], rtol=1e-4, atol=1e-4)
            assert not ours[row, length:].any()


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"suppress_tokens": [7, 9]},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 5},
        {"guidance_scale": 1.5},
        {"jacobi_candidates": 3},
        {"cache_implementation": "static"},
    ],
    ids=str,
)
def test_they_are_those_of_generate(llama, options, batch_size):
    input_ids, mask = make_prompts(batch_size)
    options = {"input_ids": input_ids, "attention_mask": mask, "do_sample": False, "max_new_tokens": 24, **options}
    plain = {name: value for name, value in options.items() if name != "jacobi_candidates"}
    texts = llama.generate(**plain)
    stop = texts[:, input_ids.shape[1] + 3 :: 4].unique().tolist()[:4]  # rows end at different places
    for ends in ({}, {"eos_token_id": stop}):
        expected = llama.generate(**plain, **ends, **ASKED)
        output = llama.generate(**options, **ends, **ASKED, jacobi_block_size=8)
        assert_equal_outputs(expected, output, input_ids.shape[1])
        num_accepted = output.jacobi_stats.num_accepted
        assert ends or "guidance_scale" in options or max(map(max, num_accepted)) >= 1  # more than bonus tokens


@pytest.mark.parametrize("decoding", ["jacobi", "lossless"])
def test_those_of_samples_are_what_they_were_drawn_from(llama, decoding):
    input_ids, mask = make_prompts(2)
    model = add_random_adapter(llama) if decoding == "lossless" else llama
    output = model.generate(
        input_ids=input_ids, attention_mask=mask, decoding=decoding, do_sample=True, temperature=0.7, top_k=5,
        jacobi_block_size=4, jacobi_seed=3, max_new_tokens=16, **ASKED,
    )  # fmt: skip
    texts = output.sequences
    mask = torch.cat([mask, torch.ones_like(texts[:, mask.shape[1] :])], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = llama(input_ids=texts, attention_mask=mask, position_ids=positions).logits[:, -17:-1]
    torch.testing.assert_close(torch.stack(output.logits, dim=1), logits, rtol=1e-4, atol=1e-4)
    scores = torch.stack(output.scores, dim=1)
    is_kept = scores.isfinite()
    assert (is_kept.sum(-1) == 5).all() and is_kept.gather(-1, texts[:, -16:, None]).all()
    torch.testing.assert_close(scores[is_kept], (logits / 0.7)[is_kept], rtol=1e-4, atol=1e-4)


def test_log_probabilities_of_the_text(llama):
    """As with any output of `generate`, for a model that ends its rows at different places."""
    input_ids, mask = make_prompts(3)
    options = {"input_ids": input_ids, "attention_mask": mask, "do_sample": False, "max_new_tokens": 24}
    stop = llama.generate(**options)[:, input_ids.shape[1] + 5].tolist()
    shares = []
    for further in ({}, {"decoding": "jacobi"}):
        output = llama.generate(**options, **ASKED, eos_token_id=stop, **further)
        of_tokens = llama.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
        shares.append(of_tokens.masked_fill(output.sequences[:, input_ids.shape[1] :] == 0, 0.0))
    torch.testing.assert_close(shares[1], shares[0], rtol=1e-4, atol=1e-4)


def test_encoder_decoder_models():
    model = make_encoder_decoder("bart")
    input_ids, mask = make_prompts(3)
    options = {"input_ids": input_ids, "attention_mask": mask, "do_sample": False, "max_new_tokens": 12, **ASKED}
    expected, output = model.generate(**options), model.generate(**options, jacobi_block_size=8)
    assert_equal_outputs(expected, output, 1)
    empty = {field.name for field in fields(GenerateEncoderDecoderOutput)} - {"sequences", *NAMES}
    assert "cross_attentions" in empty and all(getattr(output, name) is None for name in empty)


@pytest.mark.parametrize("asked", [(), ("scores",), ("logits",)], ids=str)
def test_only_what_is_asked_for(llama, asked):
    options = {"max_new_tokens": 6, "do_sample": False, "decoding": "jacobi"}
    options.update({f"output_{name}": True for name in asked})
    output = llama.generate(make_prompts(1)[0], **options, return_dict_in_generate=True)
    assert {name for name in NAMES if getattr(output, name) is not None} == set(asked)
    assert isinstance(llama.generate(make_prompts(1)[0], **options), torch.Tensor)  # as transformers has it


def test_processors_that_write_into_their_scores(llama):
    """transformers has them write into the logits too; here they stay those of the model."""

    class InPlace(SuppressTokensLogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, 7:20] = -torch.inf
            return scores

    options = {"do_sample": False, "max_new_tokens": 12, "logits_processor": LogitsProcessorList([InPlace([7])])}
    expected = llama.generate(make_prompts(1)[0], **options, **ASKED)
    output = llama.generate(make_prompts(1)[0], **options, **ASKED, decoding="jacobi")
    torch.testing.assert_close(torch.stack(output.scores), torch.stack(expected.scores), rtol=1e-4, atol=1e-4)
    assert torch.stack(output.scores).isinf().any() and torch.stack(output.logits).isfinite().all()


def test_what_is_kept_holds_no_more_than_the_tokens(llama, monkeypatch):
    """The logits of a whole forward pass would stay in memory with a view of some."""
    seen, add = [], TokenScores.add

    def watched(self, row, places, **values):
        add(self, row, places, **values)
        seen.extend(tensor for rows in self._kept.values() for tensor in rows[row.index])

    monkeypatch.setattr(TokenScores, "add", watched)
    llama.generate(make_prompts(1)[0], max_new_tokens=12, do_sample=False, jacobi_block_size=8, **ASKED)
    assert {tensor.untyped_storage().nbytes() for tensor in seen} == {4 * llama.config.vocab_size}


def test_models_in_sixteen_bits():
    model = make_model("llama").to(torch.bfloat16)
    output = model.generate(make_prompts(1)[0], max_new_tokens=8, do_sample=False, jacobi_block_size=4, **ASKED)
    assert {tensor.dtype for tensor in (*output.scores, *output.logits)} == {torch.float32}
    assert [step[0].argmax().item() for step in output.logits] == output.sequences[0, -8:].tolist()
