"""
A lossless adapter: what it has beside its LoRA weights, and the gate by which it acts on the drafter's rows alone.

The adapter drafts tokens that nothing is known of yet. What is fed in their place is a learned embedding for each
distance; and since no such place has seen the token before it, a low-rank term of that token is added to its logits.

The gate opens for the last rows of a forward pass, the drafter's, and for no other. PEFT's activated LoRA gates a
suffix too, by a mask in every layer, on which a device has to be waited for. Here a function stands in for PEFT's
layers, which runs the base weights and adds the adapter's part to the last rows. The rows before them are thus those
of the base model to the last bit, nothing is computed that is thrown away, and it compiles.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from torch.nn.functional import embedding, linear, pad
from transformers import PreTrainedModel
from transformers.utils import cached_file

from .._host import adapter_layers, has_hooks, input_device, without_alora_hooks
from ..files import write_whole


DRAFTER_FILE = "drafter.safetensors"
# Under this name the drafters of all lossless adapters of a model are a part of it.
_DRAFTERS = "cllm_drafter"
# A lossless adapter is saved as an activated LoRA that no token ever activates: to PEFT, and to whoever does not know
# of drafting, the model with it is the base model.
NEVER_INVOKED = [-1]
_FORMAT = "1"
_SAMPLED_EMBEDDINGS = 1024
# Which thread runs a model with drafters: not an attribute of it, which would be copied and saved with it.
_LOCKS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_LOCKS_OF_MODELS = Lock()


class Drafter(nn.Module):
    """
    The weights by which a lossless adapter drafts, beside those of LoRA.

    `masks`, `[num_masks, hidden_size]`, is what is fed for the first, second, ... token after the text, before
    anything is known of it. A `markov_rank` of 0 is for no Markov head.
    """

    adapter_name = "default"  # the adapter of the model that it belongs to

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
        """Tell logits `[..., vocab_size]` which token `[...]` stands before theirs: `logits + W2 W1[previous]`."""
        if not self.markov_rank:
            return logits
        known = previous_ids.clamp(max=self.vocab_size - 1)  # a table of embeddings may be longer than the logits
        previous = embedding(known, self.previous.weight).to(logits.dtype)
        added = linear(previous, self.following.weight.to(logits.dtype))
        missing = logits.shape[-1] - self.vocab_size  # of a model whose embeddings were resized since
        return logits + (pad(added, (0, missing)) if missing else added)

    def save(self, folder: Path) -> None:
        shape = {"num_masks": self.num_masks, "markov_rank": self.markov_rank}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_whole(folder / DRAFTER_FILE, save(tensors, {"format": _FORMAT, "drafter": json.dumps(shape)}))

    @classmethod
    def load(cls, name: str, **options: Any) -> Drafter:
        """Load what `save` has written, from the folder or Hub id of an adapter."""
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
    """Make a new drafter for a model: its masks begin at the mean of the model's embeddings, in float32."""
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


def in_turn(model: Any) -> AbstractContextManager[Any]:
    """
    Have threads run a model with drafters one after the other: the gate stands in its layers for all of them alike.
    """
    if not len(getattr(model, _DRAFTERS, ())):
        return nullcontext()
    with _LOCKS_OF_MODELS:
        return _LOCKS.setdefault(model, RLock())


def find_drafter(model: Any) -> Drafter | None:
    """The drafter of the active adapter of a model, if no other one is active beside it."""
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


class AdapterGate:
    """Lets the active adapter of a model act on the drafter's rows, while it is `installed`."""

    def __init__(self, model: PreTrainedModel, drafter: Drafter):
        self._model = model
        self._drafter = drafter
        self._layers = dict(adapter_layers(model))
        for name, layer in self._layers.items():
            _check_layer(name, layer)
        self._num_rows = 0
        self._given: list[int] = []
        self._mask_numbers: torch.Tensor | None = None
        self._shape: tuple[int, ...] = ()  # rows of the batch and columns that are fed

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Gate the adapter until the block ends."""
        embeddings: Any = self._model.get_input_embeddings()
        handle = embeddings.register_forward_hook(self._put_masks)
        configs = [config for config in getattr(self._model, "peft_config", {}).values() if is_lossless(config)]
        try:
            for config in configs:
                # Or PEFT would look for what invokes it, in vain, and leave hooks for that in a training.
                config.alora_invocation_tokens = None
            layers = list(self._layers.values())
            with without_alora_hooks(layers), _replaced_forwards({layer: self._gated(layer) for layer in layers}):
                yield
        finally:
            self.close()
            handle.remove()
            for config in configs:
                config.alora_invocation_tokens = list(NEVER_INVOKED)

    def open(self, mask_numbers: Sequence[int]) -> None:
        """
        Say which rows of the next forward passes are the drafter's: as many of the last ones as there are numbers of
        mask embeddings, which are fed there in place of a token's. None for no such rows.
        """
        if self._mask_numbers is None or list(mask_numbers) != self._given:  # a compiled graph likes the same tensor
            device = self._drafter.masks.device
            self._mask_numbers = torch.tensor(mask_numbers, dtype=torch.long).to(device, non_blocking=True)
        self._num_rows, self._given = len(mask_numbers), list(mask_numbers)

    def close(self) -> None:
        """Let the adapter act on no rows until the gate is opened again."""
        self._num_rows = 0

    def train_dropout(self, is_training: bool) -> None:
        """Whether the adapter's own dropout is on, whatever the mode of the model."""
        for layer in self._layers.values():
            layer.lora_dropout.train(is_training)

    def _put_masks(self, module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        if not self._num_rows:
            return output
        self._shape = (output.shape[0], output.shape[1])
        masks = self._drafter.masks.to(output.dtype)[self._mask_numbers].expand(len(output), -1, -1)
        return torch.cat([output[:, : -self._num_rows], masks], dim=1)

    def _gated(self, layer: Any) -> Callable[..., torch.Tensor]:
        """What runs in place of a layer of PEFT: the base weights, and for the last rows the adapter's too."""
        (name,) = layer.active_adapters  # of one adapter alone; `_check_layer` has looked
        base, dropout, scaling = layer.get_base_layer(), layer.lora_dropout[name], layer.scaling[name]
        lora_a, lora_b = layer.lora_A[name], layer.lora_B[name]
        is_output = layer is self._model.get_output_embeddings()
        has_own_call = type(base) is not nn.Linear or "forward" in vars(base) or has_hooks(base)

        def forward(inputs: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            # Small models wait for Python more than for products, so that a call less is worth this line.
            output = base(inputs) if has_own_call else linear(inputs, base.weight, base.bias)
            count = self._num_rows
            if not count:
                return output
            # Output embeddings may see the last columns alone.
            shape, fed = inputs.shape, self._shape
            if len(shape) != 3 or shape[0] != fed[0] or shape[1] < count or (shape[1] != fed[1] and not is_output):
                raise ValueError(
                    "A lossless adapter must be on layers that see each row of a forward pass in its place, got one "
                    f"that sees a tensor of shape {tuple(inputs.shape)} in a pass with {count} drafter's rows. Leave "
                    "such layers (experts, poolers) out of `target_modules`."
                )
            # In the dtype of the model: weights in training are float32, in which a product would take twice as long.
            a, b = lora_a.weight.to(output.dtype), lora_b.weight.to(output.dtype)
            # A CPU multiplies a matrix sooner than a stack of them.
            rows = inputs[:, -count:].flatten(0, 1).to(output.dtype)
            if torch.is_grad_enabled():
                low = linear(dropout(rows) if dropout.training else rows, a)
                added = linear(low * scaling, b).view(-1, count, output.shape[-1])
                return torch.cat([output[:, :-count], output[:, -count:] + added], dim=1)
            low = linear(rows, a)
            if len(inputs) == 1:
                output[0, -count:].addmm_(low, b.t(), alpha=scaling)
            else:
                output[:, -count:].add_(linear(low, b).view(-1, count, output.shape[-1]), alpha=scaling)
            return output

        return forward


@contextmanager
def _replaced_forwards(forwards: dict[Any, Callable[..., torch.Tensor]]) -> Iterator[None]:
    """Run other functions in place of modules' own until the block ends."""
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, own in before.items():
            if own is not None:
                module.forward = own
            elif "forward" in vars(module):
                del module.forward


@contextmanager
def without_adapters(model: PreTrainedModel) -> Iterator[None]:
    """Run the base weights alone until the block ends, without touching what takes a gradient."""

    def base_alone(layer: Any) -> Callable[..., torch.Tensor]:
        base = layer.get_base_layer()
        return lambda inputs, *args, **kwargs: base(inputs)

    with _replaced_forwards({layer: base_alone(layer) for _, layer in adapter_layers(model)}):
        yield


def is_switched_off(model: PreTrainedModel) -> bool:
    """Whether the adapters of a model are disabled, as within `disable_adapter()`."""
    layer = next((layer for _, layer in adapter_layers(model)), None)
    return layer is not None and layer.disable_adapters


def _check_layer(name: str, layer: Any) -> None:
    problem = ""
    if not getattr(layer, "lora_A", None):
        problem = "is of another kind"
    elif layer.merged:
        problem = "is merged into the base weights. Unmerge it"
    elif len(layer.active_adapters) != 1 or layer.active_adapters[0] not in layer.lora_A:
        problem = f"is one of several, of which {list(layer.active_adapters)} are active. Activate the lossless one"
    if problem:
        raise ValueError(f"A lossless adapter must be the only active one, and plain LoRA; that of {name} {problem}.")
