"""What `CLLMTrainer` leaves: a folder or repository that others can load, with decoding defaults and a model card."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import RemoteEntryNotFoundError
from huggingface_hub.utils import httpx
from transformers import TrainerCallback
from trl import SFTConfig

from .._host import base_model_of
from .._version import __version__
from ..blocks.drafter import find_drafter
from ..cards import is_ours_alone, license_metadata
from ..export import export_custom_generate, is_exported
from ..files import read_text, write_whole
from ..names import Name
from ..trajectories.loading import hub_id_of
from ..trajectories.manifest import MANIFEST_NAME
from .card import BEGIN, ModelFacts, join_cards, make_model_card, renew_model_card
from .config import LOSSLESS_ALONE, NOT_LOSSLESS
from .plotting import PLOT_NAME, plot_run


logger = logging.getLogger(__name__)

_CARD, _ASIDE = "README.md", ".README.md.earlier"
_PEFT_CARD = "create_or_update_model_card"  # what PEFT calls to write a card
_PACKAGES = ("transformers", "trl", "peft", "datasets", "torch")
# Arguments of transformers that define a training, beside the size of its batches.
_ARGUMENTS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "seed",
    "bf16",
    "fp16",
)
# Options that change what is written, not what is learned.
_NOT_TRAINING = {"block_size", "logging_first_step", "export_custom_generate", "plot_run", "on_collapse"}
_NOT_TRAINING |= {"num_monitored_prompts", "monitored_max_new_tokens"}
# Options that say nothing about a training with and without `lossless`.
_NO_PART = {
    True: {*NOT_LOSSLESS, "trajectory_source"},
    False: {"lossless", *LOSSLESS_ALONE},
}
_NO_ANSWER = (httpx.HTTPError, OSError, ValueError)  # of the Hub: no such thing, no network, no valid name


class RunCard:
    """
    The model card of a run: in the folders that its trainer saves to, and in the repository that it pushes to.

    A card that somebody else has written stays as it is.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._base_license: dict[str, Any] | None = None
        self._has_fetched = False

    def renew(self, title: str | None = None, tags: Sequence[str] = ()) -> None:
        """Write or renew the card in `args.output_dir`; what stands in a repository that is pushed to counts too."""
        args = self._trainer.args
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        put_card_back(folder)
        if args.push_to_hub and not self._has_fetched:
            self.fetch()
        self.write(folder, read_text(folder / _CARD), title, tags)

    def write(self, folder: Path, earlier: str | None, title: str | None = None, tags: Sequence[str] = ()) -> None:
        """Write the card into a folder, in place of the earlier one if that is ours."""
        card = renew_model_card(earlier, make_model_card(self._facts(folder, title, tags)))
        path = folder / _CARD
        if card is not None and (path.is_file() or not os.path.lexists(path)):  # else somebody else's
            write_whole(path, card)

    def fetch(self, token: str | None = None, revision: str | None = None) -> None:
        """Put the card of the repository into the folder that is pushed, so that the push does not replace it."""
        args, repo_id = self._trainer.args, str(self._trainer.hub_model_id)
        path = Path(args.output_dir) / _CARD
        self._has_fetched = True
        api, revision = HfApi(token=token or args.hub_token), revision or args.hub_revision
        try:
            text = read_text(Path(api.hf_hub_download(repo_id, _CARD, revision=revision)))
        except RemoteEntryNotFoundError:
            return
        except _NO_ANSWER as error:
            logger.warning("The model card of %s cannot be read, and may be replaced: %s", repo_id, error)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, join_cards(read_text(path), text or ""))

    def _facts(self, folder: Path, title: str | None, tags: Sequence[str]) -> ModelFacts:
        trainer, args = self._trainer, self._trainer.args
        model = base_model_of(trainer.model)
        adapter: Any = trainer.model.active_peft_config if model is not trainer.model else None
        base = adapter.base_model_name_or_path if adapter else model.name_or_path
        if self._base_license is None:
            self._base_license = _license_of(base)
        # The shards of these say nothing about the whole.
        is_whole = not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        repo_id, dataset, drafter = trainer.hub_model_id, trainer.train_dataset, find_drafter(model)
        return ModelFacts(
            block_size=trainer.block_size,
            num_masks=drafter.num_masks if drafter else None,
            markov_rank=drafter.markov_rank if drafter else 0,
            repo_id=repo_id,
            title=title or (repo_id.split("/")[-1] if repo_id else folder.resolve().name),
            base_model=_hide_folder(base),
            adapter=_describe_adapter(adapter),
            can_merge=_can_merge(model),
            architecture=type(model).__name__.removeprefix("FSDP"),
            num_parameters=model.num_parameters() if is_whole else None,
            num_trained=trained if is_whole else None,
            dataset_name=trainer.dataset_name or hub_id_of(dataset),
            num_responses=len(dataset) if isinstance(dataset, Dataset) else None,
            options=consistency_options(args),
            arguments=_training_arguments(args),
            num_updates=trainer.state.global_step,
            num_epochs=trainer.state.epoch,
            log_history=trainer.state.log_history,
            plot=PLOT_NAME if args.plot_run and (folder / PLOT_NAME).is_file() else None,
            measured=trainer.measured,
            license=self._base_license,
            tags=[*trainer._tag_names, *([adapter.peft_type.value.lower()] if adapter else []), *tags],
            versions=_versions(has_adapter=adapter is not None),
            has_custom_generate=is_exported(folder),
        )


def check_leftovers(folder: Path, is_adapter: bool) -> None:
    """
    Check that a folder holds no model of the other kind, since whoever loads it would get that one, or both, and no
    dataset, whose card would stand in the place of the model's.
    """
    if (folder / MANIFEST_NAME).is_file():
        raise ValueError(
            f"The output folder must not hold a dataset, got {str(folder)!r} with the trajectories of `cllm collect`. "
            "Choose another output folder."
        )
    kind, other, name = ("adapter", "whole model", "config.json")
    if not is_adapter:
        kind, other, name = ("whole model", "adapter", "adapter_config.json")
    if (folder / name).is_file():
        raise ValueError(
            f"The output folder would hold two models: {str(folder)!r} has the {other} of an earlier run, and now "
            f"comes {'an' if is_adapter else 'a'} {kind}. Choose another output folder, or empty that one."
        )


def save_beside(trainer: Any, card: RunCard, folder: Path, is_checkpoint: bool) -> None:
    """
    Save what a folder has beside the weights: a generation config that decodes by Jacobi by default, Jacobi decoding
    for people without this package where `export_custom_generate` asks for it, and the model card. A checkpoint to
    resume from goes without the export.
    """
    earlier = read_text(folder / _CARD)
    # An adapter is saved without one; `cllm_hf.load_cllm` applies it.
    trainer.model.generation_config.save_pretrained(folder)
    if trainer.args.export_custom_generate and not is_checkpoint:
        export_custom_generate(folder)
        if earlier is not None:
            earlier = read_text(folder / _CARD)  # with a tag more
    card.write(folder, earlier)


def wait_for_push(trainer: Any) -> None:
    """
    Wait for the checkpoint that is on its way to the Hub, before files that it reads are written anew: an upload of a
    file that changes fails as a whole. One that failed gets a warning, for transformers tells nobody.
    """
    push = getattr(trainer, "push_in_progress", None)
    if push is None:
        return
    push.wait_until_done()
    for error in filter(None, (job.exception() for job in push.jobs)):
        logger.warning("A checkpoint was not pushed to %s: %s", trainer.hub_model_id, error)
    trainer.push_in_progress = None


class PushCallback(TrainerCallback):
    """
    Lets a push of a checkpoint end before the files that it reads are written for the next.

    With `hub_always_push=True` transformers would write them at once; without it a checkpoint is not pushed at all
    while the one before is on its way.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wait_for_push(self._trainer)


class PlotCallback(TrainerCallback):
    """
    Draws the losses and what evaluation decoded over optimizer steps into `training.png` in `output_dir`.

    It is drawn anew after each evaluation, unless the last one is just being pushed to the Hub, and at the end. A plot
    that cannot be written gets a warning; the training goes on.
    """

    def __init__(self, trainer: Any = None) -> None:
        self._trainer = trainer
        self._has_warned = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A plot of an earlier run in the same folder says nothing of this one."""
        if state.is_world_process_zero and state.global_step == 0:
            (Path(args.output_dir) / PLOT_NAME).unlink(missing_ok=True)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        push = getattr(self._trainer, "push_in_progress", None)
        if push is None or push.is_done():  # else a thread reads files of `output_dir`
            self._draw(args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wait_for_push(self._trainer)
        self._draw(args, state)

    def _draw(self, args: Any, state: Any) -> None:
        if not state.is_world_process_zero:
            return
        try:
            plot_run(state.log_history, Path(args.output_dir) / PLOT_NAME)
        except (OSError, ImportError) as error:  # a full disk, or no matplotlib
            if not self._has_warned:
                logger.warning("The plot of the run was not written (%s). The training goes on without it.", error)
            self._has_warned = True


def consistency_options(args: SFTConfig) -> dict[str, Any]:
    """Options with a part in the training that a config adds to those of transformers, or gives another meaning."""
    kinds = type(args).__mro__[: type(args).__mro__.index(SFTConfig)]
    own = {name: None for kind in reversed(kinds) for name in inspect.get_annotations(kind)}
    names = {entry.name for entry in fields(args)} - _NOT_TRAINING - _NO_PART[getattr(args, "lossless", False)]
    return {name: getattr(args, name) for name in own if name in names}


@contextmanager
def card_left_alone(model: Any, folder: Path) -> Iterator[None]:
    """
    Keep PEFT from the card of a folder while it saves an adapter: it changes every one that it finds, fails on one
    whose metadata are not valid, and writes one where there is none. So the card is never anywhere but in its place,
    and whatever happens to the process happens to the card of nobody.
    """
    put_card_back(folder)
    if not hasattr(model, _PEFT_CARD):
        yield
        return
    setattr(model, _PEFT_CARD, lambda output_dir: None)
    try:
        yield
    finally:
        delattr(model, _PEFT_CARD)


def put_card_back(folder: Path) -> None:
    """
    Put back the card of a folder that version 0.1.0 had set aside when it was killed.

    It stays aside where something else has its place that was not written by a machine alone.
    """
    path, aside = folder / _CARD, folder / _ASIDE
    if not aside.is_file() or aside.is_symlink():
        return
    card = read_text(path)
    if os.path.lexists(path) and (card is None or not (_is_of_peft(card) or is_ours_alone(card, BEGIN))):
        logger.warning(
            "%s is the model card of an earlier save that was killed, but there is another %s. Keep the one that you "
            "want to keep, and remove the other.",
            aside,
            _CARD,
        )
        return
    os.replace(aside, path)  # in one step, so that no kill leaves both


def _is_of_peft(card: str) -> bool:
    """Whether PEFT has written a card, whole or cut, and nobody has filled in anything since."""
    is_cut = not card.strip() or (card.startswith("---\n") and "\n---" not in card)
    return is_cut or ("# Model Card for Model ID" in card and "[More Information Needed]" in card)


def _hide_folder(name: str | None) -> str | None:
    """A folder that happens to be written as an id of the Hub is none."""
    return f"./{name}" if name and Name.recorded(name).hub_id and Name.find(name).path else name or None


def _training_arguments(args: SFTConfig) -> dict[str, Any]:
    sizes = ("per_device_train_batch_size", "gradient_accumulation_steps", "world_size")
    values = {name: getattr(args, name, None) for name in (*sizes, *_ARGUMENTS)}
    return {name: value for name, value in values.items() if value is not False}


def _describe_adapter(config: Any) -> str | None:
    if config is None:
        return None
    parts = [f"{config.peft_type.value} adapter"]
    if getattr(config, "r", None):
        parts.append(f"rank {config.r}")
    if getattr(config, "modules_to_save", None):
        parts.append(f"{', '.join(config.modules_to_save)} trained in full")
    return ", ".join(parts)


def _can_merge(model: Any) -> bool:
    """PEFT cannot merge an adapter on embeddings that are the head as well: the head would change too."""
    is_tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    return not (is_tied and hasattr(model.get_input_embeddings(), "base_layer"))


def _license_of(name: str | None) -> dict[str, Any]:
    """Metadata of the license of a base model, where its card is at hand and says it."""
    if not name:
        return {}
    try:
        folder, repo_id = Name.find(name).path, Name.recorded(name).hub_id
        if folder is None:
            if repo_id is None:
                return {}
            folder = Path(HfApi().hf_hub_download(repo_id, _CARD)).parent
        text = read_text(folder / _CARD)
        data = ModelCard(text).data.to_dict() if text else {}
    except Exception as error:  # also of the parser of YAML; without a license the card is good too
        logger.debug("The license of %s is not known: %s", name, error)
        return {}
    if not isinstance(data.get("license"), str):
        return {}
    kept = {entry: data[entry] for entry in ("license_name", "license_link") if data.get(entry)}
    return {**kept, **license_metadata([data["license"]])}


def _versions(has_adapter: bool) -> dict[str, str]:
    packages = [name for name in _PACKAGES if name != "peft" or has_adapter]
    return {"cllm_hf": __version__, **{name: version(name) for name in packages}}
