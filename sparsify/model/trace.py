"""One traced view of a model: what is computed, in which module's forward, from what, and who reads it. Plain data.

Quantization, structured pruning and analysis ask it; nobody else traces. The user's model is never replaced by it.
"""

from __future__ import annotations

import contextlib
import inspect
import traceback
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from sparsify.errors import ArgumentError, first_line
from sparsify.model.batches import with_known_mappings
from sparsify.model.channel_affine import AFFINE, channel_affine
from sparsify.model.made_weights import plain_weights
from sparsify.model.preserved import eval_mode_, preserved
from sparsify.model.sharding import stand_ins
from sparsify.model.wrappers import clean_name
from sparsify.model.written_activations import written_activations

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__: list[str] = []

OperationKind = Literal[
    "input",
    "conv",
    "linear",
    "batch_norm",
    "relu",
    "activation",
    "gate",
    "add",
    "multiply",
    "concat",
    "matmul",
    "average_pool",
    "max_pool",
    "embedding",
    "norm",
    "move",
    "other",
]

_KINDS: dict[str, OperationKind] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), "conv"),
    "convolution": "conv",
    "linear": "linear",
    "batch_norm": "batch_norm",
    **dict.fromkeys(("relu", "relu6"), "relu"),
    **dict.fromkeys(
        (
            "gelu",
            "leaky_relu",
            "elu",
            "mish",
            "softmax",
            "prelu",
        ),
        "activation",
    ),
    **dict.fromkeys(("silu", "sigmoid", "hardswish", "hardsigmoid", "tanh"), "gate"),
    "add": "add",
    **dict.fromkeys(("mul", "multiply"), "multiply"),
    **dict.fromkeys(("cat", "concat", "concatenate"), "concat"),
    **dict.fromkeys(("matmul", "bmm", "mm", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention"), "matmul"),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"), "average_pool"),
    **dict.fromkeys(("max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool2d"), "max_pool"),
    **dict.fromkeys(("max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool1d"), "max_pool"),
    "embedding": "embedding",
    **dict.fromkeys(("layer_norm", "group_norm", "instance_norm", "rms_norm", "native_layer_norm"), "norm"),
    **dict.fromkeys(
        (
            *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "permute", "transpose", "t", "numpy_T", "mT"),
            *(
                "contiguous",
                "clone",
                "dropout",
                "feature_dropout",
                "dropout2d",
                "alias",
                "detach",
                "detach_",
                "identity",
            ),
            *("squeeze", "unsqueeze", "expand", "expand_as", "select", "slice", "narrow", "split", "split_with_sizes"),
            *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"),
            *("chunk", "unbind", "getitem", "view_as", "movedim", "swapaxes", "lift_fresh_copy"),
        ),
        "move",
    ),
}


@dataclass(frozen=True)
class ModuleCall:
    """One call of one module: the `number`-th, from 0, of the module at `path` ("" is the model itself)."""

    path: str
    number: int


@dataclass(frozen=True)
class TracedNode:
    """One operation, and the tensor that it gives.

    Attributes:
        op: the operator without namespace and overload: "conv2d", "add_". In-place ones end in "_".
        kind: what it is to compression; "move" gives its input's values in another shape or order, "gate" is a sigmoid
            or has one inside, as tanh has.
        stack: the calls of modules that it stands in, outermost first.
        inputs: the names of the nodes whose tensors it reads, in the order of the arguments.
        parameters: the names of the parameters that it reads.
        whole: whether it is an activation that its owner writes out in several operations, and all that this computes.
    """

    name: str
    op: str
    kind: OperationKind
    stack: tuple[ModuleCall, ...]
    inputs: tuple[str, ...]
    parameters: tuple[str, ...]
    shape: tuple[int, ...] | None
    dtype: str | None
    whole: bool = False

    @property
    def owner(self) -> str:
        """The path of the innermost module in whose forward it stands."""
        return self.stack[-1].path if self.stack else ""

    @property
    def is_float(self) -> bool:
        """True if it gives one floating-point tensor."""
        return self.dtype is not None and self.dtype in ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Pair:
    """A convolution or linear layer and the BatchNorm behind it; `why_not`: why they cannot be one, None: they can."""

    layer: str
    norm: str
    why_not: str | None


@dataclass(frozen=True)
class Trace:
    """The computation of a model on one set of example inputs, in eval mode: nodes in the order of computation.

    Names of modules and parameters are clean: without the prefixes that wrappers add.
    """

    nodes: tuple[TracedNode, ...]
    outputs: tuple[str, ...]
    """The names of the nodes that the model returns."""

    @cached_property
    def by_name(self) -> dict[str, TracedNode]:
        """The nodes by name."""
        return {node.name: node for node in self.nodes}

    @cached_property
    def readers(self) -> dict[str, tuple[TracedNode, ...]]:
        """Who reads the tensor of a node, by its name; a reader that takes it twice stands there once."""
        found: dict[str, dict[str, TracedNode]] = defaultdict(dict)
        for node in self.nodes:
            for name in node.inputs:
                found[name][node.name] = node
        return {node.name: tuple(found[node.name].values()) for node in self.nodes}

    @cached_property
    def calls(self) -> dict[str, int]:
        """Number of calls of each module, by path; those that were not called are missing."""
        numbers: dict[str, set[int]] = defaultdict(set)
        for node in self.nodes:
            for call in node.stack:
                numbers[call.path].add(call.number)
        return {path: len(found) for path, found in numbers.items()}

    def is_affine(self, path: str) -> bool:
        """True if the module at `path` is no BatchNorm and scales and shifts channels as one does."""
        return any(node.op == AFFINE for node in self.of_module(path))

    def of_module(self, path: str) -> tuple[TracedNode, ...]:
        """The nodes that stand directly in the forward of the module at `path`."""
        return self._of_module.get(path, ())

    @cached_property
    def _of_module(self) -> dict[str, tuple[TracedNode, ...]]:
        found: dict[str, list[TracedNode]] = defaultdict(list)
        for node in self.nodes:
            found[node.owner].append(node)
        return {path: tuple(nodes) for path, nodes in found.items()}

    def root(self, name: str) -> str:
        """The node that made the values which node `name` gives: follows data movement and max pooling upward."""
        node = self.by_name[name]
        while node.kind in ("move", "max_pool") and node.inputs:
            node = self.by_name[node.inputs[0]]
        return node.name

    def users(self, name: str) -> tuple[TracedNode, ...]:
        """Who computes with the values of node `name`: its readers, data movement and max pooling followed downward.

        Not who reads where a max pooling found them (`return_indices`).
        """
        found: dict[str, TracedNode] = {}
        waiting = [name]
        while waiting:
            above = self.by_name[waiting.pop()]
            for reader in self.readers[above.name]:
                if above.kind == "max_pool" and reader.op == "getitem" and not reader.is_float:
                    continue
                if reader.kind in ("move", "max_pool"):
                    waiting.append(reader.name)
                else:
                    found[reader.name] = reader
        return tuple(found.values())

    def leaves(self, name: str) -> bool:
        """True if the model returns the values of node `name`, perhaps moved."""
        return any(self.root(output) == self.root(name) for output in self.outputs)

    @cached_property
    def pairs(self) -> tuple[Pair, ...]:
        """Every BatchNorm that reads what a convolution or linear layer gives, and whether the two can be folded.

        They can where all calls agree: each of the layer's results goes to this BatchNorm alone, which reads no other.
        """
        found: dict[tuple[str, str], list[TracedNode]] = defaultdict(list)
        for norm in self.nodes:
            if norm.kind == "batch_norm" and norm.inputs and self.by_name[norm.inputs[0]].kind in ("conv", "linear"):
                found[self.by_name[norm.inputs[0]].owner, norm.owner].append(norm)
        return tuple(Pair(*names, self._why_not_folded(*names, norms)) for names, norms in found.items())

    def _why_not_folded(self, layer: str, norm: str, norms: list[TracedNode]) -> str | None:
        """The reason why `norms`, calls of one BatchNorm behind `layer`, are not folded into it; None: they can be."""
        if not layer or not norm or layer == norm:
            return "one of them is a function, not a layer"
        made = [node for node in self.of_module(layer) if node.kind in ("conv", "linear")]
        behind = {read.inputs[0] for read in norms}
        for node in made:
            others = [reader for reader in self.readers[node.name] if reader.owner != norm]
            if node.name in behind and (others or node.name in self.outputs):
                who = f"{others[0].op} in {others[0].owner or 'the model'}" if others else "the model's output"
                return f"what {layer} gives is also read by {who}"
        if len(behind) != len(made):
            return f"{layer} is called {len(made)} times, and {norm} stands behind {len(behind)} of them"
        if self.calls[norm] != len(norms):
            return f"{norm} is called {self.calls[norm]} times, {self.calls[norm] - len(norms)} of them elsewhere"
        if len(norms) != len(behind):
            return f"{norm} reads what {layer} gives {len(norms)} times"
        return None


def trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Trace:
    """The traced view of `model` on these example inputs.

    Raises:
        ArgumentError: as `exported` does.
    """
    return plain_trace(exported(model, args, kwargs), ModuleNames(model))


def exported(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> ExportedProgram:
    """The torch.export.ExportedProgram of `model` on these example inputs; for readers of single operators.

    Traced with torch.export, not strict, in eval mode: without dropout, and BatchNorm's counters stand still. Training
    modes, random states and buffers are afterwards as they were.

    Raises:
        ArgumentError: the model cannot be traced or fails on these inputs; the message says where in its code.
    """
    try:
        with (
            stand_ins(model),
            preserved(model),
            without_fast_path(),
            _without_cache(model),
            _class_forward(model),
            _quiet_export(),
            plain_weights(),
        ):
            eval_mode_(model)
            with torch.no_grad():
                args, kwargs = with_known_mappings((args, kwargs or {}))
                return torch.export.export(model, args, kwargs, strict=False)
    # Any code of a user may stand in forward, and fail in any way.
    except Exception as error:
        raise ArgumentError(
            f"{type(model).__name__} cannot be traced on these inputs{_where(error)}: {type(error).__name__}: "
            f"{first_line(error).rstrip('.')}. Give sample_inputs that the model accepts as they are; control flow "
            "that depends on the values of tensors, and custom extensions, cannot be traced."
        ) from error


@contextlib.contextmanager
def _class_forward(model: nn.Module) -> Iterator[None]:
    """The model computes by the forward of its class, where its own only stands around that.

    accelerate puts autocast around the forward of a prepared model (`Accelerator.prepare_model`, seen in accelerate
    1.15.0), and a graph under autocast is one operator, in which no layer is seen.
    """
    own = vars(model).get("forward")
    # Compared at their innermost: the forward of a class may be wrapped itself, as in transformers.
    if own is None or inspect.unwrap(own) is not inspect.unwrap(type(model).forward):
        yield
        return
    del model.forward
    try:
        yield
    finally:
        model.forward = own


@contextlib.contextmanager
def without_fast_path() -> Iterator[None]:
    """Attention as training computes it, while the block runs.

    In eval mode and without gradients TransformerEncoderLayer takes a fast path that is one operator, in which no part
    can be seen: https://github.com/pytorch/pytorch/issues/115511, open, seen in torch 2.13.0. Needless once that
    operator is decomposed in traces.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """No cache of keys and values in what a model of transformers returns, while the block runs.

    torch.export returns no DynamicCache: https://github.com/pytorch/pytorch/issues/136582, seen with torch 2.13.0 and
    transformers 5.23.0. Needless once transformers registers the class with pytree.
    """
    config = getattr(model, "config", None)
    caches = getattr(config, "use_cache", None)
    try:
        if caches is True:
            config.use_cache = False  # type: ignore[union-attr]
        yield
    finally:
        if caches is True:
            config.use_cache = True  # type: ignore[union-attr]


class ModuleNames:
    """The one clean name of what has several (shared modules, tied parameters), and calls counted by it."""

    def __init__(self, model: nn.Module) -> None:
        modules = {id(module): clean_name(name) for name, module in model.named_modules()}
        self.modules = {name: modules[id(m)] for name, m in model.named_modules(remove_duplicate=False)}
        parameters = {id(p): clean_name(name) for name, p in model.named_parameters()}
        self.parameters = {name: parameters[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
        buffers = {id(b): clean_name(name) for name, b in model.named_buffers()}
        self.buffers = {name: buffers[id(b)] for name, b in model.named_buffers(remove_duplicate=False)}
        self._numbers: dict[str, dict[tuple[str, ...], int]] = defaultdict(dict)

    def path(self, stack: dict[str, Any]) -> str:
        """The clean name of the innermost module that a node stands in."""
        found = next(reversed(stack.values()), ("", None))[0]
        return self.modules.get(found, clean_name(found))

    def calls(self, stack: dict[str, Any]) -> Iterator[ModuleCall]:
        """The calls of modules that a node stands in; a call is known by the exporter's keys down to it."""
        keys: tuple[str, ...] = ()
        for key, (path, _) in stack.items():
            keys = (*keys, key)
            name = self.modules.get(path, clean_name(path))
            numbers = self._numbers[name]
            yield ModuleCall(name, numbers.setdefault(keys, len(numbers)))


def plain_trace(program: ExportedProgram, names: ModuleNames) -> Trace:
    """The traced view of `program`, with the names of modules and parameters that `names` knows."""
    signature = program.graph_signature
    parameters = {
        name: names.parameters.get(target, clean_name(target))
        for name, target in signature.inputs_to_parameters.items()
    }
    hidden = {*signature.inputs_to_buffers, *signature.inputs_to_lifted_tensor_constants}
    hidden |= set(getattr(signature, "inputs_to_lifted_custom_objs", {}))
    nodes: list[TracedNode] = []
    outputs: list[str] = []
    merged, inner = channel_affine(program, names.path, {*parameters, *hidden})
    written, within = written_activations(program, names.path)
    for node in program.graph.nodes:
        if node.name in inner or node.name in within:
            continue
        if node.op == "placeholder":
            if node.name in parameters or node.name in hidden:
                continue
            op = kind = "input"
        elif node.op == "call_function":
            op = _op_name(node.target)
            if op.rstrip("_") == "hardtanh" and tuple(node.args[1:3]) == (0.0, 6.0):
                op = "relu6" + op.removeprefix("hardtanh")
            moves = is_idle(op, node.args) or (op == "pad" and _pads_with_zero_or_inside(*node.args[2:], **node.kwargs))
            kind = "move" if moves else _KINDS.get(op.rstrip("_"), "other")
        elif node.op == "output":
            outputs = [read.name for read in node.all_input_nodes]
            continue
        else:
            continue
        value = node.meta.get("val")
        one = value if isinstance(value, Tensor) else None
        read = list(_in_order(node))
        if op == "mean" and one is not None and is_image_mean(read[0].meta["val"].shape, one.shape):
            kind = "average_pool"
        if node.name in merged:
            op, kind, read = AFFINE, "batch_norm", [merged[node.name]]
        stack = node.meta.get("nn_module_stack") or {}
        if node.name in written:
            op, given, depth = written[node.name]
            kind, read, stack = "gate", [given], dict(list(stack.items())[:depth])
        shape = tuple(int(n) if isinstance(n, int) else -1 for n in one.shape) if one is not None else None
        nodes.append(
            TracedNode(
                name=node.name,
                op=op,
                kind=kind,  # type: ignore[arg-type]
                stack=tuple(names.calls(stack)),
                whole=node.name in written,
                inputs=tuple(n.name for n in read if n.name not in parameters and n.name not in hidden),
                parameters=tuple(dict.fromkeys(parameters[n.name] for n in read if n.name in parameters)),
                shape=shape,
                dtype=str(one.dtype).removeprefix("torch.") if one is not None else None,
            )
        )
    known = {node.name for node in nodes}
    return Trace(tuple(nodes), tuple(name for name in outputs if name in known))


def is_idle(op: str, operands: Sequence[Any]) -> bool:
    """True for an addition of the number 0 or a product with the number 1, which give their other operand.

    Sums that begin at 0 have one: total = 0; for branch in branches: total = total + branch(x).

    >>> is_idle("add_", ["x", 0]), is_idle("mul", [1.0, "x"]), is_idle("mul", ["x", 0]), is_idle("add", ["x", True])
    (True, True, False, False)
    """
    neutral = {"add": 0, "mul": 1, "multiply": 1}.get(op.rstrip("_"))
    numbers = [one for one in operands[:2] if isinstance(one, (int, float)) and not isinstance(one, bool)]
    return len(operands) >= 2 and len(numbers) == 1 and numbers[0] == neutral


def _pads_with_zero_or_inside(mode: str = "constant", value: float | None = None, **_: object) -> bool:
    """True for a padding with 0, which every grid of integers has, or with what the tensor holds (reflect, ...)."""
    return mode != "constant" or not value


def is_image_mean(before: Sequence[int], after: Sequence[int]) -> bool:
    """True if a mean between these shapes goes over all that is behind batch and channels: it is an average pool.

    >>> is_image_mean((2, 3, 5, 5), (2, 3)), is_image_mean((2, 3, 5, 5), (2, 3, 1, 1)), is_image_mean((2, 7, 8), (2, 8))
    (True, True, False)
    """
    kept, rest = tuple(after[:2]), tuple(after[2:])
    return len(before) in (3, 4, 5) and tuple(before[:2]) == kept and rest in ((), (1,) * (len(before) - 2))


def _in_order(node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    """The nodes among the arguments, a node that is given twice twice."""
    waiting = [*node.args, *node.kwargs.values()]
    while waiting:
        argument = waiting.pop(0)
        if isinstance(argument, torch.fx.Node):
            yield argument
        elif isinstance(argument, (list, tuple)):
            waiting = [*argument, *waiting]


def _op_name(target: object) -> str:
    name = getattr(target, "_opname", None) or getattr(target, "__name__", str(target))
    return str(name)


def _where(error: Exception) -> str:
    """The last line of the user's own code that the error went through: " in forward (model.py, line 12)"."""
    root = torch.__path__[0]
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((root, "<")) and frame.filename != __file__
    ]
    if not frames:
        return ""
    last = frames[-1]
    return f" in {last.name} ({last.filename.rpartition('/')[2]}, line {last.lineno}: {last.line})"


@contextlib.contextmanager
def _quiet_export() -> Iterator[None]:
    """Without the warnings of torch.export, which are about a program that nobody keeps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
