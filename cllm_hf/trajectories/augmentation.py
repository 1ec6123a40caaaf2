"""Further states of a block: such of its trajectory in which some wrong tokens have been put right."""

from __future__ import annotations

import numpy as np


def augment_states(trajectory: list[list[int]], length: int, rng: np.random.Generator) -> list[list[int]]:
    """
    Make states with more right tokens after wrong ones than the target model's own states have.

    Let `w_1 < .. < w_m` be the positions where a state differs from the fixed point. Of `w_2 .. w_m`, `floor(m / 2)`
    are drawn, each time from all of them, and get the fixed point's tokens; `w_1` stays wrong, so that no more leading
    tokens are right than before. This is the data augmentation that the code of CLLM (arXiv 2403.00835) has as an
    option. The last two states give none: the fixed point, and the one before it, which is nearly right. Nor does a
    state with one wrong token, and a state that is there already is left out.

    Args:
        trajectory (`list[list[int]]`): states of a block from the first draft to the fixed point, each of shape
            `(block_size,)`.
        length (`int`): tokens of the block that lie in the response; those after are padding and stay as they are.
        rng (`numpy.random.Generator`): of the draws; the same state of it gives the same result.

    Returns:
        `list[list[int]]`: at most one state for each state of the trajectory, all different, none of the trajectory.

    Raises:
        ValueError: if the trajectory is empty or `length` is not between 1 and the block size.
    """
    if not trajectory or not 1 <= length <= len(trajectory[-1]):
        raise ValueError(
            "A trajectory must have at least one state and `length` must be between 1 and its block size, got "
            f"{len(trajectory)} states and `length={length}`. Pass the number of tokens that lie in the response."
        )
    fixed_point = trajectory[-1]
    seen = {tuple(state) for state in trajectory}
    augmented = []
    for state in trajectory[:-2]:
        wrong = [position for position in range(length) if state[position] != fixed_point[position]]
        if len(wrong) < 2:
            continue
        new = list(state)
        for position in rng.choice(wrong[1:], len(wrong) // 2).tolist():
            new[position] = fixed_point[position]
        if tuple(new) not in seen:
            seen.add(tuple(new))
            augmented.append(new)
    return augmented
