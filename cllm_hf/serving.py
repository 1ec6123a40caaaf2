"""
`transformers serve` with Jacobi decoding: the host's OpenAI-compatible server, where this package has been imported.

Models with Jacobi defaults then decode by it without anything else. A block size makes it the default of every model
that the server loads.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers.utils.import_utils import is_serve_available

from .options import check_block_size


def serve(
    arguments: Sequence[str],
    block_size: int | str | None = None,
    report: Callable[[Any], object] | None = None,
) -> None:
    """
    Run the host's server until it is stopped.

    Args:
        arguments (`Sequence[str]`): those of `transformers serve`, the model among them.
        block_size (`int` or `"auto"`, *optional*): makes Jacobi decoding, with this block size, the default of every
            model that is loaded. By default each model keeps the defaults it was saved with.
        report (`Callable`, *optional*): called with every model that has been loaded.

    Raises:
        ImportError: if the packages that the server needs are not installed.
        OSError: if the model cannot be loaded.
        KeyboardInterrupt: after Ctrl-C, when the server has shut down.
        SystemExit: from the host, when it has shown its help, or with 2 for arguments that it does not know.
        ValueError: if `block_size` is not valid, or is given together with continuous batching.
    """
    if block_size is not None:
        block_size = check_block_size(block_size, "block_size", allows_auto=True)
        if "--continuous-batching" in arguments:
            raise ValueError(
                "Continuous batching has its own decoding, got `--block-size` for Jacobi decoding too. Drop one of "
                "the two."
            )
    if not is_serve_available():
        raise ImportError(
            "The server needs packages that are not installed (fastapi, uvicorn, openai, pydantic). Run "
            '`pip install "cllm_hf[serve]"`.'
        )
    import click
    from transformers.cli.transformers import app

    with jacobi_models(block_size, report):
        try:
            app.main(args=["serve", *arguments], prog_name="cllm", standalone_mode=False)
        except click.ClickException as error:
            error.show()
            raise SystemExit(error.exit_code) from None
        except click.Abort:
            raise KeyboardInterrupt from None


@contextmanager
def jacobi_models(
    block_size: int | str | None = None, report: Callable[[Any], object] | None = None
) -> Iterator[None]:
    """
    Servers that are made inside load their models with Jacobi defaults.

    Args:
        block_size (`int` or `"auto"`, *optional*): as for `serve`.
        report (`Callable`, *optional*): as for `serve`.
    """
    from transformers.cli.serving import model_manager

    module: Any = model_manager
    original: Any = module.ModelManager
    lock, prepared = threading.Lock(), weakref.WeakSet[Any]()

    class JacobiModelManager(original):
        def load_model_and_processor(self, *args: Any, **kwargs: Any) -> Any:
            model, processor = super().load_model_and_processor(*args, **kwargs)
            with lock:  # the server loads models in several threads
                if model not in prepared:
                    _prepare(model, block_size)
                    prepared.add(model)
                    if report is not None:
                        report(model)
            return model, processor

    module.ModelManager = JacobiModelManager  # `Serve` looks it up when it is made
    try:
        yield
    finally:
        module.ModelManager = original


def _prepare(model: Any, block_size: int | str | None) -> None:
    if block_size is not None and model.can_generate():
        # Other defaults stay as they are: whether a request is answered by sampling is not for us to say.
        model.generation_config.decoding = "jacobi"
        model.generation_config.jacobi_block_size = block_size
