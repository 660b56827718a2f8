"""The command line: each command is a few lines over a public function.

Exit codes: 0 all is well; 1 it works but falls short of what was asked; 2 bad input, said in a line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsify.errors import ArgumentError, SparsifyError, SparsifyWarning
from sparsify.output.files import replacing
from sparsify.output.tables import plain

__all__: list[str] = []

FINE, SHORT, BAD = 0, 1, 2

Arguments = argparse.Namespace
Words = argparse.ArgumentParser


def main(words: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    Args:
        words: the words behind `sparsify`; None: those of the process.
    """
    parser = _parser()
    arguments = parser.parse_args(words)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = _warn
        try:
            code = arguments.run(arguments)
            sys.stdout.flush()
        except SparsifyError as error:
            print(f"error: {error}", file=sys.stderr)
            return BAD
        except KeyboardInterrupt:
            print("stopped.", file=sys.stderr)
            return 130
        except BrokenPipeError:
            # Whoever read the output has seen enough. What is still in the buffer must not complain at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FINE
    return int(code)


# ---------------------------------------------------------------------- commands


def _analyze(arguments: Arguments) -> int:
    from sparsify.analysis import analyze_model
    from sparsify.cli.references import inputs_of, model_of

    found = analyze_model(model_of(arguments.model), inputs_of(arguments.input))
    _say(arguments, found.to_json, lambda: str(found))
    return FINE


def _optimize(arguments: Arguments) -> int:
    from sparsify.analysis import analyze_model, loss_profile, performance_profile
    from sparsify.cli.references import called, inputs_of, resolve, torch_model
    from sparsify.optimize import OriginalTraining, PruningSettings, create_recipe, latency_plan

    model, inputs = torch_model(arguments.model), inputs_of(arguments.input)
    settings = None
    if arguments.sparsity is not None or arguments.balance is not None or arguments.override:
        if arguments.goal_ms is not None:
            raise ArgumentError("--goal-ms says how much goes; leave --sparsity, --balance and --override out.")
        given = {"sparsity": arguments.sparsity, "balance": arguments.balance}
        overrides = dict(_parsed_share(text) for text in arguments.override or ())
        settings = PruningSettings(**{n: v for n, v in given.items() if v is not None}, overrides=overrides)
    rates = (arguments.initial_lr, arguments.final_lr)
    training = None
    if arguments.epochs is not None:
        training = OriginalTraining(arguments.epochs, *rates, optimizer=arguments.optimizer)
    elif any(rate is not None for rate in rates):
        raise ArgumentError("--initial-lr and --final-lr belong to an original training: give its --epochs too.")
    if inputs is None and (arguments.measure or arguments.goal_ms is not None):
        raise ArgumentError("--measure and --goal-ms run the model: give --input.")
    if inputs is None and arguments.html is not None:
        raise ArgumentError("--html shows what layers compute: give --input.")
    data = None if arguments.data is None else called(arguments.data, "--data")
    criterion = None if arguments.loss is None else resolve(arguments.loss, "--loss")
    if data is not None and not isinstance(data, list | tuple):
        data = list(data)

    loss = performance = latency = None
    if data is not None:
        whole = arguments.structured or arguments.goal_ms is not None
        loss = loss_profile(model, data, criterion, structured=whole, sample_inputs=inputs)
    if arguments.measure or arguments.goal_ms is not None:
        threads = (arguments.threads,)
        performance = performance_profile(model, inputs, batch_sizes=(arguments.batch_size,), threads=threads)
    if arguments.goal_ms is not None:
        latency = latency_plan(
            model,
            inputs,
            arguments.goal_ms,
            batch_size=arguments.batch_size,
            threads=arguments.threads,
            performance=performance,
            loss=loss,
        )
    analysis = None if inputs is None else analyze_model(model, inputs)
    made = create_recipe(
        model,
        inputs,
        optim_level=arguments.level,
        preset=arguments.preset,
        settings=settings,
        latency_plan=latency,
        analysis=analysis,
        performance=performance,
        loss=None if latency is not None else loss,
        training=training,
        quantize=False if arguments.no_quantize else None,
        distill=arguments.distill,
        structured=True if arguments.structured else None,
    )
    if arguments.html is not None and analysis is not None:
        from sparsify.optimize.screen import Report

        if arguments.structured or latency is not None:
            warnings.warn(
                "the page of --html moves single weights, while the recipe removes channels: take the file, not the "
                "recipe of the page.",
                SparsifyWarning,
                stacklevel=2,
            )
        # A profile of channels does not fit it.
        single = loss_profile(model, progress=False) if loss is None or loss.families else loss
        asked = made.evidence.asked.get("settings") if made.evidence is not None else None
        page = Report.of(
            analysis,
            single,
            performance,
            settings=settings or (None if asked is None else PruningSettings(**asked)),
            training=training,
            recipe=str(arguments.output),
            quantize=any(one.kind == "quantization" for one in made.modifiers),
        )
        page.to_html(arguments.html)
    made.save(arguments.output)
    evidence = made.evidence
    said = {
        "recipe": str(arguments.output),
        "html": arguments.html,
        "evidence": None if evidence is None else evidence.model_dump(mode="json"),
    }
    _say(arguments, lambda: json.dumps(said, indent=2), lambda: f"{made.to_yaml()}\nwritten to {arguments.output}")
    return FINE


def _parsed_share(text: str) -> tuple[str, float]:
    name, _, value = text.rpartition("=")
    try:
        share = float(value)
    except ValueError:
        name = ""
    if not name:
        raise ArgumentError(f"--override: {text!r} is not written as layer=sparsity, like layer1.0.conv1=0.8.")
    return name, share


def _run_plan(arguments: Arguments) -> int:
    from sparsify.cli.references import inputs_of, torch_model
    from sparsify.optimize.planning import plan

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


def _run_check(arguments: Arguments) -> int:
    from sparsify.cli.references import torch_model

    recipe = _recipe(arguments)
    found: dict[str, list[str]] = {}
    if arguments.model is not None:
        model = torch_model(arguments.model)
        recipe.check(model)
        for number, modifier in enumerate(recipe.written):
            names = list(modifier.targets(model))
            found[f"{number + 1}. {type(modifier).__name__}"] = names
    else:
        found = {f"{n + 1}. {type(m).__name__}": m.names() for n, m in enumerate(recipe.written)}
    said = {"max_epochs": recipe.max_epochs, "modifiers": found}

    def text() -> str:
        lines = [f"{arguments.recipe}: fine; {len(found)} modifiers, {recipe.max_epochs:g} epochs"]
        for name, names in found.items():
            what = (
                f": {len(names)} of the model" if names and arguments.model else f": {', '.join(names)}" * bool(names)
            )
            lines.append(f"  {name}{what}")
        return "\n".join(lines)

    _say(arguments, lambda: json.dumps(said, indent=2), text)
    return FINE


def _schema(arguments: Arguments) -> int:
    from sparsify.recipe import Recipe

    _write(arguments.output, json.dumps(Recipe.json_schema(), indent=2))
    return FINE


def _convert(arguments: Arguments) -> int:
    _write(arguments.output, _recipe(arguments).to_yaml())
    return FINE


def _compose(arguments: Arguments) -> int:
    from sparsify.recipe import Recipe

    made = Recipe.compose(Path(arguments.base), Path(arguments.additional), arguments.keep_original_epochs)
    _write(arguments.output, made.to_yaml())
    return FINE


def _run_benchmark(arguments: Arguments) -> int:
    from sparsify.onnx.benchmark import benchmark_onnx, compare_onnx

    options = {"batch_size": arguments.batch_size, "threads": arguments.threads, "iterations": arguments.iterations}
    found = benchmark_onnx(arguments.file, **options)
    ratio = None
    if arguments.compare is not None:
        ratio = compare_onnx(arguments.compare, arguments.file, **options)
    said = {"benchmark": plain(found), "compared": None if ratio is None else plain(ratio)}
    lines = [str(found), *([] if ratio is None else [str(ratio)])]
    _say(arguments, lambda: json.dumps(said, indent=2), lambda: "\n".join(lines))
    slow = arguments.at_most is not None and found.latency_p50_ms > arguments.at_most
    if slow:
        print(f"{found.latency_p50_ms:.3f} ms is more than {arguments.at_most:g} ms.", file=sys.stderr)
    return SHORT if slow else FINE


def _verify(arguments: Arguments) -> int:
    from sparsify.cli.references import inputs_of
    from sparsify.onnx.verify import verify_onnx

    found = verify_onnx(_trained(arguments), arguments.file, inputs_of(arguments.input))
    _say(arguments, lambda: json.dumps({**plain(found), "ok": found.ok}, indent=2), lambda: str(found))
    return FINE if found.ok else SHORT


def _export(arguments: Arguments) -> int:
    from sparsify.cli.references import inputs_of
    from sparsify.onnx.export import export_onnx

    inputs = inputs_of(arguments.input)
    found = export_onnx(_trained(arguments), inputs, arguments.output, opset=arguments.opset)
    _say(arguments, lambda: json.dumps(plain(found), indent=2), lambda: str(found))
    return FINE


# ---------------------------------------------------------------------- what they have in common


def _trained(arguments: Arguments) -> Any:
    """The torch model, with the weights and the structure of a checkpoint where one is given."""
    from sparsify.cli.references import inputs_of, torch_model
    from sparsify.errors import DataError, DataFileError
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
    except Exception as error:  # torch raises whatever comes up in a broken file.
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


def _recipe(arguments: Arguments) -> Any:
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


def _say(arguments: Arguments, as_json: Callable[[], str], as_text: Callable[[], str]) -> None:
    print(as_json() if arguments.json else as_text())


def _write(path: str | None, text: str) -> None:
    """To a file, or to standard output."""
    if path is None:
        print(text.rstrip("\n"))
        return
    with replacing(path) as temporary:
        temporary.write_text(text.rstrip("\n") + "\n", encoding="utf-8")


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


# ---------------------------------------------------------------------- words


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sparsify",
        description="Makes PyTorch models smaller and faster while they train.",
        epilog="A model is package.module:function (called without arguments; the working folder is searched too) or "
        "an ONNX file. Inputs are shapes like 1x3x224x224 or 1x128:int<30522, or package.module:function.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[Arguments], int], text: str, under: Any = commands
    ) -> argparse.ArgumentParser:
        made: Words = under.add_parser(name, help=text, description=text)
        made.set_defaults(run=run)
        return made

    def model(made: Words, *, optional: bool = False) -> None:
        what = "package.module:function" if optional else "package.module:function, or an ONNX file"
        if optional:
            made.add_argument("--model", help=what)
        else:
            made.add_argument("model", help=what)
        made.add_argument("--input", action="append", metavar="SHAPE", help="an input of the model; may be repeated")

    def recipe(made: Words) -> None:
        made.add_argument("recipe", help="a recipe file")
        made.add_argument("--set", action="append", metavar="NAME=VALUE", help="a variable of the recipe")

    def as_json(made: Words) -> None:
        made.add_argument("--json", action="store_true", help="JSON on standard output")

    made = command("analyze", _analyze, "Layers, shapes, parameters, MACs, and what can be compressed.")
    model(made)
    as_json(made)

    made = command("optimize", _optimize, "A recipe for a model, with the evidence for each of its numbers.")
    model(made)
    made.add_argument("--output", default="recipe.yaml", metavar="FILE")
    made.add_argument("--html", metavar="FILE", help="the Optimize screen: a page to change it by hand")
    made.add_argument("--level", type=float, help="how much, 0 to 1; 0.5 where nothing is said")
    made.add_argument("--preset", help="a kind of goal, by its name")
    made.add_argument("--sparsity", type=float, help="average share of zeros, 0 to 1")
    made.add_argument("--balance", type=float, help="1 looks at recovery alone, 0 at performance alone")
    made.add_argument("--override", action="append", metavar="LAYER=SPARSITY", help="one layer by hand")
    made.add_argument("--goal-ms", type=float, help="as fast as this in onnxruntime, with the least loss")
    made.add_argument("--structured", action="store_true", help="whole channels go: the model gets smaller")
    made.add_argument("--no-quantize", action="store_true")
    made.add_argument("--distill", action="store_true", help="the dense model teaches")
    made.add_argument("--data", metavar="REFERENCE", help="gives batches: losses are measured")
    made.add_argument("--loss", metavar="REFERENCE", help="loss of (outputs, target), for --data")
    made.add_argument("--measure", action="store_true", help="layers are timed in onnxruntime")
    made.add_argument("--batch-size", type=int, default=1)
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--epochs", type=float, help="of the original training")
    made.add_argument("--initial-lr", type=float)
    made.add_argument("--final-lr", type=float)
    made.add_argument("--optimizer", default="SGD", help="of the original training")
    as_json(made)

    made = command("plan", _run_plan, "What a recipe will do over the epochs, without training.")
    recipe(made)
    model(made, optional=True)
    made.add_argument("--steps-per-epoch", type=int, help="optimizer steps in an epoch")
    made.add_argument("--epochs", type=float, help="how long training lasts, where that is not the recipe's end")
    made.add_argument("--plot", metavar="FILE", help="draws it, to a .png, .pdf or .svg file")
    made.add_argument("--strict", action="store_true", help="exit code 1 where there are warnings")
    as_json(made)

    made = command("check", _run_check, "Whether a recipe can be read, and its names are in a model.")
    recipe(made)
    made.add_argument("--model", help="package.module:function")
    as_json(made)

    under = commands.add_parser("recipe", help="Recipe files: their schema, conversion, composition.").add_subparsers(
        dest="what", required=True, metavar="WHAT"
    )
    made = command("schema", _schema, "The JSON schema of recipes, for editors.", under)
    made.add_argument("--output", metavar="FILE")
    made = command("convert", _convert, "Rewrites a recipe, also an old one, as sparsify writes it.", under)
    recipe(made)
    made.add_argument("--output", metavar="FILE")
    made = command("compose", _compose, "One recipe after the other, as stages of one.", under)
    made.add_argument("base", help="the recipe that comes first")
    made.add_argument("additional", help="the recipe that follows")
    made.add_argument("--keep-original-epochs", action="store_true", help="do not shift the epochs of the second")
    made.add_argument("--output", metavar="FILE")

    made = command("benchmark", _run_benchmark, "Latency and throughput of an ONNX file in onnxruntime.")
    made.add_argument("file", help="an ONNX file")
    made.add_argument("--batch-size", type=int, default=1)
    made.add_argument("--threads", type=int)
    made.add_argument("--iterations", type=int, default=50)
    made.add_argument("--compare", metavar="FILE", help="how many times faster than this one, in alternating runs")
    made.add_argument("--at-most", type=float, metavar="MS", help="exit code 1 where the median is slower")
    as_json(made)

    def trained(made: Words) -> None:
        model(made)
        made.add_argument("--checkpoint", metavar="FILE", help="weights, or a checkpoint of model and manager")
        made.add_argument("--recipe", metavar="FILE", help="the recipe that the checkpoint was trained by")
        as_json(made)

    made = command("verify", _verify, "Whether onnxruntime computes with a file what the torch model does.")
    trained(made)
    made.add_argument("file", help="the exported ONNX file")
    made = command("export", _export, "A torch model as a checked ONNX file.")
    trained(made)
    made.add_argument("--output", required=True, metavar="FILE")
    made.add_argument("--opset", type=int)
    return parser
