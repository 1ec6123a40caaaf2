"""Pushing a trained CLLM and loading it back, with the real client of the Hub and a Hub in memory."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import make_word_model
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub
from test_hub import Client

from cllm_hf import CleaningRules, TrajectoryBuilder
from cllm_hf.demo.problems import make_problems
from cllm_hf.training.card import BEGIN


pytestmark = pytest.mark.slow
LORA = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear", "init_lora_weights": False}
PRELUDE = """
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
import cllm_hf

torch.set_num_threads(1)

def make_trainer(output_dir, model="user/base", lora=None, **options):
    quiet = dict(bf16=False, use_cpu=True, gradient_checkpointing=False, report_to=[], disable_tqdm=True)
    args = cllm_hf.CLLMConfig(output_dir=output_dir, **{**quiet, "max_steps": 2, "save_strategy": "no", **options})
    dataset = load_trajectories("user/trajectories")
    return cllm_hf.CLLMTrainer(model, args, dataset, peft_config=lora and LoraConfig(**lora))

def decode(model, **options):
    ids = torch.tensor([load_trajectories("user/trajectories")[0]["prompt_ids"]])
    return model.eval().generate(input_ids=ids, max_new_tokens=18, do_sample=False, **options)[0].tolist()
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def client(home, tokenizer):
    model = make_word_model(tokenizer)
    builder = TrajectoryBuilder(
        model,
        processing_class=tokenizer,
        block_size=5,
        max_new_tokens=18,
        cleaning=CleaningRules(max_token_run=None, max_sentence_repeats=None, drop_empty=False),
        show_progress=False,
    )
    builder.build([problem.prompt for problem in make_problems(8, seed=5)], output_dir=home / "made")
    model.save_pretrained(home / "base")
    tokenizer.save_pretrained(home / "base")
    (home / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    with LoopbackHub() as hub:
        client = Client(hub, home)
        client.push(home / "made", "user/trajectories")
        code = """
from huggingface_hub import HfApi
HfApi().create_repo("user/base")
HfApi().upload_folder(repo_id="user/base", folder_path=folder)
"""
        client.run(code, folder=home / "base")
        yield client
        client.process.stdin.close()
        client.process.wait()


def train(client, output_dir, then, **options):
    """Trains in the client's process; `then` is code that knows `trainer`, and gives `result`."""
    code = f"{PRELUDE}\ntrainer = make_trainer(output_dir, **options)\ntrainer.train()\n{then}"
    return client.run(code, output_dir=output_dir, options=options)


def files_of(client, name, revision="main"):
    return client.hub.repositories[f"models/user/{name}"].files(revision)


def card_of(client, name, revision="main"):
    return ModelCard(files_of(client, name, revision)["README.md"].decode())


def snippets(card):
    return re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)


def test_an_adapter_is_pushed_with_all_that_loading_takes(client, tmp_path):
    then = """
trainer.push_to_hub()
trained = trainer.model.eval()
result = [decode(trained, decoding="autoregressive")]
del trainer
loaded = cllm_hf.load_cllm("user/adapter")
result.append(decode(loaded))
result.append([loaded.generation_config.decoding, loaded.generation_config.jacobi_block_size])
result.append(decode(loaded.merge_and_unload()))
result.append(decode(AutoPeftModelForCausalLM.from_pretrained("user/adapter"), decoding="jacobi"))
result.append(AutoTokenizer.from_pretrained("user/adapter").decode([5]))
"""
    expected, decoded, defaults, merged, plain, word = train(client, tmp_path / "adapter", then, lora=LORA)
    assert decoded == merged == plain == expected and len(expected) > 10
    assert defaults == ["jacobi", 5] and word
    names = {"adapter_config.json", "adapter_model.safetensors", "generation_config.json", "tokenizer.json"}
    assert names | {"README.md"} <= files_of(client, "adapter").keys()
    card = card_of(client, "adapter")
    data = card.data.to_dict()
    assert (data["base_model"], data["base_model_relation"], data["library_name"]) == ("user/base", "adapter", "peft")
    assert data["license"] == "apache-2.0" and data["datasets"] == ["user/trajectories"]
    assert {"cllm", "jacobi-decoding", "lora"} <= set(data["tags"])
    assert str(tmp_path) not in str(card) and "datasets/user/trajectories)" in card.text
    (code,) = snippets(card)
    assert client.run(f"{code}\nresult = [type(model).__name__, float(output.jacobi_stats.tokens_per_forward)]")[1] > 0


def test_a_model_with_custom_generate_and_many_shards(client, tmp_path, home):
    then = """
import functools
trainer.model.save_pretrained = functools.partial(trainer.model.save_pretrained, max_shard_size="40KB")
trainer.measured = {"speed-up over generate()": 3.25}
trainer.save_model()
del trainer.model.save_pretrained
result = [decode(trainer.model, decoding="autoregressive")]
loaded = cllm_hf.load_cllm("user/whole")
result.append(decode(loaded))
result.append(loaded.generation_config.decoding)
"""
    options = {"export_custom_generate": True, "push_to_hub": True, "hub_private_repo": True}
    expected, decoded, decoding = train(client, tmp_path / "whole", then, **options)
    assert decoded == expected and decoding == "jacobi"
    assert client.hub.repositories["models/user/whole"].is_private
    files = files_of(client, "whole")
    assert len([name for name in files if re.fullmatch(r"model-.*\.safetensors", name)]) > 1
    assert {"custom_generate/generate.py", "custom_generate/requirements.txt"} <= files.keys()
    card = card_of(client, "whole")
    assert "custom_generate" in card.data.tags and card.data.base_model_relation == "finetune"
    assert "| speed-up over generate() | 3.25 |" in card.text
    with_package, without = snippets(card)
    client.run(with_package)
    program = (
        "import importlib.abc, json, sys, torch\n"
        "torch.set_num_threads(1)\n"
        "class Missing(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'cllm_hf':\n"
        "            raise ModuleNotFoundError(name)\n"
        f"sys.meta_path.insert(0, Missing())\n{without}"
    )
    environment = {**os.environ, **client.hub.environment(home / "stranger")}
    process = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert float(process.stdout.splitlines()[-1]) > 0


@pytest.mark.parametrize(
    ("strategy", "lora"), [("every_save", LORA), ("checkpoint", None), ("all_checkpoints", LORA), ("end", None)]
)
def test_pushes_of_checkpoints(client, tmp_path, strategy, lora):
    name = f"{strategy}-{'adapter' if lora else 'whole'}"
    then = """
if trainer.args.hub_strategy == "every_save":
    trainer.push_to_hub()  # while the last checkpoint may still be on its way
result = decode(trainer.model, decoding="autoregressive")
"""
    options = {"push_to_hub": True, "hub_strategy": strategy, "save_strategy": "steps", "save_steps": 1}
    options["hub_token"] = "hf_write"
    client.hub.seconds_before_uploads = 0.4  # the next checkpoint is there before the last one is pushed
    try:
        trained = train(client, tmp_path / name, then, lora=lora, hub_always_push=True, **options)
    finally:
        client.hub.seconds_before_uploads = 0.0
    files = files_of(client, name)
    messages = [one for one in client.hub.repositories[f"models/user/{name}"].messages if "checkpoint" not in one]
    pushed = [f"Training in progress, step {step}" for step in (1, 2)] if strategy != "end" else []
    assert messages == ["initial commit", *pushed, *(["End of training"] if strategy == "every_save" else [])]
    if strategy == "end":
        assert files.keys() == {".gitattributes"}
        return
    code = "loaded = cllm_hf.load_cllm(name)\nresult = [decode(loaded), loaded.generation_config.decoding]"
    assert client.run(f"{PRELUDE}\n{code}", name=f"user/{name}") == [trained, "jacobi"]
    card = card_of(client, name)
    assert (
        BEGIN in card.text and "Training took 2 optimizer steps" in card.text and card.data.base_model == "user/base"
    )
    folders = {path.split("/")[0] for path in files if "/" in path}
    expected = {"checkpoint": {"last-checkpoint"}, "all_checkpoints": {"checkpoint-1", "checkpoint-2"}}
    assert folders == expected.get(strategy, set())
    assert "training_args.bin" in files and not any(b"hf_write" in data for data in files.values())
    for folder in folders:
        assert json.loads(files[f"{folder}/generation_config.json"])["decoding"] == "jacobi"
        assert BEGIN in files[f"{folder}/README.md"].decode()


def test_cards_of_others_stay(client, tmp_path):
    client.run('from huggingface_hub import HfApi\nfor n in "abc": HfApi().create_repo(f"user/theirs-{n}")')
    cards = {
        "a": "---\nlicense: mit\n---\n# Mine\n\nHand-written.\n",
        "b": "---\nlicense: cc-by-4.0\nlanguage:\n- fr\n---\n",
        "c": "---\na: [\n---\n# Broken\n",
    }
    for name, card in cards.items():
        repository = client.hub.repositories[f"models/user/theirs-{name}"]
        repository.add("main", {**repository.files(), "README.md": card.encode()}, "card")
        then = "trainer.push_to_hub()\ntrainer.push_to_hub(tags='second')"
        train(client, tmp_path / name, then, hub_model_id=f"user/theirs-{name}", lora=LORA)
        files = files_of(client, f"theirs-{name}")
        assert "adapter_model.safetensors" in files
        if name != "b":
            assert files["README.md"].decode() == card
    # A card without text is one that nobody has written.
    card = card_of(client, "theirs-b")
    assert card.data.license == "cc-by-4.0" and card.data.language == ["fr"] and BEGIN in card.text
    assert "second" in card.data.tags


def test_what_somebody_adds_to_our_card_on_the_hub_stays(client, tmp_path):
    train(client, tmp_path / "added", "trainer.push_to_hub()")
    repository = client.hub.repositories["models/user/added"]
    text = repository.files()["README.md"].decode()
    changed = text.replace(BEGIN, f"Above.\n\n{BEGIN}").replace("license: apache-2.0", "license: mit") + "\nBelow.\n"
    repository.add("main", {**repository.files(), "README.md": changed.encode()}, "more")
    then = "trainer.measured = {'accuracy': 0.5}\ntrainer.push_to_hub(revision='main', token='hf_write')"
    train(client, tmp_path / "again", then, hub_model_id="user/added")
    card = card_of(client, "added")
    assert card.text.strip().startswith("Above.") and card.text.strip().endswith("Below.")
    assert card.data.license == "mit" and card.text.count(BEGIN) == 1 and "| accuracy | 0.5 |" in card.text


def test_a_dataset_that_was_streamed_is_named_too(client):
    code = """
from cllm_hf.trajectories.loading import hub_id_of
whole = load_trajectories("user/trajectories")
stream = load_trajectories("user/trajectories", streaming=True)
splits = load_trajectories("user/trajectories", split=None)
parts = [whole, whole.select(range(2)), whole.shuffle(seed=0), stream, stream.take(2), splits["train"]]
result = [hub_id_of(part) for part in parts] + [hub_id_of(load_dataset("user/trajectories")["train"])]
"""
    assert client.run(code) == ["user/trajectories"] * 6 + [None]
