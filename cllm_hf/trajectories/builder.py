"""`TrajectoryBuilder`: from prompts to a dataset of trajectories, or of responses alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import transformers
from datasets import Dataset, DatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .._host import base_model_of, count_embeddings
from .._version import __version__
from ..blocks.limits import check_adapters, check_packable
from ..process import Process
from .folder import OutputFolder
from .manifest import FORMAT, describe_model, describe_tokenizer, read_manifest
from .options import DEFAULT_TOKENS_PER_BATCH, CleaningRules, CollectionOptions
from .prompts import Prompt, PromptRow, Response, check_ids, find_duplicates, fingerprint_rows, is_held_out, read_rows
from .responding import find_stop_ids
from .shard import Journal, Progress, ShardCollector, explain_none_left
from .statistics import measure_trajectories


class TrajectoryBuilder:
    """
    Records how blocks of a model's greedy responses converge under Jacobi iteration (CLLM, arXiv 2403.00835).

    The responses are decoded first, in batches, unless they are given. Then all blocks of a batch of responses iterate
    together in one packed forward pass an iteration, from first drafts drawn at random from the prompt's tokens; what
    has converged leaves the forward pass.

    With an `output_dir` every finished batch is kept on disk. A run that is interrupted or killed goes on where it was
    when it is started again, and ends with the same bytes. Several processes (`torchrun`, `accelerate launch`) share
    the work: each makes some of the shards.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): the target model, on one device or several.
        processing_class (`transformers.PreTrainedTokenizerBase`): its tokenizer.
        block_size (`int`): tokens of a block.
        max_new_tokens (`int`): longest response, in tokens; longer ones are cut there.
        seed (`int`): of the first drafts and of the augmentation.
        max_tokens_per_batch (`int`): tokens of prompts, responses and drafts that are computed together, padding
            included. More are faster until the device is busy or its memory full.
        prompts_per_shard (`int`): prompts whose records make a parquet file.
        augment (`bool`): whether to add a column `augmented_states`: for each block further states to train on, with
            some wrong tokens put right.
        test_fraction (`float`): share of the prompts whose records go to a split `test`, from 0 to below 1. The text
            of a prompt decides, so that equal prompts are never in both.
        cleaning (`CleaningRules`, *optional*): which responses are dropped.
        drop_duplicates (`bool`): whether a prompt that stands in the list before is dropped.
        not_greedy (`str`): what to do with a response that is not the model's own greedy output, as it is from
            elsewhere: `"drop"` it, or `"keep"` it without states in the blocks in which it departs. A token that is
            the best one but for rounding in the model's dtype, a near tie, counts as greedy.
        responses_only (`bool`): whether to collect the model's responses without the states of their blocks, which
            take most of the time. Lossless training, and training with `trajectory_source="online"`, need no states.
        revision (`str`, *optional*): branch, tag or commit of the Hub that the model was loaded from, if not the main
            branch, for the manifest and the card.
        show_progress (`bool`): whether to draw a progress bar.

    Attributes:
        counts (`collections.Counter`): of the last collection: `"kept"`, and dropped prompts by reason: `"duplicate"`,
            `"empty_prompt"`, `"long_prompt"`, `"long_response"`, `"empty"`, `"truncated"`, `"token_repetition"`,
            `"sentence_repetition"`, `"not_greedy"`. `"kept_not_greedy"` and `"kept_near_ties"` (with tokens at near
            ties) are parts of `"kept"`; `"near_ties"` are those tokens.
        output_dir (`pathlib.Path`, *optional*): of the last collection.

    Raises:
        ValueError: for an option of the wrong kind or out of range, or a model whose blocks cannot be packed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processing_class: PreTrainedTokenizerBase,
        block_size: int = 16,
        max_new_tokens: int = 512,
        seed: int = 0,
        *,
        max_tokens_per_batch: int = DEFAULT_TOKENS_PER_BATCH,
        prompts_per_shard: int = 1000,
        augment: bool = False,
        test_fraction: float = 0.0,
        cleaning: CleaningRules | None = None,
        drop_duplicates: bool = True,
        not_greedy: str = "drop",
        responses_only: bool = False,
        revision: str | None = None,
        show_progress: bool = True,
    ):
        self.options = CollectionOptions(
            block_size=block_size,
            max_new_tokens=max_new_tokens,
            seed=seed,
            max_tokens_per_batch=max_tokens_per_batch,
            prompts_per_shard=prompts_per_shard,
            augment=augment,
            test_fraction=test_fraction,
            drop_duplicates=drop_duplicates,
            not_greedy=not_greedy,  # type: ignore[arg-type]
            responses_only=responses_only,
        )
        self.cleaning = CleaningRules() if cleaning is None else cleaning
        if not isinstance(self.cleaning, CleaningRules):
            raise ValueError(f"`cleaning` must be `cllm_hf.CleaningRules`, got {cleaning!r}.")
        check_adapters(getattr(model, "peft_config", {}).values())
        # The layers of an adapter live in its base model; the wrapper has nothing else that is needed here.
        self.model: Any = base_model_of(model)
        check_packable(self.model)
        self.processing_class = processing_class
        self.revision = revision
        self.show_progress = show_progress
        self.counts: Counter[str] = Counter()
        self.output_dir: Path | None = None

    def build(
        self,
        prompts: Iterable[Prompt] | Dataset,
        responses: Iterable[Response] | None = None,
        output_dir: str | Path | None = None,
        source: str | None = None,
        license: str | None = None,
    ) -> Dataset | DatasetDict:
        """
        Collect the trajectories of all prompts. See `collect` for the arguments.

        Without an `output_dir` they are kept in memory only, and each of several processes collects all of them.

        Returns:
            `datasets.Dataset`: one record a response, in the order of the prompts, with `cllm_hf.FEATURES` (without
            `states` and `is_greedy` with `responses_only`); a
            `datasets.DatasetDict` of `train` and `test` with a `test_fraction`.

        Raises:
            OSError: as `collect`.
            ValueError: as `collect`.
        """
        if output_dir is None:
            splits = self._build_in_memory(self._read(prompts, responses))
        else:
            from .loading import load_trajectories

            self.collect(prompts, output_dir, responses, source, license)
            splits = {split: load_trajectories(output_dir, split=split) for split in self.options.splits}
        return DatasetDict(splits) if self.options.test_fraction else splits["train"]

    def collect(
        self,
        prompts: Iterable[Prompt] | Dataset,
        output_dir: str | Path,
        responses: Iterable[Response] | None = None,
        source: str | None = None,
        license: str | None = None,
        wait: bool = True,
    ) -> bool:
        """
        Collect the trajectories of all prompts into a folder, or go on with that.

        Args:
            prompts (`Iterable[str | Sequence[dict] | Sequence[int]]` or `datasets.Dataset`): texts, chat messages
                (`{"role": .., "content": ..}`), which the tokenizer's chat template turns into text, or token ids; or
                a dataset with them in a column `prompt`, and maybe columns `response` and `data_id`.
            output_dir (`str` or `pathlib.Path`): where to write shards, `manifest.json`, the card and a plot.
            responses (`Iterable[str | Sequence[int]]`, *optional*): a response to each prompt that was made elsewhere,
                such as by a serving engine. They are not decoded again.
            source (`str`, *optional*): where the prompts are from, such as `"openai/gsm8k"`, for the card.
            license (`str`, *optional*): of the prompts, such as `"mit"`, for the card.
            wait (`bool`): of several processes, whether this one returns when all are done. Otherwise the last one to
                finish writes the card.

        Returns:
            `bool`: whether the folder is complete: not if other processes still have shards to make.

        Raises:
            OSError: if the folder cannot be written, another run is writing into it, or a shard in it is damaged. What
                is finished stays.
            ValueError: for prompts or responses of another kind, if the folder holds another collection, or if no
                record is left.
        """
        rows = self._read(prompts, responses)
        path, process = Path(output_dir), Process.current()
        folder = OutputFolder(path, self._header(rows, source, license), self.options.splits, process)
        complete = folder.is_complete()
        if complete:
            folder.tidy()
        else:
            with folder, folder.explained_errors():
                self._make_shards(folder, rows)
                complete = folder.finish(wait)
        self.output_dir = path
        self.counts = Counter(read_manifest(path)["counts"])
        return complete

    def push_to_hub(
        self, repo_id: str, private: bool | None = None, config_name: str | None = None, **kwargs: Any
    ) -> str:
        """
        Publish the last collection. `cllm_hf.push_trajectories` does the same with a folder.

        Args:
            repo_id (`str`): of the dataset on the Hub, such as `"user/gsm8k-trajectories"`.
            private (`bool`, *optional*): whether a new repository is private.
            config_name (`str`, *optional*): of several datasets in a repository.
            kwargs: `token`, `revision`, `commit_message`, `create_pr`, as in `push_trajectories`.

        Returns:
            `str`: address of the dataset.

        Raises:
            OSError: as `push_trajectories`.
            ValueError: if nothing has been collected into a folder, or as `push_trajectories`.
        """
        from .hub import push_trajectories

        if self.output_dir is None:
            raise ValueError(
                "Only what is on disk can be pushed, got no `output_dir` in `build`. Build with one, or call "
                "`push_to_hub` of the dataset."
            )
        return push_trajectories(self.output_dir, repo_id, private=private, config_name=config_name, **kwargs)

    def _read(self, prompts: Iterable[Prompt] | Dataset, responses: Iterable[Response] | None) -> list[PromptRow]:
        rows = read_rows(prompts, responses, self.processing_class)
        check_ids(rows, count_embeddings(self.model))
        self.options.check_responses(rows[0].response_ids is not None)
        return rows

    def _make_shards(self, folder: OutputFolder, rows: list[PromptRow]) -> None:
        """Make the shards of this process that are not there yet."""
        pending = folder.own_shards()
        own = [n for n in range(folder.num_shards) if n % folder.process.count == folder.process.index]
        total = sum(len(folder.prompts_of(number)) for number in own)
        todo = sum(len(folder.prompts_of(number)) for number in pending)
        with self._collector(rows) as collector, Progress(total, total - todo, self.show_progress) as progress:
            for number in pending:
                with folder.lock_shard(number):
                    if number not in folder.own_shards():
                        continue
                    part = [rows[index] for index in folder.prompts_of(number)]
                    table, counts = collector.collect(part, folder.journal(number), progress)
                    tables = self._split(table)
                    folder.write_shard(number, tables, counts, self._measure(tables))

    def _measure(self, tables: dict[str, pa.Table]) -> dict[str, Any]:
        if self.options.responses_only:
            return {}
        size = self.options.block_size
        return {split: measure_trajectories(Dataset(found), size).to_dict() for split, found in tables.items()}

    def _build_in_memory(self, rows: list[PromptRow]) -> dict[str, Dataset]:
        size = self.options.prompts_per_shard
        tables: list[pa.Table] = []
        self.counts, self.output_dir = Counter(), None
        with self._collector(rows) as collector, Progress(len(rows), 0, self.show_progress) as progress:
            for start in range(0, len(rows), size):
                found, counts = collector.collect(rows[start : start + size], Journal(), progress)
                tables.append(found)
                self.counts.update(counts)
        table = pa.concat_tables(tables)
        if not len(table):
            raise ValueError(explain_none_left(len(rows), self.counts))
        return {split: Dataset(found) for split, found in self._split(table).items()}

    def _collector(self, rows: list[PromptRow]) -> ShardCollector:
        duplicates = find_duplicates(rows) if self.options.drop_duplicates else set()
        return ShardCollector(self.model, self.processing_class, self.options, self.cleaning, duplicates)

    def _split(self, table: pa.Table) -> dict[str, pa.Table]:
        fraction = self.options.test_fraction
        if not fraction:
            return {"train": table}
        held_out = np.array([is_held_out(prompt, fraction) for prompt in table["prompt"].to_pylist()], dtype=bool)
        return {"train": table.filter(~held_out), "test": table.filter(held_out)}

    def _header(self, rows: list[PromptRow], source: str | None, license: str | None) -> dict[str, Any]:
        """The parts of a manifest that are known before the collection."""
        versions = {"cllm_hf": __version__, "torch": str(torch.__version__), "transformers": transformers.__version__}
        stop_ids = find_stop_ids(self.model, self.processing_class)
        return {
            "format": FORMAT,
            "made_with": versions,
            "model": {**describe_model(self.model, self.revision), "stop_ids": stop_ids},
            "tokenizer": describe_tokenizer(self.processing_class),
            "prompts": {
                "count": len(rows),
                "fingerprint": fingerprint_rows(rows),
                "with_responses": rows[0].response_ids is not None,
                "source": source,
                "license": license,
            },
            "options": {**self.options.to_dict(), "cleaning": self.cleaning.to_dict()},
        }
