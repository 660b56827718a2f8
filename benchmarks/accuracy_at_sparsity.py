"""Accuracy of the same network pruned by each method in the same number of epochs, ours and those of other libraries.

    python benchmarks/accuracy_at_sparsity.py [--seeds 0 1 2 3 4] [--only GM RigL] [--without-peers] [--fresh]

A ResNet-20 on scikit-learn's 8 x 8 digits: 300 of them to train on, shifted by up to a pixel, so that the dense network
is not perfect; 1,497 to test with. Each seed has its own split, initial weights and order of batches, which all
methods share. A dense network is trained for 16 epochs; from its weights every method has 16 epochs of its own, with
the same optimizer and learning rates, and dense training goes on for as many. All convolutions but the first are
pruned; a level is the fraction of zeros in them. Only RigL spreads it over layers by their shapes, and "global", AC/DC
and OBS by one ranking; the others have it in every layer. Structured rows: the same fraction of channels is removed
from every layer, so that all rows of a level compute the same; MACs are counted as the models run.

Peers are installed in environments of their own by pip, from benchmarks/peers/*.txt, below benchmarks/peers/.venvs;
each runs the same task, benchmarks/peers/task.py. Results are kept in outputs/accuracy_at_sparsity, and a second call
goes on where the first was stopped.

Hyper-parameters stand in METHODS. They are the papers' shares of training, scaled to 160 steps; where there was a
choice, it was made on seed 100.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from paired import machine
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent / "peers"))

import task

from sparsify import (
    ACDCPruningModifier,
    GlobalMagnitudePruningModifier,
    GMPruningModifier,
    MovementPruningModifier,
    OBSPruningModifier,
    RigLPruningModifier,
    ScheduledModifierManager,
    StructuredPruningModifier,
)
from sparsify.modifiers.base import Modifier

PEERS = Path(__file__).parent / "peers"
FOLDER = PEERS.parents[1] / "outputs" / "accuracy_at_sparsity"
LEVELS = (0.8, 0.9, 0.95, 0.98)
RAMP: dict[str, Any] = {"init_sparsity": 0.0, "start_epoch": 0.0, "end_epoch": task.PRUNED_BY}
OFTEN = {"update_frequency": task.UPDATE_EVERY}
SELDOM = {"update_frequency": 2.0}

METHODS: dict[str, Callable[..., Modifier]] = {
    "GM": lambda level, **common: GMPruningModifier(final_sparsity=level, **RAMP, **OFTEN, **common),
    "global": lambda level, **common: GlobalMagnitudePruningModifier(final_sparsity=level, **RAMP, **OFTEN, **common),
    # Dense, sparse and dense for three epochs each, then sparse for seven.
    "AC/DC": lambda level, **common: ACDCPruningModifier(
        compression_sparsity=level, start_epoch=0.0, end_epoch=9.0, update_frequency=3.0, **common
    ),
    # Moves for three quarters of training, and first the largest share that the paper tried.
    "RigL": lambda level, **common: RigLPruningModifier(
        final_sparsity=level, start_epoch=0.0, end_epoch=12.0, **OFTEN, **common
    ),
    # Scores gather for two epochs before anything goes.
    "movement": lambda level, **common: MovementPruningModifier(
        final_sparsity=level, init_sparsity=0.0, start_epoch=2.0, end_epoch=12.0, **OFTEN, **common
    ),
    # Five updates, each with new gradients of 128 losses. The network fits its training data and most gradients vanish,
    # so that the default dampening of 1e-7 trusts noise: 2 to 3 points less at 98 %.
    "OBS": lambda level, **common: OBSPruningModifier(
        final_sparsity=level, num_grads=128, damp=1e-3, **RAMP, **SELDOM, **common
    ),
}
STRUCTURED = "structured"
PEER_SCRIPTS = {"coremltools": "coremltools", "Torch-Pruning": "torch_pruning"}
"""Row -> requirements file and environment; the script is `<name>_peer.py`."""
RIVALS = {"coremltools": ("GM", "global"), "Torch-Pruning": (STRUCTURED,)}
"""The row of ours that does the same work, and what a user would take instead."""

Result = dict[str, float]
Job = tuple[str, float, int]
"""Row, level, seed."""


def prepare(folder: Path, seed: int) -> None:
    """The data and the dense weights of a seed, as files that peers read too."""
    path = folder / f"seed_{seed}.pt"
    if path.exists():
        return
    data = task.Digits.load(seed)
    torch.manual_seed(seed)
    model = task.network()
    task.train(model, data, seed, task.DENSE_EPOCHS, task.DENSE_RATE)
    torch.save({"data": vars(data), "weights": model.state_dict()}, path)


def run(folder: Path, row: str, level: float, seed: int) -> Result:
    model, data = task.load(folder, seed)
    modifiers: list[Modifier] = []
    if row == STRUCTURED:
        convolutions = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
        modifiers = [
            StructuredPruningModifier(
                params=convolutions, final_sparsity=level, multiple=1, shrink=True, **RAMP, **SELDOM
            )
        ]
    elif row != "dense":
        modifiers = [METHODS[row](level, params=task.pruned_layers(model))]
    managers: list[ScheduledModifierManager] = []

    def started(optimizer: torch.optim.Optimizer) -> None:
        if modifiers:
            managers.append(ScheduledModifierManager(modifiers))
            managers[0].modify(
                model,
                optimizer,
                steps_per_epoch=task.STEPS_PER_EPOCH,
                grad_sampler=partial(losses, model, data, seed) if row == "OBS" else None,
                sample_inputs=(data.test_x[:2],),
            )

    return task.timed(model, data, seed, started=started, finish=lambda: [m.finalize(model) for m in managers])


def losses(model: nn.Module, data: task.Digits, seed: int, **_: Any) -> Iterator[Tensor]:
    """One training example each, BatchNorm as it infers."""
    random = torch.Generator().manual_seed(seed)
    model.eval()
    try:
        for rows in torch.randperm(len(data.train_x), generator=random).split(1):
            x = task.shifted(data.train_x[rows], random)
            yield F.cross_entropy(model(x), data.train_y[rows])
    finally:
        model.train()


def environment(name: str) -> Path:
    """The Python of a peer's environment, which is made first where it is not there or has other requirements."""
    home, wanted = PEERS / ".venvs" / name, (PEERS / f"{name}.txt").read_text()
    python, done = home / "bin" / "python", home / "installed.txt"
    if not done.exists() or done.read_text() != wanted:
        print(f"installing {name} into {home}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", PEERS / f"{name}.txt"], check=True)
        done.write_text(wanted)
    return python


def run_peer(folder: Path, row: str, jobs: Iterable[Job]) -> Iterator[tuple[Job, Result]]:
    name = PEER_SCRIPTS[row]
    asked = [f"{seed}:{level}" for _, level, seed in jobs]
    command = [environment(name), PEERS / f"{name}_peer.py", folder, *asked]
    with tempfile.TemporaryFile("w+") as complaints:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                result = json.loads(line)
                yield (row, result.pop("level"), result.pop("seed")), result
        if process.returncode:
            complaints.seek(0)
            raise SystemExit(f"{row} failed:\n{complaints.read()}")


class Store:
    """Results by job in a file; what was measured with other settings is not taken up."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = folder / "results.json", dict(settings)
        self.results: dict[Job, Result] = {}
        if self.path.exists():
            saved = json.loads(self.path.read_text())
            if saved["settings"] != self.settings:
                raise SystemExit(f"{folder} holds results of other settings or versions; pass --fresh to drop them.")
            self.results = {(row, level, seed): result for row, level, seed, result in saved["results"]}

    def add(self, job: Job, result: Result) -> None:
        self.results[job] = result
        rows = [[*key, value] for key, value in self.results.items()]
        partial_file = self.path.with_suffix(".part")
        partial_file.write_text(json.dumps({"settings": self.settings, "results": rows}))
        partial_file.replace(self.path)
        print(
            f"seed {job[2]}  {job[1]:<7}{job[0]:15} {result['accuracy']:.2f} %  {result['seconds']:.1f} s", flush=True
        )

    def accuracies(self, row: str, level: float, seeds: Iterable[int]) -> list[float]:
        found = [self.results.get((row, level, seed)) for seed in seeds]
        return [result["accuracy"] for result in found if result is not None]


def figures(values: list[float]) -> str:
    if not values:
        return f"{'-':>14}"
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):6.2f} ({spread:4.2f})".rjust(14)


def table(store: Store, rows: list[str], levels: tuple[float, ...], seeds: list[int], heads: list[str]) -> None:
    print(f"{'':15}" + "".join(f"{head:>14}" for head in heads) + f"{'seeds':>7}{'s a run':>9}")
    for row in rows:
        cells = [store.accuracies(row, 0.0 if row == "dense" else level, seeds) for level in levels]
        if not any(cells):
            continue
        seconds = [r["seconds"] for (name, _, _), r in store.results.items() if name == row]
        print(f"{row:15}" + "".join(figures(cell) for cell in cells), end="")
        print(f"{min(map(len, cells)):7}{statistics.median(seconds):9.1f}")


def comparison(store: Store, peer: str, levels: Iterable[float], seeds: list[int]) -> None:
    """Ours minus theirs, seed by seed: the bar is 0 or more on average."""
    for ours, level in ((ours, level) for ours in RIVALS[peer] for level in levels):
        a, b = (store.accuracies(row, level, seeds) for row in (ours, peer))
        if len(a) != len(b) or not a:
            continue
        differences = [x - y for x, y in zip(a, b, strict=True)]
        mean = statistics.mean(differences)
        error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
        verdict = (
            "reached" if mean >= 0 else "NOT reached" + (", within two standard errors" if mean > -2 * error else "")
        )
        print(f"{ours} minus {peer} at {level:g}: {mean:+.2f} points, standard error {error:.2f}  bar 0: {verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--levels", type=float, nargs="+", default=LEVELS, help="fractions of zeros")
    parser.add_argument("--only", nargs="+", default=[], help="only these rows")
    parser.add_argument("--without-peers", action="store_true", help="installs nothing")
    parser.add_argument("--fresh", action="store_true", help="forgets earlier results")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder, seeds, levels = arguments.folder, arguments.seeds, tuple(arguments.levels)
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.fresh:
        for path in (*folder.glob("seed_*.pt"), folder / "results.json"):
            path.unlink(missing_ok=True)
    # The levels are part of a result's name; all else that is in capitals decides what comes out.
    settings = {name: getattr(task, name) for name in task.__all__ if name.isupper() and name != "CHANNELS_REMOVED"}
    store = Store(folder, {"machine": machine("scikit-learn"), **settings})
    rows = ["dense", *METHODS, "coremltools", STRUCTURED, "Torch-Pruning"]
    if arguments.without_peers:
        rows = [row for row in rows if row not in PEER_SCRIPTS]
    wanted = arguments.only or rows
    channels = tuple(task.CHANNELS_REMOVED)
    for seed in seeds:
        prepare(folder, seed)
        for row in (row for row in rows if row in wanted):
            own = (0.0,) if row == "dense" else channels if row in (STRUCTURED, "Torch-Pruning") else levels
            todo = [job for level in own if (job := (row, level, seed)) not in store.results]
            if row in PEER_SCRIPTS:
                for job, result in run_peer(folder, row, todo) if todo else ():
                    store.add(job, result)
                continue
            for job in todo:
                store.add(job, run(folder, *job))
    report(store, rows, levels, channels, seeds)


def report(
    store: Store, rows: list[str], levels: tuple[float, ...], channels: tuple[float, ...], seeds: list[int]
) -> None:
    print(f"\n{machine('scikit-learn')}")
    for name in PEER_SCRIPTS.values():
        print(f"{name}.txt: " + ", ".join(x for x in (PEERS / f"{name}.txt").read_text().splitlines() if "==" in x))
    print(
        f"{len(seeds)} seeds; {task.DENSE_EPOCHS} dense epochs, then {task.EPOCHS} by each method, of "
        f"{task.STEPS_PER_EPOCH} steps; {task.TRAIN_IMAGES} images to train on\n"
        "accuracy on the test images in percent, mean (standard deviation)"
    )
    flat = [row for row in rows if row not in (STRUCTURED, "Torch-Pruning")]
    table(store, flat, levels, seeds, [f"{level:.0%}" for level in levels])
    model = task.network()
    dense = task.macs(model, task.Digits.load(seeds[0]))
    counts = []
    for level in channels:
        found = {int(r["macs"]) for (row, at, _), r in store.results.items() if row not in flat and at == level}
        counts.append("/".join(f"{count / dense:.1%}" for count in sorted(found)) or "-")
    print("\nchannels removed from every layer, and below it the MACs that are left, of all")
    print(f"{'':15}" + "".join(f"{level:>14.1%}" for level in channels))
    table(store, ["dense", STRUCTURED, "Torch-Pruning"], channels, seeds, counts)
    print()
    comparison(store, "coremltools", levels, seeds)
    comparison(store, "Torch-Pruning", channels, seeds)


if __name__ == "__main__":
    main()
