"""What products in a given order are put together from, in PyTorch. Twin of svf_jax/order.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

# MKL sums up to 192 terms in one FMA chain, oneDNN up to 512 (svf probe; docs/findings/order.md).
MATMUL_CHAIN = 192
# Kernels for whole tiles alone: rows and columns that fill none take other ones, and other orders.
TILE = 64


def chain(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, `[M, N]`, each element likely one FMA chain over K; who needs it to be so checks."""
    rows, cols = a.shape[0], b.shape[1]
    a, b = F.pad(a, (0, 0, 0, -rows % TILE)), F.pad(b, (0, -cols % TILE))
    if a.shape[1] <= MATMUL_CHAIN or not torch.backends.mkldnn.is_available() or a.is_cuda:
        out = a @ b
    else:
        out = torch.ops.mkldnn._linear_pointwise(a, b.T.contiguous(), None, "none", [], "")
    return out[:rows, :cols]


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y, rounded by itself."""
    return x + y


def join(parts: Sequence[Tensor]) -> Tensor:
    """The parts side by side, on the last axis."""
    return torch.cat(list(parts), dim=-1)


def stack(parts: Sequence[Tensor]) -> Tensor:
    """The parts on a new first axis."""
    return torch.stack(list(parts))


def scale(x: Tensor, factor: float) -> Tensor:
    """x times a factor rounded to float32."""
    return x * factor


ORDERED: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {"chain": chain, "add": add, "join": join, "stack": stack, "scale": scale}
)
