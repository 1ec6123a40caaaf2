"""A repetition penalty: all places of a forward pass at once give what one position after the other does."""

import pytest
import torch
from conftest import make_prompts
from lossless_models import add_random_adapter
from transformers import (
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    MinLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
)

from cllm_hf.decoding import verify
from cllm_hf.decoding.verify import StepwiseVerifier, TextVerifier, Verifier, make_verifier


PROMPT_LENGTH = 9
PENALTY = RepetitionPenaltyLogitsProcessor(1.3)


def choose(processors, criteria=()):
    input_ids = torch.ones(2, PROMPT_LENGTH, dtype=torch.long)
    criteria = StoppingCriteriaList([MaxLengthCriteria(30), *criteria])
    options = {"pad_id": 0, "max_length": 30, "streamer": None, "same_length": False, "noise": None}
    return make_verifier(input_ids, LogitsProcessorList(processors), criteria, **options)


def ignoring(number):
    return RepetitionPenaltyLogitsProcessor(1.3, prompt_ignore_length=number)


@pytest.mark.parametrize(
    ("processors", "criteria", "kind"),
    [
        ([], [], Verifier),
        ([TemperatureLogitsWarper(2.0)], [EosTokenCriteria([3])], Verifier),
        ([PENALTY], [EosTokenCriteria([3])], TextVerifier),
        ([PENALTY, TemperatureLogitsWarper(2.0)], [], TextVerifier),
        ([ignoring(torch.tensor([0, PROMPT_LENGTH - 1]))], [], TextVerifier),
        # Of a text that is ignored, no token can fill up a shorter one.
        ([ignoring(torch.tensor([0, PROMPT_LENGTH]))], [], StepwiseVerifier),
        ([ignoring(PROMPT_LENGTH)], [], StepwiseVerifier),
        ([PENALTY, RepetitionPenaltyLogitsProcessor(1.1)], [], StepwiseVerifier),
        ([PENALTY, MinLengthLogitsProcessor(20, 3, device="cpu")], [], StepwiseVerifier),
        ([PENALTY], [MaxTimeCriteria(100.0)], StepwiseVerifier),
    ],
)
def test_which_processors_are_asked_for_all_places_at_once(processors, criteria, kind):
    assert type(choose(processors, criteria)) is kind


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"jacobi_candidates": 3},
        {"do_sample": True, "temperature": 0.8, "top_k": 30, "jacobi_seed": 7},
        {"eos_token_id": [20, 30, 40], "jacobi_block_size": 5},
        {"decoding": "lossless", "jacobi_block_size": 5},
        {"decoding": "lossless", "jacobi_candidates": 2, "do_sample": True, "jacobi_seed": 7},
    ],
    ids=str,
)
def test_both_ways_give_the_same_text(llama, monkeypatch, options, batch_size):
    """Rows of different lengths, with padding, whose text has tokens that are fed again."""
    model = add_random_adapter(llama) if options.get("decoding") == "lossless" else llama
    chosen = []
    make = verify.make_verifier
    monkeypatch.setattr(
        "cllm_hf.decoding.loop.make_verifier",
        lambda *args, **options: chosen.append(make(*args, **options)) or chosen[-1],
    )
    for seed in range(2):
        input_ids, mask = make_prompts(batch_size, PROMPT_LENGTH, seed)
        texts = []
        for at_once in (True, False):
            monkeypatch.setattr(verify, "_looks_at_tokens_alone", lambda *_, at_once=at_once: at_once)
            settings = {"do_sample": False, "decoding": "jacobi", "max_new_tokens": 24, "repetition_penalty": 1.4}
            output = model.generate(input_ids=input_ids, attention_mask=mask, **{**settings, **options})
            texts.append(output.tolist())
        assert texts[0] == texts[1]
        assert [type(one) for one in chosen[-2:]] == [TextVerifier, StepwiseVerifier]


@pytest.mark.parametrize("ignored", [None, 0, 4, torch.tensor([3, 1, 0, 8]), torch.tensor([9, 9, 9, 9])], ids=str)
def test_a_penalty_of_ones_own(llama, ignored):
    """It may ignore as much of the prompt as it likes."""
    input_ids, mask = make_prompts(4, PROMPT_LENGTH, padding=False)
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 24}
    expected, ours = (
        llama.generate(input_ids, **options, decoding=decoding, logits_processor=LogitsProcessorList([penalty]))
        for decoding in ("autoregressive", "jacobi")
        for penalty in [RepetitionPenaltyLogitsProcessor(1.6, prompt_ignore_length=ignored)]
    )
    assert ours.tolist() == expected.tolist()
