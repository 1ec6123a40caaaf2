"""What a name is a name of: a path or an id on the Hub."""

import os
from pathlib import Path

import pytest

from cllm_hf.names import Name, check_repo_id


@pytest.fixture(autouse=True)
def _in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user" / "model").mkdir(parents=True)
    (tmp_path / "file.txt").touch()


@pytest.mark.parametrize(
    "text", ["user/model", "./user/model", "file.txt", "./none", "/none", "~/none", "none.jsonl", Path("a/b")]
)
def test_what_is_there_or_written_as_a_path_is_one(text):
    name = Name.find(text)
    assert (name.path, name.hub_id) == (Path(text), None)
    assert name.is_folder == os.path.isdir(text) and name.is_missing == (not os.path.exists(text))
    assert name.full == os.path.abspath(text) and name.short == os.path.basename(os.path.abspath(text))


@pytest.mark.parametrize("text", ["gpt2", "other/model", "other/model.v2", "other/prompts.jsonl"])
def test_everything_else_is_an_id_if_the_hub_allows_it(text):
    name = Name.find(text)
    assert (name.path, name.hub_id, name.full, name.short) == (None, text, text, text)
    assert not name.is_folder and not name.is_missing
    name.check("--model", "model")
    name.check_hub_options("main", "token")


@pytest.mark.parametrize("text", ["", "a/b/c", "no model", "a--b/c"])
def test_a_name_may_be_neither(text):
    name = Name.find(text)
    assert name.path is None and name.hub_id is None
    with pytest.raises(OSError, match="`--model` must be a folder, .* got '.*', which is not there and cannot"):
        name.check("--model", "model")


def test_what_is_no_folder_is_refused_with_the_reason():
    Name.find("user/model").check("--model", "model")
    with pytest.raises(FileNotFoundError, match="'./none', which is not there"):
        Name.find("./none").check("--model", "model")
    with pytest.raises(FileNotFoundError, match="'file.txt', which is a file"):
        Name.find("file.txt").check("--model", "model")
    Name.find("file.txt").check("dataset_name", "dataset", takes_files=True)
    with pytest.raises(ValueError, match="user/model is a folder, got `revision` or `token`"):
        Name.find("user/model").check_hub_options("main", None)


@pytest.mark.parametrize(
    "text, hub_id, for_others",
    [
        ("user/model", "user/model", "user/model"),  # it does not matter what is on this machine
        ("gpt2", None, "gpt2"),  # may be a folder as well
        ("data/prompts.jsonl", None, "data/prompts.jsonl"),
        ("./user/model", None, "path/to/model"),
        ("/home/me/model", None, "path/to/model"),
        ("runs/demo/target", None, "path/to/target"),
        ("no id/at all", None, "no id/at all"),
        (None, None, ""),
    ],
)
def test_a_recorded_name_is_known_by_its_spelling(text, hub_id, for_others):
    name = Name.recorded(text)
    assert (name.hub_id, name.for_others) == (hub_id, for_others)


def test_a_place_to_write_to_is_an_id_whatever_lies_here():
    check_repo_id("user/model", "model")
    with pytest.raises(ValueError, match="`repo_id` must be the id of a model .*, got 'a b'"):
        check_repo_id("a b", "model")
