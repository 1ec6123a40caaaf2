"""`CLLMTrainer`: consistency training of a causal language model, full or with an adapter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .._host import base_model_of
from ..cards import CLLM_CITATION
from ..files import check_writable
from ..integration import DEFAULT_BLOCK_SIZE, set_jacobi_defaults
from ..packing import check_packable, pack, packed_forward
from ..trajectories.schema import check_dataset, check_record
from .collator import TrajectoryCollator
from .config import CLLMConfig
from .losses import ar_cross_entropy, forward_kl
from .saving import SavingTrainer
from .target import load_target, load_target_tokenizer


_REFUSED_ARGUMENTS = (
    "data_collator",
    "compute_loss_func",
    "compute_metrics",
    "preprocess_logits_for_metrics",
    "formatting_func",
)


class CLLMTrainer(SavingTrainer):
    """
    Trains a model to reach the fixed point of a block from any state of its trajectory (CLLM, arXiv 2403.00835).

    Each step runs one packed forward: the clean sequence of every response, whose logits are both the targets (without
    gradient) and the AR loss, and one state of each of its blocks. The loss is

        consistency_loss = mean over positions whose context holds a wrong draft token of
                           KL( p(. | fixed point) without gradient || q(. | state) )
        loss = consistency_loss + ar_loss_weight * ar_loss

    The means are over all positions of an update, so that gradient accumulation and several processes give the
    gradient of one large batch.

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
        if train_dataset is None:
            raise ValueError("`train_dataset` is required: trajectories from `cllm_hf.TrajectoryBuilder`, got none.")
        if isinstance(train_dataset, dict):
            raise ValueError(
                f"`train_dataset` must be one dataset, got a dictionary of {', '.join(map(str, train_dataset))}. Pass "
                "one of them, such as `dataset['train']`."
            )
        self.block_size = _check_datasets(train_dataset, eval_dataset, args.block_size)
        if args.should_save:
            check_writable(Path(str(args.output_dir)))  # before the training, not after it
        # The records go to our collator as they are; mixture-of-experts models keep their balancing loss out of it.
        args.remove_unused_columns = False
        args.dataset_kwargs = {"skip_prepare_dataset": True}
        args.router_aux_loss_coef = 0.0
        super().__init__(
            load_target(model, args, peft_config, kwargs.get("quantization_config")),
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=load_target_tokenizer(model) if processing_class is None else processing_class,
            peft_config=peft_config,
            **{**kwargs, "data_collator": TrajectoryCollator(self.block_size, args.max_length)},
        )
        check_packable(base_model_of(self.model))
        set_jacobi_defaults(self.model, self.block_size)
        # For each mode and loss: sum over positions and number of positions since the last log.
        self._loss_sums: dict[str, dict[str, list[torch.Tensor]]] = {
            "train": defaultdict(list),
            "eval": defaultdict(list),
        }
        self._update_counts: torch.Tensor | None = None

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """
        Fetch the batches of an update, and count the positions that its losses are means over.

        Args:
            epoch_iterator (`Iterator`): the batches of this epoch.
            num_batches (`int`): gradient accumulation steps.
            device (`torch.device`): of the counts.

        Returns:
            `tuple`: the batches, and what the host counts.
        """
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            counts = torch.stack([_position_counts(batch) for batch in batches]).sum(0).to(device)
            if self.accelerator.num_processes > 1:
                # Gradients are averaged over processes, so each divides by its share of all positions.
                counts = self.accelerator.gather(counts[None]).sum(0) / self.accelerator.num_processes
            self._update_counts = counts
        return batches, num_items

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """
        The loss of one batch: its share of the means over the update in training, its own means in evaluation.

        Args:
            model (`torch.nn.Module`): the model, possibly wrapped.
            inputs (`dict[str, torch.Tensor]`): what `TrajectoryCollator` gives.
            return_outputs (`bool`): whether to return the losses by name too.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): not used; see `get_batch_samples`.

        Returns:
            `torch.Tensor`: the loss, or a `tuple` of it and a `dict` of the two losses.
        """
        sums, counts = self._loss_terms(model, inputs)
        mode = "train" if self.model.training else "eval"
        denominators = counts if mode == "eval" or self._update_counts is None else self._update_counts
        means = sums / denominators.clamp(min=1)
        loss = means[0] + self.args.ar_loss_weight * means[1]
        self._loss_sums[mode]["sums"].append(sums.detach())
        self._loss_sums[mode]["counts"].append(counts)
        return (loss, {"consistency_loss": means[0], "ar_loss": means[1]}) if return_outputs else loss

    def _loss_terms(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums of the consistency and the AR loss, and the numbers of their positions; both of shape `(2,)`."""
        packed = pack(
            inputs["clean_ids"], inputs["clean_mask"], inputs["states"], inputs["anchors"], inputs["block_mask"]
        )
        logits = packed_forward(model, packed, self.model.config, self.model.dtype)
        clean_logits, block_logits = packed.split(logits)
        row, block, position = inputs["consistency_mask"].nonzero(as_tuple=True)
        targets = clean_logits[row, inputs["anchors"][row, block] + position]
        consistency = forward_kl(block_logits[row, block, position], targets).sum()
        row, position = (inputs["labels"] != -100).nonzero(as_tuple=True)
        ar = ar_cross_entropy(clean_logits[row, position - 1], inputs["labels"][row, position]).sum()
        return torch.stack([consistency, ar]), _position_counts(inputs)

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
            for name, total, count in zip(("consistency_loss", "ar_loss"), *totals):
                self._metrics[mode][name] = [total / max(count, 1)]
                self._metrics[mode][f"{name.removesuffix('_loss')}_tokens"] = [count]
            recorded.clear()
        super().log(logs, start_time)


def _position_counts(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Numbers of positions of the consistency and the AR loss, of shape `(2,)`."""
    return torch.stack([inputs["consistency_mask"].sum(), (inputs["labels"] != -100).sum()])


def _check_datasets(train_dataset: Any, eval_dataset: Any, block_size: int | None) -> int:
    datasets = [train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset])]
    for dataset in datasets:
        if isinstance(dataset, Dataset):
            block_size = check_dataset(dataset, block_size)
        elif dataset is not None:
            block_size = check_record(next(iter(dataset)), block_size)
    return block_size or DEFAULT_BLOCK_SIZE
