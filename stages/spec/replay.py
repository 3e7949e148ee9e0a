"""The component replay: ten stages from stored U, S, V and offsets to the adapted weight.

Singular-value fine-tuning as in Sakana's Transformer^2 (arXiv 2501.06252) and TRINITY; stage names and
tolerances are those of the original parity tool.
"""

from stages.spec.noise import Noise
from stages.spec.stage import Pipeline, Stage, Tolerance

REPLAY = Pipeline(
    name="replay",
    params=("source", "offsets", "u", "s", "v"),
    stages=(
        Stage("source_f32", params=("source",), shape="rows cols", doc="The weight as stored, in float32"),
        Stage("offsets_f32", params=("offsets",), shape="rank", doc="One scale offset per singular value"),
        Stage(
            "scaled_s",
            inputs=("offsets_f32",),
            params=("s",),
            shape="rank",
            tolerance=Tolerance(1e-6, 1e-8),
            doc="Singular values after the SVF step: S * (1 + offsets)",
        ),
        Stage(
            "normalization",
            inputs=("scaled_s",),
            params=("s",),
            shape="one",
            noise=Noise.SUM_RATIO,
            tolerance=Tolerance(1e-6, 1e-6),
            doc="sum(S) / sum(scaled_s), so that the step keeps the sum of singular values",
        ),
        Stage(
            "u_scaled",
            inputs=("scaled_s",),
            params=("u",),
            shape="rows rank",
            tolerance=Tolerance(1e-6, 1e-8),
            doc="U with column j times scaled_s[j]",
        ),
        Stage(
            "matmul_pre_norm",
            inputs=("u_scaled",),
            params=("v",),
            options=("layout",),
            shape="rows cols",
            noise=Noise.PRODUCT,
            tolerance=Tolerance(1e-3, 1e-5),
            doc="u_scaled @ V^T, V contracted as the layout says",
        ),
        Stage(
            "zero_source_f32",
            params=("u", "s", "v"),
            options=("layout",),
            shape="rows cols",
            noise=Noise.PRODUCT,
            tolerance=Tolerance(1e-3, 1e-5),
            doc="(U * S) @ V^T: the replay with zero offsets, which must give the source back",
        ),
        Stage(
            "adapted_source_f32",
            inputs=("matmul_pre_norm", "normalization"),
            shape="rows cols",
            tolerance=Tolerance(1e-3, 1e-5),
            doc="matmul_pre_norm * normalization, in the source's orientation",
        ),
        Stage(
            "final_f32",
            inputs=("adapted_source_f32",),
            options=("transpose",),
            shape="rows cols",
            tolerance=Tolerance(1e-3, 1e-5),
            doc="The adapted weight in the target's orientation",
        ),
        Stage(
            "final_bf16",
            inputs=("final_f32",),
            shape="rows cols",
            dtype="bfloat16",
            required=False,
            doc="final_f32 rounded to bfloat16, to nearest, ties to even",
        ),
    ),
)
