"""Which parts of the package may import which: the contracts of `[tool.importlinter]` in `pyproject.toml`."""

import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parent.parent
_RUN = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True, no_logo=True))"


def test_arrows_point_down_only():
    """In a process of its own, since the linter sets up logging. What breaks a contract stands in its output."""
    done = subprocess.run([sys.executable, "-c", _RUN], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
