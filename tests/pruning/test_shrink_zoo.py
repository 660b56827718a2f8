"""Half of every channel group is removed from every architecture: the smaller model computes what the masked one
does."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from sparsify import export_onnx
from sparsify.pruning.dry_run import find_groups
from sparsify.pruning.groups import ChannelGroups
from sparsify.pruning.removal import Removal, plan_removal, remove
from tests.zoo.architectures import ARCHITECTURES, Architecture
from tests.zoo.prunable import mask_channels_

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def randomise(model: nn.Module) -> None:
    """Draws anew what has one value everywhere: weights and biases of norms, layer scales, biases, statistics."""
    with torch.no_grad():
        for parameter in model.parameters():
            if bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0.0, 0.5)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)


def to(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The same inputs, numbers with a point in `dtype`."""
    return tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, inputs)


def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """All tensors with a point that the model returns, in eval mode."""
    model.eval()
    with torch.no_grad():
        result = model(*inputs[0], **inputs[1])
    leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    assert leaves
    return leaves


def difference(one: nn.Module, other: nn.Module, inputs: Inputs) -> float:
    """The largest difference of an output, relative to its largest number; infinity where there is a NaN."""
    worst = 0.0
    for wanted, got in zip(outputs(one, inputs), outputs(other, inputs), strict=True):
        assert wanted.shape == got.shape
        if not (wanted.isfinite().all() and got.isfinite().all()):
            return float("inf")
        worst = max(worst, ((wanted - got).abs().max() / wanted.abs().max().clamp(min=1e-30)).item())
    return worst


def half(channel_groups: ChannelGroups, kinds: frozenset[str] | None = None) -> dict[str, list[int]]:
    """Half of the channels of every channel group (of these kinds), by chance."""
    return {
        name: sorted(torch.randperm(channel_group.size)[: channel_group.size // 2].tolist())
        for name, channel_group in channel_groups.groups.items()
        if kinds is None or channel_group.kind in kinds
    }


def masked(model: nn.Module, channel_groups: ChannelGroups, pruned: dict[str, list[int]]) -> nn.Module:
    """A copy whose deleted channels are zeros, in all that belongs to them."""
    result = copy.deepcopy(model)
    mask_channels_(result, channel_groups, pruned)
    return result


def built(name: str) -> tuple[nn.Module, Inputs]:
    """The dense model in float64, and its inputs."""
    architecture = ARCHITECTURES[name]
    if architecture.library is not None:
        pytest.importorskip(architecture.library)
    torch.manual_seed(0)
    model = architecture.build().double().eval()
    randomise(model)
    inputs = architecture.inputs()
    return model, to(((), inputs) if isinstance(inputs, dict) else (inputs, {}), torch.float64)


@dataclass
class Case:
    """One architecture, dense, masked and shrunk, in float64."""

    name: str
    expected: Architecture
    inputs: Inputs
    dense: nn.Module
    channel_groups: ChannelGroups
    pruned: dict[str, list[int]]
    masked: nn.Module
    shrunk: nn.Module
    removal: Removal


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=pytest.mark.slow if architecture.slow else ())
        for name, architecture in ARCHITECTURES.items()
    ],
)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    name = request.param
    dense, inputs = built(name)
    channel_groups = find_groups(dense, *inputs)
    pruned = half(channel_groups)
    with_zeros = masked(dense, channel_groups, pruned)
    shrunk = copy.deepcopy(with_zeros)
    removal = plan_removal(shrunk, channel_groups, pruned)
    remove(shrunk, removal)
    yield Case(name, ARCHITECTURES[name], inputs, dense, channel_groups, pruned, with_zeros, shrunk, removal)


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_shrunk_model_computes_what_the_masked_one_does(case: Case) -> None:
    assert difference(case.masked, case.shrunk, case.inputs) < 1e-10
    single = to(case.inputs, torch.float32)
    assert difference(copy.deepcopy(case.masked).float(), copy.deepcopy(case.shrunk).float(), single) < 1e-4
    if case.pruned:
        # The claim is not empty: what was cut had been at work.
        assert difference(case.dense, case.masked, case.inputs) > 1e-6


def test_as_much_is_cut_as_is_known_to_be_possible(case: Case) -> None:
    assert {channel_group.kind for channel_group in case.channel_groups.groups.values()} == set(case.expected.cut)
    assert size(case.shrunk) / size(case.dense) == pytest.approx(case.expected.kept, abs=0.02)
    # Every layer is a row of a channel group, or there is a reason.
    rows = {row for channel_group in case.channel_groups.groups.values() for row in channel_group.rows}
    layers = {f"{name}.weight" for name, m in case.dense.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    names = {id(parameter): name for name, parameter in case.dense.named_parameters()}
    first = {names[id(case.dense.get_parameter(layer))] for layer in layers}
    assert first <= rows | set(case.channel_groups.whole)
    assert not rows & set(case.channel_groups.whole)
    for weight, reason in case.expected.whole:
        assert reason in case.channel_groups.whole[weight]


def test_sizes_of_layers_are_those_of_their_weights(case: Case) -> None:
    for name, module in case.shrunk.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features), name
        elif isinstance(module, (nn.Conv1d, nn.Conv2d)):
            shape = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
            assert module.weight.shape == shape, name
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            assert module.running_mean.shape == (module.num_features,), name
        elif isinstance(module, nn.Embedding):
            assert module.weight.shape == (module.num_embeddings, module.embedding_dim), name
    for name, parameter in case.shrunk.named_parameters():
        # No view into the large tensor that it came from.
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size(), name


def test_tied_weights_stay_tied(case: Case) -> None:
    def ties(model: nn.Module) -> list[list[str]]:
        holders: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            holders.setdefault(id(parameter), []).append(name)
        return list(holders.values())

    assert ties(case.shrunk) == ties(case.dense)


def test_the_shrunk_model_trains_on(case: Case) -> None:
    model = copy.deepcopy(case.shrunk).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    result = model(*case.inputs[0], **case.inputs[1])
    leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.requires_grad]
    torch.stack([(leaf.float() - 1).square().mean() for leaf in leaves]).sum().backward()
    optimizer.step()
    after = list(model.parameters())
    assert all(parameter.isfinite().all() for parameter in after)
    assert not all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_a_removal_is_repeated_from_its_saved_state(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "removal.pt"
    torch.save(case.removal.state_dict(), path)
    removal = Removal.from_state(torch.load(path, weights_only=True))
    fresh = copy.deepcopy(case.dense)
    remove(fresh, removal)
    fresh.load_state_dict(case.shrunk.state_dict())
    assert difference(case.shrunk, fresh, case.inputs) == 0.0


EXPORTED = {
    "VGG with BatchNorm",
    "U-Net",
    "squeeze and excite",
    "ResNet-50, thin",
    "ShuffleNetV2",
    "ViT",
    "BERT",
    "Swin",
}


def test_the_shrunk_model_is_exported(case: Case, tmp_path: Path) -> None:
    if case.name not in EXPORTED:
        pytest.skip("few are exported: it takes long")
    import onnxruntime

    model = copy.deepcopy(case.shrunk).float()
    args, kwargs = to(case.inputs, torch.float32)
    file = export_onnx(model, kwargs or args, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(os.fspath(file), providers=["CPUExecutionProvider"])
    values = list(kwargs.values()) if kwargs else list(args)
    feeds = {entry.name: value.numpy() for entry, value in zip(session.get_inputs(), values, strict=True)}
    for wanted, got in zip(outputs(model, (args, kwargs)), session.run(None, feeds), strict=True):
        assert (wanted - torch.from_numpy(got)).abs().max() < 1e-4 * wanted.abs().max()


CONFIGURED = {
    # Head sizes of the others follow from the hidden size by their code: a config cannot say that half are gone.
    "BERT": frozenset({"linear"}),
    "DistilBERT": frozenset({"linear"}),
    "OPT": frozenset({"linear"}),
    "GPT-2": frozenset({"linear"}),
    "T5 encoder": frozenset({"linear", "heads"}),
    "Llama with grouped queries": frozenset({"linear", "heads"}),
}


@pytest.mark.parametrize("name", CONFIGURED)
def test_a_model_of_the_new_config_holds_the_shrunk_weights(name: str) -> None:
    model, inputs = built(name)
    channel_groups = find_groups(model, *inputs)
    pruned = half(channel_groups, CONFIGURED[name])
    assert pruned
    remove(model, plan_removal(model, channel_groups, pruned))
    again = type(model)(model.config).double()
    again.load_state_dict(model.state_dict())
    assert difference(model, again, inputs) < 1e-10


# -- the tests above can fail ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["squeeze and excite", "norms of all kinds"])
def test_without_the_columns_of_its_readers_a_mask_is_not_exact(name: str) -> None:
    dense, inputs = built(name)
    channel_groups = find_groups(dense, *inputs)
    pruned = half(channel_groups)
    shrunk = masked(dense, channel_groups, pruned)
    remove(shrunk, plan_removal(shrunk, channel_groups, pruned))
    rows = copy.deepcopy(dense)
    parameters = dict(rows.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for group_name, channel_group in channel_groups.groups.items():
            for member in channel_group.members:
                if member.role != "column" and member.tensor in parameters:
                    dead = [index for index, channel in enumerate(member.channels) if channel in pruned[group_name]]
                    parameters[member.tensor].index_fill_(member.dim, torch.tensor(dead), 0.0)
    assert difference(rows, shrunk, inputs) > 1e-3


@pytest.mark.parametrize("name", ["attention by hand", "ViT", "GPT-2", "OPT"])
def test_without_the_integers_of_its_modules_a_shrunk_model_is_wrong(name: str) -> None:
    dense, inputs = built(name)
    channel_groups = find_groups(dense, *inputs)
    pruned = half(channel_groups)
    shrunk = masked(dense, channel_groups, pruned)
    before = {path: dict(vars(module)) for path, module in shrunk.named_modules()}
    removal = plan_removal(shrunk, channel_groups, pruned)
    remove(shrunk, removal)
    user = {
        p: a for p, a in removal.attributes.items() if not type(shrunk.get_submodule(p)).__module__.startswith("torch.")
    }
    assert user
    for path, attributes in user.items():
        for attribute in attributes:
            setattr(shrunk.get_submodule(path), attribute, before[path][attribute])
    try:
        wrong = difference(masked(dense, channel_groups, pruned), shrunk, inputs) > 1e-3
    except (RuntimeError, ValueError, AssertionError):
        wrong = True
    assert wrong
