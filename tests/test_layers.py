"""Which parts of the package may import which: the contracts of `[tool.importlinter]` in `pyproject.toml`."""

from pathlib import Path

from importlinter.cli import lint_imports


ROOT = Path(__file__).parent.parent


def test_arrows_point_down_only():
    """What breaks a contract stands in the captured output, with the lines that import it."""
    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True, no_logo=True) == 0
