"""What others have named stands in cards as text: it begins no markup, ends no code and marks no section."""

import ast
import copy
import re
from html import unescape

import pytest
import yaml
from collections_on_disk import make_records, write_collection
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm_hf.cards import code, plain, quoted, table
from cllm_hf.export import _new_card, usage_code
from cllm_hf.training.card import BEGIN, ModelFacts, make_model_card, renew_model_card
from cllm_hf.trajectories import card as dataset_card
from cllm_hf.trajectories.manifest import find_problem


FUZZ = settings(derandomize=True, database=None, max_examples=300)
TEXTS = st.text(st.sampled_from("ab1 `'\"\\|*_[]()<>!&;#-~$\n\r\t\x00\u2028\u202e\ud800\xe4"), max_size=14)
BAD = [
    'a"b\\',
    "```\n# pwned\n```python\nimport os",
    "x`y``z",
    "<script>alert(1)</script>",
    "<!-- cllm_hf: end -->",
    BEGIN,
    dataset_card.BEGIN,
    "\n---\nlicense: mit\n---\n# pwned",
    "a | b | c",
    "a: [b\n# pwned",
    "[x](https://evil)",
    "{{ end }} {% if x %}",
    "\u202eabc\u2028# pwned",
    "\udcff\ud800",
    "# pwned",
    "'''\n# pwned",
    "&lt;b&gt; &amp;",
]


@given(TEXTS)
@FUZZ
def test_a_text_in_code_is_that_text(text):
    written = quoted(text)
    assert ast.literal_eval(written) == text
    assert written.isprintable() and "`" not in written and "<" not in written


@given(TEXTS)
@FUZZ
def test_a_text_between_backticks_ends_where_it_ends(text):
    """By the rule of CommonMark: a run of as many backticks as at the beginning ends the code, and no other."""
    written = code(text)
    ticks = re.match("`+", written)[0]
    assert [run for run in re.findall("`+", written) if run == ticks] == [ticks] * 2 and written.endswith(ticks)
    inner = written[len(ticks) : -len(ticks)]
    assert written.isprintable() and "<!--" not in written
    words = "".join(one if one.isprintable() else "\ufffd" for one in " ".join(text.split()))
    assert inner.strip() == words.replace("<!--", "<!- -")


@given(TEXTS)
@FUZZ
def test_a_text_in_markdown_is_shown_as_it_is(text):
    """Escapes and entities taken back give the text, and what remains without them is no markup."""
    written = plain(text)
    assert written.isprintable() and "<" not in written
    words = "".join(one if one.isprintable() else "\ufffd" for one in " ".join(text.split()))
    assert unescape(re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", written)) == unescape(words)
    bare = re.sub(r"\\[!-/:-@\[-`{-~]", "", written)
    assert not re.search(r"[`*\[\]~$]", bare) and not re.search(r"(^|\W)_\w+_(\W|$)", bare)


@given(st.lists(TEXTS, min_size=2, max_size=2), st.sampled_from([plain, code]))
@FUZZ
def test_a_cell_is_one_cell(texts, write):
    row = table(("a", "b"), [[write(text) for text in texts]]).splitlines()[2]
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) == 3


def check_card(text, marks, harmless):
    """The metadata are valid, every mark is there once, all code is code, and no text has become a line of its own."""
    (head, body), (_, other) = (split_card(card) for card in (text, harmless))
    assert isinstance(yaml.safe_load(head), dict)
    assert [body.count(mark) for mark in marks] == [1] * len(marks)
    blocks = re.findall(r"^```python\n(.*?)^```$", body, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2 and all(ast.parse(block) for block in blocks)
    assert len(body.splitlines()) == len(other.splitlines())
    prose = re.sub(r"^```.*?^```$|(`+).*?\1", "", body, flags=re.DOTALL | re.MULTILINE)
    assert "<script" not in prose and "[x](https://evil)" not in prose


def split_card(card):
    return re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, flags=re.DOTALL).groups()


def model_card(text, adapter):
    return make_model_card(
        ModelFacts(
            block_size=4,
            title=text,
            base_model=text,
            adapter=f"LoRA adapter, {text}" if adapter else None,
            architecture=text,
            dataset_name=text,
            options={"block_size_schedule": [1], "context": text},
            arguments={"seed": 1, "optim": text},
            log_history=[{f"eval_{' '.join(text.split())}_agreement": 0.5, "step": 1}],
            measured={text: text},
            tags=[text],
            versions={text: text},
            has_custom_generate=True,
        )
    )


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("adapter", [False, True])
def test_names_in_a_model_card(bad, adapter):
    written = model_card(bad, adapter)
    check_card(written, (BEGIN, dataset_card.END), model_card("a name", adapter))
    assert renew_model_card(written, written) == written


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_collection(tmp_path_factory.mktemp("card"), {"train": [make_records(5)]})


def make_dataset_card(manifest, text, repo_id):
    changed = copy.deepcopy(manifest)
    changed["model"] |= {"name": text, "revision": text, "architecture": text, "dtype": text, "attention": text}
    changed["tokenizer"]["name"] = text
    changed["prompts"] |= {"source": text, "license": text}
    for part, value in (("made_with", text), ("options", text), ("counts", 3)):
        changed[part][text] = value
    assert find_problem(changed, is_whole=True) is None
    return dataset_card.make_card({"default": changed, "other": manifest}, repo_id)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("repo_id", [None, "user/name"])
def test_names_in_a_dataset_card(manifest, bad, repo_id):
    written = make_dataset_card(manifest, bad, repo_id)
    harmless = make_dataset_card(manifest, "a name", repo_id)
    check_card(written, (dataset_card.BEGIN, dataset_card.END), harmless)
    assert dataset_card.merge_card(written, written) == written


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("is_adapter", [True, False])
def test_names_in_code_that_decodes_an_exported_model(bad, is_adapter):
    (assignment,) = [one for one in ast.parse(usage_code(bad, is_adapter)).body if isinstance(one, ast.Assign)][:1]
    assert ast.literal_eval(assignment.value) == bad
    for is_lossless in {False, is_adapter}:
        text, plain = (split_card(_new_card(name, is_adapter, is_lossless))[1] for name in (bad, "name"))
        assert text.startswith("\n# ") and len(text.splitlines()) == len(plain.splitlines())
