"""The model, tokenizer and datasets that `CLLMTrainer` is given: loaded, checked, and as they are to be trained."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer
from transformers.utils import find_adapter_config_file

from .._host import base_model_of
from ..blocks.drafter import NEVER_INVOKED, attach_drafter, find_drafter, is_lossless, make_drafter
from ..blocks.limits import check_adapters, check_lossless_adapter, check_packable
from ..loading import load_adapter
from ..options import DEFAULT_BLOCK_SIZE
from ..trajectories.schema import check_dataset, check_record, check_response, check_tokens
from .batch import labels_of, no_room
from .config import CLLMConfig
from .texts import tokenize_texts


# Of a lossless adapter where no `peft_config` says otherwise; `docs/lossless.md` has what others bring.
_RANK, _ALPHA = 64, 128
_ROWS_AT_ONCE = 1000
_LOAD_IT = "Pass the folder of the adapter as `model`, or load it with `load_cllm(folder, is_trainable=True)`"


def load_target(model: Any, args: CLLMConfig, peft_config: Any, quantization_config: Any = None) -> tuple[Any, Any]:
    """
    Load an adapter that is to be trained further, with its base model, and choose the config of a new one.

    transformers loads whole models by their names itself, and knows no adapters. As for whole models, weights are
    loaded in float32 unless `dtype` among `args.model_init_kwargs` says otherwise.

    Returns:
        `tuple`: a `peft.PeftModel` if `model` is the folder or Hub id of an adapter, else `model` itself; and the
        `peft.PeftConfig` of a new adapter on it, or `None`.
    """
    if peft_config is not None:
        check_adapters([peft_config])
    if not _is_adapter(model):
        _check_kind(getattr(model, "peft_config", {}).values(), args)
        if args.lossless and hasattr(model, "peft_config") and find_drafter(base_model_of(model)) is None:
            raise ValueError(
                "A lossless adapter that is trained further must have its drafter, which PEFT alone does not load, "
                f"got one without. {_LOAD_IT}."
            )
        is_new = args.lossless and not hasattr(model, "peft_config")
        return model, make_lossless_config(peft_config) if is_new else peft_config
    from peft import PeftConfig

    if peft_config is not None:
        raise ValueError(
            f"`model` is an adapter, {model!r}, which is trained further, got a `peft_config` for a new one too. Drop "
            "it; or merge the adapter with `load_cllm(...).merge_and_unload()`, save that model, and pass its folder."
        )
    _check_kind([PeftConfig.from_pretrained(model)], args)
    given: Any = args.model_init_kwargs
    options = {"dtype": "float32", "trust_remote_code": args.trust_remote_code, **(given or {})}
    args.model_init_kwargs = None  # used here; transformers would warn that they are ignored
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    return load_adapter(model, is_trainable=True, **options), None


def _is_adapter(model: Any) -> bool:
    return isinstance(model, str) and find_adapter_config_file(model) is not None


def _check_kind(configs: Any, args: CLLMConfig) -> None:
    check_adapters(configs)
    for config in configs:
        if args.lossless and not is_lossless(config):
            raise ValueError(
                "`lossless=True` trains an adapter that drafts, got a model with an adapter of another kind. Pass the "
                "model without it, and a `peft_config` such as `LoraConfig(r=64)` for the new one."
            )
        if is_lossless(config) and not args.lossless:
            raise ValueError(
                "A lossless adapter is trained further with `lossless=True`, got `lossless=False`. Pass that, or a "
                "model without the adapter."
            )


def make_lossless_config(peft_config: Any) -> Any:
    """
    The `peft.LoraConfig` of an adapter that drafts: to PEFT, an activated LoRA that nothing activates. What was given
    is left as it was.
    """
    from peft import LoraConfig

    config = LoraConfig(r=_RANK, lora_alpha=_ALPHA) if peft_config is None else copy.deepcopy(peft_config)
    check_lossless_adapter(config)
    config.task_type = config.task_type or "CAUSAL_LM"
    config.target_modules = config.target_modules or "all-linear"
    config.alora_invocation_tokens = list(NEVER_INVOKED)
    return config


@contextmanager
def explained_variants() -> Iterator[None]:
    """Say what PEFT means where a lossless adapter is put on layers that activated LoRA cannot be put on."""
    try:
        yield
    except ValueError as error:
        if "alora_invocation_tokens" not in str(error):
            raise
        raise ValueError(
            "A lossless adapter must be on linear layers, got others in `target_modules`, such as the experts of a "
            "mixture. Name the layers of the attention instead: "
            '`LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])`.'
        ) from error


def fit_model(model: Any, processing_class: Any, args: CLLMConfig, block_size: int) -> None:
    """Check that a model can be trained, and give it what it lacks: a drafter, and the padding token."""
    check_packable(base_model_of(model))
    _check_trainable(model)
    if args.lossless:
        prepare_drafter(model, max(args.block_size_schedule or [block_size]) - 1, args.markov_rank)
    if args.pad_token is not None:
        _set_pad_token(model, getattr(processing_class, "tokenizer", processing_class), args.pad_token)


def prepare_drafter(model: Any, num_masks: int, markov_rank: int) -> None:
    """Give a model with a new lossless adapter a drafter; one that has it keeps it."""
    base_model = base_model_of(model)
    drafter = find_drafter(base_model)
    if drafter is None:
        attach_drafter(base_model, make_drafter(base_model, num_masks, markov_rank))
    elif drafter.num_masks < num_masks:
        raise ValueError(
            f"The adapter that is trained further drafts at most {drafter.num_masks} tokens, got a block size of "
            f"{num_masks + 1}. Pass `block_size={drafter.num_masks + 1}` or less."
        )
    else:
        drafter.float().requires_grad_(True)


def _check_trainable(model: Any) -> None:
    """Check that some parameter takes a gradient."""
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    if hasattr(model, "peft_config"):
        remedy = _LOAD_IT
    else:
        remedy = "Call `model.requires_grad_(True)`, or pass a `peft_config`"
    raise ValueError(
        f"A model that is trained must have parameters that take a gradient, got none in {type(model).__name__}. "
        f"{remedy}."
    )


def load_target_tokenizer(model: Any) -> Any:
    """The tokenizer beside an adapter, where there is one; transformers takes that of the base model."""
    if not _is_adapter(model):
        return None
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError):
        return None


def find_tokenizer(model: Any, processing_class: Any) -> Any:
    """The tokenizer of a training, before its model is loaded."""
    found = processing_class or load_target_tokenizer(model)
    if found is None:
        found = AutoTokenizer.from_pretrained(model if isinstance(model, str) else base_model_of(model).name_or_path)
    return getattr(found, "tokenizer", found)


def _set_pad_token(model: Any, tokenizer: Any, pad_token: str) -> None:
    """Set the padding token of tokenizer, config and generation config, as `trl.SFTTrainer` does for its collator."""
    if pad_token not in tokenizer.get_vocab():
        raise ValueError(
            f"`pad_token` must be a token of the tokenizer, got {pad_token!r}, which is not in its vocabulary of "
            f"{len(tokenizer)}. Choose one that is, such as {tokenizer.eos_token!r}, or add it and resize the model's "
            "embeddings."
        )
    tokenizer.pad_token = pad_token
    base_model = base_model_of(model)
    base_model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    for owner in (base_model, model):  # an adapter may have a generation config of its own
        owner.generation_config.pad_token_id = tokenizer.pad_token_id


def prepare_dataset(dataset: Any, config: CLLMConfig, find_tokenizer: Callable[[], Any]) -> Any:
    """
    Have a dataset give tokens as Python lists, and the column by which transformers groups records of similar length.
    """
    if isinstance(dataset, dict):
        return {key: prepare_dataset(one, config, find_tokenizer) for key, one in dataset.items()}
    dataset = tokenize_texts(dataset, config, find_tokenizer)
    if isinstance(dataset, Dataset) and dataset.format["type"] not in (None, "custom"):
        dataset = dataset.with_format(None)  # tensors of "torch" or "numpy" would only be taken apart again
    name = config.length_column_name
    is_wanted = config.train_sampling_strategy == "group_by_length"
    if not is_wanted or not isinstance(dataset, Dataset) or name in dataset.column_names:
        return dataset
    plain = dataset.with_format(None).select_columns(["prompt_ids", "response_ids"])
    lengths = [len(record["prompt_ids"]) + len(record["response_ids"]) for record in plain]
    return dataset.add_column(name, lengths)


def _list_datasets(train_dataset: Any, eval_dataset: Any) -> list[Any]:
    """All datasets of a run."""
    evaluated = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    return [dataset for dataset in (train_dataset, *evaluated) if dataset is not None]


def check_datasets(train_dataset: Any, eval_dataset: Any, config: CLLMConfig) -> int:
    """
    Check the datasets of a training, before any work is done. Of a stream only the first record is read; the collator
    looks at every one on its way.

    Returns:
        `int`: the block size of the trajectories, or of the options where no trajectories are needed.
    """
    if train_dataset is None:
        raise ValueError("`train_dataset` is required: trajectories from `cllm_hf.TrajectoryBuilder`, got none.")
    if isinstance(train_dataset, dict):
        raise ValueError(
            f"`train_dataset` must be one dataset, got a dictionary of {', '.join(map(str, train_dataset))}. Pass "
            "one of them, such as `dataset['train']`."
        )
    block_size, is_online = config.block_size, config.trajectory_source == "online"
    for dataset in _list_datasets(train_dataset, eval_dataset):
        if not isinstance(dataset, (Dataset, IterableDataset)):
            raise ValueError(
                f"Trajectories must be a dataset of `datasets`, got a {type(dataset).__name__}. Pass one, for "
                "evaluation also several in a dictionary; `datasets.Dataset.from_list` makes one of a list of records."
            )
        first = _first(dataset)
        if is_online:
            check_response(first)
            if block_size is None and first.get("states"):
                block_size = len(first["states"][0][-1])
        elif isinstance(dataset, Dataset):
            _check_block_size(first, config)
            block_size = check_dataset(dataset, block_size)
        else:
            block_size = check_record(first, block_size)
        if config.ar_labels == "ground_truth":
            labels_of(first)
        if isinstance(dataset, Dataset) and dataset.format["type"] is None:
            _check_lengths(dataset, config, 1 if is_online else block_size or 1)
    return block_size or DEFAULT_BLOCK_SIZE


def _check_block_size(record: Mapping[str, Any], config: CLLMConfig) -> None:
    found = len(record["states"][0][-1]) if record.get("states") and record["states"][0] else None
    if config.block_size is not None and found is not None and found != config.block_size:
        raise ValueError(
            f"`block_size={config.block_size}` must be that of the trajectories, {found}. Pass "
            f"`block_size_schedule=[{config.block_size}]` to cut or join their blocks, or collect new ones."
        )


def _check_lengths(dataset: Dataset, config: CLLMConfig, least: int) -> None:
    """Find the records at which a run would end: without a prompt, response or label, or without room for them."""
    names = ["prompt_ids", "response_ids"] + ["label_ids"] * (config.ar_labels == "ground_truth")
    tables = dataset.select_columns(names).with_format("arrow").iter(_ROWS_AT_ONCE)
    lengths = np.concatenate(
        [[pc.fill_null(pc.list_value_length(table[name]), 0).to_numpy() for name in names] for table in tables], axis=1
    )
    for row in np.flatnonzero((lengths == 0).any(axis=0)).tolist():
        check_response(dataset[row])
        labels_of(dataset[row])
    if config.max_length is not None:
        prompt_lengths, response_lengths = lengths[:2]
        room = config.max_length - prompt_lengths
        for row in np.flatnonzero((room < least) & (room < response_lengths)).tolist():
            raise no_room(prompt_lengths[row], least, config.max_length, f"row {row}")


def check_vocabulary(train_dataset: Any, eval_dataset: Any, vocab_size: int, columns: list[str]) -> None:
    """Check that the tokens of datasets that `check_datasets` has passed have embeddings."""
    for dataset in _list_datasets(train_dataset, eval_dataset):
        if isinstance(dataset, Dataset):
            for number in _suspects(dataset, vocab_size, columns):
                check_tokens(dataset[number], vocab_size, columns, name=number)
        else:
            check_tokens(_first(dataset), vocab_size, columns)


def _suspects(dataset: Dataset, vocab_size: int, columns: list[str]) -> Iterator[int]:
    """Numbers of records among which is one with such a token, if only in its padding."""
    if dataset.format["type"] == "custom":  # a transform makes the tokens
        yield from range(len(dataset))
        return
    start = 0
    present = [name for name in columns if name in dataset.column_names]
    for table in dataset.select_columns(present).with_format("arrow").iter(_ROWS_AT_ONCE):
        bounds = [_bounds(column) for column in table.columns]
        if min(low for low, _ in bounds) < 0 or max(high for _, high in bounds) >= vocab_size:
            yield from range(start, start + len(table))
        start += len(table)


def _bounds(column: Any) -> tuple[int, int]:
    """The lowest and the highest number in nested lists; zeros where there is none."""
    while pa.types.is_nested(column.type):
        column = pc.list_flatten(column)
    found = pc.min_max(column).as_py()
    return found["min"] or 0, found["max"] or 0


def _first(dataset: Iterable[dict[str, Any]]) -> dict[str, Any]:
    for record in dataset:
        return record
    raise ValueError("The trajectory dataset is empty. Build it from more prompts, or look at its drop counts.")


def check_processes(config: CLLMConfig, accelerator: Accelerator) -> None:
    """Check that several processes would each have batches of their own, as they collate and cut them."""
    if accelerator.num_processes == 1:
        return
    parallelism: Any = accelerator.parallelism_config
    sizes = {name: getattr(parallelism, f"{name}_size", 1) or 1 for name in ("tp", "cp", "sp")}
    if any(size > 1 for size in sizes.values()):
        raise ValueError(
            "Every process must have batches of its own, got tensor, context or sequence parallelism "
            f"({', '.join(f'{name}_size={size}' for name, size in sizes.items())}). Use DDP or FSDP."
        )
    options: Any = config.accelerator_config
    if not options.even_batches:
        raise ValueError(
            "Every process needs a batch of its own for each forward pass, got `even_batches=False` in "
            "`accelerator_config`. Drop it: records that fill up the last batch are not counted twice."
        )
    if options.dispatch_batches:
        raise ValueError(
            "Batches are collated by the process that trains on them, got `dispatch_batches=True` in "
            "`accelerator_config`. Drop it."
        )
