"""
Trained heads that draft for a frozen model, as others have published them: what users compare this package with.

- **Medusa** (arXiv 2401.10774): head k reads the last hidden state of the text and guesses the token k places after
  the next one, through one residual block with SiLU. As published each head ends in a projection onto the vocabulary
  of its own (`own_projections`); by default it ends in the model's own output embeddings, shared and frozen as EAGLE
  shares them, which takes far less memory where the vocabulary is large.
- **EAGLE** (arXiv 2401.15077): one decoder layer reads, for each token, the hidden state before it and its embedding,
  and guesses its hidden state, from which the model's output embeddings guess the next token; its guesses are fed back
  to it. The layer is a new one of the model's own class, without a norm after it. It keeps the norm before its
  attention, which the published code leaves out.

Neither changes the model.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, PreTrainedModel

from cllm_hf._host import CACHE_NAME, base_model_of
from cllm_hf.files import save_whole


MEDUSA, EAGLE = "medusa", "eagle"
CONFIG_FILE, WEIGHTS_FILE = "heads.json", "heads.safetensors"
_FORMAT = 1


class MedusaHeads(nn.Module):
    """
    Heads that read one hidden state and guess several tokens.

    Args:
        hidden_size (`int`): of the model.
        num_heads (`int`): how many tokens after the next one are guessed.
        vocab_size (`int`, *optional*): for projections of their own; by default they share the model's.
    """

    kind = MEDUSA
    num_heads: int
    projections: nn.ModuleList

    def __init__(self, hidden_size: int, num_heads: int = 4, vocab_size: int | None = None):
        super().__init__()
        self.num_heads = num_heads
        blocks = [nn.Linear(hidden_size, hidden_size) for _ in range(num_heads)]
        for block in blocks:
            nn.init.zeros_(block.weight)  # a new head guesses what the model says of the next token
            nn.init.zeros_(block.bias)
        self.blocks = nn.ModuleList(blocks)
        own = [] if vocab_size is None else [nn.Linear(hidden_size, vocab_size, bias=False) for _ in range(num_heads)]
        self.projections = nn.ModuleList(own)

    def logits(self, number: int, hidden_states: torch.Tensor, output_embeddings: Any) -> torch.Tensor:
        """Logits of one head, `[..., hidden_size]` to `[..., vocab_size]`."""
        states = hidden_states + nn.functional.silu(self.blocks[number](hidden_states))
        if len(self.projections):
            return self.projections[number](states)
        return output_embeddings(states.to(output_embeddings.weight.dtype))


class EagleHead(nn.Module):
    """
    A decoder layer that guesses the next hidden state from the one before and the token that follows it.

    Args:
        config (`transformers.PreTrainedConfig`): of the model.
    """

    kind = EAGLE
    decoder: PreTrainedModel

    def __init__(self, config: Any):
        super().__init__()
        self.join = nn.Linear(2 * config.hidden_size, config.hidden_size)
        self.decoder = _one_layer(config)

    def forward(self, embeddings: torch.Tensor, hidden_states: torch.Tensor, cache: Any = None) -> torch.Tensor:
        """
        Guess the hidden states of tokens, from their embeddings and the hidden states of the tokens before them; all
        are `[batch_size, length, hidden_size]`. A cache holds what was fed earlier.
        """
        fed = self.join(torch.cat([embeddings, hidden_states], dim=-1))
        options = {"use_cache": False} if cache is None else {"use_cache": True, CACHE_NAME: cache}
        decoder: Any = self.decoder
        return decoder(inputs_embeds=fed, **options)[0]


Heads = MedusaHeads | EagleHead


def _one_layer(config: Any) -> PreTrainedModel:
    """A new decoder of one layer, which takes embeddings and gives what its layer gives."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"]
    config.vocab_size, config.pad_token_id, config.dtype = 1, None, torch.float32
    decoder: Any = AutoModel.from_config(config)
    decoder.set_input_embeddings(None)
    if hasattr(decoder, "norm"):
        decoder.norm = nn.Identity()
    return decoder


def text_config(model: Any) -> Any:
    """The config of the part of a model that decodes."""
    return model.config.get_text_config()


def make_heads(kind: str, model: PreTrainedModel, num_heads: int = 4, own_projections: bool = False) -> Heads:
    """
    Make new heads for a model, in float32 on its device.

    Args:
        kind (`str`): `"medusa"` or `"eagle"`.
        model (`transformers.PreTrainedModel`): what they draft for.
        num_heads (`int`): of Medusa.
        own_projections (`bool`): whether each head of Medusa has its own projection, which begins as the model's.

    Returns:
        `MedusaHeads` or `EagleHead`.

    Raises:
        ValueError: if the model is an encoder-decoder, or has no output embeddings.
    """
    output_embeddings: Any = model.get_output_embeddings()
    if model.config.is_encoder_decoder or output_embeddings is None:
        raise ValueError(f"Heads draft for causal language models, got {type(model).__name__}. Pass one of these.")
    heads = _build(_shape(kind, model, num_heads, own_projections), model)
    if isinstance(heads, MedusaHeads):
        for projection in heads.projections.parameters():
            projection.data.copy_(output_embeddings.weight.data)
    return heads.to(output_embeddings.weight.device)


def _shape(kind: str, model: Any, num_heads: int, own_projections: bool) -> dict[str, Any]:
    shape: dict[str, Any] = {"kind": kind, "hidden_size": text_config(model).hidden_size}
    shape["vocab_size"] = len(model.get_output_embeddings().weight)
    if kind == MEDUSA:
        shape.update(num_heads=num_heads, own_projections=own_projections)
    return shape


def _build(shape: dict[str, Any], model: Any) -> Heads:
    if shape["kind"] == EAGLE:
        return EagleHead(text_config(model))
    vocab_size = shape["vocab_size"] if shape["own_projections"] else None
    return MedusaHeads(shape["hidden_size"], shape["num_heads"], vocab_size)


def check_output(folder: Path) -> None:
    """
    Check that heads may be saved in a folder, which is then replaced as a whole.

    Args:
        folder (`pathlib.Path`): where they go.

    Raises:
        OSError: if it holds other things than heads.
    """
    if folder.exists() and not (folder / CONFIG_FILE).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise OSError(f"`--output-dir` must be new, empty or hold heads, got {str(folder)!r}. Choose another folder.")


def save_heads(heads: Heads, folder: Path, model: PreTrainedModel, training: dict[str, Any]) -> None:
    """
    Save heads, in a folder that appears when it is complete.

    Args:
        heads (`MedusaHeads` or `EagleHead`): what to save.
        folder (`pathlib.Path`): where; earlier heads in it are replaced.
        model (`transformers.PreTrainedModel`): what they were trained for.
        training (`dict`): what is known of their training.

    Raises:
        OSError: if the folder holds other things or cannot be written.
    """
    check_output(folder)
    num_heads, own = (heads.num_heads, len(heads.projections) > 0) if isinstance(heads, MedusaHeads) else (0, False)
    config = {"format": _FORMAT, "model": model.name_or_path, **_shape(heads.kind, model, num_heads, own)}
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in heads.state_dict().items()}

    def save(new: Path) -> None:
        new.mkdir(parents=True)
        save_file(tensors, new / WEIGHTS_FILE)
        (new / CONFIG_FILE).write_text(json.dumps({**config, "training": training}, indent=2) + "\n")

    folder.parent.mkdir(parents=True, exist_ok=True)
    save_whole(folder, save)


def load_heads(folder: Path, model: Any, kind: str | None = None) -> tuple[Heads, dict[str, Any]]:
    """
    Load heads for a model, in its dtype and on its device.

    Args:
        folder (`pathlib.Path`): where `save_heads` has saved them.
        model (`transformers.PreTrainedModel`): what they draft for.
        kind (`str`, *optional*): which kind they must be.

    Returns:
        `tuple[MedusaHeads | EagleHead, dict]`: the heads, and what is known of their training.

    Raises:
        OSError: if there are no heads in the folder.
        ValueError: if they are of another kind or for a model of other sizes.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise OSError(
            f"There must be trained heads in {str(folder)!r}, got no {CONFIG_FILE} there. Train them by "
            "`python examples/benchmark.py heads train`."
        )
    config = json.loads((folder / CONFIG_FILE).read_text())
    if config["format"] != _FORMAT or kind not in (None, config["kind"]):
        raise ValueError(
            f"Heads of kind {kind or 'medusa or eagle'} and format {_FORMAT} are needed, got {config['kind']!r} and "
            f"{config['format']} in {str(folder)!r}. Name another folder, or train them again."
        )
    base = base_model_of(model)
    fitting = _shape(config["kind"], base, 0, False)
    for name in ("hidden_size", "vocab_size"):
        if config[name] != fitting[name]:
            raise ValueError(
                f"Heads must have the `{name}` of the model, {fitting[name]}, got {config[name]} in {str(folder)!r}, "
                f"which were trained for {config['model'] or 'an unnamed model'}. Pass that model, or train others."
            )
    heads = _build(config, base)
    heads.load_state_dict(load_file(folder / WEIGHTS_FILE))
    embeddings: Any = base.get_output_embeddings()
    return heads.to(embeddings.weight.device, base.dtype).eval(), config["training"]
