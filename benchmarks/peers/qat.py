"""One method of quantization-aware training on one network, beside the bare step: run by benchmarks/qat_step.py.

    python benchmarks/peers/qat.py METHOD NETWORK [--pairs N] [--memory quantized|bare]

In an environment of its own (benchmarks/peers/METHOD.txt); torch.ao and sparsify in that of sparsify. Prints one line
of JSON. All methods quantize weights and activations to 8 bits, with ranges that are observed (NNCF: learned) at every
step. Times are those of the processor, of this process alone: on one thread nothing waits, and what else runs on the
machine counts less.

Memory is that of tensors, as torch's allocator reports it to the profiler: what is there before a step (parameters,
buffers, the optimizer's state) and the most that the step adds to it at any one time (activations and what backward
keeps of them, quantized weights, gradients). Scratch space inside of operators does not count.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from models import Encoder, mlp, resnet20
from paired import paired


class Whole(nn.Module):
    """A Sequential as a child: what NNCF adds to the model itself would be one of its layers."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "ResNet-20": (resnet20, lambda: torch.randn(32, 3, 32, 32)),
    "encoder": (Encoder, lambda: torch.randint(0, 1000, (8, 128))),
    "MLP": (lambda: Whole(mlp()), lambda: torch.randn(64, 784)),
}
Prepared = tuple[nn.Module, Callable[[], object]]
"""A model that simulates quantization, and what its method wants called before every step."""
Stepper = tuple[Callable[[], None], torch.optim.Optimizer]


def ours(model: nn.Module, inputs: Tensor) -> Prepared:
    from sparsify import ScheduledModifierManager

    manager = ScheduledModifierManager.from_yaml("modifiers:\n  - !QuantizationModifier\n    start_epoch: 0.0\n")
    manager.initialize(model, sample_inputs=(inputs,))
    model.manager = [manager]
    return model, lambda: None


def torch_ao(model: nn.Module, inputs: Tensor) -> Prepared:
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.qconfig import float_qparams_weight_only_qconfig
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    mapping = get_default_qat_qconfig_mapping("x86").set_object_type(nn.Embedding, float_qparams_weight_only_qconfig)
    return prepare_qat_fx(model, mapping, (inputs,)), lambda: None


def coremltools(model: nn.Module, inputs: Tensor) -> Prepared:
    from coremltools.optimize.torch.quantization import (
        LinearQuantizer,
        LinearQuantizerConfig,
        ModuleLinearQuantizerConfig,
    )

    never = 10**6
    config = LinearQuantizerConfig(global_config=ModuleLinearQuantizerConfig(milestones=[0, 0, never, never]))
    quantizer = LinearQuantizer(model, config)
    prepared = quantizer.prepare(example_inputs=(inputs,), inplace=True)
    return prepared, quantizer.step


def nncf(model: nn.Module, inputs: Tensor) -> Prepared:
    import nncf

    return nncf.quantize(model, nncf.Dataset([inputs]), subset_size=1), lambda: None


def brevitas(model: nn.Module, inputs: Tensor) -> Prepared:
    from brevitas.graph.quantize import layerwise_quantize, preprocess_for_quantize, quantize

    try:
        whole = quantize(preprocess_for_quantize(copy.deepcopy(model).eval(), trace_model=True))
        whole(inputs)
    # Whatever its tracer raises, or what it made: with an embedding, an endless recursion. Layer by layer works for
    # every model, and quantizes less.
    except Exception:
        return layerwise_quantize(model), lambda: None
    return whole, lambda: None


METHODS: dict[str, Callable[[nn.Module, Tensor], Prepared]] = {
    "sparsify": ours,
    "torch.ao": torch_ao,
    "coremltools": coremltools,
    "nncf": nncf,
    "brevitas": brevitas,
}


def stepper(model: nn.Module, inputs: Tensor, labels: Tensor, before: Callable[[], object]) -> Stepper:
    """One training step as a function, and its optimizer."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)

    def step() -> None:
        before()
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()

    return step, optimizer


def peak_bytes(model: nn.Module, step: Callable[[], object], optimizer: torch.optim.Optimizer) -> int:
    """The most bytes in tensors at any moment of a step."""
    optimizer.zero_grad()
    lasting: dict[int, int] = {}
    moments = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    for tensor in (*model.parameters(), *model.buffers(), *moments):
        storage = tensor.untyped_storage()
        lasting[storage.data_ptr()] = storage.nbytes()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: float(event["ts"])):
        now += int(event["args"]["Bytes"])
        most = max(most, now)
    return sum(lasting.values()) + most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--pairs", type=int, default=31)
    parser.add_argument("--memory", choices=["quantized", "bare"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    build, batch = NETWORKS[arguments.network]
    model, inputs = build().train(), batch()
    labels = torch.randint(0, 10, (len(inputs),))
    result: dict[str, Any] = {}
    prepared, before = (model, lambda: None)
    # Not where memory is measured: a second model would be in it.
    bare = (lambda: None) if arguments.memory else stepper(copy.deepcopy(model), inputs, labels, lambda: None)[0]
    if arguments.memory != "bare":
        prepared, before = METHODS[arguments.method](model, inputs)
    step, optimizer = stepper(prepared, inputs, labels, before)
    if arguments.memory:
        for _ in range(3):
            step()
        result["peak_mib"] = peak_bytes(prepared, step, optimizer) / 2**20
    else:
        for _ in range(2):
            step()
            bare()
        start = time.process_time()
        bare()
        repeats = max(1, round(0.05 / (time.process_time() - start)))
        ratio = paired(step, bare, pairs=arguments.pairs, repeats=repeats, clock=time.process_time)
        result["ratios"] = ratio.ratios
    print(json.dumps(result))


if __name__ == "__main__":
    main()
