"""What belongs to one task: its problems, and what answers to them are worth."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from cllm_hf.evaluation.judgements import Judgement


@dataclass(frozen=True)
class Problem:
    """
    A prompt and what a good answer to it is.

    Attributes:
        prompt (`str` or `list[dict[str, str]]`): text, or chat messages (`{"role": .., "content": ..}`).
        response (`str`): the answer that the data have, which the target model is trained on.
        reference (`Any`): what `Task.judge` needs beside.
    """

    prompt: str | list[dict[str, str]]
    response: str
    reference: Any = None


def task_option(default: Any, help: str) -> Any:
    """
    Declare an option of a task, a field of its dataclass.

    Args:
        default (`Any`): its default.
        help (`str`): what it means, for `--help`.

    Returns:
        A field of a dataclass.
    """
    return field(default=default, metadata={"help": help})


@dataclass
class Task:
    """
    A task. A subclass is a dataclass whose fields are its options, and has a `name`, a `title` and `load`.

    Attributes:
        name (`str`): in one word, for folders.
        title (`str`): for the report.
        source (`str`, *optional*): where the prompts are from, such as `"openai/gsm8k"`, for the dataset card.
        license (`str`, *optional*): of the prompts, for the dataset card.
        places (`tuple[str, ...]`): options that only say where something is. A run goes on when data have moved.
        data (`str`, *optional*): local folder with the data; by default they are loaded from the Hub.
        seed (`int`): of what is random in the data.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str | None] = None
    license: ClassVar[str | None] = None
    places: ClassVar[tuple[str, ...]] = ("data",)

    data: str | None = task_option(None, "local folder with the data; by default they are from the Hub")
    seed: int = task_option(0, "of what is random in the data")

    def load(self, split: str) -> list[Problem]:
        """
        Load the problems of a split. No problem may be in both.

        Args:
            split (`str`): `"train"` or `"test"`.

        Returns:
            `list[Problem]`.

        Raises:
            OSError: if the data cannot be read.
            ValueError: if they are not of the task's format.
        """
        raise NotImplementedError(f"{type(self).__name__} must have a method `load`.")

    def judge(self, responses: list[str], problems: Sequence[Problem]) -> list[Judgement] | None:
        """
        Say which answers are right. Without this method a task has no metric, and its report is on speed alone.

        Args:
            responses (`list[str]`): answers, without special tokens.
            problems (`Sequence[Problem]`): what they answer.

        Returns:
            `list[Judgement]`: of each, or `None`.
        """
        return None

    @property
    def judged_by(self) -> str | None:
        """`str`, *optional*: which of several metrics judges, where that depends on the data."""
        return None

    @property
    def has_metric(self) -> bool:
        """`bool`: whether answers can be judged."""
        return type(self).judge is not Task.judge


def fingerprint_problems(problems: Sequence[Problem]) -> str:
    """
    A short name for a list of problems, which another list does not have.

    Args:
        problems (`Sequence[Problem]`): the problems.

    Returns:
        `str`: their number and 12 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for problem in problems:
        values = [problem.prompt, problem.response, problem.reference]
        # Of what JSON does not hold, the kind: its text may differ from one process to the next.
        digest.update(json.dumps(values, skipkeys=True, default=lambda value: type(value).__name__).encode())
    return f"{len(problems)} problems, {digest.hexdigest()[:12]}"
