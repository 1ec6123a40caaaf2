"""What argparse reads numbers with: errors say what a number must be. Nothing heavy is imported here."""

from __future__ import annotations

import argparse
from typing import Any

from .options import JacobiOptions


def positive(text: str) -> int:
    """
    Read an integer of at least 1.

    Args:
        text (`str`): what the user typed.

    Returns:
        `int`.

    Raises:
        argparse.ArgumentTypeError: if it is something else.
    """
    return _at_least(1, text)


def natural(text: str) -> int:
    """
    Read an integer of at least 0.

    Args:
        text (`str`): what the user typed.

    Returns:
        `int`.

    Raises:
        argparse.ArgumentTypeError: if it is something else.
    """
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be an integer of at least {least}, got {text!r}")
    return int(text)


def block_size(text: str) -> int | str:
    """
    Read a block size.

    Args:
        text (`str`): what the user typed.

    Returns:
        `int` or the `str` "auto".

    Raises:
        argparse.ArgumentTypeError: if it is neither an integer of at least 1 nor "auto".
    """
    return text if text == "auto" else positive(text)


def num_candidates(text: str) -> int:
    """
    Read a number of candidates.

    Args:
        text (`str`): what the user typed.

    Returns:
        `int`.

    Raises:
        argparse.ArgumentTypeError: if `generate` does not take it as `jacobi_candidates`.
    """
    value: Any = int(text) if text.removeprefix("-").isdecimal() else text
    try:
        return JacobiOptions(candidates=value).candidates
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
