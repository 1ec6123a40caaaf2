"""
Prompts as tokens: the same for each text whatever else is in the list, and errors by number before any work. Chats:
what a template fails at, or takes in silence, is refused with the number of the prompt and a remedy.
"""

import copy
import json

import pytest
from conftest import VOCAB_SIZE, make_model
from datasets import Dataset

from cllm_hf import CleaningRules, TrajectoryBuilder
from cllm_hf.trajectories.prompts import check_chat, encode_prompts, read_rows, render_chat
from cllm_hf.trajectories.sources import read_source


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


# Chats


STRICT = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Writes what it is given, whatever that is.
LOOSE = STRICT.replace("+ m['content']", "~ m['content']")
PARTS = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}"
)
GOOD = [{"role": "user", "content": "Hi"}]
RESPONSE = {"role": "assistant", "content": "Hello!"}


def with_template(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", [STRICT, LOOSE], ids=["strict", "loose"])
@pytest.mark.parametrize(
    ("chat", "message"),
    [
        (
            [{"from": "human", "value": "Hi"}],
            "got the keys 'from', 'value' in message 0 of prompt 2.*`human` is `user`",
        ),
        ([{"content": "Hi"}], "text in `role`, got the keys 'content'"),
        ([{"role": None, "content": "Hi"}], "text in `role`, got None"),
        ([*GOOD, RESPONSE, {"role": "user"}], "text in `content`, got none in message 2 of prompt 2"),
        ([{"role": "user", "content": None}], "text in `content`, got none"),
        ([{"role": "user", "content": 7}], "text in `content`, got 7"),
        ([{"role": "user", "content": {"text": "Hi"}}], "text in `content`, got {'text': 'Hi'}"),
        ([{"role": "user", "content": [{"type": "image"}]}], "parts of a message must be text, got {'type': 'image'}"),
        ([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "list of parts|instead of a list"),
        (
            [*GOOD, RESPONSE],
            "prompt 2, which ends with a response, of the role 'assistant'. Drop that message, or pass",
        ),
        ([*GOOD, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}], "ends with a response"),
        ([*GOOD, {"role": "Model", "content": "Hello!"}], "ends with a response, of the role 'Model'"),
        ([{"role": "user", "content": "\ud800"}], "lone surrogate .* of prompt 2"),
    ],
    ids=str,
)
def test_chats_that_are_refused_by_number(tokenizer, template, chat, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_rows([GOOD, "text", chat], None, with_template(tokenizer, template))
    assert "prompt 2" in str(caught.value) and "\n" not in str(caught.value)


def test_whatever_a_template_raises_is_said_with_the_prompt(tokenizer):
    deep = []
    for _ in range(100_000):
        deep = [deep]
    for template, chat, reason in (
        ("{{ raise_exception('roles must alternate') }}", GOOD, "roles must alternate"),
        ("{{ messages[0].content / 2 }}", GOOD, "unsupported operand"),
        ("{{ messages[3].content.x }}", GOOD, "has no element 3|undefined"),
        ("{{ messages | tojson }}", [{**GOOD[0], "extra": deep}], "recursion|Circular"),
    ):
        with pytest.raises(ValueError, match=f"got prompt 1, at which it fails .*({reason}).*Write each message as"):
            read_rows(["text", chat], None, with_template(tokenizer, template))


def test_messages_that_a_template_leaves_out_are_said(tokenizer):
    template = "{% for m in messages %}{% if m.role in ('user', 'critic') %}{{ m.content }}{% endif %}{% endfor %}"
    tokenizer = with_template(tokenizer, template)
    chat = [{"role": "system", "content": "Be short."}, *GOOD]
    assert read_rows([chat, [*chat, {"role": "critic", "content": " No. "}]], None, tokenizer)[0].text == "Hi"
    for role in ("human", "User"):
        with pytest.raises(
            ValueError, match=f"leaves out messages of the role '{role}', got one as message 0 of prompt 1"
        ):
            read_rows([GOOD, [{"role": role, "content": "Hi"}]], None, tokenizer)


def test_a_tokenizer_without_a_template_is_said(tokenizer):
    with pytest.raises(ValueError, match="chat template, got prompt 1 and a tokenizer without one. Use an instruct"):
        read_rows(["text", GOOD], None, tokenizer)


def test_chats_that_wait_for_a_response_are_rendered(tokenizer):
    strict = with_template(tokenizer, STRICT)
    tool = [*GOOD, {"role": "assistant", "content": "call"}, {"role": "tool", "content": "3"}]
    assert render_chat(GOOD, strict, "prompt 0") == "<user>Hi<assistant>"
    assert render_chat(tool, strict, "prompt 0") == "<user>Hi<assistant>call<tool>3<assistant>"
    assert render_chat([*GOOD, RESPONSE], strict, "prompt 0", is_answered=True) == "<user>Hi<assistant>Hello!"
    called = [*GOOD, {"role": "assistant", "content": None, "tool_calls": [{}]}, {"role": "tool", "content": "3"}]
    check_chat(called, "prompt 0")
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "you"}]}]
    assert render_chat(parts, with_template(tokenizer, PARTS), "prompt 0") == "Hi you"


def test_chats_are_refused_before_a_model_is_loaded(tmp_path):
    chats = [GOOD, [*GOOD, RESPONSE]]
    Dataset.from_dict({"messages": chats}).save_to_disk(str(tmp_path / "chats"))
    with pytest.raises(ValueError, match="got prompt 1, which ends with a response"):
        read_source(dataset=str(tmp_path / "chats"), prompt_column="messages")
    Dataset.from_dict({"messages": chats}).to_json(str(tmp_path / "chats.jsonl"))
    with pytest.raises(ValueError, match=r"got prompt 1 \(line 2 of '.*chats.jsonl'\), which ends with a response"):
        read_source(file=str(tmp_path / "chats.jsonl"), prompt_column="messages")
    assert read_source(file=str(tmp_path / "chats.jsonl"), prompt_column="messages", limit=1) == ([GOOD], None)
