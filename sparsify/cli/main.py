"""The command line `sparsify`: its words, and `main`, which runs one command.

Exit codes: 0 all is well; 1 it works but falls short of what was asked; 2 bad input, said in a line.
"""

from __future__ import annotations

import os
import sys
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence

from sparsify import __version__
from sparsify.cli import commands
from sparsify.cli.commands import FINE
from sparsify.cli.doctor import other_product, run_doctor
from sparsify.cli.profile import add_profile_flags, run_profile
from sparsify.errors import SparsifyError
from sparsify.experiments.command import add_flags, run_arguments

__all__: list[str] = []

BAD = 2
"""The exit code of bad input."""


def main(words: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    Args:
        words: the words behind `sparsify`; None: those of the process.
    """
    parser = _parser()
    arguments = parser.parse_args(words)
    other = other_product()
    if other is not None:
        print(f"warning: {other}", file=sys.stderr)
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
            # The reader closed the pipe (as `head` does). Flushing the buffer at exit must not fail again:
            # https://docs.python.org/3/library/signal.html#note-on-sigpipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FINE
    return int(code)


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="sparsify",
        description="Makes PyTorch models smaller and faster while they train.",
        epilog="A model is package.module:function (called without arguments; the working folder is searched too) or "
        "an ONNX file. Inputs are shapes like 1x3x224x224 or 1x128:int<30522, or package.module:function.",
    )
    parser.add_argument("--version", action="version", version=f"sparsify {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str,
        run: Callable[[Namespace], int],
        text: str,
        add: Callable[..., ArgumentParser] = subparsers.add_parser,
    ) -> ArgumentParser:
        made = add(name, help=text, description=text)
        made.set_defaults(run=run)
        return made

    def model(made: ArgumentParser, *, optional: bool = False) -> None:
        what = "package.module:function" if optional else "package.module:function, or an ONNX file"
        if optional:
            made.add_argument("--model", help=what)
        else:
            made.add_argument("model", help=what)
        made.add_argument("--input", action="append", metavar="SHAPE", help="an input of the model; may be repeated")

    def recipe(made: ArgumentParser) -> None:
        made.add_argument("recipe", help="a recipe file")
        made.add_argument("--set", action="append", metavar="NAME=VALUE", help="a variable of the recipe")

    def as_json(made: ArgumentParser) -> None:
        made.add_argument("--json", action="store_true", help="JSON on standard output")

    made = command("analyze", commands.run_analyze, "Layers, shapes, parameters, MACs, and what can be compressed.")
    model(made)
    as_json(made)

    made = command(
        "optimize", commands.run_optimize, "A recipe for a model, with the evidence for each of its numbers."
    )
    model(made)
    made.add_argument("--output", default="recipe.yaml", metavar="FILE")
    made.add_argument("--force", action="store_true", help="replaces a recipe that is there already")
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

    made = command("profile", run_profile, "Times of layers in onnxruntime, and losses of compressing each.")
    model(made)
    add_profile_flags(made)
    as_json(made)

    made = command("run", run_arguments, "An experiment: a model and data in, a smaller, verified ONNX file out.")
    add_flags(made)

    made = command("report", commands.run_report, "Runs of `sparsify run` side by side: metric, zeros, size, speed.")
    made.add_argument("folders", nargs="+", metavar="FOLDER", help="of a run, or in which runs are")
    made.add_argument("--html", metavar="FILE", help="a page with the same table")
    as_json(made)

    made = command("plan", commands.run_plan, "Lays a recipe out over the epochs, without training.")
    recipe(made)
    model(made, optional=True)
    made.add_argument("--steps-per-epoch", type=int, help="optimizer steps in an epoch")
    made.add_argument("--epochs", type=float, help="how long training lasts, where that is not the recipe's end")
    made.add_argument("--plot", metavar="FILE", help="draws it, to a .png, .pdf or .svg file")
    made.add_argument("--strict", action="store_true", help="exit code 1 where there are warnings")
    as_json(made)

    made = command("check", commands.run_check, "Checks that a recipe can be read, and that its names are in a model.")
    recipe(made)
    made.add_argument("--model", help="package.module:function")
    as_json(made)

    files = subparsers.add_parser("recipe", help="Recipe files: their schema, conversion, composition.")
    add = files.add_subparsers(dest="what", required=True, metavar="WHAT").add_parser
    made = command("schema", commands.run_schema, "The JSON schema of recipes, for editors.", add)
    made.add_argument("--output", metavar="FILE")
    made = command("convert", commands.run_convert, "Rewrites a recipe, also an old one, as sparsify writes it.", add)
    recipe(made)
    made.add_argument("--output", metavar="FILE")
    made = command("compose", commands.run_compose, "One recipe after the other, as stages of one.", add)
    made.add_argument("base", help="the recipe that comes first")
    made.add_argument("additional", help="the recipe that follows")
    made.add_argument("--keep-original-epochs", action="store_true", help="do not shift the epochs of the second")
    made.add_argument("--output", metavar="FILE")

    made = command("benchmark", commands.run_benchmark, "Latency and throughput of an ONNX file in onnxruntime.")
    made.add_argument("file", help="an ONNX file")
    made.add_argument("--input", action="append", metavar="INPUT", help="a shape, NAME=SHAPE or FILE.npz")
    made.add_argument("--batch-size", type=int, default=1)
    made.add_argument("--threads", type=int)
    made.add_argument("--iterations", type=int, default=50)
    made.add_argument("--compare", metavar="FILE", help="how many times faster than this one, in alternating runs")
    made.add_argument("--at-most", type=float, metavar="MS", help="exit code 1 where the median is slower")
    as_json(made)

    def trained(made: ArgumentParser) -> None:
        model(made)
        made.add_argument("--checkpoint", metavar="FILE", help="weights, or a checkpoint of model and manager")
        made.add_argument("--recipe", metavar="FILE", help="the recipe that the checkpoint was trained by")
        as_json(made)

    made = command(
        "verify", commands.run_verify, "Compares the results of a file in onnxruntime with the torch model's."
    )
    trained(made)
    made.add_argument("file", help="the exported ONNX file")
    made = command("export", commands.run_export, "A torch model as a checked ONNX file.")
    trained(made)
    made.add_argument("--output", required=True, metavar="FILE")
    made.add_argument("--opset", type=int)
    made.add_argument("--packed", action="store_true", help="zeros and palettes stored as such, as `pack` does")

    def samples(made: ArgumentParser, count: int) -> None:
        made.add_argument("--data", metavar="WHERE", help="folder or file of samples, or package.module:function")
        made.add_argument("--metric", help="accuracy, or package.module:function of (outputs, labels)")
        made.add_argument("--samples", type=int, default=count, help="at most so many")
        made.add_argument("--image-size", metavar="SIZE", help="of images: 224, or 480x640")
        made.add_argument("--mean", type=float, nargs="+", help="of the channels of images, 0 to 1")
        made.add_argument("--std", type=float, nargs="+")
        made.add_argument("--preprocessor", metavar="FOLDER", help="with the preprocessor_config.json of images")
        made.add_argument("--tokenizer", metavar="FOLDER", help="of texts")
        made.add_argument("--max-length", type=int, help="tokens of a text")
        made.add_argument("--threads", type=int, default=1, help="of onnxruntime, for the times")
        as_json(made)

    made = command(
        "one-shot", commands.run_one_shot, "A trained model or an ONNX file, pruned and in INT8 without training."
    )
    model(made)
    made.add_argument("--output", required=True, metavar="FILE")
    made.add_argument("--optim-level", type=float, default=0.5, help="0 to 1: how much")
    made.add_argument("--recipe", metavar="FILE", help="a recipe instead of the level")
    made.add_argument("--ignore", action="append", metavar="LAYER", help="stays in float and dense; may be repeated")
    made.add_argument("--scheme", help="of quantization, by its name: weight_only, ...")
    made.add_argument("--no-measure", action="store_true", help="all that can be is quantized, whatever its time")
    made.add_argument("--no-pack", action="store_true", help="zeros and palettes stored as other values")
    made.add_argument("--opset", type=int)
    made.add_argument("--report-html", metavar="FILE", help="the report as a page")
    made.add_argument("--report-json", metavar="FILE")
    samples(made, 256)

    made = command("compare", commands.run_compare, "Accuracy, size and time of files and models beside the first.")
    made.add_argument("variants", nargs="+", metavar="MODEL", help="ONNX files or package.module:function, dense first")
    made.add_argument("--input", action="append", metavar="SHAPE", help="an input of a model; may be repeated")
    made.add_argument("--levels", type=float, nargs="+", default=(), help="compresses the first at these, and compares")
    made.add_argument("--rounds", type=int, default=21, help="of all files in turn")
    made.add_argument("--plot", metavar="FILE", help="the trade-off, as a .png, .pdf or .svg file")
    samples(made, 256)

    made = command("pack", commands.run_pack, "An ONNX file in fewer bytes, with the same outputs to the bit.")
    made.add_argument("file", help="an ONNX file")
    made.add_argument("--output", required=True, metavar="FILE")
    made.add_argument(
        "--no-exact-unoptimized",
        action="store_true",
        help="float weights of products too: without onnxruntime's optimizations the last bits of outputs differ then",
    )
    as_json(made)
    made = command("unpack", commands.run_unpack, "The plain file that a packed one was made of.")
    made.add_argument("file", help="a packed ONNX file")
    made.add_argument("--output", required=True, metavar="FILE")

    made = command("doctor", run_doctor, "Versions, processor and threads here, and what has to be mended.")
    as_json(made)
    return parser
