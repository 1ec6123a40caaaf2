"""The options of `cllm compare`. Nothing heavy is imported here."""

from __future__ import annotations

import argparse
from typing import Any

from ..options import JACOBI, LOSSLESS
from ..parsing import block_size, positive


MODES = (JACOBI, LOSSLESS)
DEFAULT_TOKENS = 160
HELP = "decode a prompt by generate() and by Jacobi side by side, here or on a page"


def add_compare_command(commands: Any) -> argparse.ArgumentParser:
    """Add `cllm compare` to the commands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "compare",
        help=HELP,
        description=f"Side by side: {HELP}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="folder or Hub id of a model, a CLLM or an adapter")
    parser.add_argument("--target", help="model that generate() decodes with; if not given, the same")
    parser.add_argument("--prompt", help="what is decoded; `--web` asks for it on the page")
    parser.add_argument("--web", action="store_true", help="open a page (takes the extra `demo`: gradio)")
    parser.add_argument("--mode", choices=MODES, help="lossless if the model has a lossless adapter, else jacobi")
    parser.add_argument("--block-size", type=block_size, default="auto", help="tokens of a block, or `auto`")
    parser.add_argument("--max-new-tokens", type=positive, default=DEFAULT_TOKENS, help="longest response")
    parser.add_argument("--temperature", type=float, default=0.0, help="of sampling; 0 is greedy")
    parser.add_argument("--no-chat", action="store_true", help="give the prompt as it is, without a chat template")
    parser.add_argument("--device", default="auto", help="such as cpu or cuda:0")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="of weights"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address that the page is served at: this machine alone")
    parser.add_argument("--port", type=int, help="of the page; if not given, a free one from 7860 on")
    return parser
