"""Which weight of a model is compressed how, without training: settings for all, for types and for names."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from sparsify.errors import ArgumentError, DataError, DataFileError, TargetError, did_you_mean, first_line
from sparsify.output.field_errors import FieldProblem
from sparsify.palettization.config import PalettizerConfig, WeightConfig

__all__ = ["LinearQuantizerConfig", "MagnitudePrunerConfig", "OptimizationConfig", "ThresholdPrunerConfig"]


class LinearQuantizerConfig(WeightConfig):
    """Rounds a weight to integers: w = scale x (q - zero point). Zeros stay exactly zero."""

    does: ClassVar[str] = "quantize"

    mode: Literal["linear_symmetric", "linear"] = Field(
        default="linear_symmetric",
        description="linear_symmetric: the range is [-R, R] with R = max|w|; int8 -127 to 127, int4 -7 to 7 with zero "
        "point 0; uint8 0 to 254 with 127, uint4 0 to 14 with 7. linear: the range from the least to the largest "
        "weight, widened to hold 0, over all integers of the type.",
    )
    dtype: Literal["int8", "uint8", "int4", "uint4"] = Field(default="int8", description="Type of the integers.")
    granularity: Literal["per_channel", "per_tensor", "per_block"] = Field(
        default="per_channel",
        description="One scale an output channel, one a weight, or one for every `block_size` inputs of each output "
        "channel; the last block of a channel may be shorter.",
    )
    block_size: int = Field(default=32, ge=1, description="Inputs that share a scale, with per_block.")


class MagnitudePrunerConfig(WeightConfig):
    """Sets the smallest weights to zero: a share of them exactly, also where weights tie, or n of every m."""

    does: ClassVar[str] = "prune"

    target_sparsity: float | None = Field(
        default=None, ge=0, le=1, description="Fraction of zeros: round(target_sparsity x elements) of them."
    )
    n_m_ratio: tuple[int, int] | list[int] | None = Field(
        default=None, description="[n, m]: of every m neighbors along `dim` the n smallest become zero."
    )
    block_size: int | None = Field(
        default=None,
        ge=2,
        description="Neighbors along `dim` that become zero together, by their norm; with target_sparsity.",
    )
    dim: int | None = Field(
        default=None,
        ge=0,
        description="Dimension of blocks and of n:m; None: that of the output channels for blocks, of the inputs for "
        "n:m.",
    )

    def model_post_init(self, _context: Any) -> None:
        """Checks fields against each other."""
        if (self.target_sparsity is None) == (self.n_m_ratio is None):
            raise FieldProblem("target_sparsity", "give either target_sparsity or n_m_ratio.")
        if self.n_m_ratio is not None:
            if len(self.n_m_ratio) != 2 or not 0 <= self.n_m_ratio[0] <= self.n_m_ratio[1] or self.n_m_ratio[1] < 1:
                raise FieldProblem("n_m_ratio", f"{self.n_m_ratio!r}: give [n, m] with 0 <= n <= m and m >= 1.")
            if self.block_size is not None:
                raise FieldProblem("block_size", "goes with target_sparsity, not with n_m_ratio.")
        elif self.dim is not None and self.block_size is None:
            raise FieldProblem("dim", "goes with block_size or n_m_ratio.")


class ThresholdPrunerConfig(WeightConfig):
    """Sets weights to zero whose absolute value is at most `threshold`."""

    does: ClassVar[str] = "prune"

    threshold: float = Field(default=1e-12, ge=0, description="Largest absolute value that becomes zero.")
    minimum_sparsity_percentile: float = Field(
        default=0.5, ge=0, le=1, description="A weight with a smaller fraction of zeros then stays as it is, and said."
    )


SETTINGS_KINDS: dict[str, type[WeightConfig]] = {
    kind.__name__: kind
    for kind in (LinearQuantizerConfig, PalettizerConfig, MagnitudePrunerConfig, ThresholdPrunerConfig)
}


class OptimizationConfig:
    """Settings for the weights of a model: a name goes before a type, a type before all others.

    Args:
        global_config: of every weight that no other entry names; None: they stay as they are.
        type_configs: {type: settings or None}; a module's class ("Conv2d", "nn.Conv2d" or the class itself), in a file
            an operator ("Conv"). None leaves them out.
        name_configs: {regular expression: settings or None}, which has to match the whole name of a weight or of its
            layer, in a file of an initializer or node too. The first that matches counts.

    Raises:
        ArgumentError: what is no settings object, or a name that is no regular expression.
    """

    def __init__(
        self,
        global_config: WeightConfig | None = None,
        type_configs: Mapping[Any, WeightConfig | None] | None = None,
        name_configs: Mapping[str, WeightConfig | None] | None = None,
    ) -> None:
        self.global_config: WeightConfig | None = None
        self.type_configs: dict[str, WeightConfig | None] = {}
        self.name_configs: dict[str, WeightConfig | None] = {}
        self.set_global(global_config)
        for kind, config in (type_configs or {}).items():
            self.set_type(kind, config)
        for name, config in (name_configs or {}).items():
            self.set_name(name, config)

    def set_global(self, config: WeightConfig | None) -> OptimizationConfig:
        """Sets `global_config`, and returns this object.

        Args:
            config: settings, or None.
        """
        self.global_config = _checked("global_config", config)
        return self

    def set_type(self, kind: Any, config: WeightConfig | None) -> OptimizationConfig:
        """Sets an entry of `type_configs`, and returns this object.

        Args:
            kind: a class of modules or its name; an ONNX operator.
            config: settings, or None to leave it out.
        """
        name = kind.__name__ if isinstance(kind, type) else kind
        if not isinstance(name, str) or not name:
            raise ArgumentError(f"OptimizationConfig.type_configs: {kind!r} is no type; give a class or its name.")
        self.type_configs[name.rpartition(".")[2]] = _checked(f"type_configs[{name!r}]", config)
        return self

    def set_name(self, name: str, config: WeightConfig | None) -> OptimizationConfig:
        """Sets an entry of `name_configs`, and returns this object.

        Args:
            name: a regular expression for whole names.
            config: settings, or None to leave it out.
        """
        try:
            re.compile(name)
        except (re.error, TypeError) as error:
            raise ArgumentError(
                f"OptimizationConfig.name_configs: {name!r} is no regular expression: {first_line(error)}."
            ) from error
        self.name_configs[name] = _checked(f"name_configs[{name!r}]", config)
        return self

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> OptimizationConfig:
        """Reads settings from plain values.

        Args:
            fields: {"global_config": settings, "type_configs": {type: settings}, "name_configs": {name: settings}}.
                Settings are null, or a mapping of fields with the class under "type"
                ({"type": "LinearQuantizerConfig", "dtype": "int4"}).

        Raises:
            ArgumentError: an unknown key or class, or a wrong value.
        """
        known = ("global_config", "type_configs", "name_configs")
        if not isinstance(fields, Mapping):
            raise ArgumentError(
                f"OptimizationConfig: {type(fields).__name__} is no mapping; it has {', '.join(known)}."
            )
        for key in fields:
            if key not in known:
                raise ArgumentError(
                    f"OptimizationConfig.{key}: no such key.{did_you_mean(str(key), known)} It has: {', '.join(known)}."
                )
        made: dict[str, Any] = {"global_config": _from_plain("global_config", fields.get("global_config"))}
        for group in known[1:]:
            entries = fields.get(group) or {}
            if not isinstance(entries, Mapping):
                raise ArgumentError(f"OptimizationConfig.{group}: {entries!r} is no mapping.")
            made[group] = {key: _from_plain(f"{group}[{key!r}]", each) for key, each in entries.items()}
        return cls(**made)

    @classmethod
    def from_yaml(cls, source: str | os.PathLike[str]) -> OptimizationConfig:
        """Reads settings from YAML, in the form of `from_dict`.

        Args:
            source: a path, or the text itself, which has a line break or a colon followed by a space.

        Raises:
            DataFileError: a file that is missing or unreadable.
            DataError: it is no YAML.
            ArgumentError: as `from_dict`.
        """
        import yaml

        text = str(source)
        if not (isinstance(source, str) and ("\n" in source or ": " in source)):
            try:
                text = Path(source).read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise DataFileError(f"cannot read {text[:200]!r}: {first_line(error)}.") from error
        try:
            fields = yaml.safe_load(text)
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            raise DataError(f"OptimizationConfig: it is no YAML: {first_line(error)}.") from error
        return cls.from_dict({} if fields is None else fields)

    def of(self, names: Iterable[str], kinds: Iterable[str]) -> WeightConfig | None:
        """The settings of a weight.

        Args:
            names: all that it has.
            kinds: types of the layers or operators that read it.
        """
        names = list(names)
        for pattern, config in self.name_configs.items():
            if any(re.fullmatch(pattern, name) for name in names):
                return config
        return next((self.type_configs[kind] for kind in kinds if kind in self.type_configs), self.global_config)

    def check(self, names: Collection[str], kinds: Collection[str], known: Collection[str], where: str) -> None:
        """Checks that every name matches something, and that every type is one.

        Args:
            names: all names of weights and of what reads them.
            kinds: all types in the model.
            known: other types that there are.
            where: for the message.

        Raises:
            TargetError: one does not.
        """
        for pattern in self.name_configs:
            if not any(re.fullmatch(pattern, name) for name in names):
                raise TargetError(
                    f"{where}: name_configs[{pattern!r}] matches no weight.{did_you_mean(pattern, names)} It is a "
                    "regular expression for the whole name of a weight or of its layer."
                )
        for kind in self.type_configs:
            if kind not in kinds and kind not in known:
                raise TargetError(
                    f"{where}: type_configs[{kind!r}] is no type in the model.{did_you_mean(kind, [*kinds, *known])}"
                )

    def configs(self) -> list[WeightConfig]:
        """All settings."""
        found = [self.global_config, *self.type_configs.values(), *self.name_configs.values()]
        return [config for config in found if config is not None]


def _checked(place: str, config: object) -> WeightConfig | None:
    if config is not None and type(config) not in SETTINGS_KINDS.values():
        raise ArgumentError(
            f"OptimizationConfig.{place}: {type(config).__name__} is none of {', '.join(SETTINGS_KINDS)}, and not None."
        )
    return config  # type: ignore[return-value]


def _from_plain(place: str, fields: object) -> WeightConfig | None:
    if fields is None:
        return None
    if not isinstance(fields, Mapping) or not isinstance(fields.get("type"), str):
        raise ArgumentError(
            f"OptimizationConfig.{place}: give null, or a mapping with 'type': {', '.join(SETTINGS_KINDS)}."
        )
    kind = fields["type"]
    if kind not in SETTINGS_KINDS:
        near = did_you_mean(kind, SETTINGS_KINDS)
        raise ArgumentError(f"OptimizationConfig.{place}.type: {kind!r} is none of {', '.join(SETTINGS_KINDS)}.{near}")
    given = {str(key): value for key, value in fields.items() if key != "type"}
    try:
        return SETTINGS_KINDS[kind](**given)
    except ArgumentError as error:
        raise ArgumentError(f"OptimizationConfig.{place}: {error}") from None
