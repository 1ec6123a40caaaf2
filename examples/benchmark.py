"""
Benchmarks against published procedures, and of what an iteration of Jacobi decoding costs.

    python examples/benchmark.py overhead --shape 4m
    python examples/benchmark.py collect --shape 4m
    python examples/benchmark.py train --shape 4m
    python examples/benchmark.py heads train --kind medusa --model M --dataset D --output-dir F --max-seconds 3600

`--help` after each says what it takes. `cllm benchmark` measures models.
"""

import sys

from benchmarks.command import main


if __name__ == "__main__":
    sys.exit(main())
