"""The dataset card: what a dataset of trajectories holds, how it was made, and how to use it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
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
from .manifest import records_by_split, without_folders
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
_COLUMNS = (
    ("`data_id`", "name of the prompt"),
    ("`prompt`, `response`", "text, for people"),
    ("`prompt_ids`, `response_ids`", "tokens; the response ends with its stop token, or where it was cut"),
    (
        "`states`",
        "`states[b][j]` is state `j` of block `b`: `states[b][0]` its first draft, `states[b][-1]` its fixed point",
    ),
    (
        "`is_greedy`",
        "whether the response is the model's own greedy output, up to near ties; if not, blocks in which it departs "
        "have one state",
    ),
)
_AUGMENTED = (
    "`augmented_states`",
    "further states of each block, with some wrong tokens put right: for training, and no part of the trajectory",
)


def make_card(
    manifests: Mapping[str, Mapping[str, Any]], repo_id: str | None, plots: Collection[str] | None = None
) -> str:
    """
    Write the card of a dataset, `README.md`.

    Args:
        manifests (`Mapping[str, Mapping]`): the manifest of each configuration, by its name; files of `"default"` lie
            at the top, those of others in a folder of their name.
        repo_id (`str`, *optional*): id of the dataset on the Hub, for the code that loads it.
        plots (`Collection[str]`, *optional*): configurations that have a `statistics.png`; by default all.

    Returns:
        `str`: metadata and Markdown; the same manifests give the same text.

    Raises:
        ValueError: for no manifest, or statistics that are not of trajectories.
    """
    if not manifests:
        raise ValueError("A dataset card needs the manifest of at least one configuration, got none.")
    if repo_id is not None:
        manifests = {name: without_folders(manifest) for name, manifest in manifests.items()}
    names = sorted(manifests, key=lambda name: (name != DEFAULT_CONFIG, name))
    several = len(names) > 1 or names != [DEFAULT_CONFIG]
    title = plain(repo_id.split("/")[-1]) if repo_id else "Trajectories"
    parts = [f"# {title}", _introduction(manifests, names), "## What a row is", _columns_text(manifests.values())]
    for name in names:
        manifest, heading = manifests[name], f": {code(name)}" if several else ""
        plot = place(name, PLOT_NAME) if plots is None or name in plots else ""
        parts += [f"## How it was made{heading}", _making_text(manifest)]
        parts += [f"## What was kept{heading}", _counts_text(manifest)]
        parts += [f"## How fast blocks converge{heading}", *_statistics_parts(manifest, plot)]
        parts += [f"## Licence and source of the prompts{heading}", _source_text(manifest)]
    name = names[0]
    parts += [
        "## Load it",
        _loading_text(repo_id, name),
        "## Train on it",
        _training_text(manifests[name], repo_id, name),
    ]
    parts += [
        "## Citation",
        "The method is that of [CLLM](https://arxiv.org/abs/2403.00835):",
        f"```bibtex\n{CLLM_CITATION}\n```",
    ]
    data = _metadata(manifests, names)
    return f"---\n{data.to_yaml()}\n---\n\n{BEGIN}\n\n" + "\n\n".join(parts) + f"\n\n{END}\n"


def place(config_name: str, name: str) -> str:
    """
    Where a file of a configuration lies in the repository.

    Args:
        config_name (`str`): name of the configuration.
        name (`str`): path of the file in the folder of the collection.

    Returns:
        `str`: path in the repository.
    """
    return name if config_name == DEFAULT_CONFIG else f"{config_name}/{name}"


def merge_card(earlier: str, new: str) -> str:
    """
    Put a new card in place of an earlier one, and keep what others have written into that.

    Text outside our marks stays where it is; a card without marks keeps all its text, and ours follows it. Metadata
    that ours does not have stays too; tags and configurations are joined. `dataset_info` of our configurations goes,
    because it would describe files that are no longer there.

    Args:
        earlier (`str`): the card that is there.
        new (`str`): what `make_card` gave.

    Returns:
        `str`: the text of the card.

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


def _metadata(manifests: Mapping[str, Mapping[str, Any]], names: list[str]) -> DatasetCardData:
    prompts = [manifests[name]["prompts"] for name in names]
    licenses = list(dict.fromkeys(one["license"] for one in prompts if one.get("license")))
    sources = dict.fromkeys(filter(None, (Name.recorded(one.get("source")).hub_id for one in prompts)))
    number = sum(sum(records_by_split(manifests[name]).values()) for name in names)
    return DatasetCardData(
        source_datasets=list(sources) or None,
        size_categories=[next((size for size, limit in _SIZES if number < limit), "n>10M")],
        task_categories=["text-generation"],
        tags=list(TAGS),
        configs=[_config(name, manifests[name]) for name in names],
        **license_metadata(licenses),
    )


def _config(name: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    # The host cannot load a split without rows.
    splits = [split for split, records in records_by_split(manifest).items() if records]
    files = [{"split": split, "path": place(name, f"data/{split}-*.parquet")} for split in splits]
    return {"config_name": name, "data_files": files}


def _introduction(manifests: Mapping[str, Mapping[str, Any]], names: list[str]) -> str:
    models = list(dict.fromkeys(_model_text(manifests[name]) for name in names))
    records = sum(sum(records_by_split(manifests[name]).values()) for name in names)
    return (
        f"How blocks of responses of {', '.join(models)} converge under Jacobi iteration: {records:,} responses, each "
        "with the trajectories of its blocks. A language model trained on them learns to guess several tokens at once "
        "(a Consistency LLM, CLLM), and writes the same kind of text in fewer forward passes. Made with `cllm_hf`."
    )


def _model_text(manifest: Mapping[str, Any]) -> str:
    name = manifest["model"].get("name")
    return code(name) if name else "a model without a name"


def _columns_text(manifests: Collection[Mapping[str, Any]]) -> str:
    is_augmented = any(manifest["options"].get("augment") for manifest in manifests)
    rows = [*_COLUMNS, *[_AUGMENTED] * is_augmented]
    sizes = sorted({manifest["options"]["block_size"] for manifest in manifests})
    return (
        f"A row is one response. It is cut into blocks of {' or '.join(map(str, sizes))} tokens. A block starts as a "
        "draft, drawn at random from the prompt's tokens; in each iteration one forward pass of the model over the "
        "draft gives the next state, until nothing changes: the fixed point, which is the response's own text. After "
        "the end of a response states are padding and mean nothing.\n\n" + table(("column", "content"), rows)
    )


def _making_text(manifest: Mapping[str, Any]) -> str:
    model, made_with = manifest["model"], manifest["made_with"]
    revision = f" at revision {code(model['revision'])}" if model.get("revision") else ""
    given = manifest["prompts"].get("with_responses")
    responses = "Responses were given with the prompts" if given else "It wrote the responses itself, greedily"
    options = dict(manifest["options"])
    options |= {f"cleaning.{name}": value for name, value in (options.pop("cleaning", None) or {}).items()}
    versions = ", ".join(plain(f"{name} {version}") for name, version in made_with.items())
    return (
        f"The model is {_model_text(manifest)}{revision} ({plain(model['architecture'])}, "
        f"{model['num_parameters']:,} parameters), in {plain(model['dtype'])} with {plain(model['attention'])} "
        f"attention. {responses}. Options: "
        + ", ".join(code(f"{name}={value!r}") for name, value in options.items())
        + f". Made with {versions}. `manifest.json` has all of this, and the checksums of the files."
    )


def _counts_text(manifest: Mapping[str, Any]) -> str:
    counts, total = manifest["counts"], manifest["prompts"]["count"]
    # Near ties are tokens, no prompts.
    order = [*(name for name in _COUNTS if name in counts), *sorted(set(counts) - {*_COUNTS, "near_ties"})]
    rows = [
        (code(name), f"{counts[name]:,}", f"{counts[name] / total:.1%}" if total else "", _COUNTS.get(name, ""))
        for name in order
        if counts[name] or name == "kept"
    ]
    kept = counts.get("kept", 0)
    rest = "; the others were dropped, each for the first of these reasons that held." if kept < total else "."
    listed = table(("count", "prompts", "share", "meaning"), rows)
    return f"There were {total:,} prompts. {kept:,} are in the dataset{rest}{format_near_ties(counts)}\n\n{listed}"


def _statistics_parts(manifest: Mapping[str, Any], plot: str) -> list[str]:
    parts = [
        "An iteration makes at least one more token right. Fast-forwarded tokens are those that it makes right beyond "
        "that one; stationary tokens are right while something before them is still wrong, and stay so."
    ]
    if plot:
        parts.append(f"![Blocks by iterations, fast-forwarded and stationary tokens]({plot})")
    for split, values in manifest["statistics"].items():
        statistics = TrajectoryStatistics.from_dict(values)
        if not statistics.num_blocks:
            parts.append(f"Split {code(split)} has no trajectories.")
            continue
        pace = statistics.tokens_per_iteration  # not a number where every first draft was right
        parts.append(
            f"Split {code(split)}: {records_by_split(manifest).get(split, 0):,} responses, {statistics.num_blocks:,} "
            f"blocks. A block takes {statistics.mean_iterations:.2f} iterations on average"
            f"{f' ({pace:.2f} tokens an iteration)' if pace == pace else ''}, with "
            f"{statistics.mean_fast_forwarded:.2f} fast-forwarded and {statistics.mean_stationary:.2f} stationary "
            "tokens."
        )
        parts.append(f"```text\n{format_histogram(statistics)}\n```")
    return parts


def _source_text(manifest: Mapping[str, Any]) -> str:
    prompts, model = manifest["prompts"], _model_text(manifest)
    source = prompts.get("source")
    is_id = Name.recorded(source).hub_id is not None
    link = f"[{plain(source)}](https://huggingface.co/datasets/{source})" if is_id else code(source)
    origin = f"The prompts come from {link}." if source else "Where the prompts come from is not recorded."
    license = f"is {code(prompts['license'])}" if prompts.get("license") else "is not recorded"
    given = "The responses were given with the prompts; where they come from is not recorded."
    own = f"The responses are output of {model}, whose own terms may say how they can be used."
    return f"{origin} Their licence {license}. {given if prompts.get('with_responses') else own}"


def _load_call(repo_id: str | None, name: str) -> str:
    option = "" if name == DEFAULT_CONFIG else f", name={quoted(name)}"
    return f"load_trajectories({quoted(repo_id or 'path/to/this/folder')}{option})"


def _loading_text(repo_id: str | None, name: str) -> str:
    return (
        "This checks every row. With `streaming=True` rows are read as they are needed; "
        f"`datasets.load_dataset` loads the same without the checks.\n\n"
        f"```python\nfrom cllm_hf import load_trajectories\n\ndataset = {_load_call(repo_id, name)}\n```"
    )


def _training_text(manifest: Mapping[str, Any], repo_id: str | None, name: str) -> str:
    model, tokenizer = (manifest[what].get("name") or f"path/to/the/{what}" for what in ("model", "tokenizer"))
    return f"""The model to train is the one that gave the data; an adapter is trained further. Without a GPU that has
bfloat16, pass `bf16=False`.

```python
from cllm_hf import CLLMConfig, CLLMTrainer, load_trajectories
from transformers import AutoTokenizer

trainer = CLLMTrainer(
    model={quoted(model)},
    args=CLLMConfig(output_dir="cllm"),
    train_dataset={_load_call(repo_id, name)},
    processing_class=AutoTokenizer.from_pretrained({quoted(tokenizer)}),
)
trainer.train()
trainer.save_model()
```"""
