"""Recipe: the contents of a recipe file as frozen values; read from text, written to text, checked against a model."""

from __future__ import annotations

import hashlib
import math
import os
import stat
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

# Imported whole: every modifier registers itself under its name.
import sparsify.modifiers  # noqa: F401
from sparsify.errors import ArgumentError, RecipeError, RecipeFileError, SparsifyWarning
from sparsify.modifiers.base import Modifier
from sparsify.output.files import replacing
from sparsify.output.tables import DisplayedText
from sparsify.recipe import compose, grammar, schema, writer
from sparsify.recipe.conflicts import conflict, in_order
from sparsify.recipe.evidence import Evidence
from sparsify.recipe.reader import overrides_of, read_parts
from sparsify.recipe.stage import Stage

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Recipe"]

Source: TypeAlias = "str | bytes | os.PathLike[str] | IO[str] | IO[bytes] | Recipe | HasRecipe | Iterable[Modifier]"
Variables: TypeAlias = "Mapping[str, Any] | str | None"
Modifiers: TypeAlias = "Modifier | Source | Sequence[Modifier | Source] | None"


class HasRecipe(Protocol):
    """A manager, or anything else that holds a recipe."""

    @property
    def recipe(self) -> Recipe: ...


class Recipe(DisplayedText, BaseModel):
    """Variables, metadata, and stages of modifiers. Frozen, and equal to what it saves.

    Reading, writing and checking touch no model; one recipe can drive many.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    variables: dict[str, Any] = Field(default_factory=dict)
    metadata: Any = None
    stages: tuple[Stage, ...]

    @classmethod
    def load(cls, path: str | os.PathLike[str] | IO[str] | IO[bytes], recipe_variables: Variables = None) -> Recipe:
        """From a file: YAML, or Markdown with the recipe in its front matter.

        Args:
            path: of the file, or an open file.
            recipe_variables: values for variables of the recipe, as a mapping, JSON, or "name=value,other=value".

        Raises:
            RecipeError: what is wrong with it, with file and line; an OSError too where the file cannot be read.
        """
        if isinstance(path, str | os.PathLike):
            return _read_path(Path(path), recipe_variables)
        return read_recipe(path, recipe_variables)

    @classmethod
    def from_yaml(cls, text: str | bytes | IO[str] | IO[bytes], recipe_variables: Variables = None) -> Recipe:
        """From the text of a recipe.

        >>> recipe = Recipe.from_yaml("modifiers: [!EpochRangeModifier {start_epoch: 0, end_epoch: 5}]")
        >>> recipe.max_epochs, recipe.modifiers[0].end_epoch
        (5, 5.0)

        Args:
            text: YAML or Markdown, or an open file of it.
            recipe_variables: values for variables of the recipe, as for `load`.

        Raises:
            RecipeError: what is wrong with it, with the line.
        """
        if isinstance(text, str | bytes):
            return _read_text(text, "recipe", recipe_variables)
        return read_recipe(text, recipe_variables)

    @classmethod
    def from_modifiers(cls, modifiers: Iterable[Modifier], metadata: Any = None) -> Recipe:
        """From modifiers built in Python.

        Args:
            modifiers: at least one.
            metadata: plain values that are kept with the recipe and saved with it.

        Raises:
            RecipeError: there are none, what is given is no modifier, or two prune one parameter at the same time.
        """
        found = list(modifiers)
        for modifier in found:
            if not isinstance(modifier, Modifier):
                raise RecipeError(f"a recipe is made of modifiers; {grammar.shown(modifier)} is none.")
        if not found:
            raise RecipeError("a recipe needs at least one modifier.")
        recipe = cls(metadata=metadata, stages=(Stage(groups={"modifiers": tuple(found)}),))
        if problem := conflict(found):
            raise RecipeError(problem[1])
        return recipe

    @property
    def modifiers(self) -> list[Modifier]:
        """In the order in which they are updated: those that end first, then those that start first, then by name."""
        return in_order(self.written)

    @property
    def written(self) -> list[Modifier]:
        """In the order of the text."""
        return [modifier for stage in self.stages for modifier in stage.modifiers]

    @property
    def staged(self) -> bool:
        """True if it has stages with names."""
        return self.stages[0].name is not None

    @property
    def max_epochs(self) -> int:
        """Epochs that training takes: the latest start or end of a modifier, rounded up."""
        return max(0, *(math.ceil(epoch) for m in self.modifiers for epoch in (m.start_epoch, m.end_epoch)))

    @property
    def min_epochs(self) -> int:
        """The earliest start of a modifier that says one, rounded down; 0 where none does."""
        return min((math.floor(m.start_epoch) for m in self.modifiers if m.start_epoch != -1), default=0)

    @property
    def evidence(self) -> Evidence | None:
        """The measurements and rules behind its numbers, where `create_recipe` made it."""
        return Evidence.of(self.metadata)

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of all that it says, defaults included: equal recipes have the same, however they are written."""
        return hashlib.sha256(self._text(everything=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """Its text: tags, the given fields in the order of their declaration, and values in place of `eval(...)`.

        A recipe with evidence has it as comments too: beside the numbers, and summed up before them.
        Reading it gives an equal recipe, and writing that one the same text.
        """
        return self._text()

    def _text(self, *, everything: bool = False) -> str:
        return writer.to_yaml(self.stages, self.variables, self.metadata, everything=everything)

    def __str__(self) -> str:
        return self.to_yaml()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `to_yaml()` to `path`, which is the old file or the new one, never half of either.

        Raises:
            DataFileError: it cannot be written.
        """
        text = self.to_yaml()
        with replacing(path) as temporary:
            temporary.write_bytes(text.encode())

    def check(self, model: nn.Module) -> None:
        """Finds every name of every modifier in `model`, which it leaves as it is.

        Warns of what will not come out as it was probably meant: a share that rounds to nothing, a sparsity that falls.

        Raises:
            TargetError: a name matches nothing in the model, or what it matches cannot be used.
            RecipeError: two pruning modifiers are at work on one parameter at the same time.
        """
        found = self.written
        names = [list(modifier.targets(model)) if modifier.kind == "pruning" else [] for modifier in found]
        for modifier in found:
            if modifier.kind != "pruning":
                modifier.targets(model)
        if problem := conflict(found, names):
            raise RecipeError(problem[1])
        for text in self.doubts(model):
            warnings.warn(text, SparsifyWarning, stacklevel=2)

    def doubts(self, model: nn.Module | None = None) -> list[str]:
        """Sentences on what will not come out as it was probably meant; `check`, `plan` and `modify` say them.

        Args:
            model: leaves out, where it is None, what depends on the model's layers.

        Raises:
            TargetError: a name matches nothing in the model.
        """
        with warnings.catch_warnings():
            # Names that match nothing are said by `check`.
            warnings.simplefilter("ignore", SparsifyWarning)
            return list(dict.fromkeys(text for modifier in self.written for text in modifier.doubts(model)))

    def extended(self, added: Modifiers = None, metadata: Mapping[str, Any] | None = None) -> Recipe:
        """A recipe with more modifiers and more metadata.

        Args:
            added: a modifier, recipe text, or a list of both.
            metadata: put over the metadata that is there.

        Raises:
            RecipeError: they cannot stand together.
            ArgumentError: `metadata` is no mapping.
        """
        if metadata is not None and not isinstance(metadata, Mapping):
            raise ArgumentError(
                f"metadata: {metadata!r} is no mapping; give a dict of what is to be kept with the recipe."
            )
        recipe: Recipe = self
        if metadata is not None:
            kept = recipe.metadata if isinstance(recipe.metadata, Mapping) else {}
            recipe = recipe.model_copy(update={"metadata": {**kept, **metadata}})
            # What cannot be saved is said here, not epochs later.
            recipe.to_yaml()
        modifiers = _modifiers_of(added)
        if not modifiers:
            return recipe
        # Refuses what cannot stand together.
        Recipe.from_modifiers([*recipe.written, *modifiers])
        last = recipe.stages[-1]
        groups = {**last.groups, "added_modifiers": (*last.groups.get("added_modifiers", ()), *modifiers)}
        return recipe.model_copy(update={"stages": (*recipe.stages[:-1], last.model_copy(update={"groups": groups}))})

    @staticmethod
    def json_schema() -> dict[str, Any]:
        """The JSON schema of recipes, every modifier with its fields: editors complete and check recipes with it."""
        return schema.json_schema()

    @staticmethod
    def compose(base: Source, additional: Source, keep_original_epochs: bool = False) -> Recipe:
        """Two recipes as stages of one: `base`, then `additional`.

        The epochs of `additional` are shifted by base.max_epochs, and what has no end in `base` ends there, unless
        `keep_original_epochs`. Two recipes without stages become stage_0 and stage_1; one that follows n stages becomes
        stage_{n + 1}; one before stages becomes pre_{name of the first}.

        Raises:
            RecipeError: two stages would have one name, or two pruning modifiers would work on one parameter.
        """
        first, second = read_recipe(base), read_recipe(additional)
        earlier, later = (compose.whole(r.stages, r.variables, r.metadata) for r in (first, second))
        recipe = Recipe(stages=compose.joined(earlier, later, None if keep_original_epochs else first.max_epochs))
        if problem := conflict(recipe.written):
            raise RecipeError(problem[1])
        return recipe


def read_recipe(source: object, recipe_variables: Variables = None) -> Recipe:
    """A recipe from whatever says one: a path, text, a file object, a list of modifiers, a Recipe, or what has one.

    A text of one line is a path if such a file exists or if it does not look like YAML with modifiers.

    Raises:
        RecipeError: what is wrong with it.
        ArgumentError: `source` is nothing of the kind.
    """
    known = source if isinstance(source, Recipe) else getattr(source, "recipe", None)
    if isinstance(known, Recipe):
        if recipe_variables:
            # They would change the variables and none of the modifiers that were computed from them.
            raise ArgumentError(
                "recipe_variables: this recipe was read already, its variables are resolved. Give them where its text "
                "is read."
            )
        return known
    if isinstance(source, os.PathLike):
        return _read_path(Path(source), recipe_variables)
    if isinstance(source, bytes):
        return _read_text(source, "recipe", recipe_variables)
    if isinstance(source, str):
        if "\n" in source or "\r" in source or ("modifiers" in source and ":" in source and not _is_file(source)):
            return _read_text(source, "recipe", recipe_variables)
        if not source.strip():
            return _read_text("", "recipe", recipe_variables)
        return _read_path(Path(source), recipe_variables)
    read = getattr(source, "read", None)
    if callable(read):
        name = getattr(source, "name", None)
        data = read(grammar.LONGEST_DOCUMENT + 1)
        if not isinstance(data, str | bytes):
            raise ArgumentError(f"recipe: read() of {type(source).__name__} gives {type(data).__name__}, not text.")
        name = name if isinstance(name, str) else "recipe"
        return _read_text(data, Path(name).name, recipe_variables, markdown=name.lower().endswith(".md"))
    if isinstance(source, list | tuple):
        return Recipe.from_modifiers(source)
    raise ArgumentError(
        f"recipe: {grammar.shown(source)} is neither a path, text, a file, a Recipe nor a list of modifiers."
    )


def _modifiers_of(added: object) -> list[Modifier]:
    if added is None or isinstance(added, Modifier):
        return [] if added is None else [added]
    if isinstance(added, list | tuple):
        return [modifier for one in added for modifier in _modifiers_of(one)]
    return read_recipe(added).written


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):
        return False


def _read_path(path: Path, recipe_variables: Variables) -> Recipe:
    try:
        if str(path).startswith("zoo:"):
            raise RecipeFileError(
                f"{path}: stubs of a model zoo are not downloaded; save the recipe and give its path."
            )
        # A device or a pipe might never end.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise RecipeFileError(f"{path} is no file. Give the path of a recipe, or its text.")
        with path.open("rb") as file:
            data = file.read(grammar.LONGEST_DOCUMENT + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, RecipeFileError):
            raise
        why = getattr(error, "strerror", None) or error
        raise RecipeFileError(
            f"cannot read the recipe {grammar.shown(str(path))}: {why}. Give the path of a recipe, or its text."
        ) from None
    return _read_text(data, path.name, recipe_variables, markdown=path.suffix.lower() == ".md")


def _read_text(data: str | bytes, name: str, recipe_variables: Variables, *, markdown: bool = False) -> Recipe:
    try:
        top = grammar.read(data, markdown=markdown)
        variables, metadata, parts = read_parts(top, overrides_of(recipe_variables))
        found = [modifier for part in parts for group in part.groups.values() for modifier in group]
        lines = [line for part in parts for line in part.lines]
        if problem := conflict(found):
            raise grammar.Problem(lines[problem[0]], problem[1])
    except grammar.Problem as problem:
        place = name if problem.line is None else f"{name}:{problem.line}"
        raise RecipeError(f"{place}: {problem.message}") from None
    stages = tuple(
        Stage(
            name=p.name, variables=p.variables, metadata=p.metadata, groups={k: tuple(g) for k, g in p.groups.items()}
        )
        for p in parts
    )
    return Recipe(variables=variables, metadata=metadata, stages=stages)
