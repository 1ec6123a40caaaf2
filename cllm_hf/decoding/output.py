"""What `generate(decoding="jacobi", return_dict_in_generate=True)` returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers.generation import GenerateDecoderOnlyOutput


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
    Output of Jacobi decoding: the host's `GenerateDecoderOnlyOutput` with statistics.

    Attributes:
        sequences (`torch.LongTensor` of shape `(batch_size, sequence_length)`): prompt and generated tokens; rows that
            ended early are padded on the right.
        past_key_values (`transformers.Cache` or `None`): for one row, the cache of all tokens but the last, as the
            host returns it. `None` for a batch, whose rows leave the cache as they finish, and for recurrent states,
            which may lag behind the text.
        jacobi_stats (`JacobiStats`): forward passes and accepted tokens of this call. An attribute alone, not among
            the items: models that decode a recording piece by piece (Whisper) split every item by rows.
    """

    def __init__(self, *args: Any, jacobi_stats: JacobiStats | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.jacobi_stats = jacobi_stats

    def __getitem__(self, key: Any) -> Any:
        return self.jacobi_stats if key == "jacobi_stats" else super().__getitem__(key)
