"""Quantized layers, observers and the places of quantizers. Imports `output`, `model`, `errors`."""
