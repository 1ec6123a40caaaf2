"""
Where `decoding="jacobi"` meets transformers: the only file that touches `GenerationMixin` and `GenerationConfig`.

`register` wraps `GenerationMixin.generate` (a public name) and hands calls with `decoding="jacobi"` to its own
`custom_generate` hook; every other call passes through untouched. It wraps `load_adapter` of transformers models as
well, so that a lossless adapter comes with its drafter. `unregister` takes both back.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from transformers import (
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.integrations import PeftAdapterMixin

from ._host import CACHE_NAME, leaving_no_hooks, mark_as_edited
from .adapters import loading_drafters
from .blocks.drafter import find_drafter, in_turn, is_switched_off, without_adapters
from .decoding.loop import decode
from .decoding.lossless import warn_without_drafter
from .decoding.strategy import decodings
from .options import (
    AUTO,
    AUTOREGRESSIVE,
    DEFAULT_BLOCK_SIZE,
    JACOBI,
    LOSSLESS,
    OPTION_NAMES,
    JacobiOptions,
    check_block_size,
    first_set,
    option_of,
)
from .refusals import check_supported


_ORIGINAL = "_cllm_hf_original"
_WRAPPED: tuple[tuple[Any, str], ...] = ((GenerationMixin, "generate"), (PeftAdapterMixin, "load_adapter"))
_SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_STRATEGY_OPTIONS = ("num_beams", "penalty_alpha", "prompt_lookup_num_tokens", "cache_implementation")


def register() -> None:
    """
    Add `decoding=` and the `jacobi_` options to `generate` of every transformers model, and have `load_adapter` load
    the drafters of lossless adapters. Done by `import cllm_hf`.

    Calling it again changes nothing.
    """
    if hasattr(GenerationMixin.generate, _ORIGINAL):
        return
    wrappers = (with_decoding(GenerationMixin.generate), loading_drafters(PeftAdapterMixin.load_adapter))
    for (owner, name), wrapper in zip(_WRAPPED, wrappers):
        setattr(wrapper, _ORIGINAL, getattr(owner, name))
        setattr(owner, name, wrapper)


def with_decoding(original: Callable[..., Any]) -> Callable[..., Any]:
    """Make a `generate` that takes `decoding=` and the `jacobi_` options from the one of transformers."""
    original = getattr(original, _ORIGINAL, original)

    @functools.wraps(original)
    def generate(
        self: Any,
        *args: Any,
        decoding: str | None = None,
        jacobi_block_size: int | str | None = None,
        jacobi_candidates: int | None = None,
        jacobi_seed: int | None = None,
        jacobi_compile: bool | None = None,
        jacobi_drafts: int | None = None,
        **kwargs: Any,
    ) -> Any:
        given = {
            "jacobi_block_size": jacobi_block_size,
            "jacobi_candidates": jacobi_candidates,
            "jacobi_seed": jacobi_seed,
            "jacobi_compile": jacobi_compile,
            "jacobi_drafts": jacobi_drafts,
        }
        with in_turn(self):
            return _generate(original, self, args, kwargs, decoding, given)

    return generate


def unregister() -> None:
    """
    Take back what `register` has done; transformers is then as it was before `import cllm_hf`.

    Calling it again changes nothing.

    Raises:
        RuntimeError: if another library has wrapped `generate` or `load_adapter` since, so that taking ours out would
            take out theirs.
    """
    originals: list[Any] = [getattr(owner, name).__dict__.get(_ORIGINAL) for owner, name in _WRAPPED]
    for (owner, name), original in zip(_WRAPPED, originals):
        if original is not None and getattr(getattr(owner, name), "__wrapped__", None) is not original:
            raise RuntimeError(
                f"`{owner.__name__}.{name}` was wrapped again after `import cllm_hf`. Undo that wrapper before "
                "calling `cllm_hf.unregister()`."
            )
    for (owner, name), original in zip(_WRAPPED, originals):
        if original is not None:
            setattr(owner, name, original)


def set_jacobi_defaults(model: Any, block_size: int | str = DEFAULT_BLOCK_SIZE) -> None:
    """
    Make `model.generate(...)` decode by Jacobi by default, also after `save_pretrained` and loading.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): its `generation_config` is changed in place.
        block_size (`int` or `"auto"`): default of `jacobi_block_size`.

    Raises:
        ValueError: if `block_size` is neither an integer of at least 1 nor `"auto"`, or other defaults contradict each
            other.
    """
    # A CLLM is trained on greedy responses. Options of sampling and of other strategies would make `generate` or
    # saving fail.
    others = {**dict.fromkeys((*_SAMPLING_OPTIONS, *_STRATEGY_OPTIONS)), "do_sample": False}
    _set_defaults(model.generation_config, JACOBI, block_size, others)


def set_lossless_defaults(model: Any, block_size: int | str = AUTO) -> None:
    """
    Make `model.generate(...)` draft by a lossless adapter by default; other options stay those of the base model.
    """
    _set_defaults(model.generation_config, LOSSLESS, block_size, {})


def _set_defaults(config: Any, decoding: str, block_size: int | str, others: dict[str, Any]) -> None:
    config.jacobi_block_size = check_block_size(block_size, "block_size", allows_auto=True)
    config.decoding = decoding
    config.use_cache = True  # training with gradient checkpointing may have turned it off
    config.update(**others)
    config.validate(strict=True)
    mark_as_edited(config)


def _generate(
    original: Callable[..., Any],
    model: PreTrainedModel,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    decoding: str | None,
    given: dict[str, Any],
) -> Any:
    """Run a call of `generate` by the decoding that it asks for; `given` are its `jacobi_` options."""
    kwargs = {CACHE_NAME if name == "past_key_values" else name: value for name, value in kwargs.items()}
    call = _named_arguments(original, model, args, kwargs)
    # Where defaults stand, the first ones first: those of the caller, if any, and those of the model.
    configs = [one for one in (call.get("generation_config"), model.generation_config) if one is not None]
    drafts = _drafts(model)
    requested, is_default = _choose_decoding(decoding, given, configs, drafts)
    if (
        requested in (None, AUTOREGRESSIVE)
        # The draft model of assisted decoding is called through `generate` too, and must not draft by itself.
        or first_set(configs[:-1], "is_assistant")
        or (is_default and call.get("custom_generate") is not None)
    ):
        if requested is None:
            warn_without_drafter(model)
        with without_adapters(model) if drafts else nullcontext():
            return original(model, *args, **kwargs)

    with leaving_no_hooks(model):
        return _decode(original, model, call, configs, requested, given)


def _decode(
    original: Callable[..., Any],
    model: PreTrainedModel,
    call: dict[str, Any],
    configs: list[GenerationConfig],
    requested: str,
    given: dict[str, Any],
) -> Any:
    """Run a call of `generate` by a decoding of ours; see `_generate`."""
    if option_of(call, configs, "cache_implementation") == "static":
        given = {**given, "jacobi_compile": True}
        call["cache_implementation"] = "dynamic"  # transformers' static one has no room for a last full block
    options = _jacobi_options(given, configs)
    if requested == LOSSLESS:
        _check_drafted(model, given["jacobi_block_size"])
    elif options.drafts is not None:
        raise ValueError(
            f'`jacobi_drafts` has an effect with `decoding="lossless"` alone, got it with {requested!r}. Drop it.'
        )
    check_supported(model, call, configs, requested)
    if given["jacobi_seed"] is not None and not option_of(call, configs, "do_sample"):
        raise ValueError(
            "`jacobi_seed` is the seed of sampling, got it without `do_sample=True`. Drop one of the two."
        )
    call.pop("custom_generate", None)  # it is `None`: ours takes its place
    call = _with_stop_strings(call, configs)
    if model.generation_config.use_cache is False and option_of(call, configs[:-1], "use_cache") is None:
        call["use_cache"] = True  # a default that training leaves behind, not a wish of the caller
    run = _custom_generate(model, call, options, requested)
    with without_adapters(model) if _drafts(model) and requested != LOSSLESS else nullcontext():
        return original(model, **call, custom_generate=run)


def _drafts(model: PreTrainedModel) -> bool:
    """Whether an adapter that drafts is active."""
    return find_drafter(model) is not None and not is_switched_off(model)


def _named_arguments(
    original: Callable[..., Any], model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    bound = inspect.signature(original).bind_partial(model, *args, **kwargs).arguments
    bound.pop("self")
    others = bound.pop("kwargs", {})
    return {**bound, **others}


def _choose_decoding(
    decoding: str | None, given: dict[str, Any], configs: list[GenerationConfig], drafts: bool
) -> tuple[Any, bool]:
    """Which decoding a call asks for, `None` for that of transformers, and whether it does so by defaults alone."""
    named = [name for name, value in given.items() if _is_wish(name, value)]
    default = LOSSLESS if drafts and first_set(configs[:-1], "decoding") is None else decoding_of(configs)
    if default == LOSSLESS and not drafts:
        default = None  # within `disable_adapter()`, and for the base model of an adapter
    if decoding is None and named:
        decoding = default if drafts else _strategy_of(configs)
        if decoding == LOSSLESS and not drafts:
            decoding = JACOBI  # its own defaults are not meant for a model that it does not draft for
    elif decoding == AUTOREGRESSIVE and named:
        raise ValueError(f'`{named[0]}` has no effect with `decoding="autoregressive"`. Drop one of the two.')
    requested = default if decoding is None else decoding
    if requested is not None and requested not in decodings():
        names = " or ".join(f'"{name}"' for name in decodings())
        raise ValueError(f"`decoding` must be {names}, got {requested!r}.")
    return requested, decoding is None


def decoding_of(configs: list[GenerationConfig]) -> Any:
    """The decoding that the first config with a `decoding` or a `jacobi_` option asks for."""
    for number, config in enumerate(configs):
        decoding = getattr(config, "decoding", None)
        if decoding is not None:
            return decoding
        if any(_is_wish(name, getattr(config, name, None)) for name in OPTION_NAMES):
            return _strategy_of(configs[number + 1 :])
    return None


def _strategy_of(configs: list[GenerationConfig]) -> Any:
    """The strategy that a `jacobi_` option is meant for where no `decoding` stands beside it."""
    decoding = first_set(configs, "decoding")
    return JACOBI if decoding in (None, AUTOREGRESSIVE) else decoding


def _is_wish(name: str, value: Any) -> bool:
    """Whether an option asks for something that only Jacobi decoding does."""
    return value is not None and value is not False and (name, value) != ("jacobi_candidates", 0)


def _check_drafted(model: PreTrainedModel, size: Any) -> None:
    """Refuse a block that is longer than the adapter drafts, where a caller asks for it."""
    drafter = find_drafter(model)
    if drafter is None or size in (None, AUTO):
        return  # a default is cut instead, and a missing drafter is another matter
    largest = drafter.num_masks + 1
    if check_block_size(size) > largest:
        raise ValueError(
            f"`jacobi_block_size` must be at most {largest} with this adapter, whose drafts have {drafter.num_masks} "
            f"tokens after the one that the model says, got {size}. Pass less, or train it with a larger `block_size`."
        )


def _jacobi_options(given: dict[str, Any], configs: list[GenerationConfig]) -> JacobiOptions:
    values = {name: value if value is not None else first_set(configs, name) for name, value in given.items()}
    return JacobiOptions(
        **{name.removeprefix("jacobi_"): value for name, value in values.items() if value is not None}
    )


def _custom_generate(
    model: PreTrainedModel, call: dict[str, Any], options: JacobiOptions, strategy_name: str
) -> Callable[..., Any]:
    """The callable for transformers' `custom_generate` hook, with what that does not hand over."""
    attention_mask, inputs_embeds = call.get("attention_mask"), call.get("inputs_embeds")
    input_ids = call.get("inputs") if call.get("inputs") is not None else call.get("input_ids")
    prompt = inputs_embeds if inputs_embeds is not None else input_ids
    given = attention_mask if attention_mask is not None else prompt
    encoder_ids = None
    if model.config.is_encoder_decoder:
        given = None
        if prompt is not None and prompt.dim() == 2 and not prompt.is_floating_point():
            encoder_ids = prompt
    return functools.partial(
        decode,
        options=options,
        strategy_name=strategy_name,
        streamer=call.get("streamer"),
        encoder_ids=encoder_ids,
        num_given=None if given is None else given.shape[1],
        is_user_cache=call.get(CACHE_NAME) is not None,
    )


def _with_stop_strings(call: dict[str, Any], configs: list[GenerationConfig]) -> dict[str, Any]:
    """Turn `stop_strings` into a criterion: a `custom_generate` callable is handed no tokenizer."""
    call = dict(call)
    tokenizer = call.pop("tokenizer", None)
    stop_strings = call.pop("stop_strings", None) or first_set(configs, "stop_strings")
    if not stop_strings:
        return call
    if tokenizer is None:
        raise ValueError(
            f"`stop_strings` need the tokenizer to be found, got {stop_strings!r} without one. Pass "
            "`tokenizer=tokenizer` to `generate` too."
        )
    criterion = StopStringCriteria(tokenizer, stop_strings)
    call["stopping_criteria"] = StoppingCriteriaList([*(call.get("stopping_criteria") or []), criterion])
    if call.get("generation_config") is not None:
        call["generation_config"] = copy.deepcopy(call["generation_config"])
        call["generation_config"].stop_strings = None
    if configs[-1].stop_strings:  # the model's own default would be merged in again
        call["stop_strings"] = None
    return call
