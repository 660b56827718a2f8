"""A weight as indices into palettes: one palette for the whole weight, or one for each group of its channels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsify.errors import ArgumentError, first_line
from sparsify.palettization.config import PalettizerConfig
from sparsify.palettization.kmeans import kmeans, kmeans_vectors, nearest_numbers, nearest_vectors

__all__: list[str] = []

MOST_ENTRIES = 256
LUT_LARGEST = 127


@dataclass(frozen=True, eq=False)
class Palette:
    """A palettized weight.

    Attributes:
        codes: indices, uint8, in the shape of the weight; its channel axis is `cluster_dim` times shorter.
        table: (palettes, entries, cluster_dim), float32; int8 or uint8 with `table_scale`.
        axis: the channel axis. Palette g is that of the g-th of equally many channels along it.
        nbits: bits of an index; 2^nbits is at least the number of entries.
        table_scale: (palettes,) float32, of an entry's steps; None: entries are floats.
        channel_scale: (channels,) float32, that entries are multiplied with; None: with nothing.
    """

    codes: np.ndarray[Any, np.dtype[np.uint8]]
    table: np.ndarray[Any, Any]
    axis: int
    nbits: int
    table_scale: np.ndarray[Any, np.dtype[np.float32]] | None = None
    channel_scale: np.ndarray[Any, np.dtype[np.float32]] | None = None

    @property
    def cluster_dim(self) -> int:
        return int(self.table.shape[2])

    @property
    def table_zero(self) -> int:
        """The integer that means 0 in a table of integers."""
        return LUT_LARGEST if self.table.dtype == np.uint8 else 0

    def float_table(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The values of all palettes: (palettes, entries, cluster_dim)."""
        if self.table_scale is None:
            return np.asarray(self.table, np.float32)
        steps = self.table.astype(np.int32) - self.table_zero
        return steps.astype(np.float32) * self.table_scale[:, None, None]

    def values(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The weight, float32."""
        table = self.float_table()
        codes = np.moveaxis(self.codes, self.axis, 0)
        group = np.arange(len(codes)) // (len(codes) // len(table))
        found = table[group.reshape(-1, *[1] * (codes.ndim - 1)), codes]  # (channels / d, ..., d)
        found = np.moveaxis(found, -1, 1).reshape(len(codes) * self.cluster_dim, *codes.shape[1:])
        if self.channel_scale is not None:
            found = found * self.channel_scale.reshape(-1, *[1] * (found.ndim - 1))
        return np.ascontiguousarray(np.moveaxis(found, 0, self.axis))

    @property
    def size_bytes(self) -> int:
        """Bytes of packed indices, tables and scales."""
        scales = sum(each.nbytes for each in (self.table_scale, self.channel_scale) if each is not None)
        return -(-self.codes.size * self.nbits // 8) + int(self.table.nbytes) + scales


def why_not(shape: tuple[int, ...], config: PalettizerConfig, axis: int) -> str | None:
    """Why a weight of this shape cannot be palettized so; None: it can be."""
    if not shape or axis >= len(shape):
        return f"it has no dimension {axis}"
    group = config.group_size if config.granularity == "per_grouped_channel" else shape[axis]
    if shape[axis] % group:
        return f"its {shape[axis]} channels are not divided by group_size={group}"
    if group % config.cluster_dim:
        return f"{group} channels are not divided by cluster_dim={config.cluster_dim}"
    return None


def grouped(weight: np.ndarray, axis: int, groups: int, cluster_dim: int = 1) -> np.ndarray:
    """`weight` as (groups, elements, cluster_dim): what shares a palette, vectors of neighbors along `axis`."""
    channels = np.moveaxis(weight, axis, 0)
    size = channels.shape[0] // groups
    parts = channels.reshape(groups, size // cluster_dim, cluster_dim, -1)
    return parts.swapaxes(2, 3).reshape(groups, -1, cluster_dim)


def ungrouped(parts: np.ndarray, shape: tuple[int, ...], axis: int) -> np.ndarray:
    """Codes, (groups, elements), in the shape of a weight whose channel axis is cluster_dim times shorter."""
    moved = (shape[axis], *shape[:axis], *shape[axis + 1 :])
    count = parts.size // max(1, math.prod(moved[1:]))
    return np.ascontiguousarray(np.moveaxis(parts.reshape(count, *moved[1:]), 0, axis))


def palettized(
    weight: np.ndarray, config: PalettizerConfig, axis: int, importance: np.ndarray | None = None
) -> Palette | str:
    """`weight` with the palettes that `config` asks for; or why it stays as it is.

    Args:
        weight: finite.
        config: its channel axis has been looked at already.
        axis: the channel axis.
        importance: of each element, 0 or more, in the shape of `weight` (SqueezeLLM, https://arxiv.org/abs/2306.07629:
            the mean of squared gradients); None: all alike.

    Raises:
        ArgumentError: a `lut_function` that returns no palette.
    """
    refused = why_not(weight.shape, config, axis)
    if refused is not None:
        return refused
    weight, scale = np.asarray(weight, np.float32), None
    if config.enable_per_channel_scale:
        others = tuple(d for d in range(weight.ndim) if d != axis)
        largest = np.abs(weight).max(others, keepdims=True)
        scale = np.where(largest > 0, largest, 1).astype(np.float32)
        weight = weight / scale
        importance = None if importance is None else importance * scale.astype(np.float64) ** 2
    size = config.group_size if config.granularity == "per_grouped_channel" else weight.shape[axis]
    groups = weight.shape[axis] // size
    parts = grouped(weight, axis, groups, config.cluster_dim)
    important = None if importance is None else grouped(importance, axis, groups, config.cluster_dim)
    if config.cluster_dim > 1 and ((parts == 0).any(2) & (parts != 0).any(2)).any():
        return f"its zeros do not fill whole vectors of cluster_dim={config.cluster_dim}, and would be lost"
    tables = []
    for g, part in enumerate(parts):
        table = palette_entries(part, config, None if important is None else important[g])
        if isinstance(table, str):
            return table
        tables.append(table)
    nbits: int = config.nbits or next(bits for bits in (1, 2, 3, 4, 6, 8) if 2**bits >= max(map(len, tables)))
    padded = np.stack([np.concatenate([t, np.repeat(t[-1:], 2**nbits - len(t), 0)]) for t in tables])
    stored, table_scale = _stored_table(padded.astype(np.float32), config.lut_dtype)
    codes = np.stack([codes_of(part, table) for part, table in zip(parts, tables, strict=True)])
    laid_out = ungrouped(codes.astype(np.uint8), weight.shape, axis)
    return Palette(laid_out, stored, axis, nbits, table_scale, None if scale is None else scale.reshape(-1))


def palette_entries(
    part: np.ndarray, config: PalettizerConfig, importance: np.ndarray | None = None
) -> np.ndarray | str:
    """The palette, (entries, cluster_dim), ascending where they are numbers, of `part`: (elements, cluster_dim)."""
    zero = bool((part == 0).all(1).any())
    if config.cluster_dim > 1:
        weights = None if importance is None else importance.mean(1)
        return kmeans_vectors(part, 2 ** (config.nbits or 8), weights, zero=zero).astype(np.float32)
    flat = part.reshape(-1)
    if config.mode == "unique":
        found = np.unique(flat)
        if len(found) > MOST_ENTRIES:
            return f"it has {len(found):,} different values, more than {MOST_ENTRIES}"
    elif config.mode == "custom":
        found = _custom(flat, config)
    elif config.mode == "uniform":
        found = np.linspace(flat.min(), flat.max(), 2 ** (config.nbits or 8), dtype=np.float64)
    else:
        found = kmeans(
            flat, 2 ** (config.nbits or 8), None if importance is None else importance.reshape(-1), zero=zero
        )
    found = np.asarray(found, np.float32)
    if zero and not (found == 0).any():
        found[np.abs(found).argmin()] = 0.0
    return np.unique(found)[:, None]


def codes_of(part: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The index of the nearest entry of `table`, (entries, cluster_dim), for each row of `part`."""
    if table.shape[1] > 1:
        return nearest_vectors(part, table)[0]
    codes = nearest_numbers(part.reshape(-1), table[:, 0])
    zeros = np.flatnonzero(table[:, 0] == 0)
    if len(zeros):
        codes[part.reshape(-1) == 0] = zeros[0]
    return codes


def _custom(flat: np.ndarray, config: PalettizerConfig) -> np.ndarray:
    assert config.lut_function is not None
    returned = config.lut_function(flat.copy())
    try:
        found = np.unique(np.asarray(returned, np.float64))
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"PalettizerConfig.lut_function returned no numbers: {first_line(error)}.") from error
    if found.ndim != 1 or not 1 <= len(found) <= MOST_ENTRIES or not np.isfinite(found).all():
        raise ArgumentError(
            f"PalettizerConfig.lut_function returned {len(found)} values; give 1 to {MOST_ENTRIES}, all finite."
        )
    return found


def _stored_table(table: np.ndarray, dtype: str | None) -> tuple[np.ndarray, np.ndarray | None]:
    """(tables as they are stored, their scales or None)."""
    if dtype is None:
        return table, None
    largest = np.abs(table).max((1, 2), keepdims=True)
    scale = np.where(largest > 0, largest / LUT_LARGEST, 1).astype(np.float32)
    steps = np.clip(np.rint(table / scale), -LUT_LARGEST, LUT_LARGEST)
    stored = (steps + LUT_LARGEST).astype(np.uint8) if dtype == "uint8" else steps.astype(np.int8)
    return stored, scale.reshape(-1)
