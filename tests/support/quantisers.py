"""Right quantisers of what the `gguf` package only reads, written anew from the layouts and the searches of ggml.

Rows in, bytes out: `[n, columns]` float32 to `[n, bytes]`. `weights` is an importance matrix, one number a column.
Float64 inside, so that nothing here shares a rounding with what is tested.
"""

from __future__ import annotations

from collections.abc import Callable

import gguf
import numpy as np

Quantiser = Callable[..., np.ndarray]
IQ4 = np.array((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113))


def half(x: np.ndarray) -> np.ndarray:
    """As float16 stores it."""
    return x.astype(np.float16).astype(np.float64)


def bytes_of(x: np.ndarray) -> np.ndarray:
    return x.astype("<f2")[:, None].view(np.uint8).reshape(len(x), -1)


def over(x: np.ndarray, d: np.ndarray) -> np.ndarray:
    """x / d, 0 where d is."""
    return np.divide(x, d, out=np.zeros(np.broadcast(x, d).shape), where=d != 0)


def symmetric(x: np.ndarray, most: int, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale `[...]` and codes `-most..most - 1`, `[..., n]`: of several scales the one whose weighted fit is best."""
    peak = np.take_along_axis(x, np.abs(x).argmax(-1)[..., None], -1)
    best, scale, codes = np.full(x.shape[:-1], -1.0), np.zeros(x.shape[:-1]), np.zeros(x.shape)
    for extra in (0, *range(-9, 0), *range(1, 10)):
        q = np.clip(np.rint(over(-(most + 0.1 * extra) * x, peak)), -most, most - 1)
        xl, ll = (w * x * q).sum(-1), (w * q * q).sum(-1)
        good = over(xl * xl, ll) > best
        best, scale = np.where(good, over(xl * xl, ll), best), np.where(good, over(xl, ll), scale)
        codes = np.where(good[..., None], q, codes)
    return scale, codes


def affine(x: np.ndarray, most: int, w: np.ndarray, first: float, by: float, count: int) -> tuple[np.ndarray, ...]:
    """Scale and lowest value, at most 0, `[...]`, and codes 0 to `most`: the least weighted error of several fits."""
    low, high = np.minimum(x.min(-1), 0), x.max(-1)
    reach = (high - low)[..., None]
    scale, bottom = reach[..., 0] / most, low
    codes = np.clip(np.rint(over(most * (x - low[..., None]), reach)), 0, most)
    error = (w * (scale[..., None] * codes + bottom[..., None] - x) ** 2).sum(-1)
    for step in range(count + 1):
        q = np.clip(np.rint(over((first + by * step + most) * (x - low[..., None]), reach)), 0, most)
        sw, sx, sl, sll, sxl = (v.sum(-1) for v in (w + 0 * x, w * x, w * q, w * q * q, w * q * x))
        d = sw * sll - sl * sl
        s, b = over(sw * sxl - sx * sl, d), over(sll * sx - sl * sxl, d)
        s, b = np.where(b > 0, over(sxl, sll), s), np.minimum(b, 0)
        now = (w * (s[..., None] * q + b[..., None] - x) ** 2).sum(-1)
        good = (now < error) & (d > 0)
        error, scale, bottom = (np.where(good, *pair) for pair in ((now, error), (s, scale), (b, bottom)))
        codes = np.where(good[..., None], q, codes)
    return scale, bottom, codes


def blocks(x: np.ndarray, weights: np.ndarray | None, size: int, group: int) -> tuple[np.ndarray, np.ndarray | None]:
    groups = x.astype(np.float64).reshape(-1, size // group, group)
    if weights is None:
        return groups, None
    return groups, np.broadcast_to(weights, x.shape).reshape(groups.shape)


def recoded(x: np.ndarray, d: np.ndarray, bottom: np.ndarray, least: int, most: int) -> np.ndarray:
    """The nearest codes under scales as they are stored."""
    return np.clip(np.rint(over(x - bottom[..., None], d[..., None])), least, most)


def pack4(q: np.ndarray) -> np.ndarray:
    """Codes `[n, 256]`: in each 64, the first 32 in low halves of bytes, the others in high ones."""
    q = q.reshape(len(q), 4, 2, 32).astype(np.uint8)
    return ((q[:, :, 0] & 15) | ((q[:, :, 1] & 15) << 4)).reshape(len(q), -1)


def pack2(q: np.ndarray) -> np.ndarray:
    """Two bits of codes `[n, 256]`: in each 128, four times 32 in the same bytes."""
    q = q.reshape(len(q), 2, 4, 32).astype(np.uint8) & 3
    return (q[:, :, 0] | (q[:, :, 1] << 2) | (q[:, :, 2] << 4) | (q[:, :, 3] << 6)).reshape(len(q), -1)


def six_bits(scale: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Eight scales and eight lowest values of 6 bits each, in 12 bytes."""
    s, m = scale.astype(np.uint8), low.astype(np.uint8)
    one, two = s[:, :4] | ((s[:, 4:] >> 4) << 6), m[:, :4] | ((m[:, 4:] >> 4) << 6)
    return np.concatenate([one, two, (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)], axis=1)


def k_affine(x: np.ndarray, weights: np.ndarray | None, most: int, group: int, unit: int) -> tuple[np.ndarray, ...]:
    """d, dmin, codes of scales and lowest values, and of weights, of super-blocks with a lowest value in each group."""
    groups, given = blocks(x, weights, 256, group)
    spread = np.sqrt((groups**2).mean(-1, keepdims=True))
    w = np.abs(groups) + spread if given is None else given * np.sqrt(spread**2 + groups**2)
    scale, bottom, _ = affine(groups, most, w, -0.9, 0.05, 36)
    d, dmin = scale.max(-1) / unit, -bottom.min(-1) / unit
    s, m = (np.minimum(np.rint(over(a, b[:, None])), unit) for a, b in ((scale, d), (-bottom, dmin)))
    d, dmin = half(d), half(dmin)
    return d, dmin, s, m, recoded(groups, d[:, None] * s, -dmin[:, None] * m, 0, most).reshape(-1, 256)


def k_symmetric(x: np.ndarray, weights: np.ndarray | None, most: int, unit: int) -> tuple[np.ndarray, ...]:
    """d, codes of scales, and of weights, of super-blocks of 16 groups of 16."""
    groups, given = blocks(x, weights, 256, 16)
    scale, _ = symmetric(groups, most, groups**2 if given is None else given)
    peak = np.take_along_axis(scale, np.abs(scale).argmax(-1)[:, None], -1)[:, 0]
    d = -peak / unit
    s = np.clip(np.rint(over(scale, d[:, None])), -unit, unit - 1)
    d = half(d)
    return d, s, recoded(groups, d[:, None] * s, np.zeros(s.shape), -most, most - 1).reshape(-1, 256)


def q2_k(x: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    d, dmin, s, m, q = k_affine(x, weights, 3, 16, 15)
    scales = s.astype(np.uint8) | (m.astype(np.uint8) << 4)
    return np.concatenate([scales, pack2(q), bytes_of(d), bytes_of(dmin)], axis=1).reshape(len(x), -1)


def q3_k(x: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    d, s, q = k_symmetric(x, weights, 4, 32)
    q, s = (q + 4).astype(np.uint8), (s + 32).astype(np.uint8)
    high = np.packbits((q > 3).reshape(-1, 8, 32), axis=1, bitorder="little").reshape(-1, 32)
    low = (s[:, :8] & 15) | ((s[:, 8:] & 15) << 4)
    top = (s >> 4).reshape(-1, 4, 4)
    rest = top[:, 0] | (top[:, 1] << 2) | (top[:, 2] << 4) | (top[:, 3] << 6)
    return np.concatenate([high, pack2(q), low, rest, bytes_of(d)], axis=1).reshape(len(x), -1)


def q4_k(x: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    d, dmin, s, m, q = k_affine(x, weights, 15, 32, 63)
    return np.concatenate([bytes_of(d), bytes_of(dmin), six_bits(s, m), pack4(q)], axis=1).reshape(len(x), -1)


def q5_k(x: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    d, dmin, s, m, q = k_affine(x, weights, 31, 32, 63)
    high = np.packbits((q > 15).reshape(-1, 8, 32), axis=1, bitorder="little").reshape(-1, 32)
    parts = [bytes_of(d), bytes_of(dmin), six_bits(s, m), high, pack4(q)]
    return np.concatenate(parts, axis=1).reshape(len(x), -1)


def q6_k(x: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    d, s, q = k_symmetric(x, weights, 32, 128)
    q = (q + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low = np.stack([(q[:, :, i] & 15) | ((q[:, :, i + 2] & 15) << 4) for i in (0, 1)], axis=2).reshape(-1, 128)
    parts = [low, pack2(q >> 4), s.astype(np.int8).view(np.uint8), bytes_of(d)]
    return np.concatenate(parts, axis=1).reshape(len(x), -1)


def iq4_nl(x: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    groups, _ = blocks(x, None, 32, 32)
    d = over(np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], -1)[..., 0], np.array(-127.0))[:, 0]
    q = nearest_of_table(over(groups[:, 0], d[:, None])).reshape(-1, 2, 16)
    return np.concatenate([bytes_of(d), q[:, 0] | (q[:, 1] << 4)], axis=1).reshape(len(x), -1)


def iq4_xs(x: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    groups, _ = blocks(x, None, 256, 32)
    scale = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], -1)[..., 0] / -127
    d = -np.take_along_axis(scale, np.abs(scale).argmax(-1)[:, None], -1)[:, 0] / 32
    s = np.clip(np.rint(over(scale, d[:, None])), -32, 31)
    q = nearest_of_table(over(groups, (d[:, None] * s)[..., None])).reshape(-1, 8, 2, 16)
    s = (s + 32).astype(np.uint16)
    high = ((s >> 4) << (2 * np.arange(8, dtype=np.uint16))).sum(1).astype("<u2")[:, None].view(np.uint8)
    low = ((s[:, ::2] & 15) | ((s[:, 1::2] & 15) << 4)).astype(np.uint8)
    codes = (q[:, :, 0] | (q[:, :, 1] << 4)).reshape(-1, 128)
    return np.concatenate([bytes_of(d), high.reshape(-1, 2), low, codes], axis=1).reshape(len(x), -1)


def nearest_of_table(x: np.ndarray) -> np.ndarray:
    return np.abs(x[..., None] - IQ4).argmin(-1).astype(np.uint8)


def fitted(kind: str, x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Q4_0, Q4_1, Q5_0 and Q5_1 as an importance matrix makes them: the scale is fitted to the codes, which stay."""
    groups, given = blocks(x, weights, 32, 32)
    assert given is not None
    w = given * np.sqrt((groups**2).mean() + groups**2)
    most = {"4": 16, "5": 32}[kind[1]]
    if kind.endswith("0"):
        d, q = symmetric(groups, most // 2, w)
        q, head = q + most // 2, [bytes_of(d[:, 0])]
    else:
        d, bottom, q = affine(groups, most - 1, w, -0.9, 0.05, 36)
        head = [bytes_of(d[:, 0]), bytes_of(bottom[:, 0])]
    q = q[:, 0].astype(np.uint8)
    if most == 32:
        head.append(np.packbits(q >> 4, axis=1, bitorder="little"))
    halves = (q & 15).reshape(-1, 2, 16)
    return np.concatenate([*head, halves[:, 0] | (halves[:, 1] << 4)], axis=1).reshape(len(x), -1)


def by_package(kind: str) -> Quantiser:
    return lambda x, _=None: gguf.quantize(np.ascontiguousarray(x), gguf.GGMLQuantizationType[kind])


QUANTISERS: dict[str, Quantiser] = {
    **{kind: by_package(kind) for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")},
    "Q2_K": q2_k,
    "Q3_K": q3_k,
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
    "IQ4_NL": iq4_nl,
    "IQ4_XS": iq4_xs,
}
