"""The commands of the command line: each is a few lines over a public function.

A command takes the parsed arguments, prints its result and returns an exit code.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify.errors import ArgumentError, SparsifyWarning
from sparsify.output.files import replacing
from sparsify.output.json_values import plain

if TYPE_CHECKING:
    from torch import nn

    from sparsify.optimize import OriginalTraining, PruningSettings
    from sparsify.recipe import Recipe

__all__: list[str] = []

FINE, SHORT = 0, 1
"""Exit codes: all is well; it works but falls short of what was asked."""


def run_analyze(arguments: Namespace) -> int:
    from sparsify.analysis import analyze_model
    from sparsify.optimize.references import file_samples, inputs_of, model_of

    model = model_of(arguments.model)
    inputs = file_samples(model, arguments.input) if isinstance(model, Path) else inputs_of(arguments.input)
    found = analyze_model(model, inputs)
    _say(arguments, found.to_json, lambda: str(found))
    return FINE


def run_report(arguments: Namespace) -> int:
    from sparsify.experiments.run_page import report_page
    from sparsify.experiments.run_report import experiment_report

    found = experiment_report(arguments.folders)
    if arguments.html is not None:
        with replacing(arguments.html) as temporary:
            temporary.write_text(report_page(found), encoding="utf-8")
    _say(arguments, found.to_json, lambda: str(found))
    return FINE


def run_optimize(arguments: Namespace) -> int:
    from sparsify.optimize.measured_recipe import Measurements, recipe_from_measurements
    from sparsify.optimize.references import called, file_samples, inputs_of, model_of, resolve

    if Path(arguments.output).exists() and not arguments.force:
        raise ArgumentError(f"{arguments.output} is there already; give another --output, or --force to replace it.")
    model = model_of(arguments.model)
    inputs = file_samples(model, arguments.input) if isinstance(model, Path) else inputs_of(arguments.input)
    settings, training = _pruning_settings(arguments), _original_training(arguments)
    if inputs is None and (arguments.measure or arguments.goal_ms is not None):
        raise ArgumentError("--measure and --goal-ms run the model: give --input.")
    if inputs is None and arguments.html is not None:
        raise ArgumentError("--html shows what layers compute: give --input.")
    measurements = Measurements(
        data=None if arguments.data is None else called(arguments.data, "--data"),
        criterion=None if arguments.loss is None else resolve(arguments.loss, "--loss"),
        times=arguments.measure,
        goal_ms=arguments.goal_ms,
        batch_size=arguments.batch_size,
        threads=arguments.threads,
    )
    made = recipe_from_measurements(
        model,
        inputs,
        measurements,
        settings=settings,
        training=training,
        structured=arguments.structured,
        optim_level=arguments.level,
        preset=arguments.preset,
        quantize=False if arguments.no_quantize else None,
        distill=arguments.distill,
    )
    if arguments.html is not None:
        made.report(str(arguments.output)).to_html(arguments.html)
    recipe = made.recipe
    recipe.save(arguments.output)
    said = {
        "recipe": str(arguments.output),
        "html": arguments.html,
        "evidence": None if recipe.evidence is None else recipe.evidence.model_dump(mode="json"),
    }
    _say(arguments, lambda: json.dumps(said, indent=2), lambda: f"{recipe.to_yaml()}\nwritten to {arguments.output}")
    return FINE


def _pruning_settings(arguments: Namespace) -> PruningSettings | None:
    from sparsify.optimize import PruningSettings

    if arguments.sparsity is None and arguments.balance is None and not arguments.override:
        return None
    if arguments.goal_ms is not None:
        raise ArgumentError("--goal-ms says how much goes; leave --sparsity, --balance and --override out.")
    given = {"sparsity": arguments.sparsity, "balance": arguments.balance}
    overrides = dict(_parsed_share(text) for text in arguments.override or ())
    return PruningSettings(**{name: value for name, value in given.items() if value is not None}, overrides=overrides)


def _original_training(arguments: Namespace) -> OriginalTraining | None:
    from sparsify.optimize import OriginalTraining

    rates = (arguments.initial_lr, arguments.final_lr)
    if arguments.epochs is not None:
        return OriginalTraining(arguments.epochs, *rates, optimizer=arguments.optimizer)
    if any(rate is not None for rate in rates):
        raise ArgumentError("--initial-lr and --final-lr belong to an original training: give its --epochs too.")
    return None


def _parsed_share(text: str) -> tuple[str, float]:
    name, _, value = text.rpartition("=")
    try:
        share = float(value)
    except ValueError:
        name = ""
    if not name:
        raise ArgumentError(f"--override: {text!r} is not written as layer=sparsity, like layer1.0.conv1=0.8.")
    return name, share


def run_plan(arguments: Namespace) -> int:
    from sparsify.optimize.planning import plan
    from sparsify.optimize.references import inputs_of, torch_model

    model = None if arguments.model is None else torch_model(arguments.model)
    made = plan(
        _recipe(arguments),
        model,
        arguments.steps_per_epoch,
        sample_inputs=inputs_of(arguments.input) if model is not None else None,
        epochs=arguments.epochs,
    )
    if arguments.plot is not None:
        made.plot(arguments.plot)
    _say(arguments, made.to_json, lambda: f"{made}\n\n{made.layers().text()}" if made.weights else str(made))
    return SHORT if arguments.strict and made.warnings else FINE


def run_check(arguments: Namespace) -> int:
    from sparsify.optimize.references import torch_model

    recipe = _recipe(arguments)
    found: dict[str, list[str]] = {}
    doubts = recipe.doubts()
    if arguments.model is not None:
        model = torch_model(arguments.model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", SparsifyWarning)
            recipe.check(model)
        doubts = [str(warning.message) for warning in caught]
        for number, modifier in enumerate(recipe.written):
            names = list(modifier.targets(model))
            found[f"{number + 1}. {type(modifier).__name__}"] = names
    else:
        found = {f"{n + 1}. {type(m).__name__}": m.names() for n, m in enumerate(recipe.written)}
    said = {"max_epochs": recipe.max_epochs, "modifiers": found, "warnings": doubts}

    def text() -> str:
        lines = [f"{arguments.recipe}: fine; {len(found)} modifiers, {recipe.max_epochs:g} epochs"]
        for name, names in found.items():
            what = (
                f": {len(names)} of the model" if names and arguments.model else f": {', '.join(names)}" * bool(names)
            )
            lines.append(f"  {name}{what}")
        return "\n".join([*lines, *(f"warning: {doubt}" for doubt in doubts)])

    _say(arguments, lambda: json.dumps(said, indent=2), text)
    return FINE


def run_schema(arguments: Namespace) -> int:
    from sparsify.recipe import Recipe

    _write(arguments.output, json.dumps(Recipe.json_schema(), indent=2))
    return FINE


def run_convert(arguments: Namespace) -> int:
    _write(arguments.output, _recipe(arguments).to_yaml())
    return FINE


def run_compose(arguments: Namespace) -> int:
    from sparsify.recipe import Recipe

    made = Recipe.compose(Path(arguments.base), Path(arguments.additional), arguments.keep_original_epochs)
    _write(arguments.output, made.to_yaml())
    return FINE


def run_benchmark(arguments: Namespace) -> int:
    from sparsify.onnx.benchmark import benchmark_onnx, compare_onnx

    if arguments.at_most is not None and not 0 < arguments.at_most < math.inf:
        raise ArgumentError(f"--at-most: {arguments.at_most:g} is no time in milliseconds, above 0.")
    if arguments.compare is not None and not Path(arguments.compare).is_file():
        raise ArgumentError(f"--compare: {arguments.compare}: there is no such file.")
    inputs = None
    if arguments.input:
        from sparsify.optimize.references import file_samples

        inputs = file_samples(arguments.file, arguments.input)
    options = {"batch_size": arguments.batch_size, "threads": arguments.threads, "iterations": arguments.iterations}
    found = benchmark_onnx(arguments.file, **options, inputs=inputs)
    ratio = None
    if arguments.compare is not None:
        ratio = compare_onnx(arguments.compare, arguments.file, **options, inputs=inputs)
    said = {"benchmark": plain(found), "compared": None if ratio is None else plain(ratio)}
    lines = [str(found), *([] if ratio is None else [str(ratio)])]
    _say(arguments, lambda: json.dumps(said, indent=2), lambda: "\n".join(lines))
    slow = arguments.at_most is not None and found.latency_p50_ms > arguments.at_most
    if slow:
        print(f"{found.latency_p50_ms:.3f} ms is more than {arguments.at_most:g} ms.", file=sys.stderr)
    return SHORT if slow else FINE


def run_verify(arguments: Namespace) -> int:
    from sparsify.onnx.verify import verify_onnx
    from sparsify.optimize.references import inputs_of

    found = verify_onnx(_trained(arguments), arguments.file, inputs_of(arguments.input))
    _say(arguments, lambda: json.dumps({**plain(found), "ok": found.ok}, indent=2), lambda: str(found))
    return found.exit_code


def run_export(arguments: Namespace) -> int:
    from sparsify.onnx.export import export_onnx
    from sparsify.optimize.references import inputs_of

    inputs = inputs_of(arguments.input)
    found = export_onnx(_trained(arguments), inputs, arguments.output, opset=arguments.opset, packed=arguments.packed)
    _say(arguments, lambda: json.dumps(plain(found), indent=2), lambda: str(found))
    return FINE


def run_one_shot(arguments: Namespace) -> int:
    from sparsify.experiments.compressing import one_shot
    from sparsify.optimize.references import inputs_of, model_of

    pages = [page for page in (arguments.report_html, arguments.report_json) if page is not None]
    for page in pages:
        if not Path(page).resolve().parent.is_dir():
            raise ArgumentError(f"{page}: there is no folder {Path(page).parent}.")
    found = one_shot(
        model_of(arguments.model),
        arguments.data,
        path=arguments.output,
        optim_level=arguments.optim_level,
        recipe=None if arguments.recipe is None else Path(arguments.recipe),
        sample_inputs=inputs_of(arguments.input),
        metric=arguments.metric,
        ignore=arguments.ignore or (),
        scheme=arguments.scheme,
        measure=not arguments.no_measure,
        packed=not arguments.no_pack,
        samples=arguments.samples,
        **_ways_of_reading(arguments),
        opset=arguments.opset,
        threads=arguments.threads,
    )
    if arguments.report_html is not None:
        found.to_html(arguments.report_html)
    if arguments.report_json is not None:
        _write(arguments.report_json, found.to_json())
    _say(arguments, found.to_json, lambda: str(found))
    return FINE


def run_compare(arguments: Namespace) -> int:
    from sparsify.experiments.comparing import PLOTS, compare
    from sparsify.optimize.references import inputs_of, model_of

    if arguments.plot is not None and Path(arguments.plot).suffix not in PLOTS:
        raise ArgumentError(f"{arguments.plot}: a plot is written as .png, .pdf or .svg.")
    found = compare(
        {reference: model_of(reference) for reference in arguments.variants},
        arguments.data,
        arguments.metric,
        levels=arguments.levels,
        samples=arguments.samples,
        sample_inputs=inputs_of(arguments.input),
        **_ways_of_reading(arguments),
        threads=arguments.threads,
        rounds=arguments.rounds,
    )
    if arguments.plot is not None:
        found.plot(arguments.plot)
    _say(arguments, found.to_json, lambda: str(found))
    return FINE


def run_pack(arguments: Namespace) -> int:
    from sparsify.onnx.packing import pack_onnx

    found = pack_onnx(arguments.file, arguments.output, exact_unoptimized=not arguments.no_exact_unoptimized)
    _say(arguments, lambda: json.dumps(plain(found), indent=2), lambda: str(found))
    return FINE


def run_unpack(arguments: Namespace) -> int:
    from sparsify.onnx.packing import unpack_onnx

    print(f"written to {unpack_onnx(arguments.file, arguments.output)}")
    return FINE


# ---------------------------------------------------------------------- what they have in common


def _ways_of_reading(arguments: Namespace) -> dict[str, Any]:
    """Arguments of `one_shot` and `compare` that say how samples are read."""
    from sparsify.experiments.settings import image_size_of

    size = None if arguments.image_size is None else image_size_of(arguments.image_size)
    names = ("mean", "std", "preprocessor", "tokenizer", "max_length")
    return {"image_size": size, **{name: getattr(arguments, name) for name in names}}


def _trained(arguments: Namespace) -> nn.Module:
    """The torch model, with the weights and the structure of a checkpoint where one is given."""
    from sparsify.errors import DataError, DataFileError
    from sparsify.optimize.references import inputs_of, torch_model
    from sparsify.training.manager import ScheduledModifierManager

    model = torch_model(arguments.model)
    if arguments.checkpoint is None:
        return model
    import torch

    path = Path(arguments.checkpoint)
    if not path.is_file():
        raise DataFileError(f"{path}: there is no such file.")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types for a broken file.
        raise DataError(f"{path}: cannot be read as a checkpoint of plain tensors: {error}") from error
    if arguments.recipe is not None:
        manager = ScheduledModifierManager.from_yaml(Path(arguments.recipe))
        state = saved.get("manager") if isinstance(saved, Mapping) else None
        manager.apply_structure(model, state=state, sample_inputs=inputs_of(arguments.input))
    weights = saved["model"] if isinstance(saved, Mapping) and isinstance(saved.get("model"), Mapping) else saved
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: the weights do not fit {type(model).__name__}: {error} A model that was quantized or shrunk by a "
            "recipe needs --recipe too."
        ) from error
    return model.eval()


def _recipe(arguments: Namespace) -> Recipe:
    from sparsify.recipe import Recipe

    variables = dict(_assignment(text) for text in arguments.set or ())
    return Recipe.load(Path(arguments.recipe), variables or None)


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ArgumentError(f"--set: {text!r} is not written as name=value.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _say(arguments: Namespace, as_json: Callable[[], str], as_text: Callable[[], str]) -> None:
    print(as_json() if arguments.json else as_text())


def _write(path: str | None, text: str) -> None:
    """Writes `text` to a file, or to standard output."""
    if path is None:
        print(text.rstrip("\n"))
        return
    with replacing(path) as temporary:
        temporary.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
