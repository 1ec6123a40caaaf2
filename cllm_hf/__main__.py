"""`python -m cllm_hf` is the `cllm` command."""

import sys

from .cli import main


if __name__ == "__main__":
    sys.exit(main())
