"""The documents name everything public, and the README's code runs as it stands."""

import re
from pathlib import Path

import pytest

import cllm_hf


ROOT = Path(__file__).parent.parent


def test_every_public_name_is_in_the_reference():
    reference = (ROOT / "docs" / "reference.md").read_text()
    assert [name for name in cllm_hf.__all__ if f"`{name}`" not in reference] == []
    assert sorted(cllm_hf.__all__) == cllm_hf.__all__
    for name in cllm_hf.__all__:
        assert getattr(cllm_hf, name).__doc__ or name == "FEATURES"


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'Jacobian'"):
        cllm_hf.Jacobian  # noqa: B018


def test_links_lead_to_files():
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_version_is_in_the_changelog():
    assert f"## [{cllm_hf.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
