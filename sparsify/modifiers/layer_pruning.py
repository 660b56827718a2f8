"""Pruning of whole layers: they are replaced by the identity."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from pydantic import Field
from torch import nn

from sparsify.errors import StateError
from sparsify.model import targets
from sparsify.modifiers.base import Active, Modifier, ModifierKind, ParamNames, Run
from sparsify.modifiers.schedule import Clock
from sparsify.pruning import skipped_layers

__all__ = ["LayerPruningModifier"]


class LayerPruningModifier(Modifier):
    """Replaces layers by the identity from its start on; at its end, where there is one, they come back.

    A layer stays where it is, with its parameters, its name in the state_dict and its class (as a subclass of it); only
    its forward returns its input. In an exported file nothing is left of it. With an end_epoch, `finalize` before it
    brings the layers back too.

    Layers must give the shape that they read: checked at modify() where sample_inputs are given, otherwise at the
    first call of each layer. One that returns a tuple may do so if all but the first entry are None. Weights of a
    replaced layer get no gradients, which DistributedDataParallel has to be told (find_unused_parameters=True). Layers
    that are quantized already are refused.
    """

    sharded: ClassVar[bool] = False
    kind: ClassVar[ModifierKind] = "structure"
    traces: ClassVar[bool] = True
    reroutes: ClassVar[bool] = True
    without_effect: ClassVar[frozenset[str]] = frozenset({"log_types", "update_frequency"})
    layers: ParamNames = Field(description="Names or patterns of the layers that are replaced, or types of layers.")

    def names(self) -> list[str]:
        """`layers` as a list."""
        return [self.layers] if isinstance(self.layers, str) else list(self.layers)

    def targets(self, model: nn.Module) -> Mapping[str, nn.Parameter | nn.Module]:
        """The layers of `model` that `layers` names."""
        return targets.resolve_layers(model, self.names(), where=f"{type(self).__name__}.layers")

    def attach(self, run: Run) -> Active:
        """Finds the layers and, where inputs are known, checks their shapes."""
        return _LayerPruning(self, run)


class _LayerPruning(Active):
    """Layers skipped while it is due.

    Checkpoint: the names of the skipped layers, and for each if it returns a tensor or a tuple.
    """

    structural = True

    def __init__(self, modifier: LayerPruningModifier, run: Run) -> None:
        self._modifier, self._run = modifier, run
        where = f"{type(modifier).__name__}.layers"
        layers = targets.resolve_layers(run.model, modifier.names(), where=where)
        skipped_layers.refuse_unskippable(run.model, layers, where=where)
        self._layers = layers
        self._entries: dict[str, int] = {}
        self._skipped: set[str] = set()
        if run.inputs.given is not None:
            whole = {name: layer for name, layer in layers.items() if not isinstance(layer, skipped_layers.Skipped)}
            self._entries = skipped_layers.entries_of(run.model, whole, *run.inputs.given)

    def update(self, clock: Clock) -> None:
        window = self._modifier.window
        over = math.isfinite(window.end) and clock.reached(window.end)
        due = clock.reached(window.start) and not over
        self._put(self._layers if due else ())

    def _put(self, wanted: Collection[str]) -> None:
        """Skips exactly the layers in `wanted`."""
        if self._skipped != set(wanted):
            self._run.channels.rerouted()
        for name, layer in self._layers.items():
            if name in wanted:
                # Remembered first: Ctrl-C between the two can be undone.
                self._skipped.add(name)
                if not isinstance(layer, skipped_layers.Skipped):
                    _check_not_quantized(layer, name)
                    skipped_layers.skip(layer, name, self._entries.get(name))
            elif name in self._skipped:
                self._remember(name, layer)
                skipped_layers.restore_forward(layer)
                self._skipped.discard(name)

    def _remember(self, name: str, layer: nn.Module) -> None:
        entries = skipped_layers.known_entries(layer)
        if entries is not None:
            self._entries[name] = entries

    def structure(self, epoch: float, state: Mapping[str, Any] | None) -> None:
        window = self._modifier.window
        if state is not None:
            self.check_state(state)
            self.load_state_dict(state)
        elif window.start <= epoch < window.end or (epoch >= window.start and math.isinf(window.end)):
            self._put(self._layers)

    def detach(self) -> None:
        # For good where there is no end; else the end comes now.
        if self._modifier.end_epoch != -1:
            self._put(())

    def state_dict(self) -> dict[str, Any]:
        for name, layer in self._layers.items():
            self._remember(name, layer)
        return {"skipped": [name for name in self._layers if name in self._skipped], "entries": dict(self._entries)}

    def check_state(self, state: Mapping[str, Any]) -> None:
        missing = [name for name in state["skipped"] if name not in self._layers]
        if missing:
            raise StateError(
                f"LayerPruningModifier: the state was saved with layer {missing[0]!r} pruned, which the recipe does "
                "not name in this model. Load the state with the recipe and model it was saved with."
            )

    def take_over(self, state: Mapping[str, Any]) -> str | None:
        known = [name for name in state["skipped"] if name in self._layers]
        self.load_state_dict({**state, "skipped": known})
        left = [name for name in state["skipped"] if name not in known]
        return f"layers that the recipe does not prune here: {', '.join(left)}" if left else None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._entries |= {name: int(entries) for name, entries in state["entries"].items()}
        self._put(list(state["skipped"]))


def _check_not_quantized(module: nn.Module, name: str) -> None:
    """Checks that a layer is not quantized.

    Raises:
        StateError: it is.
    """
    from sparsify.quantization.wiring import Converted

    if isinstance(module, Converted):
        raise StateError(
            f"LayerPruningModifier.layers: {name!r} is quantized already, and a layer that is not called has no "
            "ranges. Let LayerPruningModifier start before QuantizationModifier."
        )
