"""Palettes: a weight's values are few, and each weight is an index into them. Imports `output`, `model`, `errors`."""
