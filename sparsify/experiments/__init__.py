"""Experiments: a model and a folder of data in, a folder with a smaller, verified ONNX file and its figures out.

Imports `optimize` and below; transformers, timm and pillow inside functions alone.
"""

from sys import modules
from typing import TYPE_CHECKING

from sparsify.experiments.comparing import *
from sparsify.experiments.compressing import *
from sparsify.experiments.experiment import *
from sparsify.experiments.result import *
from sparsify.experiments.run_report import *
from sparsify.experiments.tasks import *

if not TYPE_CHECKING:  # mypy 2.4.1 takes all that is imported by star, and follows no computed list
    __all__ = [name for path, file in list(modules.items()) if path.startswith(f"{__name__}.") for name in file.__all__]
