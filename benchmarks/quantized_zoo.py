"""Writes docs/quantized_zoo.md: architectures through quantization-aware training, export and proof.

    PYTHONPATH=. python benchmarks/quantized_zoo.py [name ...]

With names it prints their reports and writes nothing. Takes some minutes; needs torchvision, timm and transformers.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from sparsify.output.files import replacing  # noqa: E402
from tests import conftest  # noqa: E402, F401  makes torchvision importable
from tests.zoo.quantized_runs import QAT_ARCHITECTURES, QatRun, run_qat  # noqa: E402
from tests.zoo.quantized_runs import QAT_STEPS as STEPS  # noqa: E402

HEAD = f"""# The quantized zoo

Written by `benchmarks/quantized_zoo.py`. Small configurations with random weights; {STEPS} steps of quantization-aware
training with the default recipe, `export_onnx`, `verify_onnx` on a fresh batch. onnxruntime on an x86 CPU with VNNI.

- **layers**: with integer weights / in float.
- **exact kernels**: integer kernels of onnxruntime, with its optimizations on, that give the integers of the reference,
  from onnxruntime's own inputs to the kernel.
- **torch**: the largest difference of the trained model to the reference, kernel by kernel, in quantization steps, and
  the largest share of a tensor that differs.
- **behind float**: likewise of onnxruntime, at quantizers that stand behind operators in float.
- **end to end**: whether the reference, from the inputs on, gives the bits of onnxruntime's outputs; else the largest
  difference of an inner quantized tensor, in steps.
- **in float**: operators next to quantized values that run in float, which `verify_onnx` lists with the reasons. In
  convolutional networks these are what onnxruntime has no integer kernel for, as LayerNorm and softplus, and the
  concatenation, pool or sum that feeds or follows one of them.

| architecture | agrees | layers | exact kernels | torch | behind float | end to end | in float |
|---|---|---|---|---|---|---|---|
"""


def row(passed: QatRun) -> str:
    found = passed.verification
    integer = [tensor for tensor in found.tensors if tensor.exact]
    right = sum(1 for tensor in integer if tensor.optimized is not None and tensor.optimized.count == 0)
    torch_side = [tensor.torch for tensor in found.tensors if tensor.torch is not None]
    behind = [tensor.optimized for tensor in found.tensors if tensor.optimized is not None and not tensor.exact]
    total = max((tensor.total.steps for tensor in found.tensors if tensor.total is not None), default=0.0)
    cells = [
        passed.name,
        "yes" if found.ok else "**no**",
        f"{passed.quantized} / {passed.floating}",
        f"{right} of {len(integer)}",
        f"{max(gap.steps for gap in torch_side):.0f}, {max(gap.share for gap in torch_side):.2%}",
        f"{max(gap.steps for gap in behind):.0f}, {max(gap.share for gap in behind):.2%}" if behind else "none",
        "exact" if found.exact else f"{total:.0f} steps",
        ", ".join(sorted({each.operator for each in found.unfused})) or "none",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    warnings.simplefilter("ignore")
    names = sys.argv[1:]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names or QAT_ARCHITECTURES:
            passed = run_qat(name, Path(folder) / "model.onnx")
            rows.append(row(passed))
            print(passed.verification if names else rows[-1], flush=True)
    if not names:
        with replacing(ROOT / "docs" / "quantized_zoo.md") as temporary:
            temporary.write_text(HEAD + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
