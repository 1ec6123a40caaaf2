"""Files of prompts: read by what is in them; what cannot be read is named with its place and the remedy."""

import gzip
import json

import pytest
from datasets import Dataset

from cllm_hf.trajectories.sources import (
    read_prompts,
    read_prompts_and_answers,
    read_prompts_and_responses,
    read_source,
)


RECORDS = [{"question": "What is 2 + 2?", "response": "four"}, {"question": "naïve \u2028 { [", "response": "eight"}]
EXPECTED = ([record["question"] for record in RECORDS], ["four", "eight"])
FORMS = {
    "lines": "\n".join(map(json.dumps, RECORDS)),
    "windows lines": "\r\n".join(map(json.dumps, RECORDS)),
    "array": json.dumps(RECORDS),
    "array of lines": "[\n" + ",\n".join(map(json.dumps, RECORDS)) + "\n]\n",
    "indented array": "\n\n" + json.dumps(RECORDS, indent=2, ensure_ascii=False),
}


@pytest.mark.parametrize("mark", [b"", "\ufeff".encode()], ids=["plain", "with a mark"])
@pytest.mark.parametrize("name", ["prompts.json", "prompts.jsonl", "prompts.JSON", "prompts.txt", "prompts"])
@pytest.mark.parametrize("form", FORMS)
def test_records_are_read_in_every_form(tmp_path, form, name, mark):
    path = tmp_path / name
    path.write_bytes(mark + FORMS[form].encode())
    assert read_source(file=str(path)) == read_prompts_and_responses(path) == EXPECTED
    assert read_prompts(path, 1) == EXPECTED[0][:1]
    assert read_prompts_and_answers(path) == EXPECTED
    assert read_source(file=str(path), prompt_column="response", limit=1) == (["four"], ["four"])


def test_one_object_is_one_record(tmp_path):
    for text in (json.dumps(RECORDS[0]), json.dumps(RECORDS[0], indent=2), '{"question": "What is 2 + 2?",\n"x": 3}'):
        (tmp_path / "prompt.json").write_text(text)
        assert read_prompts(tmp_path / "prompt.json") == EXPECTED[0][:1]


def test_text_is_text_even_if_it_looks_like_json(tmp_path):
    lines = ["[INST] hi", "[1, 2, 3]", '["a"]', "]", "[x](y)", "[] or {}"]
    for mark in (b"", "\ufeff".encode()):
        (tmp_path / "prompts.txt").write_bytes(mark + "\r\n".join(lines).encode())
        assert read_source(file=str(tmp_path / "prompts.txt")) == (lines, None)
    for line in lines:
        (tmp_path / "prompts.txt").write_text(line + "\n")
        assert read_prompts(tmp_path / "prompts.txt") == [line]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "[]", "must hold at least one prompt, got none in .*, an empty array"),
        ("a.json", "[\n]", "must hold at least one prompt"),
        ("a.json", '[{"prompt": "a"}', "must be a JSON array where it begins like one"),
        ("a.txt", '[\n{"prompt": "a"},\n]', "must be a JSON array where it begins like one"),
        ("a.json", '["a", "b"]', "Record 1 of .* in a field `prompt` or `question`, got 'a'. Correct that record"),
        ("a.json", '[{"prompt": "a"}, {"text": "b"}]', "Record 2 of .* in a field `prompt` or `question`"),
        (
            "a.json",
            '[{"prompt": "a", "response": "b"}, {"prompt": "c"}]',
            "Record 2 of .* must have text in the field",
        ),
        ("a.json", '{"data": [{"prompt": "a"}]}', "Line 1 of .* in a field `prompt` or `question`"),
        ("a.json", "3", "Line 1 of .* in a field `prompt`"),
        ("a.jsonl", '{"prompt": "a"}\n' + "[" * 100_000, "Line 2 of .* must be JSON.*nested too deeply"),
        ("a.jsonl", '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}", "Line 1 of .* must be JSON.*nested too deep"),
        ("a.json", "[" * 100_000, "must be a JSON array .*nested too deeply"),
        ("a.jsonl", '{"prompt": ' + "9" * 5000 + "}", "Line 1 of .* must be JSON"),
        (
            "a.jsonl",
            '{"prompt": "a"}\n\n{"prompt": "b \\ud83d"}',
            r"surrogate .* of prompt 1 \(line 3 of '.*a.jsonl'\)",
        ),
        ("a.json", '[{"prompt": "\\ud83d"}]', r"surrogate .* of prompt 0 \(record 1 of '.*a.json'\)"),
        ("a.jsonl", '{"prompt": "a", "response": "\\ud83d"}', r"surrogate .* of the response to prompt 0 \(line 1 of"),
        ("a.jsonl", '{"prompt": [{"role": "user", "value": "Hi"}]}', r"none in message 0 of prompt 0 \(line 1 of"),
    ],
    ids=lambda value: value[:40],
)
def test_json_that_is_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_source(file=str(tmp_path / name))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_what_is_in_other_fields_does_not_matter(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "raw": "\\ud83d"}\n')
    assert read_prompts(tmp_path / "a.jsonl") == ["a"]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet", "arrow", "CSV"])
def test_tables_are_refused_with_what_reads_them(tmp_path, suffix):
    path, table = tmp_path / f"table.{suffix}", Dataset.from_list(RECORDS)
    if suffix == "parquet":
        table.to_parquet(str(path))
    elif suffix == "arrow":
        table.save_to_disk(str(tmp_path / "disk"))
        next((tmp_path / "disk").glob("*.arrow")).rename(path)
    else:
        table.to_csv(str(path), sep="\t" if suffix == "tsv" else ",")
    with pytest.raises(ValueError, match=f"got the table .*--dataset-name .*table.{suffix}`"):
        read_prompts(path)
    assert read_source(dataset=str(path), response_column="response")[0] == EXPECTED[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"hi\n", mtime=0), "compressed by gzip: unpack it first"),
        ("hi\n".encode("utf-16"), "it is in UTF-16: save it as UTF-8"),
        (b"\x89PNG\r\n\x1a\n\x00", "must be a text file in UTF-8"),
        (b"a\0b\n", "a zero byte, at character 1"),
        (b"", "must hold at least one prompt"),
        ("\ufeff\n".encode(), "must hold at least one prompt"),
    ],
    ids=str,
)
def test_files_that_are_no_text_are_refused(tmp_path, content, message):
    for name in ("prompts.txt", "prompts.json"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_prompts(tmp_path / name)


def test_folders_and_missing_files_are_refused(tmp_path):
    with pytest.raises(
        OSError, match="got the folder .* Name a file in it, or read it as a dataset by .*--dataset-name"
    ):
        read_prompts(tmp_path)
    for name in ("none.txt", "none.csv"):
        with pytest.raises(OSError, match="must be a file that can be read, got .*none"):
            read_prompts(tmp_path / name)
