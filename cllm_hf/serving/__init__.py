"""
`transformers serve` with Jacobi decoding: its OpenAI-compatible server, where this package has been imported.

Models with Jacobi defaults then decode by it without anything else, and lossless adapters draft. A block size makes
Jacobi decoding the default of every other model that the server loads. What a request cannot have reaches its client
as status 400 with the message, streamed or not.

The server's classes are looked up by name when it is made; ours take their place for that time (`tests/test_host.py`
pins the names and methods).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers.utils import find_adapter_config_file
from transformers.utils.import_utils import is_serve_available

from .._host import base_model_of
from ..blocks.drafter import find_drafter
from ..loading import load_cllm
from ..names import Name
from ..options import AUTO, JACOBI, LOSSLESS, check_block_size
from .requests import ServingLimits, make_build_server, make_generation_state


def serve(
    arguments: Sequence[str],
    block_size: int | str | None = None,
    report: Callable[[Any], object] | None = None,
    limits: ServingLimits | None = None,
) -> None:
    """
    Run the server of transformers, with the arguments of `transformers serve`, until Ctrl-C.

    A block size makes Jacobi decoding the default of every model that is loaded; a lossless adapter drafts, with this
    block size. Without one each model keeps the defaults it was saved with. `report` is called with every model that
    has been loaded; `limits` are those of each request.
    """
    if block_size is not None:
        block_size = check_block_size(block_size, "block_size", allows_auto=True)
        if "--continuous-batching" in arguments:
            raise ValueError(
                "Continuous batching has its own decoding, got `--block-size` for Jacobi decoding too. Drop one of "
                "the two."
            )
        if limits is not None and isinstance(block_size, int) and block_size > (limits.max_block_size or block_size):
            raise ValueError(
                f"`--block-size` must not go beyond `--max-block-size`, got {block_size} and {limits.max_block_size}."
            )
    if not is_serve_available():
        raise ImportError(
            "The server needs packages that are not installed (fastapi, uvicorn, openai, pydantic). Run "
            '`pip install "cllm_hf[serve]"`.'
        )
    import click
    from transformers.cli.transformers import app

    with jacobi_models(block_size, report, limits):
        try:
            app.main(args=["serve", *arguments], prog_name="cllm", standalone_mode=False)
        except click.ClickException as error:
            error.show()
            raise SystemExit(error.exit_code) from None
        except click.Abort:
            raise KeyboardInterrupt from None


@contextmanager
def jacobi_models(
    block_size: int | str | None = None,
    report: Callable[[Any], object] | None = None,
    limits: ServingLimits | None = None,
) -> Iterator[None]:
    """Servers that are made inside load their models with Jacobi defaults, and refuse as `serve` says."""
    from transformers.cli.serving import model_manager, server, utils

    replaced: list[tuple[Any, str, Any]] = [
        (model_manager, "ModelManager", _make_model_manager(model_manager.ModelManager, block_size, report)),
        (utils, "GenerationState", make_generation_state(utils.GenerationState, limits or ServingLimits())),
        (server, "build_server", make_build_server(server.build_server)),
    ]
    originals = [getattr(module, name) for module, name, _ in replaced]
    for module, name, value in replaced:
        setattr(module, name, value)  # `Serve` looks them up when it is made
    try:
        yield
    finally:
        for (module, name, _), original in zip(replaced, originals):
            setattr(module, name, original)


def _make_model_manager(original: Any, block_size: int | str | None, report: Callable[[Any], object] | None) -> Any:
    lock, prepared = threading.Lock(), weakref.WeakSet[Any]()

    class JacobiModelManager(original):
        def load_model_and_processor(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> Any:
            self._check_pinned(model_id_and_revision, kwargs.get("gguf_file"))
            Name.find(model_id_and_revision.rpartition("@")[0]).check("model", "model")
            model, processor = super().load_model_and_processor(model_id_and_revision, *args, **kwargs)
            with lock:  # the server loads models in several threads
                if model not in prepared:
                    _prepare(model, block_size)
                    prepared.add(model)
                    if report is not None:
                        report(model)
            return model, processor

        def load_model_streaming(self, model_id_and_revision: str, gguf_file: str | None = None) -> Any:
            self._check_pinned(model_id_and_revision, gguf_file)
            return super().load_model_streaming(model_id_and_revision, gguf_file=gguf_file)

        def _load_model(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> Any:
            """The server itself looks for the config of a whole model."""
            name, revision = model_id_and_revision.split("@", 1)
            if kwargs.get("gguf_file") is not None or find_adapter_config_file(name, revision=revision) is None:
                return super()._load_model(model_id_and_revision, *args, **kwargs)
            if revision != "main":
                raise ValueError(
                    f"A revision is that of a whole model, got {revision!r} for the adapter {name}. Download that "
                    "revision and serve its folder."
                )
            options = {
                "attn_implementation": self.attn_implementation,
                "dtype": self.dtype,
                "device_map": self.device,
                "trust_remote_code": self.trust_remote_code,
                "quantization_config": self.get_quantization_config(),
            }
            return _load_adapter(name, {key: value for key, value in options.items() if value is not None})

        def _check_pinned(self, model_id_and_revision: str, gguf_file: str | None) -> None:
            """The server itself lets `/load_model` load any model, also where it has been given one to serve."""
            from transformers.cli.serving.utils import split_model_id

            if self.force_model is None:
                return
            pinned, pinned_file = split_model_id(self.force_model)
            if (model_id_and_revision, gguf_file) != (self.process_model_name(pinned), pinned_file):
                raise ValueError(f"This server is pinned to {self.force_model!r}, got {model_id_and_revision!r}.")

    return JacobiModelManager


def _load_adapter(name: str, options: dict[str, Any]) -> Any:
    adapter: Any = load_cllm(name, **options)
    model: Any = base_model_of(adapter)
    if adapter is model or adapter.active_peft_config.is_prompt_learning:
        return adapter
    model.name_or_path = name
    return model  # with the adapter in its layers, which is what the server knows to ask


def _prepare(model: Any, block_size: int | str | None) -> None:
    # Other defaults stay as they are: whether a request is answered by sampling is not for us to say.
    if not model.can_generate():
        return
    if getattr(model.generation_config, "jacobi_compile", None) is None:
        model.generation_config.jacobi_compile = False  # requests are of many lengths, and each might be compiled
    if find_drafter(model) is not None:
        model.generation_config.decoding = LOSSLESS
        saved = getattr(model.generation_config, "jacobi_block_size", None)
        model.generation_config.jacobi_block_size = block_size or saved or AUTO
    elif block_size is not None:
        model.generation_config.decoding = JACOBI
        model.generation_config.jacobi_block_size = block_size
