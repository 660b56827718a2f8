"""The command `sparsify.run`: its flags, its exit codes, and nothing that `run_experiment` does not have.

Exit codes: 0 all is well; 1 it ended but falls short of what was asked; 2 bad input, said in a line; 130 stopped, and
can go on with --resume.
"""

from __future__ import annotations

import json
import sys
import warnings
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from sparsify.errors import ArgumentError, SparsifyError, first_line
from sparsify.optimize.levels import Experiment
from sparsify.output.json_values import plain

__all__: list[str] = []


def run_command_line(words: Sequence[str] | None = None) -> int:
    """Runs an experiment and returns the exit code.

    Args:
        words: the words behind `sparsify.run`; None: those of the process.
    """
    parser = ArgumentParser(
        prog="sparsify.run",
        description="From a model and a folder of data to a smaller, faster, verified ONNX file.",
        epilog="Exit codes: 0 fine; 1 ended, but short of what was asked; 2 bad input; 130 stopped, goes on with "
        "--resume FOLDER.",
    )
    add_flags(parser)
    arguments = parser.parse_args(words)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = _say_warning
        try:
            return run_arguments(arguments)
        except SparsifyError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("stopped. It goes on with --resume and the folder.", file=sys.stderr)
            return 130


def run_arguments(arguments: Namespace) -> int:
    """Runs the experiment of parsed arguments.

    Raises:
        SparsifyError: what cannot be meant or used.
    """
    from sparsify.experiments.experiment import run_experiment
    from sparsify.experiments.settings import image_size_of, train_kwargs_of

    options = {name: getattr(arguments, name) for name in _OPTIONS if hasattr(arguments, name)}
    if "train_kwargs" in options:
        more = train_kwargs_of(options.pop("train_kwargs"))
        twice = sorted(set(more) & set(options))
        if twice:
            raise ArgumentError(f"train_kwargs: {twice[0]!r} is given by a flag too; give it once.")
        options |= more
    if isinstance(options.get("image_size"), str):
        options["image_size"] = image_size_of(options["image_size"])
    if "recipe_args" in options:
        options["recipe_args"] = _variables(options["recipe_args"])
    if isinstance(options.get("columns"), list):
        options["columns"] = _column_names(options["columns"])
    if arguments.resume is not None:
        told = [name for name in options if name not in _WHERE]
        if arguments.kind is not None or told:
            what = arguments.kind or f"--{told[0].replace('_', '-')}"
            if told:
                raise ArgumentError(f"resume: a run goes on with its own arguments; leave {what} out.")
        kind: Experiment = "training-aware"
    elif arguments.kind is None:
        raise ArgumentError("say what is to be done: one-shot, training-aware or sparse-transfer.")
    else:
        kind = arguments.kind
        if "use_case" not in options:
            raise ArgumentError("use_case: there is none; give --use-case, for example cv-classification.")
    # Standard output is for JSON alone.
    stream = sys.stderr if arguments.json else sys.stdout
    try:
        result = run_experiment(
            kind,
            options.pop("use_case", ""),
            resume=arguments.resume,
            check=arguments.check,
            say=lambda line: print(line, file=stream, flush=True),
            **options,
        )
    except OSError as error:
        if isinstance(error, SparsifyError):
            raise
        where = f"{error.filename}: " if error.filename else ""
        raise ArgumentError(f"{where}{error.strerror or first_line(error)}.") from error
    if arguments.json:
        said = {"folder": None if result.folder is None else str(result.folder), "short": result.short}
        print(json.dumps({**said, **plain(result.figures)}, indent=2))
    elif result.folder is not None:
        print(f"written to {result.folder}: {_files_named(result.folder)}")
    else:
        print("checked: all can be read, the model fits the data; nothing was written")
    return 1 if result.short else 0


def add_flags(parser: ArgumentParser) -> None:
    """Adds the flags of an experiment to a parser."""
    parser.add_argument("kind", nargs="?", metavar="EXPERIMENT", help="training-aware, one-shot or sparse-transfer")

    def flag(name: str, text: str, **options: object) -> None:
        parser.add_argument(f"--{name}", help=text, default=SUPPRESS, **options)  # type: ignore[arg-type]

    flag("use-case", "cv-classification, nlp-sentiment_analysis, ... or package.module:UseCase", metavar="NAME")
    flag("model", "folder, hub id, timm:NAME, package.module:function, or a .pt file with --factory")
    flag("data", "folder, file, YOLO yaml, or a data set of the hub")
    flag("columns", "a column of texts, as text=body; may be repeated", action="append", metavar="ROLE=NAME")
    flag("missing-labels", '"background": images without a label file have no object', metavar="WHAT")
    flag("optim-level", "how much, 0 to 1; 0.5 where nothing is said", type=float, metavar="LEVEL")
    flag("recipe", "a recipe file instead of a level", metavar="FILE")
    flag("recipe-args", "a variable of the recipe; may be repeated", action="append", metavar="NAME=VALUE")
    flag("factory", "package.module:function that builds the model of a .pt file", metavar="REFERENCE")
    flag("teacher", '"self", "none", or a model like --model')
    flag("distill", "the teacher's share of the loss, 0 to 1", type=float, metavar="SHARE")
    flag("eval-metric", "the metric that runs are compared by", metavar="NAME")
    flag("at-least", "exit code 1 where that metric is less", type=float, metavar="VALUE")
    flag("train-samples", "at most so many", type=int, metavar="N")
    flag("val-samples", "at most so many", type=int, metavar="N")
    flag("epochs", "of the training by the recipe", type=int, metavar="N")
    flag("dense-epochs", "of the training before it, for new weights", type=int, metavar="N")
    flag("batch-size", "samples of a step", type=int, metavar="N")
    flag("learning-rate", "the highest", type=float, metavar="RATE")
    flag("optimizer", "AdamW, Adam or SGD")
    flag("seed", "of the split, the order of samples and new weights", type=int, metavar="N")
    flag("image-size", "of images, as 224 or 480x640 (height x width)", metavar="SIZE")
    flag("max-length", "tokens of a text", type=int, metavar="N")
    flag("device", "as torch writes it: cpu, cuda, cuda:1")
    flag("threads", "of torch and of the benchmark", type=int, metavar="N")
    flag("structured", "whole channels go: smaller and faster in every runtime", action="store_true")
    flag("train-kwargs", "JSON of the same fields, by their names in Python", metavar="JSON")
    flag("offline", "nothing is asked from a hub", action="store_true")
    flag("working-dir", "where the run's folder is made; here where nothing is said", metavar="FOLDER")
    flag("experiment-id", "name of the run's folder; an unfinished run of this name goes on", metavar="NAME")
    flag("registry", "folder of models to transfer from", metavar="FOLDER")
    flag("register", "files the trained float model in the registry", metavar="NAME")
    parser.add_argument("--resume", metavar="FOLDER", help="goes on with a run that was stopped")
    parser.add_argument("--check", action="store_true", help="reads and tries everything, writes nothing")
    parser.add_argument("--json", action="store_true", help="the figures as JSON on standard output")


_WHERE = ("registry", "register", "offline")
_OPTIONS = (
    *(
        "use_case",
        "model",
        "data",
        "columns",
        "missing_labels",
        "optim_level",
        "recipe",
        "recipe_args",
        "factory",
        "teacher",
        "distill",
    ),
    *("eval_metric", "at_least", "train_samples", "val_samples", "epochs", "dense_epochs", "batch_size"),
    *("learning_rate", "optimizer", "seed", "image_size", "max_length", "device", "threads", "structured"),
    *("train_kwargs", "offline", "working_dir", "experiment_id", "registry", "register"),
)


def _variables(texts: Sequence[str]) -> dict[str, object]:
    found: dict[str, object] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ArgumentError(f"recipe_args: {text!r} is not written as name=value.")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def _column_names(texts: Sequence[str]) -> dict[str, str]:
    found = dict[str, str]()
    for text in texts:
        role, equals, name = text.partition("=")
        if not equals or not role or not name:
            raise ArgumentError(f"columns: {text!r} is not written as role=name: text=body.")
        found[role] = name
    return found


def _files_named(folder: Path) -> str:
    return ", ".join(
        str(path.relative_to(folder))
        for path in (folder / "deployment" / "model.onnx", folder / "deployment" / "README.md", folder / "metrics.yaml")
    )


def _say_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {message}", file=sys.stderr)
