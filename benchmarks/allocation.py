"""Time of the pruning profile of a model of 100 layers: a slider has to follow it.

python benchmarks/allocation.py
"""

from __future__ import annotations

import random
import statistics
import time

from sparsify.optimize.allocation import pruning_profile
from sparsify.optimize.layer_curves import LayerCurve
from sparsify.optimize.pruning_profiles import PruningSettings

LAYERS = 100
LEVELS = (10, 30, 100)
CALLS = 15


def layers(levels: int, seed: int = 0) -> list[LayerCurve]:
    """Losses that grow and times that fall, both convex or not, as they come."""
    chance = random.Random(seed)
    found = []
    for number in range(LAYERS):
        at = tuple(0.99 * step / (levels - 1) for step in range(levels))
        losses, ms, weights = [0.0], chance.uniform(0.01, 2.0), chance.randint(100, 10**6)
        for _ in at[1:]:
            losses.append(losses[-1] + chance.random() ** 4)
        times = tuple(ms * max(1 - level, 0.1) for level in at)
        name = f"layer{number}"
        found.append(
            LayerCurve(name, weights, weights, weights * 10, ms, number == 0, False, "", at, tuple(losses), times)
        )
    return found


def main() -> None:
    # The processor's time: pure Python on one thread, and others may be at work on the machine.
    asked = {
        "as it is": PruningSettings(balance=0.5),
        "with filters": PruningSettings(balance=0.5, min_speedup=1.5, min_recovery=0.8),
    }
    print(f"{LAYERS} layers, median (longest) of {CALLS} calls, in ms of the processor")
    for name, settings in asked.items():
        for levels in LEVELS:
            curves, times = layers(levels), []
            for _ in range(CALLS):
                begin = time.process_time()
                pruning_profile(curves, settings)
                times.append(1e3 * (time.process_time() - begin))
            print(f"  {name}, {levels} levels: {statistics.median(times):.1f} ({max(times):.1f})")


if __name__ == "__main__":
    main()
