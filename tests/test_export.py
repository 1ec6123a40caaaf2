"""`export_custom_generate`: Jacobi decoding for people who have not installed the package."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_model, make_prompts
from huggingface_hub import ModelCard
from lossless_adapters import save_base, save_lossless_adapter
from peft import LoraConfig, get_peft_model
from transformers.dynamic_module_utils import get_imports, get_relative_import_files, get_relative_imports

import cllm_hf
from cllm_hf import export
from cllm_hf.export import render_modules


ROOT = Path(__file__).parent.parent
WRITTEN = ("custom_generate/generate.py", "custom_generate/requirements.txt", "README.md")


def make_byte_model(tokenizer):
    return make_model("llama", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)


def save(folder, tokenizer, block_size=None):
    model = make_byte_model(tokenizer)
    if block_size is not None:
        cllm_hf.set_jacobi_defaults(model, block_size=block_size)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path, byte_tokenizer):
    return save(tmp_path / "model", byte_tokenizer)


def run_without_cllm(tmp_path, *arguments):
    hub = tmp_path / "hub"
    process = subprocess.run(
        [sys.executable, "-I", ROOT / "tests" / "without_cllm.py", *arguments],
        env={**os.environ, "HF_HOME": str(hub), "HF_MODULES_CACHE": str(hub / "modules")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def results(tmp_path_factory, byte_tokenizer):
    path = tmp_path_factory.mktemp("export")
    model_folder = save(path / "model", byte_tokenizer, block_size=8)
    cllm_hf.export_custom_generate(model_folder)
    adapter = get_peft_model(
        make_byte_model(byte_tokenizer),
        LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False),
        adapter_name="default",
    )
    adapter.peft_config["default"].base_model_name_or_path = str(save(path / "base", byte_tokenizer))
    adapter.save_pretrained(path / "adapter")
    cllm_hf.export_custom_generate(path / "adapter", block_size=8)
    base = save_base(path / "chain", byte_tokenizer, vocab_size=len(byte_tokenizer))
    save_lossless_adapter(path / "lossless", base, byte_tokenizer)
    cllm_hf.export_custom_generate(path / "lossless", block_size=16)  # more than it drafts: a default is cut
    return run_without_cllm(path, model_folder, path / "adapter", path / "lossless")


@pytest.mark.parametrize("name", ["keywords", "batch", "processors", "stop strings"])
def test_tokens_are_those_of_greedy_decoding(results, name):
    result = results[name]
    assert result["decoded"] == result["named"] == result["expected"]
    greedy, loaded, named = result["forwards"]
    assert loaded == named < greedy


def test_every_way_to_call_it(results):
    expected, *others = results["positional"]
    assert others == [expected] * 4
    greedy, loaded, _ = results["keywords"]["forwards"]
    assert results["autoregressive forwards"] == greedy > loaded
    num_forwards, counted, most = results["statistics"]
    assert num_forwards == counted == loaded and 1 < most <= 8
    assert results["pipeline"][0] == results["pipeline"][1]


def test_errors_are_as_clear(results):
    refused = results["refused"]
    assert 'integer of at least 1 or "auto", got 0. Typical values' in refused["block size"] == refused["named"]
    assert '"lossless" or "autoregressive", got \'jacoby\'' in refused["decoding"]
    assert "pass `num_beams=1`" in refused["beams"]
    assert "not used by the model: ['jacobi_blok_size']" in refused["unknown"]


def test_adapter_by_name(results):
    expected, decoded, forwards = results["adapter"]
    assert decoded == expected
    assert forwards < len(decoded[0])


def test_a_lossless_adapter_drafts(results):
    result = results["lossless"]
    assert result["decoded"] == [result["expected"]] * len(result["decoded"])
    greedy, forwards, counted, switched_off = result["forwards"]
    assert greedy == switched_off == 30 and forwards == counted <= 6  # all drafts are right
    assert "must be at most 7 with this adapter" in result["refused"]
    assert result["imported"] == []


def test_nothing_is_patched(results):
    assert results["generate_of_the_host"] == results["still the host's"] == "transformers.generation.utils"


def test_it_goes_beside_an_installed_package(folder):
    from transformers import AutoModelForCausalLM

    cllm_hf.export_custom_generate(folder, block_size=4)
    ids, _ = make_prompts(1)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    expected = AutoModelForCausalLM.from_pretrained(folder).generate(ids, do_sample=False, max_new_tokens=20)
    cllm_hf.set_jacobi_defaults(model, block_size=6)
    for options, most in (({}, 6), ({"jacobi_block_size": 3}, 3)):
        output = model.generate(ids, max_new_tokens=20, return_dict_in_generate=True, **options)
        assert output.sequences.tolist() == expected.tolist()
        assert max(map(max, output.jacobi_stats.num_committed)) <= most
    plain = model.generate(ids, max_new_tokens=20, decoding="autoregressive", return_dict_in_generate=True)
    assert plain.sequences.tolist() == expected.tolist() and not hasattr(plain, "jacobi_stats")


def test_what_is_written(folder):
    path = cllm_hf.export_custom_generate(folder, block_size=5)
    assert path == str(folder / "custom_generate" / "generate.py")
    text = Path(path).read_text()
    assert text.startswith(f"# Generated by cllm_hf {cllm_hf.__version__}") and "Apache" in text.splitlines()[1]
    assert "EXPORTED_BLOCK_SIZE = 5\n" in text
    assert {file.name for file in Path(path).parent.iterdir()} == {*render_modules(), "requirements.txt"}
    card = ModelCard.load(folder / "README.md")
    assert card.data.tags == ["custom_generate"] and "trust_remote_code=True" in card.text
    assert not [entry.name for entry in folder.iterdir() if entry.name.startswith(".")]


def test_what_is_written_beside_a_lossless_adapter(tmp_path):
    folder = save_lossless_adapter(tmp_path / "adapter", save_base(tmp_path / "base"))
    (folder / "README.md").unlink()
    text = Path(cllm_hf.export_custom_generate(folder)).read_text()
    assert "EXPORTED_DECODING = 'lossless'\n" in text and "EXPORTED_BLOCK_SIZE = 7\n" in text
    assert "peft>=" in (folder / "custom_generate" / "requirements.txt").read_text()
    card = (folder / "README.md").read_text()
    assert "lossless" in card and "`jacobi_drafts`" in card and "`lossless_adapter`" in card
    assert "custom_generate=name, trust_remote_code=True" in card
    (folder / "drafter.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"without drafter.safetensors. Save the adapter with"):
        cllm_hf.export_custom_generate(folder)


def test_requirements_are_those_of_the_package(folder):
    cllm_hf.export_custom_generate(folder)
    lines = (folder / "custom_generate" / "requirements.txt").read_text().splitlines()[1:]
    assert lines == re.findall(r'^    "((?:torch|transformers)>=[\d.]+)', (ROOT / "pyproject.toml").read_text(), re.M)


def test_block_size_of_the_folder_is_kept(tmp_path, byte_tokenizer):
    path = cllm_hf.export_custom_generate(save(tmp_path / "model", byte_tokenizer, block_size=7))
    assert "EXPORTED_BLOCK_SIZE = 7\n" in Path(path).read_text()


def test_exporting_again_changes_nothing(folder):
    (folder / "README.md").write_text("---\nlicense: mit\ntags:\n- cllm\n---\n# My model\n\nWords.\n")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "notes.txt").write_text("mine")
    (folder / "custom_generate" / "mine.py").write_text("mine")
    (folder / "custom_generate" / "gone.py").write_text("# Generated by cllm_hf 0.0.1: a copy.")
    cllm_hf.export_custom_generate(folder)
    assert not (folder / "custom_generate" / "gone.py").exists()
    first = [(folder / name).read_text() for name in WRITTEN]
    assert first[2] == "---\nlicense: mit\ntags:\n- cllm\n- custom_generate\n---\n# My model\n\nWords.\n"
    cllm_hf.export_custom_generate(folder)
    assert [(folder / name).read_text() for name in WRITTEN] == first
    assert [(folder / "custom_generate" / name).read_text() for name in ("notes.txt", "mine.py")] == ["mine"] * 2


@pytest.mark.parametrize("card", ["# No metadata\n", "---\ntags: cllm\n---\n# One tag\n", ""])
def test_cards_of_any_kind_get_the_tag(folder, card):
    (folder / "README.md").write_text(card)
    cllm_hf.export_custom_generate(folder)
    loaded = ModelCard.load(folder / "README.md")
    assert loaded.data.tags[-1] == "custom_generate"
    assert loaded.text.strip() == card.split("---\n")[-1].strip()


def test_what_stands_in_the_way_is_refused(folder):
    ours = folder / "custom_generate" / "generate.py"
    ours.parent.mkdir()
    ours.write_text("def generate(model, **kwargs): ...\n")
    with pytest.raises(ValueError, match="was not written by `export_custom_generate`.*overwrite=True"):
        cllm_hf.export_custom_generate(folder)
    assert not (folder / "README.md").exists()
    cllm_hf.export_custom_generate(folder, overwrite=True)
    assert "jacobi" in ours.read_text()
    for wrong in ("---\n- a\n---\n", "---\na: [\n---\n"):
        (folder / "README.md").write_text(wrong)
        with pytest.raises(ValueError, match="must be valid YAML"):
            cllm_hf.export_custom_generate(folder)
    with pytest.raises(ValueError, match="`block_size` must be an integer of at least 1.*got 0"):
        cllm_hf.export_custom_generate(folder, block_size=0)
    with pytest.raises(ValueError, match="Drop them"):
        cllm_hf.export_custom_generate(folder, revision="main")


def test_folders_without_a_model_are_refused(tmp_path):
    with pytest.raises(OSError, match="neither `config.json` nor `adapter_config.json`"):
        cllm_hf.export_custom_generate(tmp_path)
    assert list(tmp_path.iterdir()) == []
    for missing in (tmp_path / "missing", str(tmp_path / "missing"), "user/missing", "a//b"):
        with pytest.raises(OSError, match="must be a folder, or the id of a model on the Hub.*, got .*(missing|a//b)"):
            cllm_hf.export_custom_generate(missing)


def test_an_interrupted_export_leaves_nothing_half_written(folder, monkeypatch):
    cllm_hf.export_custom_generate(folder, block_size=4)
    before = [(folder / name).read_text() for name in WRITTEN]

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        cllm_hf.export_custom_generate(folder, block_size=9)
    assert [(folder / name).read_text() for name in WRITTEN] == before
    assert not [entry.name for entry in folder.iterdir() if entry.name.startswith(".")]


class FakeHub:
    """A repository in a folder, which takes whole commits."""

    def __init__(self, path):
        self.path = path
        self.commits = []

    def snapshot_download(self, repo_id, revision=None, allow_patterns=()):
        return str(self.path)

    def create_commit(self, repo_id, operations, commit_message, revision=None):
        files = {
            operation.path_in_repo: operation.path_or_fileobj.decode()
            if hasattr(operation, "path_or_fileobj")
            else None
            for operation in operations
        }
        self.commits.append((repo_id, revision, files))
        return type("Commit", (), {"commit_url": "address of the commit"})


def test_a_model_on_the_hub_gets_one_commit(folder, monkeypatch):
    hub = FakeHub(folder)
    monkeypatch.setattr(export, "HfApi", lambda token: hub)
    assert cllm_hf.export_custom_generate("user/model", revision="dev", token="x") == "address of the commit"
    [(repo_id, revision, files)] = hub.commits
    assert (repo_id, revision, set(WRITTEN) - set(files)) == ("user/model", "dev", set())
    assert {name for name in files if name.endswith(".py")} == {f"custom_generate/{name}" for name in render_modules()}
    assert not (folder / "custom_generate").exists()
    assert 'name = "user/model"' in files["README.md"]
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "custom_generate" / "gone.py").write_text(f"# Generated by cllm_hf {cllm_hf.__version__}: a copy.\n")
    cllm_hf.export_custom_generate("user/model")
    assert hub.commits[1][2] == {**files, "custom_generate/gone.py": None}


def test_command(folder, capsys):
    from cllm_hf.cli import main

    assert main(["export", str(folder), "--block-size", "6"]) == 0
    assert str(folder / "custom_generate" / "generate.py") in capsys.readouterr().out
    assert "EXPORTED_BLOCK_SIZE = 6\n" in (folder / "custom_generate" / "generate.py").read_text()
    assert main(["export", str(folder), "--block-size", "0"]) == 1
    assert "got 0" in capsys.readouterr().err
    assert main(["export", str(folder / "missing")]) == 1
    assert "Check the name" in capsys.readouterr().err


def test_modules_lie_flat_beside_each_other_and_need_what_everyone_has(tmp_path):
    """Fails when two modules that decoding needs have one name, or one imports what not everyone has: do without."""
    modules = render_modules()
    for name, text in modules.items():
        (tmp_path / name).write_text(text)
    available = {*sys.stdlib_module_names, "numpy", "safetensors", "torch", "transformers"}
    for name, text in modules.items():
        # What transformers finds, which is not all that Python does.
        imported = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) and node.level]
        assert {node.module for node in imported} == set(get_relative_imports(tmp_path / name))
        assert set(get_imports(tmp_path / name)) <= available
    assert {Path(file).stem for file in get_relative_import_files(tmp_path / "generate.py")} | {"generate"} == {
        Path(name).stem for name in modules
    }


@pytest.mark.parametrize("line", ["from ..blocks import _host\n", "from . import loop\n", "from .rows import Row\n"])
def test_modules_that_one_folder_cannot_hold_are_refused(tmp_path, monkeypatch, line):
    package = tmp_path / "package"
    shutil.copytree(ROOT / "cllm_hf", package)
    (package / "decoding" / "loop.py").write_text(line)
    (package / "rows.py").touch()
    monkeypatch.setattr(export, "_PACKAGE", package)
    monkeypatch.setattr(export, "_ENTRY", package / "exported.py")
    (package / "exported.py").write_text("from .rows import Row\nfrom .decoding.loop import decode\n")
    with pytest.raises(RuntimeError, match="every module needs a name of its own"):
        render_modules()
