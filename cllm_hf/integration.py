"""
Where `decoding="jacobi"` meets transformers: the only file that touches `GenerationMixin` and `GenerationConfig`.

`register` wraps `GenerationMixin.generate` (a public name) and hands calls with `decoding="jacobi"` to the host's own
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

import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.integrations import PeftAdapterMixin
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module

from ._host import has_own_loop, mark_as_edited, mixes_adapters
from .adapters import loading_drafters
from .blocks.drafter import find_drafter, is_lossless
from .blocks.gate import is_switched_off, without_adapters
from .blocks.limits import limits_of
from .blocks.support import why_adapter_refused
from .decoding.lossless import warn_without_drafter
from .decoding.registry import decodings
from .options import (
    AUTO,
    AUTOREGRESSIVE,
    DEFAULT_BLOCK_SIZE,
    JACOBI,
    LOSSLESS,
    OPTION_NAMES,
    JacobiOptions,
    check_block_size,
)


_ORIGINAL = "_cllm_hf_original"
_WRAPPED: tuple[tuple[Any, str], ...] = ((GenerationMixin, "generate"), (PeftAdapterMixin, "load_adapter"))
_SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_STRATEGY_OPTIONS = ("num_beams", "penalty_alpha", "prompt_lookup_num_tokens", "cache_implementation")
# Model inputs that grow with the text, or are not handed to the model at all.
_TEXT_INPUTS = (
    "inputs input_ids inputs_embeds attention_mask position_ids token_type_ids negative_prompt_ids "
    "negative_prompt_attention_mask"
).split()
_GREEDY = 'pass `decoding="autoregressive"`'


def register() -> None:
    """
    Add `decoding=` and the `jacobi_` options to `generate` of every transformers model, and have `load_adapter` load
    the drafters of lossless adapters. Done by `import cllm_hf`.

    Calling it again changes nothing.
    """
    original = GenerationMixin.generate
    if hasattr(original, _ORIGINAL):
        return

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
        return _generate(original, self, args, kwargs, decoding, given)

    for (owner, name), wrapper in zip(_WRAPPED, (generate, loading_drafters(PeftAdapterMixin.load_adapter))):
        setattr(wrapper, _ORIGINAL, getattr(owner, name))
        setattr(owner, name, wrapper)


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
    config = model.generation_config
    config.decoding = JACOBI
    config.jacobi_block_size = check_block_size(block_size, "block_size", allows_auto=True)
    config.use_cache = True  # training with gradient checkpointing may have turned it off
    # A CLLM is trained on greedy responses. Options of sampling and of other strategies would make `generate` or
    # saving fail.
    config.update(**dict.fromkeys((*_SAMPLING_OPTIONS, *_STRATEGY_OPTIONS)), do_sample=False)
    config.validate(strict=True)
    mark_as_edited(config)


def set_lossless_defaults(model: Any, block_size: int | str = AUTO) -> None:
    """
    Make `model.generate(...)` draft by a lossless adapter by default; other options stay those of the base model.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): its `generation_config` is changed in place.
        block_size (`int` or `"auto"`): default of `jacobi_block_size`.

    Raises:
        ValueError: if `block_size` is neither an integer of at least 1 nor `"auto"`, or other defaults contradict each
            other.
    """
    config = model.generation_config
    config.decoding = LOSSLESS
    config.jacobi_block_size = check_block_size(block_size, "block_size", allows_auto=True)
    config.use_cache = True  # training with gradient checkpointing may have turned it off
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
    """Decide which decoding a call of `generate` asks for, and run it."""
    call = _named_arguments(original, model, args, kwargs)
    user_config = call.get("generation_config")
    configs = [config for config in (user_config, model.generation_config) if config is not None]
    named = [name for name, value in given.items() if _is_wish(name, value)]
    drafts = find_drafter(model) is not None and not is_switched_off(model)
    default = LOSSLESS if drafts and getattr(user_config, "decoding", None) is None else _decoding_of(configs)
    if default == LOSSLESS and not drafts:
        default = None  # within `disable_adapter()`, and for the base model of an adapter
    if decoding is None and named:
        decoding = default if drafts else _strategy_of(configs)
        if decoding == LOSSLESS and not drafts:
            decoding = JACOBI  # its own defaults are not meant for a model that it does not draft for
    elif decoding == AUTOREGRESSIVE and named:
        raise ValueError(f'`{named[0]}` has no effect with `decoding="autoregressive"`. Drop one of the two.')
    requested = decoding if decoding is not None else default
    if requested is not None and requested not in decodings():
        names = " or ".join(f'"{name}"' for name in decodings())
        raise ValueError(f"`decoding` must be {names}, got {requested!r}.")
    # The draft model of assisted decoding is called through `generate` too, and must not draft by itself.
    is_assistant = getattr(user_config, "is_assistant", False)
    if (
        requested in (None, AUTOREGRESSIVE)
        or is_assistant
        or (decoding is None and call.get("custom_generate") is not None)
    ):
        if requested is None:
            warn_without_drafter(model)
        with without_adapters(model) if drafts else nullcontext():
            return original(model, *args, **kwargs)

    if _option(call, configs, "cache_implementation") == "static":
        given = {**given, "jacobi_compile": True}
        call["cache_implementation"] = "dynamic"  # the host's static one has no room for a last full block
    options = _jacobi_options(given, configs)
    if requested == LOSSLESS:
        _check_drafted(model, given)
    elif options.drafts is not None:
        raise ValueError(
            f'`jacobi_drafts` has an effect with `decoding="lossless"` alone, got it with {requested!r}. Drop it.'
        )
    _check_supported(model, call, configs)
    if given["jacobi_seed"] is not None and not _option(call, configs, "do_sample"):
        raise ValueError(
            "`jacobi_seed` is the seed of sampling, got it without `do_sample=True`. Drop one of the two."
        )
    call.pop("custom_generate", None)  # it is `None`: ours takes its place
    call = _with_stop_strings(call, configs)
    if model.generation_config.use_cache is False and _option(call, configs[:-1], "use_cache") is None:
        call["use_cache"] = True  # a default that training leaves behind, not a wish of the caller
    run = _custom_generate(model, call, options, requested)
    with without_adapters(model) if drafts and requested != LOSSLESS else nullcontext():
        return original(model, **call, custom_generate=run)


def _check_drafted(model: PreTrainedModel, given: dict[str, Any]) -> None:
    """Raise a `ValueError` for a block that is longer than the adapter drafts, where a caller asks for it."""
    drafter, size = find_drafter(model), given["jacobi_block_size"]
    if drafter is None or size in (None, AUTO):
        return  # a default is cut instead, and a missing drafter is another matter
    largest = drafter.num_masks + 1
    if check_block_size(size) > largest:
        raise ValueError(
            f"`jacobi_block_size` must be at most {largest} with this adapter, whose drafts have {drafter.num_masks} "
            f"tokens after the one that the model says, got {size}. Pass less, or train it with a larger `block_size`."
        )


def _jacobi_options(given: dict[str, Any], configs: list[GenerationConfig]) -> JacobiOptions:
    values = {name: value if value is not None else _first_set(configs, name) for name, value in given.items()}
    if values["jacobi_block_size"] is None and values["jacobi_compile"]:
        values["jacobi_block_size"] = DEFAULT_BLOCK_SIZE  # a compiled forward has one shape
    return JacobiOptions(
        **{name.removeprefix("jacobi_"): value for name, value in values.items() if value is not None}
    )


def _custom_generate(
    model: PreTrainedModel, call: dict[str, Any], options: JacobiOptions, strategy_name: str
) -> Callable[..., Any]:
    """
    Build the callable for the host's `custom_generate` hook.

    The hook does not hand over the streamer, so it is bound here. Names of model inputs must not appear in the
    callable's signature: the host would pass them twice.
    """
    attention_mask, inputs_embeds = call.get("attention_mask"), call.get("inputs_embeds")
    input_ids = call.get("inputs") if call.get("inputs") is not None else call.get("input_ids")
    prompt = inputs_embeds if inputs_embeds is not None else input_ids
    num_given = attention_mask if attention_mask is not None else prompt
    if model.config.is_encoder_decoder:
        num_given = None

    def run(
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        from .decoding.loop import decode

        return decode(
            model,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            options=options,
            strategy_name=strategy_name,
            context_ids=_encoder_ids(model, input_ids, prompt),
            streamer=call.get("streamer"),
            num_given=None if num_given is None else num_given.shape[1],
            is_user_cache=call.get("past_key_values") is not None,
            **model_kwargs,
        )

    return run


def _encoder_ids(model: PreTrainedModel, input_ids: torch.Tensor, prompt: Any) -> torch.Tensor | None:
    """What the encoder has read, for each decoded row: the decoder's own prompt is too short to draw from."""
    if not model.config.is_encoder_decoder or prompt is None or prompt.dim() != 2 or prompt.is_floating_point():
        return None
    return prompt.repeat_interleave(input_ids.shape[0] // prompt.shape[0], dim=0).to(input_ids.device)


def _check_supported(model: PreTrainedModel, call: dict[str, Any], configs: list[GenerationConfig]) -> None:
    """Raise a `ValueError` for options that Jacobi decoding would have to ignore."""

    def option(name: str) -> Any:
        return _option(call, configs, name)

    def refuse(what: str, got: Any, remedy: str) -> None:
        raise ValueError(f'`decoding="jacobi"` does not support {what}, got {got}. To go on, {remedy}.')

    if call.get("custom_generate") is not None:
        refuse("`custom_generate`", repr(call["custom_generate"]), "pass only one of the two")
    if has_own_loop(model):
        refuse("models with a decoding loop of their own", type(model).__name__, _GREEDY)
    if (option("num_beams") or 1) > 1:
        refuse("beam search", f"num_beams={option('num_beams')}", f"pass `num_beams=1` or {_GREEDY}")
    for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"):
        if option(name) is not None:
            refuse(
                f"`{name}`, which is another way to decode several tokens a forward", "both", f"drop it or {_GREEDY}"
            )
    for name in ("penalty_alpha", "dola_layers", "prefill_chunk_size", "token_healing"):
        if option(name):
            refuse(f"`{name}`", repr(option(name)), f"drop it or {_GREEDY}")
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if option(name):
            refuse(f"`{name}` yet", f"True{_asked_by(model)}", f"drop it or {_GREEDY}")
    for name, value in call.items():
        if not model.config.is_encoder_decoder and _is_read_with_prompt(name, value, configs[-1]):
            refuse(f"the model input `{name}` yet", "one", f"drop it or {_GREEDY}")
    if limits_of(model).has_own_state and (option("guidance_scale") or 1) != 1:
        refuse(
            f"`guidance_scale` with {type(model).__name__}, whose one state two texts would share",
            option("guidance_scale"),
            f"drop it or {_GREEDY}",
        )
    if option("cache_implementation") not in (None, "dynamic", "hybrid", "static"):
        refuse("this cache yet", f"cache_implementation={option('cache_implementation')!r}", f"drop it or {_GREEDY}")
    if _runs_in_step(call.get("synced_gpus"), model):
        refuse(
            "generation that keeps several processes in step (`synced_gpus`, ZeRO-3, FSDP) yet", "such a run", _GREEDY
        )
    adapters = [config for config in _peft_configs(model) if not is_lossless(config)]
    for adapter in adapters:
        reason = why_adapter_refused(adapter)
        if reason:
            refuse("this adapter", f"one that cannot be run over a draft: {reason}", f"use plain LoRA or {_GREEDY}")
    if adapters and mixes_adapters(model):
        refuse("several adapters in a batch yet", "`adapter_names`", f"set one adapter for the batch or {_GREEDY}")


def _asked_by(model: Any) -> str:
    """Who may have set an option that the caller did not."""
    if type(model).generate is GenerationMixin.generate:
        return ""
    return (
        f" (`{type(model).__name__}.generate` sets it by itself for some of its own options, such as "
        "`logprob_threshold` or `return_token_timestamps` of Whisper)"
    )


def _is_read_with_prompt(name: str, value: Any, config: GenerationConfig) -> bool:
    """Whether an argument is a model input that belongs to the prompt alone, such as an image."""
    if name in _TEXT_INPUTS or hasattr(config, name):
        return False
    parts = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(part, torch.Tensor) and bool(part.any()) for part in parts)


def _runs_in_step(synced_gpus: bool | None, model: PreTrainedModel) -> bool:
    if synced_gpus is not None:
        return synced_gpus
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_world_size() == 1:
        return False
    return is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)


def _peft_configs(model: PreTrainedModel) -> list[Any]:
    # While a `PeftModel` generates, the base model's input preparation is a bound method of the `PeftModel`.
    owner = getattr(model.prepare_inputs_for_generation, "__self__", model)
    configs = getattr(owner, "peft_config", None)
    return list(configs.values()) if isinstance(configs, dict) else []


def _with_stop_strings(call: dict[str, Any], configs: list[GenerationConfig]) -> dict[str, Any]:
    """Turn `stop_strings` into a criterion: the host hands no tokenizer to a `custom_generate` callable."""
    call = dict(call)
    tokenizer = call.pop("tokenizer", None)
    stop_strings = call.pop("stop_strings", None) or _first_set(configs, "stop_strings")
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


def _named_arguments(
    original: Callable[..., Any], model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    bound = inspect.signature(original).bind_partial(model, *args, **kwargs).arguments
    bound.pop("self")
    others = bound.pop("kwargs", {})
    return {**bound, **others}


def _decoding_of(configs: list[GenerationConfig]) -> Any:
    for number, config in enumerate(configs):
        decoding = getattr(config, "decoding", None)
        if decoding is not None:
            return decoding
        if any(_is_wish(name, getattr(config, name, None)) for name in OPTION_NAMES):
            return _strategy_of(configs[number + 1 :])
    return None


def _strategy_of(configs: list[GenerationConfig]) -> Any:
    """The strategy that a `jacobi_` option is meant for where no `decoding` stands beside it."""
    decoding = _first_set(configs, "decoding")
    return JACOBI if decoding in (None, AUTOREGRESSIVE) else decoding


def _is_wish(name: str, value: Any) -> bool:
    """Whether an option asks for something that only Jacobi decoding does."""
    return value is not None and value is not False and (name, value) != ("jacobi_candidates", 0)


def _option(call: dict[str, Any], configs: list[GenerationConfig], name: str) -> Any:
    """Value of an option of the host: from the call, else from the first config that has it."""
    return call[name] if call.get(name) is not None else _first_set(configs, name)


def _first_set(configs: list[GenerationConfig], name: str) -> Any:
    values = (getattr(config, name, None) for config in configs)
    return next((value for value in values if value is not None), None)
