"""Saved models of transformers are built from their config: no class passed, no code from elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify import ScheduledModifierManager, load_model, save_model
from sparsify.errors import ArgumentError, DataError
from sparsify.training.checkpoint import checksum
from tests.zoo.architectures import ARCHITECTURES, BERT
from tests.zoo.quantized_runs import call

transformers = pytest.importorskip("transformers")

QUANTIZED = "modifiers:\n  - !QuantizationModifier\n    start_epoch: 0.0"
CUT = """
modifiers:
  - !StructuredPruningModifier
    params: __ALL_PRUNABLE__
    init_sparsity: 0.5
    final_sparsity: 0.5
    start_epoch: 0.0
    end_epoch: 0.0
    update_frequency: 1.0
    multiple: 1
    shrink: true
  - !QuantizationModifier
    start_epoch: 1.0
"""


def outputs_of(model: Any, inputs: Any) -> Any:
    with torch.no_grad():
        return call(model.eval(), inputs)[0]


class Tokenizer:
    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")


def saved_bert(folder: Path, attention: str = "eager") -> tuple[Any, Any]:
    torch.manual_seed(0)
    config = transformers.BertConfig(**BERT, num_labels=3)
    config._attn_implementation = attention
    model = transformers.BertForSequenceClassification(config)
    inputs = ARCHITECTURES["BERT"].inputs()
    ScheduledModifierManager.from_yaml(QUANTIZED).apply(model, sample_inputs=inputs, calibration_data=[inputs] * 8)
    save_model(model, folder, extras=[Tokenizer()])
    return model, inputs


def test_a_model_comes_back_from_its_folder_alone(tmp_path: Path) -> None:
    model, inputs = saved_bert(tmp_path / "saved")
    assert {"config.json", "tokenizer.json"} <= {path.name for path in (tmp_path / "saved").iterdir()}
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["architectures"] == [
        "BertForSequenceClassification"
    ]
    loaded: Any = load_model(tmp_path / "saved")
    assert loaded.config._attn_implementation == "eager" and loaded.config.num_labels == 3
    assert torch.equal(outputs_of(model, inputs), outputs_of(loaded, inputs))
    assert list(loaded.state_dict()) == list(model.state_dict())
    # An instance that computes attention otherwise comes to compute it so, too.
    other = transformers.BertForSequenceClassification(transformers.BertConfig(**BERT, num_labels=3))
    assert torch.equal(outputs_of(model, inputs), outputs_of(load_model(tmp_path / "saved", other), inputs))


@pytest.mark.slow
# OPT and BART have embeddings that compute otherwise than nn.Embedding.
@pytest.mark.filterwarnings("ignore:QuantizationModifier. layers with weights stay in float")
@pytest.mark.parametrize(
    "name", [name for name, one in ARCHITECTURES.items() if one.library == "transformers" and not one.slow]
)
@pytest.mark.parametrize("recipe", [QUANTIZED, CUT], ids=["quantized", "cut and quantized"])
def test_every_architecture_comes_back_from_its_folder_alone(name: str, recipe: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = ARCHITECTURES[name].build(), ARCHITECTURES[name].inputs()
    ScheduledModifierManager.from_yaml(recipe).apply(model, sample_inputs=inputs, calibration_data=[inputs] * 8)
    loaded = load_model(save_model(model, tmp_path / "saved"))
    assert torch.equal(outputs_of(model, inputs), outputs_of(loaded, inputs))


def test_a_folder_that_names_other_classes_runs_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    saved_bert(folder)
    file = folder / "sparsify.json"
    content = json.loads(file.read_text())
    del content["checksum"]
    for module, name in (("transformers.os", "os"), ("transformers", "Trainer"), ("transformers", "pipeline")):
        content["model"] |= {"module": module, "name": name}
        file.write_text(json.dumps({**content, "checksum": checksum(content)}))
        with pytest.raises(ArgumentError, match=f"has no model '{name}'"):
            load_model(folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"gelu"', '"relu"'))
    with pytest.raises(DataError, match=r"config\.json does not match its checksum"):
        load_model(folder)
