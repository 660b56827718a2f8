"""The version, in a file of its own: builds read it without importing anything, and every floor may."""

__all__ = ["__version__"]

__version__ = "0.1.0"
