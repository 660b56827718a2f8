"""Names of inputs, outputs and weights in a file: those that the user knows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparsify.errors import ArgumentError
from sparsify.model.signature import SampleInputs

if TYPE_CHECKING:
    from onnx import ModelProto

__all__: list[str] = []


def with_input_names(call: SampleInputs, names: Sequence[str]) -> SampleInputs:
    """The same inputs under other names."""
    names = _checked_names("input_names", names, len(call.inputs), "input")
    return SampleInputs(
        dict(zip(names, call.inputs.values(), strict=True)), call.leaves, call.tensor_at, call.structure
    )


def checked_output_names(name: str, own: Sequence[str], call: SampleInputs, given: Sequence[str] | None) -> list[str]:
    """Names for the outputs `own` of the model `name`: those that were given, or their own, told apart from inputs."""
    if given is None:
        return [f"{key}_output" if key in call.inputs else key for key in own]
    names = _checked_names("output_names", given, len(own), "output")
    for key in names:
        if key in call.inputs:
            raise ArgumentError(f"output_names: {key!r} is the name of an input of {name}, too.")
    return names


def _checked_names(where: str, names: Sequence[str], count: int, noun: str) -> list[str]:
    if isinstance(names, str) or not all(isinstance(name, str) and name for name in names):
        raise ArgumentError(f"{where}={names!r}: give a list of names.")
    if len(names) != count:
        raise ArgumentError(f"{where}: {len(names)} names for {count} {noun}{'s' if count != 1 else ''}.")
    if len(set(names)) != len(names):
        raise ArgumentError(f"{where}={list(names)!r}: a name stands there twice.")
    return list(names)


def name_values(proto: ModelProto, call: SampleInputs, outputs: Sequence[str]) -> None:
    """Gives inputs, outputs and weights the names that the user knows them by."""
    from sparsify.onnx.graph import rename

    graph = proto.graph
    names: dict[str, str] = {}
    for value, wanted in zip([*graph.input, *graph.output], [*call.inputs, *outputs], strict=True):
        names[value.name] = wanted
    taken = set(names.values())
    # "model." is the adapter's.
    for tensor in graph.initializer:
        # A weight that is an output as well bears the name of the output.
        if (
            tensor.name not in names
            and tensor.name.startswith("model.")
            and (short := tensor.name.removeprefix("model.")) not in taken
        ):
            names[tensor.name] = short
            taken.add(short)
    for node in graph.node:
        for entry in node.metadata_props:
            if entry.key.endswith("name_scopes"):
                entry.value = re.sub(r"'model(?:\.|')", lambda hit: "'" if hit[0].endswith(".") else "''", entry.value)
        # A weight that was transposed for a MatMul has lost its name.
        if node.op_type == "MatMul" and re.fullmatch(r"val_\d+", node.input[1]):
            scopes = next((entry.value for entry in node.metadata_props if entry.key.endswith("name_scopes")), "")
            modules = re.findall(r"'([^']*)'", scopes)[:-1]
            short = f"{modules[-1]}.weight" if modules and modules[-1] else ""
            if short and short not in taken and node.input[1] in {tensor.name for tensor in graph.initializer}:
                names.setdefault(node.input[1], short)
                taken.add(short)
    for node in graph.node:
        for name in node.output:
            if name in taken and name not in names:
                # An inner value that bears a name wanted elsewhere makes way.
                names[name] = f"{name}_inner"
    rename(proto, names)
