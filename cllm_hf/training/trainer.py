"""`CLLMTrainer`: consistency training of a causal language model, full or with an adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from .._host import base_model_of, count_embeddings
from ..cards import CLLM_CITATION
from ..files import check_writable
from ..integration import set_jacobi_defaults, set_lossless_defaults
from .batch import TrainingBatch, count_own_rows, make_collator
from .callbacks import CollapseCallback
from .checkpoints import EpochCallback, RunRecordCallback, choose_checkpoint, describe_run, drafter_follows
from .config import CLLMConfig
from .drafting import DraftingObjective, PreparedDrafts
from .inputs import (
    check_datasets,
    check_processes,
    check_vocabulary,
    explained_variants,
    find_tokenizer,
    fit_model,
    load_target,
    load_target_tokenizer,
    prepare_dataset,
)
from .monitoring import decoding_metrics
from .objective import ConsistencyObjective, LossTotals, PreparedBatch
from .saving import PlotCallback, PushCallback, RunCard, card_left_alone, check_leftovers, save_beside, wait_for_push


_REFUSED_ARGUMENTS = (
    "data_collator",
    "compute_loss_func",
    "compute_metrics",
    "preprocess_logits_for_metrics",
    "formatting_func",
)
_LOSSLESS_TAGS = ["trl", "lossless"]  # on the Hub; the model does not become a CLLM
# transformers looks into a batch by key on its way to `compute_loss`; this is the only one it finds in training.
_PREPARED = "prepared"


def _fit_options(args: CLLMConfig) -> None:
    """Options of transformers and TRL that consistency training needs."""
    # The records go to our collator as they are; mixture-of-experts models keep their balancing loss out of it.
    args.remove_unused_columns = False
    args.dataset_kwargs = {"skip_prepare_dataset": True}
    args.router_aux_loss_coef = 0.0
    args.prediction_loss_only = True  # there are no logits for most positions
    if args.lossless and args.ddp_find_unused_parameters is None:
        # Every step uses all, and the Markov head outside of `forward`, where a search would not find it.
        args.ddp_find_unused_parameters = False


class CLLMTrainer(SFTTrainer):
    """
    Trains a model to reach the fixed point of a block from any state of its trajectory (CLLM, arXiv 2403.00835).

    Each step runs one packed forward pass: the clean sequence of every response, whose logits are both the targets
    (without gradient) and the AR loss, and states of each of its blocks. The loss is

        consistency_loss = mean over positions whose context holds a wrong draft token of
                           D( p(. | fixed point) without gradient, q(. | state) )
        loss = consistency_loss + ar_loss_weight * ar_loss

    With `CLLMConfig(lossless=True)` the model is frozen, and an adapter learns to draft for it instead: the loss is
    then the mean divergence of what is drafted from what the model says, `drafting_loss`.

    [`CLLMConfig`] says what there is to choose. The means are over all positions of an optimizer step, so that
    gradient accumulation and several processes give the gradient of one large batch. Which states a step trains on is
    a function of the seed, the number of the step and the record, so that a resumed run goes on as if nothing was.

    Args:
        model (`str`, `transformers.PreTrainedModel` or `peft.PeftModel`): the target model, or its name or path. An
            adapter, or its name or path, is trained further.
        args (`CLLMConfig`, *optional*): options.
        train_dataset (`datasets.Dataset` or `datasets.IterableDataset`): trajectories of the target model. Lossless
            training and `trajectory_source="online"` also take its responses alone: as tokens (`prompt_ids`,
            `response_ids`), or as text in columns `prompt` (text or chat messages) and `response` or `completion`, or
            chats in a column `messages`, whose last message is the response.
        eval_dataset (`datasets.Dataset` or `dict` of them, *optional*): the same for evaluation.
        processing_class (`transformers.PreTrainedTokenizerBase`, *optional*): the tokenizer.
        peft_config (`peft.PeftConfig`, *optional*): adapter to train instead of the whole model.
        kwargs: everything else that `trl.SFTTrainer` takes.

    Attributes:
        block_size (`int`): tokens of a block; saved as the model's default `jacobi_block_size`.
        dataset_name (`str`, *optional*): id of the dataset on the Hub, for the model card. By default where
            `load_trajectories` has loaded it from.
        measured (`Mapping[str, Any]`): what was measured of the finished model, for the model card: a name and a
            number or text each, such as `{"speed-up over generate()": 3.3}`. Nothing unless you set it.

    Raises:
        OSError: if `args.output_dir` is not writable.
        ValueError: for a dataset that does not hold trajectories of one block size or has tokens that the model does
            not, a `data_collator`, loss function or metrics (the trainer has its own), a model that cannot be packed,
            an adapter that cannot be trained so, or a `pad_token` that the tokenizer does not have.
    """

    _tag_names = ["trl", "cllm", "jacobi-decoding"]
    _name = "CLLM"
    _paper = {
        "title": "CLLMs: Consistency Large Language Models",
        "id": "2403.00835",
        "citation": CLLM_CITATION,
    }
    # The loss is divided by the positions of the whole optimizer step, see `get_batch_samples`.
    loss_is_scaled_for_ga: Any = True
    dataset_name: str | None = None
    measured: Mapping[str, Any] = MappingProxyType({})
    model: Any
    args: Any

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: CLLMConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any | None = None,
        **kwargs: Any,
    ):
        if args is None:
            args = CLLMConfig(output_dir="cllm")
        elif not isinstance(args, CLLMConfig):
            raise ValueError(f"`args` must be a `cllm_hf.CLLMConfig`, got {type(args).__name__}.")
        for name in _REFUSED_ARGUMENTS:
            if kwargs.get(name) is not None:
                raise ValueError(f"`CLLMTrainer` has its own collator, loss and metrics, got a `{name}`. Drop it.")
        of_texts = partial(find_tokenizer, model, processing_class)
        train_dataset, eval_dataset = (prepare_dataset(one, args, of_texts) for one in (train_dataset, eval_dataset))
        dataset_block_size = check_datasets(train_dataset, eval_dataset, args)
        self.block_size = args.block_size_schedule[-1] if args.block_size_schedule else dataset_block_size
        output_dir = Path(str(args.output_dir))
        if args.should_save:
            check_writable(output_dir)  # before the training, not after it
        _fit_options(args)
        objective: Any = DraftingObjective if args.lossless else ConsistencyObjective
        self._objective = objective(args, dataset_block_size)
        self._loss_totals = {"train": LossTotals(), "eval": LossTotals()}
        self._card, self._run_record = RunCard(self), RunRecordCallback()
        if args.lossless:
            self._tag_names = _LOSSLESS_TAGS
        collator = make_collator(args, dataset_block_size)
        target, peft_config = load_target(model, args, peft_config, kwargs.get("quantization_config"))
        with explained_variants() if args.lossless else nullcontext():
            super().__init__(
                target,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=load_target_tokenizer(model) if processing_class is None else processing_class,
                peft_config=peft_config,
                **{**kwargs, "data_collator": collator},
            )
        fit_model(self.model, self.processing_class, args, dataset_block_size)
        base_model = base_model_of(self.model)
        # The collator looks at what is read later: streams, and datasets that `evaluate` is given.
        collator.vocab_size = count_embeddings(base_model)
        check_vocabulary(train_dataset, eval_dataset, collator.vocab_size, collator.token_columns)
        if args.should_save:
            check_leftovers(output_dir, is_adapter=base_model is not self.model)
        check_processes(args, self.accelerator)
        if args.lossless:
            set_lossless_defaults(self.model)
        else:
            set_jacobi_defaults(self.model, self.block_size)
        self._add_callbacks()

    def _add_callbacks(self) -> None:
        """Those that a run always has, and those that its options ask for, unless they were given."""
        given = {type(callback) for callback in self.callback_handler.callbacks}
        self.add_callback(EpochCallback())
        self.add_callback(self._run_record)
        # The model of a lossless adapter is frozen, and cannot collapse.
        can_collapse = not self.args.lossless and self.args.on_collapse != "ignore"
        if can_collapse and not any(issubclass(kind, CollapseCallback) for kind in given):
            self.add_callback(CollapseCallback(self.args.on_collapse))
        if self.args.plot_run and not any(issubclass(kind, PlotCallback) for kind in given):
            self.add_callback(PlotCallback(self))
        self.add_callback(PushCallback(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        Train, from scratch or from a checkpoint.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): a checkpoint to go on from, or `True` for the newest
                whole one of `output_dir`. The rest of the run is what it would have been.
            args: everything else that `transformers.Trainer.train` takes.
            kwargs: everything else that `transformers.Trainer.train` takes.

        Returns:
            `transformers.trainer_utils.TrainOutput`.

        Raises:
            ValueError: if there is no whole checkpoint, none from which the run can go on exactly, or it is of a run
                with another dataset, seed or size of batches.
        """
        record = self._run_record.record = describe_run(self.args, self.train_dataset)
        checkpoint = choose_checkpoint(resume_from_checkpoint, self.args, record)
        with drafter_follows(self, checkpoint) if self.args.lossless else nullcontext():
            return super().train(checkpoint, *args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """Fetch the batches of an optimizer step, choose what it trains on, and count the positions of its losses."""
        if 0 < self.state.max_steps <= self.state.global_step:
            # A checkpoint of a run that is done: transformers asks only after an optimizer step whether to go on.
            self.control.should_training_stop = True
            return [], None
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        last = len(batches) - 1
        prepared = [
            self._prepare_batch(self.model_wrapped, batch, "train", is_last=number == last)
            for number, batch in enumerate(batches)
        ]
        if not prepared:
            return [], num_items
        counts = torch.stack([one.counts for one in prepared]).sum(0).to(device)
        if self.accelerator.num_processes > 1:
            # Gradients are averaged over processes, so each divides by its share of all positions.
            counts = self.accelerator.gather(counts[None]).sum(0) / self.accelerator.num_processes
        return [{_PREPARED: (one, counts)} for one in prepared], num_items

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of one batch: its share of the means over the step in training, its own means in evaluation."""
        mode = "train" if self.model.training else "eval"
        if _PREPARED in inputs:
            prepared, denominators = inputs[_PREPARED]
        else:
            prepared = self._prepare_batch(model, inputs, mode)
            denominators = prepared.counts
        counts = prepared.counts
        # A record that is repeated to fill a batch has losses, but no positions.
        sums = self._objective.sum_losses(model, base_model_of(self.model), prepared) * (counts > 0)
        # A process's share of few positions is less than one.
        means = sums / torch.where(denominators > 0, denominators, 1)
        loss = means[0] + self._objective.second_weight * means[1]
        self._loss_totals[mode].add(sums, counts)
        return (loss, dict(zip(self._objective.loss_names, means))) if return_outputs else loss

    def _prepare_batch(
        self, model: torch.nn.Module, columns: dict[str, torch.Tensor], mode: str, is_last: bool = True
    ) -> PreparedBatch | PreparedDrafts:
        """
        Choose states by the number of the step; in evaluation always the same, in blocks of the last size.

        The mode is not the model's: transformers sets that only when the batches of a step have been fetched. All
        processes must run the same forward passes, so that one with repeated records only keeps one of them.
        """
        update, progress = None, 1.0
        if mode == "train":
            update = self.state.global_step
            progress = self.state.global_step / self.state.max_steps if self.state.max_steps > 0 else 0.0
        batch = TrainingBatch(**columns)
        num_own = len(batch)
        if is_last:
            num_own = count_own_rows(len(batch), self.accelerator, self.args.dataloader_drop_last)
            batch = batch.first_rows(max(num_own, 1))
        prepared = self._objective.prepare(model, base_model_of(self.model), batch, update, progress)
        return prepared if num_own else replace(prepared, counts=torch.zeros_like(prepared.counts))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the means of both losses since the last log and the numbers of positions they are over."""
        mode = "train" if self.model.training else "eval"
        totals = self._loss_totals[mode].take(self.accelerator)
        if totals is not None:
            means, counts = totals
            prefix = ""
            if mode == "eval":
                # The loss of transformers is a mean of the means of batches.
                loss_name = next((name for name in logs if name.endswith("_loss")), "eval_loss")
                logs[loss_name] = means[0] + self._objective.second_weight * means[1]
                prefix = loss_name.removesuffix("loss")
            for name, mean, count in zip(self._objective.loss_names, means, counts):
                logs[f"{prefix}{name}"] = mean
                if name.endswith("_loss"):
                    logs[f"{prefix}{name.removesuffix('loss')}tokens"] = count
        super().log(logs, start_time)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Make the batches of an evaluation; all is as in `transformers.Trainer.get_eval_dataloader`."""
        of_texts = partial(find_tokenizer, self.model, self.processing_class)
        return super().get_eval_dataloader(prepare_dataset(eval_dataset, self.args, of_texts))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """Make the batches of `predict`; all is as in `transformers.Trainer.get_test_dataloader`."""
        of_texts = partial(find_tokenizer, self.model, self.processing_class)
        return super().get_test_dataloader(prepare_dataset(test_dataset, self.args, of_texts))

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate the losses, then decode a few prompts; see `cllm_hf.training.monitoring`."""
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
        )
        metrics = {**(output.metrics or {}), **decoding_metrics(self, dataloader, metric_key_prefix)}
        return output._replace(metrics=metrics)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the model or adapter, its tokenizer, a generation config that decodes by Jacobi by default, a model card,
        and with `export_custom_generate=True` Jacobi decoding for people without this package.

        A model card that somebody else has written stays as it is.

        Args:
            output_dir (`str`, *optional*): folder; by default `args.output_dir`.
        """
        folder = Path(output_dir or self.args.output_dir)
        is_checkpoint = _internal_call and output_dir is not None
        if not is_checkpoint:
            wait_for_push(self)
        saved = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        with card_left_alone(saved, folder) if self.args.should_save else nullcontext():
            super().save_model(output_dir, _internal_call=True)  # does not push yet
        if self.args.should_save:
            save_beside(self, self._card, folder, is_checkpoint)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def create_model_card(  # type: ignore[override]  # as in TRL's trainers
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """
        Write the model card into `args.output_dir`, or renew it; one that somebody else has written stays as it is.

        transformers calls this at every checkpoint and push. What stands in a repository that is pushed to counts too.

        Args:
            model_name (`str`, *optional*): title of the card.
            dataset_name (`str`, *optional*): id of the dataset on the Hub; later cards have it too.
            tags (`str` or `list[str]`, *optional*): tags beside those of the trainer.
        """
        if not self.is_world_process_zero():
            return
        if dataset_name is not None:
            self.dataset_name = dataset_name
        self._card.renew(model_name, [tags] if isinstance(tags, str) else list(tags or ()))

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Upload what `save_model` saves to the repository `args.hub_model_id`, which is made if there is none.

        A model card that somebody else has written there stays as it is.

        Args:
            commit_message (`str`, *optional*): of the commit.
            blocking (`bool`): whether to wait until it is done.
            token (`str`, *optional*): access token; by default `args.hub_token` or the stored one.
            revision (`str`, *optional*): branch; by default `args.hub_revision` or the main one.
            private (`bool`, *optional*): whether a new repository is private.
            kwargs: passed to `create_model_card`.

        Returns:
            What `transformers.Trainer.push_to_hub` returns.
        """
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        if self.is_world_process_zero():
            self._card.fetch(token, revision)
        return super().push_to_hub(commit_message, blocking, token, revision, private, **kwargs)
