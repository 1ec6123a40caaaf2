"""
The gate of a lossless adapter: it acts on the last rows of a forward pass, the drafter's, and on no other.

PEFT's activated LoRA gates a suffix too, by a mask in every layer. Here PEFT's layers are switched off, so that they
run the base weights alone, and a hook on each adds the adapter's part to the last rows. The rows before them are thus
those of the base model to the last bit, nothing is computed for them that is thrown away, and it compiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import linear
from transformers import PreTrainedModel

from .._host import set_adapters_off
from .drafter import Drafter


class AdapterGate:
    """
    Lets the active adapter of a model act on the drafter's rows, while it is `installed`.

    Args:
        model (`transformers.PreTrainedModel`): the model, not wrapped, with the adapter's layers in it.
        drafter (`Drafter`): its mask embeddings are fed in the drafter's rows.

    Raises:
        ValueError: for an adapter of another kind than plain LoRA, several active adapters, or a merged one.
    """

    def __init__(self, model: PreTrainedModel, drafter: Drafter):
        self._model = model
        self._drafter = drafter
        self._layers = adapter_layers(model)
        for name, layer in self._layers.items():
            _check_layer(name, layer)
        self._num_rows = 0
        self._mask_numbers: torch.Tensor | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Switch the adapter off, and gate it, until the block ends."""
        embeddings: Any = self._model.get_input_embeddings()
        handles = [embeddings.register_forward_hook(self._put_masks)]
        was_off = [layer.disable_adapters for layer in self._layers.values()]
        try:
            for layer in self._layers.values():
                set_adapters_off(layer, True)
                handles.append(layer.register_forward_hook(self._add_adapter))
            yield
        finally:
            self.open([])
            for handle in handles:
                handle.remove()
            for layer, is_off in zip(self._layers.values(), was_off):
                set_adapters_off(layer, is_off)

    def open(self, mask_numbers: Sequence[int]) -> None:
        """
        Say which rows of the next forward passes are the drafter's.

        Args:
            mask_numbers (`Sequence[int]`): one number for each of the last rows: of the mask embedding that is fed
                there, from 0 on, or -1 for that of its token. Empty for no such rows.
        """
        self._num_rows = len(mask_numbers)
        device = self._drafter.masks.device
        self._mask_numbers = torch.tensor(mask_numbers, dtype=torch.long).to(device, non_blocking=True)

    def train_dropout(self, is_training: bool) -> None:
        """
        Whether the adapter's own dropout is on, whatever the mode of the model.

        Args:
            is_training (`bool`): whether it is.
        """
        for layer in self._layers.values():
            layer.lora_dropout.train(is_training)

    def _put_masks(self, module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        if not self._num_rows:
            return output
        numbers = self._mask_numbers
        assert numbers is not None
        masks = self._drafter.masks.to(output.dtype)[numbers.clamp(min=0)]
        last = output[:, -self._num_rows :]
        last = torch.where((numbers >= 0)[:, None], masks, last)
        return torch.cat([output[:, : -self._num_rows], last], dim=1)

    def _add_adapter(self, layer: Any, arguments: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        count = self._num_rows
        if not count:
            return output
        inputs = arguments[0]
        if inputs.dim() != 3 or inputs.shape[1] < count:
            raise ValueError(
                "A lossless adapter must be on layers that see each row of a forward pass in its place, got one that "
                f"sees a tensor of shape {tuple(inputs.shape)} in a pass with {count} drafter's rows. Leave such "
                "layers (experts, poolers) out of `target_modules`."
            )
        # Of one adapter alone; `_check_layer` has looked.
        (name,) = layer.active_adapters
        lora_a, lora_b = layer.lora_A[name], layer.lora_B[name]
        # In the dtype of the model: weights in training are float32, and a product in that would take twice as long.
        rows = layer.lora_dropout[name](inputs[:, -count:].to(output.dtype))
        low = linear(rows, lora_a.weight.to(output.dtype))
        added = linear(low, lora_b.weight.to(output.dtype)) * layer.scaling[name]
        if inputs.shape[1] == count:
            return output + added
        if torch.is_grad_enabled():
            return torch.cat([output[:, :-count], output[:, -count:] + added], dim=1)
        output[:, -count:] += added
        return output


def adapter_layers(model: PreTrainedModel) -> dict[str, Any]:
    """
    The layers that PEFT has put adapters into.

    Args:
        model (`transformers.PreTrainedModel`): the model, not wrapped.

    Returns:
        `dict[str, torch.nn.Module]`: by name.
    """
    found = {}
    for name, module in model.named_modules():
        # Every transformers model has methods of the same names.
        if hasattr(module, "active_adapters") and hasattr(module, "disable_adapters"):
            if not isinstance(module, PreTrainedModel):
                found[name] = module
    return found


@contextmanager
def without_adapters(model: PreTrainedModel) -> Iterator[None]:
    """
    Run the base weights alone until the block ends, without touching what takes a gradient.

    Args:
        model (`transformers.PreTrainedModel`): the model, not wrapped.
    """
    layers = list(adapter_layers(model).values())
    was_off = [layer.disable_adapters for layer in layers]
    try:
        for layer in layers:
            set_adapters_off(layer, True)
        yield
    finally:
        for layer, is_off in zip(layers, was_off):
            set_adapters_off(layer, is_off)


def is_switched_off(model: PreTrainedModel) -> bool:
    """
    Whether the adapters of a model are all disabled, as within `disable_adapter()`.

    Args:
        model (`transformers.PreTrainedModel`): the model, not wrapped.

    Returns:
        `bool`: `False` also for a model without adapters.
    """
    layers = list(adapter_layers(model).values())
    return bool(layers) and all(layer.disable_adapters for layer in layers)


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
