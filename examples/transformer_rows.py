"""A BERT from transformers reads handwritten digits row by row, and is pruned and quantized while it learns.

    python examples/transformer_rows.py [--quick]

Each image is a sentence of eight rows, each row a token of eight pixels. All linear layers become 75 % zeros in blocks
of four, then int8. Needs transformers, which is part of `pip install "sparsify-recipes[test]"`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import onnxruntime
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from sparsify import ScheduledModifierManager, export_onnx

RECIPE = """
end: 24.0
quantization_start: eval(0.7 * end)

modifiers:
  - !LearningRateFunctionModifier
    lr_func: linear
    init_lr: 0.002
    final_lr: 0.0001
    start_epoch: 0.0
    end_epoch: eval(end)
  - !MagnitudePruningModifier
    params: Linear
    mask_type: block4
    init_sparsity: 0.0
    final_sparsity: 0.75
    start_epoch: eval(0.15 * end)
    end_epoch: eval(0.6 * end)
    update_frequency: 0.25
  - !QuantizationModifier
    start_epoch: eval(quantization_start)
"""


class RowReader(nn.Module):
    """Rows of pixels -> BERT -> one of ten digits."""

    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=1, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
            max_position_embeddings=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.rows = nn.Linear(8, 64)
        self.encoder = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        read = self.encoder(inputs_embeds=self.rows(images)).last_hidden_state
        return self.classifier(read.mean(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few epochs: shows that it runs, not how well")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images / 16.0, dtype=torch.float32)
    y = torch.tensor(digits.target)
    train = torch.utils.data.TensorDataset(x[:1400], y[:1400])
    loader = torch.utils.data.DataLoader(train, batch_size=64, shuffle=True)
    model = RowReader()
    optimizer = torch.optim.AdamW(model.parameters())

    manager = ScheduledModifierManager.from_yaml(RECIPE, recipe_variables={"end": 2.0} if arguments.quick else None)
    optimizer = manager.modify(model, optimizer, steps_per_epoch=len(loader), sample_inputs=(x[:2],))
    for _ in range(manager.max_epochs):
        model.train()
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    manager.finalize(model)
    model.eval()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.onnx"
        export_onnx(model, (x[:2],), path)
        options = onnxruntime.SessionOptions()
        # Without it sums of int8 products saturate on CPUs without VNNI.
        options.add_session_config_entry("session.x64quantprecision", "1")
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        (scores,) = session.run(None, {session.get_inputs()[0].name: x[1400:].numpy()})
        size = path.stat().st_size
    accuracy = (torch.from_numpy(scores).argmax(1) == y[1400:]).float().mean()
    print(
        f"int8 file of {size / 1024:.0f} KB, accuracy in onnxruntime on {len(x) - 1400} unseen images: {accuracy:.1%}"
    )


if __name__ == "__main__":
    main()
