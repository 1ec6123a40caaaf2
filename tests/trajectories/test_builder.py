"""Collections on disk: what is finished stays, what is not goes on, and the bytes do not depend on the way there."""

import copy as copy_module
import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_model, make_word_model
from datasets import Dataset
from processes import in_new_process

from cllm_hf import CleaningRules, TrajectoryBuilder, load_trajectories
from cllm_hf.demo.problems import make_problems
from cllm_hf.journal import Journal
from cllm_hf.trajectories import folder as folder_module
from cllm_hf.trajectories import shard
from cllm_hf.trajectories.manifest import describe_difference, read_manifest
from cllm_hf.trajectories.prompts import is_held_out, read_rows
from cllm_hf.trajectories.shard import ShardCollector


NO_CLEANING = CleaningRules(max_token_run=None, max_sentence_repeats=None, drop_empty=False)
OPTIONS = {
    "block_size": 5,
    "max_new_tokens": 17,
    "max_tokens_per_batch": 200,
    "prompts_per_shard": 8,
    "cleaning": NO_CLEANING,
    "show_progress": False,
}


def make_builder(model, tokenizer, **options):
    return TrajectoryBuilder(model, tokenizer, **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def prompts():
    return [problem.prompt for problem in make_problems(28, seed=3)]


@pytest.fixture(scope="module")
def finished(tokenizer, prompts, tmp_path_factory):
    """A collection that was never disturbed."""
    path = tmp_path_factory.mktemp("finished")
    make_builder(make_word_model(tokenizer), tokenizer).build(prompts, output_dir=path)
    return path


def files_of(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_a_finished_folder_holds_shards_manifest_card_and_plot_and_nothing_else(finished, prompts):
    assert sorted(files_of(finished)) == [
        "README.md",
        *(f"data/train-0000{number}-of-00004.parquet" for number in range(4)),
        "manifest.json",
        "statistics.png",
    ]
    assert [path.name for path in finished.iterdir() if path.name.startswith(".")] == []
    manifest = read_manifest(finished)
    assert manifest["complete"] and manifest["prompts_done"] == manifest["prompts"]["count"] == len(prompts)
    assert sum(entry["records"] for entry in manifest["shards"].values()) == manifest["counts"]["kept"]
    assert (
        pq.read_metadata(finished / "data/train-00000-of-00004.parquet").row_group(0).column(0).compression == "ZSTD"
    )


def test_the_folder_holds_the_records_of_a_build_in_memory(word_model, tokenizer, prompts, finished):
    builder = make_builder(word_model, tokenizer)
    in_memory = builder.build(prompts)
    loaded = load_trajectories(finished)
    assert loaded.features == in_memory.features and loaded[:] == in_memory[:]
    assert builder.counts == read_manifest(finished)["counts"]
    assert loaded["data_id"] == [str(index) for index in range(len(prompts))]


def test_a_second_run_does_nothing_and_returns_the_same(word_model, tokenizer, prompts, finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    builder = make_builder(word_model, tokenizer)
    word_model.register_forward_pre_hook(lambda *_: pytest.fail("there is nothing to compute"))
    assert builder.build(prompts, output_dir=finished)[:] == load_trajectories(finished)[:]
    assert builder.counts["kept"] > 0
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def _run(path, tokenizer, prompts, model):
    torch.set_num_threads(1)
    shard._PROMPTS_AT_ONCE = 3  # more files of a shard that is not finished
    make_builder(model, tokenizer).build(prompts, output_dir=path)
    os._exit(0)


def _kill_at_random_moments(model, tokenizer, prompts, finished, folder):
    path, generator, kills, reached = folder / "killed", random.Random(0), 0, set()
    context = multiprocessing.get_context("fork")  # the model is there already, so that a run is short
    start = time.monotonic()
    _wait_for(context, (folder / "clean", tokenizer, prompts, model))
    whole = time.monotonic() - start
    while kills < 20 or len(reached) <= 5:
        assert kills < 200, f"all were killed in {len(reached)} different states"
        process = context.Process(target=_run, args=(path, tokenizer, prompts, model))
        process.start()
        process.join(generator.uniform(0, whole))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        reached.add(tuple(sorted(files_of(path))) if path.exists() else ())
        if process.exitcode == 0:  # it was done: begin a new one
            assert files_of(path) == finished
            path = folder / f"killed-{kills}"
    _wait_for(context, (path, tokenizer, prompts, model))
    assert files_of(path) == finished


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(word_model, tokenizer, prompts, finished, tmp_path):
    in_new_process(_kill_at_random_moments, word_model, tokenizer, prompts, files_of(finished), tmp_path)


def _wait_for(context, arguments):
    process = context.Process(target=_run, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0


class _Stop(BaseException):
    """Ends a run anywhere, as Ctrl-C does."""


@pytest.mark.parametrize(
    "moment",
    [pytest.param(n, marks=[] if n in (0, 9, 20, 41, 64, 66, 68, 69) else pytest.mark.slow) for n in range(70)],
)
def test_stopped_at_any_write_it_ends_with_the_same_bytes(
    word_model, tokenizer, prompts, finished, tmp_path, monkeypatch, moment
):
    """Before a rename nothing is there yet, after it all is: both sides of each are tried."""
    replace, calls = os.replace, []
    monkeypatch.setattr(shard, "_PROMPTS_AT_ONCE", 3)  # more files of a shard that is not finished

    def stop(source, target):
        calls.append(target)
        if len(calls) == moment // 2 + 1:
            if moment % 2:
                replace(source, target)
            raise _Stop
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(_Stop):
        make_builder(word_model, tokenizer).build(prompts, output_dir=tmp_path)
    monkeypatch.setattr(os, "replace", replace)
    make_builder(word_model, tokenizer).build(prompts, output_dir=tmp_path)
    assert files_of(tmp_path) == files_of(finished)


@pytest.mark.parametrize("call", range(5))
@pytest.mark.parametrize("after", [False, True])
def test_stopped_at_any_removal_it_ends_with_the_same_bytes(
    word_model, tokenizer, prompts, finished, tmp_path, monkeypatch, call, after
):
    rmtree, calls = shutil.rmtree, []

    def stop(path, **options):
        calls.append(path)
        if len(calls) == call + 1:
            if after:
                rmtree(path, **options)
            raise _Stop
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", stop)
    with pytest.raises(_Stop):
        make_builder(word_model, tokenizer).build(prompts, output_dir=tmp_path)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    make_builder(word_model, tokenizer).build(prompts, output_dir=tmp_path)
    assert files_of(tmp_path) == files_of(finished)


@pytest.mark.parametrize("name", ["data/train-00001-of-00004.parquet", "README.md", "statistics.png"])
def test_what_only_has_the_name_of_a_file_is_not_finished(word_model, tokenizer, prompts, finished, tmp_path, name):
    folder, builder = tmp_path / "copy", make_builder(word_model, tokenizer)
    shutil.copytree(finished, folder)
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(OSError, match=f"{Path(name).name}' must be a file, got a folder. Remove it and run"):
        builder.build(prompts, output_dir=folder)
    (folder / name).rmdir()
    if not name.endswith("parquet"):
        (folder / name).write_text(" \n")
    builder.build(prompts, output_dir=folder)
    assert files_of(folder) == files_of(finished)


def test_a_shard_under_the_name_of_another_is_noticed(word_model, tokenizer, prompts, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    data, manifest = tmp_path / "copy" / "data", tmp_path / "copy" / "manifest.json"
    shutil.copyfile(data / "train-00000-of-00004.parquet", data / "train-00001-of-00004.parquet")
    entries = json.loads(manifest.read_text())
    entries["shards"].pop("data/train-00001-of-00004.parquet")
    manifest.write_text(json.dumps({**entries, "complete": False}))
    with pytest.raises(OSError, match="train-00001-of-00004.parquet .* cannot be read .it is shard 0.. Delete it"):
        make_builder(word_model, tokenizer).build(prompts, output_dir=tmp_path / "copy")


def test_finished_batches_are_not_computed_again(word_model, tokenizer, prompts, tmp_path, monkeypatch):
    computed, once = [], Journal.once
    stop_after = 7

    def count(self, name, key, compute):
        def counted():
            computed.append((self.folder.name, name))
            if len(computed) == stop_after:
                raise _Stop
            return compute()

        return once(self, name, key, counted)

    monkeypatch.setattr(Journal, "once", count)
    with pytest.raises(_Stop):
        make_builder(word_model, tokenizer).build(prompts, output_dir=tmp_path)
    stop_after = -1
    make_builder(word_model, tokenizer).build(prompts, output_dir=tmp_path)
    interrupted = computed.pop(6)
    assert len(set(computed)) == len(computed) and interrupted in computed


def test_a_folder_of_other_options_model_or_prompts_is_refused(word_model, tokenizer, prompts, finished):
    before = files_of(finished)

    def refused(message, model=word_model, wanted=prompts, responses=None, **options):
        with pytest.raises(ValueError, match=f"holds another collection: {message}.*Choose another `output_dir`"):
            make_builder(model, tokenizer, **options).build(wanted, responses, output_dir=finished)

    refused("`block_size` is 5 there and 4 here", block_size=4)
    refused("`augment` is False there and True here; `seed` is 0 there and 1 here", seed=1, augment=True)
    refused("`max_token_run` is None there and 10 here", cleaning=CleaningRules(10, None, False))
    refused("`prompts.count` is 28 there and 27 here; other prompts", wanted=prompts[1:])
    refused("other prompts", wanted=[*prompts[1:], prompts[0]])
    refused("other prompts; `prompts.with_responses` is False there and True here", responses=prompts)
    refused("`model.architecture` is 'LlamaForCausalLM' there .* weights", model=make_word_model(tokenizer, "qwen3"))
    with torch.no_grad():
        word_model.lm_head.weight.mul_(1.01)
    refused("other weights of the model", model=word_model)
    refused("`model.dtype` is 'float32' there and 'bfloat16' here", model=word_model.bfloat16())
    assert files_of(finished) == before


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
def test_the_folder_of_a_model_is_refused(word_model, tokenizer, prompts, tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=f"must have a folder of its own, got .*{name}"):
        make_builder(word_model, tokenizer).build(prompts, output_dir=tmp_path)
    assert files_of(tmp_path) == {name: b"{}"}


def test_a_folder_of_other_files_is_refused(word_model, tokenizer, prompts, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.parquet").write_bytes(b"mine")
    with pytest.raises(ValueError, match="holds parquet files, but no `manifest.json`"):
        make_builder(word_model, tokenizer).build(prompts, output_dir=tmp_path)
    (tmp_path / "manifest.json").write_text('{"short_name": "a web page"}')
    with pytest.raises(ValueError, match="another file of that name"):
        make_builder(word_model, tokenizer).build(prompts, output_dir=tmp_path)
    assert files_of(tmp_path) == {"data/mine.parquet": b"mine", "manifest.json": b'{"short_name": "a web page"}'}


def copy(finished, path):
    for name, content in files_of(finished).items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_shard_is_named_and_made_anew_when_it_is_deleted(
    word_model, tokenizer, prompts, finished, tmp_path, damage
):
    copy(finished, tmp_path)
    shard = tmp_path / "data" / "train-00001-of-00004.parquet"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content[:-7] if damage == "cut" else content)
    damaged = files_of(tmp_path)
    with pytest.raises(OSError, match="train-00001-of-00004.parquet.*Delete it and run the same collection again"):
        make_builder(word_model, tokenizer).build(prompts, output_dir=tmp_path)
    assert files_of(tmp_path) == damaged
    shard.unlink()
    make_builder(word_model, tokenizer).build(prompts, output_dir=tmp_path)
    assert files_of(tmp_path) == files_of(finished)


def test_a_shard_that_no_manifest_vouches_for_must_be_readable(word_model, tokenizer, prompts, finished, tmp_path):
    copy(finished, tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest.update(shards={}, complete=False)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    shard = tmp_path / "data" / "train-00002-of-00004.parquet"
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(OSError, match="train-00002-of-00004.parquet .* cannot be read .*Delete it"):
        make_builder(word_model, tokenizer).build(prompts, output_dir=tmp_path)


def test_a_full_disk_is_said_and_nothing_is_lost(word_model, tokenizer, prompts, finished, tmp_path, monkeypatch):
    write_whole, written = folder_module.write_whole, []

    def fill(path, content, unfinished=None):
        if Path(path).suffix == ".parquet":
            written.append(path)
            if len(written) == 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_whole(path, content, unfinished)

    monkeypatch.setattr(folder_module, "write_whole", fill)
    with pytest.raises(OSError, match="No space left on device. 2 of 4 shards .* run the same collection again"):
        make_builder(word_model, tokenizer).build(prompts, output_dir=tmp_path)
    for name in ("data/train-00000-of-00004.parquet", "data/train-00001-of-00004.parquet"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()
    with pytest.raises(ValueError, match="unfinished collection: 16 of 28 prompts"):
        load_trajectories(tmp_path)
    make_builder(word_model, tokenizer).build(prompts, output_dir=tmp_path)
    assert files_of(tmp_path) == files_of(finished)


def test_two_runs_in_one_folder_are_refused(word_model, tokenizer, prompts, tmp_path):
    builder = make_builder(word_model, tokenizer)
    rows = folder_module  # the module of the lock
    header = builder._header(read_rows(prompts, None, tokenizer), None, None)
    with rows.OutputFolder(tmp_path, header, ("train",), rows.Process()):
        with pytest.raises(OSError, match="Another run is writing into"):
            builder.build(prompts, output_dir=tmp_path)
    builder.build(prompts, output_dir=tmp_path)


_FULL_DISK = """
import resource, signal, sys
from pathlib import Path

sys.path[:0] = [sys.argv[1], sys.argv[1] + "/trajectories"]
import torch
from conftest import make_model, make_word_model
from test_builder import make_builder

from cllm_hf.demo.problems import make_problems, make_tokenizer

torch.set_num_threads(1)
tokenizer = make_tokenizer()
builder = make_builder(make_word_model(tokenizer), tokenizer)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))  # longer files are refused
builder.build([problem.prompt for problem in make_problems(28, seed=3)], output_dir=sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", [200, 3000, 9000])
def test_a_system_that_writes_no_more_loses_nothing(word_model, tokenizer, prompts, finished, tmp_path, limit):
    """No stand-in: the limit on file sizes stops the manifest, a journal or a shard in the middle."""
    run = subprocess.run(
        [sys.executable, "-c", _FULL_DISK, str(Path(__file__).parents[1]), str(tmp_path), str(limit)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "The collection stopped: File too large" in run.stderr and run.returncode == 1
    shards = files_of(finished)
    for name, content in files_of(tmp_path).items():
        if name.startswith("data/"):
            assert content == shards[name]
    make_builder(word_model, tokenizer).build(prompts, output_dir=tmp_path)
    assert files_of(tmp_path) == files_of(finished)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_not_writable_is_said_before_the_work(word_model, tokenizer, prompts, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="must be writable"):
        make_builder(word_model, tokenizer).build(prompts, output_dir=tmp_path / "out")


def test_an_output_dir_that_is_a_file_is_said(word_model, tokenizer, prompts, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="must be writable, got .*file"):
        make_builder(word_model, tokenizer).build(prompts, output_dir=tmp_path / "file")


def _run_process(index, path, tokenizer, prompts, model, wait):
    os.environ.update(RANK=str(index), WORLD_SIZE="2")
    torch.set_num_threads(1)
    builder = make_builder(model, tokenizer)
    complete = builder.collect(prompts, path, wait=wait)
    if wait:
        assert complete and len(load_trajectories(path)) == builder.counts["kept"]
    os._exit(0 if complete else 3)


@pytest.mark.parametrize("wait", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_two_processes_end_with_the_same_bytes_as_one(word_model, tokenizer, prompts, finished, tmp_path, wait):
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_run_process, args=(index, tmp_path, tokenizer, prompts, word_model, wait))
        for index in range(2)
    ]
    for process in processes:
        process.start()
        if not wait:  # one after the other, as tasks of a queue may be
            process.join()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == ([0, 0] if wait else [3, 0])
    assert files_of(tmp_path) == files_of(finished)


def test_a_rank_that_makes_no_sense_is_refused(word_model, tokenizer, prompts, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="`RANK` below `WORLD_SIZE`, got '2' and '2'"):
        make_builder(word_model, tokenizer).build(prompts, output_dir=tmp_path)


def test_given_responses_are_not_decoded_again(word_model, tokenizer, prompts, monkeypatch):
    expected = make_builder(word_model, tokenizer).build(prompts)
    monkeypatch.setattr(type(word_model), "generate", None)
    as_ids = make_builder(word_model, tokenizer).build(prompts, expected["response_ids"])
    assert as_ids[:] == expected[:]
    with_column = Dataset.from_dict({"prompt": prompts, "response": expected["response_ids"], "data_id": prompts})
    named = make_builder(word_model, tokenizer).build(with_column)
    assert named["data_id"] == prompts and named["states"] == expected["states"]


def test_a_stop_token_that_a_text_does_not_show_is_added(word_model, tokenizer, prompts):
    expected = make_builder(word_model, tokenizer).build(prompts)
    stop_ids = {tokenizer.eos_token_id, *range(40, 50)}
    stopped = [row for row in expected if row["response_ids"][-1] in stop_ids and len(row["response_ids"]) > 1]
    texts = [tokenizer.decode(row["response_ids"][:-1]) for row in stopped]
    assert len(texts) > 5
    as_text = make_builder(word_model, tokenizer, cleaning=CleaningRules(None, None, drop_truncated=True)).build(
        [row["prompt"] for row in stopped], texts
    )
    assert as_text["response_ids"] == [row["response_ids"] for row in stopped]
    # As token ids a response is what it is.
    builder = make_builder(word_model, tokenizer, cleaning=CleaningRules(None, None, drop_truncated=True))
    with pytest.raises(ValueError, match="for `truncated`"):
        builder.build([row["prompt"] for row in stopped], [row["response_ids"][:-1] for row in stopped])


def test_responses_of_others_are_dropped_or_kept_and_counted(word_model, tokenizer, prompts):
    greedy = make_builder(word_model, tokenizer).build(prompts)
    responses = [list(ids) for ids in greedy["response_ids"]]
    # Another token in the middle of the second block; what follows is the model's own only by chance.
    changed = [index for index, ids in enumerate(responses) if len(ids) > 10][:5]
    for index in changed:
        responses[index][7] = (responses[index][7] + 1) % 40
    dropping = make_builder(word_model, tokenizer)
    dropped = dropping.build(prompts, responses)
    assert dropping.counts["not_greedy"] == len(changed)
    assert dropped[:] == greedy.select([i for i in range(len(prompts)) if i not in changed])[:]

    keeping = make_builder(word_model, tokenizer, not_greedy="keep")
    kept = keeping.build(prompts, responses)
    assert keeping.counts == {"kept": len(prompts), "kept_not_greedy": len(changed)}
    for index, (row, before) in enumerate(zip(kept, greedy)):
        assert row["is_greedy"] == (index not in changed)
        assert [token for block in row["states"] for token in block[-1]][: len(responses[index])] == responses[index]
        assert row["states"][0] == before["states"][0]
        if index in changed:
            assert row["states"][1] == [responses[index][5:10]]


def test_dropped_prompts_are_counted_by_reason(word_model, tokenizer, prompts):
    long = " ".join(prompts)
    builder = make_builder(word_model, tokenizer, cleaning=CleaningRules(None, None, False, max_prompt_tokens=60))
    dataset = builder.build([*prompts, "", long, prompts[3], prompts[0] + " " + prompts[1] + " " + prompts[2]])
    assert builder.counts == {"kept": len(prompts), "empty_prompt": 1, "long_prompt": 2, "duplicate": 1}
    assert len(dataset) == len(prompts)
    twice = make_builder(word_model, tokenizer, drop_duplicates=False)
    assert len(twice.build([prompts[0]] * 2)) == 2
    given = make_builder(word_model, tokenizer)
    own = given.build(prompts[:1])["response_ids"][0]
    given.build(prompts[:3], [own, [], [3] * 30])
    assert given.counts == {"kept": 1, "empty": 1, "long_response": 1}


def test_cleaning_rules_are_applied(word_model, tokenizer, prompts):
    every = make_builder(word_model, tokenizer).build(prompts)
    rules = CleaningRules(max_token_run=3, max_sentence_repeats=1, drop_truncated=True)
    builder = make_builder(word_model, tokenizer, cleaning=rules)
    cleaned = builder.build(prompts)
    stop_ids = [tokenizer.eos_token_id, *range(40, 50)]
    reasons = [rules.reason_to_drop(row["response_ids"], row["response"], stop_ids) for row in every]
    assert cleaned["data_id"] == [row["data_id"] for row, reason in zip(every, reasons) if reason is None]
    assert builder.counts == {
        "kept": len(cleaned),
        **{reason: reasons.count(reason) for reason in set(reasons) if reason is not None},
    }
    assert len(builder.counts) > 2


def test_the_test_split_goes_by_the_prompt(word_model, tokenizer, prompts, tmp_path):
    repeated = [*prompts, *prompts[:10]]
    builder = make_builder(word_model, tokenizer, test_fraction=0.3, drop_duplicates=False)
    in_memory = builder.build(repeated)
    on_disk = make_builder(word_model, tokenizer, test_fraction=0.3, drop_duplicates=False).build(
        repeated, output_dir=tmp_path
    )
    sides = {split: set(in_memory[split]["prompt"]) for split in ("train", "test")}
    assert sides["train"] and sides["test"] and not sides["train"] & sides["test"]
    assert sides["test"] == {prompt for prompt in repeated if is_held_out(prompt, 0.3)}
    assert len(in_memory["train"]) + len(in_memory["test"]) == len(repeated)
    for split in ("train", "test"):
        assert on_disk[split][:] == in_memory[split][:] == load_trajectories(tmp_path, split=split)[:]
    shares = [sum(is_held_out(f"prompt {n}", share) for n in range(2000)) / 2000 for share in (0.0, 0.1, 0.5)]
    assert shares[0] == 0 and abs(shares[1] - 0.1) < 0.03 and abs(shares[2] - 0.5) < 0.05


def test_augmented_states_are_a_column_of_their_own(word_model, tokenizer, prompts, tmp_path):
    plain = make_builder(word_model, tokenizer).build(prompts)
    augmented = make_builder(word_model, tokenizer, augment=True).build(prompts, output_dir=tmp_path)
    assert augmented.remove_columns("augmented_states")[:] == plain[:]
    num_states = 0
    for row in augmented:
        assert len(row["augmented_states"]) == len(row["states"])
        for states, more in zip(row["states"], row["augmented_states"]):
            num_states += len(more)
            assert not any(state in states for state in more)
    assert num_states > len(prompts)
    again = make_builder(word_model, tokenizer, augment=True, max_tokens_per_batch=90).build(prompts)
    assert again[:] == augmented[:]


def test_said_once_source_and_license_stay(word_model, tokenizer, prompts, tmp_path):
    builder = make_builder(word_model, tokenizer)
    builder.build(prompts[:4], output_dir=tmp_path)
    assert read_manifest(tmp_path)["prompts"]["license"] is None
    builder.build(prompts[:4], output_dir=tmp_path, source="user/problems", license="mit")
    builder.build(prompts[:4], output_dir=tmp_path)
    assert read_manifest(tmp_path)["prompts"] | {"fingerprint": ""} == {
        "count": 4,
        "fingerprint": "",
        "with_responses": False,
        "source": "user/problems",
        "license": "mit",
    }
    assert "license: mit" in (tmp_path / "README.md").read_text()


def test_a_collection_without_records_says_why(word_model, tokenizer, prompts, tmp_path):
    builder = make_builder(word_model, tokenizer, max_new_tokens=300)
    with pytest.raises(ValueError, match="No record is left of 28 prompts: 28 for `long_prompt` were dropped"):
        builder.build(prompts, output_dir=tmp_path)
    with pytest.raises(ValueError, match="unfinished collection"):
        load_trajectories(tmp_path)


def test_push_needs_a_folder(word_model, tokenizer, prompts):
    builder = make_builder(word_model, tokenizer)
    builder.build(prompts[:2])
    with pytest.raises(ValueError, match="Only what is on disk can be pushed"):
        builder.push_to_hub("user/name")


def test_a_model_on_several_devices_gives_the_same(word_model, tokenizer, prompts, tmp_path):
    """Layers on the CPU and on the disk: accelerate moves what goes in between, as between two GPUs."""
    from transformers import AutoModelForCausalLM

    expected = make_builder(word_model, tokenizer).build(prompts[:6])
    word_model.save_pretrained(tmp_path / "model")
    places = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.layers.2": "cpu",
        "model.norm": "disk",
        "model.rotary_emb": "cpu",
        "lm_head": "disk",
    }
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offloaded"
    )
    assert {weight.device.type for weight in model.parameters()} == {"cpu", "meta"}
    spread = make_builder(model, tokenizer).build(prompts[:6], output_dir=tmp_path / "out")
    assert spread[:] == expected[:]


def test_differences_name_what_differs():
    before = {"options": {"seed": 1, "cleaning": {"drop_empty": True}}, "model": {"name": "a", "fingerprint": "x"}}
    after = {"options": {"seed": 2, "cleaning": {"drop_empty": False}}, "model": {"name": "b", "fingerprint": "y"}}
    assert describe_difference(before, before) == ""
    assert describe_difference(before, after) == (
        "other weights of the model; `seed` is 1 there and 2 here; `drop_empty` is True there and False here"
    )


def test_a_shard_may_have_no_records(word_model, tokenizer, prompts, tmp_path):
    wanted = [*prompts[:8], *prompts[:8], *prompts[8:12]]
    dataset = make_builder(word_model, tokenizer).build(wanted, output_dir=tmp_path)
    assert pq.read_metadata(tmp_path / "data/train-00001-of-00003.parquet").num_rows == 0
    assert dataset["prompt"] == prompts[:12]
    assert read_manifest(tmp_path)["counts"] == {"duplicate": 8, "kept": 12}


def test_a_missing_file_of_a_finished_folder_is_made_anew(word_model, tokenizer, prompts, tmp_path):
    builder = make_builder(word_model, tokenizer, test_fraction=0.3)
    builder.build(prompts, output_dir=tmp_path)
    before = files_of(tmp_path)
    for name in (
        "data/test-00001-of-00004.parquet",
        "data/train-00002-of-00004.parquet",
        "README.md",
        "statistics.png",
    ):
        (tmp_path / name).unlink()
        builder.build(prompts, output_dir=tmp_path)
        assert files_of(tmp_path) == before


def test_what_others_wrote_into_the_card_stays(word_model, tokenizer, prompts, tmp_path):
    builder = make_builder(word_model, tokenizer)
    builder.build(prompts[:4], output_dir=tmp_path)
    card = tmp_path / "README.md"
    card.write_text(card.read_text() + "\nMy own words.\n")
    builder.build(prompts[:4], output_dir=tmp_path, license="mit")
    assert "My own words." in card.read_text() and "license: mit" in card.read_text()


def test_the_size_of_batches_may_change_on_the_way(
    word_model, tokenizer, prompts, finished, tmp_path, monkeypatch, caplog
):
    """As after running out of memory: batches of the journal are then others, and are not mixed up."""
    collect, calls = ShardCollector._collect, []

    def fail(self, requests):
        calls.append(requests)
        if len(calls) == 5:
            raise _Stop
        return collect(self, requests)

    monkeypatch.setattr(ShardCollector, "_collect", fail)
    with pytest.raises(_Stop):
        make_builder(word_model, tokenizer).build(prompts, output_dir=tmp_path)
    resumed = make_builder(word_model, tokenizer, max_tokens_per_batch=120).build(prompts, output_dir=tmp_path)
    assert resumed[:] == load_trajectories(finished)[:]
    assert "`max_tokens_per_batch=200`, and goes on with" in caplog.text


def test_a_process_that_has_no_record_does_not_wait_for_ever(word_model, tokenizer, prompts, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        builder = make_builder(word_model, tokenizer, max_new_tokens=300)
        if rank == "0":
            assert not builder.collect(prompts, tmp_path, wait=False)
        else:
            with pytest.raises(ValueError, match="No record is left of 28 prompts"):
                builder.collect(prompts, tmp_path)


def test_behind_a_stop_token_nothing_is_greedy(word_model, tokenizer, prompts):
    expected = make_builder(word_model, tokenizer).build(prompts)
    stop_ids = {tokenizer.eos_token_id, *range(40, 50)}
    row = next(row for row in expected if row["response_ids"][-1] in stop_ids)
    ids = torch.tensor([row["prompt_ids"] + row["response_ids"]])
    further = word_model.generate(ids, do_sample=False, max_new_tokens=2, eos_token_id=None)[
        0, ids.shape[1] :
    ].tolist()
    builder = make_builder(word_model, tokenizer)
    with pytest.raises(ValueError, match="1 for `not_greedy`"):
        builder.build([row["prompt"]], [row["response_ids"] + further])


def test_tokens_that_the_model_does_not_have_are_refused(word_model, tokenizer):
    with pytest.raises(ValueError, match="vocabulary of 102, got 102 in the prompt of prompt 1"):
        make_builder(word_model, tokenizer).build([[5], [5, 102]])
    with pytest.raises(ValueError, match="at least 0, got -100 in prompt 1"):
        make_builder(word_model, tokenizer).build([[5], [5, -100]])
    for ids in ([999], [-100]):
        with pytest.raises(ValueError, match=f"got {ids[0]} in the response of prompt 0"):
            make_builder(word_model, tokenizer).build([[5]], [ids])


def test_prompts_of_arrays_are_token_ids(word_model, tokenizer):
    ids = [7, 8, 9]
    rows = make_builder(word_model, tokenizer, drop_duplicates=False).build([ids, torch.tensor(ids), np.array(ids)])
    assert rows["prompt_ids"] == [ids] * 3
    with pytest.raises(ValueError, match="as prompt 1. Pass a column"):
        make_builder(word_model, tokenizer).build(["Mia", b"Mia"])


def test_the_stop_token_that_a_tokenizer_adds_ends_no_prompt(word_model, tokenizer):
    from tokenizers.processors import TemplateProcessing

    ending = copy_module.deepcopy(tokenizer)
    stop = tokenizer.eos_token
    ending.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {stop}", special_tokens=[(stop, tokenizer.eos_token_id)]
    )
    assert ending("Mia has 7")["input_ids"][-1] == tokenizer.eos_token_id
    assert read_rows(["Mia has 7"], ["apples"], ending) == read_rows(["Mia has 7"], ["apples"], tokenizer)


def test_a_padding_token_outside_the_embeddings_does_no_harm(word_model, tokenizer, prompts):
    expected = make_builder(word_model, tokenizer).build(prompts[:5])
    added = copy_module.deepcopy(tokenizer)
    added.add_special_tokens({"pad_token": "<a new one>"})
    assert added.pad_token_id >= word_model.get_input_embeddings().num_embeddings
    assert make_builder(word_model, added).build(prompts[:5])["response_ids"] == expected["response_ids"]


def test_prompt_tuning_is_refused(word_model, tokenizer):
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(word_model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ValueError, match="whose tokens are in no prompt"):
        make_builder(model, tokenizer)


def test_the_remedy_for_a_collection_without_records_works(word_model, tokenizer, prompts, finished, tmp_path):
    with pytest.raises(ValueError, match="For `long_prompt` lower `max_new_tokens`"):
        make_builder(word_model, tokenizer, max_new_tokens=300).build(prompts, output_dir=tmp_path)
    make_builder(word_model, tokenizer).build(prompts, output_dir=tmp_path)
    assert files_of(tmp_path) == files_of(finished)


def test_the_text_of_a_response_gives_its_tokens_back():
    """Also with a tokenizer that drops a space at the beginning of what it decodes, as those of Llama do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "▁Mia", "▁has", "▁7", "▁apples", "▁more"]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    assert tokenizer.decode([5]) == "apples"
    model = make_model("llama", vocab_size=len(words))
    built = make_builder(model, tokenizer, drop_duplicates=False).build([[2, 3, 4], [2, 3]])
    again = make_builder(model, tokenizer, drop_duplicates=False).build(["Mia has 7", "Mia has"], built["response"])
    assert again["response_ids"] == built["response_ids"] and all(text.startswith(" ") for text in built["response"])
