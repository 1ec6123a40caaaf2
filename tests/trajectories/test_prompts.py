"""Prompts as tokens: the same for each text whatever else is in the list, and errors by number before any work."""

import json

import pytest
from conftest import VOCAB_SIZE, make_model

from cllm_hf import CleaningRules, TrajectoryBuilder
from cllm_hf.trajectories.prompts import encode_prompts, read_rows


WORDS = ["</s>", "<s>", "<unk>", "what", "is", "the", "sum", "of", "two"]
STOP, START, IS = 0, 1, 4
# How tokenizers begin and end a text: OPT's, T5's, one with two marks, BERT's, one with all.
ENDS = {
    "</s> $A": (["</s>"], []),
    "$A </s>": ([], ["</s>"]),
    "<s> $A </s>": (["<s>"], ["</s>"]),
    "</s> $A </s>": (["</s>"], ["</s>"]),
    "<s> $A": (["<s>"], []),
    "<s> $A <s>": (["<s>"], ["<s>"]),
    "$A": ([], []),
}
TEXTS = ["what is", "</s>", "what </s>", "</s> what", "</s> </s>", "is is is"]


def make_tokenizer(single):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("</s>", STOP), ("<s>", START)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("single", ENDS)
def test_only_the_stop_token_that_a_tokenizer_adds_is_taken_off(single):
    tokenizer, (start, end) = make_tokenizer(single), ENDS[single]
    kept = [*start, *(token for token in end if token != "</s>")]
    for text in TEXTS:
        ids = encode_prompts([text], tokenizer)[0]
        expected = [*start, *text.split(), *kept[len(start) :]]
        assert tokenizer.convert_ids_to_tokens(ids) == expected, text
    # Whatever stands first, and whatever else is in the list.
    alone = {text: encode_prompts([text], tokenizer)[0] for text in TEXTS}
    for first in ["", "  ", "\n", *TEXTS]:
        found = encode_prompts([first, *TEXTS], tokenizer)
        assert found[1:] == [alone[text] for text in TEXTS], first
        assert encode_prompts([first], tokenizer)[0] == found[0]


@pytest.mark.parametrize("single", ENDS)
def test_responses_go_on_where_prompts_end(single):
    tokenizer = make_tokenizer(single)
    for prompt in ["what is", "</s>", "what </s>"]:
        rows = read_rows(["", prompt], ["", "the sum"], tokenizer)
        assert tokenizer.convert_ids_to_tokens(rows[1].response_ids)[:2] == ["the", "sum"]
        assert rows[1].prompt_ids == read_rows([prompt], None, tokenizer)[0].prompt_ids


def test_an_empty_prompt_is_dropped_alone():
    tokenizer, model = make_tokenizer("</s> $A"), make_model("llama")
    options = {"cleaning": CleaningRules(max_token_run=None, max_sentence_repeats=None, drop_empty=False)}
    builder = TrajectoryBuilder(model, tokenizer, 4, 8, show_progress=False, **options)
    prompts = ["what is", "the sum of two"]
    expected = builder.build(prompts)["prompt_ids"]
    for empty in ("", " \n"):
        assert builder.build([empty, *prompts])["prompt_ids"] == expected
        assert builder.counts["empty_prompt"] == 1
    assert [ids[0] for ids in expected] == [STOP, STOP] and max(map(max, expected)) < VOCAB_SIZE


@pytest.mark.parametrize("escape", [r"\ud83d", r"what \ude00 is"])
def test_half_characters_are_refused_by_number(tokenizer, escape):
    text = json.loads(f'"{escape}"')
    with pytest.raises(ValueError, match="lone surrogate .* of prompt 1.*take it out"):
        read_rows(["Mia", text], None, tokenizer)
    with pytest.raises(ValueError, match="lone surrogate .* of response 1.*take it out"):
        read_rows(["Mia", "Tom"], ["has", text], tokenizer)


def test_values_that_are_no_prompts_are_shown_in_short(tokenizer):
    deep = {}
    for _ in range(100_000):
        deep = {"a": deep}
    for value in (deep, [1, "a"] * 10_000, [deep, 3]):
        with pytest.raises(ValueError, match="as prompt 1. Pass a column") as caught:
            read_rows(["Mia", value], None, tokenizer)
        assert len(str(caught.value)) < 400
    with pytest.raises(ValueError, match="as response 1") as caught:
        read_rows(["Mia", "Tom"], ["has", deep], tokenizer)
    assert len(str(caught.value)) < 400
