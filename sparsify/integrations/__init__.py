"""Ready-made callbacks for training frameworks: one file each, which is all that imports the framework.

A name here is had from its file (`from sparsify.integrations.lightning import SparsifyCallback`), since importing it
imports the framework. Imports `training`, `analysis`, `recipe`, `modifiers`, `onnx`, `pruning`, `quantization`,
`output`, `model`, `errors`.
"""

__all__: list[str] = []
