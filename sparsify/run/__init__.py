"""`python -m sparsify.run` is the command `sparsify.run`. Imports `experiments`."""
