"""The documents name everything public as it is, their links hold, their site is built, and the tour's code runs."""

import argparse
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import trl
import yaml
from transformers import GenerationMixin

import cllm_hf
from cllm_hf.cli import _make_parser, main
from cllm_hf.demo.run import DemoOptions, run_demo
from cllm_hf.evaluation.arguments import MOVED


ROOT = Path(__file__).parent.parent
REFERENCE = (ROOT / "docs" / "reference.md").read_text()


def rows(first, *others):
    """Whether the reference has a table row that begins with these cells."""
    return any(line.startswith(" | ".join([f"| `{first}`", *others])) for line in REFERENCE.splitlines())


def test_every_public_name_is_in_the_reference():
    assert sorted(re.findall(r"^::: cllm_hf\.(\w+)$", REFERENCE, flags=re.MULTILINE)) == cllm_hf.__all__
    assert sorted(cllm_hf.__all__) == cllm_hf.__all__
    for name in cllm_hf.__all__:
        assert getattr(cllm_hf, name).__doc__ or name == "FEATURES"


def test_every_argument_of_generate_is_in_the_reference():
    added = set(inspect.signature(GenerationMixin.generate, follow_wrapped=False).parameters) - {"self"}
    added = {name for name in added if name not in ("args", "kwargs")}
    assert "decoding" in added and "jacobi_block_size" in added
    assert [name for name in added if not rows(name)] == []


@pytest.mark.parametrize("name", sorted({*cllm_hf.__all__, "TrajectoryBuilder.collect"} - {"FEATURES"}))
def test_docstrings_name_every_parameter(name):
    public = cllm_hf
    for part in name.split("."):
        public = getattr(public, part)
    parameters = dict(inspect.signature(public).parameters)
    if public is cllm_hf.CLLMConfig:  # those of its base class stand in the documentation of TRL
        for inherited in inspect.signature(trl.SFTConfig).parameters:
            parameters.pop(inherited, None)
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    names = [key for key, one in parameters.items() if key != "self" and one.kind not in kinds]
    documented = re.findall(r"^\s*(\w+) \(", inspect.getdoc(public) or "", flags=re.MULTILINE)
    assert [one for one in names if one not in documented] == []


def test_every_command_is_in_the_reference():
    commands = list(find_commands(_make_parser(), "cllm"))
    assert "cllm benchmark decode" in commands and "cllm train" in commands
    assert [name for name in commands if f"\n| `{name} " not in REFERENCE] == []


def find_commands(parser, name):
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not inner:
        yield name
    for action in inner:
        for key, subparser in action.choices.items():
            if key in MOVED and name == "cllm benchmark":  # which only say where they are now
                continue
            yield from find_commands(subparser, f"{name} {key}")


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'Jacobian'"):
        cllm_hf.Jacobian  # noqa: B018


def test_links_lead_to_files_and_headings():
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target, anchor in re.findall(r"\]\(([^)#:]*)(#[^)]+)?\)", document.read_text()):
            file = document.parent / target if target else document
            assert file.exists(), f"{document.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", file.read_text(), flags=re.MULTILINE)
                anchors = ["#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
                assert anchor in anchors, f"{document.name}: {target}{anchor}"


def test_version_is_in_the_changelog_and_in_the_citation():
    assert f"## [{cllm_hf.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == cllm_hf.__version__


def test_the_workflow_runs_what_ci_runs():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert [step["run"] for step in workflow["jobs"]["tests"]["steps"] if "run" in step] == ["bash .ci/run"]
    for template in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        assert yaml.safe_load(template.read_text())


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("mkdocs", reason="the site is built with the extra `docs`")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(list((ROOT / "docs").glob("*.md")))  # the changelog too
    for page in pages:
        text = page.read_text()
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"?([^\"\s>]+)", text)
        loaded += re.findall(r"<link[^>]*rel=\"?(?:stylesheet|preconnect|icon)[^>]*href=\"?([^\"\s>]+)", text)
        assert loaded and [address for address in loaded if re.match(r"\w+:|//", address)] == [], page


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """What `cllm demo --output-dir runs/demo` leaves, with a target model that has hardly been trained."""
    folder = tmp_path_factory.mktemp("docs")
    tiny = {"hidden_size": 32, "target_updates": 5, "target_batch_size": 4, "num_responses": 8, "cllm_updates": 3}
    tiny |= {"lossless_updates": 2, "lossless_batch_size": 4, "lossless_rank": 2}
    options = DemoOptions(**tiny, cllm_batch_size=4, num_held_out=2, max_new_tokens=20)
    run_demo(options, folder / "runs" / "demo", color=False)
    return folder


@pytest.fixture
def runs_here(demo, monkeypatch):
    monkeypatch.chdir(demo)
    # Such a model repeats itself.
    monkeypatch.setattr(cllm_hf.CleaningRules, "reason_to_drop", lambda *_: None)


@pytest.mark.slow
def test_the_tour_runs(runs_here, capsys):
    """From its first line to its last, with few prompts and few optimizer steps."""
    text = (ROOT / "docs" / "tour.md").read_text()
    smaller = {
        "make_problems(600": "make_problems(16",
        "make_problems(640": "make_problems(20",
        "[600:]": "[16:]",
        "max_steps=100": "max_steps=2",
        "--num-prompts 20": "--num-prompts 2",
    }
    for given, small in smaller.items():
        assert text.count(given) == 1
        text = text.replace(given, small)
    names = {}
    num_commands = 0
    for kind, block in re.findall(r"^```(python|bash)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        if kind == "python":
            exec(compile(block, "tour.md", "exec"), names)
            continue
        for line in block.replace("\\\n", " ").splitlines():
            command = shlex.split(line)
            if command[0] == "cllm" and command[1] != "demo":
                assert main(command[1:]) == 0, line
                num_commands += 1
    printed = capsys.readouterr().out
    assert num_commands == 4 and "tensor(True)" in printed and "speed-up over generate()" in printed
    assert names["cllm"].generation_config.decoding == "jacobi"
    assert Path("runs/tour/cllm/training.png").is_file()


@pytest.mark.slow
def test_guides_begin_with_an_example_that_runs(runs_here, capsys):
    for guide in ("decoding", "trajectories", "training", "serving"):
        block = re.search(r"```python\n(.*?)```", (ROOT / "docs" / f"{guide}.md").read_text(), flags=re.DOTALL)
        code = block[1].replace("Qwen/Qwen3-0.6B", "runs/demo/target")
        exec(compile(code, f"{guide}.md", "exec"), {})
    assert "Counter({'kept': 2})" in capsys.readouterr().out
    assert Path("runs/cllm/adapter_config.json").is_file()
    assert Path("runs/demo/cllm/custom_generate/generate.py").is_file()


@pytest.mark.slow
def test_the_page_of_the_lossless_mode_runs(runs_here):
    """Collect, then train, decode and load as the page says; the text is the base model's."""
    pages = [(ROOT / "docs" / f"{name}.md").read_text() for name in ("trajectories", "lossless")]
    collect, decode, train, load = [
        block.replace("Qwen/Qwen3-0.6B", "runs/demo/target").replace("lossless=True,", "lossless=True, max_steps=2,")
        for number, page in enumerate(pages)
        for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)[: (1, 3)[number]]
    ]
    names = {}
    for code in (collect, train, decode, load):
        exec(compile(code, "lossless.md", "exec"), names)
    options = {**names["inputs"], "max_new_tokens": 64}
    expected = names["model"].generate(**options, decoding="autoregressive")
    assert names["output"].sequences.tolist() == names["model"].generate(**options).tolist() == expected.tolist()
