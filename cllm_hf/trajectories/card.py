"""The dataset card: what a dataset of trajectories holds, how it was made, and how to use it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from ..cards import (
    CLLM_CITATION,
    END,
    code,
    join_tags,
    license_metadata,
    plain,
    quoted,
    renew_section,
    table,
)
from ..names import Name
from .manifest import has_no_states, records_by_split, without_folders
from .shard import format_near_ties
from .statistics import TrajectoryStatistics, format_histogram


DEFAULT_CONFIG = "default"
PLOT_NAME = "statistics.png"
TAGS = ("cllm", "consistency-llm", "jacobi-decoding", "trajectories")
# What stands between these marks is ours; the rest of a card belongs to those who have written it.
BEGIN = "<!-- cllm_hf: what stands from here to the end mark is written anew at every push -->"
_SIZES = (("n<1K", 1e3), ("1K<n<10K", 1e4), ("10K<n<100K", 1e5), ("100K<n<1M", 1e6), ("1M<n<10M", 1e7))
_COUNTS = {
    "kept": "in the dataset",
    "kept_not_greedy": "of these, responses that are not the model's own greedy output",
    "kept_near_ties": "of these, responses with tokens that are the best but for rounding, and count as greedy",
    "duplicate": "the same prompt had come before",
    "empty_prompt": "the prompt has no tokens",
    "long_prompt": "the prompt is longer than allowed, or leaves no room for a response",
    "empty": "the response is empty",
    "truncated": "the response was cut before its end",
    "long_response": "the given response is longer than `max_new_tokens`",
    "token_repetition": "one token stands many times in a row",
    "sentence_repetition": "one sentence comes again and again",
    "not_greedy": "the response is not the model's own greedy output, by more than rounding",
}


def make_card(
    manifests: Mapping[str, Mapping[str, Any]], repo_id: str | None, plots: Collection[str] | None = None
) -> str:
    """
    Write the card of a dataset, `README.md`, from `card.md.jinja`; the same manifests give the same text.

    Args:
        manifests (`Mapping[str, Mapping]`): the manifest of each configuration, by its name; files of `"default"` lie
            at the top, those of others in a folder of their name.
        repo_id (`str`, *optional*): id of the dataset on the Hub, for the code that loads it.
        plots (`Collection[str]`, *optional*): configurations that have a `statistics.png`; by default all.

    Raises:
        ValueError: for no manifest, or statistics that are not of trajectories.
    """
    if not manifests:
        raise ValueError("A dataset card needs the manifest of at least one configuration, got none.")
    names = sorted(manifests, key=lambda name: (name != DEFAULT_CONFIG, name))
    manifests = {name: manifests[name] if repo_id is None else without_folders(manifests[name]) for name in names}
    configurations = []
    for name, manifest in manifests.items():
        heading = "" if names == [DEFAULT_CONFIG] else f": {code(name)}"
        has_plot = not has_no_states(manifest) and (plots is None or name in plots)
        plot = place(name, PLOT_NAME) if has_plot else None
        configurations.append({**manifest, **_describe(manifest), "heading": heading, "plot": plot})
    has_states = not all(map(has_no_states, manifests.values()))
    option = "" if names[0] == DEFAULT_CONFIG else f", name={quoted(names[0])}"
    card = DatasetCard.from_template(
        _metadata(manifests),
        template_path=str(Path(__file__).with_name("card.md.jinja")),
        begin=BEGIN,
        end=END,
        title=plain(repo_id.split("/")[-1]) if repo_id else "Trajectories" if has_states else "Responses",
        has_states=has_states,
        has_responses_alone=any(map(has_no_states, manifests.values())),
        # The first configuration is the one that the example trains on.
        trains_on_states=not has_no_states(manifests[names[0]]),
        models=dict.fromkeys(one["model_name"] for one in configurations),
        num_records=_count_records(manifests),
        block_sizes=sorted({one["options"]["block_size"] for one in manifests.values() if not has_no_states(one)}),
        is_augmented=any(manifest["options"].get("augment") for manifest in manifests.values()),
        configurations=configurations,
        load_call=f"load_trajectories({quoted(repo_id or 'path/to/this/folder')}{option})",
        citation=CLLM_CITATION,
        code=code,
        plain=plain,
        quoted=quoted,
        table=table,
        format_histogram=format_histogram,
    )
    return f"{card}\n"


def _describe(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the template tells of a configuration beside its manifest."""
    name, counts, prompts = manifest["model"].get("name"), manifest["counts"], manifest["prompts"]
    options = dict(manifest["options"])
    options |= {f"cleaning.{name}": value for name, value in (options.pop("cleaning", None) or {}).items()}
    # Near ties are tokens, no prompts.
    order = [*(name for name in _COUNTS if name in counts), *sorted(set(counts) - {*_COUNTS, "near_ties"})]
    total, records = prompts["count"], records_by_split(manifest)
    return {
        "has_states": not has_no_states(manifest),
        "model_name": code(name) if name else "a model without a name",
        "options": [code(f"{name}={value!r}") for name, value in options.items()],
        "versions": [plain(f"{name} {version}") for name, version in manifest["made_with"].items()],
        "num_kept": counts.get("kept", 0),
        "near_ties": format_near_ties(counts),
        "counts": [
            (code(name), f"{counts[name]:,}", f"{counts[name] / total:.1%}" if total else "", _COUNTS.get(name, ""))
            for name in order
            if counts[name] or name == "kept"
        ],
        "splits": [
            (split, records.get(split, 0), TrajectoryStatistics.from_dict(values))
            for split, values in manifest["statistics"].items()
        ],
        "source": _linked(prompts["source"]) if prompts.get("source") else None,
    }


def _linked(source: str) -> str:
    is_id = Name.recorded(source).hub_id is not None
    return f"[{plain(source)}](https://huggingface.co/datasets/{source})" if is_id else code(source)


def place(config_name: str, name: str) -> str:
    """Where a file of the folder of a configuration lies in the repository."""
    return name if config_name == DEFAULT_CONFIG else f"{config_name}/{name}"


def merge_card(earlier: str, new: str) -> str:
    """
    Put a new card in place of an earlier one, and keep what others have written into that.

    Text outside our marks stays where it is; a card without marks keeps all its text, and ours follows it. Metadata
    that ours does not have stays too; tags and configurations are joined. `dataset_info` of our configurations goes,
    because it would describe files that are no longer there.

    Raises:
        ValueError: if the metadata of the earlier card is not valid.
    """
    try:
        old_card = DatasetCard(earlier)
    except Exception as error:  # the parser of YAML has errors of its own
        raise ValueError(
            f"The metadata of the README.md that is there must be valid YAML, got: {error}. Correct it and push again."
        ) from error
    new_card = DatasetCard(new)
    section = new_card.text.strip()
    text = renew_section(old_card.text, section, BEGIN)
    if text is None:
        text = "\n\n".join(part for part in (old_card.text.strip(), section) if part) + "\n"
    data = DatasetCardData(**_merge_metadata(old_card.data.to_dict(), new_card.data.to_dict()))
    return f"---\n{data.to_yaml()}\n---\n\n{text.lstrip()}"


def _merge_metadata(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    ours = {config["config_name"] for config in new["configs"]}

    def foreign(entries: Any) -> list[dict[str, Any]]:
        entries = [entries] if isinstance(entries, dict) else list(entries or [])
        return [entry for entry in entries if entry.get("config_name", DEFAULT_CONFIG) not in ours]

    merged = {**old, **new}
    merged["tags"] = join_tags(old.get("tags"), new["tags"])
    merged["configs"] = [*foreign(old.get("configs")), *new["configs"]]
    if "license" in new and "license_name" not in new:
        merged.pop("license_name", None)
    if "dataset_info" in old:
        kept = foreign(old["dataset_info"])
        merged["dataset_info"] = kept if len(kept) != 1 else kept[0]
        if not kept:
            del merged["dataset_info"]
    return merged


def _metadata(manifests: Mapping[str, Mapping[str, Any]]) -> DatasetCardData:
    prompts = [manifest["prompts"] for manifest in manifests.values()]
    licenses = list(dict.fromkeys(one["license"] for one in prompts if one.get("license")))
    sources = dict.fromkeys(filter(None, (Name.recorded(one.get("source")).hub_id for one in prompts)))
    number = _count_records(manifests)
    tags = TAGS if not all(map(has_no_states, manifests.values())) else tuple(t for t in TAGS if t != "trajectories")
    return DatasetCardData(
        source_datasets=list(sources) or None,
        size_categories=[next((size for size, limit in _SIZES if number < limit), "n>10M")],
        task_categories=["text-generation"],
        tags=list(tags),
        configs=[_config(name, manifest) for name, manifest in manifests.items()],
        **license_metadata(licenses),
    )


def _config(name: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    # `datasets` cannot load a split without rows.
    splits = [split for split, records in records_by_split(manifest).items() if records]
    files = [{"split": split, "path": place(name, f"data/{split}-*.parquet")} for split in splits]
    return {"config_name": name, "data_files": files}


def _count_records(manifests: Mapping[str, Mapping[str, Any]]) -> int:
    return sum(sum(records_by_split(manifest).values()) for manifest in manifests.values())
