"""Inputs to trace a model on: given by the user, or seen in its first forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from sparsify.errors import DataError, StateError
from sparsify.model.batches import sample_count
from sparsify.model.optimizer_hooks import ModelCallback
from sparsify.model.signature import CallArguments, batch_arguments

if TYPE_CHECKING:
    from sparsify.model.trace import Trace

__all__: list[str] = []


class TracingInputs:
    """Calls back with the arguments of one call of the model as soon as they are known, and keeps the trace on them.

    Args:
        model: the user's module, without wrappers.
        given: (args, kwargs) that the user gave; None: those of the first forward.
        calibration_data: batches of inputs for calibration. An iterator is consumed by its first reader.
        compiled: True where calls of the model run compiled code, in which no hook is called.
        forward_comes: False where the model will not be called: then the first batch of calibration data is used.

    Attributes:
        given: as above; does not change when inputs are seen.
        calibration_data: as above; a modifier may put back a list of what it read.
    """

    def __init__(
        self,
        model: nn.Module,
        given: CallArguments | None,
        calibration_data: Iterable[Any] | None,
        *,
        compiled: bool,
        forward_comes: bool,
    ) -> None:
        self.given = given
        self.calibration_data = calibration_data
        self._model = model
        self._compiled = compiled
        self._forward_comes = forward_comes
        self._known = given
        self._callbacks: list[Callable[[tuple[Any, ...], dict[str, Any]], None]] = []
        self._hook: RemovableHandle | None = None
        self._trace: Trace | None = None

    @property
    def awaited(self) -> bool:
        """True while a callback waits for the first forward."""
        return bool(self._callbacks)

    def check_available(self) -> None:
        """Refuses a compiled model whose inputs would never be seen.

        Raises:
            StateError: no inputs were given, and the model runs compiled code.
        """
        if self._compiled and self._known is None and self._forward_comes:
            raise self._unseen()

    def when_known(self, callback: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> None:
        """Calls `callback(args, kwargs)`: at once where the inputs are known, else in the first forward, before it
        computes.

        Args:
            callback: called once; where it raises, the next forward calls it again.

        Raises:
            StateError: inputs will never be seen.
            DataError: they are to be read from calibration data, which holds no batch.
        """
        if self._known is None and not self._forward_comes:
            self._known = self._first_of_calibration()
        if self._known is not None:
            callback(*self._known)
            return
        if self._compiled:
            # Compiled code runs the hooks of its first call and no later ones:
            # https://github.com/pytorch/pytorch/issues/117758.
            # Needless once torch._dynamo.config.skip_nnmodule_hook_guards is False, which is True in torch 2.13.0.
            raise self._unseen()
        if not self._callbacks:
            begins = ModelCallback(self._forward_begins)
            self._hook = self._model.register_forward_pre_hook(begins, with_kwargs=True)
        self._callbacks.append(callback)

    def trace(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
        """The traced view of the model on these inputs: taken once, until `forget_trace`."""
        if self._trace is None:
            # Here and not above: torch.export is slow to import, and pruning never asks for it.
            from sparsify.model.trace import trace

            self._trace = trace(self._model, args, kwargs)
        return self._trace

    def forget_trace(self) -> None:
        """To be called where the model changed: the next `trace` is taken anew."""
        self._trace = None

    def close(self) -> None:
        """Takes the hook off the model and forgets the callbacks; may be called twice."""
        self._callbacks.clear()
        if self._hook is not None:
            self._hook.remove()

    def _first_of_calibration(self) -> CallArguments:
        data = self.calibration_data
        if data is None:
            raise StateError(
                "this recipe has to trace the model: pass sample_inputs (or calibration_data, or the state= of a saved "
                "run, where there is such an argument)."
            )
        batches = iter(data)
        first = next((batch for batch in batches if sample_count(batch)), None)
        if first is None:
            raise DataError("calibration_data holds no batch.")
        if batches is data:
            # It can be gone through only once: the first batch is put back.
            self.calibration_data = chain([first], batches)
        return batch_arguments(self._model, first)

    def _unseen(self) -> StateError:
        return StateError("this recipe has to trace the model, and a compiled one shows no inputs: pass sample_inputs.")

    def _forward_begins(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        while self._callbacks:
            self._callbacks[0](args, kwargs)
            self._callbacks.pop(0)
        if self._hook is not None:
            self._hook.remove()
