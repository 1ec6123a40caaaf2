"""Loading a trained CLLM, merged or as an adapter, with its decoding defaults."""

from __future__ import annotations

import copy
import functools
import json
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import find_adapter_config_file

from .adapters import add_drafter
from .blocks.drafter import is_lossless
from .names import Name
from .options import OPTION_NAMES


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

logger = logging.getLogger(__name__)

# Options for loading a base model that go for the files of an adapter as well.
_OF_ADAPTERS = ("cache_dir", "local_files_only", "token")


def load_cllm(
    path: str | Path, base_model: PreTrainedModel | str | Path | None = None, **kwargs: Any
) -> PreTrainedModel | PeftModel:
    """
    Load what `CLLMTrainer.save_model` has written: a model or an adapter that decodes by Jacobi by default.

    For a whole model `AutoModelForCausalLM.from_pretrained` does the same. For an adapter the hosts use the base
    model's generation config, and the defaults saved beside the adapter would be lost. With a lossless adapter, all
    defaults but those of the decoding (`decoding`, `jacobi_` options) stay the base model's.

    Args:
        path (`str` or `pathlib.Path`): folder or Hub id of a model or an adapter.
        base_model (`transformers.PreTrainedModel` or `str`, *optional*): what the adapter goes on, a model or its
            folder or Hub id; by default the model that it was trained on is loaded.
        kwargs: passed to `AutoModelForCausalLM.from_pretrained` for the model, or the base model of an adapter, whose
            `revision` it then is. `cache_dir`, `local_files_only` and `token` go for the adapter's files as well.
            With `is_trainable=True` an adapter can be trained further.

    Returns:
        `transformers.PreTrainedModel` or `peft.PeftModel`, in evaluation mode.

    Raises:
        OSError: if there is nothing at `path`, or the model that the adapter was trained on is not there.
        ValueError: if a folder holds neither a model nor an adapter, the adapter does not fit the base model, a base
            model is given for a whole model, or `kwargs` for a base model that is loaded already.
    """
    Name.find(path).check("path", "model")
    path = str(path)
    if find_adapter_config_file(path, **_of_adapter(kwargs)) is None:
        if base_model is not None:
            raise ValueError(f"{path} holds a whole model, got a `base_model` for it too. Drop `base_model`.")
        return AutoModelForCausalLM.from_pretrained(path, **kwargs).eval()
    return load_adapter(path, base_model, **kwargs).eval()


def load_adapter(
    path: str, base_model: PreTrainedModel | str | Path | None = None, is_trainable: bool = False, **kwargs: Any
) -> PeftModel:
    """
    Load an adapter, by folder or Hub id, with the decoding defaults saved beside it; the arguments are as for
    `load_cllm`, and `is_trainable` says whether the adapter is to be trained further.
    """
    model: Any = _load_adapter(path, base_model, is_trainable, kwargs)
    base = model.get_base_model()
    if is_lossless(model.active_peft_config):
        add_drafter(base, model.active_adapter, path, is_trainable, **_of_adapter(kwargs))
    try:
        saved = GenerationConfig.from_pretrained(path, **_of_adapter(kwargs))
    except OSError:  # not saved by `CLLMTrainer`: keeps the defaults of its base model
        return model
    if is_lossless(model.active_peft_config):
        # Stop tokens and all else that makes the text are the base model's, as they are on this one.
        own = {name: getattr(saved, name, None) for name in ("decoding", *OPTION_NAMES)}
        saved = copy.deepcopy(base.generation_config)
        for name, value in own.items():
            if value is not None:
                setattr(saved, name, value)
    else:
        config = model.active_peft_config
        config.save_pretrained = functools.partial(_save_with_defaults, config, saved)
    model.generation_config = base.generation_config = saved
    return model


def _save_with_defaults(config: PeftConfig, defaults: GenerationConfig, save_directory: Any, **kwargs: Any) -> None:
    """PEFT saves an adapter where its config saves itself, and knows of no generation config."""
    type(config).save_pretrained(config, save_directory, **kwargs)
    defaults.save_pretrained(save_directory)


def _load_adapter(
    path: str, base_model: PreTrainedModel | str | Path | None, is_trainable: bool, kwargs: dict[str, Any]
) -> PeftModel:
    from peft import PeftConfig, PeftModel

    options = _of_adapter(kwargs)
    others = [name for name in kwargs if name not in _OF_ADAPTERS]
    try:
        config = PeftConfig.from_pretrained(path, **options)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"`adapter_config.json` of {path} must be an object of JSON ({error}). Save the adapter again."
        ) from error
    trained_on = config.base_model_name_or_path
    if base_model is None:
        base_model = _load_trained_on(path, trained_on, kwargs)
    elif isinstance(base_model, (str, Path)):
        Name.find(base_model).check("base_model", "model")
        base_model = AutoModelForCausalLM.from_pretrained(str(base_model), **kwargs)
    elif others:
        raise ValueError(f"The base model is loaded already, got {', '.join(others)} for loading it too. Drop them.")
    if trained_on and base_model.name_or_path not in ("", trained_on):
        logger.warning(
            "The adapter at %s was trained on %s and is put on %s.", path, trained_on, base_model.name_or_path
        )
    problem = _misfit(path, config, base_model, options)
    if problem:
        raise ValueError(
            f"The adapter at {path} does not fit the base model ({type(base_model).__name__}): {problem}. It was "
            f"trained on {trained_on or 'an unnamed model'}: pass that as `base_model`."
        )
    return PeftModel.from_pretrained(base_model, path, is_trainable=is_trainable, **options)


def _load_trained_on(path: str, trained_on: str | None, kwargs: dict[str, Any]) -> PreTrainedModel:
    """Load the model that an adapter says it was trained on."""
    if not trained_on:
        raise ValueError(f"The adapter at {path} does not name the model it was trained on. Pass `base_model`.")
    try:
        Name.find(trained_on).check("base_model", "model")
        return AutoModelForCausalLM.from_pretrained(trained_on, **kwargs)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(
            f"The adapter at {path} was trained on {trained_on!r}, which cannot be loaded ({reason}). Pass that model "
            "as `base_model`, or the folder where it is now."
        ) from error


def _of_adapter(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: kwargs[name] for name in _OF_ADAPTERS if kwargs.get(name) is not None}


def _misfit(path: str, config: PeftConfig, base_model: PreTrainedModel, options: dict[str, Any]) -> str | None:
    """What does not fit, found with a new adapter of the same kind on an outline of the base model."""
    from peft import get_peft_model, get_peft_model_state_dict, load_peft_weights

    config = copy.deepcopy(config)
    if isinstance(getattr(config, "init_lora_weights", None), str):
        config.init_lora_weights = True  # type: ignore[attr-defined]  # some need data, and none changes a shape
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")  # that the base model has another name: it is said above, if it matters
            trial = get_peft_model(_outline(base_model), config)
            expected = {name: tensor.shape for name, tensor in get_peft_model_state_dict(trial).items()}
    except ValueError as error:  # the model has no modules of these names
        return str(error).strip().splitlines()[0]
    except Exception:  # such as a kind that begins by computing with the weights: then PEFT says whether it fits
        return None
    saved = {name: tensor.shape for name, tensor in load_peft_weights(path, device="cpu", **options).items()}
    if saved == expected:
        return None
    if saved.keys() == expected.keys():
        name = next(name for name in saved if saved[name] != expected[name])
        return f"{name} has shape {tuple(saved[name])} instead of {tuple(expected[name])}"
    unplaced, absent = len(saved.keys() - expected.keys()), len(expected.keys() - saved.keys())
    return f"{unplaced} of its tensors find no place and {absent} are missing"


def _outline(model: PreTrainedModel) -> Any:
    """
    The modules of a model without its weights, to which anything may be done: nothing of it reaches the model.

    Kinds of adapters that take a part out of the base weights when they are put on would otherwise do so twice.
    """
    instead: dict[int, Any] = {}  # of what is not copied
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        if isinstance(tensor, torch.nn.Parameter):
            empty = torch.nn.Parameter(empty, requires_grad=tensor.requires_grad)
        empty.__dict__.update(tensor.__dict__)  # what quantized weights say of themselves
        instead[id(tensor)] = empty
    for module in model.modules():
        if hasattr(module, "_hf_hook"):  # of accelerate; may hold all the weights
            instead[id(module._hf_hook)] = module._hf_hook
    return copy.deepcopy(model, instead)


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """
    Load the tokenizer of a model, by folder or Hub id; for an adapter without one that of the model below it. An
    `OSError` if there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        if revision is None and find_adapter_config_file(name) is not None:
            from peft import PeftConfig

            below = PeftConfig.from_pretrained(name).base_model_name_or_path
            if below:
                return load_tokenizer(below, None, trust_remote_code)
        reason = str(error).strip().splitlines()[0]
        raise OSError(
            f"There must be a model with its tokenizer at {name!r}, but the tokenizer cannot be loaded ({reason})."
        ) from error


def check_same_tokenizer(name: str, tokenizer: Any, text: str, kind: str = "CLLM") -> None:
    """
    Check that a target model, by folder or Hub id, reads a text as the tokenizer of a model of this `kind` does.
    """
    try:
        other = load_tokenizer(name)
    except OSError:  # that of the other model must do
        return
    if other(text)["input_ids"] != tokenizer(text)["input_ids"]:
        raise ValueError(
            f"The target model must have the tokenizer of the {kind}, got {name!r}, which reads the prompt as other "
            f"tokens. Pass the model that the {kind} was made from."
        )


def pick_device(name: str, option: str = "--device") -> torch.device:
    """Find a device that works, such as "cpu" or "cuda:0", or "auto" for CUDA if there is one, for an option."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"`{option}` must be a device of this machine, got {name!r} ({reason}).") from error
    return device
