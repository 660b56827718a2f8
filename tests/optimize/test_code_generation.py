"""Generated code runs as it is: the lines for each framework's loop, and the whole script, on a toy data set."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from sparsify.errors import ArgumentError
from sparsify.optimize.code_generation import Framework, integration_code, training_script
from tests.loops import assert_same_state

RECIPE = """
modifiers:
  - !EpochRangeModifier {start_epoch: 0.0, end_epoch: 3.0}
  - !GMPruningModifier
    params: __ALL_PRUNABLE__
    init_sparsity: 0.05
    final_sparsity: 0.75
    start_epoch: 0.0
    end_epoch: 2.0
    update_frequency: 0.5
  - !QuantizationModifier {start_epoch: 2.0}
"""
TOY = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

def build():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))

def loaders():
    torch.manual_seed(1)
    x = torch.randn(96, 1, 8, 8)
    y = x.mean((1, 2, 3)).gt(0).long()
    return DataLoader(TensorDataset(x[:64], y[:64]), 16, shuffle=True), DataLoader(TensorDataset(x[64:], y[64:]), 16)
"""


def names() -> dict[str, Any]:
    """What a training loop has, under the names that the code uses."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
    x = torch.randn(64, 1, 8, 8)
    loader = DataLoader(TensorDataset(x, x.mean((1, 2, 3)).gt(0).long()), 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return {
        "model": model,
        "optimizer": optimizer,
        "loader": loader,
        "criterion": F.cross_entropy,
        "sample_inputs": (x[:2],),
    }


def zeros(model: nn.Module) -> float:
    weights = [p for name, p in model.named_parameters() if p.dim() > 1]
    return float(sum((p == 0).sum() for p in weights)) / sum(p.numel() for p in weights)


@pytest.mark.parametrize("framework", ["torch"])
def test_the_lines_for_a_loop_run(
    framework: Framework, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if framework != "torch":
        pytest.importorskip(framework)
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)
    given = names()
    exec(compile(integration_code(framework=framework), "integration", "exec"), given)
    assert zeros(given["model"]) == pytest.approx(0.75, abs=0.01)
    assert Path("model.onnx").exists()
    assert "agree" in capsys.readouterr().out


@pytest.mark.parametrize("calls", [5, 11])
def test_the_lines_for_a_plain_loop_stop_and_go_on(calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)
    code = integration_code().partition("# When training is over")[0]

    def run(stop: int | None) -> dict[str, Any]:
        given = names()
        given["loader"] = DataLoader(given["loader"].dataset, 16, shuffle=True)
        left = iter(range(stop or 1000))

        def criterion(outputs: Any, labels: Any) -> Any:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return F.cross_entropy(outputs, labels)

        given["criterion"] = criterion
        exec(compile(code, "integration", "exec"), given)
        return given

    whole = run(None)["model"].state_dict()
    os.remove("checkpoint.pt")
    with pytest.raises(KeyboardInterrupt):
        run(calls)
    gone_on = run(None)
    assert gone_on["first"] == calls // 4
    assert whole.keys() == gone_on["model"].state_dict().keys()
    assert all(map(torch.equal, gone_on["model"].state_dict().values(), whole.values()))


def lightning_names(monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, Any]:
    """As `names`, with a LightningModule as users write it; the Trainer is given these options."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net, self.lr = net, 0.05

        def forward(self, x: Any) -> Any:
            return self.net(x)

        def training_step(self, batch: Any, index: int) -> Any:
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    given: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, **options}
    monkeypatch.setattr(lightning, "Trainer", functools.partial(lightning.pytorch.Trainer, **given))
    return {**names(), "module": Module(names()["model"])}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.filterwarnings("error::sparsify.errors.SparsifyWarning")
def test_the_lines_for_lightning_run_stop_and_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)
    code = integration_code(framework="lightning")
    # 4 batches, 3 to a step: the last group of an epoch is of one.
    options: dict[str, Any] = {"accumulate_grad_batches": 3, "default_root_dir": "runs"}

    def run(text: str, **changed: Any) -> dict[str, Any]:
        given = lightning_names(monkeypatch, **{**options, **changed})
        exec(compile(text, "integration", "exec"), given)
        return given

    whole = run(code)
    assert zeros(whole["module"].net) == pytest.approx(0.75, abs=0.01) and Path("model.onnx").exists()
    assert whole["callback"].manager.step == 6 and whole["callback"].verification
    bits = whole["module"].state_dict()
    # Called twice it goes on from the end, where there is nothing left.
    whole["trainer"].fit(whole["module"], whole["loader"])
    assert all(map(torch.equal, whole["module"].state_dict().values(), bits.values()))

    saved = sorted(Path("runs").rglob("*.ckpt"))
    from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint

    every = ModelCheckpoint("every", filename="{step}", save_top_k=-1, every_n_train_steps=1)
    search = LearningRateFinder(num_training_steps=5, update_attr=False)
    callbacks = "callbacks=[callback]", "callbacks=[callback, *others]"
    searched = lightning_names(monkeypatch, **options)
    searched["others"] = [search, every]
    exec(compile(code.replace(*callbacks), "integration", "exec"), searched)
    assert saved and searched["callback"].manager.step == 6
    assert all(map(torch.equal, searched["module"].state_dict().values(), bits.values()))
    for step in (2, 4, 5):
        resumed = run(code.replace("loader)  #", f"loader, ckpt_path='every/step={step}.ckpt')  #"))
        assert zeros(resumed["module"].net) == pytest.approx(0.75, abs=0.01)
        if step != 5:  # within an epoch Lightning starts this loader anew
            assert all(map(torch.equal, resumed["module"].state_dict().values(), bits.values()))


class Interrupted(list[Any]):
    """Rows of which one cannot be had: the run is stopped there."""

    def __init__(self, rows: list[Any], reads: int) -> None:
        super().__init__(rows)
        self.left = reads

    def __getitem__(self, index: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().__getitem__(index)


def tiny_bert(seed: int) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    return transformers.BertForSequenceClassification(config)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_lines_for_transformers_stop_resume_and_train_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)
    draw = torch.Generator().manual_seed(0)
    # 26 rows in batches of 4 are 7 batches: groups of three, three and one.
    rows = [
        {
            "input_ids": torch.randint(0, 50, (8,), generator=draw),
            "attention_mask": torch.ones(8, dtype=torch.long),
            "labels": torch.tensor(n % 2),
        }
        for n in range(26)
    ]
    sample = {"input_ids": rows[0]["input_ids"][None].repeat(2, 1), "attention_mask": torch.ones(2, 8).long()}

    def run(folder: str, data: Any, seed: int) -> dict[str, Any]:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            num_train_epochs=3,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=3,
            save_strategy="epoch",
            report_to=[],
        )
        given = {"model": tiny_bert(seed), "arguments": arguments, "dataset": data, "sample_inputs": sample}
        exec(compile(integration_code(framework="transformers"), "integration", "exec"), given)
        return given

    whole = run("whole", rows, 0)
    assert whole["callback"].manager.step == 9 and whole["callback"].verification.ok
    with pytest.raises(KeyboardInterrupt):
        run("stopped", Interrupted(rows, 26 + 20), 0)
    wanted = {name: value.clone() for name, value in whole["model"].state_dict().items()}
    assert_same_state(dict(run("stopped", rows, 1)["model"].state_dict()), wanted, "stopped and resumed")
    sparsity = zeros(whole["model"])
    assert sparsity > 0.6
    whole["trainer"].train()
    assert zeros(whole["model"]) == sparsity and whole["callback"].verification.ok, "trained twice"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_lines_for_accelerate_stop_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState

    code = integration_code(framework="accelerate").replace(
        "Accelerator()", "Accelerator(gradient_accumulation_steps=3)"
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)

    def run(folder: str, reads: int = 10**9) -> dict[str, Any]:
        for state in (AcceleratorState, GradientState):
            state._reset_state()
        monkeypatch.chdir(tmp_path / folder)
        Path("recipe.yaml").write_text(RECIPE)
        given = names()
        # 28 rows in batches of 4 are 7 batches: groups of three, three and one.
        rows = [given["loader"].dataset[index] for index in range(28)]
        given["loader"] = DataLoader(Interrupted(rows, reads), 4, shuffle=True)
        exec(compile(code, "integration", "exec"), given)
        return given

    (tmp_path / "whole").mkdir()
    (tmp_path / "stopped").mkdir()
    whole = run("whole")
    assert whole["manager"].step == 9 and zeros(whole["model"]) == pytest.approx(0.75, abs=0.01)
    with pytest.raises(KeyboardInterrupt):
        run("stopped", 28 + 20)
    again = run("stopped")
    assert_same_state(dict(again["model"].state_dict()), dict(whole["model"].state_dict()), "stopped and resumed")
    assert Path("model.onnx").exists()


def test_the_script_trains_resumes_and_exports(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "toy.py").write_text(TOY)
    script = tmp_path / "train.py"
    script.write_text(training_script(model="toy:build", data="toy:loaders", learning_rate=0.05))
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, str(tmp_path)])}

    def run(*options: str) -> str:
        command = [sys.executable, "-W", "error::sparsify.errors.SparsifyWarning", str(script), *options]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = run()
    assert "epoch 3 of 3" in said and "agree" in said
    assert (tmp_path / "compressed" / "model.onnx").exists()
    # Nothing is left to train, and the saved one is exported again.
    again = run("--resume")
    assert "epoch" not in again and "agree" in again


@pytest.mark.slow
def test_the_script_that_is_killed_at_any_moment_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    recipe = RECIPE.replace("end_epoch: 3.0", "end_epoch: 6.0").replace("start_epoch: 2.0}", "start_epoch: 4.0}")
    (tmp_path / "recipe.yaml").write_text(recipe)
    (tmp_path / "toy.py").write_text(TOY)
    script = tmp_path / "train.py"
    script.write_text(training_script(model="toy:build", data="toy:loaders", learning_rate=0.05))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), str(tmp_path)])}

    def run(folder: str, *options: str, lines: int | None = None) -> None:
        command = [sys.executable, str(script), "--output", folder, *options]
        with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for number, _ in enumerate(process.stdout, 1):
                if number == lines:
                    # Between the line and here it writes a checkpoint, or trains on.
                    process.kill()
        assert lines is not None or process.returncode == 0

    run("whole")
    # At the second line the first epoch is saved, and the second one is being saved, or is.
    run("killed", lines=2)
    for _ in range(2):
        run("killed", "--resume", lines=2)
    run("killed", "--resume")
    whole, killed = (
        torch.load(tmp_path / folder / "checkpoint.pt", weights_only=True)["model"] for folder in ("whole", "killed")
    )
    assert whole.keys() == killed.keys() and all(map(torch.equal, whole.values(), killed.values()))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "models.py"}, "model: 'models.py' is not written as package.module:function"),
        ({"data": "a:b c"}, "data: 'a:b c' is not written"),
        ({"optimizer": "Adm"}, "torch.optim has no 'Adm'. Did you mean 'Adam'"),
        ({"loss": "cros_entropy"}, "torch.nn.functional has no 'cros_entropy'. Did you mean 'cross_entropy'"),
        ({"learning_rate": -1.0}, "learning_rate: -1.0 is no learning rate"),
    ],
)
def test_what_cannot_run_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message.replace("(", r"\(")):
        training_script(**changed)


def test_an_unknown_framework_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"'lightnin' is none of .* Did you mean 'lightning'"):
        integration_code(framework="lightnin")  # type: ignore[arg-type]
