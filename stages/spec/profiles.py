"""What engines record of a forward, by name: the stages that each of some usual recordings keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from stages.spec.noise import Noise
from stages.spec.sites import sites
from stages.spec.stage import Pipeline

# What follows from the config and the positions alone.
TABLES = ("inv_freq", "rope_angle", "rope_cos", "rope_sin")


@dataclass(frozen=True)
class Profile:
    """One usual recording: `of` picks its stages from a model's path."""

    name: str
    doc: str
    of: Callable[[Pipeline], Iterable[str]]

    def stages(self, path: Pipeline) -> tuple[str, ...]:
        """The stages that it keeps, in execution order."""
        kept = frozenset(self.of(path))
        return tuple(name for name in path if name in kept)


def _hooks(path: Pipeline) -> Iterable[str]:
    return {site.stage for site in sites(path)}.difference(TABLES)


def _engine(path: Pipeline) -> Iterable[str]:
    """Products but gate and up, which are one kernel, attention, what is gated, and residuals."""
    products = [s.name for s in path.values() if s.noise is Noise.PRODUCT and s.name not in ("ffn_gate", "ffn_up")]
    return [*products, "attention", "ffn_swigl", "post_attn_residual", "post_ffn_residual"]


def _seed(path: Pipeline) -> Iterable[str]:
    """All but tables, norms of heads, and the inside of attention."""
    return [name for name in path if name not in (*TABLES, "q_norm", "k_norm", "attn_scores", "attn_softmax")]


PROFILES: Mapping[str, Profile] = MappingProxyType(
    {
        profile.name: profile
        for profile in (
            Profile("hooks", "what hooks on modules give with fused attention", _hooks),
            Profile("engine", "what kernels of a serving engine leave in memory", _engine),
            Profile("seed", "the stages of `apr trace` on a GPU", _seed),
            Profile(
                "hidden",
                "the embedding, each layer's output, the final norm",
                lambda _path: ("embedding", "post_ffn_residual", "final_norm"),
            ),
            Profile("logits", "the logits alone", lambda _path: ("lm_head",)),
        )
    }
)
