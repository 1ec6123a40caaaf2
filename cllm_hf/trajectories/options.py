"""
The options of a collection, and of the commands `collect`, `inspect`, `show`, `verify` and `push`. Nothing heavy is
imported here.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..options import as_integer, check_block_size
from ..parsing import HelpFormatter, natural, positive


DEFAULT_TOKENS_PER_BATCH = 16384
_DTYPES = ("auto", "float32", "bfloat16", "float16")
COLLECT_HELP = "build a dataset of trajectories from a model and prompts"
_Run = Callable[[argparse.Namespace], int]
# A period within a number, a name or an address ends no sentence. After one that does, a space may be missing.
_SENTENCE_END = re.compile(r"[!?！？。｡।؟…\n]|\.(?!\w)|(?<=[a-z])\.(?=[A-Z])|．(?!\d)")
# Nor does one after a title, or after what is written short in the middle of a sentence.
_ABBREVIATION = re.compile(r"\b(?:(?:Mr|Mrs|Ms|Dr|Prof|St)\.(?=\s+[A-Z])|(?:vs|approx|e\.g|i\.e)\.)")
# Options of `CollectionOptions` that are about states alone.
_OF_STATES = ("block_size", "seed", "augment", "not_greedy")
_WORDS = re.compile(r"\w(?:.*\w)?")
_SHORTEST_SENTENCE = 10


def _check_truths(options: Any, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(options, name), bool):
            raise ValueError(f"`{name}` must be `True` or `False`, got {getattr(options, name)!r}.")


@dataclass(frozen=True)
class CleaningRules:
    """
    Which responses `TrajectoryBuilder` drops.

    A model that falls into a loop makes long trajectories of the loop, and training on them makes it collapse to few
    tokens. The authors of CLLM (arXiv 2403.00835) drop responses with a long run of one token, and advise to look for
    repeated sentences too. Set a rule to `None` or `False` to do without it.

    Args:
        max_token_run (`int`, *optional*, defaults to 10): a response is dropped in which one token stands this many
            times or more in a row. Stop tokens and padding within it are tokens as all others.
        max_sentence_repeats (`int`, *optional*, defaults to 3): a response is dropped in which one sentence stands
            more than this many times, anywhere in it: with 3, the fourth time is too much. A sentence goes to the next
            `.`, `!`, `?`, line end or their like in other scripts; a period within a number or a name (`3.5`,
            `example.com`) or after a title (`Mr.`) ends none. Case, spaces, and signs around it make no difference,
            and those of less than 10 characters do not count. Lines of program code are sentences too: for code take a
            larger number or `None`.
        drop_empty (`bool`, defaults to `True`): whether a response is dropped that has no tokens but stop tokens, or
            only white space as text.
        drop_truncated (`bool`, defaults to `False`): whether a response is dropped that does not end in a stop token,
            because it was cut at `max_new_tokens`. Its blocks converge as all others; the model does not learn to end
            from it.
        max_prompt_tokens (`int`, *optional*): prompts of more tokens are dropped, before they get a response.

    Raises:
        ValueError: for a value of the wrong kind or out of range.
    """

    max_token_run: int | None = field(
        default=10,
        metadata={"help": "drop responses that have one token this many times or more in a row; 0: keep them"},
    )
    max_sentence_repeats: int | None = field(
        default=3, metadata={"help": "drop responses that have one sentence more than this many times; 0: keep them"}
    )
    drop_empty: bool = field(default=True, metadata={"help": "drop responses without text"})
    drop_truncated: bool = field(
        default=False, metadata={"help": "drop responses that do not end within `max_new_tokens`"}
    )
    max_prompt_tokens: int | None = field(default=None, metadata={"help": "drop prompts of more tokens than this"})

    def __post_init__(self) -> None:
        # A run of one token is every token.
        for name, least in (("max_token_run", 2), ("max_sentence_repeats", 1), ("max_prompt_tokens", 1)):
            given = getattr(self, name)
            value = as_integer(given)
            if given is not None and (value is None or value < least):
                raise ValueError(
                    f"`{name}` must be an integer of at least {least}, or `None` for no such rule, got {given!r}."
                )
            object.__setattr__(self, name, value)  # as Python's own, ready for JSON
        _check_truths(self, "drop_empty", "drop_truncated")

    def reason_to_drop(self, response_ids: Sequence[int], text: str, stop_ids: Collection[int]) -> str | None:
        """
        Say whether a response is to be dropped, and why.

        Args:
            response_ids (`Sequence[int]`): its tokens, the stop token included.
            text (`str`): the same as text, without special tokens.
            stop_ids (`Collection[int]`): tokens that end a response; without any, all responses are truncated.

        Returns:
            `str` or `None`: the first of `"empty"`, `"truncated"`, `"token_repetition"`, `"sentence_repetition"` that
            is true of it and that a rule forbids, or `None` if it is kept.
        """
        if self.drop_empty and (not text.strip() or all(token in stop_ids for token in response_ids)):
            return "empty"
        if self.drop_truncated and (not len(response_ids) or response_ids[-1] not in stop_ids):
            return "truncated"
        if self.max_token_run is not None and longest_run(response_ids) >= self.max_token_run:
            return "token_repetition"
        if self.max_sentence_repeats is not None and most_repeats(text) > self.max_sentence_repeats:
            return "sentence_repetition"
        return None

    def to_dict(self) -> dict[str, Any]:
        """
        The rules by name, as a dataset's manifest has them.

        Returns:
            `dict`: `CleaningRules(**rules.to_dict())` are the same rules.
        """
        return asdict(self)


KEEP_ALL = CleaningRules(max_token_run=None, max_sentence_repeats=None, drop_empty=False)


def longest_run(token_ids: Sequence[int]) -> int:
    """Length of the longest run of one token; 0 without tokens."""
    return max((sum(1 for _ in run) for _, run in groupby(token_ids)), default=0)


def most_repeats(text: str) -> int:
    """How often the most frequent sentence of at least 10 characters stands in a text."""
    whole = _ABBREVIATION.sub(lambda match: match[0].replace(".", " "), text)
    found = (_WORDS.search(" ".join(part.casefold().split())) for part in _SENTENCE_END.split(whole))
    counts = Counter(words[0] for words in found if words and len(words[0]) >= _SHORTEST_SENTENCE)
    return max(counts.values(), default=0)


def _option(default: Any, help: str) -> Any:
    """A field, and what `cllm collect --help` says of it."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class CollectionOptions:
    """What else decides which records come out of prompts, whatever the machine; see `TrajectoryBuilder`."""

    block_size: int = _option(16, "tokens of a block")
    max_new_tokens: int = _option(512, "longest response, in tokens; longer ones are cut there")
    seed: int = _option(0, "seed of the first drafts")
    max_tokens_per_batch: int = _option(
        DEFAULT_TOKENS_PER_BATCH,
        "tokens of prompts, responses and drafts that are computed together; more are faster until the memory is full",
    )
    prompts_per_shard: int = _option(1000, "number of prompts in each file of the dataset")
    augment: bool = _option(False, "add states with some wrong tokens made right, for training")
    test_fraction: float = _option(0.0, "share of the prompts that goes to a split `test`, such as 0.05")
    drop_duplicates: bool = _option(True, "drop prompts that are in the list already, token for token")
    not_greedy: Literal["drop", "keep"] = _option(
        "drop", "what to do with responses that you pass and that are not the model's own greedy output"
    )
    responses_only: bool = _option(
        False, "collect responses without states, all that lossless training and online states need, in less time"
    )

    def __post_init__(self) -> None:
        counts = {"block_size": check_block_size(self.block_size, "block_size")}
        for name, least in (("max_new_tokens", 1), ("max_tokens_per_batch", 1), ("prompts_per_shard", 1), ("seed", 0)):
            value = as_integer(getattr(self, name))
            if value is None or value < least:
                raise ValueError(f"`{name}` must be an integer of at least {least}, got {getattr(self, name)!r}.")
            counts[name] = value
        for name, value in counts.items():
            object.__setattr__(self, name, value)  # as Python's own, ready for JSON
        _check_truths(self, "augment", "drop_duplicates", "responses_only")
        if isinstance(self.test_fraction, bool) or not isinstance(self.test_fraction, (int, float)):
            raise ValueError(f"`test_fraction` must be a number, got {self.test_fraction!r}.")
        if not 0 <= self.test_fraction < 1:
            raise ValueError(f"`test_fraction` must be at least 0 and below 1, got {self.test_fraction}.")
        if self.not_greedy not in ("drop", "keep"):
            raise ValueError(f'`not_greedy` must be "drop" or "keep", got {self.not_greedy!r}.')
        for name in _OF_STATES if self.responses_only else ():
            if getattr(self, name) != CollectionOptions.__dataclass_fields__[name].default:
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` is about states, of which `responses_only=True` collects none. "
                    "Drop one of the two."
                )

    def check_responses(self, are_given: bool) -> None:
        """Refuse given responses where nothing would be done with them."""
        if self.responses_only and are_given:
            raise ValueError(
                "Given responses are not decoded again, so that `responses_only=True` must get prompts alone, got "
                "responses too. Train on both as they are (`cllm train --lossless --trajectories FILE`), or leave the "
                "responses out to have the model write its own."
            )

    def to_dict(self) -> dict[str, Any]:
        """Those that have an effect, by name, as a dataset's manifest has them."""
        left_out = _OF_STATES if self.responses_only else ("responses_only",)
        return {name: value for name, value in asdict(self).items() if name not in left_out}

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that the records go to; the first one is written last."""
        return ("train", "test") if self.test_fraction else ("train",)


@dataclass
class CollectArguments:
    """The further options of `cllm collect`: where prompts, the model and the dataset are."""

    model: str = field(metadata={"help": "folder or Hub id of a model, a CLLM or an adapter"})
    output_dir: str = field(
        metadata={"help": "folder of the dataset; after an interruption, the same command goes on where it was"}
    )
    prompts: str | None = _option(
        None,
        "file with a prompt a line, as text or as JSON with a field `prompt` or `question`, and `response` where "
        "responses are given, or a JSON array of such objects",
    )
    dataset_name: str | None = _option(None, "dataset to take the prompts from instead: a Hub id, a folder or a file")
    dataset_config: str | None = _option(None, "configuration of that dataset")
    dataset_split: str = _option("train", "split of that dataset")
    prompt_column: str | None = _option(
        None,
        "column or JSON field of the prompts: texts, chat messages or token ids; by default `prompt` or `question`",
    )
    response_column: str | None = _option(
        None,
        "column or JSON field of responses, texts or token ids, that the model has given already; by default the "
        "model writes them, unless JSON lines have a field `response`",
    )
    limit: int | None = _option(None, "how many prompts to take, the first ones; by default all")
    prompt_template: str = _option(
        "{prompt}", "text around a prompt, such as 'Question: {prompt}\\nAnswer:'; \\n is a new line"
    )
    chat: bool = _option(
        False,
        "put prompts that are text through the tokenizer's chat template, for an instruct model",
    )
    revision: str | None = _option(None, "branch, tag or commit of the model on the Hub")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "float32",
        "dtype of the weights; auto: that of the checkpoint. In 16 bits, more tokens are tied within rounding; these "
        "count as greedy",
    )
    device_map: str | None = _option(
        None, "auto spreads the model over several devices; by default each process takes one"
    )
    attn_implementation: str | None = _option(
        None, "implementation of attention, sdpa or eager; by default as transformers chooses"
    )
    trust_remote_code: bool = _option(False, "run code from the model's repository")
    source: str | None = _option(None, "where the prompts come from, for the card; by default `dataset_name`")
    license: str | None = _option(None, "license of the prompts, for the card, such as mit")
    push_to_hub: str | None = _option(
        None, "push the finished dataset to this repository of the Hub, such as user/name"
    )
    private: bool = _option(False, "make that repository private")
    config_name: str | None = _option(None, "configuration of the dataset in that repository")
    wait: bool = _option(
        True, "with several processes: whether to stay until all are done; if not, the last one completes the dataset"
    )

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise ValueError("`output_dir` must be a folder, got ''. Name one; `.` is the one where you are.")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"`limit` must be at least 1, got {self.limit}.")
        if (self.prompts is None) == (self.dataset_name is None):
            got = "neither" if self.prompts is None else "both"
            raise ValueError(f"Exactly one of `--prompts` and `--dataset-name` says what to ask, got {got}.")
        if "{prompt}" not in self.prompt_template:
            raise ValueError(
                "`prompt_template` must have {prompt} where the prompt goes, got " + repr(self.prompt_template) + "."
            )
        if self.push_to_hub is not None and not self.wait:
            raise ValueError(
                "Only a finished dataset can be pushed, got `push_to_hub` without `wait`. Run `cllm push` afterwards."
            )


class CollectCommand(NamedTuple):
    """All options of `cllm collect`."""

    arguments: CollectArguments
    collection: CollectionOptions
    cleaning: CleaningRules


def parse_collect(arguments: Sequence[str]) -> CollectCommand:
    """Read the options of `cllm collect` from the command line, and the YAML file of `--config` that it may name."""
    from ..parsing import OptionParser

    kinds = [CollectArguments, CollectionOptions, CleaningRules]
    parser = OptionParser(kinds, "cllm collect", COLLECT_HELP, adapt=_drop_rules)
    return CollectCommand(*parser.read(arguments))


def _drop_rules(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """0 is no such rule: a number is easier to write than `None`."""
    for name in ("max_token_run", "max_sentence_repeats"):
        setattr(options, name, getattr(options, name) or None)


def add_trajectory_commands(commands: Any, inspect: _Run, show: _Run, verify: _Run, push: _Run) -> None:
    """Add `inspect`, `show`, `verify` and `push` to a parser, each with the function that runs it."""
    _add_inspect(commands).set_defaults(run=inspect)
    _add_show(commands).set_defaults(run=show)
    _add_verify(commands).set_defaults(run=verify)
    _add_push(commands).set_defaults(run=push)


def _add_inspect(commands: Any) -> argparse.ArgumentParser:
    parser = _add(commands, "inspect", "show a record of a dataset of trajectories, or its statistics")
    _add_dataset(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--record", type=natural, help="number of the record; by default 0")
    which.add_argument("--data-id", help="the record with this `data_id` instead")
    which.add_argument("--statistics", action="store_true", help="show how the blocks of the whole dataset converge")
    parser.add_argument("--block", type=natural, nargs="+", help="numbers of the blocks, from 0; by default all")
    parser.add_argument(
        "--compare",
        metavar="OTHER",
        help="compare the statistics with those of this dataset, such as one of the CLLM after training",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG file for a plot of the statistics")
    parser.add_argument(
        "--picture",
        type=Path,
        metavar="FILE",
        help="PNG file for a picture of the blocks that --block names; by default of block 0",
    )
    parser.add_argument("--tokenizer", help="folder or Hub id; by default that of the dataset")
    _add_color(parser)
    return parser


def _add_show(commands: Any) -> argparse.ArgumentParser:
    parser = _add(commands, "show", "show how a block of a CLLM converges, next to its target model")
    parser.add_argument("--model", required=True, help="folder or Hub id of a CLLM, or any other model")
    parser.add_argument("--target", help="folder or Hub id of its target model; by default the one that it names")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="prompt to decode")
    prompt.add_argument("--prompts", type=Path, metavar="FILE", help="file with a prompt a line, as of `cllm collect`")
    parser.add_argument("--number", type=positive, help="which prompt of the file, from 1; by default the first")
    parser.add_argument(
        "--prompt-template", default="{prompt}", help="text around the prompt; \\n is a new line, as of `cllm collect`"
    )
    parser.add_argument("--chat", action="store_true", help="put it through the chat template, as of `cllm collect`")
    parser.add_argument("--block-size", type=positive, help="tokens of a block; by default that of the CLLM, else 16")
    parser.add_argument("--block", type=natural, default=0, help="number of the block in the response, from 0")
    parser.add_argument(
        "--max-new-tokens", type=positive, help="longest response, in tokens; by default it ends with the block"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="PNG file for a picture")
    _add_color(parser)
    parser.add_argument("--seed", type=natural, default=0, help="seed of the first draft")
    _add_loading(parser, "auto", "dtype of the weights; auto: that of the checkpoint")
    return parser


def _add_verify(commands: Any) -> argparse.ArgumentParser:
    parser = _add(commands, "verify", "recompute transitions of a dataset of trajectories by plain forward passes")
    _add_dataset(parser)
    parser.add_argument("--model", help="folder or Hub id of the target model; by default that of the dataset")
    parser.add_argument(
        "--transitions", type=positive, default=1000, help="how many transitions to recompute, drawn at random"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw")
    _add_loading(parser, None, "dtype of the weights; by default the one that the dataset was built in, else float32")
    return parser


def _add_push(commands: Any) -> argparse.ArgumentParser:
    parser = _add(commands, "push", "publish a finished dataset of trajectories on the Hub")
    parser.add_argument("folder", type=Path, help="output folder of `cllm collect`")
    parser.add_argument("repo_id", help="repository of the Hub, such as user/name")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--config-name", help="configuration of the dataset in the repository")
    parser.add_argument("--revision", help="branch of the repository")
    return parser


def _add(commands: Any, name: str, help: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name, help=help, description=f"{help[0].upper()}{help[1:]}.", formatter_class=HelpFormatter
    )


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", help="folder or Hub id of the dataset")
    parser.add_argument("--split", help="split, such as train or test; by default all")
    parser.add_argument("--config-name", help="which configuration, if the dataset has several")


def _add_color(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-color", action="store_true", help="mark wrong tokens with brackets instead of colors")


def _add_loading(parser: argparse.ArgumentParser, dtype: str | None, help: str) -> None:
    parser.add_argument("--dtype", choices=_DTYPES, default=dtype, help=help)
    parser.add_argument("--device", default="auto", help="such as cpu or cuda:0; auto: cuda if there is one")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code from the models' repositories")
