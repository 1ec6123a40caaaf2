"""`CLLMConfig`: what each option may be, what excludes what, and all of them from a command line or a file."""

import dataclasses
import json
import math

import numpy as np
import pytest
from transformers import HfArgumentParser
from trl import SFTConfig, TrlParser

from cllm_hf import CLLMConfig
from cllm_hf.training.losses import DIVERGENCES


def make_config(**options):
    return CLLMConfig(output_dir="unused", bf16=False, use_cpu=True, **options)


# For every option of our own, values that will do.
GOOD = {
    "ar_loss_weight": [0.0, 1, 10.0],
    "block_size": [None, 1, 64],
    "max_length": [None, 1, 2048],
    "consistency": ["global", "local"],
    "divergence": list(DIVERGENCES),
    "divergence_temperature": [0.1, 1, 5.0],
    "ar_labels": ["response", "ground_truth"],
    "ar_label_smoothing": [0, 0.1, 0.99],
    "position_decay": [None, 0.5, 16],
    "states_per_block": [1, 4],
    "state_sampling": ["uniform", "progressive"],
    "context": ["clean", "noisy"],
    "noise_window": [1, 16],
    "block_size_schedule": [None, [8], [8, 16, 32]],
    "trajectory_source": ["dataset", "online"],
    "online_iterations": [0, 8],
    "lossless": [False, True],
    "markov_rank": [0, 64],
    "drafts_per_response": [1, 32],
    "export_custom_generate": [False, True],
    "num_monitored_prompts": [0, 8],
    "monitored_max_new_tokens": [None, 1, 512],
    "on_collapse": ["warn", "stop", "ignore"],
    "plot_run": [False, True],
}
OWN = [field.name for field in dataclasses.fields(CLLMConfig) if field.name not in SFTConfig.__dataclass_fields__]
INTEGERS = ("block_size", "max_length", "states_per_block", "noise_window", "online_iterations")
INTEGERS += ("num_monitored_prompts", "monitored_max_new_tokens", "markov_rank", "drafts_per_response")
SWITCHES = ("export_custom_generate", "plot_run", "lossless")
OF_A_DRAFTER = ("markov_rank", "drafts_per_response")
NUMBERS = ("ar_loss_weight", "divergence_temperature", "ar_label_smoothing", "position_decay")
CHOICES = ("consistency", "divergence", "ar_labels", "state_sampling", "context", "trajectory_source", "on_collapse")


def test_every_option_is_tried_here():
    assert {*OWN, "max_length"} == set(GOOD)
    assert {*INTEGERS, *NUMBERS, *CHOICES, *SWITCHES, "block_size_schedule"} == set(GOOD)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in GOOD.items() for value in values])
def test_values_that_are_taken(name, value):
    others = {"lossless": True} if name in OF_A_DRAFTER else {}
    assert getattr(make_config(**{name: value}, **others), name) == value


@pytest.mark.parametrize("value", [0, -1, 2.0, "4", True, math.nan, [4]], ids=repr)
@pytest.mark.parametrize("name", INTEGERS)
def test_integers_that_are_refused(name, value):
    if name in ("online_iterations", "num_monitored_prompts", "markov_rank") and value == 0:
        pytest.skip("0 iterations are the first drafts, 0 prompts are no measure, rank 0 is no Markov head")
    with pytest.raises(ValueError, match=f"`{name}`"):
        make_config(**{name: value})


@pytest.mark.parametrize("value", [-0.5, -1, math.nan, math.inf, "1.0", True, [1.0]], ids=repr)
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_are_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}`"):
        make_config(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("divergence_temperature", 0), ("position_decay", 0.0), ("ar_label_smoothing", 1.0), ("ar_label_smoothing", 1.5)],
)
def test_bounds_that_are_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}`"):
        make_config(**{name: value})


@pytest.mark.parametrize("name", [name for name in GOOD if None not in GOOD[name] and name not in SWITCHES])
def test_none_is_refused_where_it_means_nothing(name):
    with pytest.raises(ValueError, match=f"`{name}`.* got None"):
        make_config(**{name: None})


@pytest.mark.parametrize("value", ["globally", "", 1, True, ["global"], "forward_KL"], ids=repr)
@pytest.mark.parametrize("name", CHOICES)
def test_choices_that_are_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}`") as error:
        make_config(**{name: value})
    assert all(f'"{choice}"' in str(error.value) for choice in GOOD[name])


@pytest.mark.parametrize("value", [[], [0], [8, -1], [8, 16.0], [8, "16"], [True], "8 16", 16, [None]], ids=repr)
def test_schedules_that_are_refused(value):
    with pytest.raises(ValueError, match="`block_size_schedule`"):
        make_config(block_size_schedule=value)


@pytest.mark.parametrize(
    "options",
    [
        {"trajectory_source": "online", "state_sampling": "progressive"},
        {"trajectory_source": "online", "context": "noisy"},
        {"consistency": "local", "block_size_schedule": [4, 8]},
    ],
)
def test_combinations_that_are_refused(options):
    with pytest.raises(ValueError) as error:
        make_config(**options)
    assert all(f"`{name}" in str(error.value) for name in options)
    for left_out in options:
        make_config(**{name: value for name, value in options.items() if name != left_out})


@pytest.mark.parametrize(
    "options",
    [
        {"packing": True},
        {"eval_packing": True},
        {"padding_free": True},
        {"assistant_only_loss": True},
        {"completion_only_loss": True},
        {"loss_type": "dft"},
        {"label_smoothing_factor": 0.1},
        {"use_liger_kernel": True},
        {"router_aux_loss_coef": 0.01},
        {"chat_template_path": "somewhere"},
        {"pad_to_multiple_of": 64},
        {"dataset_kwargs": {"add_special_tokens": False}},
        {"shuffle_dataset": True},
        {"neftune_noise_alpha": 5.0},
        {"dataset_num_proc": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_the_host_without_effect_are_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"`{name}={value!r}`"):
        make_config(**options)


def test_reentrant_checkpointing_is_refused():
    with pytest.raises(ValueError, match="`use_reentrant=True`"):
        make_config(gradient_checkpointing_kwargs={"use_reentrant": True})
    make_config(gradient_checkpointing_kwargs={"use_reentrant": False})


# Not the default of any but those of lossless training, which others exclude, and none that excludes another.
FROM_OUTSIDE = {
    "ar_loss_weight": 10.0,
    "block_size": 8,
    "max_length": 512,
    "consistency": "global",
    "divergence": "total_variation",
    "divergence_temperature": 2.0,
    "ar_labels": "ground_truth",
    "ar_label_smoothing": 0.1,
    "position_decay": 4.0,
    "states_per_block": 2,
    "state_sampling": "uniform",
    "context": "clean",
    "noise_window": 4,
    "block_size_schedule": [8, 16, 32],
    "trajectory_source": "online",
    "online_iterations": 6,
    "lossless": False,
    "markov_rank": 64,
    "drafts_per_response": 12,
    "export_custom_generate": True,
    "num_monitored_prompts": 4,
    "monitored_max_new_tokens": 64,
    "on_collapse": "stop",
    "plot_run": False,
}


@pytest.mark.parametrize("parser", [HfArgumentParser, TrlParser])
def test_all_options_can_be_given_on_a_command_line(parser):
    assert FROM_OUTSIDE.keys() == GOOD.keys()
    line = ["--output_dir", "unused", "--bf16", "False", "--use_cpu"]
    for name, value in FROM_OUTSIDE.items():
        line += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    (config,) = parser(CLLMConfig).parse_args_into_dataclasses(line)
    assert {name: getattr(config, name) for name in FROM_OUTSIDE} == FROM_OUTSIDE
    (config,) = parser(CLLMConfig).parse_args_into_dataclasses(line[:5])
    assert all(getattr(config, name) == CLLMConfig.__dataclass_fields__[name].default for name in FROM_OUTSIDE)


def test_all_options_can_be_given_in_a_file_that_a_command_line_overrides(tmp_path):
    lines = ["output_dir: unused", "bf16: false", "use_cpu: true"]
    lines += [f"{name}: {value}" for name, value in FROM_OUTSIDE.items()]
    path = tmp_path / "options.yaml"
    path.write_text("\n".join(lines))
    (config,) = TrlParser(CLLMConfig).parse_args_and_config(["--config", str(path), "--ar_loss_weight", "3"])
    assert {name: getattr(config, name) for name in FROM_OUTSIDE} == {**FROM_OUTSIDE, "ar_loss_weight": 3.0}


@pytest.mark.parametrize("name", CHOICES)
def test_the_command_line_knows_the_choices(name, capsys):
    with pytest.raises(SystemExit):
        TrlParser(CLLMConfig).parse_args_into_dataclasses(["--output_dir", "unused", f"--{name}", "nonsense"])
    message = capsys.readouterr().err
    assert all(choice in message for choice in GOOD[name])


def test_every_option_has_its_line_of_help():
    for name in GOOD:
        assert CLLMConfig.__dataclass_fields__[name].metadata["help"].endswith(".")
        assert f"        {name} (`" in CLLMConfig.__doc__


def test_a_config_survives_its_dictionary():
    config = make_config(**{**FROM_OUTSIDE})
    again = CLLMConfig(
        **{name: config.to_dict()[name] for name in GOOD}, output_dir="unused", bf16=False, use_cpu=True
    )
    assert {name: getattr(again, name) for name in GOOD} == FROM_OUTSIDE


def test_integers_of_numpy():
    sizes = np.array([8, 16])
    config = make_config(block_size_schedule=list(sizes), states_per_block=sizes[0])
    assert config.block_size_schedule == [8, 16] and json.dumps(config.to_dict())
    assert type(make_config(block_size=sizes[0]).block_size) is int
    assert make_config(block_size_schedule=(8, 16)).block_size_schedule == [8, 16]
