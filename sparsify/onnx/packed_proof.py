"""Proves a packed file: its tensors, its outputs in onnxruntime and its optimized graph are those of the plain one."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsify.errors import ArgumentError, DataError, ExportError, first_line
from sparsify.onnx.file_inputs import made_up_inputs
from sparsify.onnx.model_files import MOST_BYTES, model_bytes
from sparsify.onnx.rebuilt_weights import graphs_of, loaded, rebuilt_value
from sparsify.onnx.runtime import SessionSettings, run_session, start_session
from sparsify.onnx.written_values import RANDOM

if TYPE_CHECKING:
    from onnx import ModelProto
    from onnxruntime import InferenceSession

__all__: list[str] = []


def prove_packed(
    plain: ModelProto,
    path: Path,
    packed: ModelProto,
    temporary: Path,
    tensors: set[str],
    inputs: Mapping[str, np.ndarray] | None,
    exact_unoptimized: bool,
) -> str | None:
    """Compares the tensors, the outputs and the optimized graphs; returns why outputs could not be compared.

    Raises:
        ExportError: something differs, or onnxruntime cannot run one of the files.
        ArgumentError: `inputs` have other names than the file's.
    """
    _compare_tensors(plain, path.resolve().parent, packed, temporary.parent, tensors)
    feeds: dict[str, np.ndarray] | None = None
    unproven = None
    if any(node.op_type in RANDOM for graph in graphs_of(plain.graph) for node in graph.node):
        unproven = "it draws random numbers"
    for optimized in (True, False):
        first, kernels = _session(plain, path, optimized, exact_unoptimized)
        if feeds is None and unproven is None:
            feeds, unproven = _proof_inputs(plain, first, inputs)
        wanted = None
        if feeds is not None:
            try:
                wanted = run_session(first, feeds)
            except ExportError as error:
                if inputs is not None:
                    raise
                feeds, unproven = None, first_line(error)
        del first  # two sessions on large weights at once would take twice the memory
        second, others = _session(packed, temporary, optimized, exact_unoptimized)
        if kernels != others:
            more, less = _kernel_counts(others - kernels), _kernel_counts(kernels - others)
            raise ExportError(
                f"onnxruntime makes another graph of the packed file: {more} in place of {less}. Nothing was written."
            )
        if feeds is not None and wanted is not None:
            found = run_session(second, feeds)
            differs = next((name for name in wanted if not _same_bits(wanted[name], found[name])), None)
            if differs is not None:
                how = "with" if optimized else "without"
                raise ExportError(
                    f"the output {differs!r} of the packed file differs {how} optimizations. Nothing was written."
                )
    return unproven


def _compare_tensors(plain: ModelProto, folder: Path, packed: ModelProto, packed_folder: Path, names: set[str]) -> None:
    from onnx import numpy_helper

    for before, after in zip(graphs_of(plain.graph), graphs_of(packed.graph), strict=True):
        stored = {tensor.name: tensor for tensor in before.initializer}
        stored |= {
            node.output[0]: node.attribute[0].t for node in before.node if node.op_type == "Constant" and node.attribute
        }
        made = {output for node in after.node if node.op_type != "Constant" for output in node.output}
        made |= {sparse.values.name for sparse in after.sparse_initializer}
        for name in sorted(names & set(stored) & made):
            wanted, found = loaded(stored[name], folder), rebuilt_value(packed, after, name, packed_folder)
            same = wanted.data_type == found.data_type and list(wanted.dims) == list(found.dims)
            if not same or numpy_helper.to_array(wanted).tobytes() != numpy_helper.to_array(found).tobytes():
                raise ExportError(f"{name!r} would not be rebuilt as it was. Nothing was written.")


def _session(model: ModelProto, path: Path, optimized: bool, prepacking: bool) -> tuple[InferenceSession, Counter[str]]:
    """A session as a user makes it, and the operators that it runs; none where they are not optimized, or too large."""
    import onnx

    if not optimized or model_bytes(model) > MOST_BYTES:
        entries = {} if optimized or prepacking else {"session.disable_prepacking": "1"}
        settings = SessionSettings(optimized=optimized, exact=False, entries=entries)
        return start_session(model, settings, path=path, changed=False), Counter()
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "optimized.onnx"
        settings = SessionSettings(exact=False, optimized_path=target)
        session = start_session(model, settings, path=path, changed=False)
        graphs = graphs_of(onnx.load(target).graph)
        return session, Counter(node.op_type for graph in graphs for node in graph.node)


def _proof_inputs(
    model: ModelProto, session: InferenceSession, inputs: Mapping[str, np.ndarray] | None
) -> tuple[dict[str, np.ndarray] | None, str | None]:
    """(inputs, None), or (None, why there are none)."""
    if inputs is not None:
        names = [value.name for value in session.get_inputs()]
        if sorted(names) != sorted(inputs):
            raise ArgumentError(f"inputs={sorted(inputs)!r}: the file takes {', '.join(names)}.")
        return dict(inputs), None
    try:
        return made_up_inputs(model)[0], None
    except (DataError, ArgumentError) as error:
        return None, first_line(error)


def _same_bits(one: Any, other: Any) -> bool:
    """Equal to the bit: arrays, and lists and mappings of them."""
    if isinstance(one, np.ndarray):
        return (
            isinstance(other, np.ndarray)
            and one.dtype == other.dtype
            and one.shape == other.shape
            and (one.tolist() == other.tolist() if one.dtype == object else one.tobytes() == other.tobytes())
        )
    if isinstance(one, Mapping):
        return (
            isinstance(other, Mapping) and list(one) == list(other) and all(_same_bits(one[k], other[k]) for k in one)
        )
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(_same_bits, one, other))
    return type(one) is type(other) and bool(one == other)


def _kernel_counts(kernels: Counter[str]) -> str:
    return ", ".join(f"{number} {name}" for name, number in sorted(kernels.items())) or "nothing"
