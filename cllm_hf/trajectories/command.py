"""From the options of `cllm collect`, `verify` and `push` to what they say."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from transformers.utils import find_adapter_config_file

from .._host import base_model_of
from ..files import check_writable
from ..loading import load_cllm, load_tokenizer, pick_device
from ..names import Name
from ..process import Process, quiet_hosts
from .builder import TrajectoryBuilder
from .hub import check_can_push, push_trajectories
from .loading import find_manifest, load_trajectories
from .manifest import fingerprint_weights, has_no_states, read_manifest, recorded_model
from .options import CollectCommand
from .shard import ADVICE, count_dropped, format_near_ties
from .sources import read_source
from .statistics import TrajectoryStatistics, format_statistics
from .verification import format_verification, verify_transitions


def run_collect(options: CollectCommand) -> str:
    """
    Run `cllm collect`: what was collected; nothing in all processes but one.

    All that can be wrong before the model is loaded is found before.
    """
    arguments = options.arguments
    Name.find(arguments.model).check("--model", "model")
    is_first = Process.current().is_first
    with quiet_hosts(keep_bars=sys.stderr.isatty()):
        prompts, responses = read_source(
            arguments.prompts,
            arguments.dataset_name,
            arguments.dataset_config,
            arguments.dataset_split,
            arguments.prompt_column,
            arguments.response_column,
            arguments.limit,
            arguments.prompt_template,
            arguments.chat,
        )
    options.collection.check_responses(responses is not None)
    folder = Path(arguments.output_dir)
    check_writable(folder)
    hub: dict[str, Any] = {"private": arguments.private or None, "config_name": arguments.config_name}
    if arguments.push_to_hub is not None:
        check_can_push(arguments.push_to_hub, **hub)
    source = arguments.source
    if source is None and arguments.dataset_name is not None:
        source = Name.find(arguments.dataset_name).hub_id
    with quiet_hosts(keep_bars=sys.stderr.isatty()):
        builder = _make_builder(options, show_progress=is_first and sys.stderr.isatty())
        is_complete = builder.collect(
            prompts, folder, responses=responses, source=source, license=arguments.license, wait=arguments.wait
        )
    if not is_complete:
        return (
            f"The part of this process is done. The process that ends last completes the dataset in {folder}; if one "
            "was stopped, run the same command again."
        )
    if arguments.wait and not is_first:
        return ""
    published = None
    if arguments.push_to_hub is not None:
        try:
            published = push_trajectories(folder, arguments.push_to_hub, **hub)
        except (OSError, ValueError) as error:
            kind = OSError if isinstance(error, OSError) else ValueError
            raise kind(f"{error} The dataset is complete in {folder}: `cllm push` publishes it.") from error
    return format_collection(folder, read_manifest(folder), published)


def _make_builder(options: CollectCommand, show_progress: bool) -> TrajectoryBuilder:
    arguments = options.arguments
    device = None
    if arguments.device_map is None:
        device = pick_device(f"cuda:{Process.current().local_index}" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(arguments.model, arguments.revision, arguments.trust_remote_code)
    model = load_model(
        arguments.model,
        arguments.dtype,
        device,
        arguments.revision,
        arguments.trust_remote_code,
        device_map=arguments.device_map,
        attn_implementation=arguments.attn_implementation,
    )
    return TrajectoryBuilder(
        model,
        processing_class=tokenizer,
        cleaning=options.cleaning,
        revision=arguments.revision,
        show_progress=show_progress,
        **vars(options.collection),
    )


def format_collection(folder: Path, manifest: Mapping[str, Any], published: str | None = None) -> str:
    """Say what a finished folder of trajectories holds, and what can be done with it; `published` is its address."""
    counts = manifest["counts"]
    greedy = f" ({counts['kept_not_greedy']} of them not greedy)" if counts.get("kept_not_greedy") else ""
    dropped = ", ".join(f"{number} {reason.replace('_', ' ')}" for reason, number in count_dropped(counts).items())
    kept = f"Kept {counts.get('kept', 0)} of {manifest['prompts']['count']} prompts{greedy}"
    parts = [f"{kept}; dropped: {dropped or 'none'}.{format_near_ties(counts)}"]
    if 2 * counts.get("empty", 0) > manifest["prompts"]["count"]:
        parts.append(ADVICE["empty"])
    splits = [TrajectoryStatistics.from_dict(values) for values in manifest["statistics"].values()]
    if splits:
        parts.append(format_statistics({"dataset": reduce(add, splits)}))
    name = shlex.quote(str(folder))
    following = [f"Look at it with `cllm inspect {name}`"]
    if has_no_states(manifest):
        following.append(f"train on it with `cllm train --lossless --trajectories {name} --output-dir FOLDER`")
    else:
        following.append(f"check it with `cllm verify {name}`")
    if published is None:
        following.append(f"publish it with `cllm push {name} USER/NAME`")
    parts.append(f"Written: {folder}\n{', '.join(following)}.")
    if published is not None:
        parts.append(f"Published: {published}")
    return "\n\n".join(parts)


def run_verify(options: argparse.Namespace) -> tuple[str, bool]:
    """Run `cllm verify`: the report, and whether all transitions that were drawn hold."""
    if options.model is not None:
        Name.find(options.model).check("--model", "model")
    device = pick_device(options.device)
    dataset = load_all(options.dataset, options)
    made_by = find_manifest(options.dataset, options.config_name).get("model", {})
    name, revision = options.model, None
    if name is None:
        name, revision = recorded_model(options.dataset, made_by)
    dtype = options.dtype or made_by.get("dtype") or "float32"
    with quiet_hosts(keep_bars=sys.stderr.isatty()):
        model = load_model(name, dtype, device, revision=revision, trust_remote_code=options.trust_remote_code)
        report = verify_transitions(model, dataset, options.transitions, options.seed, sys.stderr.isatty())
        text = format_verification(report)
        built_with = made_by.get("fingerprint")
        if report.failures and built_with and built_with != fingerprint_weights(base_model_of(model)):
            text += (
                "\n\nThe weights are not those that the dataset was built with: they are of another model, revision "
                "or dtype, or an adapter is missing."
            )
    return text, not report.failures


def run_push(options: argparse.Namespace) -> str:
    """Run `cllm push`: where the dataset is."""
    published = push_trajectories(
        options.folder,
        options.repo_id,
        private=options.private or None,
        config_name=options.config_name,
        revision=options.revision,
    )
    return f"Published: {published}"


def load_model(
    name: str,
    dtype: str,
    device: torch.device | None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> Any:
    """
    Load a model, a CLLM or an adapter, in evaluation mode; a `dtype` of "auto" is that of the checkpoint.

    Without a device it stays where `device_map` puts it. Further options go to `from_pretrained`, unless they are
    `None`.
    """
    if revision is not None:
        if find_adapter_config_file(name, revision=revision) is not None:
            raise ValueError(
                f"`revision` is that of a whole model, got {revision!r} for the adapter {name}. Download that "
                "revision and pass its folder."
            )
        options["revision"] = revision
    if trust_remote_code:
        options["trust_remote_code"] = True
    options = {option: value for option, value in options.items() if value is not None}
    try:
        model: Any = load_cllm(name, dtype=dtype if dtype == "auto" else getattr(torch, dtype), **options)
    except ImportError as error:  # what this model or kind of attention needs
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"The model {name} needs a package that is not installed: {reason} Install it.") from error
    # Found again from anywhere; and with an adapter the base model is no longer what it was loaded as.
    base_model_of(model).name_or_path = Name.find(name).full
    return model if device is None else model.to(device)


def load_all(name: str, options: argparse.Namespace) -> Dataset:
    """All splits, one after the other, if none is named; of an unfinished collection what there is."""
    with quiet_hosts(keep_bars=sys.stderr.isatty()):
        loaded: Any = load_trajectories(name, split=options.split, name=options.config_name, allow_incomplete=True)
    return concatenate_datasets(list(loaded.values())) if isinstance(loaded, DatasetDict) else loaded
