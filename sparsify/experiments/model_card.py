"""Files beside the deployed model: labels, preprocessing, a script that runs it, and a README of figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify.experiments.batches import ImageBatches, TextBatches
from sparsify.output.json_values import plain

if TYPE_CHECKING:
    from sparsify.experiments.settings import ExperimentSettings
    from sparsify.experiments.tasks import RunTask

__all__: list[str] = []


def write_card(folder: Path, task: RunTask, settings: ExperimentSettings, found: Mapping[str, Any]) -> None:
    """Writes what is needed to run `model.onnx` in `folder` without torch.

    Args:
        folder: of the deployment, with the file.
        task: says how its inputs are made.
        settings: of the run.
        found: the figures.
    """
    _write_json(folder / "labels.json", list(task.labels))
    maker = getattr(task, "maker", None)
    script = ""
    if isinstance(maker, ImageBatches):
        _write_json(folder / "preprocessing.json", plain(maker.preprocessing))
        script = _RUN_IMAGE
    elif isinstance(maker, TextBatches):
        maker.tokenizer.save_pretrained(folder)
        _write_json(folder / "preprocessing.json", {"max_length": maker.max_length})
        script = _RUN_TEXT
    if script:
        (folder / "run.py").write_text(script, encoding="utf-8")
    (folder / "README.md").write_text(_readme(task, settings, found, has_script=bool(script)), encoding="utf-8")


def summary_lines(metric: str, found: Mapping[str, Any], *, structured: bool) -> list[str]:
    """The figures of a run in a few lines, honest about what brought the speed."""
    before, after = found["dense"]["onnxruntime"][metric], found["compressed"]["onnxruntime"][metric]
    sizes, ratio = found["size"], found["speed"]["times_as_fast"]
    zeros = found["sparsity"]["of_the_pruned"]
    lines = [
        f"{metric}: {before:.4f} dense, {after:.4f} compressed, in onnxruntime",
        f"size: {_megabytes(sizes['dense']['bytes'])} dense, {_megabytes(sizes['compressed']['bytes'])} compressed, "
        f"{_megabytes(sizes['compressed']['gzip'])} under gzip",
        f"speed: {ratio:.2f} times {'as fast as' if ratio >= 1 else '(slower than)'} the dense file, one sample at a "
        f"time ({found['speed']['lowest']:.2f} to {found['speed']['highest']:.2f} in paired rounds)",
    ]
    if structured:
        lines.append("what brought it: integers and removed channels bring the speed and the size.")
    elif zeros:
        all_ = found["sparsity"]["of_all_weights"]
        lines.append(
            f"what brought it: integers bring {'the speed' if ratio > 1.05 else 'no speed here'}; "
            f"zeros ({zeros:.1%} of the pruned weights, {all_:.1%} of all) "
            "make the file smaller under compression alone, since onnxruntime does not skip them. --structured removes "
            "channels instead."
        )
    if found["floating"]:
        lines.append(f"in float: {len(found['floating'])} operations stay in float, named in metrics.yaml")
    lines.append(
        "verified: onnxruntime computes what torch computes"
        + (", to the bit" if found["verification"]["exact"] else "")
        if found["verification"]["agrees"]
        else "verified: DIFFERS"
    )
    return lines


def _readme(task: RunTask, settings: ExperimentSettings, found: Mapping[str, Any], *, has_script: bool) -> str:
    rows = [
        f"| {name} | {found['dense']['onnxruntime'][name]:.4f} | {value:.4f} |"
        for name, value in found["compressed"]["onnxruntime"].items()
    ]
    shown: Sequence[str] = task.labels[:20]
    lines = [
        f"# {task.name}, compressed",
        "",
        f"`model.onnx` was made from `{settings.model}` by sparsify ({settings.kind}, optim level "
        f"{settings.optim_level:g}). `metrics.yaml` of the run has every figure.",
        "",
        f"| {'metric'} | dense | compressed |",
        "|---|---|---|",
        *rows,
        "",
        *(f"- {line}" for line in summary_lines(task.metric, found, structured=settings.structured)[1:]),
    ]
    if shown:
        lines += ["", f"Labels: {', '.join(shown)}{', ...' if len(task.labels) > len(shown) else ''}."]
    if has_script:
        packages = "onnxruntime, numpy and tokenizers" if "nlp" in task.name else "onnxruntime, numpy and pillow"
        lines += ["", f"`python run.py INPUT` runs it; it needs {packages}."]
    return "\n".join(lines) + "\n"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


_RUN_IMAGE = '''"""Runs model.onnx on images: python run.py IMAGE..."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

here = Path(__file__).parent
labels = json.loads((here / "labels.json").read_text(encoding="utf-8"))
how = json.loads((here / "preprocessing.json").read_text())
options = onnxruntime.SessionOptions()
options.add_session_config_entry("session.x64quantprecision", "1")
session = onnxruntime.InferenceSession(here / "model.onnx", options)
for path in sys.argv[1:]:
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    image = image.resize((how["width"], how["height"]), how["resample"])
    values = np.asarray(image, np.float32) / 255.0
    values = (values - np.float32(how["mean"])) / np.float32(how["std"])
    found = session.run(None, {session.get_inputs()[0].name: values.transpose(2, 0, 1)[None]})
    names = [output.name for output in session.get_outputs()]
    if found[0].ndim == 2:
        print(path, labels[int(found[0][0].argmax())])
    elif "pred_boxes" in names:
        scores = 1 / (1 + np.exp(-found[names.index("logits")][0]))
        for query in np.argsort(-scores[:, : len(labels)].max(1))[:10]:
            box = found[names.index("pred_boxes")][0, query]
            print(path, labels[int(scores[query, : len(labels)].argmax())], scores[query].max(), *box)
    else:
        classes, counts = np.unique(found[0][0].argmax(0), return_counts=True)
        print(path, {labels[c]: int(n) for c, n in zip(classes, counts)})
'''

_RUN_TEXT = '''"""Runs model.onnx on a text: python run.py TEXT, or python run.py QUESTION CONTEXT"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

here = Path(__file__).parent
labels = json.loads((here / "labels.json").read_text(encoding="utf-8"))
length = json.loads((here / "preprocessing.json").read_text())["max_length"]
special = json.loads((here / "tokenizer_config.json").read_text(encoding="utf-8"))
tokenizer = Tokenizer.from_file(str(here / "tokenizer.json"))
pad = special["pad_token"]["content"] if isinstance(special["pad_token"], dict) else special["pad_token"]
tokenizer.enable_truncation(length, strategy="only_second" if len(sys.argv) > 2 and not labels else "longest_first")
options = onnxruntime.SessionOptions()
options.add_session_config_entry("session.x64quantprecision", "1")
session = onnxruntime.InferenceSession(here / "model.onnx", options)
if isinstance(session.get_inputs()[0].shape[1], int):  # a file of one length: shorter texts are padded
    tokenizer.enable_padding(length=length, pad_id=tokenizer.token_to_id(pad), pad_token=pad)
text = tokenizer.encode(*sys.argv[1:])
given = {"input_ids": text.ids, "attention_mask": text.attention_mask, "token_type_ids": text.type_ids}
feed = {each.name: np.array([given[each.name]], np.int64) for each in session.get_inputs()}
found = session.run(None, feed)
if not labels:
    start, end = int(found[0][0].argmax()), int(found[1][0].argmax())
    print(sys.argv[2][text.offsets[start][0] : text.offsets[end][1]] if 0 < start <= end else "no answer")
elif found[0].ndim == 3:
    for piece, mask, scores in zip(text.tokens, text.special_tokens_mask, found[0][0]):
        if not mask:
            print(piece, labels[int(scores.argmax())])
else:
    print(labels[int(found[0][0].argmax())])
'''
