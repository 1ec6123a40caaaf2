"""The options of a model: by name, or made from scratch."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any, Literal

from transformers import CONFIG_MAPPING

from cllm_hf.names import Name

from .sections import changed_values, check_names, closest, read_section


_DTYPE = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass
class ModelOptions:
    """
    A model, by name or made from scratch.

    Attributes:
        name (`str`, *optional*): folder or Hub id.
        dtype (`str`): of the weights that are loaded for training, and by default elsewhere.
        attn_implementation (`str`, *optional*): such as `"sdpa"`.
        lora (`dict`, *optional*): options of `peft.LoraConfig`; adapters are trained instead of the whole model.
        architecture (`str`, *optional*): model type of a model from scratch, such as `"llama"`.
        vocab_size (`int`): tokens of its tokenizer, which is trained on the training texts.
        split_spaces (`bool`): whether a space is a token of its own in that tokenizer, and not part of the word after
            it. Texts have more tokens, but a word has the same ones wherever it stands, which makes it easier to copy.
        shape (`dict`): further options of its config, such as `hidden_size`; in YAML they stand in the section itself.
        sft (`dict`): of a draft model: options that differ from those of the section `sft`.
    """

    name: str | None = None
    dtype: _DTYPE = "float32"
    attn_implementation: str | None = None
    lora: dict | None = None
    architecture: str | None = None
    vocab_size: int = 2048
    split_spaces: bool = False
    shape: dict = dataclasses.field(default_factory=dict)
    sft: dict = dataclasses.field(default_factory=dict)


def read_model(values: Any, section: str) -> ModelOptions:
    """
    Make the options of a model from its section.

    Args:
        values (`Any`): what stands there.
        section (`str`): `"model"` or `"draft"`.

    Returns:
        `ModelOptions`.

    Raises:
        ValueError: for an unknown option, or that would change nothing; or a value that is not usable.
    """
    if values is None:
        raise ValueError(f"There must be a section `{section}` with a `name` or an `architecture`, got none.")
    own = {field.name for field in dataclasses.fields(ModelOptions)} - {"shape"}
    own -= {"sft"} if section == "model" else set()
    if not isinstance(values, Mapping) or values.get("architecture") is None:
        check_names(values, own, section)
        shape: dict[str, Any] = {}
    else:
        check_names(values, own | _config_options(values["architecture"], section), section)
        shape = {name: value for name, value in values.items() if name not in own}
    made = read_section(ModelOptions, {**{n: v for n, v in values.items() if n in own}, "shape": shape}, section)
    if (made.name is None) == (made.architecture is None):
        got = "neither" if made.name is None else "both"
        raise ValueError(f"Section `{section}` must have either a `name` or an `architecture`, got {got}.")
    if made.name is not None:
        Name.find(made.name).check(f"{section}.name", "model")
    if made.architecture is not None and made.lora is not None:
        raise ValueError(f"An adapter goes on a trained model, got `{section}.lora` for one from scratch. Drop it.")
    for name in ("vocab_size", "split_spaces"):
        if name in values and (made.name is not None or section == "draft"):
            whose = "of the target model" if section == "draft" else "that it comes with"
            raise ValueError(
                f"`{section}.{name}` cannot be set, got {values[name]!r}: the tokenizer is the one {whose}. Drop it."
            )
    if made.lora is not None:
        _check_lora(made.lora, section)
        if section == "draft" and not made.sft:
            raise ValueError("`draft.lora` is for a draft model that is trained, got no `draft.sft`. Add it.")
    return made


def describe_model(model: ModelOptions) -> dict[str, Any]:
    """
    Options that change what comes out, and are not the defaults.

    Args:
        model (`ModelOptions`): the options.

    Returns:
        `dict[str, Any]`: ready for JSON.
    """
    values = vars(model)
    kept = changed_values(model, values, {"attn_implementation", "shape", "sft"})
    weights = None if model.name is None else fingerprint_files(model.name)
    kept |= {} if weights is None else {"weights": weights}
    return {**kept, **model.shape, **({"sft": model.sft} if model.sft else {})}


def fingerprint_files(name: str) -> str | None:
    """
    A short name for the weights in a local folder, which may be others tomorrow.

    Args:
        name (`str`): folder or Hub id.

    Returns:
        `str` or `None`: 12 hexadecimal digits; `None` for a Hub id.
    """
    folder = Name.find(name).path
    if folder is None:
        return None
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


def _config_options(architecture: Any, section: str) -> set[str]:
    if architecture not in CONFIG_MAPPING:
        raise ValueError(
            f"`{section}.architecture` must be a model type of transformers, got {architecture!r}."
            f"{closest(str(architecture), list(CONFIG_MAPPING.keys()))}"
        )
    kind = CONFIG_MAPPING[architecture]
    return {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map)


def _check_lora(values: Mapping[str, Any], section: str) -> None:
    from peft import LoraConfig

    check_names(values, {field.name for field in dataclasses.fields(LoraConfig)}, f"{section}.lora")
