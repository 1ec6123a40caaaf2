"""
What a lossless adapter has beside its LoRA weights: mask embeddings, and a Markov head.

The adapter drafts tokens that nothing is known of yet. What is fed in their place is a learned embedding for each
distance; and since no such place has seen the token before it, a low-rank term of that token is added to its logits.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from torch.nn.functional import embedding, linear
from transformers import PreTrainedModel
from transformers.utils import cached_file

from .._host import adapter_layers, input_device
from ..files import write_whole


DRAFTER_FILE = "drafter.safetensors"
# Under this name the drafters of all lossless adapters of a model are a part of it.
_DRAFTERS = "cllm_drafter"
# A lossless adapter is saved as an activated LoRA that no token ever activates: to PEFT, and to whoever does not know
# of drafting, the model with it is the base model.
NEVER_INVOKED = [-1]
_FORMAT = "1"
_SAMPLED_EMBEDDINGS = 1024


class Drafter(nn.Module):
    """The weights by which a lossless adapter drafts, beside those of LoRA."""

    adapter_name = "default"

    def __init__(self, vocab_size: int, hidden_size: int, num_masks: int, markov_rank: int = 0):
        super().__init__()
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_masks, self.markov_rank = num_masks, markov_rank
        self.masks = nn.Parameter(torch.zeros(num_masks, hidden_size))
        if markov_rank:
            self.previous = nn.Embedding(vocab_size, markov_rank)
            self.following = nn.Linear(markov_rank, vocab_size, bias=False)
            nn.init.normal_(self.previous.weight, std=1 / math.sqrt(markov_rank))
            nn.init.zeros_(self.following.weight)  # a new head changes nothing

    def correct(self, logits: torch.Tensor, previous_ids: torch.Tensor) -> torch.Tensor:
        """Tell logits which token stands before theirs: `logits + W2 W1[previous]`."""
        if not self.markov_rank:
            return logits
        known = previous_ids.clamp(max=self.vocab_size - 1)  # a table of embeddings may be longer than the logits
        previous = embedding(known, self.previous.weight).to(logits.dtype)
        return logits + linear(previous, self.following.weight.to(logits.dtype))

    def save(self, folder: Path) -> None:
        """Save it beside an adapter."""
        shape = {"num_masks": self.num_masks, "markov_rank": self.markov_rank}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_whole(folder / DRAFTER_FILE, save(tensors, {"format": _FORMAT, "drafter": json.dumps(shape)}))

    @classmethod
    def load(cls, name: str, **options: Any) -> Drafter:
        """Load what `save` has written."""
        try:
            path = cached_file(name, DRAFTER_FILE, **options)
        except OSError as error:
            reason = str(error).strip().splitlines()[0]
            raise OSError(
                f"A lossless adapter must have its drafter beside it, got {name} without {DRAFTER_FILE} ({reason}). "
                "Save the adapter by `CLLMTrainer.save_model`, or by `save_pretrained` of a model that drafts, or "
                "copy that file from where it was saved."
            ) from error
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{DRAFTER_FILE} of {name} is damaged ({error}). Save or download it again.") from error
        if metadata.get("format") != _FORMAT:
            raise ValueError(
                f"{DRAFTER_FILE} of {name} must have format {_FORMAT}, got {metadata.get('format')!r}. Update cllm_hf."
            )
        shape = json.loads(metadata["drafter"])
        vocab_size = len(tensors["previous.weight"]) if shape["markov_rank"] else 0
        drafter = cls(vocab_size, tensors["masks"].shape[1], **shape)
        drafter.load_state_dict(tensors)
        return drafter


def make_drafter(model: PreTrainedModel, num_masks: int, markov_rank: int) -> Drafter:
    """Make a new drafter for a model."""
    embeddings: Any = model.get_input_embeddings()
    weight = embeddings.weight
    output_embeddings: Any = model.get_output_embeddings()
    vocab_size = len(output_embeddings.weight)
    ids = torch.linspace(0, len(weight) - 1, min(len(weight), _SAMPLED_EMBEDDINGS), device=weight.device).long()
    with torch.no_grad():
        sample = embeddings(ids).float()  # some models scale them on the way
        drafter = Drafter(vocab_size, sample.shape[-1], num_masks, markov_rank)
        drafter.to(weight.device)
        noise = torch.randn(num_masks, sample.shape[-1]).to(weight.device)
        drafter.masks.copy_(sample.mean(0) + 0.1 * sample.std(0) * noise)
    return drafter


def attach_drafter(
    model: PreTrainedModel, drafter: Drafter, is_trainable: bool = True, adapter_name: str | None = None
) -> None:
    """
    Make a drafter a part of its model. It takes the place of an earlier one of the same adapter, and is saved wherever
    the adapter is.
    """
    drafter.adapter_name = adapter_name or active_lossless_adapter(model) or "default"
    drafter.requires_grad_(is_trainable).to(input_device(model), None if is_trainable else model.dtype)
    others = _drafters_of_others(model, drafter.adapter_name)
    setattr(model, _DRAFTERS, nn.ModuleList([*others, drafter.train(is_trainable)]))
    config: Any = model.peft_config[drafter.adapter_name]
    # PEFT and transformers save the weights of an adapter where its config saves itself.
    config.save_pretrained = functools.partial(_save_together, config, drafter)


def _save_together(config: Any, drafter: Drafter, save_directory: Any, **kwargs: Any) -> None:
    type(config).save_pretrained(config, save_directory, **kwargs)
    drafter.save(Path(save_directory))


def detach_drafter(model: PreTrainedModel, adapter_name: str) -> None:
    """Take the drafter of an adapter out of its model, if there is one."""
    if hasattr(model, _DRAFTERS):
        setattr(model, _DRAFTERS, nn.ModuleList(_drafters_of_others(model, adapter_name)))


@contextmanager
def drafters_aside(model: PreTrainedModel) -> Iterator[None]:
    """
    Take the drafters out of a model until the block ends, such as while transformers looks for weights by their names.
    """
    drafters = getattr(model, _DRAFTERS, None)
    if drafters is not None:
        delattr(model, _DRAFTERS)
    try:
        yield
    finally:
        if drafters is not None:
            setattr(model, _DRAFTERS, drafters)


def _drafters_of_others(model: PreTrainedModel, adapter_name: str) -> list[Drafter]:
    return [drafter for drafter in getattr(model, _DRAFTERS, ()) if drafter.adapter_name != adapter_name]


def find_drafter(model: Any) -> Drafter | None:
    """The drafter of the active adapter of a model."""
    drafters = getattr(model, _DRAFTERS, ())
    name = active_lossless_adapter(model) if len(drafters) else None
    return next((drafter for drafter in drafters if drafter.adapter_name == name), None)


def active_lossless_adapter(model: Any) -> str | None:
    """The name of the active adapter of a model, if it is a lossless one, and alone."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        return None
    layer = next((layer for _, layer in adapter_layers(model)), None)
    active = list(layer.active_adapters) if layer is not None else []
    return active[0] if len(active) == 1 and is_lossless(configs.get(active[0])) else None


def is_lossless(config: Any) -> bool:
    """Whether an adapter drafts for its base model, whose text stays what it is."""
    return getattr(config, "alora_invocation_tokens", None) == NEVER_INVOKED
