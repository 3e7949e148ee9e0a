"""PyTorch's own SVD, twin of svf_jax/svd.py; and the legacy decompositions of the original tool."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stages.spec.factors import Factors, Method


def svd(source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U `[rows, rank]`, S `[rank]` and V `[cols, rank]` of a float32 weight."""
    u, s, vh = torch.linalg.svd(source, full_matrices=False)
    return u, s, vh.T  # linalg.svd returns V^H, a backend gives V


@dataclass(frozen=True)
class TorchFactors:
    """U, S and V (layout `torch_v`) as float32 arrays."""

    u: np.ndarray
    s: np.ndarray
    v: np.ndarray

    def u_chunks(self) -> Iterator[tuple[int, int, np.ndarray]]:
        yield 0, self.u.shape[0], self.u


def torch_svd(_name: str, rows: Callable[[int, int], np.ndarray], shape: tuple[int, int]) -> Factors:
    """torch.svd of the whole float32 weight: another count of threads gives other bits."""
    u, s, v = torch.svd(torch.from_numpy(rows(0, shape[0])))
    return TorchFactors(u.contiguous().numpy(), s.numpy(), v.contiguous().numpy())


def torch_linalg_svd(_name: str, rows: Callable[[int, int], np.ndarray], shape: tuple[int, int]) -> Factors:
    """torch.linalg.svd, whose V^H is turned back into V."""
    u, s, v = svd(torch.from_numpy(rows(0, shape[0])))
    return TorchFactors(u.contiguous().numpy(), s.numpy(), v.contiguous().numpy())


TORCH_SVD = Method(
    "recomputed_torch_svd",
    "python_recomputed_torch_svd_v_final_bf16",
    torch_svd,
    "recomputed_torch_linalg_svd",
    "python_recomputed_linalg_svd_vh_final_bf16",
    torch_linalg_svd,
)
