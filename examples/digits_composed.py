"""Distils a dense network of handwritten digits into one with half of its channels, three quarters zeros, and int8.

    python examples/digits_composed.py [--seed 0] [--quick] [--outputs outputs]

One recipe does it all; it stands beside this file, in digits_composed.yaml. The network and the data are those of
digits_resnet.py. Every accuracy in the table is measured in onnxruntime, on the files that are written.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from digits_resnet import BATCH, COLUMNS, Digits, ResNet, Result, measure, train_dense
from torch.nn import functional as F

from sparsify import ScheduledModifierManager, export_onnx
from sparsify.output.tables import Table, track

RECIPE = Path(__file__).with_name("digits_composed.yaml")
# Few epochs: shows that it runs, not how well.
QUICK = {"channels_end": 1.0, "pruning_end": 2.0, "quantization_start": 2.0, "num_epochs": 4.0}


def train_student(teacher: ResNet, digits: Digits, manager: ScheduledModifierManager) -> ResNet:
    """A student that starts from the teacher's weights and is trained by the recipe."""
    student = ResNet()
    student.load_state_dict(teacher.state_dict())
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    optimizer = manager.modify(
        student,
        optimizer,
        steps_per_epoch=digits.steps_per_epoch,
        distillation_teacher=teacher,
        sample_inputs=(digits.train_x[:BATCH],),
    )
    for _ in track(range(manager.max_epochs), "training, by the recipe"):
        student.train()
        for x, y in digits.batches():
            optimizer.zero_grad()
            manager.update_loss(F.cross_entropy(student(x), y)).backward()
            optimizer.step()
    manager.finalize(student)
    return student.eval()


def run(seed: int, outputs: Path, *, quick: bool) -> list[Result]:
    outputs.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    digits = Digits.load(seed)
    manager = ScheduledModifierManager.from_yaml(RECIPE, recipe_variables=QUICK if quick else {})
    teacher = train_dense(digits, epochs=2 if quick else 20)
    student = train_student(teacher, digits, manager)

    sample = (digits.test_x[:1],)
    files = {"dense": outputs / "composed_dense.onnx", "composed": outputs / "composed_int8.onnx"}
    export_onnx(teacher, sample, files["dense"])
    export_onnx(student, sample, files["composed"])
    results = measure(files, digits)
    table = Table.of(f"Digits, seed {seed}: {len(digits.test_x)} test images, one thread, batch 1", results, COLUMNS)
    table.write(outputs / "composed.json")
    print(table.text())
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few epochs: shows that it runs, not how well")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="the folder for all that is written")
    arguments = parser.parse_args()
    run(arguments.seed, arguments.outputs, quick=arguments.quick)
    print(f"Models and table are in {arguments.outputs}/")


if __name__ == "__main__":
    main()
