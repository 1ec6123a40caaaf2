"""The options of `cllm collect`, `inspect`, `show`, `verify` and `push`. Nothing heavy is imported here."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from ..parsing import natural, positive


COLLECT_HELP = "build a dataset of trajectories from a model and prompts"
_Run = Callable[[argparse.Namespace], int]


def _option(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass
class CollectArguments:
    """
    The options of `cllm collect`; each has its meaning in the `help` of its metadata. Those of the collection itself
    are checked further by `CollectionOptions` and `CleaningRules`.

    Raises:
        ValueError: for options that contradict each other.
    """

    model: str = dataclasses.field(metadata={"help": "folder or Hub id of a model, a CLLM or an adapter"})
    output_dir: str = dataclasses.field(
        metadata={"help": "folder of the dataset; the same command continues what was interrupted"}
    )
    prompts: str | None = _option(
        None,
        "file with a prompt a line, as text or as JSON with a field `prompt` or `question`, and `response` where "
        "responses are given, or a JSON array of such objects",
    )
    dataset_name: str | None = _option(None, "prompts from a dataset instead: a Hub id, a folder or a file")
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
    limit: int | None = _option(None, "how many prompts, the first ones")
    prompt_template: str = _option(
        "{prompt}", "text around a prompt, such as 'Question: {prompt}\\nAnswer:'; \\n is a new line"
    )
    revision: str | None = _option(None, "branch, tag or commit of the model on the Hub")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "float32",
        "of the weights; auto: that of the checkpoint. In 16 bits more tokens are tied but for rounding; such tokens "
        "count as greedy",
    )
    device_map: str | None = _option(
        None, "such as auto, to spread the model over devices; by default each process takes one"
    )
    attn_implementation: str | None = _option(None, "such as sdpa or eager")
    trust_remote_code: bool = _option(False, "run code from the model's repository")
    block_size: int = _option(16, "tokens of a block")
    max_new_tokens: int = _option(512, "longest response, in tokens; longer ones are cut there")
    seed: int = _option(0, "of the first drafts")
    max_tokens_per_batch: int = _option(16384, "tokens computed together; more are faster until the memory is full")
    prompts_per_shard: int = _option(1000, "prompts of a file of the dataset")
    augment: bool = _option(False, "add states with some wrong tokens made right, for training")
    test_fraction: float = _option(0.0, "part of the prompts that goes to a test split")
    max_token_run: int | None = _option(10, "drop responses in which a token stands so often in a row; 0: keep them")
    max_sentence_repeats: int | None = _option(3, "drop responses in which a sentence stands more often; 0: keep them")
    drop_empty: bool = _option(True, "whether to drop responses without text")
    drop_truncated: bool = _option(False, "whether to drop responses that do not end within `max_new_tokens`")
    max_prompt_tokens: int | None = _option(None, "drop longer prompts")
    drop_duplicates: bool = _option(True, "whether to drop prompts that were there before")
    not_greedy: Literal["drop", "keep"] = _option(
        "drop", "what to do with given responses that are not the model's own greedy output"
    )
    source: str | None = _option(None, "where the prompts come from, for the card; by default `dataset_name`")
    license: str | None = _option(None, "of the prompts, for the card, such as mit")
    push_to_hub: str | None = _option(None, "repository of the Hub, such as user/name, for the finished dataset")
    private: bool = _option(False, "make that repository private")
    config_name: str | None = _option(None, "configuration of the dataset in that repository")
    wait: bool = _option(
        True, "with several processes: whether to stay until all are done; if not, the last one completes the dataset"
    )

    def __post_init__(self) -> None:
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


def parse_collect(arguments: Sequence[str]) -> CollectArguments:
    """
    Read the options of `cllm collect` from the command line and a YAML file.

    Args:
        arguments (`Sequence[str]`): what stands after `collect`. Options win over the file of `--config`.

    Returns:
        `CollectArguments`.

    Raises:
        OSError: if the YAML file cannot be read.
        ValueError: for unknown options, values that the class refuses, or a file that is not YAML.
        SystemExit: after `--help`, and with status 2 for missing options and values that cannot be read.
    """
    from ..parsing import OptionParser

    (parsed,) = OptionParser([CollectArguments], "cllm collect", COLLECT_HELP).read(arguments)
    return parsed


def add_trajectory_commands(commands: Any, inspect: _Run, show: _Run, verify: _Run, push: _Run) -> None:
    """
    Add `inspect`, `show`, `verify` and `push` to a parser.

    Args:
        commands (`argparse._SubParsersAction`): the commands of the parser.
        inspect (`Callable[[argparse.Namespace], int]`): runs the first.
        show (`Callable[[argparse.Namespace], int]`): runs the second.
        verify (`Callable[[argparse.Namespace], int]`): runs the third.
        push (`Callable[[argparse.Namespace], int]`): runs the fourth.
    """
    _add_inspect(commands).set_defaults(run=inspect)
    _add_show(commands).set_defaults(run=show)
    _add_verify(commands).set_defaults(run=verify)
    _add_push(commands).set_defaults(run=push)


def _add_inspect(commands: Any) -> argparse.ArgumentParser:
    parser = _add(commands, "inspect", "show a record of a dataset of trajectories, or its statistics")
    parser.add_argument("dataset", help="folder or Hub id of the dataset")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--record", type=natural, help="number of the record; by default 0")
    which.add_argument("--data-id", help="the record with this `data_id` instead")
    which.add_argument("--statistics", action="store_true", help="how the blocks of the whole dataset converge")
    parser.add_argument("--block", type=natural, nargs="+", help="numbers of the blocks, from 0; by default all")
    parser.add_argument("--compare", metavar="OTHER", help="a dataset made after training, for the statistics")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG file for a plot of the statistics")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="PNG file for a picture of the blocks of --block; by default of 0"
    )
    parser.add_argument("--tokenizer", help="folder or Hub id; by default that of the dataset")
    parser.add_argument("--split", help="such as train or test; by default all")
    parser.add_argument("--config-name", help="which configuration, if the dataset has several")
    parser.add_argument("--no-color", action="store_true", help="mark wrong tokens by brackets instead of colors")
    return parser


def _add_show(commands: Any) -> argparse.ArgumentParser:
    parser = _add(commands, "show", "show how a block of a CLLM converges, next to its target model")
    parser.add_argument("--model", required=True, help="folder or Hub id of a CLLM, or any other model")
    parser.add_argument("--target", help="folder or Hub id of its target model; by default the one that it names")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="what to answer")
    prompt.add_argument("--prompts", type=Path, metavar="FILE", help="file with a prompt a line, as of `cllm collect`")
    parser.add_argument("--number", type=positive, help="which prompt of the file, from 1; by default the first")
    parser.add_argument(
        "--prompt-template", default="{prompt}", help="text around the prompt; \\n is a new line, as of `cllm collect`"
    )
    parser.add_argument("--block-size", type=positive, help="tokens of a block; by default that of the CLLM, else 16")
    parser.add_argument("--block", type=natural, default=0, help="number of the block in the response, from 0")
    parser.add_argument(
        "--max-new-tokens", type=positive, help="longest response, in tokens; by default it ends with the block"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="PNG file for a picture")
    parser.add_argument("--no-color", action="store_true", help="mark wrong tokens by brackets instead of colors")
    parser.add_argument("--seed", type=natural, default=0, help="of the first draft")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the weights; auto: that of the checkpoint",
    )
    parser.add_argument("--device", default="auto", help="such as cpu or cuda:0; auto: cuda if there is one")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code from the models' repositories")
    return parser


def _add_verify(commands: Any) -> argparse.ArgumentParser:
    parser = _add(commands, "verify", "recompute transitions of a dataset of trajectories by plain forward passes")
    parser.add_argument("dataset", help="folder or Hub id of the dataset")
    parser.add_argument("--model", help="folder or Hub id of the target model; by default that of the dataset")
    parser.add_argument("--transitions", type=positive, default=1000, help="how many, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the weights; by default that in which the dataset was built, else float32",
    )
    parser.add_argument("--device", default="auto", help="such as cpu or cuda:0; auto: cuda if there is one")
    parser.add_argument("--split", help="such as train or test; by default all")
    parser.add_argument("--config-name", help="which configuration, if the dataset has several")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code from the model's repository")
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
    return commands.add_parser(name, help=help, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
