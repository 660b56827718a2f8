"""Stacks of matrices in one raw parameter, as mixtures of experts hold them, and which way their matrices lie.

A stack has three dimensions, (experts, outputs, inputs) or (experts, inputs, outputs), and belongs to no Linear. The
`experts` modules of transformers 5 say which by `is_transposed` (use_experts_implementation, seen in transformers
5.23); others by the sizes that they keep; some say nothing.
"""

from __future__ import annotations

from torch import Tensor, nn

from sparsify.model.wrappers import by_clean_name

__all__: list[str] = []

INPUTS_LAST, INPUTS_BEFORE_LAST = -1, -2
"""The dimension of the input channels in a stack, (experts, outputs, inputs) and (experts, inputs, outputs). Negative,
so that it is told from the 1 of a convolution's (outputs, inputs, positions)."""

# Attributes that hold the input and the output size of each matrix.
_SIZES = (("in_features", "out_features"), ("input_size", "output_size"), ("in_dim", "out_dim"))
# Modules of transformers 4.50 to 5.23 that hold stacks and say nothing.
_OF_TRANSFORMERS = {
    "GptOssExperts": INPUTS_BEFORE_LAST,
    "Llama4TextExperts": INPUTS_BEFORE_LAST,
    "InklingSharedExperts": INPUTS_LAST,
    "LongcatFlashExperts": INPUTS_LAST,
    "Step3p7Experts": INPUTS_LAST,
}


def is_stack(module: nn.Module, own: str) -> bool:
    """True if the parameter `own` of `module` is a raw one of three dimensions: a stack, as far as its shape tells."""
    parameter = module._parameters.get(own)
    return parameter is not None and parameter.dim() == 3 and not is_of_torch(module)


def is_of_torch(module: nn.Module) -> bool:
    """True for a layer of torch.nn, or one derived from it, whose weights lie as its documentation says."""
    layers = (cls for cls in type(module).__mro__ if cls.__module__.startswith("torch.nn.modules."))
    return any(cls is not nn.Module and cls.__module__ != "torch.nn.modules.container" for cls in layers)


def expert_stacks(model: nn.Module) -> list[str]:
    """The clean names of the parameters that `__ALL_PRUNABLE__` means though they belong to no layer: stacks that
    something calls experts, the name, the class or the sizes of their module. Biases are none."""
    found = []
    for path, module in by_clean_name(model.named_modules()).items():
        for own, parameter in module._parameters.items():
            if parameter is None or not is_stack(module, own) or min(parameter.shape[1:]) < 2 or "bias" in own:
                continue
            if _says_experts(f"{path}.{own} {type(module).__name__}") or any(
                _says_experts(key) and value == len(parameter)
                for key, value in vars(module).items()
                if isinstance(value, int)
            ):
                found.append(f"{path}.{own}" if path else own)
    return found


def stack_inputs(module: nn.Module, parameter: Tensor) -> int | None:
    """The dimension of the input channels in a stack that `module` holds: -1 or -2; None where nothing says it."""
    transposed = getattr(module, "is_transposed", None)
    if isinstance(transposed, bool):
        return INPUTS_BEFORE_LAST if transposed else INPUTS_LAST
    if type(module).__module__.startswith("transformers.") and type(module).__name__ in _OF_TRANSFORMERS:
        return _OF_TRANSFORMERS[type(module).__name__]
    for inputs, outputs in _SIZES:
        sizes = (getattr(module, inputs, None), getattr(module, outputs, None))
        if sizes[0] != sizes[1] and set(sizes) == set(parameter.shape[1:]):
            return INPUTS_LAST if parameter.shape[-1] == sizes[0] else INPUTS_BEFORE_LAST
    return None


def _says_experts(text: str) -> bool:
    return "expert" in text.lower() or "moe" in text.lower()
