"""What lies in boxes of a map."""
from ..backend import array_module
from ..errors import expect, shape_of
from ..tensor import Index, op


@op
def roi_align(x, boxes: Index, *, grid, size=7, samples=2):
    """What lies in boxes of a map, each as size x size values: RoIAlign (He et al. 2017, arXiv 1703.06870,
    section 3), in the aligned form. x (B, h w, D), tokens row by row; boxes (B, P, 4): left, top, right,
    bottom, where token (i, j) reaches from (j, i) to (j + 1, i + 1) -> (B, P, size size, D).

    A box is cut into size x size parts. Of a part it is the mean of samples x samples values, evenly spread,
    each read bilinearly between the tokens' centres. Beyond the outermost centres the border's values go on,
    for one token's width; further out all is zero. Boxes have no gradient.
    """
    (h, w), xp = grid, array_module(x)
    expect(x.ndim == boxes.ndim == 3 and x.shape[1] == h * w and len(boxes) == len(x) and boxes.shape[2] == 4,
           "roi_align", lambda: f"{shape_of('x', x)}, {shape_of('boxes', boxes)}: expected (B, {h * w}, D) "
                                f"for the grid {tuple(grid)}, and (B, P, 4)")
    (B, _, D), P, edges = x.shape, boxes.shape[1], boxes.astype(x.dtype)
    across, down = (_roi_weights(xp, edges[:, :, k], edges[:, :, k + 2], side, size, samples)
                    for k, side in ((0, w), (1, h)))
    down, across = down.reshape(B, P * size, h), across[:, :, None]  # (B, P size, h), (B, P, 1, size, w)

    def vjp(g):
        g = across.swapaxes(-1, -2) @ g.reshape(B, P, size, size, D)
        return (down.swapaxes(-1, -2) @ g.reshape(B, P * size, w * D)).reshape(B, h * w, D), None
    rows = (down @ x.reshape(B, h, w * D)).reshape(B, P, size, w, D)
    return (across @ rows).reshape(B, P, size * size, D), vjp


def _roi_weights(xp, low, high, side, size, samples):
    """How much each of `side` tokens counts in each of `size` parts between low and high (B, P): (B, P, size,
    side)."""
    step = (high - low)[:, :, None] / (size * samples)
    at = low[:, :, None] - 0.5 + step * (xp.arange(size * samples, dtype=low.dtype) + 0.5)
    inside = (at >= -1) & (at <= side)
    gaps = xp.abs(at.clip(0, side - 1)[..., None] - xp.arange(side, dtype=low.dtype))
    weights = xp.maximum(1 - gaps, 0) * inside[..., None]
    return weights.reshape(*low.shape, size, samples, side).mean(axis=3)
