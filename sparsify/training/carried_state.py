"""The state of a run inside the state_dicts of its optimizer and its model, where every checkpoint takes it along.

In the optimizer's it stands whole, under "sparsify". In the model's, which is the weights as any other program loads
them, it adds no key: the structure (which layers are quantized, which channels were removed) and the number of steps
stand in `state_dict()._metadata`, which torch saves with the keys, and safetensors does not.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsify.errors import SparsifyWarning, StateError
from sparsify.model.optimizer_hooks import CARRIED, ModelCallback
from sparsify.model.optimizer_state import steps_taken
from sparsify.model.wrappers import clean_name
from sparsify.training.checkpoint import Seal, checksum

__all__: list[str] = []

NEAR = 1
"""By how many steps an optimizer's count and the manager's may differ in one checkpoint."""
RANGE = frozenset({"low", "high", "scale", "zero_point", "batches"})
"""The last parts of the names of a quantizer's buffers."""


class StateOwner(Protocol):
    """The run whose state it is."""

    def state_dict(self) -> dict[str, Any]:
        """The whole state, not sealed."""

    def load_state_dict(self, state: Mapping[str, Any], strict: bool) -> None:
        """Goes on from a state whose seal was checked."""

    def structure_state(self) -> dict[str, Any]:
        """The part of the state that tells the model's structure; the same objects where nothing has changed."""

    def load_structure(self, state: Mapping[str, Any]) -> None:
        """Gives the model that structure, or raises a StateError before anything is changed."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter and buffer, by clean name."""

    def look(self, where: str) -> None:
        """Warns of masked weights that are not zero, where a checkpoint is made."""

    @property
    def step(self) -> int:
        """The number of steps."""

    @property
    def quantizes(self) -> bool:
        """True if the recipe quantizes."""

    @property
    def removes_channels(self) -> bool:
        """True if the recipe removes channels."""


class CarriedState:
    """The state of a run as it is saved and loaded: whole by the manager and the optimizer, its structure by the model.

    They may be loaded in any order. `settle`, before the next step, says what does not belong together.

    Args:
        owner: the run.
        model: the user's module.
        optimizer: the one whose count of steps is compared with the manager's; None: there is none.
        seal: the mark of the recipe.

    Attributes:
        waits_for: the number of steps of the run whose structure the model's state_dict brought, until the state of
            that run is loaded too; None: nothing is missing. Meanwhile nothing that the clock says is in force.
        unsettled: True if something was loaded since the last step.
    """

    def __init__(self, owner: StateOwner, model: nn.Module, optimizer: object, seal: Seal) -> None:
        self.waits_for: int | None = None
        self.unsettled = False
        self._owner, self._model, self._optimizer, self._seal = owner, model, optimizer, seal
        self._last: tuple[str, int] | None = None
        self._weights_step: int | None = None
        self._alone = False
        self._written: tuple[dict[str, Any], dict[str, Any]] | None = None

    def watch(self) -> list[RemovableHandle]:
        """Hooks into the model; gives the handles."""
        into, out_of = ModelCallback(self._into_model), ModelCallback(self._out_of_model)
        return [
            self._model._register_state_dict_hook(into),  # type: ignore[no-untyped-call]
            self._model.register_load_state_dict_pre_hook(out_of),  # type: ignore[no-untyped-call]
        ]

    # ------------------------------------------------------------------ the whole state

    def save(self) -> dict[str, Any]:
        """The sealed state, for a checkpoint."""
        self._owner.look("state_dict()")
        return self._sealed()

    def _sealed(self) -> dict[str, Any]:
        return self._seal.put_on(self._owner.state_dict())

    def load(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Goes on from `state`.

        Raises:
            StateError: it does not fit; nothing was changed.
        """
        self._seal.check(state, strict)
        self._owner.load_state_dict(state, strict)
        self.waits_for = None
        self._last = (state["checksum"], self._owner.step)

    def load_nested(self, state: Mapping[str, Any] | None) -> None:
        """The state out of an optimizer's is loaded, unless it is in force already."""
        self._alone, self.unsettled = state is None, True
        if state is not None and not self._has(state):
            self.load(state)

    def _has(self, state: Mapping[str, Any]) -> bool:
        if self.waits_for is not None or not isinstance(state, Mapping) or "checksum" not in state:
            return False
        # The one that was loaded last need not be of this recipe, where `strict` was off.
        return (state["checksum"], self._owner.step) == self._last or state["checksum"] == self._sealed()["checksum"]

    # ------------------------------------------------------------------ the model's structure

    def _structure(self) -> dict[str, Any]:
        """The sealed structure; made again where it changed, since some loops ask at every step."""
        found = self._owner.structure_state()
        if self._written is None or self._written[0] != found:
            self._written = (found, {**found, "fingerprint": self._seal.fingerprint, "checksum": checksum(found)})
        return self._written[1]

    @property
    def structure_checksum(self) -> str:
        """The checksum of the model's structure."""
        found: str = self._structure()["checksum"]
        return found

    def _into_model(self, module: nn.Module, state: Mapping[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
        step = self._owner.step if self.waits_for is None else self.waits_for
        metadata[CARRIED] = {"step": step, "structure": self._structure()}

    def _out_of_model(
        self, module: nn.Module, state: Mapping[str, Any], prefix: str, metadata: Mapping[str, Any], *_: object
    ) -> None:
        saved = metadata.get(CARRIED, {})
        structure = saved.get("structure", {})
        if structure.get("fingerprint") != self._seal.fingerprint:
            self._refuse_other_structure(state, prefix)
            return
        content = {key: value for key, value in structure.items() if key not in ("fingerprint", "checksum")}
        if checksum(content) != structure["checksum"]:
            raise StateError(
                "the structure in the model's state_dict does not match its checksum: it was damaged or changed after "
                "it was saved. Load another checkpoint."
            )
        self._weights_step, self.unsettled = int(saved["step"]), True
        if structure["checksum"] != self._structure()["checksum"]:
            self._owner.load_structure(structure)
            self.waits_for = self._weights_step

    def _refuse_other_structure(self, state: Mapping[str, Any], prefix: str) -> None:
        """Refuses keys and shapes of another structure, where the state_dict does not say which."""
        here = self._owner.shapes()
        names = {clean_name(key.removeprefix(prefix)): v for key, v in state.items() if key.startswith(prefix)}
        way_out = (
            " Which structure it had, the keys do not tell, and the state_dict has lost what does (its `_metadata`, as "
            "in safetensors) or is of another recipe. Load the optimizer's state first, which carries the manager's, "
            "or the manager's own (load_state_dict), then the model's. Nothing was changed."
        )
        if self._owner.quantizes:
            theirs, mine = _quantizers(names), _quantizers(here)
            more = sorted(theirs - mine)
            if more:
                raise StateError(
                    f"this state_dict was saved after {len(theirs)} tensors were quantized, {more[0]!r} among them; in "
                    f"{type(self._model).__name__} {len(mine)} are.{way_out}"
                )
            if mine and not theirs:
                warnings.warn(
                    f"this state_dict holds no ranges of quantized tensors, of which {type(self._model).__name__} has "
                    f"{len(mine)}: they stay as they are. To go back to before they were quantized, load the "
                    "optimizer's or the manager's state first.",
                    SparsifyWarning,
                    stacklevel=2,
                )
        if self._owner.removes_channels:
            for name, value in names.items():
                if name in here and isinstance(value, Tensor) and tuple(value.shape) != here[name]:
                    raise StateError(
                        f"{name!r} has shape {tuple(value.shape)} in this state_dict and {here[name]} in "
                        f"{type(self._model).__name__}: channels were removed from one of them.{way_out}"
                    )

    # ------------------------------------------------------------------ what belongs together

    def settle(self) -> None:
        """Before a step, after something was loaded.

        Raises:
            StateError: the model has the structure of another time, and the manager's state was not loaded.
        """
        self.unsettled = False
        step = self._owner.step
        if self.waits_for is not None:
            self.unsettled = True
            raise StateError(
                f"the model's state_dict is of step {self.waits_for}, and gave the model the structure that it had "
                f"then, but the manager is at step {step}. Load the optimizer's state, which carries the manager's, or "
                "the manager's own (load_state_dict), before the next step."
            )
        self.warn_of_weights()
        steps = steps_taken(self._optimizer) if self._alone else None
        self._alone = False
        if steps is not None and abs(steps - step) > NEAR:
            warnings.warn(
                f"the optimizer's state that was loaded has taken {steps} steps, the manager is at step {step}: the "
                "schedules, masks and ranges of the recipe are those of another time. Load the manager's state of the "
                "same checkpoint (load_state_dict); where there is none, give modify() the epoch to start from.",
                SparsifyWarning,
                stacklevel=2,
            )

    def warn_of_weights(self) -> bool:
        """Warns where the model's weights were loaded from another step of this recipe than the manager is at; True if
        so."""
        saved, self._weights_step = self._weights_step, None
        other = saved is not None and abs(saved - self._owner.step) > NEAR
        if other:
            warnings.warn(
                f"the weights that were loaded are those of step {saved}, the manager is at step {self._owner.step}: "
                "masks and schedules are those of another time. Load the state of the optimizer or of the manager from "
                "the same checkpoint.",
                SparsifyWarning,
                stacklevel=2,
            )
        return other


def _quantizers(names: Mapping[str, Any]) -> set[str]:
    """The paths of quantizers among the names of tensors."""
    parts: dict[str, set[str]] = {}
    for name in names:
        path, _, last = name.rpartition(".")
        parts.setdefault(path, set()).add(last)
    return {path for path, found in parts.items() if path and found >= RANGE}
