"""What a finished CLLM leaves: its card, what others wrote that stays, adapters of every kind, and what loads them."""

import copy
import json
import re
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model, make_word_model
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, LoraConfig
from test_training import make_trainer
from transformers import AutoModelForCausalLM

from cllm_hf import CleaningRules, CLLMConfig, TrajectoryBuilder, load_cllm
from cllm_hf.cards import END, LICENSES, license_metadata
from cllm_hf.demo.problems import make_problems
from cllm_hf.training.card import BEGIN, ModelFacts, join_cards, make_model_card, renew_model_card
from cllm_hf.training.saving import consistency_options


FACTS = ModelFacts(
    block_size=16,
    repo_id="user/cllm",
    base_model="user/base",
    dataset_name="user/trajectories",
    num_responses=1234,
    options={"ar_loss_weight": 2.0, "divergence": "forward_kl", "unset": None, "block_sizes": [8, 16]},
    arguments={"learning_rate": 1e-5, "seed": 7},
    num_updates=200,
    num_epochs=1.5,
    log_history=[
        {"loss": 3.0, "consistency_loss": 2.0, "ar_loss": 1.0, "step": 10},
        {"eval_tokens_per_forward": 1.25, "eval_test_agreement": 0.5, "eval_loss": 1.0, "step": 10},
        {"consistency_loss": float("nan"), "step": 15},
        {"loss": 1.5, "consistency_loss": 0.5, "ar_loss": 1.0, "step": 20},
        {"eval_tokens_per_forward": 2.5, "step": 20},
    ],
    license={"license": "mit"},
    tags=("cllm",),
    versions={"cllm_hf": "0.1.0", "torch": "2.13"},
)
LOCAL = {"repo_id": None, "dataset_name": None}
LOSSLESS = {
    "num_masks": 8,
    "markov_rank": 64,
    "adapter": "LORA adapter, rank 16",
    "tags": ("trl", "lossless", "lora"),
    "options": {"lossless": True, "position_decay": 6.0},
    "log_history": [
        {"loss": 3.0, "drafting_loss": 3.0, "draft_accuracy": 0.125, "step": 1},
        {"eval_drafting_loss": 2.5, "eval_tokens_per_forward": 1.5, "eval_agreement": 1.0, "step": 10},
        {"loss": 2.0, "drafting_loss": 2.0, "draft_accuracy": 0.5, "step": 20},
        {"eval_drafting_loss": 1.5, "eval_tokens_per_forward": 2.25, "eval_repetition": 0.1, "step": 20},
    ],
}
# What is true of a CLLM alone.
OF_CLLMS = (
    r"CLLM\)|CLLM:|[Cc]onsistency|AR loss|ar_loss|fixed point|merge|quality|trajector|agreement|repetition|Jacobi"
)


def changed(**changes):
    return ModelFacts(**{**vars(FACTS), **changes})


def code_of(text):
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture(scope="module")
def places(tmp_path_factory, tokenizer):
    """Folders of a model with its own head, of one whose embeddings are its head, and trajectories of the first."""
    path = tmp_path_factory.mktemp("models")
    for name, tied in (("base", False), ("tied", True)):
        stops = [tokenizer.eos_token_id, *range(40, 50)]
        model = make_model("llama", vocab_size=len(tokenizer), eos_token_id=stops, tie_word_embeddings=tied)
        model.save_pretrained(path / name)
        tokenizer.save_pretrained(path / name)
    (path / "base" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Base\n")
    builder = TrajectoryBuilder(
        make_word_model(tokenizer),
        processing_class=tokenizer,
        block_size=5,
        max_new_tokens=18,
        cleaning=CleaningRules(max_token_run=None, max_sentence_repeats=None, drop_empty=False),
        show_progress=False,
    )
    dataset = builder.build([problem.prompt for problem in make_problems(8, seed=5)])
    return SimpleNamespace(base=path / "base", tied=path / "tied", dataset=dataset)


def lora(**options):
    return LoraConfig(task_type="CAUSAL_LM", r=2, **{"target_modules": ["q_proj"], **options})


def test_metadata():
    assert ModelCard(make_model_card(FACTS)).data.to_dict() == {
        "base_model": "user/base",
        "base_model_relation": "finetune",
        "datasets": ["user/trajectories"],
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["cllm"],
    }
    data = ModelCard(make_model_card(changed(adapter="LORA adapter", has_custom_generate=True))).data
    assert (data.base_model_relation, data.library_name, data.tags) == ("adapter", "peft", ["cllm", "custom_generate"])


def test_what_it_tells():
    text = make_model_card(FACTS)
    assert "# cllm\n" in text and "[user/base](https://huggingface.co/user/base)" in text
    assert "1,234 responses in [user/trajectories](https://huggingface.co/datasets/user/trajectories)" in text
    assert "`ar_loss_weight=2.0`, `divergence='forward_kl'`, `block_sizes=[8, 16]`" in text and "unset" not in text
    assert "200 optimizer steps (1.5 epochs)" in text and "`learning_rate=1e-05`, `seed=7`" in text
    assert "blocks of 16 tokens" in text and "torch 2.13" in text
    assert "2403.00835" in text and "@software{cllm_hf" in text and "version = {0.1.0}" in text
    assert make_model_card(FACTS) == text and "None" not in text and "nan" not in text


def test_figures_are_the_first_and_the_last():
    text = make_model_card(FACTS)
    assert "| consistency loss | 2 (step 10) | 0.5 (step 20) |" in text
    assert "| AR loss | 1 (step 10) | 1 (step 20) |" in text
    assert "| tokens per forward pass, evaluation | 1.25 (step 10) | 2.5 (step 20) |" in text
    assert "| agreement with the target model, evaluation on `test` | 0.5 (step 10) |  |" in text


def test_the_card_of_a_lossless_adapter_says_so_and_nothing_of_a_cllm():
    text = make_model_card(changed(**LOSSLESS))
    card = ModelCard(text)
    assert card.data.tags == ["trl", "lossless", "lora"] and card.data.base_model_relation == "adapter"
    first = card.text.split("## Use it")[0]
    assert "A **lossless** adapter for [user/base]" in first and "the base model's own, because" in first
    assert "1,234 responses in [user/trajectories](https" in text and "200 optimizer steps (1.5 epochs)" in text
    assert "8 masks, for a block size of at most 9, and a Markov head of rank 64" in text
    assert "`lossless=True`, `position_decay=6.0`" in text and "rank 16" in text and "2507.11851" in text
    assert "leaves the base model as it is: to PEFT it is an activated LoRA that nothing invokes" in text
    said = text.split("The library:")[0].replace("user/trajectories", "")  # the library has a name
    assert re.findall(OF_CLLMS, said) == [] and "None" not in text
    assert "1 mask, for a block size of at most 2, and no Markov head" in make_model_card(
        changed(**{**LOSSLESS, "num_masks": 1, "markov_rank": 0})
    )


def test_figures_of_a_lossless_adapter():
    text = make_model_card(changed(**LOSSLESS))
    assert re.findall(r"^\| .*step.*", text, flags=re.MULTILINE) == [
        "| drafting loss | 3 (step 1) | 2 (step 20) |",
        "| drafting loss, evaluation | 2.5 (step 10) | 1.5 (step 20) |",
        "| draft accuracy | 0.125 (step 1) | 0.5 (step 20) |",
        "| tokens per forward pass, evaluation | 1.5 (step 10) | 2.25 (step 20) |",
    ]


def test_a_lossless_adapter_on_a_model_of_the_hub_is_loaded_by_its_name():
    (code,) = code_of(make_model_card(changed(**LOSSLESS)))
    assert 'name = "user/cllm"' in code and "model = cllm_hf.load_cllm(name)\n" in code
    text = make_model_card(changed(**LOSSLESS))
    assert (
        "`AutoModelForCausalLM.from_pretrained(name)`" in text and '`generate(..., decoding="autoregressive")`' in text
    )
    codes = code_of(make_model_card(changed(**LOSSLESS, has_custom_generate=True)))
    assert len(codes) == 2 and "custom_generate=name" in codes[1] and "cllm_hf" not in codes[1]


def test_a_plot_is_shown_where_there_is_one():
    assert "](training.png)" in make_model_card(changed(plot="training.png"))
    assert "![" not in make_model_card(FACTS)


def test_no_figure_that_was_not_measured():
    assert "## Measured" not in make_model_card(FACTS) and "speed-up" not in make_model_card(FACTS)
    assert "## What training changed" not in make_model_card(changed(log_history=[]))
    assert "has not been trained yet" in make_model_card(changed(num_updates=0))
    measured = {"speed-up over generate()": 3.25, "tokens per forward pass": "5.65 on 200 problems"}
    text = make_model_card(changed(measured=measured))
    assert (
        "| speed-up over generate() | 3.25 |" in text and "| tokens per forward pass | 5.65 on 200 problems |" in text
    )


@pytest.mark.parametrize("name", ["/home/me/models/base", "./base", "runs/demo/base"])
def test_folders_of_this_machine_are_not_told(name):
    options = {"prompts": "/home/me/prompts.txt", "many": ["/home/me/a", "b"], "long": list(range(100))}
    for adapter in (None, "LORA adapter"):
        text = make_model_card(changed(base_model=name, adapter=adapter, options=options))
        assert "/home/me" not in text and name not in text and "`path/to/base`" in text
        assert "base_model:" not in text and "many" not in text and "long" not in text
        assert ('from_pretrained("path/to/base")' in text) == bool(adapter)
    assert "a model without a name" in make_model_card(changed(base_model=None))


def test_text_that_looks_like_a_template_stays_text():
    text = make_model_card(changed(measured={"{{ title }}": "{% if x %}"}, title="{{ begin }}"))
    assert "| {{ title }} | {% if x %} |" in text and "# {{ begin }}\n" in text


def test_what_was_measured_stays_in_its_cells():
    text = make_model_card(changed(measured={"p(a|b)": "two\nlines", "tokens": 1234567, "speed-up": 10 / 3}))
    assert "| p(a\\|b) | two lines |" in text and "| tokens | 1234567 |" in text and "| speed-up | 3.333 |" in text


def test_licenses():
    assert license_metadata([]) == {} and license_metadata(["MIT"]) == {"license": "mit"}
    assert license_metadata(["Our Own"]) == {"license": "other", "license_name": "our-own"} and "mit" in LICENSES


def test_our_own_card_is_renewed_and_what_others_wrote_stays():
    old = make_model_card(changed(num_updates=3, base_model="user/other", license={"license": "apache-2.0"}))
    old = old.replace(BEGIN, f"Above.\n\n{BEGIN}").replace(END, f"{END}\n\nBelow.")
    old = old.replace("tags:\n", "language:\n- fr\ntags:\n- mine\n")
    new = renew_model_card(old, make_model_card(changed(base_model="./local")))
    card = ModelCard(new)
    assert card.text.strip().startswith("Above.") and card.text.strip().endswith("Below.")
    assert "200 optimizer steps" in new and "3 optimizer steps" not in new and new.count(BEGIN) == new.count(END) == 1
    data = card.data.to_dict()
    assert data["tags"] == ["mine", "cllm"] and data["language"] == ["fr"]
    assert data["license"] == "apache-2.0", "somebody may have chosen it"
    assert "base_model" not in data and "base_model_relation" not in data
    assert renew_model_card(new, make_model_card(changed(base_model="./local"))) == new


@pytest.mark.parametrize(
    "theirs", ["# Mine\n", "---\nlicense: mit\n---\nWords.\n", "---\na: [\n---\nWords.\n", "---\n- a\n---\n"]
)
def test_cards_of_others_are_not_replaced(theirs):
    new = make_model_card(FACTS)
    assert renew_model_card(theirs, new) is None
    assert join_cards(theirs, new) == theirs and join_cards(None, theirs) == theirs
    assert join_cards(new, theirs) == theirs


def test_cards_without_text_get_ours():
    new = make_model_card(FACTS)
    assert renew_model_card(None, new) == renew_model_card("", new) == renew_model_card("\n", new) == new
    card = ModelCard(renew_model_card("---\nlicense: gemma\n---\n", new))
    assert card.data.license == "gemma" and card.data.base_model == "user/base" and BEGIN in card.text


def test_joining_our_own_cards():
    here, there = make_model_card(FACTS), make_model_card(changed(num_updates=3, license={}))
    joined = ModelCard(join_cards(here, there.replace(BEGIN, f"Above.\n\n{BEGIN}")))
    assert joined.text.strip().startswith("Above.") and joined.data.license == "mit"
    written = here.replace(BEGIN, f"Mine.\n\n{BEGIN}")
    assert join_cards(written, there) == written
    assert join_cards("", there) == there


def test_options_of_a_subclass_are_found(tmp_path):
    @dataclass
    class Config(CLLMConfig):
        sharpness: float = field(default=0.5)

    names = list(consistency_options(Config(output_dir=str(tmp_path), bf16=False)))
    assert names[0] == "ar_loss_weight" and names[-1] == "sharpness"
    assert not {"block_size", "export_custom_generate", "learning_rate", "output_dir"} & set(names)


def test_options_without_a_part_in_the_training_are_left_out(tmp_path):
    options = {"output_dir": str(tmp_path), "bf16": False}
    lossless = consistency_options(CLLMConfig(**options, lossless=True))
    assert lossless["lossless"] and {"divergence", "position_decay", "markov_rank", "drafts_per_response"} < set(
        lossless
    )
    of_states = {"ar_loss_weight", "ar_labels", "consistency", "states_per_block", "context", "trajectory_source"}
    assert not of_states & set(lossless) and of_states <= set(consistency_options(CLLMConfig(**options)))
    assert not {"lossless", "markov_rank", "drafts_per_response"} & set(consistency_options(CLLMConfig(**options)))


def test_access_tokens_are_not_pickled_and_stay_in_copies(tmp_path):
    """The host saves the options with `torch.save`, and publishes that file."""
    args = CLLMConfig(output_dir=str(tmp_path), bf16=False, hub_token="hf_secret", logging_steps=7)
    assert copy.deepcopy(args).hub_token == "hf_secret" and copy.deepcopy(args) == args
    torch.save(args, tmp_path / "args.bin")
    assert b"hf_secret" not in (tmp_path / "args.bin").read_bytes()
    loaded = torch.load(tmp_path / "args.bin", weights_only=False)
    assert loaded.hub_token is None and loaded.logging_steps == 7


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "adapter"])
def test_a_saved_folder_has_a_card_whose_code_runs(places, tmp_path, adapter):
    trainer = make_trainer(
        str(places.base), places.dataset, None, tmp_path / "cllm", lora() if adapter else None, max_steps=2
    )
    trainer.train()
    trainer.measured = {"speed-up over generate()": 1.5}
    trainer.save_model()
    text = (tmp_path / "cllm" / "README.md").read_text()
    card = ModelCard(text)
    assert str(places.base.parent) not in text and "# cllm\n" in text and "`path/to/base`" in text
    assert card.data.license == "cc-by-4.0" and card.data.library_name == ("peft" if adapter else "transformers")
    assert (
        "`ar_loss_weight=1.0`" in text and "2 optimizer steps" in text and "8 responses" in text and "| 1.5 |" in text
    )
    assert "export_custom_generate" not in text and not (tmp_path / "cllm" / "custom_generate").exists()
    first, last = (log["ar_loss"] for log in trainer.state.log_history if "ar_loss" in log)
    assert f"| AR loss | {first:.4g} (step 1) | {last:.4g} (step 2) |" in text
    (code,) = code_of(text)
    names = {}
    code = code.replace("path/to/this/folder", str(tmp_path / "cllm")).replace("path/to/base", str(places.base))
    exec(code, names)
    assert names["output"].jacobi_stats.tokens_per_forward > 0
    # The saved folder is renewed, and another one gets a card of its own.
    trainer.create_model_card(model_name="Name", dataset_name="user/data", tags="extra")
    card = ModelCard.load(tmp_path / "cllm" / "README.md")
    assert "# Name\n" in card.text and card.data.datasets == ["user/data"] and "extra" in card.data.tags
    trainer.save_model(tmp_path / "other")
    assert "# other\n" in (tmp_path / "other" / "README.md").read_text()
    assert ModelCard.load(tmp_path / "other" / "README.md").data.datasets == ["user/data"]


def test_a_saved_lossless_adapter_has_a_card_whose_code_runs(places, tmp_path):
    options = {"lossless": True, "block_size": 4, "export_custom_generate": True}
    trainer = make_trainer(str(places.base), places.dataset, None, tmp_path / "fast", lora(), max_steps=2, **options)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(tags=trainer.model.get_base_model().model_tags)  # as a push does
    text = (tmp_path / "fast" / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.tags == ["trl", "lossless", "lora", "custom_generate"] and card.data.library_name == "peft"
    assert re.findall(OF_CLLMS, text.split("The library:")[0]) == [] and str(places.base.parent) not in text
    assert "3 masks, for a block size of at most 4, and a Markov head of rank 64" in text and "rank 2" in text
    assert "8 responses" in text and "2 optimizer steps" in text and "`lossless=True`, `markov_rank=64`" in text
    first, last = (log["drafting_loss"] for log in trainer.state.log_history if "drafting_loss" in log)
    assert f"| drafting loss | {first:.4g} (step 1) | {last:.4g} (step 2) |" in text
    base = AutoModelForCausalLM.from_pretrained(places.base)
    texts = []
    for code in code_of(text):
        names = {}
        code = code.replace("path/to/this/folder", str(tmp_path / "fast")).replace("path/to/base", str(places.base))
        exec(code, names)
        assert names["output"].jacobi_stats.tokens_per_forward > 0
        texts.append(names["output"].sequences.tolist())
    expected = base.generate(**names["inputs"], max_new_tokens=64, decoding="autoregressive").tolist()
    assert texts == [expected, expected]


def test_a_folder_that_looks_like_an_id_is_no_id(places, tmp_path, monkeypatch):
    monkeypatch.chdir(places.base.parent.parent)
    name = f"{places.base.parent.name}/base"
    trainer = make_trainer(name, places.dataset, None, tmp_path)
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "`path/to/base`" in text and name not in text and "base_model:" not in text


CARDS = ["# Mine\n\nWords.\n", "---\na: [\n---\nBroken.\n", "---\nlicense: mit\r\n---\r\nHi", "# Caf\udce9\n"]


@pytest.mark.parametrize("card", CARDS)
def test_the_card_of_somebody_else_stays_byte_for_byte(places, tmp_path, card):
    """PEFT changes every card that it finds."""
    card = card.encode(errors="surrogateescape")  # one is in another encoding
    (tmp_path / "README.md").write_bytes(card)
    trainer = make_trainer(str(places.base), places.dataset, None, tmp_path, lora())
    trainer.save_model()
    trainer.create_model_card()
    trainer.save_model()
    assert (tmp_path / "README.md").read_bytes() == card
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert not [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")]


def test_a_card_is_in_its_place_while_an_adapter_is_saved(places, tmp_path, monkeypatch):
    """And PEFT calls nothing else that writes one."""
    (tmp_path / "README.md").write_text("# Mine\n")
    trainer = make_trainer(str(places.base), places.dataset, None, tmp_path, lora())
    seen, save_pretrained = [], trainer.model.save_pretrained

    def look(folder, **options):
        save_pretrained(folder, **options)
        seen.append((tmp_path / "README.md").read_text())

    monkeypatch.setattr(trainer.model, "save_pretrained", look)
    trainer.save_model()
    assert seen == ["# Mine\n"]
    monkeypatch.undo()
    (tmp_path / "README.md").unlink()
    trainer.model.save_pretrained(tmp_path)  # by PEFT alone it writes one, as ever
    assert (tmp_path / "README.md").is_file()


def test_a_card_that_was_set_aside_goes_over_none_that_somebody_wrote(places, tmp_path, caplog):
    (tmp_path / ".README.md.earlier").write_text("# Mine\n")
    (tmp_path / "README.md").write_text("# Mine too\n")
    trainer = make_trainer(str(places.base), places.dataset, None, tmp_path, lora())
    trainer.save_model()
    assert (tmp_path / "README.md").read_text() == "# Mine too\n" and "but there is another README.md" in caplog.text
    assert (tmp_path / ".README.md.earlier").read_text() == "# Mine\n"


def test_a_card_outlives_a_save_that_fails_or_is_killed(places, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("# Mine\n")
    trainer = make_trainer(str(places.base), places.dataset, None, tmp_path, lora())

    def fail(*args, **kwargs):
        raise OSError("full")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="full"):
        patched.setattr(trainer.model, "save_pretrained", fail)
        trainer.save_model()
    assert (tmp_path / "README.md").read_text() == "# Mine\n"
    (tmp_path / "README.md").rename(tmp_path / ".README.md.earlier")
    trainer.save_model()
    assert (tmp_path / "README.md").read_text() == "# Mine\n"
    assert not (tmp_path / ".README.md.earlier").exists()


def test_custom_generate_is_written_with_the_model_and_not_with_checkpoints(places, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "README.md").write_text("# Mine\n")
    trainer = make_trainer(
        str(places.base), places.dataset, None, tmp_path / "cllm", export_custom_generate=True, save_strategy="steps"
    )
    trainer.train()
    trainer.save_model()
    checkpoint, folder = tmp_path / "cllm" / "checkpoint-1", tmp_path / "cllm"
    assert BEGIN in (checkpoint / "README.md").read_text() and not (checkpoint / "custom_generate").exists()
    assert json.loads((checkpoint / "generation_config.json").read_text())["decoding"] == "jacobi"
    assert "EXPORTED_BLOCK_SIZE = 5\n" in (folder / "custom_generate" / "generate.py").read_text()
    card = ModelCard.load(folder / "README.md")
    assert "custom_generate" in card.data.tags and len(code_of(card.text)) == 2
    names = {}
    exec(code_of(card.text)[1].replace("path/to/this/folder", str(folder)), names)
    assert names["output"].jacobi_stats.tokens_per_forward > 0
    # Somebody else's card gets the tag, as `export_custom_generate` says, and nothing more.
    trainer.save_model(tmp_path / "theirs")
    assert (tmp_path / "theirs" / "README.md").read_text() == "---\ntags:\n- custom_generate\n---\n# Mine\n"


@pytest.mark.parametrize(
    ("base", "options"),
    [
        pytest.param("base", {"modules_to_save": ["lm_head"]}, id="head"),
        pytest.param("tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, id="tied-embeddings"),
        pytest.param("tied", {"target_modules": ["q_proj", "embed_tokens"]}, id="tied-embeddings-lora"),
        *[
            pytest.param(base, options, id=name, marks=pytest.mark.slow)
            for base, options, name in [
                ("base", {"modules_to_save": ["lm_head", "embed_tokens"]}, "head-and-embeddings"),
                ("base", {"target_modules": ["q_proj", "embed_tokens"]}, "embeddings-lora"),
                ("base", {"trainable_token_indices": list(range(40))}, "tokens"),
                ("tied", {"modules_to_save": ["lm_head"]}, "tied-head"),
                ("tied", {"trainable_token_indices": list(range(40))}, "tied-tokens"),
            ]
        ],
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_trained_embeddings_and_heads_are_saved(places, tmp_path, base, options):
    folder = getattr(places, base)
    trainer = make_trainer(str(folder), places.dataset, None, tmp_path, lora(**options), max_steps=3)
    before = {name: p.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    trainer.save_model()
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    special = [name for name in trained if "q_proj" not in name]
    assert special and any(not torch.equal(trained[name], before[name]) for name in special)
    ids = torch.tensor([places.dataset[0]["prompt_ids"]])
    expected = trainer.model.eval()(ids).logits
    loaded = load_cllm(tmp_path)
    parameters = dict(loaded.named_parameters())
    assert all(torch.equal(parameters[name], trained[name]) for name in trained)
    for model in (loaded, AutoPeftModelForCausalLM.from_pretrained(tmp_path)):
        torch.testing.assert_close(model.eval()(ids).logits, expected)
    says_merge = "merge_and_unload" in (tmp_path / "README.md").read_text()
    assert says_merge != (base == "tied" and "embed_tokens" in options.get("target_modules", ()))
    if says_merge:
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, expected, atol=1e-4, rtol=1e-4)
        merged.save_pretrained(tmp_path / "merged")
        again = load_cllm(tmp_path / "merged")
        torch.testing.assert_close(again(ids).logits, expected, atol=1e-4, rtol=1e-4)
        assert again.generation_config.decoding == "jacobi"


def test_a_lora_on_the_head_is_refused_by_the_host(places, tmp_path):
    with pytest.raises(ValueError, match="`lm_head`"):
        make_trainer(str(places.base), places.dataset, None, tmp_path, lora(target_modules=["lm_head"]))


def test_an_adapter_by_its_name_is_trained_further(places, tmp_path, caplog):
    config = lora(modules_to_save=["lm_head"])
    trainer = make_trainer(str(places.base), places.dataset, None, tmp_path / "first", config)
    trainer.train()
    trainer.save_model()
    first = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer = make_trainer(
        str(tmp_path / "first"),
        places.dataset,
        None,
        tmp_path / "second",
        gradient_checkpointing=True,
        model_init_kwargs={"attn_implementation": "eager"},
    )
    assert trainer.model.config._attn_implementation == "eager" and "ignored" not in caplog.text
    assert all(torch.equal(p, first[name]) for name, p in trainer.model.named_parameters())
    trainer.train()
    for name, p in trainer.model.named_parameters():
        is_adapter = "lora_" in name or "modules_to_save" in name
        assert p.requires_grad == is_adapter and torch.equal(p, first[name]) != is_adapter, name
    trainer.save_model()
    assert load_cllm(tmp_path / "second").generation_config.decoding == "jacobi"
    with pytest.raises(ValueError, match="`peft_config`"):
        make_trainer(str(tmp_path / "first"), places.dataset, None, tmp_path / "third", lora())


def test_the_tokenizer_beside_an_adapter_comes_first(places, tmp_path, tokenizer):
    make_word_model(tokenizer).save_pretrained(tmp_path / "bare")  # without a tokenizer
    make_trainer(str(tmp_path / "bare"), places.dataset, tokenizer, tmp_path / "first", lora()).save_model()
    trainer = make_trainer(str(tmp_path / "first"), places.dataset, None, tmp_path / "second")
    assert trainer.processing_class.get_vocab() == tokenizer.get_vocab()


def test_an_adapter_that_is_loaded_already_is_trained_further(places, tmp_path):
    make_trainer(str(places.base), places.dataset, None, tmp_path / "first", lora()).save_model()
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "first", is_trainable=True)
    trainer = make_trainer(model, places.dataset, None, tmp_path / "second")
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("lora_" in name for name in moved)
    base = AutoModelForCausalLM.from_pretrained(places.base)
    trainer.save_model()
    assert load_cllm(tmp_path / "second", base_model=base).generation_config.jacobi_block_size == 5
