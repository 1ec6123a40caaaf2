"""Whether a way to decode gives the same texts as another one, and where it does not, whether rounding explains it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..blocks.parting import find_parting
from .benchmark import DecodingMethod, DecodingResult


def compare_texts(
    method: DecodingMethod, prompts: Sequence[list[int]], result: DecodingResult, baseline: DecodingResult
) -> dict[str, Any]:
    """
    Count a method's texts that equal those of another one, those that part at a near tie, and those that differ.

    The largest gap is the one that is furthest from what rounding explains: `largest_gap` in logits, and
    `largest_gap_in_bounds` as a multiple of `near_tie_bound`. Both are `None` if no texts part.
    """
    rows = zip(prompts, result.responses, baseline.responses)
    found = [find_parting(method.model, *row) for row in rows]
    partings = [parting for parting in found if parting is not None]
    num_near_ties = sum(parting.is_near_tie for parting in partings)
    measured = [parting for parting in partings if parting.gap_in_bounds is not None]
    widest = max(measured, key=lambda parting: parting.gap_in_bounds or 0.0, default=None)
    return {
        "num_equal": len(found) - len(partings),
        "num_near_ties": num_near_ties,
        "num_differing": len(partings) - num_near_ties,
        "largest_gap": None if widest is None else widest.gap,
        "largest_gap_in_bounds": None if widest is None else widest.gap_in_bounds,
    }


def _near_ties(row: dict[str, Any]) -> str | None:
    """Texts that part at a near tie, in a row where any part; results of version 0.1.0 do not say it."""
    return str(row["num_near_ties"]) if _has_partings(row) else None


def _differing(row: dict[str, Any]) -> str | None:
    """Texts that rounding does not explain, in a row where any part."""
    return str(row["num_differing"]) if _has_partings(row) else None


def format_gap(row: dict[str, Any]) -> str | None:
    """The largest gap in logits, and as a multiple of the bound of a near tie."""
    if row.get("largest_gap") is None:
        return None
    return f"{row['largest_gap']:.3g} ({row['largest_gap_in_bounds']:.2f} of the bound)"


# Columns of a table of methods, shown where texts part.
COLUMNS = {"near ties": _near_ties, "differ": _differing, "largest gap": format_gap}


def agreement_notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Say what texts that part mean, if there are any."""
    notes = []
    if any(row["num_near_ties"] for row in rows):
        notes.append(
            "Near ties are texts that part where the logits of two tokens are closer than the rounding of the dtype, "
            "the bound, which decides between them: neither is more right. Decode in float32 to have equal texts."
        )
    differing = {row["name"]: row["num_differing"] for row in rows if row["num_differing"]}
    if differing:
        named = ", ".join(f"{count} of {name}" for name, count in differing.items())
        notes.append(
            f"**Texts differ where rounding does not explain it**: {named}. See whether they do in float32, and with "
            "a generation config without logits processors, by whose scores this is not judged."
        )
    return notes


def _has_partings(row: dict[str, Any]) -> bool:
    return bool(row.get("num_near_ties") or row.get("num_differing"))
