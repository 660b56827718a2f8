"""`python -m sparsify.run` is the command `sparsify.run`."""

from __future__ import annotations

import sys

from sparsify.experiments.command import run_command_line

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(run_command_line())
