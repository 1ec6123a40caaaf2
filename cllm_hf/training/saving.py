"""What `CLLMTrainer` leaves: a folder or repository that others can load, with decoding defaults and a model card."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from datasets import Dataset
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import RemoteEntryNotFoundError
from huggingface_hub.utils import httpx
from trl import SFTConfig, SFTTrainer

from .._host import base_model_of
from .._version import __version__
from ..cards import license_metadata
from ..export import export_custom_generate, is_exported
from ..files import write_whole
from ..names import Name
from ..trajectories.loading import hub_id_of
from .card import ModelFacts, join_cards, make_model_card, renew_model_card
from .plotting import PLOT_NAME


logger = logging.getLogger(__name__)

_CARD = "README.md"
_PACKAGES = ("transformers", "trl", "peft", "datasets", "torch")
# Arguments of the host that define a training, beside the size of its batches.
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
_NO_ANSWER = (httpx.HTTPError, OSError, ValueError)  # of the Hub: no such thing, no network, no valid name


class SavingTrainer(SFTTrainer):
    """
    The part of `CLLMTrainer` that saves and publishes the model.

    Attributes:
        dataset_name (`str`, *optional*): id of the dataset on the Hub, for the model card. By default where
            `load_trajectories` has loaded it from.
        measured (`Mapping[str, Any]`): what was measured of the finished model, for the model card: a name and a
            number or text each, such as `{"speed-up over generate()": 3.3}`. Nothing unless you set it.
    """

    dataset_name: str | None = None
    measured: Mapping[str, Any] = MappingProxyType({})
    block_size: int
    model: Any
    args: Any
    _base_license: dict[str, Any] | None = None
    _has_fetched_card = False

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
        with _set_aside(folder / _CARD) if self.args.should_save else nullcontext():
            super().save_model(output_dir, _internal_call=True)  # does not push yet
        if self.args.should_save:
            earlier = _read(folder / _CARD)
            # An adapter is saved without one; `cllm_hf.load_cllm` applies it.
            self.model.generation_config.save_pretrained(folder)
            if self.args.export_custom_generate and not is_checkpoint:
                export_custom_generate(folder)
                if earlier is not None:
                    earlier = _read(folder / _CARD)  # with a tag more
            self._write_card(folder, earlier)
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

        The host calls this at every checkpoint and push. What stands in a repository that is pushed to counts as well.

        Args:
            model_name (`str`, *optional*): title of the card.
            dataset_name (`str`, *optional*): id of the dataset on the Hub; later cards have it too.
            tags (`str` or `list[str]`, *optional*): tags beside those of the trainer.
        """
        if not self.is_world_process_zero():
            return
        if dataset_name is not None:
            self.dataset_name = dataset_name
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if self.args.push_to_hub and not self._has_fetched_card:
            self._fetch_card()
        tags = [tags] if isinstance(tags, str) else list(tags or ())
        self._write_card(folder, _read(folder / _CARD), model_name, tags)

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
            self._fetch_card(token, revision)
        return super().push_to_hub(commit_message, blocking, token, revision, private, **kwargs)

    def _fetch_card(self, token: str | None = None, revision: str | None = None) -> None:
        """Put the card of the repository into the folder that is pushed, so that the push does not replace it."""
        path = Path(self.args.output_dir) / _CARD
        self._has_fetched_card = True
        api, revision = HfApi(token=token or self.args.hub_token), revision or self.args.hub_revision
        try:
            text = _read(Path(api.hf_hub_download(str(self.hub_model_id), _CARD, revision=revision)))
        except RemoteEntryNotFoundError:
            return
        except _NO_ANSWER as error:
            logger.warning("The model card of %s cannot be read, and may be replaced: %s", self.hub_model_id, error)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, join_cards(_read(path), text or ""))

    def _write_card(
        self, folder: Path, earlier: str | None, title: str | None = None, tags: Sequence[str] = ()
    ) -> None:
        card = renew_model_card(earlier, make_model_card(self._card_facts(folder, title, tags)))
        if card is not None:
            write_whole(folder / _CARD, card)

    def _card_facts(self, folder: Path, title: str | None, tags: Sequence[str]) -> ModelFacts:
        model = base_model_of(self.model)
        adapter: Any = self.model.active_peft_config if model is not self.model else None
        base = adapter.base_model_name_or_path if adapter else model.name_or_path
        if self._base_license is None:
            self._base_license = _license_of(base)
        # The shards of these say nothing about the whole.
        is_whole = not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        repo_id = self.hub_model_id
        return ModelFacts(
            block_size=self.block_size,
            repo_id=repo_id,
            title=title or (repo_id.split("/")[-1] if repo_id else folder.resolve().name),
            base_model=_hide_folder(base),
            adapter=_describe_adapter(adapter),
            can_merge=_can_merge(model),
            architecture=type(model).__name__.removeprefix("FSDP"),
            num_parameters=model.num_parameters() if is_whole else None,
            num_trained=trained if is_whole else None,
            dataset_name=self.dataset_name or hub_id_of(self.train_dataset),
            num_responses=len(self.train_dataset) if isinstance(self.train_dataset, Dataset) else None,
            options=consistency_options(self.args),
            arguments=self._card_arguments(),
            num_updates=self.state.global_step,
            num_epochs=self.state.epoch,
            log_history=self.state.log_history,
            plot=PLOT_NAME if self.args.plot_run and (folder / PLOT_NAME).is_file() else None,
            measured=self.measured,
            license=self._base_license,
            tags=[*self._tag_names, *([adapter.peft_type.value.lower()] if adapter else []), *tags],
            versions=_versions(has_adapter=adapter is not None),
            has_custom_generate=is_exported(folder),
        )

    def _card_arguments(self) -> dict[str, Any]:
        sizes = ("per_device_train_batch_size", "gradient_accumulation_steps", "world_size")
        values = {name: getattr(self.args, name, None) for name in (*sizes, *_ARGUMENTS)}
        return {name: value for name, value in values.items() if value is not False}


def is_pushing(trainer: Any) -> bool:
    """
    Whether a checkpoint is on its way to the Hub, in a thread that reads files of `output_dir`.

    Args:
        trainer (`transformers.Trainer`): the trainer.

    Returns:
        `bool`: `False` also before its first push.
    """
    push = getattr(trainer, "push_in_progress", None)
    return push is not None and not push.is_done()


def wait_for_push(trainer: Any) -> None:
    """
    Wait for the checkpoint that is on its way to the Hub, before files that it reads are written anew: an upload of a
    file that changes fails as a whole. One that failed gets a warning, for the host tells nobody.

    Args:
        trainer (`transformers.Trainer`): the trainer.
    """
    push = getattr(trainer, "push_in_progress", None)
    if push is None:
        return
    push.wait_until_done()
    for error in filter(None, (job.exception() for job in push.jobs)):
        logger.warning("A checkpoint was not pushed to %s: %s", trainer.hub_model_id, error)
    trainer.push_in_progress = None


def consistency_options(args: SFTConfig) -> dict[str, Any]:
    """
    Options that a config adds to those of the host, or gives another meaning.

    Args:
        args (`trl.SFTConfig`): a `CLLMConfig`, or an instance of a subclass of it.

    Returns:
        `dict[str, Any]`: values by name, without those that have no part in the training.
    """
    kinds = type(args).__mro__[: type(args).__mro__.index(SFTConfig)]
    own = {name: None for kind in reversed(kinds) for name in inspect.get_annotations(kind)}
    names = {entry.name for entry in fields(args)} - _NOT_TRAINING
    return {name: getattr(args, name) for name in own if name in names}


@contextmanager
def _set_aside(path: Path) -> Iterator[None]:
    """
    Keep a card from PEFT, which changes every one that it finds, fails on one whose metadata are not valid, and writes
    one where there is none.
    """
    aside = path.with_name(f".{path.name}.earlier")
    if aside.is_file() and not path.exists():  # a save was killed
        os.replace(aside, path)
    has_card = path.is_file()
    if has_card:
        os.replace(path, aside)
    try:
        yield
    finally:
        if has_card:
            os.replace(aside, path)
        else:
            path.unlink(missing_ok=True)


def _read(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open(encoding="utf-8", newline="") as file:
        return file.read()


def _hide_folder(name: str | None) -> str | None:
    """A folder that happens to be written as an id of the Hub is none."""
    return f"./{name}" if name and Name.recorded(name).hub_id and Name.find(name).path else name or None


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
    """Metadata of the licence of a base model, where its card is at hand and says it."""
    if not name:
        return {}
    try:
        folder, repo_id = Name.find(name).path, Name.recorded(name).hub_id
        if folder is None:
            if repo_id is None:
                return {}
            folder = Path(HfApi().hf_hub_download(repo_id, _CARD)).parent
        text = _read(folder / _CARD)
        data = ModelCard(text).data.to_dict() if text else {}
    except Exception as error:  # also of the parser of YAML; without a licence the card is good too
        logger.debug("The licence of %s is not known: %s", name, error)
        return {}
    if not isinstance(data.get("license"), str):
        return {}
    kept = {entry: data[entry] for entry in ("license_name", "license_link") if data.get(entry)}
    return {**kept, **license_metadata([data["license"]])}


def _versions(has_adapter: bool) -> dict[str, str]:
    packages = [name for name in _PACKAGES if name != "peft" or has_adapter]
    return {"cllm_hf": __version__, **{name: version(name) for name in packages}}
