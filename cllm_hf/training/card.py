"""The model card: what a CLLM was made from and how, what was measured of it, and how to use it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..cards import CLLM_CITATION, END, code, is_ours_alone, join_tags, plain, quoted, renew_section, table
from ..export import TAG as EXPORT_TAG
from ..export import usage_code
from ..names import Name


# What stands between this mark and `END` is ours; the rest of a card belongs to those who have written it.
BEGIN = "<!-- cllm_hf: what stands from here to the end mark is written anew whenever the model is saved -->"
# Metadata that must not outlive what they were true of: without a new value the earlier one goes.
_OURS = ("base_model", "base_model_relation", "library_name")
# Figures of a log, by the end of their names; those of evaluations have a prefix.
_FIGURES = {
    "consistency_loss": "consistency loss",
    "ar_loss": "AR loss",
    "tokens_per_forward": "tokens per forward",
    "agreement": "agreement with the target model",
    "fast_forwarded": "fast-forwarded tokens a block",
    "stationary": "stationary tokens a block",
    "repetition": "repetition rate",
    "target_repetition": "repetition rate of the dataset's responses",
}
_FIGURE = re.compile(rf"(?:eval_(?P<dataset>.+_)??)?(?P<figure>{'|'.join(_FIGURES)})")
_LONGEST_VALUE = 80
_TEMPLATE = """\
---
{{ card_data }}
---

{{ begin }}

# {{ title }}

{{ introduction }}

## Use it

{{ usage }}

## How it was trained

{{ training }}
{% if figures %}
## What training changed

{{ figures }}
{% endif %}{% if plot %}
![Losses and tokens per forward over updates]({{ plot }})
{% endif %}{% if measured %}
## Measured

{{ measured }}
{% endif %}
## Citation

{{ citation }}

{{ end }}
"""


@dataclass(frozen=True)
class ModelFacts:
    """
    What a model card tells. What is not known is left out, and so are the figures that were not measured.

    Args:
        block_size (`int`): tokens of a block that the model was trained on.
        repo_id (`str`, *optional*): id of the model on the Hub.
        title (`str`, *optional*): by default the last part of `repo_id`.
        base_model (`str`, *optional*): name or path of the model that was trained, or that the adapter goes on.
        adapter (`str`, *optional*): what kind of adapter it is, if it is one, such as `"LoRA, rank 16"`.
        can_merge (`bool`): whether the adapter and its base model make one model.
        architecture (`str`, *optional*): class of the model.
        num_parameters (`int`, *optional*): of the model, with the adapter.
        num_trained (`int`, *optional*): parameters that were trained.
        dataset_name (`str`, *optional*): id of the dataset on the Hub.
        num_responses (`int`, *optional*): records of the dataset.
        options (`Mapping[str, Any]`): options of consistency training.
        arguments (`Mapping[str, Any]`): arguments of the host's training, such as the learning rate.
        num_updates (`int`): how often the weights were changed.
        num_epochs (`float`, *optional*): passes over the dataset.
        log_history (`Sequence[Mapping]`): what was logged, in its order, with `step`.
        plot (`str`, *optional*): file beside the card with a plot of the training.
        measured (`Mapping[str, Any]`): what was measured of the finished model, a name and a number or text each.
        license (`Mapping[str, Any]`): `license` and what belongs to it, as metadata.
        tags (`Sequence[str]`): tags of the Hub.
        versions (`Mapping[str, str]`): of the packages.
        has_custom_generate (`bool`): whether Jacobi decoding lies beside the model.
    """

    block_size: int
    repo_id: str | None = None
    title: str | None = None
    base_model: str | None = None
    adapter: str | None = None
    can_merge: bool = True
    architecture: str | None = None
    num_parameters: int | None = None
    num_trained: int | None = None
    dataset_name: str | None = None
    num_responses: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    num_updates: int = 0
    num_epochs: float | None = None
    log_history: Sequence[Mapping[str, Any]] = ()
    plot: str | None = None
    measured: Mapping[str, Any] = field(default_factory=dict)
    license: Mapping[str, Any] = field(default_factory=dict)
    tags: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    has_custom_generate: bool = False


def make_model_card(facts: ModelFacts) -> str:
    """
    Write the card of a trained model, `README.md`.

    Folders of the machine where it was trained are not told: they mean nothing to others.

    Args:
        facts (`ModelFacts`): what to tell.

    Returns:
        `str`: metadata and Markdown; the same facts give the same text.
    """
    title = facts.title or (facts.repo_id or "").split("/")[-1] or "Consistency LLM"
    card = ModelCard.from_template(
        _metadata(facts),
        template_str=_TEMPLATE,
        begin=BEGIN,
        end=END,
        title=plain(title),
        introduction=_introduction(facts),
        usage=_usage_text(facts),
        training=_training_text(facts),
        figures=_figures_text(facts.log_history),
        plot=facts.plot,
        measured=_measured_text(facts.measured),
        citation=_citation_text(facts),
    )
    return str(card).rstrip() + "\n"


def renew_model_card(earlier: str | None, new: str) -> str | None:
    """
    Put a new card in place of an earlier one of ours, and keep what others have written into that.

    Text outside our marks stays where it is, and so do metadata that ours does not have; tags are joined. A card
    without text, such as the Hub makes of a chosen licence, gets ours.

    Args:
        earlier (`str`, *optional*): the card that is there.
        new (`str`): what `make_model_card` gave.

    Returns:
        `str`: the text of the card, or `None` if the one that is there was written by somebody else, and stays.
    """
    if not earlier or not earlier.strip():
        return new
    try:
        old_card = ModelCard(earlier)
    except Exception:  # the parser of YAML has errors of its own; what is not a card is not ours
        return None
    new_card = ModelCard(new)
    section = new_card.text.strip()
    text = renew_section(old_card.text, section, BEGIN) if old_card.text.strip() else section + "\n"
    if text is None:
        return None
    data = _merge_metadata(old_card.data.to_dict(), new_card.data.to_dict())
    return f"---\n{ModelCardData(**data).to_yaml()}\n---\n\n{text.lstrip()}"


def join_cards(here: str | None, there: str) -> str:
    """
    The card of a folder that is pushed to a repository with a card of its own.

    Args:
        here (`str`, *optional*): the card of the folder.
        there (`str`): the card of the repository.

    Returns:
        `str`: `here` if somebody has written into it; else `there`, so that what stands there is not lost.
    """
    if here is None or not here.strip():
        return there
    if not is_ours_alone(here, BEGIN):
        return here
    try:
        card = ModelCard(there)
    except Exception:  # of the parser of YAML; not ours to correct
        return there
    if card.text.strip() and BEGIN not in there:
        return there
    data = {**card.data.to_dict(), **ModelCard(here).data.to_dict()}
    return f"---\n{ModelCardData(**data).to_yaml()}\n---\n\n{card.text.strip()}\n"


def _merge_metadata(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in old.items() if name not in _OURS}
    if "license" in kept:  # somebody has chosen it, and says it with other entries of that kind
        new = {name: value for name, value in new.items() if not name.startswith("license")}
    return {**kept, **new, "tags": join_tags(old.get("tags"), new.get("tags", ()))}


def _metadata(facts: ModelFacts) -> ModelCardData:
    base, dataset = (Name.recorded(name).hub_id for name in (facts.base_model, facts.dataset_name))
    relation = "adapter" if facts.adapter else "finetune"
    extra: dict[str, Any] = {**facts.license, **({"base_model_relation": relation} if base else {})}
    return ModelCardData(
        base_model=base,
        datasets=[dataset] if dataset else None,
        library_name="peft" if facts.adapter else "transformers",
        pipeline_tag="text-generation",
        tags=join_tags(facts.tags, [EXPORT_TAG] * facts.has_custom_generate),
        **extra,
    )


def _introduction(facts: ModelFacts) -> str:
    what = "An adapter that makes" if facts.adapter else "A Consistency LLM (CLLM):"
    base = _linked(facts.base_model, "models") if facts.base_model else "a model without a name"
    how = f"{base} a Consistency LLM (CLLM), trained" if facts.adapter else f"{base}, trained"
    return (
        f"{what} {how} to guess several tokens at once. Jacobi decoding checks the guesses in one forward, and writes "
        "exactly the text of decoding one token at a time (in 16 bits, up to near ties of two tokens). Made with "
        "`cllm_hf`."
    )


def _linked(name: str, kind: str) -> str:
    recorded = Name.recorded(name)
    if recorded.hub_id is None:
        return code(recorded.for_others)
    return f"[{plain(name)}](https://huggingface.co/{'datasets/' if kind == 'datasets' else ''}{name})"


def _usage_text(facts: ModelFacts) -> str:
    name = facts.repo_id or "path/to/this/folder"
    imports, base, call = "", "", "cllm_hf.load_cllm(name)"
    recorded = Name.recorded(facts.base_model)
    if facts.adapter and recorded.hub_id is None:
        # Where it was on the machine of the training is no place for others.
        imports = "AutoModelForCausalLM, "
        path = recorded.for_others or "path/to/the/base/model"
        base = f"base_model = AutoModelForCausalLM.from_pretrained({quoted(path)})\n"
        call = "cllm_hf.load_cllm(name, base_model=base_model)"
    parts = [
        f"""```python
import cllm_hf
from transformers import {imports}AutoTokenizer

name = {quoted(name)}
tokenizer = AutoTokenizer.from_pretrained(name)
{base}model = {call}
inputs = tokenizer("Once upon a time", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=64, return_dict_in_generate=True)
print(tokenizer.decode(output.sequences[0], skip_special_tokens=True))
print(output.jacobi_stats.tokens_per_forward)
```""",
        "Write prompts in the form of those it was trained on. "
        '`generate(..., decoding="autoregressive")` decodes one token at a time. ' + _loading_text(facts),
    ]
    if facts.has_custom_generate:
        parts.append(f"Without `cllm_hf`:\n\n```python\n{usage_code(name, bool(facts.adapter))}\n```")
    return "\n\n".join(parts)


def _loading_text(facts: ModelFacts) -> str:
    if not facts.adapter:
        return "After `import cllm_hf` the model may also be loaded by `AutoModelForCausalLM`."
    merged = "`model.merge_and_unload()` makes one model of the base model and the adapter. " * facts.can_merge
    return (
        f"{merged}Loaded by PEFT's `AutoPeftModelForCausalLM` it decodes by Jacobi with "
        '`generate(..., decoding="jacobi")`.'
    )


def _training_text(facts: ModelFacts) -> str:
    data = "trajectories"
    if facts.num_responses is not None:
        data = f"the trajectories of {facts.num_responses:,} responses"
    if facts.dataset_name:
        data += f" in {_linked(facts.dataset_name, 'datasets')}"
    trained = facts.num_trained if facts.num_trained != facts.num_parameters else None
    model = ", ".join(
        part
        for part in (
            plain(facts.architecture or ""),
            f"{facts.num_parameters:,} parameters" if facts.num_parameters else None,
            f"{trained:,} trained" if trained else None,
            plain(facts.adapter or ""),
        )
        if part
    )
    length = f"{facts.num_updates:,} update{'s' * (facts.num_updates != 1)}"
    if facts.num_epochs is not None:
        length += f" ({facts.num_epochs:.4g} epochs)"
    text = (
        f"On {data}, in blocks of {facts.block_size} tokens{f' ({model})' if model else ''}: a loss draws every state "
        "of a block to its fixed point (consistency loss), another keeps what the model writes (AR loss). "
    )
    text += f"Training took {length}." if facts.num_updates else "**It has not been trained yet.**"
    for heading, values in (("Options", facts.options), ("Arguments", facts.arguments)):
        listed = [code(f"{name}={_shown(value)}") for name, value in values.items() if _shown(value)]
        if listed:
            text += f"\n\n{heading}: {', '.join(listed)}."
    if facts.versions:
        versions = ", ".join(plain(f"{name} {version}") for name, version in facts.versions.items())
        text += f"\n\nMade with {versions}."
    return text


def _shown(value: Any) -> str:
    """A value as code, or nothing for one that would say little on a card, or tell folders of this machine."""
    value = value.value if isinstance(value, Enum) else value
    if value is None:
        return ""
    if isinstance(value, str):
        value = Name.recorded(value).for_others
    elif not _is_plain(value):
        return ""
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else ""


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float))


def _figures_text(log_history: Sequence[Mapping[str, Any]]) -> str:
    """First and last value of each figure that was logged at least once."""
    found: dict[str, list[tuple[int, float]]] = {}
    for log in log_history:
        for name, value in log.items():
            if _FIGURE.fullmatch(name) and isinstance(value, (int, float)):
                found.setdefault(name, []).append((int(log.get("step", 0)), float(value)))
    order = list(_FIGURES)
    rows = []
    for name in sorted(found, key=lambda name: (order.index(_figure_of(name)["figure"]), name)):
        first, *others = (f"{value:.4g} (update {step})" for step, value in found[name])
        rows.append((_figure_name(name), first, others[-1] if others else ""))
    return table(("figure", "first", "last"), rows) if rows else ""


def _figure_of(name: str) -> re.Match[str]:
    match = _FIGURE.fullmatch(name)
    assert match is not None
    return match


def _figure_name(name: str) -> str:
    match = _figure_of(name)
    dataset = (match["dataset"] or "").rstrip("_")
    where = f", evaluation{f' on {code(dataset)}' if dataset else ''}" if name.startswith("eval_") else ""
    return _FIGURES[match["figure"]] + where


def _measured_text(measured: Mapping[str, Any]) -> str:
    rows = []
    for name, value in measured.items():
        rows.append([plain(name), f"{value:.4g}" if isinstance(value, float) else plain(value)])
    return table(("what", "value"), rows) if rows else ""


def _citation_text(facts: ModelFacts) -> str:
    version = facts.versions.get("cllm_hf")
    library = [
        "@software{cllm_hf,",
        "    title   = {{cllm_hf: Consistency LLMs for Hugging Face transformers}},",
        *([f"    version = {{{version}}},"] if version else []),
        "    license = {Apache-2.0},",
        "}",
    ]
    software = "\n".join(library)
    return (
        "The method is that of [CLLM](https://arxiv.org/abs/2403.00835):\n\n"
        f"```bibtex\n{CLLM_CITATION}\n```\n\nThe library:\n\n```bibtex\n{software}\n```"
    )
