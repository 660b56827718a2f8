"""Masks of weights, and channel groups that are found, masked and removed. Imports `output`, `model`, `errors`."""
