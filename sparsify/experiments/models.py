"""The model of an experiment: a folder or hub id of transformers, timm, a function of one's own, weights in a .pt file.

The head is made to fit the labels; which weights are new, and have to be trained before anything is pruned, is said.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify.errors import ArgumentError, DataError, DataFileError, SparsifyError, first_line, install_line
from sparsify.experiments.use_cases import KnownUseCase
from sparsify.optimize.references import called

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__: list[str] = []


@dataclass(frozen=True)
class LoadedModel:
    """A model whose head fits the labels.

    Attributes:
        model: on the CPU.
        fresh: names of parameters with random values; a fit of the labels made them, or there were no weights.
        is_of_transformers: whether its forward takes the labels and returns the loss.
        folder: with the tokenizer or preprocessing; a hub id as it is; None where there is none.
        notes: what the user should know, each a line.
    """

    model: nn.Module
    fresh: tuple[str, ...]
    is_of_transformers: bool
    folder: str | None
    notes: tuple[str, ...] = ()


def load_experiment_model(
    source: str, case: KnownUseCase, labels: Sequence[str], *, factory: str | None, offline: bool, seed: int
) -> LoadedModel:
    """The model at `source`.

    Args:
        source: a folder, a hub id, "timm:NAME", "package.module:function", or a .pt file.
        case: what it is for.
        labels: names of the classes; empty for question answering.
        factory: "package.module:function" that builds the model of a .pt file.
        offline: no hub is asked.
        seed: of new weights.

    Raises:
        ArgumentError: there is no such model, or none for this use case.
        DataError: its files are damaged.
    """
    import torch

    torch.manual_seed(seed)
    path = Path(source)
    if path.suffix == ".onnx":
        raise ArgumentError(
            f"model: {source}: an ONNX file cannot be trained; one-shot takes it: sparsify.run one-shot."
        )
    if path.suffix in (".pt", ".pth", ".bin") or factory is not None:
        return _fitted(_from_weights(path, factory), case, labels, source)
    if source.startswith("timm:"):
        return _fitted(_of_timm(source.removeprefix("timm:"), len(labels), offline), case, labels, source)
    if ":" in source and not path.exists():
        return _fitted(called(source, "model"), case, labels, source)
    return _of_transformers(source, case, labels, offline)


def _of_transformers(source: str, case: KnownUseCase, labels: Sequence[str], offline: bool) -> LoadedModel:
    transformers = _imported()
    folder = Path(source)
    if folder.is_file():
        raise ArgumentError(f"model: {source} is a file; give the folder that has config.json.")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ArgumentError(f"model: {source} has no config.json: it is no folder of a model of transformers.")
    if not folder.is_dir() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise DataFileError(f"model: {source}: there is no such folder.")
    local = offline or folder.is_dir()
    auto = getattr(transformers, case.auto_class)
    with quiet_transformers():
        try:
            config = transformers.AutoConfig.from_pretrained(source, local_files_only=local, trust_remote_code=False)
        except Exception as error:  # Hubs, files and versions fail in many ways.
            if folder.is_dir():
                raise DataError(f"{folder / 'config.json'}: {first_line(error)}") from error
            where = "in the local cache, and --offline was given" if offline else "on the hub, or it cannot be reached"
            raise ArgumentError(
                f"model: {source!r} is no folder, and there is no such model {where}: {first_line(error)}"
            ) from error
        before = _labels_of(config)
        if labels and case.reads != "questions":
            config.num_labels = len(labels)
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: number for number, label in enumerate(labels)}
        if folder.is_dir() and not _has_weights(folder):
            try:
                model = auto.from_config(config)
            except Exception as error:  # A config may be of another task, or of no model that is known.
                raise ArgumentError(f"model: {source}: no model for {case.name}: {first_line(error)}") from error
            names = tuple(name for name, _ in model.named_parameters())
            note = f"{source} has a config and no weights: the model begins with random ones."
            return LoadedModel(model, names, True, source, (note,))
        try:
            model, info = auto.from_pretrained(
                source,
                config=config,
                local_files_only=local,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except Exception as error:  # As above; a broken file of weights, too.
            raise ArgumentError(f"model: {source}: no model for {case.name}: {first_line(error)}") from error
    missing = {entry if isinstance(entry, str) else next(iter(entry)) for entry in info.get("mismatched_keys", ())}
    missing |= set(info.get("missing_keys", ()))
    known = [name for name, _ in model.named_parameters()]
    fresh = tuple(name for name in known if name in missing)
    notes = []
    if fresh:
        notes.append(f"new weights: {', '.join(fresh[:4])}{', ...' if len(fresh) > 4 else ''}")
    elif labels and before and before != list(labels):
        notes += _matched_labels(model, before, labels)
    return LoadedModel(model.float(), fresh, True, source, tuple(notes))


def _matched_labels(model: nn.Module, before: Sequence[str], labels: Sequence[str]) -> list[str]:
    """Puts the rows of the head into the order of `labels`, where both have the same names; otherwise says so."""
    import torch

    place = {name.casefold(): number for number, name in enumerate(before)}
    if sorted(place) != sorted(label.casefold() for label in labels):
        return [f"the model calls its classes {', '.join(before[:4])}; they are taken as {', '.join(labels[:4])}."]
    order = torch.tensor([place[label.casefold()] for label in labels])
    base = getattr(model, getattr(model, "base_model_prefix", ""), None)
    inside = set() if base is None else {id(p) for p in base.parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) not in inside and parameter.dim() and parameter.shape[0] == len(labels):
                parameter.copy_(parameter[order])
    return [f"the classes of the head were put into the order of the data: {', '.join(labels[:4])}"]


def _labels_of(config: Any) -> list[str]:
    """The class names of a config; empty where they are the made-up ones."""
    names = [str(name) for _, name in sorted((getattr(config, "id2label", None) or {}).items())]
    return [] if all(name.startswith("LABEL_") for name in names) else names


def _has_weights(folder: Path) -> bool:
    kinds = ("*.safetensors", "pytorch_model*.bin", "*.safetensors.index.json")
    return any(next(folder.glob(kind), None) is not None for kind in kinds)


def _of_timm(name: str, classes: int, offline: bool) -> Any:
    try:
        import timm
    except Exception as error:  # It needs torchvision, whose import may fail in its own ways.
        raise ArgumentError(f"model: timm:{name}: timm cannot be imported: {first_line(error)}") from error
    try:
        return timm.create_model(name, pretrained=not offline, num_classes=classes)
    except Exception as error:  # A name or a network, in many types.
        raise ArgumentError(f"model: timm:{name}: {first_line(error)}") from error


def _from_weights(path: Path, factory: str | None) -> Any:
    import torch

    if factory is None:
        raise ArgumentError(f"model: {path}: weights alone are no model; give --factory package.module:function too.")
    if not path.is_file():
        raise DataFileError(f"model: {path}: there is no such file.")
    model = called(factory, "factory")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types for a broken file.
        raise DataError(f"{path}: cannot be read as weights of plain tensors: {first_line(error)}") from error
    for key in ("state_dict", "model"):
        saved = saved[key] if isinstance(saved, dict) and isinstance(saved.get(key), dict) else saved
    try:
        model.load_state_dict(saved)
    except Exception as error:  # `saved` may be any object.
        raise DataError(f"{path}: the weights do not fit what {factory} builds: {first_line(error)}") from error
    return model


def _fitted(model: Any, case: KnownUseCase, labels: Sequence[str], source: str) -> LoadedModel:
    """A model of any class that classifies images: `model(pixels)` gives logits, one for each label."""
    import torch
    from torch import nn

    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model: {source} gave a {type(model).__name__}; it must give a torch.nn.Module.")
    config: Any = getattr(model, "config", None)
    if hasattr(config, "id2label") and hasattr(model, "base_model_prefix"):
        if labels and config.num_labels != len(labels):
            raise ArgumentError(
                f"model: {source} gives {config.num_labels} classes, the data have {len(labels)}: build it with "
                f"num_labels={len(labels)}."
            )
        return LoadedModel(model, (), True, getattr(config, "name_or_path", "") or None)
    if case.reads != "images":
        raise ArgumentError(
            f"model: {source} is no model of transformers, and {case.name} needs one, whose forward takes labels. One "
            "of your own runs with a use case of your own: --use-case package.module:UseCase."
        )
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and type(m) is nn.Linear]
    if not layers:
        return LoadedModel(model, (), False, None)
    name, last = layers[-1]
    if last.out_features == len(labels):
        return LoadedModel(model, (), False, None)
    new = nn.Linear(last.in_features, len(labels), bias=last.bias is not None)
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, new.to(last.weight.dtype))
    note = f"{name} gave {last.out_features} classes, the data have {len(labels)}: it is a new one"
    fresh = tuple(f"{name}.{parameter}" for parameter, _ in new.named_parameters())
    with torch.no_grad():
        nn.init.normal_(new.weight, std=0.01)
    return LoadedModel(model, fresh, False, None, (note,))


def probe(model: nn.Module, inputs: dict[str, Tensor], source: str) -> Any:
    """Outputs of the model for `inputs`, in eval mode.

    Raises:
        ArgumentError: the forward fails.
    """
    import torch

    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            return model(**inputs)
    except SparsifyError:
        raise
    except Exception as error:  # Any code may stand in a forward.
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
        raise ArgumentError(f"model: {source} fails on a batch of the data ({shapes}): {first_line(error)}") from error
    finally:
        model.train(was)


def _imported() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ArgumentError(f"transformers is not installed: {install_line('experiments')}") from error
    return transformers


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Inside, transformers says errors alone: new weights are said by us."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
