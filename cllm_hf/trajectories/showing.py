"""The same block of several models, decoded from one prompt, as a picture of their trajectories."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..files import check_writable_file, write_whole
from ..options import as_integer
from .block import BlockTrajectory
from .builder import TrajectoryBuilder
from .cleaning import CleaningRules
from .inspection import format_blocks, indented
from .prompts import Prompt


KEEP_ALL = CleaningRules(max_token_run=None, max_sentence_repeats=None, drop_empty=False)


@dataclass(frozen=True)
class TrajectoryPicture:
    """
    How a block converges, as `draw_trajectories` found it. A notebook shows it as a picture, `print` as text.

    Attributes:
        prompt (`str`): what the models have answered.
        blocks (`Sequence[BlockTrajectory]`): the block of each model, by its `name`.
        decode (`Callable[[int], str]`): gives the text of a token.
    """

    prompt: str
    blocks: Sequence[BlockTrajectory]
    decode: Callable[[int], str]

    @property
    def title(self) -> str:
        """Which block it is, and which tokens of the response; both counted from 0, as in a record."""
        block = max(self.blocks, key=lambda block: len(block.states[-1]))
        return f"Block {block.number}, {block.span} of the response"

    def format(self, color: bool = True, width: int | None = None) -> str:
        """
        Draw it for a terminal.

        Args:
            color (`bool`): whether right tokens are blue and wrong ones red; otherwise wrong ones stand in brackets.
            width (`int`, *optional*): columns of the terminal; by default those of the present one.

        Returns:
            `str`.
        """
        how = "blue, wrong ones red" if color else "bare, wrong ones in brackets"
        return "\n\n".join(
            [
                f"Prompt:\n{indented(self.prompt)}",
                f"{self.title}. A line a state, from the first draft to the fixed point; right tokens are {how}.",
                format_blocks(self.blocks, self.decode, color, width),
            ]
        )

    def __str__(self) -> str:
        return self.format(color=False)

    def to_png(self) -> bytes:
        """
        Draw it as a PNG file; see `cllm_hf.trajectories.picture.draw_blocks`.

        Returns:
            `bytes`.
        """
        from .picture import draw_blocks

        return draw_blocks(self.blocks, self.decode, self.title, f"Prompt: {self.prompt}")

    _repr_png_ = to_png

    def save(self, path: str | Path) -> None:
        """
        Write it into a PNG file.

        Args:
            path (`str` or `pathlib.Path`): the file.

        Raises:
            OSError: if it cannot be written.
        """
        path = Path(path)
        check_writable_file(path)
        write_whole(path, self.to_png())


def draw_trajectories(
    models: Mapping[str, PreTrainedModel],
    processing_class: PreTrainedTokenizerBase,
    prompt: Prompt,
    block_size: int = 16,
    block: int = 0,
    max_new_tokens: int | None = None,
    seed: int = 0,
) -> TrajectoryPicture:
    """
    Decode a prompt by Jacobi with several models, such as a target model and the CLLM made from it, and draw how one
    block of each converges (CLLM, arXiv 2403.00835, figure 1).

    Trajectories are those of `TrajectoryBuilder`: they begin with the same draft, and the context of a block is the
    model's own response before it. So right tokens are those of the model's own fixed point.

    Args:
        models (`Mapping[str, transformers.PreTrainedModel]`): by their names in the picture, in its order, such as
            `{"target model": .., "CLLM": ..}`.
        processing_class (`transformers.PreTrainedTokenizerBase`): their tokenizer.
        prompt (`str`, `list[dict]` or `list[int]`): text, chat messages or token ids.
        block_size (`int`): tokens of a block.
        block (`int`): number of the block in the response, from 0.
        max_new_tokens (`int`, *optional*): longest response, in tokens; by default it ends with the block.
        seed (`int`): of the first draft.

    Returns:
        `TrajectoryPicture`: `picture.save("file.png")`, `print(picture)`, or the last value of a cell of a notebook.

    Raises:
        ValueError: if there is no model, for an option out of range, an empty or too long prompt, a response that has
            fewer blocks or is not greedy in this one, or a model whose blocks cannot be packed.
    """
    if not models:
        raise ValueError("`models` must hold at least one model, got none.")
    found = [
        collect_block(model, processing_class, prompt, name, block_size, block, max_new_tokens, seed)
        for name, model in models.items()
    ]
    return TrajectoryPicture(found[0][0], [one for _, one in found], token_decoder(processing_class))


def collect_block(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    prompt: Prompt,
    name: str,
    block_size: int = 16,
    block: int = 0,
    max_new_tokens: int | None = None,
    seed: int = 0,
) -> tuple[str, BlockTrajectory]:
    """
    Decode a prompt and collect the trajectory of one block of the response.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): the model.
        processing_class (`transformers.PreTrainedTokenizerBase`): its tokenizer.
        prompt (`str`, `list[dict]` or `list[int]`): text, chat messages or token ids.
        name (`str`): what the model is called.
        block_size (`int`): tokens of a block.
        block (`int`): number of the block in the response, from 0.
        max_new_tokens (`int`, *optional*): longest response, in tokens; by default it ends with the block.
        seed (`int`): of the first draft.

    Returns:
        `tuple[str, BlockTrajectory]`: the text of the prompt, and the block.

    Raises:
        ValueError: as `draw_trajectories`.
    """
    number = as_integer(block)
    if number is None or number < 0:
        raise ValueError(f"`block` must be an integer of at least 0, got {block!r}.")
    longest = (number + 1) * block_size if max_new_tokens is None else max_new_tokens
    builder = TrajectoryBuilder(
        model,
        processing_class,
        block_size,
        longest,
        seed,
        cleaning=KEEP_ALL,  # whatever the model says
        not_greedy="keep",
        show_progress=False,
    )
    try:
        record: dict[str, Any] = builder.build([prompt])[0]
    except ValueError as error:
        if builder.counts["empty_prompt"]:
            raise ValueError("`prompt` must have at least one token, got none. Write one.") from error
        if builder.counts["long_prompt"]:
            raise ValueError(
                f"`prompt` and {longest} tokens of a response must fit into the positions of the model, got too many "
                f"for {name}. Choose an earlier block, or a shorter prompt."
            ) from error
        raise
    blocks = len(record["states"])
    if block >= blocks:
        ends = "" if max_new_tokens is None else f" of at most {max_new_tokens} tokens"
        raise ValueError(
            f"`block` must be from 0 to {blocks - 1}, the blocks of the response of {name}{ends}, got {block}. Choose "
            "one of those."
        )
    found = BlockTrajectory.of(record, block, name)
    if not found.is_trajectory:
        raise ValueError(
            f"Block {block} of the response of {name} has no trajectory: two tokens there are equally good but for "
            "rounding. Choose another block, or load the model in float32."
        )
    return record["prompt"], found


def token_decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], str]:
    """
    Make what gives the text of a token.

    Args:
        tokenizer (`transformers.PreTrainedTokenizerBase`): the tokenizer.

    Returns:
        `Callable[[int], str]`.
    """
    return lambda token: str(tokenizer.decode([token]))
