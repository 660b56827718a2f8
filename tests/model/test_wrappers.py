"""Wrappers in any nesting are looked through: by the functions themselves, and by all that is given a wrapped model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from sparsify.analysis.analyze import analyze_model
from sparsify.model.targets import named_modules, named_parameters, resolve_layers
from sparsify.model.wrappers import by_clean_name, clean_name, is_compiled, is_distributed, unwrapped, unwrapping
from sparsify.oneshot.quantize import quantize_model
from sparsify.onnx.export import export_onnx
from sparsify.onnx.verify import verify_onnx

# torch warns about its own insides while it compiles, and says that FSDP1 has a successor.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

Wrap = Callable[[nn.Module], nn.Module]


@pytest.fixture(scope="module", autouse=True)
def _process_group() -> Iterator[None]:
    """A world of one process that sends nothing, as DistributedDataParallel and FSDP ask for one."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def sharded(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


class Fabric(nn.Module):
    """The module that Lightning's Fabric gives, by its structure: what is called, and what the user gave."""

    def __init__(self, forward_module: nn.Module, original_module: nn.Module) -> None:
        super().__init__()
        self._forward_module, self._original_module = forward_module, original_module

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_module(x)  # type: ignore[no-any-return]


class Engine(nn.Module):
    """A strategy's wrapper that nobody here knows, as DeepSpeed's."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.engine = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.engine(x)  # type: ignore[no-any-return]


class GradSampleModule(nn.Module):
    """That of opacus, by its structure."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self._module = inner

    def forward(self, x: Tensor) -> Tensor:
        return self._module(x)  # type: ignore[no-any-return]


class DeepSpeedEngine(nn.Module):
    """That of DeepSpeed, by its structure."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.module = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)  # type: ignore[no-any-return]


def by_opacus(model: nn.Module) -> nn.Module:
    return pytest.importorskip("opacus").GradSampleModule(model)  # type: ignore[no-any-return]


def by_lightning(model: nn.Module) -> nn.Module:
    fabric = pytest.importorskip("lightning.fabric")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fabric.Fabric(accelerator="cpu", devices=1).setup(model)  # type: ignore[no-any-return]


# How a model is wrapped; whether that is distributed, and whether it is compiled.
WRAPS: dict[str, tuple[Wrap, bool, bool]] = {
    "none": (lambda m: m, False, False),
    "DataParallel": (nn.DataParallel, False, False),
    "DDP": (DistributedDataParallel, True, False),
    "compile": (compiled, False, True),
    "compile in place": (compiled_in_place, False, True),
    "FSDP": (sharded, False, False),
    "checkpointed": (checkpoint_wrapper, False, False),
    "Fabric": (lambda m: Fabric(m, m), False, False),
    "Fabric, DDP": (lambda m: Fabric(DistributedDataParallel(m), m), True, False),
    "Fabric, compiled": (lambda m: Fabric(compiled(m), m), False, True),
    "Fabric, unknown": (lambda m: Fabric(Engine(m), m), False, False),
    "Lightning's own": (by_lightning, False, False),
    "GradSampleModule": (GradSampleModule, False, False),
    "opacus' own": (by_opacus, False, False),
    "DeepSpeed's engine": (DeepSpeedEngine, False, False),
    "DeepSpeed of compiled": (lambda m: DeepSpeedEngine(compiled(m)), False, True),
    "compiled DDP": (lambda m: compiled(DistributedDataParallel(m)), True, True),
    "DDP of compiled": (lambda m: DistributedDataParallel(compiled(m)), True, True),
    "four deep": (lambda m: compiled(nn.DataParallel(compiled(nn.DataParallel(m)))), False, True),
    "FSDP of checkpointed": (lambda m: sharded(checkpoint_wrapper(m)), False, False),
    "compiled FSDP": (lambda m: compiled(sharded(m)), False, True),
    "compiled Fabric, DDP of checkpointed": (
        lambda m: compiled(Fabric(DistributedDataParallel(checkpoint_wrapper(m)), m)),
        True,
        True,
    ),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def example() -> Tensor:
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", WRAPS)
def test_every_wrapper_is_looked_through(name: str) -> None:
    wrap, distributed, is_so = WRAPS[name]
    model = network()
    wrapped = wrap(model)
    assert unwrapped(wrapped) is model
    layers = list(unwrapping(wrapped))
    assert layers[0] is wrapped and layers[-1] is model
    assert (is_distributed(wrapped), is_compiled(wrapped)) == (distributed, is_so)


@pytest.mark.parametrize("name", WRAPS)
def test_names_are_those_of_the_bare_model(name: str) -> None:
    model = network()
    wrapped = WRAPS[name][0](model)
    # Known under one name alone, whatever else the unknown wrapper calls it.
    if name == "Fabric, unknown":
        return
    assert list(named_parameters(wrapped)) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert list(named_modules(wrapped)) == ["0", "1", "2"]
    assert all(found is model[int(layer)] for layer, found in named_modules(wrapped).items())
    assert list(by_clean_name(wrapped.named_parameters(remove_duplicate=False))) == list(named_parameters(wrapped))
    assert list(resolve_layers(wrapped, "Linear", where="here")) == ["0", "2"]


def test_what_only_looks_like_a_wrapper_is_none() -> None:
    model = network()
    holder = nn.Module()
    holder.module = model
    assert unwrapped(holder) is holder, "a layer that a user calls module"
    inner = nn.Module()
    inner._module = model
    assert unwrapped(inner) is inner
    half = nn.Module()
    half._forward_module = model
    assert unwrapped(half) is half
    empty = nn.DataParallel(nn.Sequential())
    assert unwrapped(empty) is empty.module, "an empty container is no missing one"
    average = torch.optim.swa_utils.AveragedModel(model)
    assert unwrapped(average) is average, "a copy, not the model"


def test_a_wrapper_of_another_library_is_known_by_its_name() -> None:
    class DistributedDataParallel(nn.Module):  # as apex has one
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    model = network()
    assert unwrapped(DistributedDataParallel(model)) is model
    assert is_distributed(DistributedDataParallel(model))


def test_wrapped_layers_inside_have_clean_names_too() -> None:
    model = nn.Sequential(checkpoint_wrapper(nn.Linear(3, 3)), sharded(nn.Linear(3, 2)))
    assert unwrapped(model) is model
    assert list(named_parameters(model)) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert clean_name("_forward_module.module._checkpoint_wrapped_module.fc.weight") == "fc.weight"


# ---------------------------------------------------------------------------------------------- whatever is given one


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the bare model."""
    path = tmp_path_factory.mktemp("bare") / "model.onnx"
    export_onnx(network(), example(), path)
    return path


@pytest.mark.parametrize("name", WRAPS)
def test_a_wrapped_model_is_exported_and_verified_like_the_bare_one(name: str, bare: Path, tmp_path: Path) -> None:
    torch.compiler.reset()
    model = WRAPS[name][0](network())
    export_onnx(model, example(), tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_bytes() == bare.read_bytes()
    assert verify_onnx(model, bare, example()).ok


@pytest.mark.parametrize("name", WRAPS)
def test_a_wrapped_model_is_analyzed_like_the_bare_one(name: str) -> None:
    torch.compiler.reset()
    assert analyze_model(WRAPS[name][0](network()), example()) == analyze_model(network(), example())


@pytest.mark.parametrize("name", WRAPS)
def test_a_wrapped_model_is_quantized_without_training_like_the_bare_one(name: str) -> None:
    torch.compiler.reset()
    data = [example() * scale for scale in (1.0, 0.5, 2.0, -1.0, 0.1, 1.5)]
    expected = quantize_model(network(), data, progress=False).model
    model = network()
    before = copy.deepcopy(model.state_dict())
    found = quantize_model(WRAPS[name][0](model), data, progress=False).model
    assert unwrapped(found) is found, "the result is a model, and no wrapper"
    assert found.state_dict().keys() == expected.state_dict().keys()
    for key, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
