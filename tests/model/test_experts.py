"""Stacked experts in raw parameters: which are pruned, and units that lie along the inputs of each expert."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparsify.errors import TargetError
from sparsify.model.experts import expert_stacks
from sparsify.model.layouts import input_dims
from sparsify.model.targets import resolve_parameters
from sparsify.modifiers.magnitude_pruning import GMPruningModifier
from sparsify.pruning.masks import MaskType, compute_masks
from sparsify.training.manager import ScheduledModifierManager


class Experts(nn.Module):
    """Three experts, every token through all of them; (experts, outputs, inputs), or the other way round."""

    def __init__(self, transposed: bool = False, said: bool = True) -> None:
        super().__init__()
        self.num_experts = 3
        up, down = ((3, 8, 12), (3, 12, 8)) if transposed else ((3, 12, 8), (3, 8, 12))
        self.up_proj, self.down_proj = (nn.Parameter(torch.randn(shape) * 0.3) for shape in (up, down))
        self.up_proj_bias = nn.Parameter(torch.zeros(3, 1, 12))
        self.transposed = transposed
        if said:
            self.is_transposed = transposed

    def forward(self, x: Tensor) -> Tensor:
        up, down = (w if self.transposed else w.mT for w in (self.up_proj, self.down_proj))
        return ((x @ up + self.up_proj_bias).relu() @ down).sum(0)


class Sized(nn.Module):
    """Says the sizes of its matrices, as JetMoe of transformers does."""

    def __init__(self, shape: tuple[int, int, int], inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))
        self.input_size, self.output_size = inputs, outputs


class Tokens(nn.Module):
    """Raw parameters that are no matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(1, 9, 4))
        self.table = nn.Parameter(torch.randn(5, 3, 3))


def network(**options: bool) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), Experts(**options), nn.Linear(8, 2))


def pruning(mask_type: str | list[int] = "unstructured", **more: object) -> GMPruningModifier:
    return GMPruningModifier(
        **{
            "params": "__ALL_PRUNABLE__", "start_epoch": 0.0, "end_epoch": 1.0, "update_frequency": 0.5,
            "init_sparsity": 0.0, "final_sparsity": 0.5, "mask_type": mask_type, "strict": False, **more,
        }
    )  # fmt: skip


def test_stacks_that_something_calls_experts_are_prunable_and_tables_are_not() -> None:
    assert expert_stacks(network()) == ["1.up_proj", "1.down_proj"]
    assert expert_stacks(nn.Sequential(Tokens(), nn.Conv1d(4, 4, 3), nn.Bilinear(2, 3, 4))) == []
    assert list(resolve_parameters(network(), "__ALL_PRUNABLE__", where="x")) == [
        "0.weight",
        "1.up_proj",
        "1.down_proj",
        "2.weight",
    ]
    named = nn.Module()
    named.moe = Sized((4, 6, 8), 8, 6)
    assert expert_stacks(named) == ["moe.weight"], "by its place"


def test_the_layout_is_what_the_module_says() -> None:
    for transposed, dim in ((False, -1), (True, -2)):
        dims = input_dims(network(transposed=transposed))
        assert (dims["1.up_proj"], dims["1.down_proj"]) == (dim, dim)
    assert input_dims(Sized((4, 6, 8), 8, 6)) == {"weight": -1}
    assert input_dims(Sized((4, 8, 6), 8, 6)) == {"weight": -2}
    assert input_dims(Sized((4, 8, 8), 8, 8)) == {"weight": None}
    assert input_dims(network(said=False))["1.up_proj"] is None
    # The layers of torch have theirs.
    assert list(input_dims(nn.Conv1d(4, 6, 3)).values()) == [1, 1]


def test_a_layout_that_nothing_says_is_asked_for_not_guessed() -> None:
    def modify(modifier: GMPruningModifier, model: nn.Module) -> dict[str, float]:
        manager = ScheduledModifierManager([modifier])
        manager.modify(model, torch.optim.SGD(model.parameters(), lr=0.1), steps_per_epoch=2, epoch=1.0)
        manager.finalize()
        return manager.sparsity()

    for kind in ("2:4", "block4", "filter", "channel", [2, 4]):
        with pytest.raises(TargetError, match=r"'1.up_proj' is a raw parameter.*Give input_dims: \{name: 2\}"):
            modify(pruning(kind, strict=True), network(said=False))
    said = modify(pruning("2:4", strict=True, params="1.up_proj", input_dims={"re:1": 2}), network(said=False))
    assert said == {"1.up_proj": 0.5}
    assert set(modify(pruning(), network(said=False)).values()) == {0.5}, "single weights need no layout"
    with pytest.raises(TargetError, match=r"input_dims: '1.up_proj'.*dimension 1 or 2, not 0"):
        modify(pruning("2:4", params="1.up_proj", input_dims={"1.up_proj": 0}), network(said=False))
    with pytest.raises(TargetError, match=r"GMPruningModifier.input_dims: 'nobody' matches nothing"):
        modify(pruning("2:4", input_dims={"nobody": 2}), network(said=False))


@pytest.mark.parametrize("kind", ["2:4", "block4", [2, 2], [-1, 4], "filter", "channel"])
@pytest.mark.parametrize("transposed", [False, True])
def test_masks_of_a_stack_are_those_of_its_matrices(kind: str | list[int], transposed: bool) -> None:
    """Each matrix ranked by itself gives the same units; together they have exactly the rounded share of the stack."""
    mask_type, dim = MaskType.parse(kind), -2 if transposed else -1
    torch.manual_seed(1)
    stack = torch.randn(3, 8, 8)
    mask = compute_masks({"w": stack}, 0.5, mask_type, input_dims={"w": dim})["w"]
    assert int((~mask).sum()) == stack.numel() // 2
    # One ranking over the matrices, each in the layout of a Linear, has the same choice and the same count.
    matrices = {str(i): m.T.contiguous() if transposed else m for i, m in enumerate(stack)}
    apart = compute_masks(matrices, 0.5, mask_type, together=True)
    for i, (own, alone) in enumerate(zip(mask, apart.values(), strict=True)):
        assert torch.equal(own.T if transposed else own, alone), i
    again = compute_masks({"w": stack}, 0.75 if kind != "2:4" else 0.5, mask_type, input_dims={"w": dim},
                          previous={"w": mask})["w"]  # fmt: skip
    assert not (again & ~mask).any(), "a mask only grows"


def test_equal_scores_of_a_stack_are_masked_in_logical_order() -> None:
    for kind in ("block4", "filter", "channel"):
        mask = compute_masks({"w": torch.ones(2, 4, 4)}, 0.25, MaskType.parse(kind), input_dims={"w": -1})["w"]
        assert mask[1].all() and int((~mask[0]).sum()) == 8


@pytest.mark.parametrize("kind", ["unstructured", "2:4", "channel"])
def test_experts_are_pruned_in_training(kind: str) -> None:
    model = network(transposed=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    manager = ScheduledModifierManager([pruning(kind, params=["1.up_proj", "1.down_proj"], strict=True)])
    manager.modify(model, optimizer, steps_per_epoch=2)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(5, 8)).square().mean().backward()
        optimizer.step()
    manager.finalize()
    assert manager.sparsity() == {"1.up_proj": 0.5, "1.down_proj": 0.5}
    weight = model[1].up_proj
    if kind == "2:4":
        assert ((weight.view(3, 2, 4, 12) == 0).sum(2) == 2).all()
    if kind == "channel":
        assert int((weight == 0).all(2).sum()) == 12


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "sizes", "dim"),
    [
        ("Mixtral", {"num_local_experts": 4}, -1),
        ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 24, "decoder_sparse_step": 1}, -1),
        ("GptOss", {"num_local_experts": 4, "head_dim": 8}, -2),
        ("Llama4", {"num_local_experts": 4, "head_dim": 8}, -2),
        ("JetMoe", {"num_local_experts": 4}, -1),
        ("GraniteMoe", {"num_local_experts": 4}, -1),
        ("DeepseekV3", {"n_routed_experts": 4, "moe_intermediate_size": 24, "first_k_dense_replace": 0}, -1),
    ],
)
def test_the_stacks_of_transformers_say_their_layout(kind: str, sizes: dict[str, int], dim: int) -> None:
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, f"{kind}Config"):
        pytest.skip(f"this transformers has no {kind}")
    name = {"Llama4": "Llama4TextConfig"}.get(kind, f"{kind}Config")
    config = getattr(transformers, name)(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, **sizes,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    stacks = expert_stacks(model)
    assert len(stacks) >= 2
    assert {input_dims(model)[stack] for stack in stacks} == {dim}
