"""Training of heads on responses of a frozen model, for as long as one says."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tasks.data import read_json_rows
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from cllm_hf._host import input_device
from cllm_hf.files import decode_text, parse_json
from cllm_hf.trajectories.loading import load_trajectories
from cllm_hf.trajectories.sources import read_prompts_and_responses

from .heads import EAGLE, MEDUSA, EagleHead, Heads, MedusaHeads


# As published: what the loss of each further head of Medusa weighs, what EAGLE's cross-entropy weighs beside the
# distance of hidden states, and the noise that is added to those which it reads.
_DECAY, _ENTROPY_WEIGHT, _NOISE = 0.8, 0.1, 0.1
_BETAS, _MOST_GRADIENT = (0.9, 0.95), 0.5
_LEARNING_RATES = {MEDUSA: 1e-3, EAGLE: 5e-4}
_WARM_UP = 0.02  # of the training
_LAST_LOSSES = 20


@dataclass(frozen=True)
class HeadsSetting:
    """
    How heads are trained.

    Attributes:
        max_seconds (`float`, *optional*): the training ends after so long.
        max_steps (`int`, *optional*): or after so many optimizer steps, whichever comes first.
        batch_size (`int`): records of an optimizer step.
        learning_rate (`float`, *optional*): at most; it rises for 2% of the training, and falls as a cosine. By
            default that of the kind.
        max_length (`int`): tokens of a record; what is beyond is cut off.
        seed (`int`): of the order of records and the noise.
    """

    max_seconds: float | None = None
    max_steps: int | None = None
    batch_size: int = 8
    learning_rate: float | None = None
    max_length: int = 1024
    seed: int = 0

    def progress(self, steps: int, seconds: float) -> float:
        """
        Find how much of the training is over.

        Args:
            steps (`int`): optimizer steps that have been made.
            seconds (`float`): that they took.

        Returns:
            `float`: at least 1 at its end.
        """
        parts = [steps / self.max_steps if self.max_steps else 0.0]
        parts.append(seconds / self.max_seconds if self.max_seconds else 0.0)
        return max(parts)


@dataclass
class Batch:
    """Records side by side, padded on the right."""

    input_ids: torch.Tensor  # [batch_size, length]
    mask: torch.Tensor  # [batch_size, length]
    # Places of responses: the last token of the prompt has the first one after it.
    is_response: torch.Tensor  # [batch_size, length]
    hidden_states: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # [batch_size, length, hidden_size]


def read_records(path: Path, vocab_size: int) -> list[dict[str, list[int]]]:
    """
    Read prompts and responses as token ids: what adapters are trained on.

    Args:
        path (`pathlib.Path`): a file of JSON lines with `prompt_ids` and `response_ids`, or a dataset of trajectories.
        vocab_size (`int`): of the model.

    Returns:
        `list[dict]`.

    Raises:
        OSError: if there is no such file or dataset.
        ValueError: if a record has no such fields, or other tokens than the model.
    """
    if path.is_file():
        rows: Any = read_json_rows(path)
    else:
        rows = load_trajectories(path).select_columns(["prompt_ids", "response_ids"])
    records = []
    for number, row in enumerate(rows):
        for name in ("prompt_ids", "response_ids"):
            ids: Any = row.get(name) if isinstance(row, dict) else None
            is_list = isinstance(ids, list) and bool(ids) and all(type(token) is int for token in ids)
            if not is_list or not 0 <= min(ids) <= max(ids) < vocab_size:
                raise ValueError(
                    f"Record {number} of {str(path)!r} must have token ids from 0 to {vocab_size - 1} in `{name}`, "
                    f"got {json.dumps(ids)[:60]}. Pass records of the model that the heads are for."
                )
        records.append({name: row[name] for name in ("prompt_ids", "response_ids")})
    if not records:
        raise ValueError(f"There must be at least one record, got none in {str(path)!r}. Pass another dataset.")
    return records


def read_prompt_ids(path: Path, limit: int) -> list[list[int]] | None:
    """
    Read prompts that are token ids already.

    Args:
        path (`pathlib.Path`): a file of JSON lines.
        limit (`int`): the first so many are read.

    Returns:
        `list[list[int]]`, or `None` if the first line has no `prompt_ids`.

    Raises:
        OSError: if there is no such file.
        ValueError: if a later line has none, or is not JSON.
    """
    first = next((line for line in decode_text(path.read_bytes()).split("\n") if line.strip()), "")
    try:
        record: Any = parse_json(first)
    except ValueError:
        return None
    if not isinstance(record, dict) or "prompt_ids" not in record:
        return None
    prompts = read_prompts_and_responses(path, limit, "prompt_ids")[0]
    wrong = next((number for number, ids in enumerate(prompts, 1) if not isinstance(ids, list)), None)
    if wrong is not None:
        raise ValueError(f"Record {wrong} of {str(path)!r} must have token ids in `prompt_ids`. Correct it.")
    return prompts


def make_batch(records: Sequence[dict[str, list[int]]], max_length: int, device: torch.device) -> Batch:
    """Put records side by side."""
    texts = [[*record["prompt_ids"], *record["response_ids"]][:max_length] for record in records]
    length = max(map(len, texts))
    ids = torch.tensor([text + [0] * (length - len(text)) for text in texts])
    lengths = torch.tensor([len(text) for text in texts])[:, None]
    prompts = torch.tensor([len(record["prompt_ids"]) for record in records])[:, None]
    places = torch.arange(length)[None]
    mask = places < lengths
    return Batch(ids.to(device), mask.to(device), (mask & (places >= prompts)).to(device))


def draw_batches(
    records: Sequence[dict[str, list[int]]], setting: HeadsSetting, device: torch.device
) -> Iterator[Batch]:
    """Batches of all records in a new order, again and again."""
    generator = torch.Generator().manual_seed(setting.seed)
    while True:
        order = torch.randperm(len(records), generator=generator).tolist()
        for start in range(0, len(order), setting.batch_size):
            chosen = [records[index] for index in order[start : start + setting.batch_size]]
            yield make_batch(chosen, setting.max_length, device)


def losses(heads: Heads, model: PreTrainedModel, batch: Batch) -> Iterator[torch.Tensor]:
    """
    The parts of the loss of a batch with its hidden states, one by one, so that the graph of each can go before the
    next one is made.
    """
    return medusa_losses(heads, model, batch) if isinstance(heads, MedusaHeads) else eagle_losses(heads, model, batch)


def medusa_losses(heads: MedusaHeads, model: PreTrainedModel, batch: Batch) -> Iterator[torch.Tensor]:
    """The cross-entropy of each head, which weighs 0.8 times that of the one before."""
    output_embeddings = model.get_output_embeddings()
    starts = batch.is_response[:, 1:]  # [batch_size, length - 1]: the next token is one of the response
    for number in range(heads.num_heads):
        distance = number + 2  # the head reads a place and guesses so many places on
        chosen = starts[:, : max(batch.input_ids.shape[1] - distance, 0)] & batch.is_response[:, distance:]
        states = batch.hidden_states[:, : chosen.shape[1]][chosen]  # [num_places, hidden_size]
        if len(states):
            logits = heads.logits(number, states, output_embeddings).float()
            targets = batch.input_ids[:, distance:][chosen]
            yield _DECAY ** (number + 1) * torch.nn.functional.cross_entropy(logits, targets)


def eagle_losses(head: EagleHead, model: PreTrainedModel, batch: Batch) -> Iterator[torch.Tensor]:
    """Smooth L1 distance of guessed hidden states, and the cross-entropy of what the model says of them."""
    embeddings, output_embeddings = model.get_input_embeddings(), model.get_output_embeddings()
    states = batch.hidden_states
    noise = (2 * torch.rand_like(states) - 1) * _NOISE if head.training else 0.0
    # Padding stands on the right, where nobody looks: no mask is needed.
    guessed = head(embeddings(batch.input_ids[:, 1:]).float(), (states + noise)[:, :-1])
    chosen = batch.is_response[:, 1:]
    guessed, states = guessed[chosen], states[:, 1:][chosen]  # [num_places, hidden_size]
    dtype = output_embeddings.weight.dtype
    with torch.no_grad():
        shares = output_embeddings(states.to(dtype)).float().softmax(-1)
    logits = output_embeddings(guessed.to(dtype)).float()
    distance = torch.nn.functional.smooth_l1_loss(guessed, states)
    yield distance + _ENTROPY_WEIGHT * torch.nn.functional.cross_entropy(logits, shares)


def train_heads(
    heads: Heads,
    model: PreTrainedModel,
    records: Sequence[dict[str, list[int]]],
    setting: HeadsSetting,
    show_progress: bool = True,
) -> dict[str, Any]:
    """
    Train heads; the model stays as it is.

    Args:
        heads (`MedusaHeads` or `EagleHead`): in float32.
        model (`transformers.PreTrainedModel`): whose responses they learn to guess.
        records (`Sequence[dict]`): with `prompt_ids` and `response_ids`.
        setting (`HeadsSetting`): for how long, and how.
        show_progress (`bool`): whether a bar says how far it is.

    Returns:
        `dict`: `steps`, `seconds`, the `losses` of all optimizer steps, and the setting.

    Raises:
        ValueError: if the setting says neither a time nor a number of steps, or the loss is not finite.
    """
    if not setting.max_seconds and not setting.max_steps:
        raise ValueError("A training must end, got neither `max_seconds` nor `max_steps`. Pass one of them.")
    rate = _LEARNING_RATES[heads.kind] if setting.learning_rate is None else setting.learning_rate
    if rate <= 0:
        raise ValueError(f"`learning_rate` must be above 0, got {rate}. Typical values are 1e-4 to 1e-3.")
    model.requires_grad_(False)
    optimizer = torch.optim.AdamW(heads.parameters(), rate, betas=_BETAS)
    torch.manual_seed(setting.seed)
    found: list[float] = []
    start = time.perf_counter()
    heads.train()
    with tqdm(desc="Training", unit="step", total=setting.max_steps, disable=not show_progress) as bar:
        for batch in draw_batches(records, setting, input_device(model)):
            progress = setting.progress(len(found), time.perf_counter() - start)
            if progress >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = rate * min(progress / _WARM_UP + 1e-2, 1.0) * (1 + math.cos(math.pi * progress)) / 2
            found.append(_step(heads, model, batch, optimizer))
            bar.set_postfix(loss=f"{sum(found[-_LAST_LOSSES:]) / len(found[-_LAST_LOSSES:]):.3f}", refresh=False)
            bar.update()
    heads.eval()
    seconds = time.perf_counter() - start
    about = {**vars(setting), "learning_rate": rate}
    return {"steps": len(found), "seconds": seconds, "losses": found, "records": len(records), **about}


def _step(heads: Heads, model: PreTrainedModel, batch: Batch, optimizer: torch.optim.Optimizer) -> float:
    """One optimizer step; returns its loss."""
    decoder: Any = model.get_decoder()
    with torch.no_grad():
        batch.hidden_states = decoder(batch.input_ids, attention_mask=batch.mask.long(), use_cache=False)[0].float()
    total = 0.0
    for loss in losses(heads, model, batch):
        loss.backward()
        total += float(loss.detach())
    if not math.isfinite(total):
        raise ValueError(f"The loss must stay finite, got {total}. Pass a lower `learning_rate`.")
    torch.nn.utils.clip_grad_norm_(heads.parameters(), _MOST_GRADIENT)
    optimizer.step()
    optimizer.zero_grad()
    return total
