"""The model card: what a CLLM or a lossless adapter was made from and how, what was measured, and how to use it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..cards import (
    CLLM_CITATION,
    END,
    MASKS_CITATION,
    code,
    is_ours_alone,
    join_tags,
    plain,
    quoted,
    renew_section,
    table,
)
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
    "tokens_per_forward": "tokens per forward pass",
    "agreement": "agreement with the target model",
    "fast_forwarded": "fast-forwarded tokens a block",
    "stationary": "stationary tokens a block",
    "repetition": "repetition rate",
    "target_repetition": "repetition rate of the dataset's responses",
}
# The same of a lossless adapter, whose text cannot change.
_LOSSLESS_FIGURES = {
    "drafting_loss": "drafting loss",
    "draft_accuracy": "draft accuracy",
    "tokens_per_forward": "tokens per forward pass",
}
_LONGEST_VALUE = 80


@dataclass(frozen=True)
class ModelFacts:
    """What a model card tells. What is not known is left out, and so are the figures that were not measured."""

    block_size: int
    num_masks: int | None = None  # most tokens that a lossless adapter drafts after one text; `None` of a CLLM
    markov_rank: int = 0
    repo_id: str | None = None
    title: str | None = None  # by default the last part of `repo_id`
    base_model: str | None = None  # name or path of the model that was trained, or that the adapter goes on
    adapter: str | None = None  # what kind of adapter it is, if it is one, such as "LoRA, rank 16"
    can_merge: bool = True
    architecture: str | None = None
    num_parameters: int | None = None  # with those of the adapter
    num_trained: int | None = None
    dataset_name: str | None = None
    num_responses: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)  # of `CLLMConfig`
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of transformers, such as the learning rate
    num_updates: int = 0
    num_epochs: float | None = None
    log_history: Sequence[Mapping[str, Any]] = ()  # in its order, with `step`
    plot: str | None = None  # file beside the card
    measured: Mapping[str, Any] = field(default_factory=dict)  # a name and a number or text each
    license: Mapping[str, Any] = field(default_factory=dict)  # `license` and what belongs to it, as metadata
    tags: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)  # of the packages
    has_custom_generate: bool = False

    @property
    def is_lossless(self) -> bool:
        """Whether it is an adapter that drafts for its base model, whose text stays its own."""
        return self.num_masks is not None


def make_model_card(facts: ModelFacts) -> str:
    """
    Write the card of a trained model, `README.md`; the same facts give the same text.

    Folders of the machine where it was trained are not told: they mean nothing to others.
    """
    unnamed = "Lossless adapter" if facts.is_lossless else "Consistency LLM"
    base = Name.recorded(facts.base_model)
    card = ModelCard.from_template(
        _metadata(facts),
        template_path=str(Path(__file__).with_name("card.md.jinja")),
        facts=facts,
        begin=BEGIN,
        end=END,
        title=plain(facts.title or (facts.repo_id or "").split("/")[-1] or unnamed),
        base=_linked(facts.base_model, "models") if facts.base_model else "a model without a name",
        # Where an adapter's base model was on the machine of the training is no place for others.
        base_path=(base.for_others or "path/to/the/base/model") if facts.adapter and base.hub_id is None else None,
        name=facts.repo_id or "path/to/this/folder",
        data=_describe_data(facts),
        model=_describe_model(facts),
        options=_listed(facts.options),
        arguments=_listed(facts.arguments),
        versions=", ".join(plain(f"{name} {version}") for name, version in facts.versions.items()),
        figures=list(_figures(facts)),
        measured=[
            [plain(name), f"{value:.4g}" if isinstance(value, float) else plain(value)]
            for name, value in facts.measured.items()
        ],
        citation=MASKS_CITATION if facts.is_lossless else CLLM_CITATION,
        quoted=quoted,
        table=table,
        usage_code=usage_code,
    )
    return str(card).rstrip() + "\n"


def renew_model_card(earlier: str | None, new: str) -> str | None:
    """
    Put a new card in place of an earlier one of ours, and keep what others have written into that; `None` if the card
    that is there was written by somebody else, and stays.

    Text outside our marks stays where it is, and so do metadata that ours does not have; tags are joined. A card
    without text, such as the Hub makes of a chosen license, gets ours.
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
    old, data = old_card.data.to_dict(), new_card.data.to_dict()
    kept = {name: value for name, value in old.items() if name not in _OURS}
    if "license" in kept:  # somebody has chosen it, and says it with other entries of that kind
        data = {name: value for name, value in data.items() if not name.startswith("license")}
    return _card({**kept, **data, "tags": join_tags(old.get("tags"), data.get("tags", ()))}, text.lstrip())


def join_cards(here: str | None, there: str) -> str:
    """
    The card of a folder that is pushed to a repository with a card of its own: that of the folder if somebody has
    written into it; else that of the repository, so that what stands there is not lost.
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
    return _card({**card.data.to_dict(), **ModelCard(here).data.to_dict()}, f"{card.text.strip()}\n")


def _card(data: Mapping[str, Any], text: str) -> str:
    return f"---\n{ModelCardData(**data).to_yaml()}\n---\n\n{text}"


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


def _linked(name: str, kind: str) -> str:
    recorded = Name.recorded(name)
    if recorded.hub_id is None:
        return code(recorded.for_others)
    return f"[{plain(name)}](https://huggingface.co/{'datasets/' if kind == 'datasets' else ''}{name})"


def _describe_data(facts: ModelFacts) -> str:
    data = "responses"
    if facts.num_responses is not None:
        data = f"{facts.num_responses:,} responses"
    if not facts.is_lossless:
        data = "trajectories" if facts.num_responses is None else f"the trajectories of {data}"
    return data + (f" in {_linked(facts.dataset_name, 'datasets')}" if facts.dataset_name else "")


def _describe_model(facts: ModelFacts) -> str:
    parts = [plain(facts.architecture or "")]
    if facts.num_parameters:
        parts.append(f"{facts.num_parameters:,} parameters")
    if facts.num_trained and facts.num_trained != facts.num_parameters:
        parts.append(f"{facts.num_trained:,} trained")
    return ", ".join(filter(None, [*parts, plain(facts.adapter or "")]))


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(code(f"{name}={_shown(value)}") for name, value in values.items() if _shown(value))


def _shown(value: Any) -> str:
    """A value as code, or nothing for one that would say little on a card, or tell folders of this machine."""
    value = value.value if isinstance(value, Enum) else value
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


def _figures(facts: ModelFacts) -> Iterator[tuple[str, str, str]]:
    """Name, first and last value of each figure that was logged."""
    labels = _LOSSLESS_FIGURES if facts.is_lossless else _FIGURES
    pattern = re.compile(rf"(eval_((?P<dataset>.+)_)??)?(?P<figure>{'|'.join(labels)})")
    matches = {name: match for log in facts.log_history for name in log if (match := pattern.fullmatch(name))}
    order = list(labels)
    for name in sorted(matches, key=lambda name: (order.index(matches[name]["figure"]), name)):
        found = [
            (log[name], log.get("step", 0)) for log in facts.log_history if isinstance(log.get(name), int | float)
        ]
        values = [f"{value:.4g} (step {step})" for value, step in found]
        label = labels[matches[name]["figure"]]
        if name.startswith("eval_"):
            dataset = matches[name]["dataset"]
            label += f", evaluation on {code(dataset)}" if dataset else ", evaluation"
        if values:
            yield label, values[0], values[-1] if len(values) > 1 else ""
