"""The cautious rule in NumPy and float64, one coordinate at a time."""

import math

import numpy as np


def agreement(u, g, direction: str) -> float:
    """Compute the agreement a_i of one coordinate.

    The product of two float32 numbers is well within the range of float64, so unlike in
    the library, the product itself has the right sign.
    """
    s = {"descent": -1, "ascent": 1}[direction]
    return s * float(np.sign((u * complex(g).conjugate()).real))


def element(u, g, direction, opposed_weight, renormalize, min_fraction, neutral="hold"):
    """Compute the cautious update of one leaf."""
    u = np.asarray(u)
    weights, live = [], []
    for u_i, g_i in zip(u.ravel().tolist(), np.asarray(g).ravel().tolist()):
        a = agreement(u_i, g_i, direction)
        live.append(a != 0 or neutral != "ignore")
        if a > 0:
            weights.append(1.0)
        elif a < 0:
            weights.append(opposed_weight)
        elif neutral == "follow":
            weights.append(1.0)
        else:
            weights.append(max(opposed_weight, 0.0))
    w = np.array(weights, np.float64)
    n = sum(live)
    if n == 0:
        return u * w.reshape(u.shape)
    total = float(np.abs(w)[live].sum())
    scale = {
        "clamp": 1 / max(total / n, min_fraction),
        "plus_one": n / (total + 1),
        None: 1.0,
    }[renormalize]
    return u * (w * scale).reshape(u.shape)


def inner_product(us, gs, direction, opposed_weight):
    """Compute the cautious updates of leaves that share one inner product."""
    s = {"descent": -1, "ascent": 1}[direction]
    pairs = [
        (u_i, g_i)
        for u, g in zip(us, gs)
        for u_i, g_i in zip(np.ravel(u).tolist(), np.ravel(g).tolist())
    ]
    product = s * math.fsum(
        (complex(u) * complex(g).conjugate()).real for u, g in pairs
    )
    w = 1.0 if product >= 0 else opposed_weight
    return [np.asarray(u) * w for u in us]
