"""What a call of `generate` returns: sequences, scores, and statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput

from .strategy import Row


def lay_out_sequences(input_ids: torch.Tensor, rows: list[Row], pad_id: int) -> torch.Tensor:
    """Lay out prompts and committed tokens as transformers does."""
    prompt_length = input_ids.shape[1]
    sequences = input_ids.new_full((len(rows), max(row.length for row in rows)), pad_id)
    sequences[:, :prompt_length] = input_ids
    for number, row in enumerate(rows):
        num_committed = row.length - prompt_length
        committed = row.text[len(row.text) - num_committed :]
        sequences[number, prompt_length : row.length] = torch.tensor(committed, dtype=sequences.dtype)
    return sequences


class TokenScores:
    """Scores and logits of committed tokens, as `output_scores` and `output_logits` ask for them."""

    def __init__(self, names: Sequence[str], batch_size: int):
        # By name and row, `[vocab_size]` for each token.
        self._kept: dict[str, list[list[torch.Tensor]]] = {name: [[] for _ in range(batch_size)] for name in names}

    @classmethod
    def asked_for(cls, config: GenerationConfig, batch_size: int) -> TokenScores | None:
        """For what a call returns; like transformers, nothing without `return_dict_in_generate`."""
        asked = {"scores": config.output_scores, "logits": config.output_logits}
        names = [name for name, is_asked in asked.items() if is_asked and config.return_dict_in_generate]
        return cls(names, batch_size) if names else None

    def add(self, row: Row, places: Sequence[int], **values: torch.Tensor) -> None:
        """Keep those of a row's new tokens: of `scores` and `logits`, `[num_places, vocab_size]`, some places."""
        for name, rows in self._kept.items():
            # A copy: what is computed for the other places is not to stay in memory.
            rows[row.index].extend(values[name][place].to(torch.float32, copy=True) for place in places)

    def result(self) -> dict[str, tuple[torch.Tensor, ...]]:
        """By name, `[batch_size, vocab_size]` for each generated token; zeros after the end of a row."""
        return {name: tuple(map(_stack, zip_longest(*rows))) for name, rows in self._kept.items()}


def _stack(step: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """One tensor of what the rows have, `[vocab_size]` each or nothing."""
    zeros = torch.zeros_like(next(one for one in step if one is not None))
    return torch.stack([zeros if one is None else one for one in step])


@dataclass
class JacobiStats:
    """
    Statistics of one call of `generate(decoding="jacobi")`.

    Attributes:
        num_forwards (`int`): calls of the model, prefill included.
        num_committed (`list[list[int]]`): for each row, the tokens it gained in each forward pass it took part in,
            prefill first. One token of each is the bonus token, the others are accepted draft tokens.
    """

    num_forwards: int = 0
    num_committed: list[list[int]] = field(default_factory=list)

    @property
    def num_iterations(self) -> int:
        """`int`: forward passes after the prefill."""
        return max(self.num_forwards - 1, 0)

    @property
    def num_accepted(self) -> list[list[int]]:
        """`list[list[int]]`: for each row, the draft tokens accepted in each forward pass it took part in."""
        return [[count - 1 for count in row] for row in self.num_committed]

    @property
    def num_generated(self) -> list[int]:
        """`list[int]`: generated tokens of each row, stop token included."""
        return [sum(row) for row in self.num_committed]

    @property
    def tokens_per_forward(self) -> float:
        """`float`: tokens that a row gains in a forward pass in which it takes part; 0.0 for an empty batch."""
        forwards = sum(len(row) for row in self.num_committed)
        return sum(self.num_generated) / forwards if forwards else 0.0


class JacobiOutput(GenerateDecoderOnlyOutput):
    """
    Output of Jacobi decoding: transformers' `GenerateDecoderOnlyOutput` with statistics.

    Attributes:
        sequences (`torch.LongTensor` of shape `(batch_size, sequence_length)`): prompt and generated tokens; rows that
            ended early are padded on the right.
        scores, logits (`tuple(torch.Tensor)` or `None`): with `output_scores` or `output_logits`, for each generated
            token a tensor of shape `(batch_size, vocab_size)` in float32: what the token was chosen by, and the
            model's logits before any processor. Rows that have ended hold zeros.
        past_key_values (`transformers.Cache` or `None`): for one row, the cache of all tokens but the last, as
            transformers returns it. `None` for a batch, whose rows leave the cache as they finish, and for recurrent
            states, which may lag behind the text.
        jacobi_stats (`JacobiStats`): forward passes and accepted tokens of this call. An attribute alone, not among
            the items: models that decode a recording piece by piece (Whisper) split every item by rows.
    """

    # As those of models that have them: they are refused before, so that nothing is ever in them.
    encoder_attentions = encoder_hidden_states = decoder_attentions = decoder_hidden_states = cross_attentions = None

    def __init__(self, *args: Any, jacobi_stats: JacobiStats | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.jacobi_stats = jacobi_stats

    def __getitem__(self, key: Any) -> Any:
        return self.jacobi_stats if key == "jacobi_stats" else super().__getitem__(key)
