"""The exported file: written, rewritten, verified, timed. Imports the mechanisms and what they import."""
