"""What `pip install` finds for this package without constraints."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.slow
@pytest.mark.parametrize("resolution", ["lowest-direct", "highest"])
def test_dependencies_resolve_on_the_oldest_python(resolution):
    """At both ends of the bounds there are versions that go together; needs a package index."""
    python = PROJECT["requires-python"].removeprefix(">=")
    command = ["uv", "pip", "compile", "-q", "--resolution", resolution, "--python-version", python, "pyproject.toml"]
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    if any(sign in done.stderr for sign in ("Failed to fetch", "error sending request", "network was disabled")):
        pytest.skip("No package index can be reached.")
    assert done.returncode == 0, done.stderr
    found = dict(line.split("==") for line in done.stdout.splitlines() if line[:1].isalnum())
    for name in ("torch", "transformers", "trl", "peft", "datasets", "evaluate"):
        bounds = next(one.removeprefix(name) for one in PROJECT["dependencies"] if one.startswith(f"{name}>="))
        lowest = bounds.split(",")[0].removeprefix(">=")
        assert name in found and (resolution == "highest" or found[name].startswith(lowest))
