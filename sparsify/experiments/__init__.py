"""The command `sparsify.run`: from a model and a folder of data to a compressed, verified file.

Imports every room but `cli`.
"""

__all__: list[str] = []
