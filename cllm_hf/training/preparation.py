"""From a collated batch to what an optimizer step trains on: states chosen or made, positions weighed and counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from .batch import PreparedBatch, TrainingBatch
from .collator import TrajectoryCollator
from .config import CLLMConfig
from .objective import Objective, count_positions, sum_losses, weigh_positions
from .online import make_online_states
from .states import DraftBlocks, choose_progressively, choose_uniformly, cut_blocks, take_states


def make_collator(config: CLLMConfig, block_size: int) -> TrajectoryCollator:
    """
    Make the collator that an objective needs.

    Args:
        config (`CLLMConfig`): options.
        block_size (`int`): tokens of a block in the dataset.

    Returns:
        `TrajectoryCollator`.
    """
    return TrajectoryCollator(
        block_size,
        config.max_length,
        with_states=config.trajectory_source == "dataset",
        # They stand in no order, so that none has a successor or a place in a schedule.
        with_augmented=config.consistency == "global" and config.state_sampling == "uniform",
        with_labels=config.ar_labels == "ground_truth",
    )


def prepare_dataset(dataset: Any, config: CLLMConfig) -> Any:
    """
    Have a dataset give Python lists, with the column by which the host groups records of similar length, if that was
    asked for and it is missing.

    Args:
        dataset (`datasets.Dataset`, `datasets.IterableDataset`, a `dict` of them, or `None`): trajectories.
        config (`CLLMConfig`): options.

    Returns:
        The same, ready for the host.
    """
    if isinstance(dataset, dict):
        return {key: prepare_dataset(one, config) for key, one in dataset.items()}
    if isinstance(dataset, Dataset) and dataset.format["type"] not in (None, "custom"):
        dataset = dataset.with_format(None)  # tensors of "torch" or "numpy" would only be taken apart again
    name = config.length_column_name
    is_wanted = config.train_sampling_strategy in ("group_by_length", "batch_rebalance")
    if not is_wanted or not isinstance(dataset, Dataset) or name in dataset.column_names:
        return dataset
    plain = dataset.with_format(None).select_columns(["prompt_ids", "response_ids"])
    lengths = [len(record["prompt_ids"]) + len(record["response_ids"]) for record in plain]
    return dataset.add_column(name, lengths)


@dataclass(frozen=True)
class BatchPreparer:
    """
    Chooses the states of every batch. The fields are those of `CLLMConfig`.

    Attributes:
        loss_names (`tuple[str, str]`): what `sum_losses` sums.
        objective (`Objective`): what is minimised.
        block_sizes (`tuple[int, ...]`): tokens of a block, in equal parts of the run.
        blocks_together (`int`): blocks that see each other's drafts.
    """

    loss_names: ClassVar[tuple[str, str]] = ("consistency_loss", "ar_loss")

    objective: Objective
    block_sizes: tuple[int, ...]
    blocks_together: int
    states_per_block: int
    state_sampling: str
    noise_window: int
    local: bool
    online: bool
    online_iterations: int
    seed: int

    @classmethod
    def from_config(cls, config: CLLMConfig, block_size: int) -> BatchPreparer:
        """Of the options of a run, for trajectories of a block size."""
        return cls(
            objective=Objective(
                config.divergence, config.divergence_temperature, config.ar_label_smoothing, config.position_decay
            ),
            block_sizes=tuple(config.block_size_schedule or [block_size]),
            blocks_together=config.noise_window if config.context == "noisy" else 1,
            states_per_block=config.states_per_block,
            state_sampling=config.state_sampling,
            noise_window=config.noise_window,
            local=config.consistency == "local",
            online=config.trajectory_source == "online",
            online_iterations=config.online_iterations,
            seed=config.seed if config.data_seed is None else config.data_seed,
        )

    def prepare(
        self,
        model: torch.nn.Module,
        base_model: PreTrainedModel,
        batch: TrainingBatch,
        update: int | None,
        progress: float,
    ) -> PreparedBatch:
        """
        Choose or make the states of a batch.

        Args:
            model (`torch.nn.Module`): the model that is trained, possibly wrapped.
            base_model (`transformers.PreTrainedModel`): the model in the wrappers.
            batch (`TrainingBatch`): the records.
            update (`int`, *optional*): number of the optimizer step, from 0 on; the same number, record and seed give
                the same choice. `None` in evaluation, which has a choice of its own.
            progress (`float`): share of the training that is done, from 0 to 1.

        Returns:
            `PreparedBatch`.
        """
        own_size = size_at(self.block_sizes, progress)
        block_size = own_size * self.blocks_together
        if self.online:
            blocks = self._make_states(model, base_model, batch, update, block_size)
        else:
            blocks = self._choose_states(batch, update, block_size)
        weights = weigh_positions(batch, blocks, self.objective.position_decay, own_size)
        return PreparedBatch(batch, blocks, weights, count_positions(batch, weights))

    def sum_losses(self, model: torch.nn.Module, base_model: PreTrainedModel, prepared: PreparedBatch) -> torch.Tensor:
        """
        Sum the losses of a batch; see `objective.sum_losses`.

        Args:
            model (`torch.nn.Module`): the model, possibly wrapped.
            base_model (`transformers.PreTrainedModel`): the model in the wrappers.
            prepared (`PreparedBatch`): from `prepare`.

        Returns:
            `torch.Tensor` of shape `(2,)`.
        """
        return sum_losses(model, base_model, prepared, self.objective)

    def _choose_states(self, batch: TrainingBatch, update: int | None, block_size: int) -> DraftBlocks:
        if batch.candidates is None or batch.num_candidates is None:
            raise ValueError("A batch must hold states to choose from, got none. Collate it with `with_states=True`.")
        candidates, num_candidates = batch.candidates, batch.num_candidates
        if self.state_sampling == "progressive":
            chosen = choose_progressively(
                candidates, num_candidates, candidates[:, :, -1], self.states_per_block, self.noise_window
            )
        else:
            draws = self._draw(batch, update, candidates.shape[1:2])
            chosen = choose_uniformly(num_candidates, draws, self.states_per_block)
        drafts = take_states(candidates, chosen)
        # After the last state comes the fixed point.
        successors = take_states(candidates, (chosen + 1).clamp(max=candidates.shape[2] - 1)) if self.local else None
        return cut_blocks(drafts, batch.response_ids, batch.response_lengths, block_size, successors)

    def _make_states(
        self,
        model: torch.nn.Module,
        base_model: PreTrainedModel,
        batch: TrainingBatch,
        update: int | None,
        block_size: int,
    ) -> DraftBlocks:
        num_windows = self.states_per_block * -(-batch.response_lengths // block_size)
        draws = self._draw(batch, update, (int(num_windows.max()), 1 + block_size))
        # A window reaches no further than the longest response; its tokens in a response are the same.
        block_size = min(block_size, int(batch.response_lengths.max()))
        draws = draws[..., : 1 + block_size]
        num_iterations = self.online_iterations
        if update is not None:
            num_iterations = int(_generator(self.seed, update).integers(self.online_iterations + 1))
        blocks = make_online_states(model, base_model, batch, draws, block_size, num_iterations, self.local)
        blocks.mask &= torch.arange(draws.shape[1], device=draws.device) < num_windows[:, None]
        return blocks

    def _draw(self, batch: TrainingBatch, update: int | None, shape: tuple[int, ...]) -> torch.Tensor:
        return draw_numbers(self.seed, batch, update, shape)


def size_at(block_sizes: Sequence[int], progress: float) -> int:
    """
    The block size of a moment of a run.

    Args:
        block_sizes (`Sequence[int]`): in equal parts of the run.
        progress (`float`): share of the training that is done, from 0 to 1.

    Returns:
        `int`.
    """
    return block_sizes[min(int(progress * len(block_sizes)), len(block_sizes) - 1)]


def draw_numbers(seed: int, batch: TrainingBatch, update: int | None, shape: tuple[int, ...]) -> torch.Tensor:
    """
    Draw random numbers for each record, the same ones for the same seed, optimizer step and record.

    Args:
        seed (`int`): of the run.
        batch (`TrainingBatch`): the records.
        update (`int`, *optional*): number of the optimizer step; `None` in evaluation.
        shape (`tuple[int, ...]`): numbers of a record, of which a longer shape only has more.

    Returns:
        `torch.Tensor` of shape `(batch_size, *shape)`: numbers in [0, 1).
    """
    numbers = np.stack([_generator(seed, update, key).random(shape) for key in batch.record_keys.tolist()])
    # As float32 the largest number would round to 1.
    return torch.from_numpy(numbers).clamp(max=1 - 2**-24).float().to(batch.clean_ids.device)


def _generator(seed: int, update: int | None, *key: int) -> np.random.Generator:
    return np.random.default_rng([seed, 0 if update is None else update + 1, *key])
