"""`python -m sparsify` is the command `sparsify`."""

from __future__ import annotations

import sys

from sparsify.cli.main import main

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main())
