"""Pushing trajectories and loading them back, with the real client of the Hub and a Hub in memory."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from collections_on_disk import make_records, write_collection
from conftest import make_word_model
from huggingface_hub import DatasetCard
from loopback_hub import LoopbackHub

from cllm_hf import TrajectoryBuilder
from cllm_hf.demo.problems import make_problems
from cllm_hf.trajectories.hub import check_can_push, push_trajectories


RECORDS = make_records(20)
SHARDS = {"train": [RECORDS[:6], [], RECORDS[6:12]], "test": [RECORDS[12:15], []]}


class Client:
    """Runs code in a process that knows the Hub, and gives back what it calls `result`."""

    def __init__(self, hub, home):
        self.hub = hub
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).parents[1] / "hub_client.py"],
            env={**os.environ, **hub.environment(home, token=None)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, code, token, names):
        values = {name: str(value) if isinstance(value, Path) else value for name, value in names.items()}
        self.process.stdin.write(json.dumps({"code": code, "token": token, "names": values}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def run(self, code, token="hf_write", **names):
        answer = self.ask(code, token, names)
        assert "error" not in answer, answer["trace"]
        return answer["result"]

    def fail(self, code, token="hf_write", **names):
        answer = self.ask(code, token, names)
        assert "error" in answer, f"should have been refused, gave {answer['result']}"
        return answer["error"], answer["message"]

    def push(self, folder, repo_id, **options):
        code = "result = push_trajectories(folder, repo_id, **options)"
        return self.run(code, folder=folder, repo_id=repo_id, options=options)


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with LoopbackHub() as hub:
        client = Client(hub, tmp_path_factory.mktemp("home"))
        yield client
        client.process.stdin.close()
        client.process.wait()


@pytest.fixture
def hub(client):
    client.hub.requests.clear()
    return client.hub


@pytest.fixture
def folder(tmp_path):
    write_collection(tmp_path / "made", SHARDS)
    return tmp_path / "made"


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def published(folder):
    """What of a collection lies on the Hub, byte for byte: all but the card and shards without records."""
    manifest = json.loads((folder / "manifest.json").read_text())
    left_out = {name for name, entry in manifest["shards"].items() if not entry["records"]} | {"README.md"}
    return {name: data for name, data in contents(folder).items() if name not in left_out}


def card_of(hub, repo_id, revision="main"):
    return DatasetCard(hub.repositories[repo_id].files(revision)["README.md"].decode())


def test_what_is_pushed_is_loaded(client, hub, folder):
    before = contents(folder)
    address = client.push(folder, "user/first", private=True)
    repository = hub.repositories["user/first"]
    assert address == f"{hub.address}/datasets/user/first"
    assert repository.is_private
    assert repository.messages == ["initial commit", "Upload trajectories (default)"]
    files = {name: data for name, data in repository.files().items() if name not in (".gitattributes", "README.md")}
    assert files == published(folder) and contents(folder) == before
    code = """
result = [list(load_trajectories("user/first", split, streaming=streaming)) for split in ("train", "test")
          for streaming in (False, True)]
result.append([list(load_dataset("user/first")[split]) for split in ("train", "test")])
"""
    train, train_stream, test, test_stream, plain = client.run(code)
    assert train == train_stream == plain[0] == RECORDS[:12]
    assert test == test_stream == plain[1] == RECORDS[12:15]
    card = card_of(hub, "user/first")
    files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in ("train", "test")]
    assert card.data.configs == [{"config_name": "default", "data_files": files}]
    assert 'load_trajectories("user/first")' in card.text and "](statistics.png)" in card.text


def test_responses_alone_are_pushed_and_loaded(client, hub, tokenizer, tmp_path):
    builder = TrajectoryBuilder(
        make_word_model(tokenizer), tokenizer, max_new_tokens=17, responses_only=True, show_progress=False
    )
    builder.collect([problem.prompt for problem in make_problems(28, seed=3)], tmp_path / "made")
    client.push(tmp_path / "made", "user/responses")
    files = hub.repositories["user/responses"].files()
    files = {name: data for name, data in files.items() if name not in (".gitattributes", "README.md")}
    assert files == published(tmp_path / "made") and "statistics.png" not in files
    code = 'result = [list(load_trajectories("user/responses", streaming=streaming)) for streaming in (False, True)]'
    whole, stream = client.run(code)
    assert whole == stream and len(whole) == builder.counts["kept"] and "states" not in whole[0]
    assert "# responses" in card_of(hub, "user/responses").text


def test_pushing_again_changes_nothing(client, hub, folder):
    client.push(folder, "user/twice")
    client.push(folder, "user/twice")
    assert len(hub.repositories["user/twice"].messages) == 2
    assert not any(method == "PUT" and path.startswith("/large") for method, path in hub.requests[-8:])


def test_two_configurations(client, hub, folder, tmp_path):
    write_collection(tmp_path / "code", {"train": [RECORDS[15:18]]})
    write_collection(tmp_path / "maths", {"train": [RECORDS[18:]], "test": [RECORDS[:1]]})
    client.push(tmp_path / "code", "user/many", config_name="code")
    client.push(tmp_path / "maths", "user/many", config_name="maths")
    # Without a default one a name is needed; with it, none.
    kinds, message = client.fail('load_trajectories("user/many")')
    assert "ValueError" in kinds and "code" in message and "maths" in message
    client.push(folder, "user/many")
    card = card_of(hub, "user/many")
    assert [config["config_name"] for config in card.data.configs] == ["default", "code", "maths"]
    assert card.data.configs[2]["data_files"][0] == {"split": "train", "path": "maths/data/train-*.parquet"}
    assert "](code/statistics.png)" in card.text
    code = """
from datasets import get_dataset_config_names
from huggingface_hub import snapshot_download
result = [list(load_trajectories("user/many", name=name)) for name in (None, "code", "maths")]
result.append(list(load_trajectories("user/many", "test", name="maths", streaming=True)))
copy = snapshot_download("user/many", repo_type="dataset")
result.append(list(load_trajectories(copy)) + list(load_trajectories(copy, name="code")))
result.append(sorted(get_dataset_config_names("user/many")))
"""
    default, code, maths, maths_test, copied, names = client.run(code)
    assert default == RECORDS[:12] and code == RECORDS[15:18] and maths == RECORDS[18:] and maths_test == RECORDS[:1]
    assert copied == RECORDS[:12] + RECORDS[15:18]
    assert names == ["code", "default", "maths"]


def test_fewer_shards_leave_no_stale_ones(client, hub, folder, tmp_path):
    write_collection(tmp_path / "fewer", {"train": [RECORDS[15:]]})
    client.push(folder, "user/again")
    client.push(folder, "user/again", config_name="other")
    repository = hub.repositories["user/again"]
    repository.add("main", {**repository.files(), "notes.txt": b"mine", "data/notes.csv": b"mine"}, "notes")
    client.push(tmp_path / "fewer", "user/again")
    files = repository.files()
    assert len(repository.messages) == 5
    expected = {**published(tmp_path / "fewer"), "notes.txt": b"mine", "data/notes.csv": b"mine"}
    assert {name: files[name] for name in expected} == expected
    others = {name.removeprefix("other/"): data for name, data in files.items() if name.startswith("other/")}
    assert others == published(folder)
    assert len(files) == len(expected) + len(others) + 2
    default, other = client.run(
        'result = [list(load_trajectories("user/again", name=name)) for name in (None, "other")]'
    )
    assert default == RECORDS[15:] and other == RECORDS[:12]


def test_text_of_others_in_the_card_stays(client, hub, folder):
    client.run('from huggingface_hub import HfApi\nHfApi().create_repo("user/mine", repo_type="dataset")')
    repository = hub.repositories["user/mine"]
    mine = "---\npretty_name: Mine\ntags:\n- maths\n---\n# Mine\n\nHand-written.\n"
    repository.add("main", {"README.md": mine.encode()}, "card")
    client.push(folder, "user/mine")
    once = repository.files()["README.md"].decode()
    repository.add("main", {**repository.files(), "README.md": (once + "\nAdded below.\n").encode()}, "more")
    client.push(folder, "user/mine")
    card = card_of(hub, "user/mine")
    assert card.text.count("Hand-written.") == card.text.count("Added below.") == 1
    assert card.text.count("## What a row is") == 1
    assert card.data.pretty_name == "Mine" and card.data.tags[:2] == ["maths", "cllm"]


def test_a_card_that_is_not_valid_stops_the_push(client, hub, folder):
    client.push(folder, "user/broken")
    repository = hub.repositories["user/broken"]
    repository.add("main", {**repository.files(), "README.md": b"---\na: [\n---\n"}, "broken")
    number = len(repository.messages)
    kinds, message = client.fail("push_trajectories(folder, 'user/broken')", folder=folder)
    assert "ValueError" in kinds and "must be valid YAML" in message
    assert len(repository.messages) == number


def test_branches_and_pull_requests(client, hub, folder):
    client.push(folder, "user/branches", revision="dev")
    repository = hub.repositories["user/branches"]
    assert set(repository.files("dev")) > set(repository.files()) == {".gitattributes"}
    address = client.push(folder, "user/branches", create_pr=True, commit_message="Please")
    assert address.endswith("/datasets/user/branches/discussions/1")
    assert repository.messages[-1] == "Please"
    assert repository.files("refs/pr/1")["data/train-00000-of-00003.parquet"]
    assert client.run('result = list(load_trajectories("user/branches", revision="dev"))') == RECORDS[:12]
    kinds, message = client.fail(
        "push_trajectories(folder, 'user/branches', revision='dev', create_pr=True)", folder=folder
    )
    assert "ValueError" in kinds and "against the main branch, got `revision` 'dev'" in message


def test_private_must_fit_what_is_there(client, hub, folder):
    client.push(folder, "user/open", private=False)
    number = len(hub.repositories["user/open"].messages)
    kinds, message = client.fail("push_trajectories(folder, 'user/open', private=True)", folder=folder)
    assert "ValueError" in kinds and "already there and is public, got True. Nothing was pushed" in message
    assert len(hub.repositories["user/open"].messages) == number


def test_what_somebody_else_pushes_meanwhile_is_not_lost(client, hub, folder):
    client.push(folder, "user/busy")
    (folder / "statistics.png").write_bytes(b"another picture")
    hub.meanwhile = lambda repository: repository.add("main", {**repository.files(), "theirs": b"1"}, "theirs")
    kinds, message = client.fail("push_trajectories(folder, 'user/busy')", folder=folder)
    assert "OSError" in kinds and "changed by somebody else meanwhile, and nothing was pushed" in message
    client.push(folder, "user/busy")
    files = hub.repositories["user/busy"].files()
    assert files["theirs"] == b"1" and files["statistics.png"] == b"another picture"


@pytest.mark.parametrize(
    ("repo_id", "token", "kind", "message"),
    [
        ("user/no", None, "PermissionError", "takes an access token for the Hub, got none. Run `hf auth login`"),
        ("user/no", "hf_wrong", "PermissionError", "refuses to push.*Run `hf auth login`, or set `HF_TOKEN`"),
        ("user/no", "hf_read", "PermissionError", "takes a token that may write, got one for reading"),
        ("stranger/no", "hf_write", "PermissionError", "start with your name.*user, club, got 'stranger/no'"),
        ("user/no/no", "hf_write", "ValueError", "must be the id of a dataset on the Hub, such as 'user/name', got"),
        ("no good", "hf_write", "ValueError", "must be the id of a dataset on the Hub"),
    ],
)
@pytest.mark.parametrize("code", ["check_can_push(repo_id)", "push_trajectories(folder, repo_id)"])
def test_pushes_that_cannot_be(client, hub, folder, code, repo_id, token, kind, message):
    before = contents(folder)
    kinds, said = client.fail(code, token=token, repo_id=repo_id, folder=folder)
    assert kind in kinds and re.search(message, said), said
    assert contents(folder) == before and not any(id.endswith("/no") for id in hub.repositories)


def test_pushes_that_can_be(client, hub):
    number = len(hub.repositories)
    client.run("for id in ('user/new', 'bare', 'club/new'): check_can_push(id)")
    client.run("check_can_push('user/new', token='hf_write')", token=None)
    client.run("check_can_push('stranger/data', create_pr=True)")
    client.run("check_can_push('stranger/data')", token="hf_fine")
    assert len(hub.repositories) == number


def test_a_bare_name_is_the_users(client, hub, folder):
    assert client.push(folder, "bare-name").endswith("/datasets/user/bare-name")
    assert "data/train-00000-of-00003.parquet" in hub.repositories["user/bare-name"].files()


def test_nothing_is_asked_before_the_folder_is_right(client, hub, folder, tmp_path):
    def refused(message, **options):
        kinds, said = client.fail("push_trajectories(folder, 'user/never', **options)", folder=folder, options=options)
        assert message in said, said
        return kinds

    assert "ValueError" in refused("not be 'data', got 'data'", config_name="data")
    assert "ValueError" in refused("got '../up'", config_name="../up")
    shard = folder / "data" / "train-00000-of-00003.parquet"
    data = shard.read_bytes()
    shard.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    assert "OSError" in refused("Shard data/train-00000-of-00003.parquet")
    shard.write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest |= {"complete": False, "prompts_done": 7}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "ValueError" in refused("is an unfinished collection: 7 of 18 prompts are done. Run the same `build`")
    (folder / "manifest.json").unlink()
    assert "FileNotFoundError" in refused("must hold `manifest.json`")
    assert hub.requests == []


def test_wrong_datasets_on_the_hub(client, hub, folder):
    kinds, message = client.fail('load_trajectories("user/nowhere")')
    assert "FileNotFoundError" in kinds and "'user/nowhere'. There is no such folder, and of the Hub: " in message
    client.push(folder, "user/right")
    kinds, message = client.fail('load_trajectories("user/right", name="maths")')
    assert "ValueError" in kinds and "maths" in message and "default" in message
    client.run('from huggingface_hub import HfApi\nHfApi().create_repo("user/texts", repo_type="dataset")')
    repository = hub.repositories["user/texts"]
    repository.add("main", {"train.jsonl": b'{"text": "a"}\n{"text": "b"}\n'}, "texts")
    for options in ({}, {"streaming": True}):
        kinds, message = client.fail('load_trajectories("user/texts", **options)', options=options)
        assert "ValueError" in kinds and "prompt_ids, response_ids, states missing, got text" in message


def test_no_network(tmp_path, monkeypatch):
    """This process runs with HF_HUB_OFFLINE=1."""
    write_collection(tmp_path / "made", SHARDS)
    before = contents(tmp_path / "made")
    for call in (check_can_push, lambda id, token: push_trajectories(tmp_path / "made", id, token=token)):
        with pytest.raises(ConnectionError, match="'user/far' takes the network, but `HF_HUB_OFFLINE` is set"):
            call("user/far", "hf_write")
    monkeypatch.setattr("cllm_hf.trajectories.hub.get_token", lambda: None)
    with pytest.raises(PermissionError, match="got none. Run `hf auth login`"):
        push_trajectories(tmp_path / "made", "user/far")
    assert contents(tmp_path / "made") == before


def test_a_hub_that_does_not_answer(client, hub, folder):
    code = """
from huggingface_hub import HfApi
import cllm_hf.trajectories.hub as hub
whole, hub.HfApi = hub.HfApi, lambda token: HfApi("http://127.0.0.1:9", token=token)
try:
    push_trajectories(folder, "user/far")
finally:
    hub.HfApi = whole
"""
    before = contents(folder)
    kinds, message = client.fail(code, folder=folder)
    assert "ConnectionError" in kinds and "did not answer while 'user/far' was to be pushed" in message
    assert contents(folder) == before
