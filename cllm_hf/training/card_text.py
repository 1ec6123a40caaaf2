"""What a model card tells: the facts, and the text of each of its sections."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from ..cards import CLLM_CITATION, MASKS_CITATION, code, plain, quoted, table
from ..export import usage_code
from ..names import Name


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
_FIGURE = re.compile(rf"(?:eval_(?P<dataset>.+_)??)?(?P<figure>{'|'.join({**_FIGURES, **_LOSSLESS_FIGURES})})")
_LONGEST_VALUE = 80


@dataclass(frozen=True)
class ModelFacts:
    """
    What a model card tells. What is not known is left out, and so are the figures that were not measured.

    Args:
        block_size (`int`): tokens of a block that the model was trained on.
        num_masks (`int`, *optional*): most tokens that a lossless adapter drafts after one text; `None` of a CLLM.
        markov_rank (`int`): rank of the Markov head of a lossless adapter; 0 for none.
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
        options (`Mapping[str, Any]`): options of `CLLMConfig`.
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
    num_masks: int | None = None
    markov_rank: int = 0
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

    @property
    def is_lossless(self) -> bool:
        """`bool`: whether it is an adapter that drafts for its base model, whose text stays its own."""
        return self.num_masks is not None


def introduction_text(facts: ModelFacts) -> str:
    """What it is, in the first lines of the card."""
    base = _linked(facts.base_model, "models") if facts.base_model else "a model without a name"
    if facts.is_lossless:
        return (
            f"A **lossless** adapter for {base}: it drafts several tokens at once, and the base model verifies them "
            "in the same forward pass. The text, greedy or sampled, is the base model's own, because the base weights "
            "verify every token, and the adapter does not act on them while they do (in 16 bits, up to near ties of "
            "two tokens). What it has learned changes the speed alone. Made with `cllm_hf`."
        )
    what = "An adapter that makes" if facts.adapter else "A Consistency LLM (CLLM):"
    how = f"{base} a Consistency LLM (CLLM), trained" if facts.adapter else f"{base}, trained"
    return (
        f"{what} {how} to guess several tokens at once. Jacobi decoding checks the guesses in one forward pass, and "
        "writes exactly the text of decoding one token at a time (in 16 bits, up to near ties of two tokens). "
        "Made with `cllm_hf`."
    )


def _linked(name: str, kind: str) -> str:
    recorded = Name.recorded(name)
    if recorded.hub_id is None:
        return code(recorded.for_others)
    return f"[{plain(name)}](https://huggingface.co/{'datasets/' if kind == 'datasets' else ''}{name})"


def usage_text(facts: ModelFacts) -> str:
    """How to load it and decode with it, as code that runs."""
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
        _lossless_decoding_text() if facts.is_lossless else _decoding_text(facts),
    ]
    if facts.has_custom_generate:
        what = "Without `cllm_hf`, the file beside the adapter drafts" if facts.is_lossless else "Without `cllm_hf`"
        parts.append(f"{what}:\n\n```python\n{usage_code(name, bool(facts.adapter))}\n```")
    return "\n\n".join(parts)


def _decoding_text(facts: ModelFacts) -> str:
    text = (
        "Write prompts in the form of those it was trained on. "
        '`generate(..., decoding="autoregressive")` decodes one token at a time. '
    )
    if not facts.adapter:
        return text + "After `import cllm_hf` the model may also be loaded by `AutoModelForCausalLM`."
    merged = "`model.merge_and_unload()` makes one model of the base model and the adapter. " * facts.can_merge
    return (
        f"{text}{merged}Loaded by PEFT's `AutoPeftModelForCausalLM` it decodes by Jacobi with "
        '`generate(..., decoding="jacobi")`.'
    )


def _lossless_decoding_text() -> str:
    return (
        "After `import cllm_hf`, `AutoModelForCausalLM.from_pretrained(name)` loads it too, on the base model that "
        "`adapter_config.json` names, and so does `base_model.load_adapter(name)`. "
        '`generate(..., decoding="autoregressive")` is the base model by itself, one token a forward pass, for '
        "comparison. Drafts are best for prompts of the kind that it was trained on.\n\n"
        "Without `cllm_hf` the adapter leaves the base model as it is: to PEFT it is an activated LoRA that nothing "
        "invokes. The text is the same then, one token a forward pass."
    )


def training_text(facts: ModelFacts) -> str:
    """What it was trained on, for how long, and with which options."""
    what = "responses" if facts.is_lossless else "trajectories"
    data = what
    if facts.num_responses is not None:
        data = f"{facts.num_responses:,} responses"
        data = data if facts.is_lossless else f"the trajectories of {data}"
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
    length = f"{facts.num_updates:,} optimizer step{'s' * (facts.num_updates != 1)}"
    if facts.num_epochs is not None:
        length += f" ({facts.num_epochs:.4g} epochs)"
    text = (
        _lossless_training_text(facts, data, model) if facts.is_lossless else _cllm_training_text(facts, data, model)
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


def _cllm_training_text(facts: ModelFacts, data: str, model: str) -> str:
    return (
        f"On {data}, in blocks of {facts.block_size} tokens{f' ({model})' if model else ''}: a loss draws every state "
        "of a block to its fixed point (consistency loss), another keeps what the model writes (AR loss). "
    )


def _lossless_training_text(facts: ModelFacts, data: str, model: str) -> str:
    num_masks = facts.num_masks or 0
    head = f"a Markov head of rank {facts.markov_rank}" if facts.markov_rank else "no Markov head"
    return (
        f"On {data}{f' ({model})' if model else ''}. The base model is frozen. Blocks of masks stand after some "
        "places of each response, and the drafting loss draws what the adapter says at each mask to what the base "
        f"model says at that place of the text. The drafter has {num_masks} mask{'s' * (num_masks != 1)}, for a block "
        f"size of at most {num_masks + 1}, and {head}. "
    )


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


def figures_text(facts: ModelFacts) -> str:
    """First and last value of each figure that was logged at least once; empty if none was."""
    labels = _LOSSLESS_FIGURES if facts.is_lossless else _FIGURES
    found: dict[str, list[tuple[int, float]]] = {}
    for log in facts.log_history:
        for name, value in log.items():
            match = _FIGURE.fullmatch(name)
            if match and match["figure"] in labels and isinstance(value, (int, float)):
                found.setdefault(name, []).append((int(log.get("step", 0)), float(value)))
    order = list(labels)
    rows = []
    for name in sorted(found, key=lambda name: (order.index(_figure_of(name)["figure"]), name)):
        first, *others = (f"{value:.4g} (step {step})" for step, value in found[name])
        rows.append((_figure_name(name, labels), first, others[-1] if others else ""))
    return table(("figure", "first", "last"), rows) if rows else ""


def _figure_of(name: str) -> re.Match[str]:
    match = _FIGURE.fullmatch(name)
    assert match is not None
    return match


def _figure_name(name: str, labels: Mapping[str, str]) -> str:
    match = _figure_of(name)
    dataset = (match["dataset"] or "").rstrip("_")
    where = f", evaluation{f' on {code(dataset)}' if dataset else ''}" if name.startswith("eval_") else ""
    return labels[match["figure"]] + where


def measured_text(measured: Mapping[str, Any]) -> str:
    """What was measured of the finished model; empty if nothing was."""
    rows = []
    for name, value in measured.items():
        rows.append([plain(name), f"{value:.4g}" if isinstance(value, float) else plain(value)])
    return table(("what", "value"), rows) if rows else ""


def citation_text(facts: ModelFacts) -> str:
    """What to cite: the method and the library."""
    version = facts.versions.get("cllm_hf")
    library = [
        "@software{cllm_hf,",
        "    title   = {{cllm_hf: Consistency LLMs for Hugging Face transformers}},",
        *([f"    version = {{{version}}},"] if version else []),
        "    license = {Apache-2.0},",
        "}",
    ]
    software = "\n".join(library)
    method, entry = "The method is that of [CLLM](https://arxiv.org/abs/2403.00835)", CLLM_CITATION
    if facts.is_lossless:
        method = "Masks and an adapter that acts on them alone are from [this work](https://arxiv.org/abs/2507.11851)"
        entry = MASKS_CITATION
    return f"{method}:\n\n```bibtex\n{entry}\n```\n\nThe library:\n\n```bibtex\n{software}\n```"
