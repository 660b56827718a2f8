"""Evaluation in torch with the integers that onnxruntime computes: a metric of the model is the metric of its file."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from sparsify.errors import StateError
from sparsify.model.signature import check_module
from sparsify.model.wrappers import unwrapped
from sparsify.quantization.conversion import quantized_layers, quantizers
from sparsify.quantization.deployment import gate_grid, holds_integers, require_deployable, rounded_as_deployed
from sparsify.quantization.fake_quantize import FakeQuantize
from sparsify.quantization.integer_mode import IntegerMode, version_of
from sparsify.quantization.integer_operators import HANDLERS
from sparsify.quantization.integer_sums import WholeWeight
from sparsify.quantization.layers import QuantizedEmbedding, QuantizedNorm
from sparsify.quantization.learned_step import LearnedQuantize
from sparsify.quantization.weight_grid import WEIGHT_STEP, bias_of, weight_of, widened
from sparsify.quantization.wiring import Converted, wiring_of

__all__ = ["integer_exact"]

ModelType = TypeVar("ModelType", bound=nn.Module)


@contextmanager
def integer_exact(model: ModelType) -> Iterator[ModelType]:
    """Has a quantized `model` compute in eval mode what onnxruntime computes for its file, while it is entered.

    Eval mode simulates the integers in float: kernel by kernel it is off by one step at most, where a value lies
    half-way between two, and in a deep network such steps add up. In here the operators that run in integers in the
    file compute with the same integers: exact sums in 32 bits, rounded as onnxruntime rounds them, in batches of any
    size, on the device of the model. Of a network in integers from the first layer to the last the outputs are the
    file's, to the bit, and every metric with them. What is in float in the file is computed by torch as ever, which
    agrees with onnxruntime to float32's precision. A product of integers that is read by a quantizer and in float, too,
    is rounded here as if the quantizer alone read it: a value on the edge, one in some ten thousand, may be a step off.

        with integer_exact(model):
            accuracy = evaluate(model, loader)

    Nothing in here has a gradient. Afterwards the model is what it was, also after an exception. Weights that change
    meanwhile count from the next forward on.

    Args:
        model: quantized by a recipe or by `quantize_model`, in eval mode, in float32, on the CPU or a CUDA device.

    Returns:
        A context manager that gives `model`.

    Raises:
        StateError: the model is not quantized, in training mode, not in float32 or on another device, a quantizer never
            observed anything, or the context is entered already. During a forward: the model was set to training mode,
            it runs under autocast, or in another thread.
        DataError: a range or a weight is not finite.
    """
    check_module(model)
    inner = unwrapped(model)
    _require_ready(inner)
    mode = IntegerMode(HANDLERS, [*inner.parameters(), *inner.buffers()])
    patched: list[tuple[nn.Module, str]] = []

    def patch(module: nn.Module, name: str, function: object) -> None:
        # On the object, in front of the method of its class.
        module.__dict__[name] = function
        patched.append((module, name))

    home = threading.get_ident()
    try:
        for quantizer in quantizers(inner):
            if isinstance(quantizer, LearnedQuantize):
                quantizer.follow()
            quantizer.drop_held()
            patch(quantizer, "_compute", _rounding(quantizer, home))
        for layer in inner.modules():
            if isinstance(layer, Converted) and holds_integers(layer) and _sums_integers(layer):
                patch(layer, "_weights", _stored_weights(layer, mode))
        with torch.no_grad(), mode:
            yield model
    finally:
        for module, name in patched:
            module.__dict__.pop(name, None)
        for quantizer in quantizers(inner):
            quantizer.drop_held()


def _require_ready(model: nn.Module) -> None:
    """Refuses a model that cannot be computed with exactly, before anything is changed."""
    name = type(model).__name__
    if any(isinstance(each, IntegerMode) for each in _get_current_dispatch_mode_stack()):
        raise StateError("integer_exact is entered already in this thread; leave it before it is entered again.")
    if any(_COMPUTE in quantizer.__dict__ for quantizer in quantizers(model)):
        raise StateError(f"integer_exact is entered for this {name} in another thread; evaluate it in one at a time.")
    if not any(True for _ in quantizers(model)) and not any(True for _ in quantized_layers(model)):
        raise StateError(
            f"{name} is not quantized: there are no integers to compute with. Enter integer_exact once a recipe has "
            "quantized the model, or with what quantize_model gives."
        )
    training = next((path for path, module in model.named_modules() if module.training), None)
    if training is not None:
        raise StateError(
            f"{training or name} is in training mode, and integer_exact computes what is deployed; call model.eval()."
        )
    for path, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise StateError(
                f"{path} is in {str(parameter.dtype).removeprefix('torch.')}; a file holds integers beside float32 "
                "alone: evaluate copy.deepcopy(model).float()."
            )
        if parameter.device.type not in ("cpu", "cuda"):
            raise StateError(
                f"{path} is on {parameter.device.type!r}, whose sums are not known to be exact; "
                "evaluate copy.deepcopy(model).cpu()."
            )
    require_deployable(model)


_COMPUTE = "_compute"


def _rounding(quantizer: FakeQuantize, home: int) -> Callable[[Tensor], Tensor]:
    """A quantizer as it stands in the file, which `IntegerMode` sees."""
    gate = gate_grid(quantizer)

    def compute(x: Tensor) -> Tensor:
        _require_alone(quantizer, x, home)
        return rounded_as_deployed(quantizer, x, gate)

    return compute


def _require_alone(quantizer: FakeQuantize, x: Tensor, home: int) -> None:
    """Refuses a forward that would not compute in integers."""
    if quantizer.training:
        raise StateError("the model was set to training mode within integer_exact; train outside of it.")
    if threading.get_ident() != home:
        raise StateError("a forward within integer_exact runs in another thread than entered it; enter it there.")
    if torch.is_autocast_enabled(x.device.type):
        raise StateError(
            "a forward within integer_exact runs under autocast, and a file computes in float32 and integers; evaluate "
            f"with torch.autocast({x.device.type!r}, enabled=False)."
        )


def _sums_integers(layer: Converted) -> bool:
    """True if the products of a layer are summed up in integers: of what is quantized with whole weights."""
    wiring = wiring_of(layer)
    source = wiring.source
    plain = not wiring.block and not wiring.affine and not isinstance(layer, QuantizedEmbedding)
    return plain and source is not None and source.enabled


def _stored_weights(layer: Converted, mode: IntegerMode) -> Callable[[], tuple[Tensor, Tensor | None]]:
    """`_weights` of a layer: the deployed ones, made once as long as the layer stays as it is, and known to `mode`."""
    state: object = None
    made: tuple[Tensor, Tensor | None] | None = None

    def weights() -> tuple[Tensor, Tensor | None]:
        nonlocal state, made
        now = [(each.data_ptr(), version_of(each)) for each in _made_of(layer)]
        if made is None or now != state:
            if made is not None:
                for tensor in made:
                    if tensor is not None:
                        mode.forget(tensor)
            with torch._C.DisableTorchFunction():
                made, state = _noted_weights(layer, mode), now
        return made

    return weights


def _made_of(layer: Converted) -> Iterator[Tensor]:
    """All that the deployed integers of a layer are made of."""
    wiring = wiring_of(layer)
    modules = [each for each in (wiring.norm, layer._modules.get(WEIGHT_STEP)) if each is not None]
    tensors: list[Tensor | None] = [weight_of(layer), bias_of(layer)]
    for module in [layer, *modules] if isinstance(layer, QuantizedNorm) else modules:
        tensors += [*module._parameters.values(), *module._buffers.values()]
    if wiring.source is not None:
        tensors.append(wiring.source.scale)
    return (each for each in tensors if each is not None)


def _noted_weights(layer: Converted, mode: IntegerMode) -> tuple[Tensor, Tensor | None]:
    found = layer.deployed_integers()
    whole = found.weight.float()
    weight = whole * widened(found.scale, whole, found.axis, 0)
    mode.stored(weight, WholeWeight(whole, found.scale, found.axis))
    if found.bias is None:
        return weight, found.float_bias
    return weight, mode.stored(found.bias.float() * found.bias_scale, found.bias)
