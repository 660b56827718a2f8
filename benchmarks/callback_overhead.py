"""Time that a framework's callback adds to a training step, against the same manager attached there by hand.

    python benchmarks/callback_overhead.py [--framework NAME] [--quick] [--threads N] [--only NAME]

Two runs of the framework's own loop, with and without the callback, take steps in turn on the same batch: each loop
runs in a thread of its own and steps when it is asked to. Both prune by the same recipe. Bar: 1.002 (medians, one
thread).
"""

from __future__ import annotations

import argparse
import copy
import logging
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from models import MODELS
from paired import Ratio, machine, paired
from step_overhead import PRUNING
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from sparsify import ScheduledModifierManager

BAR = 1.002
STEPS_PER_EPOCH = 1_000_000


class Asked(IterableDataset[int]):
    """Batches one by one: a training loop waits in `__next__` until a step is asked for."""

    def __init__(self) -> None:
        self.wanted, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.ended = False
        self.error: BaseException | None = None

    def __iter__(self) -> Iterator[int]:
        # A loop that goes over the data again when they end (the Trainer of transformers) finds none.
        while not self.ended:
            self.done.release()
            self.wanted.acquire()
            if self.ended:
                return
            yield 0


class Loop:
    """A framework's training loop in a thread of its own, as a function that takes one step."""

    def __init__(self, train: Callable[[Asked], None]) -> None:
        self._asked = Asked()
        self._thread = threading.Thread(target=self._run, args=(train,), daemon=True)
        self._thread.start()
        self._asked.done.acquire()

    def _run(self, train: Callable[[Asked], None]) -> None:
        try:
            train(self._asked)
        except BaseException as error:
            self._asked.error = error
        finally:
            self._asked.done.release()

    def step(self) -> None:
        """One step: from where the loop asks for a batch to where it asks for the next."""
        self._asked.wanted.release()
        self._asked.done.acquire()
        if self._asked.error is not None:
            raise self._asked.error

    def close(self) -> None:
        """Ends the loop."""
        self._asked.ended = True
        self._asked.wanted.release()
        self._thread.join()


def lightning_loop(model: nn.Module, inputs: Tensor, labels: Tensor, with_callback: bool) -> Callable[[Asked], None]:
    """Lightning's Trainer; the recipe through the callback, or attached in `configure_optimizers`."""
    import lightning.pytorch as pl

    from sparsify.integrations.lightning import SparsifyCallback

    manager = ScheduledModifierManager.from_yaml(PRUNING)

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def training_step(self, batch: Any, index: int) -> Tensor:
            return F.cross_entropy(self.net(inputs), labels)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.net.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
            if not with_callback:
                manager.modify(self.net, optimizer, steps_per_epoch=STEPS_PER_EPOCH)
            return optimizer

    callbacks = [SparsifyCallback(PRUNING, model="net", steps_per_epoch=STEPS_PER_EPOCH)] if with_callback else []
    trainer = pl.Trainer(
        max_epochs=1,
        callbacks=callbacks,
        accelerator="cuda" if inputs.is_cuda else "cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tempfile.gettempdir(),
    )
    return lambda asked: trainer.fit(Module(), DataLoader(asked, batch_size=None))


class Asking(nn.Module):
    """A network on one batch, called as the Trainer of transformers calls models."""

    def __init__(self, net: nn.Module, inputs: Tensor, labels: Tensor) -> None:
        super().__init__()
        self.net = net
        self._batch = inputs, labels

    def forward(self, asked: Tensor) -> dict[str, Tensor]:
        inputs, labels = self._batch
        return {"loss": F.cross_entropy(self.net(inputs), labels)}


def transformers_loop(model: nn.Module, inputs: Tensor, labels: Tensor, with_callback: bool) -> Callable[[Asked], None]:
    """The Trainer of transformers; the recipe through the callback, or attached before."""
    from transformers import Trainer, TrainingArguments

    from sparsify.integrations.transformers import SparsifyCallback

    asking = Asking(model, inputs, labels)
    optimizer = torch.optim.SGD(asking.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    if not with_callback:
        ScheduledModifierManager.from_yaml(PRUNING).modify(asking, optimizer, steps_per_epoch=STEPS_PER_EPOCH)
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=STEPS_PER_EPOCH,
        per_device_train_batch_size=1,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=not inputs.is_cuda,
    )

    def train(asked: Asked) -> None:
        Trainer(
            model=asking,
            args=arguments,
            train_dataset=asked,
            data_collator=lambda rows: {"asked": torch.zeros(len(rows))},
            optimizers=(optimizer, None),
            callbacks=[SparsifyCallback(PRUNING, steps_per_epoch=STEPS_PER_EPOCH)] if with_callback else [],
        ).train()

    return train


def accelerate_loop(model: nn.Module, inputs: Tensor, labels: Tensor, with_callback: bool) -> Callable[[Asked], None]:
    """A loop with accelerate; the recipe through `prepare`, or attached after `accelerator.prepare`."""
    from accelerate import Accelerator

    from sparsify.integrations.accelerate import prepare

    def train(asked: Asked) -> None:
        accelerator = Accelerator(cpu=not inputs.is_cuda)
        manager = ScheduledModifierManager.from_yaml(PRUNING)
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
        given = model, optimizer, DataLoader(asked, batch_size=1)
        if with_callback:
            net, optimizer, loader = prepare(accelerator, manager, *given, steps_per_epoch=STEPS_PER_EPOCH)
        else:
            net, optimizer, loader = accelerator.prepare(*given)
            manager.modify(net, optimizer, steps_per_epoch=STEPS_PER_EPOCH)
        for _ in loader:
            with accelerator.accumulate(net):
                accelerator.backward(manager.update_loss(F.cross_entropy(net(inputs), labels)))
                optimizer.step()
                optimizer.zero_grad()

    return train


# A framework needs one function: (model, inputs, labels, with_callback) -> what trains on the batches asked for.
LOOPS: dict[str, Callable[[nn.Module, Tensor, Tensor, bool], Callable[[Asked], None]]] = {
    "lightning": lightning_loop,
    "transformers": transformers_loop,
    "accelerate": accelerate_loop,
}


def measure(framework: str, name: str, pairs: int, device: str) -> Ratio:
    build, batch, classes = MODELS[name]
    torch.manual_seed(0)
    model = build().to(device).train()
    inputs = batch().to(device)
    labels = torch.randint(0, classes, (len(inputs),), device=device)
    loops = [Loop(LOOPS[framework](copy.deepcopy(model), inputs, labels, given)) for given in (True, False)]
    with_callback, by_hand = (loop.step for loop in loops)
    for work in (with_callback, by_hand):
        work()
    start = time.perf_counter()
    by_hand()
    repeats = max(1, round(0.05 / (time.perf_counter() - start)))
    # Time of this process alone: two thousandths are less than what other programs take away.
    ratio = paired(with_callback, by_hand, pairs=pairs, repeats=repeats, clock=time.process_time)
    for loop in loops:
        loop.close()
    return ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", choices=[*LOOPS, "all"], default="all")
    parser.add_argument("--quick", action="store_true", help="few pairs: shows that it runs, not how fast")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="only the models whose name contains this")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    frameworks = list(LOOPS) if arguments.framework == "all" else [arguments.framework]
    print(machine(*frameworks))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for framework in frameworks:
        for name in MODELS:
            if arguments.only.lower() in name.lower():
                ratio = measure(framework, name, 3 if arguments.quick else 41, device)
                reached = "reached" if ratio.median <= BAR else "NOT reached"
                what = f"{device:5} {framework:13} {name:40} {ratio.median:.4f}"
                print(f"{what}  bar {BAR}: {reached}  {ratio}", flush=True)


if __name__ == "__main__":
    main()
