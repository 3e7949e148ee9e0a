"""The V layouts: one row each, saying how V is contracted."""

from __future__ import annotations

from dataclasses import dataclass

from stages.errors import UsageError


@dataclass(frozen=True)
class Layout:
    """How a stored V enters the product `u_scaled @ V^T`."""

    name: str
    axes: str  # of the stored array, n the columns of the weight, k the singular values
    transposed: bool  # whether the stored array is transposed before the product
    doc: str

    def like(self, other: str) -> bool:
        """Whether the layout called `other` contracts V the same way; `nx` and `vh` do."""
        return self.transposed == LAYOUTS[other].transposed

    def expected_shape(self, columns: int, rank: int) -> tuple[int, int]:
        """Shape that V must have for a weight of `columns` columns and `rank` singular values."""
        return (columns, rank) if self.transposed else (rank, columns)


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("torch_v", "n k", True, "V as torch.svd returns it; contracted as `@ V.T`"),
        Layout("nx", "k n", False, "what Nx.LinAlg.svd returns, documented as V^T; contracted as `@ V`"),
        Layout("vh", "k n", False, "V^H as torch.linalg.svd and jnp.linalg.svd return it; contracted as `@ V`"),
    )
}


def layout_named(name: str) -> Layout:
    """The layout called `name`; `UsageError` with the list of layouts when there is none."""
    if name not in LAYOUTS:
        raise UsageError(f"layout '{name}' does not exist; layouts: {', '.join(LAYOUTS)}")
    return LAYOUTS[name]
