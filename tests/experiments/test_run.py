"""A run from its arguments to the finished folder: exact when it is stopped, honest about what came out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional

from sparsify import DataError, SparsifyError, StateError, UseCase, experiment_report, run_experiment
from sparsify.experiments.command import run_command_line
from sparsify.experiments.use_cases import USE_CASES, use_case_named
from tests.data_folders import class_folders, lines, picture, written
from tests.zoo.small import perceptron


class Sums(UseCase):
    """The sign of a sum of numbers."""

    name = "sums"

    def model(self, source: str | None) -> nn.Module:
        return perceptron(4, 16, 16, 2, activation=nn.ReLU, dropout=0.1)

    def data(self, source: str | None) -> tuple[Sequence[Any], Sequence[Any]]:
        rows = torch.randn(48, 4, generator=torch.Generator().manual_seed(0))
        return list(rows[:40]), list(rows[40:])

    def batch(self, samples: Sequence[Any]) -> tuple[Mapping[str, Tensor], Any]:
        rows = torch.stack(list(samples))
        return {"input": rows}, (rows.sum(1) > 0).long()

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return functional.cross_entropy(outputs, targets)

    def metrics(self, outputs: Mapping[str, np.ndarray], samples: Sequence[Any]) -> Mapping[str, float]:
        right = torch.stack(list(samples)).sum(1).numpy() > 0
        return {"accuracy": float((outputs["output"].argmax(1) == right).mean())}


SMALL: dict[str, Any] = {"epochs": 4, "dense_epochs": 1, "batch_size": 8, "learning_rate": 0.01, "threads": 1}


class Stopped(Exception):
    """Stands for a kill."""


def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path) -> None:
    options = {**SMALL, "working_dir": tmp_path}
    whole = run_experiment("training-aware", Sums(), experiment_id="whole", **options)
    for moment in ("dense 1/1", "recipe 1/4", "recipe 3/4"):

        def stop(line: str, moment: str = moment) -> None:
            if line.startswith(moment):
                raise Stopped

        with pytest.raises(Stopped):
            run_experiment("training-aware", Sums(), experiment_id="stopped", say=stop, **options)
    assert not (tmp_path / "stopped" / "COMPLETE").exists()
    with pytest.raises(StateError, match=r"begun otherwise: learning_rate 0\.01 there, 0\.02 here"):
        run_experiment("training-aware", Sums(), experiment_id="stopped", **{**options, "learning_rate": 0.02})
    resumed = run_experiment("training-aware", Sums(), resume=tmp_path / "stopped")
    files = ("deployment/model.onnx", "recipe.yaml", "baseline/model.onnx")
    assert all((tmp_path / "whole" / n).read_bytes() == (tmp_path / "stopped" / n).read_bytes() for n in files)
    assert resumed.figures["compressed"] == whole.figures["compressed"]
    assert resumed.figures["compressed"]["torch"] == resumed.figures["compressed"]["onnxruntime"]
    assert whole.figures["sparsity"]["of_the_pruned"] == pytest.approx(0.7, abs=0.02)
    report = experiment_report([tmp_path])
    assert [record.state for record in report.records] == ["complete"] * 2 and not report.notes
    assert len(report.records[0].epochs) == 5 == len(report.records[1].epochs)
    assert "0.01" in (tmp_path / "whole" / "report.html").read_text()
    with pytest.raises(SparsifyError, match="complete and is not overwritten"):
        run_experiment("training-aware", Sums(), experiment_id="whole", **options)
    with pytest.raises(StateError, match="is complete"):
        run_experiment("training-aware", Sums(), resume=tmp_path / "stopped")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A model of a few weights, and images of two classes."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    config.save_pretrained(tmp_path / "model")
    preprocessing = {"size": {"height": 16, "width": 16}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    written(tmp_path / "data", class_folders(count=8))
    return tmp_path


def test_images_go_from_the_command_line_to_a_folder_that_runs(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["training-aware", "--use-case", "Image Classification", "--model", str(images / "model"), "--data"]
    words += [str(images / "data"), "--working-dir", str(images / "runs"), "--batch-size", "8", "--threads", "1"]
    words += ["--train-kwargs", '{"epochs": 4, "dense_epochs": 1}', "--experiment-id", "one"]
    assert run_command_line([*words, "--check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["labels"] == ["cat", "dog"] and not (images / "runs").exists()
    assert run_command_line([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    folder = Path(said["folder"])
    assert said["compressed"]["torch"] == said["compressed"]["onnxruntime"] and said["verification"]["agrees"]
    assert said["sparsity"]["of_the_pruned"] == pytest.approx(said["sparsity"]["asked"], abs=0.01)
    assert "resnet.encoder" not in " ".join(said["sparsity"]["kept_dense"])
    assert (folder / "COMPLETE").is_file() and (folder / "training_artifacts" / "float" / "config.json").is_file()
    assert yaml.safe_load((folder / "metrics.yaml").read_text())["metric"] == "accuracy"
    import runpy
    import sys

    before = sys.argv
    sys.argv = ["run.py", str(next((images / "data" / "cat").iterdir()))]
    try:
        runpy.run_path(str(folder / "deployment" / "run.py"), run_name="__main__")
    finally:
        sys.argv = before
    assert capsys.readouterr().out.split()[-1] in ("cat", "dog")


BAD: list[tuple[list[str], str]] = [
    ([], "say what is to be done"),
    (["training-aware"], "give --use-case"),
    (["training-awar", "--use-case", "ner"], "Did you mean 'training-aware'"),
    (["training-aware", "--use-case", "cv-clasification"], "Did you mean 'cv-classification'"),
    (["training-aware", "--use-case", "ner"], "model: there is none"),
    (["training-aware", "--use-case", "ner", "--model", "m"], "data: there is none"),
    (["training-aware", "--use-case", "ic", "--model", "m", "--data", "data", "--optim-level", "1.5"], "no level"),
    (["training-aware", "--use-case", "ic", "--model", "m", "--data", "data", "--epochs", "2"], "4 or more"),
    (["training-aware", "--use-case", "ic", "--model", "m", "--data", "data", "--batch-size", "0"], "1 or more"),
    (["training-aware", "--use-case", "ic", "--model", "m", "--data", "data", "--learning-rate", "0"], "above 0"),
    (["training-aware", "--use-case", "ic", "--model", "m", "--data", "data", "--optimizer", "Adamw"], "AdamW"),
    (["training-aware", "--use-case", "ic", "--model", "m", "--data", "data", "--image-size", "big"], "no size"),
    (["training-aware", "--use-case", "ic", "--model", "m", "--data", "data", "--device", "gpu"], "cannot be used"),
    (["training-aware", "--use-case", "ic", "--model", "m", "--data", "data", "--recipe", "no.yaml"], "no such file"),
    (["training-aware", "--use-case", "ic", "--model", "m", "--data", "data", "--train-kwargs", "{"], "no JSON"),
    (["training-aware", "--use-case", "ic", "--model", "m", "--data", "data", "--train-kwargs", '{"lr": 1}'], "'lr'"),
    (["training-aware", "--use-case", "ic", "--model", "m", "--data", "gone"], "gone: there is no such"),
    (["training-aware", "--use-case", "ic", "--model", "./m", "--data", "data"], "./m: there is no such folder"),
    (["training-aware", "--use-case", "ic", "--model", "empty", "--data", "data"], "no config.json"),
    (["training-aware", "--use-case", "ic", "--model", "broken", "--data", "data"], "config.json"),
    (["training-aware", "--use-case", "ic", "--model", "a.onnx", "--data", "data"], "cannot be trained"),
    (["training-aware", "--use-case", "ic", "--model", "w.pt", "--data", "data"], "give --factory"),
    (["training-aware", "--use-case", "ic", "--model", "no_module:f", "--data", "data"], "cannot be imported"),
    (["training-aware", "--use-case", "ner", "--model", "m", "--data", "six.jsonl"], "six.jsonl:2"),
    (["training-aware", "--use-case", "ic", "--model", "m", "--data", "data", "--experiment-id", "a/b"], "no folder"),
    (["sparse-transfer", "--use-case", "ic", "--data", "data", "--registry", "none"], "has no medium sparse model"),
    (["--resume", "gone"], "no folder of an experiment"),
    (["--resume", "gone", "--epochs", "4"], "leave --epochs out"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_said_in_a_line_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    written(tmp_path, class_folders("data/", count=3))
    rows = lines([{"tokens": ["a"], "tags": ["O"]}, {"tokens": ["a", "b"], "tags": ["O"]}])
    written(tmp_path, {"empty": None, "broken/config.json": "{", "a.onnx": b"", "w.pt": b"", "six.jsonl": rows})
    before = sorted(tmp_path.rglob("*"))
    assert run_command_line(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("case", USE_CASES, ids=lambda case: case.name)
def test_names_of_use_cases_do_not_mind_how_they_are_written(case: Any) -> None:
    for name in (case.name, *case.aliases):
        assert use_case_named(name.upper().replace("-", " ").replace("_", "-")) is case


def test_an_image_that_is_none_ends_the_run_before_it_begins(images: Path) -> None:
    written(images / "data", {"cat/9.png": b"no image", "cat/10.png": picture(99)})
    with pytest.raises(DataError, match=r"9\.png"):
        run_experiment("training-aware", "cv-classification", str(images / "model"), str(images / "data"))


WORDS = ["the", "film", "was", "a", "story", "with", "good", "great", "bad", "awful", "actors"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two narrow layers, trained for nothing, with its tokenizer."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    marks = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    rows = {word: row for row, word in enumerate([*marks.values(), *WORDS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(rows, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", rows["[CLS]"]), ("[SEP]", rows["[SEP]"])],
    )
    folder = tmp_path_factory.mktemp("encoder")
    names = ["input_ids", "token_type_ids", "attention_mask"]
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, model_input_names=names, **marks)
    fast.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=len(rows), max_position_embeddings=32, **sizes)
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    return folder


def sentences(count: int) -> list[list[str]]:
    draw = np.random.default_rng(0)
    return [[WORDS[n] for n in draw.integers(0, len(WORDS), 5)] for _ in range(count)]


ROWS = {
    "nlp-sentiment_analysis": [{"text": " ".join(w), "label": "pos" if "good" in w else "neg"} for w in sentences(40)],
    "nlp-token_classification": [
        {"tokens": w, "tags": ["A" if x in WORDS[5:9] else "O" for x in w]} for w in sentences(40)
    ],
    "nlp-named_entity_recognition": [
        {"tokens": w, "ner_tags": ["B-GOOD" if x == "good" else "O" for x in w]} for w in sentences(40)
    ],
    "nlp-question_answering": [
        {
            "id": str(n),
            "question": "good film",
            "context": " ".join(w),
            "answers": {"text": [w[2]], "answer_start": [len(" ".join(w[:2])) + 1]},
        }
        for n, w in enumerate(sentences(40))
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ROWS)
def test_texts_are_measured_alike_in_torch_and_onnxruntime(tmp_path: Path, encoder: Path, case: str) -> None:
    written(tmp_path, {"data.jsonl": lines(ROWS[case])})
    done = run_experiment(
        "training-aware", case, str(encoder), str(tmp_path / "data.jsonl"), working_dir=tmp_path / "runs", **SMALL
    )
    assert done.figures["compressed"]["torch"] == done.figures["compressed"]["onnxruntime"]
    assert done.figures["sparsity"]["of_the_pruned"] == pytest.approx(0.7, abs=0.01) and not done.short
    pruned = done.figures["sparsity"]["layers"]
    assert pruned and not [name for name in pruned if "embeddings" in name or "pooler" in name or "encoder" not in name]


@pytest.mark.slow
def test_a_sparse_model_is_filed_and_transferred_with_its_zeros(tmp_path: Path, encoder: Path) -> None:
    written(tmp_path, {"data.jsonl": lines(ROWS["nlp-sentiment_analysis"])})
    data, case = str(tmp_path / "data.jsonl"), "nlp-sentiment_analysis"
    where: dict[str, Any] = {"working_dir": tmp_path / "runs", "registry": tmp_path / "registry"}
    with pytest.raises(DataError, match="keeps the zeros of a sparse model"):
        run_experiment("sparse-transfer", case, str(encoder), data, **where, **{**SMALL, "dense_epochs": 0})
    run_experiment("training-aware", case, str(encoder), data, register="small", **where, **SMALL)
    with pytest.raises(SparsifyError, match="fills the zeros"):
        run_experiment("sparse-transfer", case, None, data, optim_level=0.8, **where, **SMALL)
    short = {**SMALL, "dense_epochs": 0}
    done = run_experiment("sparse-transfer", case, None, data, optim_level=0.8, **where, **short)
    assert done.figures["sparsity"]["of_the_pruned"] > 0.5 and not done.short
    once = run_experiment("one-shot", case, str(tmp_path / "registry" / "small"), data, **where)
    assert once.figures["sparsity"]["of_the_pruned"] >= 0.51 and not once.short
