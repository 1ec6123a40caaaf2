"""Tiny models that read images or sound besides text, for prompts of text alone."""

import copy

import torch
import transformers
from architectures import CHANGES, CannotBuild, randomize, small_config
from transformers import GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)


CLASSES = {**MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES}
MODEL_TYPES = sorted(name for name, value in CLASSES.items() if isinstance(value, str))
_LARGEST = 30_000_000


def _axes(*section):
    """Positions along the time, the height and the width of an image."""
    return {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": section}}}


_CHANGES = {
    **dict.fromkeys(("qwen2_5_vl", "glm4v", "glm46v", "glm_ocr", "paddleocr_vl"), _axes(2, 1, 1)),
    "glm4v_moe": _axes(1, 1, 0),
    "qwen2_vl": {**_axes(2, 1, 1), "vision_config": {"embed_dim": 32}},
}


def make_image_text_model(model_type):
    """
    A tiny random model of the given type.

    Raises:
        CannotBuild: if the small config does not fit together.
    """
    changes = copy.deepcopy(_CHANGES.get(model_type, CHANGES.get(model_type, {})))
    model_class = getattr(transformers, CLASSES[model_type])
    try:
        config = small_config(CONFIG_MAPPING[model_type](), changes)
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in model_class(config).parameters())
        if size > _LARGEST:
            raise CannotBuild(f"{size} parameters")
        torch.manual_seed(0)
        model = model_class(config).float().eval()
        randomize(model, 3.0)
    except Exception as error:
        raise CannotBuild(str(error)) from error
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=None)
    return model
