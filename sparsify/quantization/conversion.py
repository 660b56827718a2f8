"""Converting a user's modules in place to their quantized forms, undoing it, and going through what was converted."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparsify.model.sharding import class_before_sharding, fully_sharded_class, is_fully_sharded
from sparsify.model.targets import named_modules
from sparsify.quantization.fake_quantize import FakeQuantize
from sparsify.quantization.folding import AffineNorm
from sparsify.quantization.layers import (
    CONVERTED,
    NORMS,
    PROJECTION,
    WEIGHTED,
    QuantizedEmbedding,
    QuantizedLayer,
    QuantizedNorm,
)
from sparsify.quantization.recurrent import RECURRENT_FORMS, QuantizedRecurrent
from sparsify.quantization.weight_grid import stores_transposed
from sparsify.quantization.wiring import Converted, Wiring, revert_, wiring_of

__all__: list[str] = []


def convert_(module: nn.Module, quantized: type[Converted] | None = None) -> Wiring:
    """Makes `module` its quantized form, in place; one that is converted already stays as it is. Returns its wiring."""
    if isinstance(module, Converted):
        return wiring_of(module)
    wiring = Wiring(original=type(module))
    projection = isinstance(module, nn.Linear) and type(module).__name__ == PROJECTION
    wanted = quantized or {**CONVERTED, **RECURRENT_FORMS}[nn.Linear if projection else class_before_sharding(module)]
    module.__class__ = fully_sharded_class(type(module), wanted) if is_fully_sharded(module) else wanted
    module.__dict__["_wiring"] = wiring
    return wiring


def restore_layers(model: nn.Module) -> None:
    """Undoes every `convert_` below `model`: classes, children and attributes are as they were before."""
    for module in list(model.modules()):
        if isinstance(module, Converted):
            revert_(module)


def quantizers(model: nn.Module) -> Iterator[FakeQuantize]:
    """Every quantizer of activations below `model`, once."""
    for module in model.modules():
        if isinstance(module, FakeQuantize):
            yield module


def copy_ranges(source: nn.Module, copy: nn.Module) -> None:
    """Gives the quantizers of `copy`, a model of the same structure, the ranges of those of `source`."""
    for theirs, mine in zip(quantizers(source), quantizers(copy), strict=True):
        for name, buffer in theirs.named_buffers():
            mine.get_buffer(name).copy_(buffer)
        mine.drop_held()


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, Converted]]:
    """(clean name, layer) of every layer below `model` that computes with integer weights; "" is the model itself."""
    for name, module in {"": model, **named_modules(model)}.items():
        if isinstance(module, (QuantizedLayer, QuantizedEmbedding, QuantizedRecurrent)) and weight_bits(module):
            yield name, module


def weight_bits(module: nn.Module) -> int:
    """Bits of the weights that a module computes with; 0: they are in float."""
    wiring = wiring_of(module) if isinstance(module, Converted) else None
    return wiring.bits if wiring is not None and wiring.enabled else 0


def original_type(module: nn.Module) -> type[nn.Module]:
    """The class of a module, of a converted one the class that it had."""
    return wiring_of(module).original if isinstance(module, Converted) else type(module)


def freeze_norms(model: nn.Module, frozen: bool) -> None:
    """Has BatchNorms below `model` train on their running statistics, which stay as they are; or no longer."""
    for module in model.modules():
        if isinstance(module, QuantizedNorm) and not isinstance(module, AffineNorm):
            wiring_of(module).frozen = frozen


def is_norm_and_more(module: nn.Module) -> bool:
    """True if it is of a user's subclass of BatchNorm, as timm's BatchNormAct2d, whose forward may compute more.

    Not of SyncBatchNorm, which in training is another function.
    """
    own = class_before_sharding(module) not in NORMS
    return own and isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm)


def is_channel_affine(module: nn.Module) -> bool:
    """True for a module of a user's class that can stand for a BatchNorm where a trace calls it `AFFINE`."""
    known = isinstance(module, (_BatchNorm, Converted)) or type(module).__module__.startswith("torch.nn.")
    return not known and not any(True for _ in module.children())


def is_weighted(module: nn.Module) -> bool:
    """True if it is a layer whose weights can be quantized: torch's own, a subclass, or transformers' Conv1D."""
    cls = class_before_sharding(module)
    if isinstance(module, Converted) or cls.__name__ == PROJECTION:
        return False
    return cls in WEIGHTED or (isinstance(module, tuple(set(WEIGHTED) - {nn.Embedding})) or stores_transposed(module))
