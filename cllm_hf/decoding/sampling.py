"""
Sampling as an argmax, so that a sampled text is the fixed point of an iteration like a greedy one.

The token that maximizes `scores + noise`, where every token has noise of its own from a Gumbel distribution, is an
exact sample of `softmax(scores)` (the Gumbel-max trick). Each position of the text gets its noise once. Whatever draft
stands before it in the meantime, in the end it is the sample that decoding one token at a time would have taken.
"""

from __future__ import annotations

import numpy as np
import torch


# Noise that is kept, in bytes, so that it is not drawn again while a position stays in a block.
_KEPT_BYTES = 2**28


class GumbelNoise:
    """One noise vector for each row and each position of the text."""

    def __init__(self, seed: int, batch_size: int):
        self._seed = seed
        self._batch_size = batch_size
        self._generator: torch.Generator | None = None
        self._kept: dict[int, torch.Tensor] = {}

    def at(self, position: int, like: torch.Tensor) -> torch.Tensor:
        """The noise of a position."""
        if position not in self._kept:
            noise = self._exponential(position, like)
            self._kept[position] = -noise.clamp(min=torch.finfo(torch.float32).tiny).log()
            if len(self._kept) > max(_KEPT_BYTES // self._kept[position].nbytes, 1):
                del self._kept[next(iter(self._kept))]
        return self._kept[position]

    def at_places(self, rows: list[int], positions: list[list[int]], like: torch.Tensor) -> torch.Tensor:
        """The noise of several positions in each row."""
        noise = [self.at(place, like)[row] for row, places in zip(rows, positions) for place in places]
        return torch.stack(noise).view(len(rows), -1, like.shape[-1])

    def _exponential(self, position: int, like: torch.Tensor) -> torch.Tensor:
        """Every position has a seed of its own, so that noise can be drawn again in any order."""
        seed, shape = _mix(self._seed, position), (self._batch_size, like.shape[-1])
        if like.device.type == "cpu":
            # torch's own generator reads 32 bits of a seed there.
            generator = np.random.Generator(np.random.Philox(key=seed))
            return torch.from_numpy(generator.standard_exponential(shape, dtype=np.float32))
        if self._generator is None:
            self._generator = torch.Generator(like.device)
        self._generator.manual_seed(seed)
        return torch.empty(shape, device=like.device).exponential_(generator=self._generator)


def _mix(seed: int, position: int) -> int:
    """A seed for a position; nearby pairs have seeds that are nothing alike (the finalizer of SplitMix64)."""
    value = (seed + (position + 1) * 0x9E3779B97F4A7C15) % 2**64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)
