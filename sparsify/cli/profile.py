"""`sparsify profile`: how long each layer takes, and what compressing it costs, before anything is trained."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from sparsify.errors import ArgumentError

__all__: list[str] = []


def add_profile_flags(made: ArgumentParser) -> None:
    """The options of the command; model, inputs and --json are added by the caller."""
    made.add_argument("--performance", action="store_true", help="times only; without this and --loss: both")
    made.add_argument("--loss", action="store_true", help="losses only")
    made.add_argument("--int8", action="store_true", help="times in int8 too")
    made.add_argument("--widths", action="store_true", help="times with fewer channels too; minutes for large models")
    made.add_argument("--data", metavar="REFERENCE", help="gives batches: losses are measured on them")
    made.add_argument("--criterion", metavar="REFERENCE", help="loss of (outputs, target), for --data")
    made.add_argument("--method", choices=["magnitude", "shape", "data", "fisher"], help="of the loss profile")
    made.add_argument("--of", choices=["pruning", "quantization"], default="pruning", help="what losses are of")
    made.add_argument("--batch-size", type=int, default=1)
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--iterations", type=int, default=10, help="calls that are timed")
    made.add_argument("--output", metavar="FOLDER", help="takes performance.json and loss.json, each when it is done")
    made.add_argument("--no-cache", action="store_true", help="times are measured again, also of the same content")


def run_profile(arguments: Namespace) -> int:
    """Measures what is asked for, and prints it as tables or JSON; what is done is kept where it is interrupted."""
    from sparsify.optimize.references import called, inputs_of, model_of, resolve

    times, losses = arguments.performance or not arguments.loss, arguments.loss or not arguments.performance
    model, inputs = model_of(arguments.model), inputs_of(arguments.input)
    file = isinstance(model, Path)
    if file and (arguments.int8 or arguments.widths):
        raise ArgumentError(
            f"{model}: a file is measured as it is; --int8 and --widths need the model, as package.module:function."
        )
    if times and not file and inputs is None:
        raise ArgumentError("times are measured by running the model: give --input, or --loss alone.")
    data = None if arguments.data is None else called(arguments.data, "--data")
    criterion = None if arguments.criterion is None else resolve(arguments.criterion, "--criterion")
    folder = None if arguments.output is None else _folder(arguments.output)
    found: dict[str, Any] = {}

    from sparsify.analysis.loss import loss_profile
    from sparsify.analysis.profiling import WIDTHS, performance_profile

    if times:
        found["performance"] = performance_profile(
            model,
            inputs,
            batch_sizes=(arguments.batch_size,),
            threads=(arguments.threads,),
            quantized=arguments.int8,
            iterations=arguments.iterations,
            cache=not arguments.no_cache,
            widths=WIDTHS if arguments.widths else None,
            progress=True,
        )
    if losses:
        if folder is not None and times:
            found["performance"].save(folder / "performance.json")
        found["loss"] = loss_profile(
            model, data, criterion, of=arguments.of, method=arguments.method, sample_inputs=inputs, progress=True
        )
    for name, profile in found.items() if folder is not None else ():
        profile.save(Path(arguments.output) / f"{name}.json")
    if arguments.json:
        print(json.dumps({name: json.loads(profile.to_json()) for name, profile in found.items()}, indent=1))
    else:
        print("\n\n".join(str(profile) for profile in found.values()))
    return 0


def _folder(path: str) -> Path:
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"--output: the folder {folder} cannot be made: {error.strerror or error}.") from error
    return folder
