"""The manager and its session: a recipe at work in a training loop. Imports `recipe` and below."""
