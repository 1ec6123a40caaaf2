"""
ShareGPT: chats of all kinds, for the speed of an instruct model on the questions of MT-bench.

    python examples/sharegpt.py all
    python examples/sharegpt.py all --data DIR --set model.name=Qwen/Qwen3-0.6B

The data are `anon8231489123/ShareGPT_Vicuna_unfiltered` and `HuggingFaceH4/mt_bench_prompts` from the Hub, or a folder
with `train.json` (a list of objects with `conversations`, a list of `{"from": "human" or "gpt", "value": ..}`) and
`test.jsonl` (an object a line with the questions as a list in `prompt` or `turns`). First turns only. No answer is
right or wrong here, so the report is on speed alone.
"""

import reprlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import load_dataset
from huggingface_hub import hf_hub_download
from tasks.command import main
from tasks.data import read_json_rows
from tasks.task import Problem, Task, task_option


@dataclass
class ShareGPT(Task):
    """Chats without a metric."""

    name = "sharegpt"
    title = "ShareGPT, measured on MT-bench's questions"
    source = "anon8231489123/ShareGPT_Vicuna_unfiltered"
    license = "apache-2.0"

    chat: bool = task_option(True, "whether prompts are chat messages, for an instruct model")
    max_prompt_chars: int = task_option(2000, "longest question of the training data, in characters")

    def load(self, split: str) -> list[Problem]:
        """Load first turns: of ShareGPT for `"train"`, of MT-bench for `"test"`."""
        if split == "test":
            return [self._problem(question, "") for question in self._questions()]
        turns = (first_turn(chat.get("conversations") or []) for chat in self._chats())
        return [self._problem(*turn) for turn in turns if turn and len(turn[0]) <= self.max_prompt_chars]

    def _chats(self) -> list[dict[str, Any]]:
        path = None if self.data is None else Path(self.data) / "train.json"
        if path is None:
            path = Path(hf_hub_download(self.source, "ShareGPT_V3_unfiltered_cleaned_split.json", repo_type="dataset"))
        return read_json_rows(path)

    def _questions(self) -> list[str]:
        if self.data is None:
            rows = list(load_dataset("HuggingFaceH4/mt_bench_prompts", split="train"))
        else:
            rows = read_json_rows(Path(self.data) / "test.jsonl")
        found = [row.get("prompt") or row.get("turns") for row in rows]
        for row, turns in zip(rows, found):
            if not (isinstance(turns, list) and turns and isinstance(turns[0], str)):
                raise ValueError(f"A question must be a list of texts in `prompt` or `turns`, got {row!r:.60}.")
        return [turns[0].strip() for turns in found]

    def _problem(self, question: str, answer: str) -> Problem:
        return Problem([{"role": "user", "content": question}] if self.chat else f"{question}\n", answer)


def first_turn(conversation: list[dict[str, str]]) -> tuple[str, str] | None:
    """The first question and its answer; `None` if a chat begins otherwise."""
    is_chat = isinstance(conversation, list) and all(isinstance(turn, dict) for turn in conversation[:2])
    if not is_chat or not all(isinstance(turn.get("value") or "", str) for turn in conversation[:2]):
        raise ValueError(
            "`conversations` must be a list of objects with texts in `from` and `value`, got "
            f"{reprlib.repr(conversation)}."
        )
    if len(conversation) < 2 or tuple(turn.get("from") for turn in conversation[:2]) != ("human", "gpt"):
        return None
    question, answer = ((turn.get("value") or "").strip() for turn in conversation[:2])
    return (question, answer) if question and answer else None


if __name__ == "__main__":
    sys.exit(main(ShareGPT, Path(__file__).parent / "configs" / "sharegpt-gpu.yaml"))
