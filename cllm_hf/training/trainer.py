"""`CLLMTrainer`: consistency training of a causal language model, full or with an adapter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import EvalLoopOutput

from .._host import base_model_of
from ..blocks.support import check_packable
from ..cards import CLLM_CITATION
from ..files import check_writable
from ..integration import set_jacobi_defaults
from .callbacks import add_callbacks
from .checks import check_datasets, check_leftovers, check_trainable
from .config import CLLMConfig
from .monitoring import decoding_metrics
from .objective import sum_losses
from .preparation import BatchPreparer, make_collator, prepare_dataset
from .processes import check_processes, drop_repeated
from .resuming import EpochCallback, ResumingTrainer
from .saving import SavingTrainer
from .target import load_target, load_target_tokenizer


_REFUSED_ARGUMENTS = (
    "data_collator",
    "compute_loss_func",
    "compute_metrics",
    "preprocess_logits_for_metrics",
    "formatting_func",
)


class CLLMTrainer(SavingTrainer, ResumingTrainer):
    """
    Trains a model to reach the fixed point of a block from any state of its trajectory (CLLM, arXiv 2403.00835).

    Each step runs one packed forward: the clean sequence of every response, whose logits are both the targets (without
    gradient) and the AR loss, and states of each of its blocks. The loss is

        consistency_loss = mean over positions whose context holds a wrong draft token of
                           D( p(. | fixed point) without gradient, q(. | state) )
        loss = consistency_loss + ar_loss_weight * ar_loss

    [`CLLMConfig`] says what there is to choose. The means are over all positions of an update, so that gradient
    accumulation and several processes give the gradient of one large batch. Which states an update trains on is a
    function of the seed, the number of the update and the record, so that a resumed run goes on as if nothing was.

    Args:
        model (`str`, `transformers.PreTrainedModel` or `peft.PeftModel`): the target model, or its name or path. An
            adapter, or its name or path, is trained further.
        args (`CLLMConfig`, *optional*): options.
        train_dataset (`datasets.Dataset` or `datasets.IterableDataset`): trajectories of the target model.
        eval_dataset (`datasets.Dataset` or `dict` of them, *optional*): trajectories for evaluation.
        processing_class (`transformers.PreTrainedTokenizerBase`, *optional*): the tokenizer.
        peft_config (`peft.PeftConfig`, *optional*): adapter to train instead of the whole model.
        kwargs: everything else that `trl.SFTTrainer` takes.

    Attributes:
        block_size (`int`): tokens of a block; saved as the model's default `jacobi_block_size`.

    Raises:
        OSError: if `args.output_dir` is not writable.
        ValueError: for a dataset that does not hold trajectories of one block size, a `data_collator`, loss function
            or metrics (the trainer has its own), or a model that cannot be packed.
    """

    _tag_names = ["trl", "cllm", "jacobi-decoding"]
    _name = "CLLM"
    _paper = {
        "title": "CLLMs: Consistency Large Language Models",
        "id": "2403.00835",
        "citation": CLLM_CITATION,
    }
    # The loss is divided by the positions of the whole update, see `get_batch_samples`.
    loss_is_scaled_for_ga: Any = True
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
        if not isinstance(train_dataset, dict):
            train_dataset = prepare_dataset(train_dataset, args)
        eval_dataset = prepare_dataset(eval_dataset, args)
        dataset_block_size = check_datasets(train_dataset, eval_dataset, args)
        self.block_size = args.block_size_schedule[-1] if args.block_size_schedule else dataset_block_size
        if args.should_save:
            check_writable(Path(str(args.output_dir)))  # before the training, not after it
        # The records go to our collator as they are; mixture-of-experts models keep their balancing loss out of it.
        args.remove_unused_columns = False
        args.dataset_kwargs = {"skip_prepare_dataset": True}
        args.router_aux_loss_coef = 0.0
        self._preparer = BatchPreparer.from_config(args, dataset_block_size)
        super().__init__(
            load_target(model, args, peft_config, kwargs.get("quantization_config")),
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=load_target_tokenizer(model) if processing_class is None else processing_class,
            peft_config=peft_config,
            **{**kwargs, "data_collator": make_collator(args, dataset_block_size)},
        )
        check_packable(base_model_of(self.model))
        check_trainable(self.model)
        if args.should_save:
            check_leftovers(Path(str(args.output_dir)), is_adapter=base_model_of(self.model) is not self.model)
        check_processes(args, self.accelerator)
        self.add_callback(EpochCallback())
        set_jacobi_defaults(self.model, self.block_size)
        # For each mode and loss: sum over positions and number of positions since the last log.
        self._loss_sums: dict[str, dict[str, list[torch.Tensor]]] = {
            "train": defaultdict(list),
            "eval": defaultdict(list),
        }
        self._update_counts: torch.Tensor | None = None
        add_callbacks(self)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """
        Fetch the batches of an update, choose the states to train on, and count the positions of its losses.

        Args:
            epoch_iterator (`Iterator`): the batches of this epoch.
            num_batches (`int`): gradient accumulation steps.
            device (`torch.device`): of the counts.

        Returns:
            `tuple`: the batches, and what the host counts.
        """
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            last = len(batches) - 1
            batches = [
                self._prepare_batch(self.model_wrapped, batch, "train", is_last=number == last)
                for number, batch in enumerate(batches)
            ]
            counts = torch.stack([batch["position_counts"] for batch in batches]).sum(0).to(device)
            if self.accelerator.num_processes > 1:
                # Gradients are averaged over processes, so each divides by its share of all positions.
                counts = self.accelerator.gather(counts[None]).sum(0) / self.accelerator.num_processes
            self._update_counts = counts
        return batches, num_items

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """
        The loss of one batch: its share of the means over the update in training, its own means in evaluation.

        Args:
            model (`torch.nn.Module`): the model, possibly wrapped.
            inputs (`dict`): what `TrajectoryCollator` gives, or `get_batch_samples`.
            return_outputs (`bool`): whether to return the losses by name too.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): not used; see `get_batch_samples`.

        Returns:
            `torch.Tensor`: the loss, or a `tuple` of it and a `dict` of the two losses.
        """
        mode = "train" if self.model.training else "eval"
        batch = inputs if "draft_blocks" in inputs else self._prepare_batch(model, inputs, mode)
        counts = denominators = batch["position_counts"]
        if batch is inputs and mode == "train" and self._update_counts is not None:
            denominators = self._update_counts
        # A record that is repeated to fill a batch has losses, but no positions.
        sums = sum_losses(model, base_model_of(self.model), batch, self._preparer.objective) * (counts > 0)
        # A process's share of few positions is less than one.
        means = sums / torch.where(denominators > 0, denominators, 1)
        loss = means[0] + self.args.ar_loss_weight * means[1]
        self._loss_sums[mode]["sums"].append(sums.detach())
        self._loss_sums[mode]["counts"].append(counts)
        return (loss, {"consistency_loss": means[0], "ar_loss": means[1]}) if return_outputs else loss

    def _prepare_batch(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor], mode: str, is_last: bool = True
    ) -> dict[str, Any]:
        """
        Choose states by the number of the update; in evaluation always the same, in blocks of the last size.

        The mode is not the model's: the host sets that only when the batches of an update have been fetched.
        """
        update, progress, counts = None, 1.0, True
        if mode == "train":
            update = self.state.global_step
            progress = self.state.global_step / self.state.max_steps if self.state.max_steps > 0 else 0.0
        if is_last:
            batch, counts = drop_repeated(batch, self.accelerator, self.args.dataloader_drop_last)
        prepared = self._preparer.prepare(model, base_model_of(self.model), batch, update, progress)
        return prepared if counts else {**prepared, "position_counts": torch.zeros_like(prepared["position_counts"])}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """
        Log, with the means of both losses since the last log and the numbers of positions they are over.

        Args:
            logs (`dict[str, float]`): what the host logs.
            start_time (`float`, *optional*): of the training.
        """
        mode = "train" if self.model.training else "eval"
        recorded = self._loss_sums[mode]
        if recorded:
            totals = torch.stack([torch.stack(recorded["sums"]).sum(0), torch.stack(recorded["counts"]).sum(0)])
            totals = self.accelerator.reduce(totals.double(), reduction="sum").tolist()
            means = [total / (count or 1) for total, count in zip(*totals)]
            prefix = ""
            if mode == "eval":
                # The host's loss is a mean of the means of batches.
                host_name = next((name for name in logs if name.endswith("_loss")), "eval_loss")
                logs[host_name] = means[0] + self.args.ar_loss_weight * means[1]
                prefix = host_name.removesuffix("loss")
            for name, mean, count in zip(("consistency", "ar"), means, totals[1]):
                logs[f"{prefix}{name}_loss"] = mean
                logs[f"{prefix}{name}_tokens"] = count
            recorded.clear()
        super().log(logs, start_time)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """
        Make the batches of an evaluation.

        Args:
            eval_dataset (`datasets.Dataset` or `str`, *optional*): as the host takes it.

        Returns:
            `torch.utils.data.DataLoader`.
        """
        return super().get_eval_dataloader(prepare_dataset(eval_dataset, self.args))

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """
        Evaluate a batch: its loss, and no logits, of which there are none for most positions.

        Args:
            model (`torch.nn.Module`): the model.
            inputs (`dict`): what `TrajectoryCollator` gives.
            prediction_loss_only (`bool`): not used; it is so always.
            ignore_keys (`list[str]`, *optional*): not used.

        Returns:
            `tuple`: the loss, and two times `None`.
        """
        return super().prediction_step(model, inputs, True, ignore_keys)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """
        Evaluate the losses, then decode a few prompts; see `cllm_hf.training.monitoring`.

        Args:
            dataloader (`torch.utils.data.DataLoader`): of the evaluation dataset.
            description (`str`): for the host's log.
            prediction_loss_only (`bool`, *optional*): whether the host gathers losses only.
            ignore_keys (`list[str]`, *optional*): not used here.
            metric_key_prefix (`str`): of the names of the metrics.

        Returns:
            `transformers.trainer_utils.EvalLoopOutput`: with what was measured among its metrics.
        """
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
        )
        metrics = {**(output.metrics or {}), **decoding_metrics(self, dataloader, metric_key_prefix)}
        return output._replace(metrics=metrics)
