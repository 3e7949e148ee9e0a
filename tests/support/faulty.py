"""A backend with a planted fault."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from stages.spec.backend import Backend


@dataclasses.dataclass(frozen=True)
class Faulty:
    """A backend with one stage changed, as far as calibration looks."""

    inside: Backend
    stage: str
    change: Callable[..., Any]
    name: str = "faulty"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inside, name)

    def _table(self, table: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**table, self.stage: self.change(table[self.stage])} if self.stage in table else table

    @property
    def forward(self) -> Mapping[str, Any]:
        return self._table(self.inside.forward)

    @property
    def replay(self) -> Mapping[str, Any]:
        return self._table(self.inside.replay)
