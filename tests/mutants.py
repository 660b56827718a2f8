"""Breaks sparsify in 64 places that matter, one at a time, and runs the tests that should notice.

    python tests/mutants.py [--only SUBSTRING] [--list] [--sound]

A mutant is found by its text, not by its file, and its tests by the base names of their files, so that both may move.
All happens in a copy in a temporary folder; the checkout is never touched. A mutant that its tests let through is a
claim that nobody checks: write the test, or choose the tests that do. Exits with 1 where fewer than 95 % are caught.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NOT_COPIED = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info", "outputs")
PATIENCE = 300
"""Seconds after which a run counts as one that hangs."""
WANTED = 0.95


@dataclass(frozen=True)
class Mutant:
    """One claim, broken."""

    name: str
    """The claim."""
    old: str
    """Text that stands exactly once in the package."""
    new: str
    """What takes its place: valid code that does something else."""
    tests: str
    """What should notice: names of test files, and perhaps -k and an expression."""


# fmt: off
MUTANTS = (
    # ---------------------------------------------------------------------------------------------- masks
    Mutant(
        "of equal weights the first go",
        "go = np.flatnonzero(mask)[:left]", "go = np.flatnonzero(mask)[ties - left :]",
        "pruning/test_masks.py -k 'stable_sort or exact_counts'",
    ),
    Mutant(
        "counts of zeros are rounded, not cut off",
        "round(unit.numel() * _one(sparsity, name))", "int(unit.numel() * _one(sparsity, name))",
        "pruning/test_masks.py -k 'counts_round or exactly_the_rounded'",
    ),
    Mutant(
        "a mask only grows",
        "np.multiply(out, kept, out=out)", "np.multiply(out, self.type(1), out=out)",
        "pruning/test_masks.py -k 'only_grows or stable_sort'",
    ),
    Mutant(
        "masks are applied after the step",
        "self.masker.apply()\n        if run.counts:", "if run.counts:",
        "training/test_optimizers.py -k zero_after_every_step",
    ),
    Mutant(
        "the optimizer forgets what is masked",
        "if value.shape == here.shape and key not in", "if value.is_meta and key not in",
        "pruning/test_masks.py -k 'every_optimizer or without_momentum'",
    ),
    Mutant(
        "loading masks does not change the optimizer's loaded state",
        "self.masker.bind(None)", "self.masker.bind(self._stateful)",
        "training/test_checkpoint.py -k 'any_order or never_stopping'",
    ),
    Mutant(
        "finalize makes zeros of infinite weights too",
        "place.here.masked_fill_(~place.mask, 0.0)", "place.here.mul_(place.mask)",
        "pruning/test_masks.py -k baking",
    ),
    Mutant(
        "a tied weight is found under either name",
        "return [aliases[exact]]", "return [exact]",
        "model/test_targets.py -k every_form",
    ),
    # ---------------------------------------------------------------------------------------------- time
    Mutant(
        "a cubic ramp is cubic",
        "(1.0 - progress) ** 3", "(1.0 - progress) ** 2.9",
        "modifiers/test_schedule.py",
    ),
    Mutant(
        "nothing comes a step early",
        "TOLERANCE = 1e-6", "TOLERANCE = 1.0",
        "modifiers/test_schedule.py",
    ),
    Mutant(
        "a step that is told twice counts once",
        "if not due:\n            # The outer", "if due is None:\n            # The outer",
        "training/test_optimizers.py -k twice",
    ),
    Mutant(
        "a step that GradScaler skips counts for nothing",
        "bool(found_inf.item())", "found_inf.item() < 0.0",
        "training/test_optimizers.py -k mixed_precision",
    ),
    Mutant(
        "the clock stays within the epoch that is marked",
        "min((whole + done) / per_epoch, self._limit)", "(whole + done) / per_epoch",
        "training/test_manager.py -k 'epoch or timer'",
    ),
    Mutant(
        "with other steps in an epoch a resumed run goes on from the epoch",
        'if state["steps_per_epoch"] == self.steps_per_epoch:', 'if state["steps_per_epoch"] is not None:',
        "training/test_checkpoint.py -k another_number",
    ),
    # ---------------------------------------------------------------------------------------------- state
    Mutant(
        "a state of another version is refused",
        'if state["version"] != VERSION', 'if state["version"] is None',
        "training/test_checkpoint.py -k does_not_fit",
    ),
    Mutant(
        "a state that was changed is refused",
        '!= state["checksum"]', 'is state["checksum"]',
        "training/test_checkpoint.py -k 'does_not_fit or flipped'",
    ),
    Mutant(
        "a state in memory is a copy",
        "return value.detach().clone()", "return value.detach()",
        "modifiers/test_sparse_training.py training/test_checkpoint.py -k 'stay_what_they_were or in_memory'",
    ),
    # ---------------------------------------------------------------------------------------------- recipes
    Mutant(
        "a problem is said with its line",
        "else 0) + 1 + self.offset", "else 0) + self.offset",
        "recipe/test_recipe_errors.py",
    ),
    Mutant(
        "an unknown field is refused",
        'defer_build=True, frozen=True, extra="forbid"', 'defer_build=True, frozen=True, extra="ignore"',
        "recipe/test_recipe_errors.py",
    ),
    Mutant(
        "a sparsity beyond 1 is refused",
        "if 0.0 <= value <= 1.0:", "if 0.0 <= value <= 100.0:",
        "modifiers/test_magnitude_pruning.py -k cannot_be_meant",
    ),
    Mutant(
        "large exponents are refused",
        "LARGEST_EXPONENT = 64", "LARGEST_EXPONENT = 6400",
        "recipe/test_expressions.py -k exponents",
    ),
    Mutant(
        "what starts at once starts behind the recipe before it",
        "max(value, 0.0) + offset", "value + offset",
        "recipe/test_compose.py",
    ),
    Mutant(
        "pruning may be handed over at an epoch",
        "if entry[0] < last[1] and last[0] < entry[1]", "if entry[0] <= last[1] and last[0] <= entry[1]",
        "recipe/test_recipe_errors.py -k 'handover or overlap'",
    ),
    Mutant(
        "at one start a schedule beats a set learning rate",
        "(e.start, e.scheduled)", "(e.start, not e.scheduled)",
        "modifiers/test_learning_rate.py -k beats",
    ),
    # ---------------------------------------------------------------------------------------------- channels
    Mutant(
        "channels that meet what stays, stay",
        "if lone.any():", "if lone.all():",
        "pruning/test_labels.py pruning/test_groups.py",
    ),
    Mutant(
        "a grouped convolution loses its groups",
        "layer.groups * shape[0] // old if", "layer.groups if",
        "pruning/test_removal.py",
    ),
    Mutant(
        "the optimizer's state is cut with the weights",
        "if value.shape[d] == parameter.shape[d]", "if value.shape[d] != parameter.shape[d]",
        "pruning/test_removal.py -k masked_model",
    ),
    Mutant(
        "a removal that fails half-way is undone",
        "for back in reversed(undo):", "for back in undo[1:0]:",
        "pruning/test_removal.py -k undone",
    ),
    Mutant(
        "a smaller model that computes something else is not made",
        "_DOUBLE, _SINGLE = 1e-6, 1e-3", "_DOUBLE, _SINGLE = 1e6, 1e6",
        "pruning/test_shrinking.py -k 'something_else or wants or nan'",
    ),
    # ---------------------------------------------------------------------------------------------- training
    Mutant(
        "gradients are taken in their true scale",
        "grad / scale.to(grad.device, grad.dtype)", "grad * scale.to(grad.device, grad.dtype)",
        "modifiers/test_sparse_training.py -k scaler",
    ),
    Mutant(
        "sampled gradients leave the statistics of batches alone",
        "with preserved(model), torch.enable_grad():", "with preserved(model, buffers=False), torch.enable_grad():",
        "modifiers/test_sparse_training.py -k loader_form",
    ),
    Mutant(
        "gradients are the mean over all processes",
        "tensors[name].div_(world_size())", "tensors[name].div_(1)",
        "training/test_ddp.py -k mean",
    ),
    Mutant(
        "distillation has the gradient's size at any temperature",
        "(temperature**2 / rows)", "(temperature / rows)",
        "modifiers/test_distillation.py -k 'formula or dialect'",
    ),
    # ---------------------------------------------------------------------------------------------- quantization
    Mutant(
        "a range reaches over all integers",
        "scale = max(high - low, TINY) / self.last", "scale = max(high - low, TINY) / (self.last + 1)",
        "quantization/test_fake_quantize.py -k moving_average",
    ),
    Mutant(
        "a zero point is the nearest integer",
        "min(round(-low / scale), self.last)", "min(int(-low / scale), self.last)",
        "quantization/test_fake_quantize.py -k 'moving_average or two_paths'",
    ),
    Mutant(
        "halves are rounded to even",
        "((x / scale).round_().add_(offset)", "((x / scale).add_(0.5).floor_().add_(offset)",
        "quantization/test_qdq_ops.py",
    ),
    Mutant(
        "transposed weights have their channels along axis 1",
        "return 1 if isinstance(layer, TRANSPOSED)", "return 0 if isinstance(layer, TRANSPOSED)",
        "quantization/test_deployment.py -k 'agree_to_the_bit or no_float_weights'",
    ),
    Mutant(
        "the mean of a BatchNorm is folded",
        "offset = -mean.float() * factor", "offset = mean.float() * factor",
        "quantization/test_deployment.py -k 'folded or near'",
    ),
    Mutant(
        "what layers share is computed anew for a tensor that was written to",
        "held[0]() is x and held[1] == x._version and", "held[0]() is x and",
        "quantization/test_fake_quantize.py -k 'share or written'",
    ),
    Mutant(
        "percentiles leave outliers out",
        "(1.0 - percentile / 100.0)", "(percentile / 100.0 - 1.0)",
        "quantization/test_observers.py -k percentile",
    ),
    Mutant(
        "a learned step has the gradient of the paper",
        "t.round() - t)", "t - t.round())",
        "quantization/test_learned_step.py -k paper",
    ),
    Mutant(
        "tracing leaves training modes as they were",
        "preserved(model),\n            without_fast_path(),\n            _without",
        "preserved(model, modes=False),\n            without_fast_path(),\n            _without",
        "model/test_trace.py -k stay",
    ),
    Mutant(
        "calibration leaves training modes as they were",
        "with preserved(model, buffers=False, rng=False), torch.no_grad():",
        "with preserved(model, modes=False, buffers=False, rng=False), torch.no_grad():",
        "quantization/test_training.py -k calibration",
    ),
    Mutant(
        "AdaRound goes downhill",
        "logits -= step * first /", "logits += step * first /",
        "oneshot/test_rounding.py",
    ),
    Mutant(
        "GPTQ makes errors good in the columns to come",
        "i + 1 : stop] -= error", "i + 1 : stop] += error",
        "oneshot/test_rounding.py",
    ),
    Mutant(
        "equalizing changes no bit of the function",
        "torch.log2(wanted), 0.0).round())", "torch.log2(wanted), 0.0))",
        "oneshot/test_equalization.py",
    ),
    Mutant(
        "biases take the shift of the mean back",
        "bias.sub_(shift", "bias.add_(shift",
        "oneshot/test_layer_inputs.py -k shift",
    ),
    # ---------------------------------------------------------------------------------------------- files
    Mutant(
        "the batch of a file may be of any size",
        "{0: torch.export.Dim.DYNAMIC}", "{0: torch.export.Dim.STATIC}",
        "onnx/test_export.py -k any_batch_size",
    ),
    Mutant(
        "outputs are called as the user says",
        "[*call.inputs, *outputs]", "[*call.inputs, *outputs[::-1]]",
        "onnx/test_export.py -k names",
    ),
    Mutant(
        "weights of four bits are stored in half a byte",
        "max(DEFAULT_OPSET, best) if opset is None", "DEFAULT_OPSET if opset is None",
        "quantization/test_weights_alone.py -k 'half_as_large or stored_so'",
    ),
    Mutant(
        "only quantizing to the same grid again is nothing",
        "if any(not graph.same_constant(a, b) for a, b in", "if all(not graph.same_constant(a, b) for a, b in",
        "onnx/test_rewrites.py -k same_grid",
    ),
    Mutant(
        "the reference rounds sums as onnxruntime does",
        "np.rint(sums.astype(np.float32) * multiplier)",
        "np.floor(sums.astype(np.float32) * multiplier + np.float32(0.5))",
        "onnx/test_reference.py",
    ),
    Mutant(
        "more than a step of difference is none of rounding",
        "return gap.steps > 1 or", "return gap.steps > 200 or",
        "onnx/test_verify.py -k two_steps",
    ),
    Mutant(
        "the first layer that differs is named",
        "next((tensor.name for tensor in self.tensors if", "next((tensor.name for tensor in self.tensors[::-1] if",
        "onnx/test_verify.py -k first",
    ),
    # ---------------------------------------------------------------------------------------------- figures
    Mutant(
        "the 95th percentile of the latencies is given",
        "np.percentile(times, 95)", "np.percentile(times, 50)",
        "onnx/test_benchmark.py -k percentiles",
    ),
    Mutant(
        "attention multiplies keys and values by their own widths",
        "k.shape[-2] * (q.shape[-1] + v.shape[-1])", "k.shape[-2] * (q.shape[-1] + k.shape[-1])",
        "analysis/test_analyze.py -k narrower",
    ),
    Mutant(
        "why a layer cannot be pruned is said",
        'return str(error).removeprefix("pruning: ")', 'return str(error)[:0]',
        "analysis/test_analyze.py -k cannot_be_pruned",
    ),
    Mutant(
        "the next weights to go are worth their own mean",
        "ordered[last:to].mean()", "ordered[:to].mean()",
        "analysis/test_loss.py -k marginal",
    ),
    Mutant(
        "zeros save no time in what is no layer",
        "scale * (rest + sum(layer.sparse_ms[i]", "scale * (rest * 0.0 + sum(layer.sparse_ms[i]",
        "analysis/test_performance.py -k zeros_save",
    ),
    Mutant(
        "shares go along the lower hull",
        "slope(hull[-2], hull[-1]) >= slope(hull[-1], point)", "slope(hull[-2], hull[-1]) > 1e300",
        "optimize/test_allocation.py",
    ),
    Mutant(
        "level 0.3 prunes",
        "pruned = value >= PRUNES_FROM", "pruned = value > PRUNES_FROM",
        "optimize/test_levels.py",
    ),
    Mutant(
        "a plan's moment is the first step that reaches it",
        "math.ceil(epoch * steps_per_epoch - 1e-6)", "math.floor(epoch * steps_per_epoch + 1e-6)",
        "optimize/test_planning.py",
    ),
    # ---------------------------------------------------------------------------------------------- the rest
    Mutant(
        "only near names are suggested",
        "cutoff=0.6)", "cutoff=0.0)",
        "recipe/test_recipe_errors.py -k wrong_field",
    ),
    Mutant(
        "a file is written beside the one that it replaces",
        "tempfile.mkstemp(dir=target.parent,", "tempfile.mkstemp(dir=None,",
        "output/test_files.py -k content",
    ),
)
# fmt: on


class Stray(Exception):
    """A mutant that does not fit the repository."""


@dataclass(frozen=True)
class Run:
    """What the tests said."""

    verdict: str
    """"caught", "SURVIVED" or "broken mutant"."""
    by: str
    """The first test that failed, or what came in between."""
    seconds: float


class Copy:
    """A copy of the repository in a temporary folder, in which one mutant at a time stands."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / ROOT.name
        shutil.copytree(ROOT, self.root, ignore=NOT_COPIED)
        self.sources = {path: path.read_text(encoding="utf-8") for path in sorted(self.root.glob("sparsify/**/*.py"))}
        # Before the editable install, in processes that tests start as well. No bytecode: its time stamps have seconds.
        self.environment = {**os.environ, "PYTHONPATH": str(self.root), "PYTHONDONTWRITEBYTECODE": "1"}
        self.environment.setdefault("OMP_NUM_THREADS", "1")
        where = "import sparsify; print(sparsify.__file__)"
        found = subprocess.run([sys.executable, "-c", where], **self._there()).stdout.strip()
        if not Path(found).is_relative_to(self.root):
            raise Stray(f"what would be tested is not the copy in {self.root} but {found or 'nothing'}")

    def place(self, mutant: Mutant) -> Path:
        """The one file in which its text stands."""
        found = [path for path, text in self.sources.items() for _ in range(text.count(mutant.old))]
        if len(found) != 1:
            names = ", ".join(str(path.relative_to(self.root)) for path in dict.fromkeys(found))
            raise Stray(f"{mutant.name!r}: {mutant.old!r} stands {len(found)} times in sparsify/ {names}".strip())
        return found[0]

    def arguments(self, mutant: Mutant) -> list[str]:
        """Its tests as pytest's arguments."""
        found = []
        for word in shlex.split(mutant.tests):
            paths = sorted(self.root.glob(f"tests/**/{word}")) if word.endswith(".py") else [word]
            if len(paths) != 1:
                raise Stray(f"{mutant.name!r}: there are {len(paths)} files {word} below tests/")
            found.append(str(paths[0]))
        return found

    def run(self, mutant: Mutant, *, mutated: bool = True) -> Run:
        """What its tests say to it; without `mutated`, to the code as it is."""
        path = self.place(mutant)
        pytest = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-n", "0"]
        start = time.perf_counter()
        if mutated:
            path.write_text(self.sources[path].replace(mutant.old, mutant.new), encoding="utf-8")
        try:
            done = subprocess.run([*pytest, *self.arguments(mutant)], timeout=PATIENCE, **self._there())
        except subprocess.TimeoutExpired:
            return Run("broken mutant", f"no end after {PATIENCE} s", time.perf_counter() - start)
        finally:
            path.write_text(self.sources[path], encoding="utf-8")
        seconds = time.perf_counter() - start
        failed = re.search(r"^(?:FAILED|ERROR) (?:\S*/)?(\S+?\.py\S*.*?)(?: - |$)", done.stdout, re.MULTILINE)
        by = failed[1] if failed else f"exit code {done.returncode}"
        if done.returncode == 0:
            return Run("SURVIVED", mutant.tests, seconds)
        unsound = re.search(r"^E +(?:Import|ModuleNotFound|Syntax|Indentation|Name)Error\b", done.stdout, re.MULTILINE)
        return Run("broken mutant" if done.returncode != 1 or unsound else "caught", by, seconds)

    def _there(self) -> dict[str, Any]:
        return {"cwd": self.root, "env": self.environment, "capture_output": True, "text": True}


def main() -> int:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="mutants with this in their name")
    parser.add_argument("--list", action="store_true", help="say where they stand, and run nothing")
    parser.add_argument("--sound", action="store_true", help="first see that the tests pass on the code as it is")
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if options.only in mutant.name]
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        try:
            copy = Copy(Path(folder))
            places = {mutant: copy.place(mutant).relative_to(copy.root) for mutant in chosen if copy.arguments(mutant)}
        except Stray as stray:
            print(stray, file=sys.stderr)
            return 2
        if options.list:
            print("\n".join(f"{mutant.name}  ({place}; {mutant.tests})" for mutant, place in places.items()))
            return 0
        for mutant in {one.tests: one for one in chosen}.values() if options.sound else ():
            run = copy.run(mutant, mutated=False)
            if run.verdict != "SURVIVED":
                print(f"{mutant.tests} does not pass on the code as it is: {run.by}", flush=True)
        caught = 0
        for mutant in chosen:
            run = copy.run(mutant)
            caught += run.verdict == "caught"
            print(f"{run.verdict:13}  {run.seconds:5.1f} s  {mutant.name}  ({run.by})", flush=True)
    print(f"caught {caught} of {len(chosen)}")
    return 0 if caught >= WANTED * len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
