"""From profiles to a recipe that says why, and what a recipe will do before it is trained."""

__all__: list[str] = []
