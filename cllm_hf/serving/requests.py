"""
Requests to the server of transformers: within limits, and refused with status 400 before anything is answered.

The server streams an answer from its first moment, with status 200, and says what is wrong in the middle of it. Here a
stream begins with its first token.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any

from .._host import base_model_of
from ..blocks.limits import count_positions
from ..integration import decoding_of
from ..options import AUTO, AUTOREGRESSIVE, DEFAULT_BLOCK_SIZE, OPTION_NAMES, as_integer, first_set


# A static cache is as long as the longest text that needed it, for all later requests. So that no request makes those
# of others dearer, all have this length where the server sets none; longer texts are decoded on a cache that grows.
_STATIC_LENGTH = 2048
_DEFAULT_NEW_TOKENS = 20  # of `generate`
_LARGEST_AUTO = 64  # block size that `"auto"` tries


@dataclass(frozen=True)
class ServingLimits:
    """What a request may ask of a server at most, in positive integers; by default anything."""

    max_new_tokens: int | None = None  # of a response; what a request gets that does not say how many it wants
    max_block_size: int | None = None  # positions that a forward pass checks, `jacobi_candidates` included
    max_cache_length: int | None = None  # tokens of a prompt and its response together

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")

    def apply(self, config: Any, default_config: Any, prompt_length: int, asks_for_length: bool) -> None:
        """Refuse what a request asks for beyond a limit, and bring what it did not ask for within, in `config`."""
        self._apply_to_block(config, default_config)
        num_new = _num_new_tokens(config, default_config, prompt_length)
        allowed = num_new if self.max_new_tokens is None else min(num_new, self.max_new_tokens)
        if allowed < num_new and asks_for_length:
            raise ValueError(
                f"This server returns at most {self.max_new_tokens} tokens, got a request for {num_new}. Ask for less."
            )
        if self.max_cache_length is not None:
            rest = self.max_cache_length - prompt_length
            if rest < 1 or (rest < allowed and asks_for_length):
                raise ValueError(
                    f"This server takes at most {self.max_cache_length} tokens of prompt and response together, got a "
                    f"prompt of {prompt_length} and a request for {allowed}. Shorten the prompt, or ask for less."
                )
            allowed = min(allowed, rest)
        if allowed < num_new:
            config.max_new_tokens = allowed
        self._fix_static_cache(config, default_config, prompt_length + allowed)

    def _apply_to_block(self, config: Any, default_config: Any) -> None:
        block_size, candidates = asked = _block(config, default_config)
        if self.max_block_size is None or block_size * (1 + candidates) <= self.max_block_size:
            return
        is_named = first_set([config, default_config], "jacobi_block_size") is not None
        if candidates or (is_named and asked != _block(default_config, default_config)):
            raise ValueError(
                f"This server checks at most {self.max_block_size} positions in a forward pass, got a request for "
                f"{block_size} with `jacobi_candidates={candidates}`. Ask for less."
            )
        config.jacobi_block_size = self.max_block_size

    def _fix_static_cache(self, config: Any, default_config: Any, length: int) -> None:
        bound = _STATIC_LENGTH if self.max_cache_length is None else self.max_cache_length
        asked = getattr(config, "max_cache_len", None) or 0
        if as_integer(asked) is None:
            raise ValueError(f"`max_cache_len` must be an integer, got {asked!r}.")
        if asked > bound:
            raise ValueError(
                f"This server makes static caches of at most {bound} tokens, got `max_cache_len={asked}`."
            )
        is_named = first_set([config, default_config], "jacobi_block_size") is not None
        block_size = _block(config, default_config)[0] if is_named else DEFAULT_BLOCK_SIZE  # of a compiled one
        if length + block_size > bound:
            config.jacobi_compile = False
            if "static" in (config.cache_implementation or "static"):  # the model's default may be one
                config.cache_implementation = "dynamic"
        elif any(_is_compiled(options) for options in (config, default_config)):
            config.cache_implementation, config.max_cache_len = "static", bound


def _is_compiled(config: Any) -> bool:
    return config.cache_implementation == "static" or bool(getattr(config, "jacobi_compile", False))


def _block(config: Any, default_config: Any) -> tuple[int, int]:
    """Positions of the largest block, 0 where one token is decoded at a time, and candidates."""
    configs = [config, default_config]
    size, candidates = (first_set(configs, name) for name in ("jacobi_block_size", "jacobi_candidates"))
    if size is None and decoding_of(configs) not in (None, AUTOREGRESSIVE):
        size = AUTO
    count = candidates if isinstance(candidates, int) else 0
    return _LARGEST_AUTO if size == AUTO else size if isinstance(size, int) else 0, count


def _num_new_tokens(config: Any, default_config: Any, prompt_length: int) -> int:
    """How many tokens `generate` makes at most."""
    for options in (config, default_config):
        for name, num_given in (("max_new_tokens", 0), ("max_length", prompt_length)):
            value = getattr(options, name, None)
            if value is None:
                continue
            if not isinstance(value, int):
                raise ValueError(f"`{name}` must be an integer, got {value!r}.")
            return max(value - num_given, 1)
    return _DEFAULT_NEW_TOKENS


# Fields of requests that say how many tokens are wanted, at one endpoint or another.
_LENGTH_FIELDS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "max_new_tokens", "max_length")


def _is_stop(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(text, str) for text in value))


# What the server uses of a request without a look at its type. It takes numbers that are written in a text as well.
_FIELD_TYPES: tuple[tuple[tuple[str, ...], str, Callable[[Any], object]], ...] = (
    ((*_LENGTH_FIELDS, "seed"), "an integer", int),
    (("temperature", "top_p", "frequency_penalty"), "a number", float),
    (("stop",), "a string or a list of strings", _is_stop),
    (("model", "suffix", "instructions"), "a string", lambda value: isinstance(value, str)),
    (("logit_bias", "chat_template_kwargs"), "an object", lambda value: isinstance(value, dict)),
    (("tools",), "a list", lambda value: isinstance(value, list)),
)


@dataclass
class _Request:
    """What is known of a request while it is answered."""

    asks_for_length: bool
    escapes: bool  # whether the server puts messages between quotes as they are
    streamer: Any = None
    started: asyncio.Future[None] | None = None  # with the first token of a stream


_REQUEST: ContextVar[_Request | None] = ContextVar("request", default=None)


def make_generation_state(original: Any, limits: ServingLimits) -> Any:
    class LimitedGenerationState(original):
        def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
            return _LimitedManager(super().get_manager(model_id, use_cb=use_cb), limits, watches=not use_cb)

    return LimitedGenerationState


class _Around:
    """Something of the server's, of which a few methods are replaced."""

    def __init__(self, inner: Any):
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _LimitedManager(_Around):
    """What answers the requests of a model, within limits, and says of a stream when it has begun."""

    def __init__(self, manager: Any, limits: ServingLimits, watches: bool):
        super().__init__(manager)
        self._limits, self._watches = limits, watches

    def init_cb(self, model: Any, gen_config: Any) -> None:
        self._apply(model, {"input_ids": []}, gen_config)
        self._inner.init_cb(model, gen_config)

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, gen_config: Any, **kwargs: Any) -> Any:
        request = self._apply(model, inputs, gen_config)
        if request is not None and self._watches:
            request.started = asyncio.get_running_loop().create_future()
            model = _WatchedModel(model, request, request.started)
        queue, streamer = self._inner.generate_streaming(model, processor, inputs, gen_config, **kwargs)
        if request is not None:
            request.streamer = streamer
        return queue, streamer

    def generate_non_streaming(self, model: Any, processor: Any, inputs: Any, gen_config: Any, **kwargs: Any) -> Any:
        self._apply(model, inputs, gen_config)
        return self._inner.generate_non_streaming(model, processor, inputs, gen_config, **kwargs)

    def _apply(self, model: Any, inputs: Any, config: Any) -> _Request | None:
        request = _REQUEST.get()
        prompt = inputs["input_ids"]
        prompt_length = len(prompt) if isinstance(prompt, list) else prompt.shape[-1]
        if request is not None:
            _check_prompt(model, prompt_length)
        self._limits.apply(config, model.generation_config, prompt_length, request is None or request.asks_for_length)
        config.return_dict_in_generate = False  # a default of some models; the server takes token ids alone
        return request


def _check_prompt(model: Any, length: int) -> None:
    if length < 1:
        raise ValueError("A prompt must have at least one token, got none. Write one.")
    positions = None if model.config.is_encoder_decoder else count_positions(base_model_of(model))
    if positions is not None and length > positions:
        raise ValueError(f"A prompt must fit into the {positions} positions of the model, got {length} tokens.")


class _WatchedModel(_Around):
    """A model that says when its `generate` has made a token, or why it does not."""

    def __init__(self, model: Any, request: _Request, started: asyncio.Future[None]):
        super().__init__(model)
        self._escapes, self._started = request.escapes, started

    def generate(self, *, streamer: Any, **kwargs: Any) -> Any:
        watched = _WatchedStreamer(streamer, self._say)
        try:
            return self._inner.generate(streamer=watched, **kwargs)
        except Exception as error:
            self._say(None if watched.is_over else error)
            if self._escapes and not watched.is_over:  # the end of a stream whose client is gone has a type of its own
                raise RuntimeError(json.dumps(str(error))[1:-1]) from error
            raise
        finally:
            self._say()

    def _say(self, error: Exception | None = None) -> None:
        self._started.get_loop().call_soon_threadsafe(self._note, error)

    def _note(self, error: Exception | None) -> None:
        if self._started.done():
            return
        if error is not None:
            self._started.set_exception(error)
        else:
            self._started.set_result(None)


class _WatchedStreamer(_Around):
    """A streamer that says when it gets the first token; what it gets before is the prompt."""

    def __init__(self, streamer: Any, say: Callable[[], None]):
        super().__init__(streamer)
        self._say, self._num_calls, self.is_over = say, 0, False

    def put(self, value: Any) -> None:
        self._num_calls += 1
        if self._num_calls == 2:
            self._say()
        try:
            self._inner.put(value)
        except Exception:
            self.is_over = True
            raise


def make_build_server(original: Any) -> Any:
    from jinja2.exceptions import TemplateError  # of a chat that a template does not take

    def build_server(model_manager: Any, chat_handler: Any, **others: Any) -> Any:
        for name, handler in {"chat_handler": chat_handler, **others}.items():
            if name in ("chat_handler", "completion_handler", "response_handler"):
                needs_model = model_manager.force_model is None
                handler.handle_request = _until_started(handler.handle_request, name, needs_model)
        app = original(model_manager, chat_handler, **others)
        for kind in (ValueError, NotImplementedError, TemplateError, OSError):  # OSError: no such model
            app.add_exception_handler(kind, _refuse)
        app.add_exception_handler(Exception, _fail)
        return app

    return build_server


def _until_started(
    handle: Callable[..., Awaitable[Any]], name: str, needs_model: bool
) -> Callable[..., Awaitable[Any]]:
    """A handler that answers with a stream once that has begun: until then, the status can say what is wrong."""

    async def handle_request(body: dict[str, Any], request_id: str) -> Any:
        _check_types(body)
        if needs_model and not body.get("model"):
            raise ValueError("`model` must name a model, by its folder or Hub id, got none.")
        if name == "chat_handler":
            _check_messages(body.get("messages"))
        wishes = {**body, **_read_config(body.get("generation_config"))}
        asks_for_length = any(wishes.get(field) is not None for field in _LENGTH_FIELDS)
        request = _Request(asks_for_length, escapes=name != "response_handler")
        token = _REQUEST.set(request)
        try:
            response = await handle(body, request_id)
        finally:
            _REQUEST.reset(token)
        try:
            if request.started is not None:
                await request.started
        except asyncio.CancelledError:  # the client is gone, and nobody will read the stream
            request.streamer.cancel()
            raise
        return response

    return handle_request


def _read_config(text: Any) -> dict[str, Any]:
    """The generation config of a request."""
    if text is None:
        return {}
    try:
        config = json.loads(text)
    except (TypeError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"`generation_config` must be a JSON object in a string, got {text!r:.200}.")
    unknown = [name for name in config if name.startswith("jacobi_") and name not in OPTION_NAMES]
    if unknown:
        raise ValueError(f"Unknown options {unknown} in `generation_config`. There are {', '.join(OPTION_NAMES)}.")
    if config.get("return_dict_in_generate"):
        raise ValueError("An answer holds text alone, got `return_dict_in_generate` in `generation_config`. Drop it.")
    return config


def _check_types(body: dict[str, Any]) -> None:
    for names, kind, check in _FIELD_TYPES:
        for name in names:
            value = body.get(name)
            try:
                is_right = value is None or check(value) is not False
            except (TypeError, ValueError, OverflowError):
                is_right = False
            if not is_right:
                raise ValueError(f"`{name}` must be {kind}, got {value!r:.200}.")


def _check_messages(messages: Any) -> None:
    """What the server and every chat template ask for."""
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise ValueError(
            "`messages` must be a list of objects with `role` and `content`, a string or a list of parts with `type`, "
            f"got {messages!r:.200}."
        )


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or "role" not in message:
        return False
    content, calls = message.get("content") or "", message.get("tool_calls", [])
    is_content = isinstance(content, str) or (isinstance(content, list) and all(map(_is_part, content)))
    return is_content and isinstance(calls, list) and all(map(_is_call, calls))


def _is_part(part: Any) -> bool:
    is_text = isinstance(part, dict) and part.get("type") in ("text", "input_text", "output_text")
    return isinstance(part.get("text"), str) if is_text else isinstance(part, dict) and "type" in part


def _is_call(call: Any) -> bool:
    function = call.get("function") or call if isinstance(call, dict) else None
    return isinstance(function, dict) and "arguments" in function


async def _refuse(_: Any, error: Exception) -> Any:
    return _say_error(400, "invalid_request_error", str(error))


async def _fail(_: Any, error: Exception) -> Any:
    return _say_error(500, "server_error", f"{type(error).__name__}: {error}")


def _say_error(status: int, kind: str, message: str) -> Any:
    from fastapi.responses import JSONResponse

    return JSONResponse({"error": {"message": message, "type": kind}}, status_code=status)
