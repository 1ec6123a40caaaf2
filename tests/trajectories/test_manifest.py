"""`manifest.json` as anybody may have written it, and as it is published."""

import copy
import json

import pytest
from collections_on_disk import make_records, write_collection
from test_files import BAD_NAMES

from cllm_hf.trajectories import hub
from cllm_hf.trajectories.manifest import find_problem, read_manifest, recorded_model, without_folders


@pytest.fixture
def folder(tmp_path):
    write_collection(tmp_path / "made", {"train": [make_records(5)], "test": [[]]})
    return tmp_path / "made"


def rewrite(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


NAMES = [
    "README.md",
    "data/x.parquet",
    "data/train-0-of-1.parquet/..",
    "data/tr-ain-0-of-1.parquet",
    "x/train-0-of-1.parquet",
]
NAMES += ["data/train-\uff10-of-1.parquet", "data/train-0-of-1.parquet\n", "data/../train-0-of-1.parquet"]


@pytest.mark.parametrize("name", [*(name for name in BAD_NAMES if isinstance(name, str)), *NAMES])
def test_nothing_but_shards_is_named(folder, name):
    rewrite(folder, lambda manifest: manifest["shards"].update({name: {"records": 0}}))
    with pytest.raises(ValueError, match="must be the manifest of a trajectory dataset.* got the shard"):
        read_manifest(folder)


def test_names_twice_are_refused(folder):
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"shards": {', '"shards": {"a": 1, "a": 2}, "shards": {'))
    with pytest.raises(ValueError, match="must be JSON, got: an object with the entry '(a|shards)' twice"):
        read_manifest(folder)
    (folder / "manifest.json").write_text(text)
    rewrite(folder, lambda manifest: manifest["shards"].update({"data/Train-00000-of-00001.parquet": {"records": 0}}))
    with pytest.raises(ValueError, match="got names of shards that differ by case alone"):
        read_manifest(folder)


@pytest.mark.parametrize("where", ["manifest.json", "data", "data/train-00000-of-00001.parquet"])
def test_links_out_of_the_folder_are_refused(folder, tmp_path, where):
    (folder / where).rename(tmp_path / "moved")
    (folder / where).symlink_to(tmp_path / "moved")
    with pytest.raises(ValueError, match="which is a link to"):
        read_manifest(folder)


def test_every_entry_has_its_kind(folder):
    """Every part of a manifest in turn, replaced by others, is a problem with its name."""
    manifest = read_manifest(folder)
    assert find_problem(manifest, is_whole=True) is None
    for name in ("complete", "prompts_done", "model", "tokenizer", "prompts", "options", "counts", "statistics"):
        for junk in ([], "x", 1.5, -1):
            assert f"`{name}` " in find_problem({**manifest, name: junk})
        assert find_problem({**manifest, name: None}) is None or name == "model"
        assert find_problem({**manifest, name: None}, is_whole=True) is not None
    for part, name in (
        ("model", "num_parameters"),
        ("options", "block_size"),
        ("prompts", "count"),
        ("counts", "kept"),
    ):
        for junk in (True, "1", -1, [], 0.5):
            changed = copy.deepcopy(manifest)
            changed[part][name] = junk
            assert f"`{part}.{name}`" in find_problem(changed)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/home/me/models/llama", "path/to/llama"),
        ("~/llama", "path/to/llama"),
        ("C:\\Users\\me\\llama", "path/to/llama"),
        ("\\\\host\\share\\llama", "path/to/llama"),
        ("file:///home/me/llama", "path/to/llama"),
        ("runs/me/llama", "path/to/llama"),
        ("user/llama", "user/llama"),
        ("https://example.com/a/b/prompts", "https://example.com/a/b/prompts"),
    ],
)
def test_a_published_manifest_tells_no_folders(folder, name, shown):
    def change(manifest):
        manifest["model"]["name"] = manifest["tokenizer"]["name"] = manifest["prompts"]["source"] = name
        manifest["model"]["revision"] = "refs/pr/1"
        manifest["options"]["else"] = [name]

    rewrite(folder, change)
    additions = hub._additions(folder, read_manifest(folder), "default")
    published = additions["manifest.json"]
    published = json.loads(published if isinstance(published, bytes) else (folder / "manifest.json").read_bytes())
    assert published == without_folders(read_manifest(folder))
    assert published["model"]["name"] == published["tokenizer"]["name"] == published["prompts"]["source"] == shown
    assert published["model"]["revision"] == "refs/pr/1" and published["shards"] == read_manifest(folder)["shards"]
    if shown == "path/to/llama":
        assert "me" not in json.dumps(published["options"]["else"]) or name == "runs/me/llama"
        with pytest.raises(OSError, match="was made by the model path/to/llama, which is not there. Pass it as"):
            recorded_model("user/data", published["model"])
