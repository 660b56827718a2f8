"""A finished model as a folder: its tensors as safetensors, what it is besides them as JSON. No pickle, no manager."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsify.errors import ArgumentError, DataError, DataFileError, SparsifyError, StateError, first_line
from sparsify.model.preserved import restored_on_error
from sparsify.model.signature import check_module
from sparsify.model.wrappers import is_distributed, unwrapped, unwrapping
from sparsify.output.files import read_text
from sparsify.output.folders import adding_to_folder, replacing_folder, whole_folder
from sparsify.output.json_values import EXACT_AND_FINITE, from_json_object, plain
from sparsify.output.tensor_files import DTYPES, TensorFile, file_digest, opened_tensors, write_tensors
from sparsify.recipe import Recipe, read_recipe
from sparsify.training.applied_recipes import note_recipe, recipes_of
from sparsify.training.checkpoint import checksum
from sparsify.training.manager import ScheduledModifierManager
from sparsify.training.model_structure import (
    SavedStructure,
    check_loaded,
    check_structure,
    load_values,
    put_structure,
    saved_values,
    stored_names,
    structure_of,
)

__all__ = ["load_model", "save_model"]

SAVED_FORMAT = "sparsify model"
SAVED_VERSION = 1
TENSORS = "model.safetensors"
DESCRIPTION = "sparsify.json"
CONFIG = "config.json"
LARGEST = 64 * 2**20
"""Bytes of a description: one of a hundred thousand tensors has a quarter of them."""
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flex_attention")
"""The ways in which transformers computes attention, by its names; others are code from elsewhere."""


@dataclass(frozen=True)
class SavedClass:
    """The class of a saved model, for who builds it again; nothing is imported because of it.

    Attributes:
        module: where the class was defined.
        name: its qualified name there.
        architecture: of timm, the name that `timm.create_model` takes.
        attention: of transformers, what computes attention.
    """

    __pydantic_config__ = EXACT_AND_FINITE

    module: str
    name: str
    architecture: str | None = None
    attention: str | None = None

    @property
    def is_of_transformers(self) -> bool:
        """True if the class is one of the package transformers."""
        return self.module.split(".")[0] == "transformers"


@dataclass(frozen=True)
class SavedDescription:
    """The content of `sparsify.json`, in front of which stand its format and version.

    Attributes:
        sparsify, torch: the versions that wrote it.
        model: the class.
        recipes: the recipes that the model has been through.
        files: {a file in the folder: its sha256, or "" where it may be changed}.
        structure: the model without its values.
    """

    __pydantic_config__ = EXACT_AND_FINITE

    sparsify: str
    torch: str
    model: SavedClass
    recipes: tuple[str, ...]
    files: Mapping[str, str]
    structure: SavedStructure


def save_model(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    recipe: Recipe | ScheduledModifierManager | str | None = None,
    extras: Iterable[Any] = (),
    overwrite: bool = False,
) -> Path:
    """Writes a finished model to a folder, from which `load_model` builds it again, exact to the bit.

    The folder holds `model.safetensors` (every parameter and buffer) and `sparsify.json` (quantized layers, removed
    channels, layers that were replaced by the identity, ties, types, layouts, modes, the recipes that made the model).
    Of a Hugging Face model its `config.json` and generation config stand beside them. A folder is the old one or the
    new one, never half of either.

    Args:
        model: pruned, quantized, made smaller, or none of it; a wrapper of DDP or torch.compile is looked through.
        folder: where it is written; folders above it are made.
        recipe: the recipe, kept for the reader; a model that a manager has finalized knows its own.
        extras: objects that are saved beside it by their `save_pretrained(folder)`: a tokenizer, a processor.
        overwrite: whether a folder is written to that holds other files than a saved model's. They stay, but for those
            of the same names.

    Returns:
        The folder.

    Raises:
        ArgumentError: the folder holds something else, or safetensors is not installed.
        StateError: something of the model cannot be saved: sharded, lazy, of a form that safetensors does not have.
        DataFileError: the folder cannot be written. What was there stays as it was.
    """
    inner = unwrapped(check_module(model, "save_model"))
    if any(type(layer).__name__ == "FullyShardedDataParallel" for layer in unwrapping(model)):
        raise StateError(
            "save_model: the model is sharded by FullyShardedDataParallel. Gather its full state_dict into a model "
            "that is not, and save that."
        )
    extras = [extras] if hasattr(extras, "save_pretrained") else list(extras)
    for extra in extras:
        if not callable(getattr(extra, "save_pretrained", None)):
            raise ArgumentError(f"save_model: extras: a {type(extra).__name__} has no save_pretrained(folder).")
    structure = structure_of(inner)
    recipes = _with_recipe(inner, recipe)
    target = Path(folder)
    with _room_for(target, overwrite) as made:
        for extra in extras:
            extra.save_pretrained(str(made))
        if any((made / name).exists() for name in (TENSORS, DESCRIPTION)):
            raise ArgumentError(f"save_model: extras write {TENSORS} or {DESCRIPTION}: save other models elsewhere.")
        _save_configs(inner, made)
        write_tensors(saved_values(inner, structure), made / TENSORS)
        names = sorted(path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file())
        description = SavedDescription(
            sparsify=_version_of("sparsify"),
            torch=str(torch.__version__),
            model=_class_of(inner),
            recipes=recipes,
            files={name: file_digest(made / name) if name in (TENSORS, CONFIG) else "" for name in names},
            structure=structure,
        )
        content = {"format": SAVED_FORMAT, "version": SAVED_VERSION, **_short(plain(description, finite=False))}
        text = json.dumps({**content, "checksum": checksum(content)}, indent=1, allow_nan=False)
        (made / DESCRIPTION).write_text(text, encoding="utf-8")
    return target


def load_model(folder: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """The model that `save_model` wrote, exact to the bit: outputs in eval mode, further training, export.

    Everything is checked before anything is changed, and nothing is unpickled or imported because a file says so.

    Args:
        folder: what `save_model` wrote.
        model: an instance of the saved model's class, built as before it was trained: in float, with all its channels.
            It is converted in place. None: a model of the package transformers is built from the config in the folder.

    Returns:
        `model`, or the one that was built.

    Raises:
        DataError: the folder is missing, or something in it is damaged or no saved model; the message names the file.
        StateError: the model is another one, or not as it was before it was trained; it was not changed.
        ArgumentError: `model` is None and no model of transformers was saved, or safetensors is not installed.
    """
    place = whole_folder(folder)
    path = place / DESCRIPTION
    if not path.is_file():
        what = "there is no such folder" if not place.is_dir() else f"it holds no {DESCRIPTION}"
        raise DataFileError(f"{folder} is no saved model: {what}. Give a folder that save_model wrote.")
    description = _described(path)
    structure = description.structure
    with opened_tensors(place / TENSORS) as tensors:
        _check_tensor_file(tensors, structure, place)
        _check_digest(place / TENSORS, description)
        if model is None:
            model = _built(place, description)
        inner = unwrapped(check_module(model, "load_model"))
        if is_distributed(model):
            raise StateError("load_model: load into the model itself, and wrap it in DistributedDataParallel after.")
        hint = _how_to_build(description.model)
        try:
            check_structure(inner, structure, hint)
            with restored_on_error(inner):
                put_structure(inner, structure)
                check_loaded(inner, structure)
        except SparsifyError as error:
            raise type(error)(f"{place}: {error}") from error
        except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
            raise DataError(
                f"{path}: structure: it cannot be put onto this {type(inner).__name__}: {first_line(e)}. The file was "
                f"changed, or the model is another one. {hint}"
            ) from e
        load_values(
            inner,
            structure,
            lambda name: tensors.tensor(name, DTYPES[structure.tensors[name].dtype], structure.tensors[name].shape),
        )
    _put_attention(inner, description.model.attention)
    for text in description.recipes[len(recipes_of(inner)) :]:
        note_recipe(inner, text)
    return model


# ---------------------------------------------------------------------- written


def _room_for(target: Path, overwrite: bool) -> AbstractContextManager[Path]:
    """Where the files of a saved model are written, to be moved to `target`."""
    held = set(os.listdir(target)) if target.is_dir() else set()
    before = _files_of(target)
    if held and before is None:
        if not overwrite:
            raise ArgumentError(
                f"save_model: {target} holds other files ({', '.join(sorted(held)[:3])}) and no saved model. Give "
                "another folder, or overwrite=True to write among them."
            )
        return adding_to_folder(target, DESCRIPTION)
    return replacing_folder(target, None if before is None else {DESCRIPTION, *before})


def _files_of(folder: Path) -> list[str] | None:
    """The files of the saved model in a folder; None: there is none."""
    try:
        if (folder / DESCRIPTION).stat().st_size > LARGEST:
            return None
        found = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        return list(found["files"]) if found["format"] == SAVED_FORMAT else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _save_configs(model: nn.Module, folder: Path) -> None:
    """The Hugging Face configs of a model, and of no other one."""
    for name in ("config", "generation_config"):
        config: Any = getattr(model, name, None)
        if callable(getattr(config, "save_pretrained", None)):
            config = copy.deepcopy(config)
            if name == "config" and hasattr(config, "architectures"):
                config.architectures = [type(model).__name__]
            config.save_pretrained(str(folder))


def _class_of(model: nn.Module) -> SavedClass:
    from sparsify.pruning.skipped_layers import Skipped
    from sparsify.quantization.conversion import original_type

    cls = original_type(model)
    while issubclass(cls, Skipped):
        cls = cls.__mro__[2]
    known = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    architecture = known.get("architecture") if isinstance(known, Mapping) else None
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return SavedClass(
        cls.__module__,
        cls.__qualname__,
        architecture if isinstance(architecture, str) and cls.__module__.startswith("timm.") else None,
        attention if attention in _ATTENTION else None,
    )


def _with_recipe(model: nn.Module, recipe: Recipe | ScheduledModifierManager | str | None) -> tuple[str, ...]:
    known = recipes_of(model)
    if recipe is None:
        return known
    given = recipe.recipe if isinstance(recipe, ScheduledModifierManager) else read_recipe(recipe)
    text = given.to_yaml()
    return known if text in known else (*known, text)


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def _short(description: dict[str, Any]) -> dict[str, Any]:
    """Without what every second tensor does not have: a description of many tensors is half as long."""
    tensors = description["structure"]["tensors"]
    for name, saved in tensors.items():
        tensors[name] = {key: value for key, value in saved.items() if value is not None and value is not False}
    return description


# ---------------------------------------------------------------------- read


def _described(path: Path) -> SavedDescription:
    try:
        if path.stat().st_size > LARGEST:
            raise DataError(f"{path} has {path.stat().st_size:,} bytes, and no description has more than {LARGEST:,}.")
        found = json.loads(read_text(path), parse_constant=_no_number)
        if not isinstance(found, dict) or found.get("format") != SAVED_FORMAT:
            raise ValueError(f"its format is not {SAVED_FORMAT!r}")
        if found.get("version") != SAVED_VERSION:
            raise ValueError(
                f"its version is {found.get('version')!r}, and this sparsify reads {SAVED_VERSION}: install the one "
                f"that wrote it, {found.get('sparsify')!r}"
            )
        stated = found.pop("checksum", None)
        if checksum(found) != stated:
            raise ValueError("it does not match its checksum: it was damaged or changed")
        return from_json_object(SavedDescription, {k: v for k, v in found.items() if k not in ("format", "version")})
    except OSError as error:
        raise DataFileError(f"cannot read {path}: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, SparsifyError):
            raise
        raise DataError(f"{path} is no description of a saved model: {error}. Save the model again.") from error


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _check_tensor_file(tensors: TensorFile, structure: SavedStructure, place: Path) -> None:
    """Checks that the tensors that the description names are there, and no others."""
    names = stored_names(structure)
    for name in names:
        saved = structure.tensors[name]
        if saved.dtype not in DTYPES:
            raise DataError(f"{place / DESCRIPTION}: structure.tensors.{name}: {saved.dtype!r} is no type of tensors.")
        tensors.check(name, DTYPES[saved.dtype], saved.shape)
    more = sorted(set(tensors.stored) - set(names))
    if more:
        raise DataError(f"{place / TENSORS}: {more[0]!r} is not in {DESCRIPTION}. Save the model again.")


def _check_digest(path: Path, description: SavedDescription) -> None:
    if file_digest(path) != description.files.get(path.name):
        raise DataError(
            f"{path} does not match its checksum in {DESCRIPTION}: it was damaged or changed after it was saved. Save "
            "the model again."
        )


def _how_to_build(saved: SavedClass) -> str:
    made = f"{saved.name}(...) of {saved.module}"
    if saved.architecture is not None:
        made = f"timm.create_model({saved.architecture!r}, ...)"
    return f"Build {made} as it was before it was trained, with the same arguments."


def _built(place: Path, description: SavedDescription) -> nn.Module:
    saved = description.model
    if not saved.is_of_transformers or CONFIG not in description.files:
        raise ArgumentError(
            f"load_model: {place} holds a {saved.name}, and no class is imported because a file names it. "
            f"{_how_to_build(saved)} Pass it: load_model(folder, model)."
        )
    _check_digest(place / CONFIG, description)
    # By name: `integrations` stands above, and is all that imports a framework.
    builder = import_module("sparsify.integrations.transformers_models")
    model: nn.Module = builder.built_from_config(place, saved.name, saved.attention)
    return model


def _put_attention(model: nn.Module, attention: str | None) -> None:
    """Has a model of transformers compute attention by the same function: each has other bits."""
    config: Any = getattr(model, "config", None)
    if attention in _ATTENTION and getattr(config, "_attn_implementation", attention) != attention:
        config._attn_implementation = attention
