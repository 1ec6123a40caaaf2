"""Loading a trained CLLM, merged or as an adapter, with its decoding defaults."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import find_adapter_config_file


if TYPE_CHECKING:
    from peft import PeftModel


def load_cllm(
    path: str | Path, base_model: PreTrainedModel | None = None, **kwargs: Any
) -> PreTrainedModel | PeftModel:
    """
    Load what `CLLMTrainer.save_model` has written: a model or an adapter that decodes by Jacobi by default.

    For a whole model `AutoModelForCausalLM.from_pretrained` does the same. For an adapter the hosts use the base
    model's generation config, and the defaults saved beside the adapter would be lost.

    Args:
        path (`str` or `pathlib.Path`): folder or Hub id of a model or an adapter.
        base_model (`transformers.PreTrainedModel`, *optional*): what the adapter goes on; by default the model that it
            was trained on is loaded.
        kwargs: passed to `AutoModelForCausalLM.from_pretrained`.

    Returns:
        `transformers.PreTrainedModel` or `peft.PeftModel`, in evaluation mode.

    Raises:
        OSError: if there is neither a model nor an adapter at `path`.
        ValueError: if the adapter does not fit the base model, or a base model is given for a whole model.
    """
    path = str(path)
    if find_adapter_config_file(path) is None:
        if base_model is not None:
            raise ValueError(f"{path} holds a whole model, got a `base_model` for it too. Drop `base_model`.")
        return AutoModelForCausalLM.from_pretrained(path, **kwargs).eval()
    model: Any = _load_adapter(path, base_model, kwargs)
    try:
        model.generation_config = GenerationConfig.from_pretrained(path)
    except OSError:  # not saved by `CLLMTrainer`: keeps the defaults of its base model
        return model.eval()
    model.get_base_model().generation_config = model.generation_config
    return model.eval()


def _load_adapter(path: str, base_model: PreTrainedModel | None, kwargs: dict[str, Any]) -> PeftModel:
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights

    trained_on = PeftConfig.from_pretrained(path).base_model_name_or_path
    if base_model is None:
        if not trained_on:
            raise ValueError(f"The adapter at {path} does not name the model it was trained on. Pass `base_model`.")
        base_model = AutoModelForCausalLM.from_pretrained(trained_on, **kwargs)
    problem = ""
    try:
        model = PeftModel.from_pretrained(base_model, path)
    except (RuntimeError, ValueError) as error:  # other shapes; modules that this model does not have
        problem = str(error).strip().splitlines()[-1].strip()
        model = None
    if model is not None:
        saved, expected = set(load_peft_weights(path, device="cpu")), set(get_peft_model_state_dict(model))
        if saved == expected:
            return model
        problem = f"{len(saved - expected)} of its tensors find no place and {len(expected - saved)} are missing"
    raise ValueError(
        f"The adapter at {path} does not fit the base model ({type(base_model).__name__}): {problem}. It was trained "
        f"on {trained_on or 'an unnamed model'}: pass that as `base_model`."
    )
