"""Options are checked before anything is done; every step is done once, and goes on where it was stopped."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_model
from filelock import FileLock
from pipelines import SHAPE, TRAINING, Letters, letters_config, write_config
from tasks import cllm as cllm_steps
from tasks import parts
from tasks import sft as sft_step
from tasks import steps as pipeline_steps
from tasks.command import main
from tasks.data import read_json_rows
from tasks.models import make_tokenizer
from tasks.options import read_options
from tasks.parts import PARTS, STEPS, Records
from tasks.sections import apply_overrides
from tasks.sft import make_sft_dataset
from tasks.steps import Pipeline
from tasks.task import Problem, Task, fingerprint_problems
from transformers import AutoModelForCausalLM, AutoTokenizer

from cllm_hf import load_trajectories
from cllm_hf.journal import Journal


def read(tmp_path, overrides=(), **changes):
    return read_options(Letters, write_config(tmp_path / "config.yaml", **changes), overrides, str(tmp_path / "run"))


@pytest.fixture
def stand_in(monkeypatch):
    """In place of the measurement, which has tests of its own."""
    calls = []

    def evaluate(options, target, cllm, draft, problems, show_bar, say, keep_in):
        calls.append((target, cllm, draft, len(problems)))
        return {"rows": []}

    def write(folder, title, comparison, facts):
        (folder / "report.json").write_text(json.dumps({"comparison": comparison, **facts}))
        for name in ("report.md", "report.png"):
            (folder / name).write_text("")
        return "the table"

    monkeypatch.setattr(pipeline_steps, "evaluate_models", evaluate)
    monkeypatch.setattr(pipeline_steps, "write_report", write)
    return calls


def run(options, step="all", overwrite=None):
    said = []
    Pipeline(options, said.append, show_bars=False).run(step, overwrite)
    return said


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.max_step=3"], "no option `train.max_step`. Did you mean `train.max_steps`"),
        (["sft.learning_rat=3"], "Did you mean `sft.learning_rate`"),
        (["collect.num_prompt=3"], "Did you mean `collect.num_prompts`"),
        (["tran.max_steps=3"], "no option `tran`. Did you mean `train`"),
        (["task.cuont=3"], "Did you mean `task.count`"),
        (["model.hidden_sise=3"], "Did you mean `model.hidden_size`"),
        (["model.architecture=lama"], "Did you mean `.*llama"),
        (["train.max_steps=many"], "Section `train`: .*max_steps.*many"),
        (["train.bf16=7"], "`bf16` must be of type bool, got 7"),
        (["train.ar_loss_weight=-1"], "`ar_loss_weight` must be at least 0, got -1"),
        (["train.packing=true"], "has no place in consistency training"),
        (["collect.num_prompts=0"], "`collect.num_prompts` must be at least 1, got 0"),
        (["collect.not_greedy=maybe"], "must be 'drop' or 'keep', got 'maybe'"),
        (["collect.test_fraction=2"], "`test_fraction` must be at least 0 and below 1"),
        (["evaluate.more_prompts=-1"], "`evaluate.more_prompts` must be at least 0"),
        (["evaluate.more_block_sizes=[8, all]"], "`evaluate.more_block_sizes` must be an integer.*got 'all'"),
        (["evaluate.more_block_sizes=8"], "`more_block_sizes` must be of type list, got 8"),
        (["evaluate.candidates=[2, -1]"], "`jacobi_candidates` must be an integer of at least 0, got -1"),
        (["evaluate.candidates=2"], "`candidates` must be of type list, got 2"),
        (["collect.responses_only=true"], "`train` reads states.*`collect.responses_only=True` collects none"),
        (["train.trajectory_source=online", "collect.augment=true"], "`augment=True` is about states"),
        (["sft.output_dir=x"], "`sft.output_dir` cannot be set, got 'x'.*top-level"),
        (["train.push_to_hub=true"], "`train.push_to_hub` cannot be set"),
        (["block_size=0"], "`block_size` must be"),
        (["sft=null"], "A model from scratch must be trained"),
        (["model.name=a"], "either a `name` or an `architecture`, got both"),
        (["model=null"], "must be a section `model`"),
        (["model.lora={r: 2}"], "An adapter goes on a trained model"),
        (["model={name: a, lora: {rank: 2}}"], "no option `model.lora.rank`"),
        (["model={name: a, vocab_size: 300}"], "`model.vocab_size` cannot be set, got 300.*that it comes with"),
        (["draft={architecture: llama, vocab_size: 300}"], "`draft.vocab_size` cannot be set.*of the target model"),
        (["draft={architecture: llama, split_spaces: true}"], "`draft.split_spaces` cannot be set, got True.*of the"),
        (["draft={name: a, lora: {r: 2}}"], "`draft.lora` is for a draft model that is trained"),
        (["train.block_size=8"], "`train.block_size` cannot be set, got 8.*top level"),
        (["sft=3"], "Section `sft` must hold options by name, got 3"),
        (["sft=false"], "Section `sft` must hold options by name, got False"),
        (["collect.max_new_tokens=0"], "`collect.max_new_tokens` must be at least 1, got 0"),
        (["evaluate.max_new_tokens=-5"], "`evaluate.max_new_tokens` must be at least 1, got -5"),
        (["collect.device=gpu"], "`collect.device` must be a device of this machine, got 'gpu'"),
        (["evaluate.device=cuda:77"], "`evaluate.device` must be a device of this machine, got 'cuda:77'"),
        (["max_steps"], "`--set` takes SECTION.OPTION=VALUE, got 'max_steps'"),
        (["block_size.x=1"], "`block_size` is no section"),
        (["sft.max_steps=[1"], "takes values as in YAML"),
    ],
)
def test_a_wrong_option_is_named(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, overrides)


def test_a_config_that_cannot_be_read(tmp_path):
    with pytest.raises(OSError, match="`--config` must be a file that can be read"):
        read_options(Letters, tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="options by name"):
        read_options(Letters, tmp_path / "list.yaml")
    for text in ("a: [", "a: " + "[" * 400):
        (tmp_path / "broken.yaml").write_text(text)
        with pytest.raises(ValueError, match="must be a YAML file"):
            read_options(Letters, tmp_path / "broken.yaml")


def test_values_have_the_types_of_their_fields(tmp_path):
    """In YAML `1e-3` is a text."""
    changes = ["train.learning_rate=1e-3", "train.max_steps=7", "train.save_strategy=no", "task.count=3", "seed=5"]
    options = read(tmp_path, [*changes, "train.block_size_schedule=[2, 4]", "collect.max_token_run=null"])
    config = options.cllm_config(tmp_path / "here")
    assert config.learning_rate == 1e-3 and type(config.learning_rate) is float and config.max_steps == 7
    assert config.save_strategy == "no" and config.block_size_schedule == [2, 4] and config.seed == 5
    assert Path(config.output_dir) == tmp_path / "here" and not config.report_to
    assert options.task.count == 3 and options.task.seed == options.seed == 5
    assert options.collection()["cleaning"].max_token_run is None and options.collection()["block_size"] == 4


def test_sharding_is_an_option_without_a_value(tmp_path):
    """The host says that it is a text; on a CPU it is ignored."""
    assert read(tmp_path, ["train.fsdp=true"]).cllm_config(tmp_path).fsdp is True


def test_bfloat16_on_a_cpu_if_asked_for(tmp_path):
    options = read(tmp_path, ["sft.bf16=true", "train.bf16=true"])
    assert options.sft_config(tmp_path).bf16 and options.cllm_config(tmp_path).bf16
    for section in ("sft", "train"):
        values = {**TRAINING, "max_steps": 2}
        del values["bf16"]
        options = read(tmp_path, **{section: values})
        config = options.sft_config(tmp_path) if section == "sft" else options.cllm_config(tmp_path)
        assert not config.bf16


def test_options_of_the_task_and_the_folder_win(tmp_path):
    path = write_config(tmp_path / "config.yaml", task={"count": 9, "ending": "!"}, output_dir="there")
    options = read_options(Letters, path, ["task.count=8"], None, {"count": "7"})
    assert (options.task.count, options.task.ending, options.output_dir) == (7, "!", Path("there"))
    path = write_config(tmp_path / "config.yaml")
    assert read_options(Letters, path).output_dir == Path("runs/letters")


def test_overrides_make_sections():
    values = {"a": {"b": 1}, "c": None}
    apply_overrides(values, ["a.b=2", "a.d=x=y", "c.e.f=[1, 2]", "g=null"])
    assert values == {"a": {"b": 2, "d": "x=y"}, "c": {"e": {"f": [1, 2]}}, "g": None}


def test_only_what_changes_the_outcome_is_depended_on(tmp_path):
    plain = read(tmp_path).dependencies
    assert plain == read(tmp_path, ["train.logging_steps=3", "sft.save_steps=2", "collect.device=auto"]).dependencies
    assert plain == read(tmp_path, ["task.data=/elsewhere", "train.states_per_block=1"]).dependencies  # a default
    assert plain["train"]["max_steps"] == 4 and plain["sft"]["learning_rate"] == 1e-3
    assert read(tmp_path, ["task.count=5"]).dependencies["task"] == {"count": 5}


@pytest.mark.parametrize("split_spaces", [False, True])
def test_a_tokenizer_keeps_every_text_and_every_digit(tmp_path, split_spaces):
    texts = ["She has 48 of 100 pens.\n", "  SELECT a , b", "héllo\t漢字 <<2+2=4>>"] * 3
    make_tokenizer(texts, 300, split_spaces).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) <= 300 and tokenizer.pad_token_id == 0
    for text in (*texts, "never seen: ß 1234"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert not {tokenizer.eos_token_id, tokenizer.bos_token_id} & set(ids)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("in 1984")["input_ids"])
    assert tokens[-4:] == ["1", "9", "8", "4"]
    with pytest.raises(ValueError, match="at least 259"):
        make_tokenizer(texts, 258)


def test_with_split_spaces_a_word_has_the_same_tokens_wherever_it_stands():
    texts = ["singer:singer_id,name which name? select name from singer where t1.name = 1"] * 5

    def places_of_name(tokenizer):
        wanted = tokenizer("name")["input_ids"]
        ids = tokenizer(texts[0])["input_ids"]
        return sum(ids[place : place + len(wanted)] == wanted for place in range(len(ids)))

    assert places_of_name(make_tokenizer(texts, 330, split_spaces=True)) == 4
    assert places_of_name(make_tokenizer(texts, 330)) < 4


def test_long_problems_are_left_out_whole(byte_tokenizer):
    problems = [Problem("ab", "c" * length) for length in range(1, 6)]
    dataset = make_sft_dataset(problems, byte_tokenizer, 6)  # two of the prompt, one stop token
    assert [byte_tokenizer.decode(ids) for ids in dataset["input_ids"]] == ["abc<eos>", "abcc<eos>", "abccc<eos>"]
    assert dataset["completion_mask"][0] == [0, 0, 1, 1]
    assert len(make_sft_dataset(problems, byte_tokenizer, None)) == 5
    with pytest.raises(ValueError, match="at most 3 tokens, the shortest has 4"):
        make_sft_dataset(problems, byte_tokenizer, 3)


def test_prompt_and_response_are_tokens_as_in_decoding():
    """The model is asked with the tokens of the prompt alone, so it has to learn from those."""
    tokenizer = make_tokenizer(["ab ab ab"] * 9, 270)
    prompt = tokenizer("a")["input_ids"]
    assert tokenizer("ab")["input_ids"][:1] != prompt
    (row,) = make_sft_dataset([Problem("a", "b")], tokenizer, None)
    assert row["input_ids"] == [*prompt, *tokenizer("b")["input_ids"], tokenizer.eos_token_id]
    assert row["completion_mask"] == [0, 1, 1]


@pytest.mark.parametrize(("single", "start"), [("<eos> $A", [1]), ("$A <eos>", []), ("<eos> $A <eos>", [1])])
def test_the_stop_token_stands_once_wherever_the_tokenizer_puts_it(byte_tokenizer, single, start):
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=[("<eos>", 1)])
    problems = [Problem("", "b"), Problem("a", "b"), Problem("a", "b<eos>"), Problem("a<eos>", "b")]
    a, b = (byte_tokenizer(text)["input_ids"][0] for text in "ab")
    rows = make_sft_dataset(problems, tokenizer, None)
    expected = [[*start, b, 1], [*start, a, b, 1], [*start, a, b, 1], [*start, a, 1, b, 1]]
    assert list(rows["input_ids"]) == expected
    prompts = [[], *([*start, a],) * 2, [*start, a, 1]]
    masks = [[0] * len(prompt) + [1] * (len(row) - len(prompt)) for prompt, row in zip(prompts, expected)]
    assert list(rows["completion_mask"]) == masks


def test_chats_that_the_template_does_not_take_are_refused_by_number(byte_tokenizer):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
    good = Problem([{"role": "user", "content": "Hi"}], "Hello!")
    assert len(make_sft_dataset([good], tokenizer, None)) == 1
    for message in ({"from": "human", "value": "Hi"}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}):
        with pytest.raises(ValueError, match="problem 1.*Write each message as"):
            make_sft_dataset([good, Problem([message], "Hello!")], tokenizer, None)


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (Problem("a \ud83d", "b"), "lone surrogate .* of problem 1 of the train split"),
        (Problem("a", "b \ud83d"), "lone surrogate .* of the response to problem 1 of the train split"),
        (Problem([{"role": "user", "value": "Hi"}], "b"), "message 0 of problem 1 of the train split"),
        (
            Problem([{"role": "assistant", "content": "Hi"}], "b"),
            "got problem 1 of the train split, which ends with a",
        ),
    ],
)
def test_problems_that_cannot_be_used_are_said_by_number_before_any_work(tmp_path, monkeypatch, problem, message):
    monkeypatch.setattr(Letters, "load", lambda self, split: [Problem("a", "b"), problem])
    pipeline = Pipeline(read(tmp_path), lambda line: None)
    with pytest.raises(ValueError, match=message):
        _ = pipeline.train_problems


def test_fingerprints_tell_problems_apart():
    problems = Letters().load("train")
    assert fingerprint_problems(problems) == fingerprint_problems(Letters().load("train"))
    last = problems[-1]
    changed = [*problems[:-1], replace(last, response="other")]
    judged = [*problems[:-1], replace(last, reference={"answer": {("a", 1): object()}})]
    assert len({fingerprint_problems(one) for one in (problems, changed, judged, problems[:-1])}) == 4
    assert fingerprint_problems([replace(last, reference=object())]) == fingerprint_problems(
        [replace(last, reference=object())]
    )


@pytest.mark.slow
def test_every_step_is_done_once(tmp_path, stand_in):
    options = read(tmp_path, draft={**SHAPE, "sft": {"max_steps": 2}})
    with pytest.raises(ValueError, match="step `train` needs 'target'.*Run the step `sft` first"):
        run(options, "train")
    for step in STEPS:
        assert any(f"] {step}:" in line for line in run(options, step))
    folder = tmp_path / "run"
    names = {"target", "draft", "trajectories", "cllm", "report.json", "report.md", "report.png", "steps"}
    assert {path.name for path in folder.iterdir()} - {".lock"} == names
    assert stand_in == [(str(folder / "target"), str(folder / "cllm"), str(folder / "draft"), 6)]

    def changes():
        return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}

    before = changes()
    said = run(options)
    assert all("is complete" in line for line in said) and len(said) == len(PARTS)
    assert before == changes() and len(stand_in) == 1
    cllm = AutoModelForCausalLM.from_pretrained(folder / "cllm")
    assert cllm.generation_config.decoding == "jacobi" and cllm.generation_config.jacobi_block_size == 4
    assert cllm.config.use_cache and AutoModelForCausalLM.from_pretrained(folder / "target").config.use_cache
    assert set(json.loads((folder / "report.json").read_text())["seconds"]) == {"sft", "collect", "train"}

    # Changed options: each error names what there was, what there is, and the step to do again.
    for change, step, verb in (
        (["sft.max_steps=5"], "sft", "'target'"),
        (["collect.num_prompts=5"], "collect", "'trajectories'"),
        (["train.learning_rate=0.5"], "train", "'cllm'"),
        (["evaluate.num_prompts=1"], "evaluate", "'report'"),
        (["task.ending=end"], "sft", "'target'"),
        (["seed=1"], "sft", "'target'"),
    ):
        changed = read(tmp_path, change, draft={**SHAPE, "sft": {"max_steps": 2}})
        with pytest.raises(ValueError, match=rf"{verb} in .* was made with .*--overwrite {step}`.*--output-dir"):
            run(changed)
    changed = read(tmp_path, ["train.learning_rate=0.5"], draft={**SHAPE, "sft": {"max_steps": 2}})
    said = run(changed, overwrite="train")
    assert said[0] == "Removed: cllm, report." and sum("is complete" in line for line in said) == 3
    assert len(stand_in) == 2


def test_states_are_collected_where_training_reads_them(tmp_path, stand_in):
    online = {**TRAINING, "plot_run": False, "trajectory_source": "online"}
    assert not read(tmp_path).responses_only and read(tmp_path, train={**TRAINING, "lossless": True}).responses_only
    assert not read(tmp_path, ["collect.responses_only=false"], train=online).responses_only
    options = read(tmp_path, train=online)
    for step in ("sft", "collect", "train"):
        said = run(options, step)
    assert any("] train: the CLLM" in line for line in said)
    dataset = load_trajectories(tmp_path / "run" / "trajectories")
    assert len(dataset) == 6 and "states" not in dataset.column_names
    cllm = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "cllm")
    assert cllm.generation_config.jacobi_block_size == 4
    larger = read(tmp_path, ["block_size=5"], train=online)  # which responses do not depend on
    assert any("trajectories is complete" in line for line in run(larger, "collect"))
    with pytest.raises(ValueError, match="`block_size` is 5, but 'cllm' in .* was made with 4.*--overwrite train"):
        run(larger, "train")
    with pytest.raises(ValueError, match="'trajectories' in .* was made with .*--overwrite collect"):
        run(read(tmp_path), "collect")


@pytest.mark.slow
@pytest.mark.parametrize("step", ["sft", "train"])
def test_an_interrupted_training_goes_on_from_its_checkpoint(tmp_path, stand_in, monkeypatch, step):
    undisturbed, name = tmp_path / "undisturbed", {"sft": "target", "train": "cllm"}[step]
    run(read_options(Letters, write_config(tmp_path / "config.yaml"), (), str(undisturbed)))
    options = read(tmp_path)
    module, kind = {"sft": (sft_step, "SFTTrainer"), "train": (cllm_steps, "CLLMTrainer")}[step]
    trainer, started_at = getattr(module, kind), []

    class Stopped(trainer):
        def training_step(self, *args, **kwargs):
            started_at.append(self.state.global_step)
            if self.state.global_step == 2 and len(started_at) <= 3:
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    monkeypatch.setattr(module, kind, Stopped)
    with pytest.raises(KeyboardInterrupt):
        run(options)
    folder = tmp_path / "run"
    assert (folder / f"{name}-checkpoints" / "checkpoint-2").is_dir() and not (folder / name).exists()
    with pytest.raises(ValueError, match=rf"'{name}' in .* was begun with .*--overwrite {step}"):
        run(read(tmp_path, [f"{step}.max_steps=6"]))
    run(options)
    assert started_at == [0, 1, 2, 2, 3]
    assert not list(folder.glob("*-checkpoints")) and {path.name for path in folder.glob(".*")} <= {".lock"}
    assert same(weights(folder / name), weights(undisturbed / name))


@pytest.mark.slow
def test_a_lossless_adapter_from_data_to_report(tmp_path, capsys, monkeypatch):
    """The whole pipeline, its evaluation interrupted once: the text, and its accuracy, are the target model's."""
    train = {**TRAINING, "plot_run": False, "lossless": True, "markov_rank": 2}
    evaluate = {"num_prompts": 2, "device": "cpu", "more_block_sizes": ["auto"], "candidates": [1]}
    config = write_config(tmp_path / "config.yaml", train=train, evaluate=evaluate)
    folder, once = tmp_path / "run", Journal.once

    def stop(self, name, key, compute):
        if name == "memory-00001":
            raise KeyboardInterrupt
        return once(self, name, key, compute)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "once", stop)
        assert main(Letters, config, ["all", "--output-dir", str(folder)]) == 130
    assert "[3/4] train: a lossless adapter for the target model" in capsys.readouterr().out
    kept = {path.stem for path in (folder / "report-checkpoints").rglob("*.json")}
    assert kept == {"turn-00000", "turn-00001", "responses-target-00000", "memory-00000"}
    changed = [*("--set", "evaluate.candidates=[2]"), "--output-dir", str(folder)]
    assert main(Letters, config, ["evaluate", *changed]) == 1
    assert "was begun with [1]. Begin anew with `--overwrite evaluate`" in capsys.readouterr().err
    assert main(Letters, config, ["all", "--output-dir", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "2 of 2 prompts are of an earlier run" in printed and not list(folder.glob("*-checkpoints"))
    comparison = json.loads((folder / "report.json").read_text())["comparison"]
    rows = [row for row in comparison["rows"] if row["model"] == "cllm"]
    ways = ["lossless 4", "lossless 4, 1 candidate", "lossless auto", "lossless auto, 1 candidate"]
    assert [row["name"] for row in rows] == [f"lossless adapter, {way}" for way in ways]
    assert all((row["num_equal"], row["num_differing"]) == (2, 0) for row in rows)
    assert all(row["accuracy"] == comparison["rows"][0]["accuracy"] for row in rows)
    assert all(f"{row['name']}: tokens/s " in printed for row in comparison["rows"])
    assert "CLLM" not in (folder / "report.md").read_text()
    card = (folder / "cllm" / "README.md").read_text()
    assert "# cllm\n" in card and "A **lossless** adapter" in card


@pytest.mark.slow
def test_a_named_model_with_adapters(tmp_path, stand_in):
    """Those of `sft` are merged; the CLLM is an adapter. And no step `sft` for a model that is good as it is."""
    run(read(tmp_path), "sft")
    start = tmp_path / "run" / "target"
    lora = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
    section = {"name": str(start), "lora": lora}
    config = write_config(tmp_path / "lora.yaml", model=section)
    run(read_options(Letters, config, (), str(tmp_path / "lora")))
    merged, before = weights(tmp_path / "lora" / "target"), weights(start)
    changed = {name for name in merged if not torch.equal(merged[name], before[name])}
    assert merged.keys() == before.keys() and changed and all("q_proj" in n or "v_proj" in n for n in changed)
    assert (tmp_path / "lora" / "cllm" / "adapter_config.json").is_file()
    config = write_config(tmp_path / "ready.yaml", model={"name": str(start)}, sft=None)
    said = run(read_options(Letters, config, (), str(tmp_path / "ready")))
    assert "left out" in said[0] and not (tmp_path / "ready" / "target").exists()
    assert stand_in[-1][0] == str(start)


def test_two_runs_in_one_folder_do_not_meet(tmp_path, stand_in):
    """What the second one would overwrite stays, and a lock that a killed run has left is none."""
    options = read(tmp_path)
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock", timeout=0):
        with pytest.raises(OSError, match="One run at a time.*another one is at work in .*run'.*--output-dir"):
            run(options, overwrite="sft")
        assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock"}
    (tmp_path / "run" / ".lock").touch()
    with pytest.raises(ValueError, match="needs 'target'"):
        run(options, "evaluate")


def test_what_is_in_the_way_is_left_alone(tmp_path, stand_in):
    (tmp_path / "run" / "target").mkdir(parents=True)
    (tmp_path / "run" / "target" / "mine.txt").write_text("keep me")
    with pytest.raises(ValueError, match="is in the way of the step `sft`"):
        run(read(tmp_path))
    run_with = Pipeline(read(tmp_path), lambda line: None)
    assert run_with.records.discard("sft") == []
    assert (tmp_path / "run" / "target" / "mine.txt").read_text() == "keep me"


def test_what_has_left_nothing_binds_nobody(tmp_path):
    """A step that fails at once may be begun with other options, and no tokenizer of the failed one stays."""
    records, part = Records(tmp_path), PARTS["target"]
    assert not records.is_complete(part, {"a": 1})
    records.begin(part, {"a": 1})
    (tmp_path / "target-checkpoints" / "tokenizer").mkdir(parents=True)
    records.end(part, {"a": 1}, 2.0, is_complete=False)
    assert not records.is_complete(part, {"a": 2})
    records.begin(part, {"a": 2})
    assert not (tmp_path / "target-checkpoints").exists() and records.seconds(part) == 0
    (tmp_path / "target-checkpoints" / "checkpoint-1").mkdir(parents=True)
    records.end(part, {"a": 2}, 2.0, is_complete=False)
    records.begin(part, {"a": 2})  # goes on
    records.end(part, {"a": 2}, 3.0, is_complete=False)
    assert records.seconds(part) == 5 and not records.is_complete(part, {"a": 2})
    for options, shown in (({"a": 1}, "`a` is 1,.* was begun with 2"), ({}, "`a` is the default,.* with 2")):
        with pytest.raises(ValueError, match=shown):
            records.is_complete(part, options)
    (tmp_path / "target").mkdir()
    records.end(part, {"a": 2}, 0.0, is_complete=True)
    assert records.is_complete(part, {"a": 2})
    with pytest.raises(ValueError, match="`b` is 3, but 'target' in .* was made with the default"):
        records.is_complete(part, {"a": 2, "b": 3})
    assert records.discard("collect") == [] and records.discard("sft") == ["target"]
    assert [path.name for path in tmp_path.iterdir()] == ["steps"]


def test_half_a_folder_is_not_taken_for_a_part(tmp_path, monkeypatch):
    """Whatever happens while a complete part is removed."""
    records, part = Records(tmp_path), PARTS["cllm"]
    (tmp_path / "cllm").mkdir()
    records.begin(part, {})
    records.end(part, {}, 1.0, is_complete=True)
    assert records.is_complete(part, {})

    def stop(path, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(parts.shutil, "rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            records.discard("train")
    assert not records.is_complete(part, {})
    (tmp_path / "cllm").mkdir()
    assert records.discard("train") == ["cllm"] and [path.name for path in tmp_path.iterdir()] == ["steps"]


def test_names_of_models_that_are_not_there(tmp_path):
    for section in ("model", "draft"):
        with pytest.raises(FileNotFoundError, match=f"`{section}.name` must be a folder.*got './none'"):
            read(tmp_path, [f"{section}={{name: ./none}}"])


def test_a_draft_model_of_another_vocabulary_is_said_before_anything_is_done(tmp_path, tokenizer):
    for name, size in (("target", len(tokenizer)), ("draft", 50)):
        make_model("llama", vocab_size=size).save_pretrained(tmp_path / name)
    options = read(tmp_path, [f"model={{name: {tmp_path / 'target'}}}", f"draft={{name: {tmp_path / 'draft'}}}"])
    with pytest.raises(ValueError, match="`draft.name` must be a model with the .* tokens of the target model, got"):
        run(options)
    assert not list((tmp_path / "run").glob("*"))


def test_other_weights_in_the_folder_of_a_model_are_noticed(tmp_path, stand_in):
    """Answers of one model are not for the training of another."""
    make_model("llama", vocab_size=50).save_pretrained(tmp_path / "model")
    overrides = [f"model={{name: {tmp_path / 'model'}}}", "sft=null"]
    options = read(tmp_path, overrides)
    records, part = Records(tmp_path / "run"), PARTS["trajectories"]
    depends = Pipeline(options, print)._options_of(part)
    records.begin(part, depends)
    (tmp_path / "run" / "trajectories").mkdir()
    assert Pipeline(read(tmp_path, overrides), print)._options_of(part) == depends
    make_model("llama", vocab_size=50, seed=1).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="`model.weights` is .* but 'trajectories' in .* was begun with"):
        run(read(tmp_path, overrides), "collect")


@pytest.mark.parametrize(
    ("step", "overwrite", "changes", "message"),
    [
        ("evaluate", "sft", [], "needs what `--overwrite sft` removes"),
        ("all", "train", ["sft.max_steps=9"], "`sft.max_steps` is 9, but 'target' .* was made with 4"),
        ("all", "sft", ["task.count=0"], "must have problems in its train split"),
    ],
)
def test_nothing_is_removed_where_the_run_cannot_begin(tmp_path, stand_in, step, overwrite, changes, message):
    options, records = read(tmp_path), Records(tmp_path / "run")
    for part in PARTS.values():
        if part.name == "draft":
            continue
        for path in part.paths:
            (tmp_path / "run" / path).mkdir(parents=True)
        records.end(part, Pipeline(options, print)._options_of(part), 1.0, is_complete=True)
    there = sorted(path.name for path in (tmp_path / "run").rglob("*"))
    with pytest.raises(ValueError, match=message):
        run(read(tmp_path, changes), step, overwrite)
    assert sorted(path.name for path in (tmp_path / "run").rglob("*") if path.name != ".lock") == there


def test_another_metric_makes_another_report(tmp_path, monkeypatch):
    options = read(tmp_path)
    named = []
    for metric in (None, "execution", "clauses"):
        monkeypatch.setattr(Letters, "judged_by", metric)
        named.append(Pipeline(options, print)._options_of(PARTS["report"]))
    assert "task.judged_by" not in named[0] and named[1] != named[2]
    assert "task.judged_by" not in Pipeline(options, print)._options_of(PARTS["cllm"])


def test_options_of_judged_answers_are_refused_where_nothing_judges(tmp_path, monkeypatch):
    monkeypatch.setattr(Letters, "judge", Task.judge)
    for name in ("more_prompts", "batch_size"):
        with pytest.raises(ValueError, match=f"`evaluate.{name}` is for answers that are judged.*has no metric"):
            read(tmp_path, [f"evaluate.{name}=3"])


@pytest.mark.parametrize("error", [ImportError("needs a package"), ValueError("no such database")])
def test_a_metric_that_cannot_work_is_said_before_anything_is_done(tmp_path, monkeypatch, capsys, error):
    def judge(self, responses, problems):
        raise error

    monkeypatch.setattr(Letters, "judge", judge)
    Records(tmp_path / "run").begin(PARTS["cllm"], {})
    arguments = ["all", "--output-dir", str(tmp_path / "run"), "--overwrite", "train"]
    assert main(Letters, write_config(tmp_path / "config.yaml"), arguments) == 1
    printed = capsys.readouterr()
    assert printed.err == f"letters: {error}\n" and not printed.out
    assert [path.name for path in (tmp_path / "run").rglob("*")] == ["steps", "cllm.json"]  # nothing is removed


def test_a_damaged_record_is_said(tmp_path):
    Records(tmp_path).begin(PARTS["cllm"], {})
    (tmp_path / "steps" / "cllm.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged. Remove it"):
        Records(tmp_path).is_complete(PARTS["cllm"], {})


def test_command_line(tmp_path, monkeypatch, capsys):
    config = write_config(tmp_path / "config.yaml")
    arguments = ["sft", "--output-dir", str(tmp_path / "run"), "--set", "train.max_stepz=3"]
    assert main(Letters, config, arguments) == 1
    assert "letters: There is no option `train.max_stepz`" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(Letters, config, ["--help"])
    assert "--count" in capsys.readouterr().out
    seen = []

    def stop(self, step, overwrite):
        seen.append((step, overwrite, self.options.task.count, self.options.train["max_steps"]))
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "run", stop)
    arguments = ["all", "--output-dir", str(tmp_path / "run"), "--count", "7", "--set", "train.max_steps=9"]
    assert main(Letters, "none.yaml", [*arguments, "--config", str(config), "--overwrite", "train"]) == 130
    assert seen == [("all", "train", 7, 9)]
    assert "without `--overwrite` goes on" in capsys.readouterr().err


def test_the_config_of_the_tests_is_one():
    assert yaml.safe_load(yaml.safe_dump(letters_config())) == letters_config()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.jsonl",
            '{"q": ""}\n\n{"r": "x"}\n',
            "Line 3 of .*a.jsonl' must be an object with `q` as text, got {'r': ",
        ),
        ("a.jsonl", '{"q": "a"}\n{"q": 1}', "Line 2 of .* must be an object with `q` as text, got {'q': 1}"),
        ("a.jsonl", '{"q": "a"}\n{"q": null}', "Line 2 of .* must be an object with `q` as text, got {'q': None}"),
        ("a.jsonl", '{"q": 1}\n{"q"', "Line 2 of .*a.jsonl' must be a JSON object: Expecting"),
        ("a.json", '[{"q": "a"}, 3]', "Object 2 of .* must be an object with `q` as text, got 3"),
        ("a.json", '{"q": 1}', "must hold a JSON list of objects"),
        ("a.json", "[", "must be a JSON file: Expecting"),
        ("a.json", b"\xff", "must be a text in UTF-8"),
        ("a.json", "[]".encode("utf-16"), "must be a text in UTF-8: it is in UTF-16"),
        ("a.jsonl", b"\x1f\x8b\x08", "must be a text in UTF-8: it is compressed by gzip"),
        ("a.json", "[" * 100_000, "must be a JSON file: it is nested too deeply"),
        ("a.jsonl", '{"q": ' + "[" * 100_000, "Line 1 of .* must be a JSON object: it is nested too deeply"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_data_of_another_format_are_named(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        read_json_rows(tmp_path / name, ("q",))


def test_data_keep_line_ends_of_all_kinds(tmp_path):
    rows = [{"q": "a\u2028b\x85c\r\nd"}, {"q": "e"}]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    for mark in ("", "\ufeff"):
        (tmp_path / "a.jsonl").write_text(mark + text)
        assert read_json_rows(tmp_path / "a.jsonl", ("q",)) == rows
        (tmp_path / "a.json").write_text(mark + json.dumps(rows))
        assert read_json_rows(tmp_path / "a.json", ("q",)) == rows
    with pytest.raises(OSError, match="must be in .*none.jsonl', which cannot be read.*`--data`"):
        read_json_rows(tmp_path / "none.jsonl")
