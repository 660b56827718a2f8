"""One experiment from its arguments to the finished folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from sparsify.errors import ArgumentError, StateError
from sparsify.experiments.folder import ExperimentFolder, check_experiment_id, folder_name
from sparsify.experiments.result import ExperimentResult
from sparsify.experiments.settings import ExperimentSettings
from sparsify.experiments.tasks import UseCase
from sparsify.optimize.levels import Experiment

__all__ = ["run_experiment"]


def run_experiment(
    kind: Experiment,
    use_case: str | UseCase,
    model: str | None = None,
    data: str | None = None,
    *,
    optim_level: float = 0.5,
    working_dir: str | os.PathLike[str] = ".",
    experiment_id: str | None = None,
    resume: str | os.PathLike[str] | None = None,
    check: bool = False,
    registry: str | os.PathLike[str] | None = None,
    register: str | None = None,
    say: Callable[[str], None] | None = None,
    **options: Any,
) -> ExperimentResult:
    """Compresses a model on data of your own, as the command `sparsify.run` does, and gives the folder and its figures.

    Everything is read and checked before anything is written. A model whose head is new is trained dense first; then it
    is trained by a recipe for the optim level, exported, verified, and measured in onnxruntime beside the dense one.

    Args:
        kind: "training-aware", "one-shot" or "sparse-transfer".
        use_case: a name such as "cv-classification", an alias of it, "package.module:UseCase", or a `UseCase`.
        model: a folder or hub id of transformers, "timm:NAME", "package.module:function", or a .pt file beside
            `factory`. None: sparse transfer takes the one that its registry has for the level.
        data: a folder, a file, or a YOLO yaml.
        optim_level: 0 to 1; see `optim_level`.
        working_dir: the folder in which that of the run is made.
        experiment_id: its name; None: one of the kind, the use case and the time. An unfinished run of this name goes
            on, with the same arguments.
        resume: the folder of an unfinished run, which goes on with its own arguments; all others are left out.
        check: True: everything is read and tried on one batch, nothing is written.
        registry: a folder of models to transfer from; None: `SPARSIFY_REGISTRY`, else one in the user's home.
        register: a name under which the trained float model is filed there.
        say: called with each line of progress; None: nothing is said.
        options: the other fields of the command's flags: `recipe`, `recipe_args`, `factory`, `teacher`, `eval_metric`,
            `at_least`, `train_samples`, `val_samples`, `epochs`, `dense_epochs`, `batch_size`, `learning_rate`,
            `optimizer`, `seed`, `image_size`, `max_length`, `device`, `threads`, `structured`, `distill`, `offline`.

    Raises:
        ArgumentError: an argument that cannot be meant.
        DataError: a sample that cannot be used, with file and line.
        StateError: a run that cannot go on, since its arguments or its data are others.
        ExportError: the model cannot be exported.
    """
    import torch

    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        return _experiment(
            kind,
            use_case,
            model,
            data,
            optim_level=optim_level,
            working_dir=working_dir,
            experiment_id=experiment_id,
            resume=resume,
            check=check,
            registry=registry,
            register=register,
            say=say or (lambda line: None),
            options=options,
        )


def _experiment(
    kind: Experiment,
    use_case: str | UseCase,
    model: str | None,
    data: str | None,
    *,
    optim_level: float,
    working_dir: str | os.PathLike[str],
    experiment_id: str | None,
    resume: str | os.PathLike[str] | None,
    check: bool,
    registry: str | os.PathLike[str] | None,
    register: str | None,
    say: Callable[[str], None],
    options: Mapping[str, Any],
) -> ExperimentResult:
    from sparsify.experiments.running import ExperimentRun

    if resume is not None:
        folder = ExperimentFolder(Path(resume).resolve())
        saved = folder.saved()["arguments"]
        if folder.is_complete:
            raise StateError(f"{folder.path} is complete: there is nothing to go on with.")
        settings = ExperimentSettings.from_plain(saved)
        given = use_case if isinstance(use_case, UseCase) else None
        return _carried_out(ExperimentRun(settings, given, say, registry, register), folder)
    unknown = sorted(set(options) - set(ExperimentSettings.__dataclass_fields__))
    if unknown:
        raise ArgumentError(f"run_experiment: {unknown[0]!r} is no option.")
    name = f"{type(use_case).__module__}:{type(use_case).__qualname__}" if isinstance(use_case, UseCase) else use_case
    if not isinstance(name, str):
        raise ArgumentError(f"use_case: a {type(use_case).__name__} is none; give a name or a UseCase.")
    settings = ExperimentSettings(
        kind=kind, use_case=name, model=model, data=data, optim_level=optim_level, **options
    ).checked()
    run = ExperimentRun(settings, use_case if isinstance(use_case, UseCase) else None, say, registry, register)
    place = Path(working_dir)
    if experiment_id is not None:
        target = place / check_experiment_id(experiment_id)
        if (target / "experiment.yaml").is_file():
            folder = ExperimentFolder(target)
            if folder.is_complete:
                raise ArgumentError(f"{target} is complete and is not overwritten: give another --experiment-id.")
            return _carried_out(run, folder)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ArgumentError(f"{target} is there already and is not overwritten: give another --experiment-id.")
    run.prepare()
    if check:
        return ExperimentResult(None, run.findings())
    if experiment_id is None:
        target = place / folder_name(kind, run.task.short, datetime.now())
    folder = ExperimentFolder.create(target, run.settings, run.about())
    return _carried_out(run, folder)


def _carried_out(run: Any, folder: ExperimentFolder) -> ExperimentResult:
    """Carries the run out; torch's threads are afterwards as they were."""
    with folder.held(), _threads(run.settings.threads):
        result: ExperimentResult = run.carry_out(folder)
    return result


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
