"""Channels during training: found once, masked by one modifier at a time, removed for good between two steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from sparsify.errors import RecipeError, StateError
from sparsify.modifiers.base import Modifier
from sparsify.pruning.masker import Masker
from sparsify.training.checkpoint import checksum
from sparsify.training.model_inputs import TracingInputs

if TYPE_CHECKING:
    from sparsify.pruning.groups import ChannelGroups
    from sparsify.pruning.removal import Removal

__all__: list[str] = []


class ChannelRemoval:
    """The channel groups of one model, the modifiers that mask them, and the removals that were done.

    Checkpoint: `done`, the removals in their order; from these a fresh model gets the shapes that it had. Channel
    groups are found again, and modifiers claim theirs again.

    Args:
        model: the user's module, without wrappers.
        modifiers: all of the recipe, to see who prunes weights of masked channels.
        masker: its masks are cut along.
        optimizers: their state is cut along; those that keep none are left out.
        inputs: the inputs, and the trace, which is forgotten after a removal.
        resized: called with a removal after model, optimizer and masks have the new shapes.

    Attributes:
        done: every removal, as plain data.
    """

    def __init__(
        self,
        model: nn.Module,
        modifiers: Sequence[Modifier],
        masker: Masker,
        optimizers: Sequence[Optimizer],
        inputs: TracingInputs,
        resized: Callable[[Removal], None],
    ) -> None:
        self.done: list[dict[str, Any]] = []
        self._model = model
        self._modifiers = modifiers
        self._masker = masker
        self._optimizers = optimizers
        self._inputs = inputs
        self._resized = resized
        self._groups: ChannelGroups | None = None
        self._claims: list[tuple[Modifier, Mapping[str, Iterable[str]]]] = []
        self._removing: Removal | None = None

    def masks_left(self, masks: Mapping[str, Any], anew: str) -> Mapping[str, Any]:
        """Saved masks without those of channels that are chosen anew, which cover more than the weights that changed.

        Args:
            masks: the masker's state.
            anew: the key, in a state, of a modifier that takes nothing over; masks stay where it masks no channels.
        """
        if not any(type(m).__name__ == anew.partition("#")[0] and m.whole_channels for m in self._modifiers):
            return masks
        others = [m for m in self._modifiers if m.kind == "pruning" and not m.whole_channels]
        names = {name for modifier in others for name in modifier.targets(self._model)}
        return {**masks, "masks": {name: mask for name, mask in masks["masks"].items() if name in names}}

    def groups(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ChannelGroups:
        """The channel groups that a dry run on these inputs found to be exact; found once, until `rerouted`."""
        if self._groups is None:
            # Here and not above: this imports the tracer, which is slow and which most pruning never asks for.
            from sparsify.pruning.dry_run import find_groups

            self._groups = find_groups(self._model, args, kwargs)
        return self._groups

    def rerouted(self) -> None:
        """To be called where the model runs through other layers than before: trace and groups are forgotten."""
        self._inputs.forget_trace()
        self._groups = None

    def claim(self, modifier: Modifier, channel_groups: Mapping[str, Iterable[str]]) -> None:
        """Notes that `modifier` masks these channel groups, in place of those that it claimed before.

        Args:
            modifier: the one that masks them in its window.
            channel_groups: the tensors of each channel group, by its name.

        Raises:
            RecipeError: another modifier masks one of them, or prunes one of the tensors, at the same time.
        """
        name = type(modifier).__name__
        for other, theirs in self._claims:
            both = [channel_group for channel_group in channel_groups if channel_group in theirs]
            if other is not modifier and both and modifier.window.overlaps(other.window):
                raise RecipeError(
                    f"{name} and {type(other).__name__} mask the same channels, those of {both[0]!r}, from epoch "
                    f"{modifier.window.start:g} to {modifier.window.end:g} and from {other.window.start:g} to "
                    f"{other.window.end:g}. Let one end where the other starts, or take names out of one."
                )
        masked = {tensor for tensors in channel_groups.values() for tensor in tensors}
        for other in self._modifiers:
            if other.kind != "pruning" or other.whole_channels or other.window.start >= modifier.window.end:
                continue
            both = [tensor for tensor in other.targets(self._model) if tensor in masked]
            if both:
                raise RecipeError(
                    f"{type(other).__name__} prunes {both[0]!r} from epoch {other.window.start:g}, but until "
                    f"{modifier.window.end:g} {name} masks channels that this weight gives or reads. Let it start at "
                    f"epoch {modifier.window.end:g} or later, or leave the name out."
                )
        self._claims = [claim for claim in self._claims if claim[0] is not modifier] + [(modifier, channel_groups)]

    def remove(self, removal: Removal) -> None:
        """Removes channels from the model, the optimizer's state and the masks, and tells every modifier."""
        from sparsify.pruning.removal import remove

        # Remembered first: where Ctrl-C comes in between, `settle` brings the masks up to it.
        self._removing = removal
        remove(self._model, removal, self._optimizers)
        self.settle()

    def settle(self) -> None:
        """Finishes a removal whose tensors are cut: masks, trace and modifiers follow. Nothing to do where none is
        open."""
        removal = self._removing
        if removal is None:
            return
        shapes = self.shapes()
        if all(shapes.get(name) == tuple(after) for name, after in removal.after.items()):
            self._masker.resize(removal)
            self.rerouted()
            self.done.append(removal.state_dict())
            self._resized(removal)
        self._removing = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter and buffer, by name."""
        from sparsify.pruning.removal import tensors

        return {name: tuple(tensor.shape) for name, tensor in tensors(self._model).items()}

    def outstanding(self, saved: Sequence[Mapping[str, Any]], shapes: dict[str, tuple[int, ...]]) -> list[Removal]:
        """The removals of a saved state that were not done here yet.

        Args:
            saved: `done` as it was saved.
            shapes: the shapes now; changed to those after the removals.

        Raises:
            StateError: something else was removed here, or the model is another one.
        """
        if not saved and not self.done:
            return []
        from sparsify.pruning.removal import Removal

        if not self.done and self._has_shapes_after(saved, shapes):
            # The model went on in this process: channels are gone already.
            self.done = [dict(one) for one in saved]
        count = len(self.done)
        if [checksum(one) for one in saved[:count]] != [checksum(one) for one in self.done]:
            raise StateError(
                "channels were removed from this model that are there, or other ones, in the one whose state this is, "
                "and what was removed cannot come back. Call modify() on a fresh model, at epoch 0, then load the "
                "state: it says the epoch, and what is removed."
            )
        removals = [Removal.from_state(one) for one in saved[count:]]
        for removal in removals:
            for name, before in removal.before.items():
                if shapes.get(name) != tuple(before):
                    raise StateError(
                        f"the state was saved after channels of {name!r} were removed, of shape {tuple(before)} then; "
                        f"in {type(self._model).__name__} it has {shapes.get(name, 'no such tensor')}. Load it into a "
                        "model as it was before the first modify()."
                    )
            shapes.update({name: tuple(after) for name, after in removal.after.items()})
        return removals

    @staticmethod
    def _has_shapes_after(saved: Sequence[Mapping[str, Any]], shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """True if the model has the shapes of after all these removals."""
        from sparsify.pruning.removal import Removal

        after: dict[str, tuple[int, ...]] = {}
        for one in saved:
            after.update({name: tuple(shape) for name, shape in Removal.from_state(one).after.items()})
        return bool(after) and all(shapes.get(name) == shape for name, shape in after.items())
