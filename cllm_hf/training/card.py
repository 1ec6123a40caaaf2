"""The model card: what a CLLM or a lossless adapter was made from and how, what was measured, and how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..cards import END, is_ours_alone, join_tags, plain, renew_section
from ..export import TAG as EXPORT_TAG
from ..names import Name
from .card_text import (
    ModelFacts,
    citation_text,
    figures_text,
    introduction_text,
    measured_text,
    training_text,
    usage_text,
)


# What stands between this mark and `END` is ours; the rest of a card belongs to those who have written it.
BEGIN = "<!-- cllm_hf: what stands from here to the end mark is written anew whenever the model is saved -->"
# Metadata that must not outlive what they were true of: without a new value the earlier one goes.
_OURS = ("base_model", "base_model_relation", "library_name")
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
![Losses and tokens per forward pass over the training]({{ plot }})
{% endif %}{% if measured %}
## Measured

{{ measured }}
{% endif %}
## Citation

{{ citation }}

{{ end }}
"""


def make_model_card(facts: ModelFacts) -> str:
    """
    Write the card of a trained model, `README.md`.

    Folders of the machine where it was trained are not told: they mean nothing to others.

    Args:
        facts (`ModelFacts`): what to tell.

    Returns:
        `str`: metadata and Markdown; the same facts give the same text.
    """
    unnamed = "Lossless adapter" if facts.is_lossless else "Consistency LLM"
    title = facts.title or (facts.repo_id or "").split("/")[-1] or unnamed
    card = ModelCard.from_template(
        _metadata(facts),
        template_str=_TEMPLATE,
        begin=BEGIN,
        end=END,
        title=plain(title),
        introduction=introduction_text(facts),
        usage=usage_text(facts),
        training=training_text(facts),
        figures=figures_text(facts),
        plot=facts.plot,
        measured=measured_text(facts.measured),
        citation=citation_text(facts),
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
