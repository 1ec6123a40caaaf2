"""What is kept of an unfinished work: it is read only by whoever would compute the very same."""

import json

import pytest

from cllm_hf.journal import Journal


def test_a_result_of_something_else_is_not_taken(tmp_path):
    journal = Journal(tmp_path / "journal")
    assert journal.once("batch", [[1, 2]], lambda: ["a"]) == ["a"]
    assert journal.once("batch", [[1, 2]], lambda: ["b"]) == ["a"]
    assert journal.once("batch", [[1, 3]], lambda: ["b"]) == ["b"]
    (tmp_path / "journal" / "batch.json").write_text("[1")
    assert journal.once("batch", [[1, 3]], lambda: ["c"]) == ["c"]
    (tmp_path / "journal" / "batch.json").write_text("[1]")
    assert journal.once("batch", [[1, 3]], lambda: ["d"]) == ["d"]


def test_a_result_with_another_byte_is_never_taken(tmp_path, caplog):
    """Every bit of a file of a journal, one at a time: the result is what was kept, or it is computed again."""
    journal, path = Journal(tmp_path), tmp_path / "batch.json"
    journal.once("batch", [[1, 2]], lambda: [[17, 4], [305]])
    sound = path.read_bytes()
    for place in range(8 * len(sound)):
        data = bytearray(sound)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        caplog.clear()
        assert journal.once("batch", [[1, 2]], lambda: "computed") in ([[17, 4], [305]], "computed")
        is_new = b"computed" in path.read_bytes()
        assert is_new == ("batch.json" in caplog.text and "is computed again" in caplog.text)
        assert is_new or json.loads(bytes(data)) == json.loads(sound)
    path.write_bytes(sound[:-1])  # cut
    assert journal.once("batch", [[1, 2]], lambda: "anew") == "anew"


def test_a_journal_without_digests_is_computed_again(tmp_path, caplog):
    """As version 0.1.0 left it."""
    Journal(tmp_path).once("batch", 1, lambda: [3])
    kept = json.loads((tmp_path / "batch.json").read_text())
    (tmp_path / "batch.json").write_text(json.dumps({"of": kept["of"], "result": [3]}))
    assert Journal(tmp_path).once("batch", 1, lambda: [4]) == [4]
    assert "batch.json has no digest of its content, as an earlier version left it" in caplog.text


def test_what_all_results_depend_on_counts_too(tmp_path):
    journals = [Journal(tmp_path, depends) for depends in (None, {"model": 1}, {"model": 2})]
    for number, journal in enumerate(journals):
        assert not journal.has("part", [1])
        assert journal.once("part", [1], lambda number=number: number) == number
        assert journal.has("part", [1]) and not journal.has("part", [2]) and not journal.has("other", [1])
    journals[-1].clear()
    assert not tmp_path.exists() and not journals[-1].has("part", [1])


def test_without_a_folder_nothing_is_kept():
    results = iter([1, 2])
    journal = Journal()
    assert [journal.once("part", [], lambda: next(results)) for _ in range(2)] == [1, 2]
    assert not journal.has("part", [])
    journal.clear()


def test_what_is_no_file_is_named(tmp_path):
    (tmp_path / "part.json").mkdir()
    with pytest.raises(OSError, match="part.json' must be a file, got a folder. Remove it"):
        Journal(tmp_path).once("part", [], lambda: 1)
