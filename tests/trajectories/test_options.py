"""Cleaning: what is dropped and why, what is not, and that good answers stay."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm_hf import CleaningRules
from cllm_hf.demo.problems import make_problems
from cllm_hf.trajectories.options import longest_run, most_repeats


GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl"
STOP = [1, 2]
RULES = CleaningRules()


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, 2), max_size=30))
def test_longest_run_equals_a_slow_reference(tokens):
    runs = [
        end - start
        for start in range(len(tokens))
        for end in range(start + 1, len(tokens) + 1)
        if len(set(tokens[start:end])) == 1
    ]
    assert longest_run(tokens) == max(runs, default=0)


@pytest.mark.parametrize("start", [0, 3, 20])
def test_a_run_of_ten_tokens_is_dropped_and_one_of_nine_is_not(start):
    before, after = list(range(10, 10 + start)), list(range(30, 40))
    assert RULES.reason_to_drop(before + [7] * 9 + after, "some text", STOP) is None
    assert RULES.reason_to_drop(before + [7] * 10 + after, "some text", STOP) == "token_repetition"
    assert RULES.reason_to_drop(before + [7] * 5 + [8] + [7] * 9 + after, "some text", STOP) is None
    assert CleaningRules(max_token_run=None).reason_to_drop([7] * 99, "some text", STOP) is None
    assert CleaningRules(max_token_run=3).reason_to_drop([7] * 3, "some text", STOP) == "token_repetition"


@pytest.mark.parametrize(
    "sentence",
    [
        "The answer is five. ",
        "Is the answer five? ",
        "The answer is five!\n",
        "- the answer is five\n",
        "这个问题的答案是五个苹果。",
        "それは正しい答えではありません！",
        "He pays $3.50 an hour. ",
        "Look at example.com/a.html. ",
        "The answer is five.",
        "The answer is\tfive .\r\n",
    ],
)
def test_the_fourth_time_of_a_sentence_is_too_much(sentence):
    for times in range(1, 6):
        assert most_repeats(sentence * times) == times
        assert most_repeats("Something else stands here. " + sentence * times) == times
    between = "".join(f"{sentence}\nNow to number {number}. " for number in "abcd")
    assert RULES.reason_to_drop([5, 6], sentence * 3, STOP) is None
    assert RULES.reason_to_drop([5, 6], sentence * 4, STOP) == "sentence_repetition"
    assert RULES.reason_to_drop([5, 6], between, STOP) == "sentence_repetition"
    assert CleaningRules(max_sentence_repeats=None).reason_to_drop([5, 6], sentence * 99, STOP) is None


def test_case_spaces_and_signs_around_make_no_difference():
    assert most_repeats('The answer is 5. THE  answer is 5!\n\t"the answer\tis 5"\n(The answer is 5)') == 4
    assert most_repeats("The answer is 5. The answer is 6. The answer is 5.5. The answer is .5.") == 1


@pytest.mark.parametrize(
    "text",
    [
        "Yes. No. " * 50,
        "| --- | --- | --- | --- |\n" * 50,
        "==========\n" * 50,
        "... ! ? " * 50,
        "",
        # Split at its titles, this would be one sentence four times.
        "Mr. Brown has five figs. Mrs. Brown has five figs. Dr. Brown has five figs. Prof. Brown has five figs.",
        "She earns $3.5 a day. He earns $4.5 a day. It costs $5.5 a day. We earn $6.5 a day.",
        "It grows by 3.14159265358, then 2.14159265358, then 1.14159265358, then 0.14159265358.",
        "See a.example.com/index, b.example.com/index, c.example.com/index and d.example.com/index.",
        "Eat fruit, e.g. apples and pears, or nuts, e.g. almonds and pecans, or roots, e.g. carrots, or e.g. leaves.",
    ],
)
def test_what_only_looks_repeated_is_kept(text):
    assert most_repeats(text) <= 1
    assert CleaningRules(drop_empty=False).reason_to_drop([5, 6], text, STOP) is None


def test_worked_answers_are_kept():
    for problem in make_problems(500, seed=0):
        words = problem.response.split()
        ids = [100 + sorted(set(words)).index(word) for word in words]
        assert RULES.reason_to_drop([*ids, 1], problem.response, STOP) is None


@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K is not here")
def test_answers_of_gsm8k_are_kept():
    answers = [json.loads(line)["answer"] for line in GSM8K.read_text().splitlines()]
    assert len(answers) > 7000
    assert [answer for answer in answers if RULES.reason_to_drop([5, 6], answer, STOP)] == []


def test_empty_and_truncated():
    for ids, text in (([], ""), ([1], ""), ([2, 1], "</s>"), ([5, 1], " \n\t"), ([5, 6], "")):
        assert RULES.reason_to_drop(ids, text, STOP) == "empty"
    assert RULES.reason_to_drop([5], "five", STOP) is None
    kept, whole = CleaningRules(drop_empty=False), CleaningRules(drop_empty=False, drop_truncated=True)
    for ids, text, reason in (
        ([], "", "truncated"),
        ([1], "", None),
        ([5, 1], "five", None),
        ([5], "five", "truncated"),
        ([1, 5], "five", "truncated"),
    ):
        assert kept.reason_to_drop(ids, text, STOP) is None
        assert whole.reason_to_drop(ids, text, STOP) == reason
        assert whole.reason_to_drop(ids, text, frozenset()) == "truncated"


def test_the_first_reason_is_given():
    rules, loop = CleaningRules(drop_truncated=True), "The answer is five. " * 9
    assert rules.reason_to_drop([], "", STOP) == "empty"
    assert rules.reason_to_drop([7] * 20, loop, STOP) == "truncated"
    assert rules.reason_to_drop([7] * 20 + [1], loop, STOP) == "token_repetition"
    assert rules.reason_to_drop([7, 8, 1], loop, STOP) == "sentence_repetition"


def test_rules_go_into_json_and_back():
    rules = CleaningRules(max_token_run=None, max_sentence_repeats=5, drop_truncated=True, max_prompt_tokens=100)
    assert CleaningRules(**json.loads(json.dumps(rules.to_dict()))) == rules
    assert RULES.to_dict() == {
        "max_token_run": 10,
        "max_sentence_repeats": 3,
        "drop_empty": True,
        "drop_truncated": False,
        "max_prompt_tokens": None,
    }


@pytest.mark.parametrize(
    "options",
    [
        {"max_token_run": 1},
        {"max_token_run": True},
        {"max_token_run": 10.0},
        {"max_sentence_repeats": 0},
        {"max_prompt_tokens": "9"},
        {"drop_empty": 1},
        {"drop_truncated": None},
    ],
)
def test_rules_that_are_refused(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
        CleaningRules(**options)
