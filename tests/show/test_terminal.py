"""A drawn record shows every token of its trajectories, and only those."""

import re

import pytest

from cllm_hf.show.terminal import BlockTrajectory, format_blocks, format_record, visible_token


RECORD = {
    "data_id": "17",
    "prompt": "Count.\tUp",
    "response": "one two\nthree",
    "prompt_ids": [1, 2, 3],
    "response_ids": [4, 5, 6, 7, 8, 9],
    "states": [
        [[9, 9, 6, 9], [4, 9, 6, 7], [4, 5, 6, 7]],
        [[8, 1, 0, 0], [8, 9, 0, 0]],
    ],
    "is_greedy": True,
}
WORDS = {0: "<pad>", 1: "a\nb", 4: "one", 5: " two", 6: "\n", 7: "three", 8: "十", 9: "nine"}


def colored(text, right):
    return f"\033[{'34' if right else '31'}m{text}\033[0m"


def test_all_states_in_brackets():
    lines = format_record(RECORD, WORDS.__getitem__, color=False, width=100).splitlines()
    assert lines[:7] == [
        "`data_id` 17: a prompt of 3 tokens, a response of 6 tokens",
        "",
        "Prompt:",
        "    Count.\\tUp",
        "",
        "Response:",
        "    one two",
    ]
    assert lines[9:] == [
        "Block 0, tokens 0 to 3 of the response: 2 iterations to converge, 2 fast-forwarded, 2 stationary",
        "  0  [nine] [nine] \\n   [nine]",
        "  1  one    [nine] \\n   three",
        "  2  one     two   \\n   three",
        "",
        "Block 1, tokens 4 to 5 of the response: 1 iteration to converge, 0 fast-forwarded, 0 stationary",
        "  0  十   [a\\nb]",
        "  1  十   nine",
    ]


def test_all_states_in_colors():
    text = format_record(RECORD, WORDS.__getitem__, blocks=[1], width=100)
    lines = text.splitlines()[-2:]
    assert lines == [
        f"  0  {colored('十', True)} {colored('a' + chr(92) + 'nb', False)}",
        f"  1  {colored('十', True)} {colored('nine', True)}",
    ]
    assert "Block 0" not in text and "<pad>" not in text


@pytest.mark.parametrize("color", [True, False])
@pytest.mark.parametrize("width", [20, 33, 60, 80, 1000])
def test_wide_blocks_are_drawn_in_parts_that_hold_every_token(color, width):
    words = {token: "w" * (1 + token * 7 % 9) + str(token) for token in range(40)}
    states = [[(token * 3 + state) % 40 for token in range(16)] for state in range(4)]
    record = {**RECORD, "response_ids": states[-1], "states": [states]}
    block = format_record(record, words.__getitem__, color, width=width).split("stationary\n")[1]
    plain = re.sub("\033\\[[0-9]+m", "", block)
    assert max(map(len, (line.rstrip() for line in plain.splitlines()))) <= width
    parts = [part.splitlines() for part in plain.split("\n\n")]
    assert {len(part) for part in parts} == {4}
    for number, state in enumerate(states):
        cells = [cell.strip("[]") for part in parts for cell in part[number].split()[1:]]
        assert cells == [words[token] for token in state]
        assert {part[number].split()[0] for part in parts} == {str(number)}
    # As few parts as can be: all columns together, and in a part the number of a state and a space a column.
    columns = [max(len(words[state[column]]) for state in states) + (0 if color else 2) for column in range(16)]
    assert len(parts) >= -(-sum(columns) // (width - 4)) and (width < 1000 or len(parts) == 1)


def test_ordinary_text_of_a_block_fits_a_terminal():
    words = dict(enumerate("Natalia sold 48 clips to her friends in April , and then she sold half".split()))
    states = [list(range(15, -1, -1)), list(range(15)) + [14]]
    record = {**RECORD, "response_ids": states[-1], "states": [states]}
    block = format_record(record, lambda token: words.get(token, "."), width=120).split("stationary\n")[1]
    assert len(block.splitlines()) == 2


def test_a_token_wider_than_the_terminal_has_a_part_of_its_own():
    block = format_record(RECORD, WORDS.__getitem__, color=False, blocks=[0], width=1).split("stationary\n")[1]
    assert len(block.split("\n\n")) == 4


def test_responses_that_are_not_greedy():
    record = {**RECORD, "is_greedy": False, "states": [RECORD["states"][0], [[8, 9, 0, 0]]]}
    text = format_record(record, WORDS.__getitem__, color=False, width=100)
    assert "a response of 6 tokens, not all of it greedy" in text
    assert "Block 0, tokens 0 to 3 of the response: 2 iterations" in text
    assert text.endswith(
        "Block 1, tokens 4 to 5 of the response: its own tokens, where it is not greedy\n  0  十   nine"
    )


def test_records_of_the_columns_that_training_needs():
    record = {name: RECORD[name] for name in ("prompt_ids", "response_ids", "states")}
    assert format_record(record, str, blocks=[]).startswith(
        "`data_id` ?: a prompt of 3 tokens, a response of 6 tokens\n"
    )


@pytest.mark.parametrize("block", [2, -1])
def test_blocks_that_are_not_there(block):
    with pytest.raises(ValueError, match=f"`blocks` must be from 0 to 1, got {block}"):
        format_record(RECORD, str, blocks=[0, block])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" plain", " plain"),
        ("\r\n\t", "\\r\\n\\t"),
        ("\x1b[31m", "\\x1b[31m"),
        ("\u2028\ud800", "\\u2028\\ud800"),
        ("=" * 40, "=" * 19 + "…"),
        ("", "''"),
        ("  ", "␣␣"),
    ],
)
def test_visible_tokens(text, expected):
    assert visible_token(text) == expected


def test_columns_stay_aligned_with_wide_and_combining_characters():
    words = {1: "e\u0301", 2: "十分", 3: "ab"}
    lines = format_blocks([BlockTrajectory([[2, 3], [1, 3]])], words.__getitem__, color=False).splitlines()
    assert lines[1:] == ["  0  [十分] ab", "  1  e\u0301      ab"]
