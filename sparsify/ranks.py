"""Several processes that train one model (DDP): the same masks and ranges on each. No-ops in a single process."""
