"""LookupViT's equations (Koner et al. 2024, sections 3.2 and 3.3) once more, head by head and by loops, in
NumPy."""
import itertools
import math

import numpy as np

from small import softmax


def resize_by_loops(grid, size):
    def axis(n, m):
        s, R = n / m, np.zeros((m, n))
        for o in range(m):
            for i in range(n):
                R[o, i] = max(0, 1 - abs(i - ((o + 0.5) * s - 0.5)) / max(s, 1))
        return R / R.sum(axis=1, keepdims=True)
    R = np.zeros((size[0], size[1], grid[0], grid[1]))
    for (a, row), (b, column) in itertools.product(enumerate(axis(grid[0], size[0])),
                                                   enumerate(axis(grid[1], size[1]))):
        R[a, b] = np.outer(row, column)
    return R.reshape(size[0] * size[1], grid[0] * grid[1])


class Equations:
    """One image through a LookupViT with the given weights -> (compressed logits, lookup logits or None). l
    are the lookup tokens (N, D), p the compressed ones (M, D), b the block's name."""

    def __init__(self, weights, heads, reuse, norm):
        self.w, self.heads, self.reuse, self.norm = weights, heads, reuse, norm

    def linear(self, name, x):
        return x @ self.w[name + ".weight"].T + self.w[name + ".bias"]

    def ln(self, name, x):
        centred = x - x.mean(axis=-1, keepdims=True)
        normed = centred / np.sqrt((centred ** 2).mean(axis=-1, keepdims=True) + 1e-6)
        return normed * self.w[name + ".weight"] + self.w[name + ".bias"]

    def mlp(self, name, x):
        hidden = self.linear(name + ".fc1", x)
        return self.linear(name + ".fc2", hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2))))

    def per_head(self, function, *xs):
        """function of each head's columns, side by side."""
        split = zip(*(np.split(x, self.heads, axis=1) for x in xs))
        return np.concatenate([function(h, *parts) for h, parts in enumerate(split)], axis=1)

    def block(self, b, l, p):
        d = l.shape[1] // self.heads
        pre = self.norm == "pre"
        p_in, l_in = (self.ln(b + "gather_norm_q", p), self.ln(b + "gather_norm_k", l)) if pre else (p, l)
        q, k = self.linear(b + "gather_q", p_in), self.linear(b + "gather_k", l_in)
        v = self.linear(b + "gather_v", l_in)
        if not pre:
            q, k = self.ln(b + "gather_norm_q", q), self.ln(b + "gather_norm_k", k)
        per_head = zip(np.split(q, self.heads, axis=1), np.split(k, self.heads, axis=1))
        logits = [qh @ kh.T / math.sqrt(d) for qh, kh in per_head]
        p = p + self.linear(b + "gather_proj", self.per_head(lambda h, vh: softmax(logits[h]) @ vh, v))
        qkv = self.linear(b + "refine.attn.qkv", self.ln(b + "refine.norm1", p))
        mixed = self.per_head(lambda h, qh, kh, vh: softmax(qh @ kh.T / math.sqrt(d)) @ vh,
                              *np.split(qkv, 3, axis=1))
        p = p + self.linear(b + "refine.attn.proj", mixed)
        p = p + self.mlp(b + "refine.mlp", self.ln(b + "refine.norm2", p))
        if self.reuse != "none":
            l = l + self.linear(b + "infuse_proj", self.infused(b, l, p, logits, d))
        return l + self.mlp(b + "lookup_mlp", self.ln(b + "lookup_norm", l)), p

    def infused(self, b, l, p, logits, d):
        p = self.ln(b + "infuse_norm", p)
        v = self.linear(b + "infuse_v", p)
        if self.reuse == "separate":
            q = self.linear(b + "infuse_q", self.ln(b + "infuse_norm_q", l))
            k = self.linear(b + "infuse_k", p)
            return self.per_head(lambda h, qh, kh, vh: softmax(qh @ kh.T / math.sqrt(d)) @ vh, q, k, v)
        A = [softmax(a) for a in logits]
        reverse = {"probs": [a.T for a in A], "renorm": [a.T / a.sum(axis=0)[:, None] for a in A],
                   "resoftmax": [softmax(a.T) for a in logits]}[self.reuse]
        return self.per_head(lambda h, vh: reverse[h] @ vh, v)

    def __call__(self, image, depth, patch, size, own):
        grid = (image.shape[1] // patch, image.shape[2] // patch)
        patches = [image[:, patch * r:patch * (r + 1), patch * c:patch * (c + 1)].ravel()
                   for r, c in np.ndindex(grid)]
        kernel = self.w["patch_embed.proj.weight"]
        x = np.stack(patches) @ kernel.reshape(len(kernel), -1).T + self.w["patch_embed.proj.bias"]
        l = x + self.w["pos_embed"][0]
        p = resize_by_loops(grid, size) @ x + resize_by_loops(own, size) @ self.w["pos_embed_compressed"][0]
        for i in range(depth):
            l, p = self.block(f"blocks.{i}.", l, p)
        logits = self.linear("head", self.ln("norm", p).mean(axis=0))
        two = "lookup_head.bias" in self.w
        return logits, self.linear("lookup_head", self.ln("lookup_norm", l).mean(axis=0)) if two else None
