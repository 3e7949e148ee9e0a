"""Where the orders of `--order` come from: a recorded run, a file of `svf infer --json`, another backend's probe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stages.errors import InputError, NotFoundError, shown
from stages.files import cache
from stages.files.bundle import Bundle
from stages.files.jsonio import read_object
from stages.order.findings import SCHEMA
from stages.order.infer_recorded import infer_recorded
from stages.order.ordered_backend import Orders
from stages.order.probe_sizes import SizesRequest
from stages.progress import Progress
from stages.run.calibration import cpu_model
from stages.run.children import document_of, run_child
from stages.spec.backend import SIDES
from stages.sums.orders import Order
from stages.sums.text import parse_order

NATIVE, INFERRED = "native", "inferred"
# Rows of each recorded tensor that its order is inferred from: thousands of elements.
ROWS = 16
# And columns of each recorded product of a forward.
COLUMNS = 64


def orders_for(source: str, *, backend: str, components: Path, device: str, progress: Progress) -> Orders | None:
    """The orders that `source` means for a bundle, by stage and count of terms; None for the backend's own.

    `InputError` for a file that is no `svf.orders/1` document, `NotFoundError` for one that is not there.
    """
    if source in (NATIVE, backend):
        return None
    if source in SIDES:
        return _probed(source, components, device, progress)
    return orders_at(components if source == INFERRED else Path(source), progress)


def orders_at(path: Path, progress: Progress) -> Orders:
    """The orders of a file that `svf infer --json` wrote, or of a recorded run, inferred now.

    `NotFoundError` when nothing is there, `InputError` when it is neither.
    """
    if not path.exists():
        raise NotFoundError(
            f"--order {shown(path)}: is neither a known name nor a recorded run, nor a file of svf infer"
        )
    if path.is_file() and path.suffix == ".json":
        document = read_object(path)
        if document.get("schema") != SCHEMA:
            raise InputError(f"{path}: schema is {shown(document.get('schema'))}, expected {SCHEMA} (svf infer --json)")
        return orders_of(document["rows"], str(path))
    progress.say(f"inferring the orders of {path}")
    return orders_of(infer_recorded(path, rows=ROWS, columns=COLUMNS, progress=progress)["rows"], str(path))


def orders_of(rows: Any, where: str) -> Orders:
    """Orders by stage and count of terms of the rows of a document; those left out that reproduce not all they should.

    A stage whose tensors were summed in several ways has none. `InputError` for rows of another form.
    """
    found: dict[tuple[str, int], Order] = {}
    refused: set[tuple[str, int]] = set()
    for row in rows if isinstance(rows, list) else [None]:
        if not isinstance(row, dict) or not isinstance(row.get("stage"), str) or not isinstance(row.get("terms"), int):
            raise InputError(f"{where}: a row of orders is {shown(row)}; expected stage, terms, order, remaining")
        key = (row["stage"], row["terms"])
        order = parse_order(str(row["order"])) if row.get("order") else None
        parts = {part["order"] for part in row.get("parts", [])}  # margins of their own are no one order
        if order is None or row.get("remaining") or len(parts) > 1 or found.setdefault(key, order) != order:
            refused.add(key)
    return {key: order for key, order in found.items() if key not in refused}


def _probed(name: str, components: Path, device: str, progress: Progress) -> Orders:
    with Bundle(components) as bundle:
        sizes = sorted({min(entry.shape) for entry in bundle.entries})
    key = cache.identity(name, device, cache.threads_available(), cpu_model()) | {"sizes": ",".join(map(str, sizes))}
    kept = cache.load(key)
    if kept is None:
        progress.say(f"probing {name}")
        kept = {"rows": document_of(name, run_child(SizesRequest(name, device, tuple(sizes))))["rows"]}
        cache.store(key, kept)
    return orders_of(kept["rows"], f"probe of {name}")
