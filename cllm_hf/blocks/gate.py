"""
The gate of a lossless adapter: it acts on the last rows of a forward pass, the drafter's, and on no other.

PEFT's activated LoRA gates a suffix too, by a mask in every layer, on which a device has to be waited for. Here a
function stands in for PEFT's layers, which runs the base weights and adds the adapter's part to the last rows. The
rows before them are thus those of the base model to the last bit, nothing is computed that is thrown away, and it
compiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from .._host import adapter_layers, has_hooks, without_alora_hooks
from .drafter import NEVER_INVOKED, Drafter, is_lossless


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
            self.open([])
            handle.remove()
            for config in configs:
                config.alora_invocation_tokens = list(NEVER_INVOKED)

    def open(self, mask_numbers: Sequence[int]) -> None:
        """Say which rows of the next forward passes are the drafter's."""
        if self._mask_numbers is None or list(mask_numbers) != self._given:  # a compiled graph likes the same tensor
            device = self._drafter.masks.device
            self._mask_numbers = torch.tensor(mask_numbers, dtype=torch.long).to(device, non_blocking=True)
        self._num_rows, self._given = len(mask_numbers), list(mask_numbers)

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
