"""Loading trajectories: what is loaded is what was written, and what is not whole is refused with a way out."""

import copy
import hashlib
import json
import os
import random
import shutil

import numpy as np
import pyarrow as pa
import pytest
from collections_on_disk import make_record, make_records, rows, write_collection, write_shard
from datasets import Dataset, DatasetDict, Features, List, Value, concatenate_datasets, load_dataset

from cllm_hf import load_trajectories
from cllm_hf.trajectories.loading import find_manifest
from cllm_hf.trajectories.manifest import read_manifest
from cllm_hf.trajectories.schema import FEATURES, check_columns, check_dataset, check_record, features


RECORDS = make_records(23)
SHARDS = {"train": [RECORDS[:9], [], RECORDS[9:18]], "test": [RECORDS[18:23], [], []]}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    write_collection(tmp_path / "made", SHARDS)
    return tmp_path / "made"


# --- the rows ---------------------------------------------------------------------------------------------------


def first_bad_by_looping(records, block_size):
    """Number of the first record that `check_record` refuses, and what it says."""
    for number, record in enumerate(records):
        try:
            block_size = check_record(record, block_size)
        except ValueError as error:
            return number, str(error)
    return None, block_size


def corrupt(record, choose):
    """Change one thing; what comes out may still be right."""
    record = copy.deepcopy(record)
    blocks = record[choose.choice(["states", "states", "augmented_states"])]
    what = choose.randrange(12)
    if what < 6 and not blocks:
        what = 6
    block = choose.choice(blocks) if blocks else None
    if what == 0:
        blocks.pop()
    elif what == 1:
        blocks.append(copy.deepcopy(block))
    elif what == 2:
        block.clear()
    elif what == 3:
        blocks[choose.randrange(len(blocks))] = None
    elif what in (4, 5, 10, 11) and block:
        state = choose.choice(block)
        if what == 4:
            state.append(1)
        elif what == 5:
            state.clear()
        elif what == 10:
            state[choose.randrange(len(state))] += 1
        else:
            state[choose.randrange(len(state))] = None
    elif what == 6:
        record[choose.choice(["prompt_ids", "response_ids", "states", "augmented_states"])] = None
    elif what == 7:
        record[choose.choice(["prompt_ids", "response_ids"])] = []
    elif what == 8:
        record[choose.choice(["prompt_ids", "response_ids"])][0] = None
    else:
        response = record["response_ids"]
        response[choose.randrange(len(response))] += choose.choice([0, 1])
    return record


def as_dataset(records, choose):
    """The same rows, in one of the ways that datasets lie in memory."""
    augmented = features(augmented=True)
    whole = Dataset.from_list(records, features=augmented)
    way = choose.randrange(6)
    if way == 0:
        return whole
    if way == 1:  # several chunks
        cut = choose.randrange(len(records) + 1)
        parts = [part for part in (records[:cut], records[cut:]) if part]
        return concatenate_datasets([Dataset.from_list(part, features=augmented) for part in parts])
    if way == 2:  # rows by their numbers
        order = list(range(len(records)))
        choose.shuffle(order)
        mixed = Dataset.from_list([records[number] for number in order], features=augmented)
        return mixed.select([order.index(number) for number in range(len(records))])
    if way == 3:  # the middle of a larger table
        return Dataset.from_list([records[0], *records, records[0]], features=augmented).select(
            range(1, len(records) + 1)
        )
    if way == 4:
        wide = {"states": List(List(List(Value("int64")))), "prompt_ids": List(Value("uint16"))}
        return whole.cast(Features({**augmented, **wide}))
    return whole.with_format("numpy")


@pytest.mark.parametrize("num_trials", [100, pytest.param(400, marks=pytest.mark.slow)])
def test_the_check_of_a_dataset_is_that_of_every_record(monkeypatch, num_trials):
    choose, seen = random.Random(0), set()
    for trial in range(num_trials):
        monkeypatch.setattr("cllm_hf.trajectories.schema._ROWS_AT_ONCE", choose.choice([1, 2, 3, 1000]))
        records = make_records(choose.randrange(1, 8), seed=trial, augmented=True)
        for number in choose.sample(range(len(records)), min(len(records), choose.choice([0, 1, 1, 2]))):
            records[number] = corrupt(records[number], choose)
        dataset = as_dataset(records, choose)
        block_size = choose.choice([None, None, 4])
        bad, expected = first_bad_by_looping(records, block_size)
        if bad is None:
            assert check_dataset(dataset, block_size) == expected
        else:
            with pytest.raises(ValueError) as caught:
                check_dataset(dataset, block_size)
            assert str(caught.value) == expected
            seen.add(expected.split("record")[0][:30] + expected[-40:])
    assert len(seen) > 20, "the corruptions must be of many kinds for this test to say something"


def test_rows_of_another_block_size_are_found():
    mixed = [*make_records(3), *make_records(2, block_size=5)]
    with pytest.raises(ValueError, match="block_size` tokens, 4, got lengths .5."):
        check_dataset(Dataset.from_list(mixed, features=FEATURES))
    with pytest.raises(ValueError, match="block_size` tokens, 6"):
        check_dataset(Dataset.from_list(mixed[:3], features=FEATURES), 6)


def test_lists_of_other_kinds_are_read():
    fixed = List(List(List(Value("int32"), length=4)))
    dataset = Dataset.from_list(RECORDS, features=Features({**FEATURES, "states": fixed}))
    assert check_dataset(dataset) == 4
    table = dataset.data.table
    large = pa.large_list(pa.large_list(pa.large_list(pa.int64())))
    at = table.column_names.index("states")
    column = pa.array([record["states"] for record in RECORDS], type=large)
    table = table.set_column(at, "states", column).replace_schema_metadata(None)
    assert check_dataset(Dataset(table)) == 4


def test_rows_that_a_transform_makes_are_checked():
    numbers = Dataset.from_dict({"number": list(range(5))})

    def make(batch):
        made = [RECORDS[number] for number in batch["number"]]
        return {name: [record[name] for record in made] for name in FEATURES}

    assert check_dataset(numbers.with_transform(make)) == 4


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("states", ["text"], r"Column `states` of a trajectory dataset must be of type List.*got Value\('string'\)"),
        ("states", [[[1, 2]]], "Column `states`"),
        ("response_ids", [[1.5]], "Column `response_ids`"),
        ("prompt", [3], "Column `prompt`.*convert the column"),
        ("is_greedy", ["yes"], "Column `is_greedy`"),
        ("augmented_states", [[1]], "Column `augmented_states`"),
    ],
)
def test_columns_of_other_types_are_named(name, values, message):
    dataset = Dataset.from_list(RECORDS[:1], features=FEATURES)
    dataset = Dataset.from_dict({**dataset.remove_columns([name] if name in FEATURES else [])[:], name: values})
    with pytest.raises(ValueError, match=message):
        check_columns(dataset.features)


def test_datasets_from_before_a_column_and_with_further_ones_are_good(tmp_path):
    dataset = Dataset.from_list(RECORDS, features=FEATURES).remove_columns(["is_greedy", "data_id"])
    dataset = dataset.add_column("note", ["mine"] * len(dataset))
    dataset.save_to_disk(str(tmp_path / "disk"))
    assert load_trajectories(tmp_path / "disk")[0]["note"] == "mine"


# --- folders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augmented", [False, True])
def test_what_was_written_is_loaded(tmp_path, augmented):
    records = make_records(12, augmented=augmented)
    write_collection(tmp_path / "made", {"train": [records[:7], records[7:]]}, augmented=augmented)
    dataset = load_trajectories(str(tmp_path / "made"))
    assert isinstance(dataset, Dataset) and dataset.features == features(augmented)
    assert rows(dataset) == records
    assert list(load_trajectories(tmp_path / "made", streaming=True)) == records


def test_splits(folder):
    assert rows(load_trajectories(folder)) == RECORDS[:18]
    assert rows(load_trajectories(folder, "test")) == RECORDS[18:]
    assert rows(load_trajectories(folder, "train[2:4]")) == RECORDS[2:4]
    both = load_trajectories(folder, split=None)
    assert isinstance(both, DatasetDict) and {key: len(one) for key, one in both.items()} == {"train": 18, "test": 5}
    streams = load_trajectories(folder, split=None, streaming=True)
    assert {key: list(one) for key, one in streams.items()} == {"train": RECORDS[:18], "test": RECORDS[18:]}
    for streaming in (False, True):
        with pytest.raises(ValueError, match="validation.*train.*test"):
            load_trajectories(folder, "validation", streaming=streaming)


def test_a_split_without_rows(tmp_path):
    write_collection(tmp_path / "made", {"train": [RECORDS[:3]], "test": [[]]})
    both = load_trajectories(tmp_path / "made", split=None)
    assert len(both["test"]) == 0 and both["test"].features == both["train"].features and len(both["train"]) == 3
    with pytest.raises(ValueError, match="dataset is empty"):
        load_trajectories(tmp_path / "made", "test")
    write_collection(tmp_path / "nothing", {"train": [[], []]})
    for split in (None, "train"):
        with pytest.raises(ValueError, match="dataset is empty"):
            load_trajectories(tmp_path / "nothing", split)


def test_new_shards_are_never_mistaken_for_old_ones(folder):
    """Of the same names, sizes and times: what is in them counts."""
    names = ["data/train-00000-of-00003.parquet", "data/train-00002-of-00003.parquet"]
    first, second = (folder / name for name in names)
    times = first.stat()
    assert rows(load_trajectories(folder)) == RECORDS[:18]
    swapped = {"train": [RECORDS[9:18], [], RECORDS[:9]], "test": SHARDS["test"]}
    write_collection(folder, swapped)
    for file in (first, second):
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert rows(load_trajectories(folder)) == RECORDS[9:18] + RECORDS[:9]
    write_collection(folder, SHARDS)
    assert rows(load_trajectories(folder)) == RECORDS[:18]


def test_nothing_is_written_into_the_folder(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    load_trajectories(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("name", ["a[b]", "a*b", "a?b", "**", "a{b,c}"])
def test_a_folder_with_the_name_of_a_pattern_is_that_folder(folder, tmp_path, name):
    """`datasets` takes the names of files as patterns, which fit those of other folders as well."""
    for other in ("ab", "axb", "a*b", "b"):
        write_collection(tmp_path / "all" / other, {"train": [make_records(3, seed=1)]})
    shutil.rmtree(tmp_path / "all" / name, ignore_errors=True)
    folder.rename(tmp_path / "all" / name)
    for streaming in (False, True):
        assert rows(load_trajectories(tmp_path / "all" / name, streaming=streaming)) == RECORDS[:18]


def test_a_folder_that_cannot_be_named_is_refused(folder, tmp_path):
    folder.rename(tmp_path / "a::b")
    with pytest.raises(ValueError, match="`::`"):
        load_trajectories(tmp_path / "a::b")


@pytest.mark.parametrize("name", ["../made", "/etc", "a/../../made", "a\\b", ""])
def test_the_name_of_a_configuration_leads_nowhere_else(folder, tmp_path, name):
    (tmp_path / "empty").mkdir()
    for read in (load_trajectories, find_manifest):
        with pytest.raises(ValueError, match="got '.*'"):
            read(tmp_path / "empty", name=name) if name else read(tmp_path / "empty", name="..")


@pytest.mark.parametrize("place", ["state.json", "train/state.json", "dataset_dict.json"])
@pytest.mark.parametrize("name", ["../other/data-00000-of-00001.arrow", "WHOLE", "../other"])
def test_what_save_to_disk_has_written_names_no_files_outside(tmp_path, place, name):
    one = Dataset.from_list(RECORDS[:3], features=FEATURES)
    one.save_to_disk(tmp_path / "other")
    saved = one if place == "state.json" else DatasetDict({"train": one})
    saved.save_to_disk(tmp_path / "saved")
    name = name.replace("WHOLE", str(tmp_path / "other" / "data-00000-of-00001.arrow"))
    file = tmp_path / "saved" / place
    state = json.loads(file.read_text())
    if place == "dataset_dict.json":
        state["splits"].append(name)
    else:
        state["_data_files"][0]["filename"] = name
    file.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="recorded in .*saved"):
        load_trajectories(tmp_path / "saved")


def test_shards_that_are_not_whole(folder):
    shard = folder / "data" / "train-00002-of-00003.parquet"
    data = shard.read_bytes()
    shard.write_bytes(data[:-50])
    for streaming in (False, True):
        with pytest.raises(OSError, match="train-00002-of-00003.parquet .* bytes"):
            load_trajectories(folder, streaming=streaming)
    middle = len(data) // 2
    shard.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    with pytest.raises(OSError, match="train-00002-of-00003.parquet .* Delete it"):
        load_trajectories(folder)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="train-00002-of-00003.parquet .* Run the same collection"):
        load_trajectories(folder)
    shard.write_bytes(data)
    (folder / "data" / "train-00001-of-00003.parquet").unlink()  # it has no records
    assert len(load_trajectories(folder)) == 18


def test_shards_that_do_not_belong_together(folder):
    shard = folder / "data" / "train-00002-of-00003.parquet"
    change_manifest(folder, shard, b"no parquet at all")
    with pytest.raises(OSError, match="train-00002-of-00003.parquet"):
        load_trajectories(folder)
    write_shard(folder / "other.parquet", make_records(9, augmented=True), augmented=True)
    change_manifest(folder, shard, (folder / "other.parquet").read_bytes())
    with pytest.raises(ValueError, match="augmented_states.*train-00002-of-00003.parquet"):
        load_trajectories(folder)


def change_manifest(folder, shard, data):
    shard.write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = manifest["shards"][shard.relative_to(folder).as_posix()]
    entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_rows_that_are_no_trajectories(tmp_path):
    bad = make_records(9)
    bad[6]["response_ids"][-1] += 1
    write_collection(tmp_path / "made", {"train": [bad]})
    with pytest.raises(ValueError, match="record 6 "):
        load_trajectories(tmp_path / "made")
    stream = iter(load_trajectories(tmp_path / "made", streaming=True))
    assert [next(stream) for _ in range(6)] == bad[:6]
    with pytest.raises(ValueError, match="record 6 "):
        next(stream)


def test_a_stream_goes_on_where_it_was(folder):
    stream = load_trajectories(folder, streaming=True)
    taken, iterator = [], iter(stream)
    for _ in range(5):
        taken.append(next(iterator))
    state = stream.state_dict()
    again = load_trajectories(folder, streaming=True)
    again.load_state_dict(state)
    assert taken + list(again) == RECORDS[:18]
    assert stream.features == FEATURES


def test_unfinished_collections(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    done = {name: manifest["shards"][name] for name in sorted(manifest["shards"])[3:5]}
    prompts = {**manifest["prompts"], "count": 40}
    manifest |= {"complete": False, "prompts_done": 12, "prompts": prompts, "shards": done}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for streaming in (False, True):
        with pytest.raises(ValueError, match="12 of 40 .*`cllm collect`"):
            load_trajectories(folder, streaming=streaming)
    assert rows(load_trajectories(folder, allow_incomplete=True)) == RECORDS[:9]
    assert list(load_trajectories(folder, streaming=True, allow_incomplete=True)) == RECORDS[:9]
    (folder / "manifest.json").unlink()
    (folder / ".unfinished").mkdir()
    with pytest.raises(ValueError, match="`cllm collect`"):
        load_trajectories(folder, allow_incomplete=True)


def test_configurations_in_folders(tmp_path):
    """As a repository on the Hub is downloaded."""
    write_collection(tmp_path, {"train": [RECORDS[:4]]})
    write_collection(tmp_path / "code", {"train": [RECORDS[4:9]]})
    assert rows(load_trajectories(tmp_path)) == rows(load_trajectories(tmp_path, name="default")) == RECORDS[:4]
    assert rows(load_trajectories(tmp_path, name="code")) == RECORDS[4:9]
    with pytest.raises(ValueError, match="`name` .*code.*'maths'"):
        load_trajectories(tmp_path, name="maths")


def test_plain_load_dataset_reads_the_folder(folder, tmp_path):
    loaded = load_dataset(str(folder), cache_dir=str(tmp_path / "plain"))
    assert rows(loaded["train"]) == RECORDS[:18] and rows(loaded["test"]) == RECORDS[18:]


def test_folders_of_save_to_disk(tmp_path):
    dataset = Dataset.from_list(RECORDS, features=FEATURES)
    dataset.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": dataset.select(range(9)), "test": dataset.select(range(9, 12))}).save_to_disk(
        str(tmp_path / "two")
    )
    assert rows(load_trajectories(tmp_path / "one")) == RECORDS
    assert list(load_trajectories(tmp_path / "one", streaming=True)) == RECORDS
    assert list(load_trajectories(tmp_path / "one", split=None)) == ["train"]
    assert rows(load_trajectories(tmp_path / "two", "test")) == RECORDS[9:12]
    assert list(load_trajectories(tmp_path / "two", None)) == ["train", "test"]
    with pytest.raises(ValueError, match="`split` .*train, test.*'dev'"):
        load_trajectories(tmp_path / "two", "dev")
    with pytest.raises(ValueError, match="`name` 'code'"):
        load_trajectories(tmp_path / "two", name="code")
    for file in (tmp_path / "one").glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(OSError, match="one' .*Save it again"):
        load_trajectories(tmp_path / "one")


def test_datasets_of_something_else(tmp_path):
    Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "texts"))
    for streaming in (False, True):
        with pytest.raises(ValueError, match="prompt_ids, response_ids, states missing.*text"):
            load_trajectories(tmp_path / "texts", streaming=streaming)


def test_paths_that_are_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    with pytest.raises(FileNotFoundError, match="`manifest.json`"):
        load_trajectories(tmp_path / "empty")
    for nothing in (tmp_path / "file", str(tmp_path / "file"), tmp_path / "nowhere", str(tmp_path / "nowhere")):
        with pytest.raises(FileNotFoundError, match="`path`"):
            load_trajectories(nothing)
    with pytest.raises(FileNotFoundError, match="`path` .*'a/b/c'"):
        load_trajectories("a/b/c")
    # The tests run with HF_HUB_OFFLINE=1.
    with pytest.raises(ConnectionError, match="`path` .*'runs/nowhere'.*`HF_HUB_OFFLINE`"):
        load_trajectories("runs/nowhere")
    with pytest.raises(ValueError, match="`revision`"):
        load_trajectories(tmp_path / "empty", revision="main")


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (None, FileNotFoundError, "`manifest.json`.*`output_dir`"),
        ("{", ValueError, "manifest.json must be JSON"),
        (b"\xff\xfe", ValueError, "manifest.json must be JSON"),
        ("[]", ValueError, "`format` and `shards`"),
        ('{"format": 1}', ValueError, "`format` and `shards`"),
        (
            '{"format": 1, "shards": {"data/a.parquet": {}}}',
            ValueError,
            "`format` and `shards`",
        ),
        ('{"format": 2, "shards": []}', ValueError, "`format` 1 .*2.*update `cllm_hf`"),
    ],
)
def test_manifests_that_are_refused(tmp_path, text, error, message):
    if text is not None:
        (tmp_path / "manifest.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(error, match=message):
        read_manifest(tmp_path)


def test_a_manifest_that_cannot_be_read(tmp_path):
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(OSError, match="manifest.json .*permissions"):
        read_manifest(tmp_path)


def test_made_records_are_good():
    """The other tests rest on them."""
    rng = np.random.default_rng(1)
    assert {check_record(make_record(number, rng, augmented=True), 4) for number in range(50)} == {4}
    assert {len(record["states"]) for record in RECORDS} == {1, 2, 3, 4}
