"""
Hostile folders: nothing outside of a folder is read, uploaded, changed or deleted, and every outcome is clear.

Each case takes a sound folder, lets a few things be done to it that somebody else may do, and uses it in every way.
What comes out is what a sound folder gives, or a `ValueError` or `OSError` that this package raises itself.
"""

import json
import os
import random
import shutil
import signal
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from collections_on_disk import make_records, rows, write_collection, write_shard
from conftest import make_model, make_word_model
from datasets import Dataset, DatasetDict
from fuzzing import num_cases
from test_builder import _Stop, make_builder

import cllm_hf
from cllm_hf.demo.problems import make_problems
from cllm_hf.journal import Journal
from cllm_hf.trajectories import hub
from cllm_hf.trajectories.loading import find_manifest


SECRET = "what nobody may see"
MINE = "my own words"
SHORT, LONG = 8, 150
NAMES = (
    "../outside/data/train-00000-of-00001.parquet",
    "data/../../outside/data/train-00000-of-00001.parquet",
    "data/train-00000-of-00002.parquet/../../../outside/secret.txt",
    "OUTSIDE/data/train-00000-of-00001.parquet",  # replaced by the whole path
    "OUTSIDE/secret.txt",
    "..\\outside\\secret.txt",
    "C:\\secret.txt",
    "//outside/secret.txt",
    "",
    ".",
    "..",
    "data",
    "data/",
    "./data/train-00000-of-00002.parquet",
    "data//train-00000-of-00002.parquet",
    "data/train-00000-of-00002.parquet ",
    "data/train-00000-of-00002.parquet\n",
    "data/\u202etrain-00000-of-00002.parquet",
    "data/train-\uff10\uff10\uff10\uff10\uff10-of-00002.parquet",
    "data/Train-00000-of-00002.parquet",
    "data/train-00007-of-00002.parquet",
    "data/" + "a" * 300 + "-00000-of-00002.parquet",
    "notes.txt",
    "README.md",
    "\ud800",
    "~/secret.txt",
    "file:///etc/passwd",
)
JUNK = (
    None,
    -1,
    True,
    0,
    10**30,
    "",
    "x",
    "../outside",
    "a`b\n<!-- cllm_hf: end -->|\"'",
    [],
    [1],
    {},
    {"a": "b"},
    0.5,
)


# --- a watch over the outside -----------------------------------------------------------------------------------


class Watch:
    """Sees what this process opens, lists and changes outside of the folder."""

    def __init__(self):
        self.outside, self.seen = None, []
        sys.addaudithook(self._see)

    def _see(self, event, arguments):
        if self.outside is None or not event.startswith(("open", "os.", "shutil.")):
            return
        for path in arguments:
            if isinstance(path, (str, bytes, os.PathLike)) and os.fspath(path):
                path = os.fsdecode(path)
                at_the_link = event in ("os.remove", "os.rename", "os.symlink", "os.rmdir")
                real = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
                if "\0" not in path and (real if at_the_link else os.path.realpath(path)).startswith(self.outside):
                    self.seen.append((event, path))

    @contextmanager
    def over(self, outside):
        before = snapshot(outside)
        self.outside, self.seen = str(outside), []
        try:
            yield
        finally:
            self.outside = None
        assert not self.seen and snapshot(outside) == before


WATCH = Watch()


def snapshot(folder):
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@contextmanager
def time_limit(seconds=20):
    def stop(*_):
        raise AssertionError("this takes for ever")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


# --- what may be done to a folder -------------------------------------------------------------------------------


def edit(path, change):
    if path.is_file():
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))


def rename_shard(draw, folder, outside):
    name = draw.choice(NAMES).replace("OUTSIDE", str(outside))

    def change(manifest):
        shards = manifest.setdefault("shards", {})
        entry = shards.pop(draw.choice(sorted(shards)), {}) if shards and draw.random() < 0.5 else {"records": 0}
        shards[name] = entry
        if draw.random() < 0.3:  # as if nothing had been kept: such a folder is begun anew
            manifest |= {"counts": {}, "prompts_done": manifest["prompts"]["count"]}
            manifest["options"]["seed"] = 5

    edit(folder / "manifest.json", change)


def put_junk(draw, folder, outside):
    def change(value):
        while True:
            key = draw.choice(sorted(value) if isinstance(value, dict) else range(len(value)))
            if not isinstance(value[key], (dict, list)) or not value[key] or draw.random() < 0.3:
                value[key] = draw.choice(JUNK)
                return
            value = value[key]

    edit(draw.choice([path for path in folder.rglob("*.json") if path.is_file()]), change)


def spoil_text(draw, folder, outside):
    """Cut a file, change a byte of it, or say something twice."""
    path = draw.choice([path for path in folder.rglob("*") if path.is_file() and path.name != "notes.txt"])
    data = path.read_bytes()
    place = draw.randrange(len(data) + 1)
    kind = draw.randrange(3)
    if kind == 0:
        path.write_bytes(data[:place])
    elif kind == 1 and place < len(data):
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << draw.randrange(8))]) + data[place + 1 :])
    elif path.suffix == ".json":
        path.write_bytes(b'{"shards": {}, ' + data.lstrip()[1:])


def put_in_the_way(draw, folder, outside):
    """Links of every kind, folders, pipes and empty files in the place of what is there, or is to be written."""
    there = [path for path in folder.rglob("*") if path.name != "notes.txt"]
    names = (
        "README.md",
        "statistics.png",
        "data",
        ".unfinished",
        ".unfinished/statistics.png",
        ".unfinished/0-README.md",
    )
    names += (".unfinished/process-0.lock", ".unfinished/0-manifest.json", ".unfinished/shard-00000")
    names += (".README.md.tmp", "custom_generate", "custom_generate/generate.py", "custom_generate/.generate.py.tmp")
    names += (".unfinished/0-train-00000-of-00002.parquet", ".unfinished/shard-00000/responses-00000.json")
    path = draw.choice([*there, *(folder / name for name in names)])
    if not path.parent.is_dir() or path.parent.is_symlink():
        return
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    kind = draw.randrange(7)
    if kind < 4:
        inner = outside / path.relative_to(folder)
        target = draw.choice([outside, outside / "secret.txt", inner, path, folder / "nowhere", outside / "new"])
        path.symlink_to(target)
    elif kind == 4:
        path.mkdir()
        (path / "mine.txt").write_text(MINE)
    elif kind == 5:
        os.mkfifo(path)
    else:
        path.touch()


def swap(draw, folder, outside):
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "notes.txt")
    draw.choice(files).write_bytes(draw.choice(files).read_bytes())


def name_oddly(draw, folder, outside):
    name = draw.choice(["data/\n.parquet", "\x1b[2J", "data/`x`", "a\\b", "\udcff", "<b>", ".unfinished/\n"])
    if (folder / name).parent.is_dir() and not (folder / name).parent.is_symlink():
        (folder / name).write_text(MINE)


MUTATIONS = (rename_shard, put_junk, spoil_text, put_in_the_way, swap, name_oddly)


# --- how a folder is used ---------------------------------------------------------------------------------------


class FakeHub:
    """Takes what is uploaded."""

    def __init__(self, draw, cache):
        self.uploads, self.deleted, self.others = {}, [], {}
        if draw.random() < 0.5:
            value = draw.choice([*JUNK, {"format": 1, "shards": {}, "statistics": {"train": draw.choice(JUNK)}}])
            self.others = {f"{draw.choice(['other', 'a`b', '..', chr(10)])}/manifest.json": json.dumps(value)}
        self.cache = cache

    def __call__(self, token=None):
        return self

    def whoami(self):
        return {"name": "user", "auth": {"accessToken": {"role": "write"}}}

    def create_repo(self, repo_id, **options):
        return SimpleNamespace(repo_id=repo_id)

    def repo_info(self, *arguments, **options):
        return SimpleNamespace(sha="0" * 40)

    def list_repo_files(self, *arguments, **options):
        return ["mine.txt", "data/train-00099-of-00100.parquet", *self.others]

    def hf_hub_download(self, repo_id, name, **options):
        path = self.cache / "other.json"
        path.write_text(self.others[name])
        return str(path)

    def create_commit(self, repo_id, operations, **options):
        for operation in operations:
            content = getattr(operation, "path_or_fileobj", None)
            if content is None:
                self.deleted.append(operation.path_in_repo)
            else:
                data = Path(content).read_bytes() if isinstance(content, str) else bytes(content)
                self.uploads[operation.path_in_repo] = data
        return SimpleNamespace(pr_url=None, repo_url="https://hub/x")


def is_ours(error):
    """Whether an exception was raised by a line of this package."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return "/cllm_hf/" in trace.tb_frame.f_code.co_filename


def use(what):
    """What comes out, or `None` after a clear error."""
    try:
        return what()
    except (ValueError, OSError) as error:
        assert is_ours(error) and getattr(error, "errno", None) is None and len(str(error)) > 30, repr(error)
        assert SECRET not in str(error)
        return None


def use_everywhere(draw, folder, outside, kept, cache, monkeypatch):
    for options in ({}, {"streaming": True}, {"split": None, "allow_incomplete": True}):
        loaded = use(lambda options=options: load(folder, **options))
        assert SECRET not in str(loaded)
        # A stream is not read before, and what `save_to_disk` leaves has no digests.
        if loaded is not None and "streaming" not in options and os.path.lexists(folder / "manifest.json"):
            assert all(one in kept for one in loaded)
    use(lambda: cllm_hf.load_trajectories(folder, name="../outside"))
    use(lambda: find_manifest(folder))
    fake = FakeHub(draw, cache)
    monkeypatch.setattr(hub, "HfApi", fake)
    monkeypatch.setattr(hub, "get_token", lambda: "token")
    use(lambda: hub.push_trajectories(folder, "user/x"))
    for name, data in fake.uploads.items():
        assert SECRET.encode() not in data, name
        assert not name.endswith(".json") or str(folder.parent).encode() not in data
    assert set(fake.deleted) <= {"data/train-00099-of-00100.parquet"}
    use(lambda: cllm_hf.export_custom_generate(folder, overwrite=True))
    Journal(folder / "journal").clear()


def load(folder, **options):
    loaded = cllm_hf.load_trajectories(folder, **options)
    parts = loaded.values() if isinstance(loaded, dict) else [loaded]
    return [row for part in parts for row in rows(part)]


def run_case(seed, sound, path, collect, monkeypatch):
    draw = random.Random(seed)
    folder, outside = path / "folder", path / "outside"
    base = draw.choice(sound)
    shutil.copytree(base.path, folder)
    (folder / "notes.txt").write_text(MINE)
    write_collection(outside, {"train": [make_records(3, seed=9)]})
    write_shard(outside / "data" / "train-00000-of-00002.parquet", [{**make_records(1)[0], "prompt": SECRET}])
    for name in ("secret.txt", "README.md", "statistics.png"):
        (outside / name).write_text(SECRET)
    for _ in range(draw.randrange(1, 4)):
        # What one has left may not take another.
        with suppress(OSError, ValueError, TypeError, LookupError, AttributeError):
            draw.choice(MUTATIONS)(draw, folder, outside)
    with time_limit(), WATCH.over(outside):
        use_everywhere(draw, folder, outside, base.records, path, monkeypatch)
        if base.is_collected and (collected := use(lambda: collect(folder))) is not None:
            assert collected == base.records
    assert (folder / "notes.txt").read_text() == MINE
    mine = [file for file in folder.rglob("mine.txt") if file.is_file()]
    assert all(file.read_text() == MINE for file in mine)


@pytest.fixture(scope="module")
def prompts():
    return [problem.prompt for problem in make_problems(5, seed=3)]


@pytest.fixture(scope="module")
def collect(tokenizer, prompts):
    builder = make_builder(make_word_model(tokenizer), tokenizer, prompts_per_shard=3, max_new_tokens=6)
    return lambda folder: rows(builder.build(prompts, output_dir=folder))


@pytest.fixture(scope="module")
def sound(tmp_path_factory, collect):
    """Folders of a collection, an unfinished one, what `save_to_disk` leaves, and a model."""
    path = tmp_path_factory.mktemp("sound")
    records = make_records(7)
    write_collection(path / "made", {"train": [records[:4], records[4:]], "test": [[], []]})
    Dataset.from_list(records).save_to_disk(path / "saved")
    DatasetDict({"train": Dataset.from_list(records[:4]), "x": Dataset.from_list(records[4:])}).save_to_disk(
        path / "split"
    )
    make_model("llama").save_pretrained(path / "model")
    collected = collect(path / "finished")
    with pytest.MonkeyPatch.context() as patched, pytest.raises(_Stop):
        patched.setattr("cllm_hf.trajectories.folder.OutputFolder.write_shard", stop_at_second())
        collect(path / "begun")
    kinds = {"made": records, "saved": records, "split": records, "model": []}
    kinds |= {"finished": collected, "begun": collected}
    return [
        SimpleNamespace(path=path / name, records=kept, is_collected=kept is collected) for name, kept in kinds.items()
    ]


def stop_at_second():
    from cllm_hf.trajectories.folder import OutputFolder

    write_shard = OutputFolder.write_shard

    def write(self, number, *arguments):
        if number:
            raise _Stop
        write_shard(self, number, *arguments)

    return write


def check_cases(count, first, sound, tmp_path, collect, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for seed in range(first, first + num_cases(count)):
        path = tmp_path / str(seed)
        path.mkdir()
        try:
            run_case(seed, sound, path, collect, monkeypatch)
        except BaseException as error:
            error.args = (f"case {seed}: {error}",)
            raise
        shutil.rmtree(path)


def test_hostile_folders_lead_nowhere(sound, tmp_path, collect, monkeypatch):
    check_cases(SHORT, 0, sound, tmp_path, collect, monkeypatch)


@pytest.mark.slow
def test_many_hostile_folders_lead_nowhere(sound, tmp_path, collect, monkeypatch):
    check_cases(LONG, 1000, sound, tmp_path, collect, monkeypatch)
