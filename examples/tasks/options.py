"""The options of a pipeline: a dataclass a section, read from YAML and the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml  # type: ignore[import-untyped]
from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig

from cllm_hf.loading import pick_device
from cllm_hf.options import JacobiOptions, check_block_size
from cllm_hf.training.config import CLLMConfig
from cllm_hf.trajectories.options import DEFAULT_TOKENS_PER_BATCH, CleaningRules, CollectionOptions

from .model_options import ModelOptions, describe_model, read_model
from .sections import apply_overrides, changed_values, check_names, closest, read_section
from .task import Task


# Options of the hosts that are the pipeline's own.
_REFUSED = {
    "output_dir": "every step has its folder in the top-level `output_dir`",
    "resume_from_checkpoint": "a step goes on by itself",
    "push_to_hub": "push the finished folder instead",
    "save_only_model": "a step goes on from its checkpoints",
    "block_size": "it is an option of the top level, the same for every step",
    "model_init_kwargs": "the section `model` has `dtype` and `attn_implementation`",
}
# What a training is not changed by.
_INCIDENTAL = {
    "disable_tqdm",
    "report_to",
    "run_name",
    "trackio_space_id",
    "project",
    "logging_dir",
    "logging_steps",
    "logging_strategy",
    "logging_first_step",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "plot_run",
    "num_monitored_prompts",
    "monitored_max_new_tokens",
}


@dataclasses.dataclass
class CollectOptions:
    """
    The section `collect`: how many prompts, and the options of `TrajectoryBuilder` and `CleaningRules` by name.

    Attributes:
        num_prompts (`int`, *optional*): training problems whose trajectories are collected, drawn with the seed; by
            default all.
        max_new_tokens (`int`, *optional*): by default that of the top level.
        dtype (`str`, *optional*): of the weights; by default that of the section `model`.
        device (`str`): such as `"cpu"`; `"auto"` for CUDA if there is one.
        responses_only (`bool`, *optional*): whether to collect responses without states; by default if the section
            `train` reads none (`trajectory_source: online` or `lossless: true`).
    """

    num_prompts: int | None = None
    max_new_tokens: int | None = None
    responses_only: bool | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    device: str = "auto"
    max_tokens_per_batch: int = DEFAULT_TOKENS_PER_BATCH
    prompts_per_shard: int = 1000
    augment: bool = False
    test_fraction: float = 0.0
    drop_duplicates: bool = True
    not_greedy: Literal["drop", "keep"] = "drop"
    max_token_run: int | None = 10
    max_sentence_repeats: int | None = 3
    drop_empty: bool = True
    drop_truncated: bool = False
    max_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_prompts", "max_new_tokens"):
            _check_count(f"collect.{name}", getattr(self, name), 1)
        pick_device(self.device, "collect.device")


@dataclasses.dataclass
class EvaluateOptions:
    """
    The section `evaluate`.

    Attributes:
        num_prompts (`int`): test problems that are decoded one at a time by every method, drawn with the seed.
        more_prompts (`int`, *optional*): further ones whose answers are judged but not timed; by default all others.
        max_new_tokens (`int`, *optional*): by default that of the top level.
        more_block_sizes (`list[int | str]`): block sizes, or `"auto"`, for further rows of both models by Jacobi.
        candidates (`list[int]`): values of `jacobi_candidates`, for a further row each beside every row by Jacobi.
        batch_size (`int`, *optional*): of the further ones; by default as many as fit the memory.
        repeats (`int`): rounds over the timed ones.
        is_compiled (`bool`): whether to add compiled `generate()` and Jacobi.
        dtype (`str`, *optional*): of the weights; by default that of the section `model`.
        device (`str`): such as `"cpu"`; `"auto"` for CUDA if there is one.
    """

    num_prompts: int = 50
    more_prompts: int | None = None
    max_new_tokens: int | None = None
    more_block_sizes: list[Any] = dataclasses.field(default_factory=list)
    candidates: list[Any] = dataclasses.field(default_factory=list)
    batch_size: int | None = None
    repeats: int = 1
    is_compiled: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("num_prompts", "max_new_tokens", "batch_size", "repeats"):
            _check_count(f"evaluate.{name}", getattr(self, name), 1)
        _check_count("evaluate.more_prompts", self.more_prompts, 0)
        pick_device(self.device, "evaluate.device")
        for size in self.more_block_sizes:
            check_block_size(size, "evaluate.more_block_sizes", allows_auto=True)
        for count in self.candidates:
            JacobiOptions(candidates=count)


@dataclasses.dataclass
class _Top:
    seed: int = 0
    block_size: int = 16
    max_new_tokens: int = 256
    output_dir: str = ""


_SECTIONS = ("task", "model", "draft", "sft", "collect", "train", "evaluate")


@dataclasses.dataclass(frozen=True)
class Options:
    """
    All options of a pipeline.

    Attributes:
        task (`Task`): the task.
        output_dir (`pathlib.Path`): folder of the run.
        seed (`int`): of the weights, the order of the data, and the choice of problems.
        block_size (`int`): tokens of a block.
        max_new_tokens (`int`): longest response, in tokens.
        model (`ModelOptions`): the target model.
        draft (`ModelOptions`, *optional*): a small model for assisted decoding.
        sft (`dict`, *optional*): options of `trl.SFTConfig`; `None` for a target model that is good as it is.
        collect (`CollectOptions`): the section.
        train (`dict`): options of `CLLMConfig`.
        evaluate (`EvaluateOptions`): the section.
        dependencies (`dict[str, dict[str, Any]]`): for each section and `"top"`: what was set to other values than
            the defaults and changes what comes out, by name.
    """

    task: Task
    output_dir: Path
    seed: int
    block_size: int
    max_new_tokens: int
    model: ModelOptions
    draft: ModelOptions | None
    sft: dict[str, Any] | None
    collect: CollectOptions
    train: dict[str, Any]
    evaluate: EvaluateOptions
    dependencies: dict[str, dict[str, Any]]

    def sft_config(self, folder: Path, changes: Mapping[str, Any] | None = None) -> SFTConfig:
        """
        Options of the training of the target model, or of a draft model.

        Args:
            folder (`pathlib.Path`): for its checkpoints.
            changes (`Mapping[str, Any]`, *optional*): options that differ.

        Returns:
            `trl.SFTConfig`.

        Raises:
            ValueError: for options that are not those of `SFTConfig`.
        """
        return _host_config(SFTConfig, {**(self.sft or {}), **(changes or {})}, "sft", folder, self.seed)

    def cllm_config(self, folder: Path) -> CLLMConfig:
        """
        Options of the training of the CLLM.

        Args:
            folder (`pathlib.Path`): for its checkpoints.

        Returns:
            `CLLMConfig`.

        Raises:
            ValueError: for options that are not those of `CLLMConfig`.
        """
        config = _host_config(CLLMConfig, self.train, "train", folder, self.seed)
        if config.trajectory_source == "online" and config.block_size is None:
            config.block_size = self.block_size
        return config

    @property
    def responses_only(self) -> bool:
        """`bool`: whether responses are collected without states."""
        wanted = self.collect.responses_only
        return self._trains_without_states if wanted is None else wanted

    @property
    def _trains_without_states(self) -> bool:
        return self.train.get("trajectory_source") == "online" or bool(self.train.get("lossless"))

    def collection(self) -> dict[str, Any]:
        """
        Options of the collection.

        Returns:
            `dict`: arguments of `TrajectoryBuilder`.

        Raises:
            ValueError: for a value out of range.
        """
        if self.responses_only and not self._trains_without_states:
            raise ValueError(
                "The section `train` reads states, of which `collect.responses_only=True` collects none. Drop it, or "
                "set `train.trajectory_source=online`."
            )
        section = vars(self.collect)
        rules = {field.name: section[field.name] for field in dataclasses.fields(CleaningRules)}
        for name in ("max_token_run", "max_sentence_repeats"):  # 0 is no such rule, as of `cllm collect`
            rules[name] = rules[name] or None
        shared = {field.name for field in dataclasses.fields(CollectionOptions)} & set(section)
        values = {name: section[name] for name in shared - {"max_new_tokens"}}
        values["responses_only"] = self.responses_only
        values["max_new_tokens"] = self.collect.max_new_tokens or self.max_new_tokens
        if not self.responses_only:
            values |= {"block_size": self.block_size, "seed": self.seed}
        collection = CollectionOptions(**values)
        return {**vars(collection), "cleaning": CleaningRules(**rules)}


def read_options(
    task: type[Task],
    config: Path,
    overrides: Sequence[str] = (),
    output_dir: str | None = None,
    task_options: Mapping[str, Any] | None = None,
) -> Options:
    """
    Read all options. What can be wrong with them is found here, before the first step.

    Args:
        task (`type[Task]`): the task.
        config (`pathlib.Path`): YAML file.
        overrides (`Sequence[str]`): such as `"train.max_steps=10"`; win over the file.
        output_dir (`str`, *optional*): wins over both.
        task_options (`Mapping[str, Any]`, *optional*): options of the task, which win too.

    Returns:
        `Options`.

    Raises:
        OSError: if the file cannot be read.
        ValueError: for an unknown section or option, or a value that is not usable.
    """
    values = _read_yaml(config)
    apply_overrides(values, overrides)
    top = {field.name for field in dataclasses.fields(_Top)}
    for name in values:
        if name not in {*top, *_SECTIONS}:
            raise ValueError(f"There is no option `{name}`.{closest(str(name), {*top, *_SECTIONS})}")
    for name in _SECTIONS:
        if not isinstance({} if values.get(name) is None else values[name], dict):
            raise ValueError(f"Section `{name}` must hold options by name, got {values[name]!r}.")
    shared = read_section(_Top, {name: values[name] for name in top & set(values)}, "top level")
    check_block_size(shared.block_size, "block_size")
    _check_count("max_new_tokens", shared.max_new_tokens, 1)
    given_task = {"seed": shared.seed, **(values.get("task") or {}), **(task_options or {})}
    for section in ("collect", "train", "evaluate"):
        values[section] = {} if values.get(section) is None else values[section]
    model = read_model(values.get("model"), "model")
    draft = None if values.get("draft") is None else read_model(values["draft"], "draft")
    if values.get("sft") is None and model.name is None:
        raise ValueError("A model from scratch must be trained, got no section `sft`. Add one, or name a model.")
    options = Options(
        task=read_section(task, given_task, "task"),
        output_dir=Path(output_dir or shared.output_dir or f"runs/{task.name}"),
        seed=shared.seed,
        block_size=shared.block_size,
        max_new_tokens=shared.max_new_tokens,
        model=model,
        draft=draft,
        sft=values.get("sft"),
        collect=read_section(CollectOptions, values["collect"], "collect"),
        train=values["train"],
        evaluate=read_section(EvaluateOptions, values["evaluate"], "evaluate"),
        dependencies={},
    )
    for name in ("more_prompts", "batch_size"):
        if getattr(options.evaluate, name) is not None and not options.task.has_metric:
            raise ValueError(
                f"`evaluate.{name}` is for answers that are judged and not timed, got it for {task.title}, which has "
                "no metric. Drop it."
            )
    options.dependencies.update(_dependencies(options, values, given_task))
    options.collection()
    return options


def _dependencies(
    options: Options, values: Mapping[str, Any], given_task: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    found = {
        "top": {"seed": options.seed},
        "task": changed_values(options.task, given_task, {*options.task.places, "seed"}),
        "model": describe_model(options.model),
        "draft": {} if options.draft is None else describe_model(options.draft),
        "collect": changed_values(options.collect, values["collect"], {"device", "max_new_tokens"}),
        "train": changed_values(options.cllm_config(options.output_dir), options.train, _INCIDENTAL),
        "evaluate": changed_values(options.evaluate, values["evaluate"], {"device", "max_new_tokens"}),
        "sft": {"skipped": True},
    }
    if options.sft is not None:
        found["sft"] = changed_values(options.sft_config(options.output_dir), options.sft, _INCIDENTAL)
    if options.draft is not None and (options.draft.sft or options.sft is not None):
        options.sft_config(options.output_dir, options.draft.sft)
    found["collect"]["max_new_tokens"] = options.collect.max_new_tokens or options.max_new_tokens
    found["train" if options.responses_only else "collect"]["block_size"] = options.block_size
    if options.responses_only:
        found["collect"]["responses_only"] = True
    found["evaluate"]["max_new_tokens"] = options.evaluate.max_new_tokens or options.max_new_tokens
    return found


def _host_config(kind: type[Any], values: Any, section: str, folder: Path, seed: int) -> Any:
    check_names(values, {field.name for field in dataclasses.fields(kind)}, section)
    usual: dict[str, Any] = {"report_to": "none", "save_strategy": "steps", "save_steps": 0.1, "save_total_limit": 2}
    usual |= {"seed": seed, "output_dir": str(folder)}
    if kind is SFTConfig and "fp16" not in values:
        # TRL's default is True even where it is refused, or slow.
        usual["bf16"] = is_torch_bf16_gpu_available() and not values.get("use_cpu")
    _check_not_refused(values, section)
    return read_section(kind, {**usual, **values}, section)


def _check_not_refused(values: Mapping[str, Any], section: str) -> None:
    for name, reason in _REFUSED.items():
        if name in values:
            raise ValueError(f"`{section}.{name}` cannot be set, got {values[name]!r}: {reason}. Drop it.")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise OSError(f"`--config` must be a file that can be read, got {str(path)!r} ({error.strerror}).") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"`--config` must be a YAML file, got {str(path)!r} ({reason}).") from error
    if not isinstance(values, dict):
        raise ValueError(f"`--config` must be a YAML file with options by name, got {str(path)!r}.")
    return values


def _check_count(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}.")
