"""
Word problems with worked answers, made by rule: numbers up to 20, each a token of its own, two or three steps.

    Mia has 7 apples . Mia buys 5 more . Then Mia gives 3 to Ben . How many apples does Mia have now ?
    Mia starts with 7 apples . Mia buys 5 more , so now there are 7 + 5 = 12 apples . Then Mia gives 3 to Ben , so now
    there are 12 - 3 = 9 apples . The answer is 9 .
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


LARGEST = 20
NAMES = ("Ada Ben Cleo Dan Eva Finn Gina Hugo Ivy Jack Kim Leo Mia Noah Olga Paul Rosa Sam Tina Vera").split()
ITEMS = (
    "apples books cards coins cookies eggs flowers hats keys lemons marbles pens plums shells stamps toys"
).split()
GAINS = ("buys {n} more", "finds {n} more", "gets {n} from {friend}", "wins {n} in a game")
LOSSES = ("gives {n} to {friend}", "loses {n} on the way", "sells {n} at the market", "puts {n} into a box")
_PAD, _EOS, _UNKNOWN = "<pad>", "<eos>", "<unk>"


@dataclass(frozen=True)
class Problem:
    """A word problem: the question, the worked answer, and its result, from 0 to 20."""

    prompt: str
    response: str
    answer: int


def make_problem(rng: random.Random, largest: int = LARGEST) -> Problem:
    """Make a problem whose numbers are at most `largest`."""
    name, friend = rng.sample(NAMES, 2)
    items = rng.choice(ITEMS)
    total = rng.randint(1, largest)
    question = [f"{name} has {total} {items} ."]
    work = [f"{name} starts with {total} {items} ."]
    for step in range(rng.choice((2, 3))):
        gain = total == 0 or (total < largest and rng.random() < 0.5)
        amount = rng.randint(1, largest - total) if gain else rng.randint(1, total)
        event = rng.choice(GAINS if gain else LOSSES).format(n=amount, friend=friend)
        event = f"{'Then ' if step else ''}{name} {event}"
        result = total + amount if gain else total - amount
        question.append(f"{event} .")
        work.append(f"{event} , so now there are {total} {'+' if gain else '-'} {amount} = {result} {items} .")
        total = result
    question.append(f"How many {items} does {name} have now ?")
    work.append(f"The answer is {total} .")
    return Problem(" ".join(question), " ".join(work), total)


def make_problems(count: int, seed: int, largest: int = LARGEST) -> list[Problem]:
    """Make problems of which no two have the same question; the same seed gives the same problems."""
    rng = random.Random(seed)
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        problem = make_problem(rng, largest)
        problems.setdefault(problem.prompt, problem)
    return list(problems.values())


def read_answer(response: str) -> int | None:
    """The number after "The answer is"; `None` if there is none."""
    words = response.rpartition("The answer is")[2].split() if "The answer is" in response else []
    return int(words[0]) if words and words[0].isdecimal() else None


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer whose tokens are the words, numbers and signs of the problems."""
    templates = " ".join((*GAINS, *LOSSES)).replace("{n}", "").replace("{friend}", "")
    fixed = "has starts with Then so now there are The answer is How many does have . , ? + - ="
    words = [*NAMES, *ITEMS, *templates.split(), *fixed.split(), *map(str, range(LARGEST + 1))]
    vocabulary = dict.fromkeys((_PAD, _EOS, _UNKNOWN, *words))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        eos_token=_EOS,
        unk_token=_UNKNOWN,
        model_input_names=["input_ids", "attention_mask"],
    )
