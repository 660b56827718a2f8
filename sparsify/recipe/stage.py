"""One stage of a recipe: modifiers under a name, with the variables and the metadata that stand beside them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny

from sparsify.modifiers.base import Modifier

__all__: list[str] = []


class Stage(BaseModel):
    """Modifiers under one name; a recipe without stages has one whose name is None.

    `groups` are the lists of modifiers by the key that they stand under, as they were written.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    name: str | None = None
    variables: dict[str, Any] = Field(default_factory=dict)
    metadata: Any = None
    groups: dict[str, tuple[SerializeAsAny[Modifier], ...]]

    @property
    def modifiers(self) -> list[Modifier]:
        """In the order of the text."""
        return [modifier for group in self.groups.values() for modifier in group]
