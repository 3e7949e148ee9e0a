"""The orders of a replay's products and sums of some sizes, probed in a process of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from stages.order import black_boxes as boxes
from stages.order import probe
from stages.order.findings import SCHEMA
from stages.order.infer_recorded import PRODUCTS, RATIOS
from stages.progress import Progress
from stages.spec.backend import Loader
from stages.sums.text import format_order


@dataclass(frozen=True)
class SizesRequest:
    """Whose products and sums to probe, and how many terms they have."""

    job: ClassVar[str] = "sizes"

    backend: str
    device: str
    sizes: tuple[int, ...]


def probe_sizes(request: SizesRequest, load: Loader, _progress: Progress) -> dict[str, Any]:
    """Rows of stage, terms and order."""
    backend = load(request.backend, request.device)
    product, total = boxes.PRODUCTS["matmul_pre_norm (torch_v)"](backend), boxes.total(backend)
    rows = []
    for terms in request.sizes:
        order = probe.ProductProbe(product, (64, 256, terms)).regions()[0].order
        rows += [{"stage": stage.name, "terms": terms, "order": format_order(order)} for stage in PRODUCTS]
        text = format_order(probe.total(total, terms))
        rows += [{"stage": stage.name, "terms": terms, "order": text} for stage in RATIOS]
    return {"schema": SCHEMA, "rows": rows}
