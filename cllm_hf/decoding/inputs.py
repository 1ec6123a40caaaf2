"""Model inputs that grow with the text: which of them a call has, and in which form they can be extended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel


# Types of tokens that say only where an image or a sound stands: 0 for text.
_MODAL_TYPES = ("mm_token_type_ids", "moe_mm_token_type_ids")


@dataclass(frozen=True)
class GrowingInputs:
    """Inputs of a call that grow with the text, as transformers prepared them."""

    prefix: str  # stands before the names of mask and positions
    mask: torch.Tensor | None  # (batch_size, length): attention mask
    positions: torch.Tensor | None  # (batch_size or 1, length): positions
    # how many axes the model counts positions along (time, height and width of an image); 0 where positions have no
    # such dimension. Along all of them text has the same ones
    num_axes: int
    token_types: torch.Tensor | None  # (batch_size, length): types of tokens
    zeros: tuple[str, ...]  # inputs that are 0 at every token of a text
    embeds: torch.Tensor | None  # (batch_size, length, hidden_size): the prompt, where it comes as embeddings

    @classmethod
    def taken_from(cls, model: PreTrainedModel, model_kwargs: dict[str, Any]) -> GrowingInputs:
        """Take them out of the inputs of a call."""
        prefix = "decoder_" if model.config.is_encoder_decoder else ""
        names = (prefix + "attention_mask", prefix + "position_ids", "token_type_ids", "inputs_embeds")
        mask, positions, token_types, embeds = (model_kwargs.pop(name, None) for name in names)
        zeros = tuple(name for name in _MODAL_TYPES if _is_zero(model_kwargs.get(name)))
        for name in zeros:
            del model_kwargs[name]
        num_axes = 0
        if positions is not None and positions.dim() == 3:
            num_axes, positions = len(positions), _on_one_axis(positions, mask)
        return cls(prefix, mask, positions, num_axes, token_types, zeros, embeds)

    def on_all_axes(self, positions: torch.Tensor) -> torch.Tensor:
        """Positions in the form that the model takes."""
        return positions.expand(self.num_axes, -1, -1) if self.num_axes else positions


def _is_zero(values: Any) -> bool:
    return isinstance(values, torch.Tensor) and not bool(values.any())


def _on_one_axis(positions: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    first = positions[0]
    differs = (positions != first).any(dim=0)
    if mask is not None:
        differs = differs & mask[:, mask.shape[1] - first.shape[1] :].bool()  # padding stands anywhere
    if differs.any():
        raise ValueError(
            f'`decoding="jacobi"` supports positions of text, which are the same along each of {len(positions)} axes, '
            "got others, as an image has them. Leave images and videos out, or pass "
            '`decoding="autoregressive"`.'
        )
    return first
