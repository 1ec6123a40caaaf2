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
from typing import Any

from ..options import OPTION_NAMES
from .limits import ServingLimits


# Fields of requests that say how many tokens are wanted, at one endpoint or another.
_LENGTH_FIELDS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "max_new_tokens", "max_length")


def _can_be(kind: type) -> Callable[[Any], bool]:
    """Whether a value is a number, also one that is written in a text, which the server takes as well."""

    def check(value: Any) -> bool:
        try:
            kind(value)
        except (TypeError, ValueError, OverflowError):
            return False
        return True

    return check


def _is_stop(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(text, str) for text in value))


# What the server uses of a request without a look at its type.
_FIELD_TYPES: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...] = (
    ((*_LENGTH_FIELDS, "seed"), "an integer", _can_be(int)),
    (("temperature", "top_p", "frequency_penalty"), "a number", _can_be(float)),
    (("stop",), "a string or a list of strings", _is_stop),
    (("model", "suffix", "instructions"), "a string", lambda value: isinstance(value, str)),
    (("logit_bias", "chat_template_kwargs"), "an object", lambda value: isinstance(value, dict)),
    (("tools",), "a list", lambda value: isinstance(value, list)),
)


class _Request:
    """
    What is known of a request while it is answered.

    Args:
        body (`dict`): of the request.
        escapes (`bool`): whether the server puts messages between quotes as they are.

    Raises:
        ValueError: if the `generation_config` in it is not a JSON object.
    """

    def __init__(self, body: dict[str, Any], escapes: bool):
        wishes = {**body, **_read_config(body.get("generation_config"))}
        self.asks_for_length = any(wishes.get(name) is not None for name in _LENGTH_FIELDS)
        self.escapes = escapes
        self.streamer: Any = None
        self.started: asyncio.Future[None] | None = None  # with the first token of a stream


_REQUEST: ContextVar[_Request | None] = ContextVar("request", default=None)


def make_generation_state(original: Any, limits: ServingLimits) -> Any:
    class LimitedGenerationState(original):
        def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
            return _LimitedManager(super().get_manager(model_id, use_cb=use_cb), limits, watches=not use_cb)

    return LimitedGenerationState


class _LimitedManager:
    """What answers the requests of a model, within limits, and says of a stream when it has begun."""

    def __init__(self, manager: Any, limits: ServingLimits, watches: bool):
        self._manager, self._limits, self._watches = manager, limits, watches

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def init_cb(self, model: Any, gen_config: Any) -> None:
        self._apply(model, {"input_ids": []}, gen_config)
        self._manager.init_cb(model, gen_config)

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, gen_config: Any, **kwargs: Any) -> Any:
        request = self._apply(model, inputs, gen_config)
        if request is not None and self._watches:
            request.started = asyncio.get_running_loop().create_future()
            model = _WatchedModel(model, request, request.started)
        queue, streamer = self._manager.generate_streaming(model, processor, inputs, gen_config, **kwargs)
        if request is not None:
            request.streamer = streamer
        return queue, streamer

    def generate_non_streaming(self, model: Any, processor: Any, inputs: Any, gen_config: Any, **kwargs: Any) -> Any:
        self._apply(model, inputs, gen_config)
        return self._manager.generate_non_streaming(model, processor, inputs, gen_config, **kwargs)

    def _apply(self, model: Any, inputs: Any, config: Any) -> _Request | None:
        request = _REQUEST.get()
        prompt = inputs["input_ids"]
        prompt_length = len(prompt) if isinstance(prompt, list) else prompt.shape[-1]
        self._limits.apply(config, model.generation_config, prompt_length, request is None or request.asks_for_length)
        return request


class _WatchedModel:
    """A model that says when its `generate` has made a token, or why it does not."""

    def __init__(self, model: Any, request: _Request, started: asyncio.Future[None]):
        self._model, self._escapes, self._started = model, request.escapes, started
        self._loop = started.get_loop()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, *, streamer: Any, **kwargs: Any) -> Any:
        watched = _WatchedStreamer(streamer, self._say)
        try:
            return self._model.generate(streamer=watched, **kwargs)
        except Exception as error:
            self._say(error)
            if self._escapes and not watched.is_over:  # the end of a stream whose client is gone has a type of its own
                raise RuntimeError(json.dumps(str(error))[1:-1]) from error
            raise
        finally:
            self._say()

    def _say(self, error: Exception | None = None) -> None:
        self._loop.call_soon_threadsafe(self._note, error)

    def _note(self, error: Exception | None) -> None:
        if self._started.done():
            return
        if isinstance(error, (ValueError, NotImplementedError)):
            self._started.set_exception(error)
        else:
            self._started.set_result(None)


class _WatchedStreamer:
    """A streamer that says when it gets the first token; what it gets before is the prompt."""

    def __init__(self, streamer: Any, say: Callable[[], None]):
        self._streamer, self._say, self._num_calls, self.is_over = streamer, say, 0, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._streamer, name)

    def put(self, value: Any) -> None:
        self._num_calls += 1
        if self._num_calls == 2:
            self._say()
        try:
            self._streamer.put(value)
        except Exception:
            self.is_over = True
            raise

    def end(self) -> None:
        self._streamer.end()


def make_build_server(original: Any) -> Any:
    from jinja2.exceptions import TemplateError  # of a chat that a template does not take

    def build_server(model_manager: Any, chat_handler: Any, **others: Any) -> Any:
        for name, handler in {"chat_handler": chat_handler, **others}.items():
            if name in ("chat_handler", "completion_handler", "response_handler"):
                handler.handle_request = _until_started(handler.handle_request, name)
        app = original(model_manager, chat_handler, **others)
        for kind in (ValueError, NotImplementedError, TemplateError):
            app.add_exception_handler(kind, _refuse)
        return app

    return build_server


def _until_started(handle: Callable[..., Awaitable[Any]], name: str) -> Callable[..., Awaitable[Any]]:
    """A handler that answers with a stream once that has begun: until then, the status can say what is wrong."""

    async def handle_request(body: dict[str, Any], request_id: str) -> Any:
        _check_types(body)
        if name == "chat_handler":
            _check_messages(body.get("messages"))
        request = _Request(body, escapes=name != "response_handler")
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
    return config


def _check_types(body: dict[str, Any]) -> None:
    for names, kind, is_right in _FIELD_TYPES:
        for name in names:
            value = body.get(name)
            if value is not None and not is_right(value):
                raise ValueError(f"`{name}` must be {kind}, got {value!r:.200}.")


def _check_messages(messages: Any) -> None:
    """Every chat template asks for these."""
    is_chat = isinstance(messages, list) and all(
        isinstance(message, dict) and "role" in message for message in messages
    )
    if not is_chat or not messages:
        raise ValueError(f"`messages` must be a list of objects with `role` and `content`, got {messages!r:.200}.")


async def _refuse(_: Any, error: Exception) -> Any:
    from fastapi.responses import JSONResponse

    return JSONResponse({"error": {"message": str(error), "type": "invalid_request_error"}}, status_code=400)
