"""Runs operators of torch between quantized tensors as the integer kernels of onnxruntime compute them.

A `TorchDispatchMode` that reads a forward as `sparsify.onnx.fusion` reads a file: what comes out of a quantizer lies on
a grid, data movement leaves it there, and an operator of which all operands lie on grids awaits its quantizer, by whose
grid its kernel rounds. A quantizer that finds such a result takes the kernel's integers; everything else is computed as
ever. The formulas are those of `sparsify.onnx.integer_kernels`, where their rounding is explained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from sparsify.quantization.integer_sums import WholeWeight

__all__: list[str] = []


@dataclass(frozen=True)
class IntegerGrid:
    """The numbers q * scale for the whole q from `low` to `high`: uint8, counted from the zero point on."""

    scale: Tensor
    """float32 of rank 0, > 0."""
    zero: int
    """0 to 255: the integer that means 0."""
    step: float
    """The scale as a number."""

    @property
    def low(self) -> int:
        return -self.zero

    @property
    def high(self) -> int:
        return 255 - self.zero

    def whole(self, x: Tensor) -> Tensor:
        """q of values that lie on the grid."""
        return x.mul(1.0 / self.step).round_()

    def rounded(self, scaled: Tensor) -> Tensor:
        """q of x / scale, which is overwritten."""
        return scaled.round_().clamp_(self.low, self.high)


IntegerFunction = Callable[[IntegerGrid], "Tensor | None"]
"""The integers that a kernel gives on a grid, counted from its zero point on; None: it has none for that grid."""


@dataclass(frozen=True)
class Awaiting:
    """Result of an integer kernel that takes its form once the quantizer behind it is known.

    Attributes:
        kernel: gives the integers, in the shape of the operator's result.
        size, stride: of that result; a view of it is a view of the integers.
        least, most: where a Relu or Clip between the operator and the quantizer cuts off.
        sums: of a product without a bias, the sums and their scale.
    """

    kernel: IntegerFunction
    size: Sequence[int]
    stride: Sequence[int]
    least: float = -math.inf
    most: float = math.inf
    sums: tuple[Tensor, Tensor] | None = None

    def is_whole(self, tensor: Tensor) -> bool:
        """True if a tensor has the layout of the result."""
        return tensor.shape == self.size and tensor.stride() == self.stride

    def integers(self, view: Tensor, grid: IntegerGrid) -> Tensor | None:
        """The integers of `view`, of the result or a part of it; None where the quantizer computes from floats."""
        slack = float(torch.finfo(torch.float32).eps)
        if self.least > grid.low * grid.step + slack or self.most < grid.high * grid.step - slack:
            return None
        whole = self.kernel(grid)
        if whole is None or self.is_whole(view):
            return whole
        laid_out = torch.empty_strided(self.size, self.stride, dtype=whole.dtype, device=whole.device).copy_(whole)
        return laid_out.as_strided(view.shape, view.stride(), view.storage_offset())


class IntegerMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, operators between quantized tensors give the integers that onnxruntime gives.

    Args:
        operators: name of an operator -> what computes it here.
        constants: tensors that are stored in the file: of those of one value, a sum or product with integers takes the
            value in as an integer.
    """

    def __init__(self, operators: Mapping[str, OperatorHandler], constants: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._operators = operators
        self._constants = {_storage(each): each for each in constants if each.numel() == 1}
        self._weights: dict[int, tuple[Tensor, WholeWeight | Tensor]] = {}
        self._grids: dict[tuple[int, int, int, int], tuple[IntegerGrid | None, Tensor, Tensor]] = {}
        self._known: dict[int, tuple[Any, IntegerGrid | Awaiting]] = {}
        self._sweep_at = SWEEP
        self._facts: dict[Any, _Facts] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        found = self._facts.get(func)
        if found is None:
            found = self._facts[func] = _facts_of(func, self._operators.get(func.name()))
        handler, composite, positions, names = found
        if handler is not None:
            result = handler(self, func, args, kwargs)
            if result is not None:
                return result
        elif composite:
            # In inference mode operators made of others arrive whole.
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        for target in (*(args[i] for i in positions if i < len(args)), *(kwargs.get(name) for name in names)):
            for each in target if isinstance(target, (list, tuple)) else [target]:
                if isinstance(each, Tensor):
                    self.unknow(each)
        return result

    def stored(self, tensor: Tensor, means: WholeWeight | Tensor) -> Tensor:
        """`tensor`, known as a weight of these integers, or as a bias of these sums."""
        self._weights[_storage(tensor)] = (tensor, means)
        return tensor

    def forget(self, tensor: Tensor) -> None:
        """The opposite of `stored`."""
        self._weights.pop(_storage(tensor), None)

    # -- what is known of tensors -------------------------------------------------------------------------------------

    def know(self, tensor: Tensor, what: IntegerGrid | Awaiting) -> Tensor:
        """`tensor`, noted; not if it shares its memory with what others write to."""
        storage = tensor.untyped_storage()
        if tensor.storage_offset() == 0 and storage.nbytes() == tensor.numel() * tensor.element_size():
            if len(self._known) >= self._sweep_at:
                self._known = {key: each for key, each in self._known.items() if not each[0].expired()}
                self._sweep_at = len(self._known) + SWEEP
            self._known[storage._cdata] = (cast(Any, StorageWeakRef)(storage), what)
        return tensor

    def unknow(self, tensor: Tensor) -> None:
        """Forgets what was noted: the tensor is written to."""
        if tensor.layout == torch.strided:
            self._known.pop(_storage(tensor), None)

    def grid(self, tensor: object) -> IntegerGrid | None:
        """The grid that a tensor lies on."""
        found = self.known(tensor)
        return found if isinstance(found, IntegerGrid) else None

    def awaiting(self, tensor: object) -> Awaiting | None:
        """The kernel whose result a tensor is, perhaps moved."""
        found = self.known(tensor)
        return found if isinstance(found, Awaiting) else None

    def known(self, tensor: object) -> IntegerGrid | Awaiting | None:
        """Grid or kernel that is noted of a tensor, or of the memory that it shares."""
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            return None
        found = self._known.get(_storage(tensor))
        return found[1] if found is not None and not found[0].expired() else None

    def weight(self, tensor: Tensor) -> WholeWeight | None:
        """The integers of a weight; of a matrix also as it is transposed, or repeated for each item of a batch."""
        found = self._weights.get(_storage(tensor))
        if found is None or not isinstance(found[1], WholeWeight):
            return None
        base, weight = found[0], found[1]
        if tensor.dim() == base.dim() + 1 and (tensor.stride(0) == 0 or tensor.shape[0] == 1):
            tensor = tensor[0]
        if tensor.shape == base.shape and tensor.stride() == base.stride():
            return weight
        turned = base.dim() == 2 and tensor.shape == base.shape[::-1] and tensor.stride() == base.stride()[::-1]
        return weight.turned() if turned else None

    def bias(self, tensor: Tensor | None) -> tuple[bool, Tensor | None]:
        """(whether a kernel takes it in, int32): of None, it does."""
        if tensor is None:
            return True, None
        found = self._weights.get(_storage(tensor))
        if found is None or isinstance(found[1], WholeWeight):
            return False, None
        return True, found[1]

    def grid_of(self, scale: Tensor, zero_point: Tensor) -> IntegerGrid | None:
        """The grid of a quantizer; None where onnxruntime has no integer kernels for it: int8, which x86 fuses not."""
        key = (id(scale), version_of(scale), id(zero_point), version_of(zero_point))
        if key not in self._grids:
            grid = None
            if zero_point.dtype == torch.uint8 and scale.dim() == 0:
                grid = IntegerGrid(scale.detach().clone(), int(zero_point), float(scale))
            self._grids[key] = (grid, scale, zero_point)
        return self._grids[key][0]

    def number(self, operand: object, rank: int) -> float | None:
        """The number that an operand of one value is, stored in the file; None: it is none."""
        if isinstance(operand, bool):
            return None
        if isinstance(operand, (int, float)):
            return float(operand)
        if (
            isinstance(operand, Tensor)
            and operand.numel() == 1
            and operand.dim() <= rank
            and operand.is_floating_point()
        ):
            return float(operand) if _storage(operand) in self._constants else None
        return None


OperatorHandler = Callable[[IntegerMode, Any, tuple[Any, ...], dict[str, Any]], Any]
"""(mode, operator, args, kwargs) -> its result; None where torch is to compute it."""
_Facts = tuple[OperatorHandler | None, bool, tuple[int, ...], tuple[str, ...]]
"""(what computes an operator here, whether it is made of others, the arguments that it writes to by place, by name)."""
SWEEP = 4
"""Tensors that are noted between two looks for those that are gone."""


def version_of(tensor: Tensor) -> int:
    """A number that changes when a tensor is written to; tensors made in inference mode have none."""
    return 0 if tensor.is_inference() else tensor._version


def _storage(tensor: Tensor) -> int:
    return cast(int, tensor.untyped_storage()._cdata)


def _facts_of(func: Any, handler: OperatorHandler | None) -> _Facts:
    written = [
        (i, argument.name)
        for i, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    composite = handler is None and func._can_decompose() and not written
    return handler, composite, tuple(i for i, _ in written), tuple(name for _, name in written)
