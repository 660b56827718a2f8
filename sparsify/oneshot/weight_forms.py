"""The forms of a compressed weight: floats with zeros, integers with scales, or indices into palettes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sparsify.oneshot.compression_config import LinearQuantizerConfig, MagnitudePrunerConfig, ThresholdPrunerConfig
from sparsify.palettization.config import PalettizerConfig, WeightConfig
from sparsify.palettization.palette import Palette, palettized

__all__: list[str] = []

Weights = np.ndarray[Any, Any]
LIMITS = {"int8": (-128, 127), "uint8": (0, 255), "int4": (-8, 7), "uint4": (0, 15)}


@dataclass(frozen=True, eq=False)
class IntegerWeight:
    """A weight as scale x (q - zero point).

    Attributes:
        q: int8 or uint8, in the shape of the weight.
        scale: float32, of rank 0, or of the weight's rank with as many entries along `axis` as there are channels, and
            with blocks as many along `inputs` as there are blocks; 1 elsewhere.
        zero: int32 in the shape of `scale`.
        dtype: of the integers, "int8" to "uint4".
        inputs: the dimension along which blocks lie. block: elements of one; 0: none.
    """

    q: Weights
    scale: Weights
    zero: Weights
    dtype: str
    inputs: int = 0
    block: int = 0

    @property
    def bits(self) -> int:
        return int(self.dtype.removeprefix("u").removeprefix("int"))

    def spread(self, each: Weights) -> Weights:
        """`scale` or `zero` so that it broadcasts against `q`."""
        if not self.block:
            return each
        return np.repeat(each, self.block, self.inputs).take(range(self.q.shape[self.inputs]), self.inputs)

    def values(self) -> Weights:
        """The weight, float32."""
        steps = (self.q.astype(np.int32) - self.spread(self.zero)).astype(np.float32)
        return steps * self.spread(self.scale)

    @property
    def size_bytes(self) -> int:
        """Bytes of packed integers, scales and zero points."""
        return -(-self.q.size * self.bits // 8) + int(self.scale.nbytes) + (self.zero.size if self.zero.any() else 0)


WeightForm = IntegerWeight | Palette | None
"""None: floats."""


def form_bits(form: IntegerWeight | Palette) -> int:
    """Bits of an element: of an integer, or of an index."""
    return form.bits if isinstance(form, IntegerWeight) else form.nbits


@dataclass(frozen=True, eq=False)
class LaidOutWeight:
    """A weight with its channels.

    Attributes:
        values: float32.
        axis: dimension of the output channels. inputs: that of the inputs; None: it has none.
        form: of `values`.
    """

    values: Weights
    axis: int
    inputs: int | None
    form: WeightForm = None

    @property
    def bits(self) -> int | None:
        """Bits of an element in its form; None: floats."""
        return (
            None if self.form is None else self.form.bits if isinstance(self.form, IntegerWeight) else self.form.nbits
        )


def compressed(weight: LaidOutWeight, config: WeightConfig) -> LaidOutWeight | str:
    """`weight` as `config` asks for; or why it stays as it is.

    What was done before lasts: zeros stay zero, palettes stay palettes (their values are quantized), and integers that
    are pruned stay on their grid.
    """
    if isinstance(config, LinearQuantizerConfig):
        return _quantized(weight, config)
    if isinstance(config, PalettizerConfig):
        return _palettized(weight, config)
    assert isinstance(config, (MagnitudePrunerConfig, ThresholdPrunerConfig))
    return _pruned(weight, config)


# ---------------------------------------------------------------------- integers


def _quantized(weight: LaidOutWeight, config: LinearQuantizerConfig) -> LaidOutWeight | str:
    if isinstance(weight.form, Palette):
        return _quantized_table(weight, weight.form, config)
    axis = None if config.granularity == "per_tensor" else weight.axis
    block, inputs = 0, weight.inputs
    if config.granularity == "per_block":
        if inputs is None:
            return "it has no dimension of inputs to lay blocks along"
        block = config.block_size
    form = integer_weight(weight.values, config.mode, config.dtype, axis, inputs or 0, block)
    return replace(weight, values=form.values(), form=form)


def integer_weight(
    values: Weights, mode: str, dtype: str, axis: int | None, inputs: int = 0, block: int = 0
) -> IntegerWeight:
    """`values` rounded to integers of `dtype`, with a scale for each index of `axis`, or (None) for all.

    linear_symmetric: R = max|w|, scale = R / 127 (7 with four bits). linear: scale = (B - A) / (high - low) and
    zero point = round((low B - high A) / (B - A)), of the range [A, B] that holds all weights and 0.
    """
    low, high = LIMITS[dtype]
    exact = values.astype(np.float64)
    if block:
        count = -(-values.shape[inputs] // block)
        padding = [(0, 0)] * values.ndim
        padding[inputs] = (0, count * block - values.shape[inputs])
        split = (*values.shape[:inputs], count, block, *values.shape[inputs + 1 :])
        exact = np.pad(exact, padding).reshape(split)
        kept = {d + (d > inputs) for d in (axis,) if d is not None} | {inputs}
    else:
        kept = {axis} if axis is not None else set()
    others = tuple(d for d in range(exact.ndim) if d not in kept)
    smallest, largest = exact.min(others, keepdims=True), exact.max(others, keepdims=True)
    if mode == "linear_symmetric":
        bound, top = np.maximum(-smallest, largest), high if low < 0 else high // 2
        scale = np.where(bound > 0, bound / top, 1.0)
        zero = np.full(scale.shape, 0 if low < 0 else top, np.int32)
        low, high = (-top, top) if low < 0 else (0, 2 * top)
    else:
        smallest, largest = np.minimum(smallest, 0.0), np.maximum(largest, 0.0)
        span = largest - smallest
        scale = np.where(span > 0, span / (high - low), 1.0)
        zero = np.rint(np.divide(low * largest - high * smallest, span, out=np.zeros_like(span), where=span > 0))
        zero = np.clip(zero, low, high).astype(np.int32)
    stored = np.maximum(scale.astype(np.float32), np.finfo(np.float32).tiny)
    q = np.clip(np.rint(exact / stored.astype(np.float64)) + zero, low, high)
    if block:
        joined = (*values.shape[:inputs], count * block, *values.shape[inputs + 1 :])
        q = q.reshape(joined).take(range(values.shape[inputs]), inputs)
        stored, zero = (each.squeeze(inputs + 1) for each in (stored, zero))
    elif axis is None:
        stored, zero = stored.reshape(()), zero.reshape(())
    kind = np.int8 if dtype.startswith("i") else np.uint8
    return IntegerWeight(q.astype(kind), stored, zero, dtype, inputs, block)


def _quantized_table(weight: LaidOutWeight, form: Palette, config: LinearQuantizerConfig) -> LaidOutWeight:
    """The palettes' values become integers, with one scale a palette."""
    made = integer_weight(form.float_table(), "linear_symmetric", config.dtype, 0)
    zero = 127 if made.q.dtype == np.uint8 else 0
    table = (made.q.astype(np.int32) - made.zero + zero).astype(made.q.dtype)
    scale = made.scale.reshape(-1)
    new = replace(form, table=table, table_scale=scale)
    return replace(weight, values=new.values(), form=new)


# ---------------------------------------------------------------------- palettes


def _palettized(weight: LaidOutWeight, config: PalettizerConfig) -> LaidOutWeight | str:
    axis = weight.axis if config.channel_axis is None else config.channel_axis
    if isinstance(weight.form, IntegerWeight) and config.lut_dtype is None:
        config = config.model_copy(update={"lut_dtype": "uint8" if weight.form.dtype.startswith("u") else "int8"})
    form = palettized(weight.values, config, axis)
    return form if isinstance(form, str) else replace(weight, values=form.values(), form=form)


# ---------------------------------------------------------------------- zeros


def _pruned(weight: LaidOutWeight, config: MagnitudePrunerConfig | ThresholdPrunerConfig) -> LaidOutWeight | str:
    mask = pruning_mask(weight, config)
    if isinstance(mask, str):
        return mask
    zeroed = np.where(mask, np.float32(0), weight.values)
    if isinstance(weight.form, IntegerWeight):
        zero = np.broadcast_to(weight.form.spread(weight.form.zero), mask.shape)
        form = replace(weight.form, q=np.where(mask, zero, weight.form.q).astype(weight.form.q.dtype))
        return replace(weight, values=form.values(), form=form)
    if isinstance(weight.form, Palette):
        return _pruned_palette(replace(weight, values=zeroed), weight.form)
    return replace(weight, values=zeroed)


def _pruned_palette(weight: LaidOutWeight, form: Palette) -> LaidOutWeight | str:
    """Palettes of as many values, of which 0 is one."""
    grouped = len(form.table) > 1
    fields: dict[str, Any] = {"nbits": form.nbits, "lut_dtype": None}
    if form.table_scale is not None:
        fields["lut_dtype"] = str(form.table.dtype)
    again = PalettizerConfig(
        **fields,
        granularity="per_grouped_channel" if grouped else "per_tensor",
        group_size=weight.values.shape[form.axis] // len(form.table),
        cluster_dim=form.cluster_dim,
        enable_per_channel_scale=form.channel_scale is not None,
    )
    new = palettized(weight.values, again, form.axis)
    return new if isinstance(new, str) else replace(weight, values=new.values(), form=new)


def pruning_mask(
    weight: LaidOutWeight, config: MagnitudePrunerConfig | ThresholdPrunerConfig
) -> np.ndarray[Any, np.dtype[np.bool_]] | str:
    """True where a weight becomes zero; or why none does."""
    size = np.abs(weight.values)
    if isinstance(config, ThresholdPrunerConfig):
        mask = size <= config.threshold
        share = float(mask.mean())
        if share < config.minimum_sparsity_percentile:
            least = config.minimum_sparsity_percentile
            return f"{share:.1%} of it would be zero, less than minimum_sparsity_percentile={least:g}"
        return mask
    if config.n_m_ratio is not None:
        dim = weight.inputs if config.dim is None else config.dim
        if dim is None or dim >= size.ndim:
            return f"it has no dimension {'of inputs' if dim is None else dim} for n:m"
        return _smallest_of_each(size, config.n_m_ratio[0], config.n_m_ratio[1], dim)
    assert config.target_sparsity is not None
    if config.block_size is None:
        return _smallest(size, config.target_sparsity)
    dim = weight.axis if config.dim is None else config.dim
    if dim >= size.ndim:
        return f"it has no dimension {dim} for blocks"
    rows = np.moveaxis(size, dim, 0)
    missing = -len(rows) % config.block_size
    padded = np.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1)).astype(np.float64)
    blocks = (padded.reshape(-1, config.block_size, *rows.shape[1:]) ** 2).sum(1)
    zeroed = np.repeat(_smallest(blocks, config.target_sparsity), config.block_size, 0)[: len(rows)]
    return np.moveaxis(zeroed, 0, dim)


def _smallest(size: Weights, sparsity: float) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """True at exactly round(sparsity x elements) of the smallest; of those that tie, the first."""
    mask = np.zeros(size.size, bool)
    mask[np.argsort(size.reshape(-1), kind="stable")[: round(sparsity * size.size)]] = True
    return mask.reshape(size.shape)


def _smallest_of_each(size: Weights, n: int, m: int, dim: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """True at the n smallest of every m neighbors along `dim`; the last, of r < m, loses n - (m - r) or none."""
    rows = np.moveaxis(size, dim, -1)
    missing = -rows.shape[-1] % m
    # What is filled in counts as zero first.
    padded = np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, missing)], constant_values=-1.0)
    groups = padded.reshape(-1, m)
    mask = np.zeros(groups.shape, bool)
    np.put_along_axis(mask, np.argsort(groups, 1, kind="stable")[:, :n], True, 1)
    mask = mask.reshape(padded.shape)[..., : rows.shape[-1]]
    return np.moveaxis(mask, -1, dim)
