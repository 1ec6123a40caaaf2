"""
Sampling as an argmax, so that a sampled text is the fixed point of an iteration like a greedy one.

The token that maximizes `scores + noise`, where every token has noise of its own from a Gumbel distribution, is an
exact sample of `softmax(scores)` (the Gumbel-max trick). Each position of the text gets its noise once. Whatever draft
stands before it in the meantime, in the end it is the sample that decoding one token at a time would have taken.
"""

from __future__ import annotations

import torch


class GumbelNoise:
    """
    One noise vector for each row and each position of the text, drawn in the order of the positions.

    Args:
        seed (`int`): of the generator; the same noise comes from the same seed, number of rows, vocabulary and kind of
            device.
        batch_size (`int`): number of rows.
        first_position (`int`): position that the first vector belongs to.
    """

    def __init__(self, seed: int, batch_size: int, first_position: int):
        self._seed = seed
        self._batch_size = batch_size
        self._next_position = first_position
        self._generator: torch.Generator | None = None
        self._drawn: dict[int, torch.Tensor] = {}

    def at(self, position: int, like: torch.Tensor) -> torch.Tensor:
        """
        The noise of a position.

        Args:
            position (`int`): of the text; not one that was let go.
            like (`torch.FloatTensor` of shape `(..., vocab_size)`): scores that the noise will be added to.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, vocab_size)`.
        """
        if self._generator is None:
            self._generator = torch.Generator(like.device).manual_seed(self._seed)
        while self._next_position <= position:
            # One draw a position: drawing several at once would make the noise depend on the block size.
            noise = torch.empty((self._batch_size, like.shape[-1]), dtype=torch.float32, device=like.device)
            noise.exponential_(generator=self._generator)
            self._drawn[self._next_position] = -noise.clamp(min=torch.finfo(torch.float32).tiny).log()
            self._next_position += 1
        return self._drawn[position]

    def of_blocks(self, rows: list[int], starts: list[int], like: torch.Tensor) -> torch.Tensor:
        """
        The noise of a block in each row.

        Args:
            rows (`list[int]`): rows of the batch.
            starts (`list[int]`): first position of each row's block.
            like (`torch.FloatTensor` of shape `(num_rows, length, vocab_size)`): scores that it will be added to.

        Returns:
            `torch.FloatTensor` of shape `(num_rows, length, vocab_size)`.
        """
        blocks = [
            torch.stack([self.at(start + offset, like)[row] for offset in range(like.shape[1])])
            for row, start in zip(rows, starts)
        ]
        return torch.stack(blocks)

    def let_go(self, position: int) -> None:
        """
        Forget the noise before a position.

        Args:
            position (`int`): the first that is still needed.
        """
        for old in [drawn for drawn in self._drawn if drawn < position]:
            del self._drawn[old]
