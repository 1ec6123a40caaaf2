"""
GSM8K: grade-school math problems with worked answers.

    python examples/gsm8k.py all --data ../shared/data/gsm8k
    python examples/gsm8k.py all --config examples/configs/gsm8k-gpu.yaml --output-dir runs/gsm8k-gpu

Steps: `sft` (target model), `collect` (its trajectories), `train` (the CLLM), `evaluate` (the table), or `all`. Each
goes on where it was interrupted. The data are `openai/gsm8k` from the Hub, or a folder with `train.jsonl` and
`test.jsonl`, a JSON object with `question` and `answer` a line.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import load_dataset
from tasks.command import main
from tasks.data import read_json_rows
from tasks.task import Problem, Task, task_option

from cllm_hf.evaluation.judgements import Judgement


# What a chat message says after the question. Asked for a format too, small models leave out the steps.
_INSTRUCTION = "Solve this problem step by step."


@dataclass
class GSM8K(Task):
    """The answer is right if its number is; see `metrics.gsm8k_accuracy.gsm8k.judge_gsm8k`."""

    name = "gsm8k"
    title = "GSM8K"
    source = "openai/gsm8k"
    license = "mit"

    chat: bool = task_option(False, "whether prompts are chat messages, for an instruct model")
    # As published. They give a small model the figures of each step a second time, as tokens to look at.
    calculator: bool = task_option(True, "whether to keep the annotations of the data, such as <<48/2=24>>")

    def load(self, split: str) -> list[Problem]:
        """Load the problems of `"train"` or `"test"`."""
        return [self._problem(row["question"].strip(), row["answer"].strip()) for row in self._rows(split)]

    def judge(self, responses: list[str], problems: Sequence[Problem]) -> list[Judgement]:
        """Compare the final numbers."""
        from metrics.gsm8k_accuracy.gsm8k import judge_gsm8k

        return [judge_gsm8k(response, problem.reference) for response, problem in zip(responses, problems)]

    def _rows(self, split: str) -> list[dict[str, str]]:
        if self.data is None:
            return list(load_dataset("openai/gsm8k", "main", split=split))
        return read_json_rows(Path(self.data) / f"{split}.jsonl", ("question", "answer"))

    def _problem(self, question: str, answer: str) -> Problem:
        response = answer if self.calculator else re.sub(r"<<[^<>]*>>", "", answer)
        message = {"role": "user", "content": f"{question}\n\n{_INSTRUCTION}"}
        prompt = [message] if self.chat else f"{question}\n"
        return Problem(prompt, response, reference=answer)


if __name__ == "__main__":
    sys.exit(main(GSM8K, Path(__file__).parent / "configs" / "gsm8k-cpu.yaml"))
