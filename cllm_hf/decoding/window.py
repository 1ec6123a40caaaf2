"""The model's side of the loop: what is fed in each forward, and the cache, mask and positions that go with it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel

from .._host import PLAIN_ATTENTION
from . import caches
from .blocks import draw_context_tokens, next_draft


# Tensors that grow with the sequence and are extended here. Any other would be misaligned after the prefill.
_EXTENDED_INPUTS = ("attention_mask", "position_ids", "token_type_ids", "inputs_embeds")
# The output does not depend on the first guess, only the number of forwards does: keep that repeatable.
_DRAFT_SEED = 0


class Window:
    """
    The sliding window: for each row the committed tokens that the model has not seen yet, and the draft behind them.

    Args:
        model (`transformers.PreTrainedModel`): the model to call.
        input_ids (`torch.LongTensor` of shape `(batch_size, prompt_length)`): prompts, padded on the left.
        block_size (`int`): positions checked in a forward.
        num_given (`int`, *optional*): length of the prompt with its cached part, where `input_ids` holds only the
            part that is new.
        is_user_cache (`bool`): whether `past_key_values` comes from the user. A batch then works on a copy, since its
            rows leave the cache as they finish.
        model_kwargs (`dict`): model inputs as the host prepared them.

    Attributes:
        rows (`list[int]`): rows of the batch that are still decoded.
        draft_ids (`torch.LongTensor` of shape `(num_rows, draft_length)`): the current guess of what follows.
        cache (`transformers.Cache`): keys and values of what the model has seen.
        num_prompt (`int`): length of the prompt, cached tokens included.

    Raises:
        ValueError: for a cache that cannot be rolled back, a model input that cannot be extended, or
            `past_key_values` that already hold the whole prompt.
    """

    def __init__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        block_size: int,
        num_given: int | None,
        is_user_cache: bool,
        model_kwargs: dict[str, Any],
    ):
        check_model_inputs(model, model_kwargs, input_ids.shape[0])
        self.model = model
        self.rows = list(range(input_ids.shape[0]))
        self.cache = caches.check_cache(model_kwargs.pop("past_key_values", None), input_ids.shape[0])
        if is_user_cache and input_ids.shape[0] > 1:
            self.cache = caches.copy_cache(self.cache)
        inputs = {name: model_kwargs.pop(name, None) for name in _EXTENDED_INPUTS}
        self._keeps_logits = model_kwargs.pop("logits_to_keep", None) is not None
        self._kwargs = model_kwargs

        embeds = inputs["inputs_embeds"]
        num_prompt = input_ids.shape[1] if embeds is None else embeds.shape[1]
        num_cached = self.cache.get_seq_length()
        num_new = num_prompt - num_cached if num_given in (None, num_prompt) else num_prompt
        if num_new < 1:
            raise ValueError(
                f"`past_key_values` already hold {num_cached} tokens and the prompt has {num_prompt}: nothing is left "
                "to feed. Pass at least one token that is not in the cache, or crop the cache."
            )
        self.num_prompt = num_cached + num_new
        # What is fed next, one column a token that the model has not seen. After the prefill: the anchor alone.
        self._new_ids = input_ids[:, -num_new:]
        self._new_embeds = None if embeds is None else embeds[:, -num_new:]
        self._new_positions = _last_columns(inputs["position_ids"], num_new, len(self.rows))
        self._new_token_types = _last_columns(inputs["token_type_ids"], num_new, len(self.rows))
        self._mask = inputs["attention_mask"]  # of cached and new columns; `None` while there is no padding
        self._fed_draft_length = 0
        self._is_prefill = True

        self._filler_ids = input_ids.new_empty((len(self.rows), 0))
        if embeds is None:
            self._draw_filler(input_ids, None if self._mask is None else self._mask[:, -num_prompt:], block_size - 1)
        self._draft_length = block_size - 1
        # Token ids cannot follow a prompt of embeddings, so that the prefill then goes without a draft.
        self.draft_ids = self._filler_ids

    def forward(self, draft_ids: torch.Tensor) -> torch.Tensor:
        """
        Run the model over what it has not seen and a draft.

        Args:
            draft_ids (`torch.LongTensor` of shape `(num_rows, draft_length)`): the leading part of `self.draft_ids`.

        Returns:
            `torch.Tensor` of shape `(num_rows, draft_length + 1, vocab_size)`: logits from the anchor on.
        """
        draft_length = self._fed_draft_length = draft_ids.shape[1]
        kwargs = dict(self._kwargs)
        if self._keeps_logits:
            kwargs["logits_to_keep"] = draft_length + 1
        if self._new_positions is not None:
            ahead = torch.arange(1, draft_length + 1, device=self._new_positions.device)
            kwargs["position_ids"] = torch.cat([self._new_positions, self._new_positions[:, -1:] + ahead], dim=1)
        if self._new_token_types is not None:
            ahead = self._new_token_types[:, -1:].expand(-1, draft_length)
            kwargs["token_type_ids"] = torch.cat([self._new_token_types, ahead], dim=1)
        if self._mask is not None:
            self._mask = _append_ones(self._mask, draft_length)
            kwargs["attention_mask"] = self._mask
        if self._new_embeds is not None:
            kwargs["inputs_embeds"] = self._new_embeds
        inputs = self.model.prepare_inputs_for_generation(
            torch.cat([self._new_ids, draft_ids], dim=1),
            past_key_values=self.cache,
            is_first_iteration=self._is_prefill,
            **kwargs,
        )
        return self.model(**inputs, return_dict=True).logits[:, -(draft_length + 1) :]

    def advance(self, predicted_ids: torch.Tensor, counts: list[int], finished: list[bool]) -> None:
        """
        Slide each row's window behind its committed tokens, let go of rejected tokens and of finished rows.

        Args:
            predicted_ids (`torch.LongTensor` of shape `(num_rows, draft_length + 1)`): tokens of the last forward.
            counts (`list[int]`): how many of them were committed in each row.
            finished (`list[bool]`): which of the rows take no more tokens.

        Raises:
            ValueError: if the forward has shown that the cache cannot be rolled back.
        """
        if self._is_prefill:
            caches.check_cache(self.cache, len(self.rows))  # layers are made by the first forward
        left = [index for index, is_finished in enumerate(finished) if not is_finished]
        if left and len(left) < len(self.rows):
            self._select(torch.tensor(left, device=predicted_ids.device), left)
            predicted_ids, counts = predicted_ids[left], [counts[index] for index in left]
        # The bonus token was committed but not fed: a row that took all tokens has rejected none.
        self._roll_back([self._fed_draft_length + 1 - count for count in counts])
        if not left:
            self.rows = []
            return
        committed = torch.tensor(counts, device=predicted_ids.device)
        self._new_ids = predicted_ids.gather(1, committed[:, None] - 1)
        if self._new_positions is not None:
            self._new_positions = self._new_positions[:, -1:] + committed[:, None].to(self._new_positions.device)
        if self._new_token_types is not None:
            self._new_token_types = self._new_token_types[:, -1:]
        if self._new_embeds is not None:
            self._new_embeds = None
            self._draw_filler(predicted_ids, None, self._draft_length)
        if self._mask is not None:
            self._mask = _append_ones(self._mask, 1)
        self.draft_ids = next_draft(predicted_ids, committed, self._filler_ids)
        self._is_prefill = False

    def _roll_back(self, num_rejected: list[int]) -> None:
        if self._mask is None and min(num_rejected) < max(num_rejected):
            self._mask = self._new_ids.new_ones((len(num_rejected), self.cache.get_seq_length()))
        if self._mask is not None:
            self._mask = caches.roll_back_columns(self._mask, num_rejected, fill=0)
        caches.roll_back(self.cache, num_rejected)

    def _select(self, indices: torch.Tensor, left: list[int]) -> None:
        self.rows = [self.rows[index] for index in left]
        self.cache.batch_select_indices(indices)
        for name in ("_mask", "_new_positions", "_new_token_types", "_new_embeds", "_filler_ids"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value[indices.to(value.device)])

    def _draw_filler(self, context_ids: torch.Tensor, context_mask: torch.Tensor | None, num_tokens: int) -> None:
        if context_mask is None:
            context_mask = torch.ones_like(context_ids)
        # A row that is all padding has no context to draw from, but any guess will do.
        context_mask = torch.where(context_mask.any(-1, keepdim=True), context_mask, 1)
        generator = torch.Generator().manual_seed(_DRAFT_SEED)
        self._filler_ids = draw_context_tokens(context_ids, context_mask, num_tokens, generator)


def check_model_inputs(model: PreTrainedModel, model_kwargs: dict[str, Any], batch_size: int) -> None:
    """
    Refuse models and inputs that the window would misalign.

    Args:
        model (`transformers.PreTrainedModel`): the model to decode.
        model_kwargs (`dict`): model inputs as the host prepared them.
        batch_size (`int`): number of rows.

    Raises:
        ValueError: for other attention than full and sliding, positions of more than one dimension, tensors that
            belong to the prompt alone (images and the like), or a batch for a model without an attention mask.
    """
    remedy = 'Pass `decoding="autoregressive"` for it.'
    layer_types = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if not layer_types <= PLAIN_ATTENTION:
        unknown = ", ".join(sorted(layer_types - PLAIN_ATTENTION))
        raise ValueError(f'`decoding="jacobi"` does not support layers of type {unknown} yet. {remedy}')
    positions = model_kwargs.get("position_ids")
    if positions is not None and positions.dim() != 2:
        raise ValueError(
            f'`decoding="jacobi"` needs `position_ids` of two dimensions, got shape {tuple(positions.shape)}. {remedy}'
        )
    others = [
        name
        for name, value in model_kwargs.items()
        if isinstance(value, torch.Tensor) and name not in _EXTENDED_INPUTS
    ]
    if others:
        raise ValueError(f'`decoding="jacobi"` does not support the model input `{others[0]}` yet. {remedy}')
    if batch_size > 1 and "attention_mask" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"{type(model).__name__} takes no `attention_mask`, so that its rows must be decoded one by one, got a "
            f"batch of {batch_size}. {remedy}"
        )


def check_positions(model: PreTrainedModel, num_positions: int) -> None:
    """
    Refuse positions whose rotation depends on how far a forward reaches, and so on the draft.

    Args:
        model (`transformers.PreTrainedModel`): the model to decode.
        num_positions (`int`): positions that prompt and response may take.

    Raises:
        ValueError: for dynamic and long rotary embeddings beyond the length that the model was first trained for.
    """
    config = model.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    for entry in [parameters, *(value for value in parameters.values() if isinstance(value, dict))]:
        if entry.get("rope_type") in ("dynamic", "longrope"):
            original = entry.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", config.max_position_embeddings
            )
            if num_positions > original:
                raise ValueError(
                    f'`decoding="jacobi"` supports rotary embeddings of type {entry["rope_type"]} up to {original} '
                    f'positions, got {num_positions}. Lower `max_new_tokens` or pass `decoding="autoregressive"`.'
                )


def _last_columns(values: torch.Tensor | None, length: int, batch_size: int) -> torch.Tensor | None:
    return None if values is None else values[:, -length:].expand(batch_size, -1)


def _append_ones(mask: torch.Tensor, length: int) -> torch.Tensor:
    return torch.cat([mask, mask.new_ones((mask.shape[0], length))], dim=1)
