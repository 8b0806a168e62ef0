"""Pictures of what the models did. Needs matplotlib (the `plot` extra), imported when a picture is made."""
import numpy as np

from .checkpoint import replacing


def tokens(path, images, labels, predictions, kept, attention, patch):
    """One row per picture: the picture; what DynamicViT keeps at each stage; where LookupViT's last gather looks, summed over
    heads and compressed tokens, and the compressed token with the most peaked attention alone.

    images (B, 3, H, W) uint8; labels: B names; predictions: {model: B names}; kept[s] (B, k) patch numbers, ascending; attention
    (B, H, M, N). A model without the one or the other gives [] or None.
    """
    figure_module = _figure()
    grid = images.shape[2] // patch
    columns = ["picture"] + [f"DynamicViT keeps {k.shape[1]} of {grid * grid}" for k in kept]
    columns += ["LookupViT gathers", "its most peaked token"] if attention is not None else []
    figure = figure_module.Figure(figsize=(1.9 * len(columns), 2.15 * len(images)), layout="constrained")
    axes = figure.subplots(len(images), len(columns), squeeze=False)
    for b, row in enumerate(axes):
        picture = images[b].transpose(1, 2, 0)
        panels = [picture] + [hide(picture, k[b], patch) for k in kept]
        if attention is not None:
            weights = attention[b].mean(axis=0)
            panels += [heat(picture, weights.sum(axis=0), patch), heat(picture, weights[weights.max(axis=1).argmax()], patch)]
        for axis, panel, title in zip(row, panels, columns):
            axis.imshow(panel, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if b == 0:
                axis.set_title(title, fontsize=8)
        wrong = [f"{name}: {names[b]}" for name, names in predictions.items() if names[b] != labels[b]]
        row[0].set_ylabel(labels[b], fontsize=8)
        row[0].set_xlabel("\n".join(wrong) or "all three right" if len(predictions) > 1 else "", fontsize=6)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110)


def _figure():
    from matplotlib import figure  # not pyplot: no window system, no global state
    return figure


def hide(picture, kept, patch):
    """The picture (H, W, 3) uint8 with every patch that is not kept faded to a light grey."""
    grid = picture.shape[0] // patch
    mask = np.zeros(grid * grid, bool)
    mask[kept] = True
    mask = np.kron(mask.reshape(grid, grid), np.ones((patch, patch), bool))[..., None]
    return np.where(mask, picture, 225 + (picture * 0.1).astype("uint8"))


def heat(picture, weights, patch):
    """The picture (H, W, 3) uint8 in grey, with the patches' weights (N,), scaled to their largest, as red."""
    grid = picture.shape[0] // patch
    weights = np.kron((weights / weights.max()).reshape(grid, grid), np.ones((patch, patch)))[..., None]
    grey = np.repeat(picture.mean(axis=2, keepdims=True), 3, axis=2) * 0.7 + 60
    return (grey * (1 - 0.8 * weights) + np.array([255, 40, 20]) * 0.8 * weights).clip(0, 255).astype("uint8")
