"""Which layers and stages a comparison is asked about: all that is there, or what --layers and --stages say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from stages.errors import UsageError, shown
from stages.spec.selectors import parse_layers


@dataclass(frozen=True)
class Wanted:
    """The rows asked for. `layers`, such as `0,3-5`: these layers alone, and stages of the whole model where `stages`
    names them, or with `whole`; `stages`: these alone."""

    layers: str | None = None
    stages: str | None = None
    whole: bool = False

    @classmethod
    def of(cls, layers: str | None, stages: str | None, *, whole: bool = False) -> Wanted:
        """What the options say; `all` is as good as leaving one out."""
        one, other = (None if text is not None and text.strip() == "all" else text for text in (layers, stages))
        return cls(one, other, whole)

    def check(self, stages: Iterable[str], aliases: Mapping[str, str], layers: Iterable[int]) -> None:
        """`UsageError` naming what is asked for and not there to be compared."""
        known, there = list(stages), sorted(set(layers))
        for name in self._names():
            if name not in known and name not in aliases:
                raise UsageError(f"--stages: no stage '{shown(name)}'; there are {', '.join(known)}")
        missing = [n for n in self._layers() if n not in there]
        if missing:
            raise UsageError(f"--layers: no layer {missing[0]}; there are {', '.join(map(str, there)) or 'none'}")

    def has(self, layer: int | None, stage: str, aliases: Mapping[str, str]) -> bool:
        """Whether a row of this place is asked for."""
        names = {aliases.get(name, name) for name in self._names()}
        in_layers = self.layers is None or layer in self._layers()
        in_layers = in_layers or (layer is None and (self.whole or self.stages is not None))
        return in_layers and (self.stages is None or aliases.get(stage, stage) in names)

    def has_tensor(self, layer: int | None, stage: str) -> bool:
        """Whether a replay's row is asked for; a tensor of the whole model is of no layer."""
        return (self.layers is None or layer in self._layers()) and Wanted(None, self.stages).has(None, stage, {})

    def _names(self) -> list[str]:
        names = [name.strip() for name in (self.stages or "").split(",") if name.strip()]
        if self.stages is not None and not names:
            raise UsageError("--stages is empty; name stages, or leave the option out")
        return names

    def _layers(self) -> tuple[int, ...]:
        if self.layers is not None and not self.layers.strip():
            raise UsageError("--layers is empty; name layers, or leave the option out")
        return parse_layers(self.layers)
