"""What hooks of a running model have seen, put together: calls joined along the tokens, padding left out.

The engines (svf_torch/capture.py, svf_jax/capture.py) fill a `Record` in; nothing here knows a framework.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stages.errors import InputError, NotFoundError, UsageError
from stages.files.folders import prepare_folder
from stages.files.forward_dump import ForwardDump, Place, forward_key, run_fields
from stages.files.source import open_model
from stages.files.tensorfile import write_tensors
from stages.spec.config import DTYPES, LM_HEAD, ModelConfig, RawConfig
from stages.spec.families import parameter_shapes
from stages.spec.forward import forward_pipeline
from stages.spec.sites import Reached
from stages.spec.stage import Pipeline
from stages.spec.values import StageResult

# Where a model is written that was made in memory, in the folder of its dump.
MODEL_FOLDER = "model"
# Stages that say nothing of the dtype that a run was computed in.
_TABLES = ("rope_cos", "rope_sin")


@dataclass(frozen=True)
class Call:
    """One call of a model: token ids `[batch, n]`, which of them are no padding, and what each hook saw.

    `before` counts the positions that a cache held already. Arrays are `[batch, rows, ...]`, their rows the last ones
    of the call; a batch of 1 stands for all.
    """

    tokens: np.ndarray
    real: np.ndarray
    before: int
    arrays: Mapping[Reached, np.ndarray]


@dataclass(frozen=True)
class Sequence:
    """One sequence: its tokens, and by layer and stage what was captured; `about` says where it comes from."""

    tokens: list[int]
    arrays: Mapping[Place, np.ndarray]
    about: Mapping[str, str]


@dataclass
class Record:
    """The calls of one model, `facts` of how it was run, and where its weights are to be had.

    `source` is the folder or hub model that it was loaded from, None for one that was made in memory; `weights` reads
    a parameter of it as it is now.
    """

    config: ModelConfig
    raw_config: RawConfig
    source: str | None
    weights: Any
    facts: dict[str, str] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)

    @property
    def path(self) -> Pipeline:
        """The declared path of the model."""
        return forward_pipeline(self.config)

    def positions(self) -> int:
        """How many positions the calls of the sequence that is now running have had."""
        return self.calls[-1].before + self.calls[-1].tokens.shape[1] if self.calls else 0

    def check_start(self, before: int) -> None:
        """`InputError` unless a call whose cache holds `before` positions begins a sequence or goes on with one."""
        if before not in (0, self.positions()):
            raise InputError(
                f"the cache holds {before} positions, of which {self.positions()} were captured; begin the capture "
                "before the prefill"
            )

    def sequences(self) -> list[Sequence]:
        """Every sequence that was run, in the order of the calls, then of the rows of a batch."""
        if not self.calls:
            raise InputError("nothing was captured: call the model inside the with block")
        runs: list[list[Call]] = []
        for call in self.calls:
            if call.before == 0:
                runs.append([])
            runs[-1].append(call)
        return [_sequence(self.path, run, row) for run in runs for row in range(len(run[0].tokens))]

    def write(self, folder: Path) -> list[Path]:
        """Write a dump of the one sequence in the new `folder`, or of each in a folder of its own there, by number."""
        sequences = self.sequences()
        names = [""] if len(sequences) == 1 else [str(n) for n in range(len(sequences))]
        if len(sequences) > 1:
            prepare_folder(folder)
        for name, sequence in zip(names, sequences, strict=True):
            self._write(folder / name, sequence, folder / MODEL_FOLDER)
        return [folder / name for name in names]

    def _write(self, folder: Path, sequence: Sequence, own: Path) -> None:
        results = _in_order(sequence.arrays)
        with ForwardDump(folder) as dump:
            for _ in dump.record(results):
                pass
            source = self.source or self._kept_model(own)
            with open_model(source, recorded=True) as checkpoint:
                named = run_fields(checkpoint, source, sequence.tokens)
            of_layers = [{stage for at, stage in sequence.arrays if at == layer} for layer in self._layers(sequence)]
            everywhere = set.intersection(*of_layers) if of_layers else set()
            whole = {stage for layer, stage in sequence.arrays if layer is None}
            dump.commit(
                {
                    "backend": None,
                    "facts": {**self.facts, **sequence.about},
                    **named,
                    "dtype": _dtype(sequence.arrays),
                    "positions": "all",
                    "layers": self._layers(sequence),
                    "stages": [name for name in self.path if name in everywhere | whole],
                }
            )

    def _layers(self, sequence: Sequence) -> list[int]:
        return sorted({layer for layer, _ in sequence.arrays if layer is not None})

    def _kept_model(self, folder: Path) -> str:
        """The name of the folder that the model is in as it was in memory, written once, so that it can be judged."""
        if folder.exists():
            return str(folder.resolve())
        prepare_folder(folder)
        (folder / "config.json").write_text(json.dumps(dict(self.raw_config)))
        tied = self.config.tie_word_embeddings
        names = [name for name in parameter_shapes(self.config) if not (tied and name == LM_HEAD)]
        arrays = {name: np.ascontiguousarray(self.weights.read(name)) for name in names}
        write_tensors(folder / "model.safetensors", arrays, metadata={"format": "pt"})
        return str(folder.resolve())


def known_source(source: str | None, named: str | None) -> str | None:
    """Where a model's weights are: at `source` as the user says, else where the model says that it came from, if that
    is a model on this disk; None for a model that was made in memory."""
    if source is not None:
        open_model(source).close()
        return source
    try:
        if named:
            open_model(named, recorded=True).close()
            return named
    except (InputError, NotFoundError, UsageError):
        pass
    return None


def _in_order(arrays: Mapping[Place, np.ndarray]) -> Iterator[StageResult]:
    """What was captured, layer by layer."""
    for layer, stage in sorted(arrays, key=lambda at: -1 if at[0] is None else at[0]):
        yield StageResult(layer, stage, arrays[layer, stage])


def _dtype(arrays: Mapping[Place, np.ndarray]) -> str:
    """The dtype that most stages have: what the run was computed in."""
    counts = Counter(array.dtype.name for (_, stage), array in arrays.items() if stage not in _TABLES)
    found = counts.most_common(1)[0][0]
    if found not in DTYPES:
        raise InputError(f"most stages are {found}; a captured run is judged in {', '.join(DTYPES)}")
    return found


def _sequence(path: Pipeline, calls: list[Call], row: int) -> Sequence:
    tokens = np.concatenate([call.tokens[row][call.real[row]] for call in calls])
    parts: dict[Place, dict[int, np.ndarray]] = {}
    expected: dict[Place, int] = Counter()
    for layer, site in dict.fromkeys(at for call in calls for at in call.arrays):
        expected[layer, site.stage] += 1
        rows = _rows(calls, row, (layer, site))
        if rows is not None:
            parts.setdefault((layer, site.stage), {})[site.part] = rows
    arrays: dict[Place, np.ndarray] = {}
    dropped = []
    for place, found in parts.items():
        joined = [found[part] for part in sorted(found)]
        lengths = {len(part) for part in joined}
        if len(joined) == expected[place] and (
            lengths == {len(tokens)} or (place[1] == "lm_head" and len(lengths) == 1)
        ):
            whole = np.concatenate(joined, axis=-1) if len(joined) > 1 else joined[0]
            by_head = path[place[1]].shape.startswith("heads ")
            arrays[place] = np.ascontiguousarray(whole.swapaxes(0, 1) if by_head else whole)
        else:
            dropped.append(forward_key(place))
    about = {"calls": _in_words(calls)}
    padding = sum(int((~call.real[row]).sum()) for call in calls)
    if len(calls[0].tokens) > 1:
        about["batch"] = f"row {row} of {len(calls[0].tokens)}"
    if padding:
        about["padding"] = f"{padding} positions left out"
    if dropped:
        about["not kept"] = f"of other lengths than the sequence: {', '.join(dropped)}"
    return Sequence(tokens.tolist(), arrays, about)


def _rows(calls: list[Call], row: int, at: Reached) -> np.ndarray | None:
    """What a hook saw of a row in all calls, its last positions without a gap; None where the last call has none."""
    kept: list[np.ndarray] = []
    for call in calls:
        batch = call.arrays.get(at)
        if batch is None:
            kept = []
            continue
        if batch.ndim == 2 and len(batch) == call.tokens.size:  # experts see the tokens of all rows in one
            batch = batch.reshape(*call.tokens.shape, -1)
        array, n = batch[row if len(batch) > 1 else 0], call.tokens.shape[1]
        if len(array) > n:
            return None
        if len(array) < n:
            kept = []
        kept.append(array[call.real[row][n - len(array) :]])
    return np.concatenate(kept) if kept else None


def _in_words(calls: list[Call]) -> str:
    lengths = [call.tokens.shape[1] for call in calls]
    if len(lengths) == 1:
        return f"one of {lengths[0]} positions"
    rest = Counter(lengths[1:])
    return f"one of {lengths[0]} positions, then {', '.join(f'{count} of {n}' for n, count in rest.items())}"
