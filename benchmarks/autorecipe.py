"""Recipes from profiles against one sparsity for all layers, at the same average.

    python benchmarks/autorecipe.py [--model resnet20|resnet18] [--seeds 0 1 2 3 4] [--only uniform data] [--fresh]

scikit-learn's 8 x 8 digits as in accuracy_at_sparsity.py: 300 of them to train on, 1,497 to test with. Each seed has
its own split, initial weights and order of batches, which all rows share. A dense network is trained for 16 epochs.
From its weights create_recipe makes the recipes, which are trained as they are: 18 epochs, pruning from 1 to 11,
learning rates and all (original training: 30 epochs, 0.1 to 0.001). All rows leave the first layer dense and have the
same zeros on average over all others.

    uniform     every layer the same
    magnitude   profile without data
    fisher      profile from gradients of the training images
    data        profile measured on the training images, one layer at a time: how far the outputs move. The
                network fits these images, so their cross entropy says little about a layer

With --latency whole channels go: every channel group the same share, against the widths of a latency plan that takes as
long, both measured in onnxruntime at batch 1 on one thread.

Results are kept in outputs/autorecipe, and a second call goes on where the first was stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from paired import machine
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent / "peers"))

import task
from models import ResNet

from sparsify import Recipe, ScheduledModifierManager, benchmark_onnx, export_onnx
from sparsify.analysis.analyze import analyze_model
from sparsify.analysis.loss import LossProfile, loss_profile
from sparsify.optimize.allocation import pruning_profile
from sparsify.optimize.latency import latency_plan
from sparsify.optimize.layer_curves import curves
from sparsify.optimize.pruning_profiles import PruningProfile, PruningSettings
from sparsify.optimize.recipe_creation import create_recipe
from sparsify.optimize.stages import OriginalTraining

FOLDER = Path(__file__).parents[1] / "outputs" / "autorecipe"
LEVELS = (0.9, 0.95)
CHANNELS = 0.5
"""Of every channel group, in the uniform structured row."""
TRAINING = OriginalTraining(30, 0.1, 0.001)
SETTINGS = PruningSettings(max_sparsity=0.99)
NETWORKS = {
    "resnet20": lambda: task.network(),
    # Blocks and stages of ResNet-18 with half of its channels, 2.8 million weights.
    "resnet18": lambda: ResNet((32, 64, 128, 256), (2, 2, 2, 2), 10, stem="cifar", channels=1),
}
ROWS = ("uniform", "magnitude", "fisher", "data")
LATENCY_ROWS = ("uniform widths", "planned widths")
Result = dict[str, float]


def dense(folder: Path, network: str, seed: int) -> tuple[nn.Module, task.Digits]:
    """The dense network of a seed, trained once."""
    data = task.Digits.load(seed)
    torch.manual_seed(seed)
    model = NETWORKS[network]()
    path = folder / f"{network}_{seed}.pt"
    if not path.exists():
        task.train(model, data, seed, task.DENSE_EPOCHS, task.DENSE_RATE)
        torch.save(model.state_dict(), path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model, data


def profile_of(path: Path, model: nn.Module, data: task.Digits, **options: Any) -> LossProfile:
    """A loss profile on the training images, made once for all levels."""
    if not path.exists():
        labelled = options.get("method") == "fisher"
        batches = [(data.train_x, data.train_y)] if labelled else [data.train_x]
        loss_profile(model, batches, F.cross_entropy if labelled else None, progress=False, **options).save(path)
    return LossProfile.load(path)


def recipe_of(folder: Path, row: str, level: float, model: nn.Module, data: task.Digits, name: str) -> Recipe:
    """The recipe that create_recipe makes of the network; `name` tells its profile from others."""
    sample = data.test_x[:1]
    common: dict[str, Any] = {"training": TRAINING}
    if row in LATENCY_ROWS:
        return structured(folder, row, model, data, common, name)
    loss = None
    if row in ("fisher", "data"):
        loss = profile_of(folder / f"{name}_{row}.json", model, data, method=row)
    settings = replace(SETTINGS, sparsity=level)
    if row != "uniform":
        return create_recipe(model, sample, settings=settings, loss=loss, **common)
    layers = curves(analyze_model(model, sample), None, loss_profile(model, progress=False))
    profile = pruning_profile(layers, settings)
    return create_recipe(model, sample, pruning_profile=evened(profile, level), **common)


def evened(profile: PruningProfile, level: float) -> PruningProfile:
    """The same average, the same in every layer that may be pruned."""
    choices = tuple(replace(c, sparsity=level) if not c.why else replace(c, sparsity=0.0) for c in profile.layers)
    return replace(profile, layers=choices)


def structured(
    folder: Path, row: str, model: nn.Module, data: task.Digits, common: dict[str, Any], name: str
) -> Recipe:
    """Every channel group the same share of channels; or the least loss within the time that this takes."""
    sample = data.test_x[:1]
    if row == "uniform widths":
        profile = create_recipe(model, sample, sparsity=0.75, structured=True, **common)
        params = [name for m in profile.written if m.whole_channels for name in m.names()]
        written = [m for m in profile.written if not m.whole_channels]
        first = next(m for m in profile.written if m.whole_channels)
        even = first.model_copy(update={"params": params, "final_sparsity": CHANNELS})
        return Recipe.from_modifiers([*written, even])
    even = narrowed_by(recipe_of(folder, "uniform widths", 0.0, model, data, name), model, sample)
    goal = latency_of(even, sample)
    path = folder / f"{name}_channels.json"
    loss = profile_of(path, model, data, structured=True, sample_inputs=sample)
    plan = latency_plan(model, sample, goal, loss=loss, int8=False, progress=False)
    return create_recipe(model, sample, latency_plan=plan, **common)


def narrowed_by(recipe: Recipe, model: nn.Module, sample: Tensor) -> nn.Module:
    """A copy in the shape that the recipe gives it."""
    smaller = deepcopy(model)
    ScheduledModifierManager([m for m in recipe.written if m.whole_channels]).apply(smaller, sample_inputs=sample)
    return smaller


def latency_of(model: nn.Module, sample: Tensor) -> float:
    """Median milliseconds in onnxruntime, one image, one thread."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(model.eval(), sample, path)
        return benchmark_onnx(path, threads=1, iterations=400).latency_p50_ms


def train(recipe: Recipe, model: nn.Module, data: task.Digits, seed: int) -> None:
    """By the recipe alone, learning rates too."""
    manager = ScheduledModifierManager(recipe)
    optimizer = task.sgd(model)
    optimizer = manager.modify(model, optimizer, steps_per_epoch=task.STEPS_PER_EPOCH, sample_inputs=data.test_x[:2])
    random = torch.Generator().manual_seed(1000 + seed)
    model.train()
    for _ in range(manager.max_epochs):
        for rows in torch.randperm(len(data.train_x), generator=random).split(task.BATCH):
            optimizer.zero_grad()
            x = task.shifted(data.train_x[rows], random)
            manager.update_loss(F.cross_entropy(model(x), data.train_y[rows])).backward()
            optimizer.step()
    manager.finalize(model)


def zeros(model: nn.Module) -> float:
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)][1:]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def run(folder: Path, network: str, row: str, level: float, seed: int) -> Result:
    begun = time.perf_counter()
    model, data = dense(folder, network, seed)
    found: Result = {"dense": task.accuracy(model, data)}
    recipe = recipe_of(folder, row, level, model, data, f"{network}_{seed}")
    train(recipe, model, data, seed)
    found |= {"accuracy": task.accuracy(model, data), "zeros": zeros(model), "seconds": time.perf_counter() - begun}
    if row in LATENCY_ROWS:
        found["ms"] = latency_of(model, data.test_x[:1])
    return found


def figures(values: list[float], spec: str = "6.2f") -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{spec}} ({spread:.2f})"


def report(results: dict[str, Result], networks: list[str], rows: list[str], levels: list[float]) -> None:
    print(f"\n{machine('scikit-learn')}\naccuracy on the test images in percent, mean (standard deviation) over seeds")
    for network in networks:
        for level in levels:
            of = {row: by_seed(results, network, row, level) for row in rows}
            even = of.get("uniform") or of.get("uniform widths") or {}
            for row, found in of.items():
                if not found:
                    continue
                text = f"{network}  {level or CHANNELS:<5} {row:15} {figures([r['accuracy'] for r in found.values()])}"
                text += f"  dense {figures([r['dense'] for r in found.values()])}"
                text += f"  zeros {statistics.mean(r['zeros'] for r in found.values()):.4f}"
                if "ms" in next(iter(found.values())):
                    text += f"  {figures([r['ms'] for r in found.values()], '.4f')} ms"
                both = [found[s]["accuracy"] - even[s]["accuracy"] for s in found if s in even]
                if len(both) > 1 and not row.startswith("uniform"):
                    error = statistics.stdev(both) / len(both) ** 0.5
                    text += f"  minus uniform {statistics.mean(both):+.2f}, standard error {error:.2f}"
                print(f"{text}  {len(found)} seeds")


def by_seed(results: dict[str, Result], network: str, row: str, level: float) -> dict[int, Result]:
    start = f"{network}/{row}/{level}/"
    return {int(key[len(start) :]): value for key, value in results.items() if key.startswith(start)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(NETWORKS), default=["resnet20"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--levels", type=float, nargs="+", default=list(LEVELS))
    parser.add_argument("--only", nargs="+", default=[], help="only these rows")
    parser.add_argument("--latency", action="store_true", help="whole channels, at the same time in onnxruntime")
    parser.add_argument("--fresh", action="store_true", help="forgets earlier results")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    results: dict[str, Result] = json.loads(path.read_text()) if path.exists() and not arguments.fresh else {}
    rows = list(LATENCY_ROWS if arguments.latency else ROWS)
    levels = [0.0] if arguments.latency else arguments.levels
    for seed in arguments.seeds:
        for network in arguments.model:
            for level in levels:
                for row in arguments.only or rows:
                    key = f"{network}/{row}/{level}/{seed}"
                    if key in results:
                        continue
                    results[key] = run(folder, network, row, level, seed)
                    path.write_text(json.dumps(results, indent=1))
                    print(f"{key}  {results[key]['accuracy']:.2f} %  {results[key]['seconds']:.1f} s", flush=True)
    report(results, arguments.model, arguments.only or rows, levels)


if __name__ == "__main__":
    main()
