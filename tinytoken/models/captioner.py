"""A captioner: a transformer decoder that reads the tokens of a frozen encoder and writes words.

The decoder is that of Vaswani et al. 2017 (section 3.1; norms before the branches): each block attends to the
words so far, then by cross-attention to the encoder's tokens, the memory, then has an MLP. LookupViT (Koner
et al. 2024, arXiv 2407.12753) reports captions with a frozen encoder; of its decoder nothing is known here,
so these sizes are ours.
"""
import dataclasses
import math
from collections.abc import Sequence

from .. import nn, ops
from ..backend import Array, array_module
from ..errors import expect, shape_of
from ..tensor import Tensor, no_grad
from .base import Loss, Output

PAD, START, END = range(3)  # the numbers of the words that every vocabulary begins with
SPECIAL = ("<pad>", "<start>", "<end>")


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in which no word sees a later one: q (B, H, Tq, d) of the last Tq of the Tk words of k and v
    (B, H, Tk, d) -> (B, H, Tq, d)."""
    xp, (asking, asked) = array_module(q.data), (q.shape[2], k.shape[2])
    seen = xp.arange(asked) <= xp.arange(asked - asking, asked)[:, None]
    scores = ops.matmul(q * (1 / math.sqrt(q.shape[-1])), k.swapaxes(-1, -2))
    return ops.matmul(ops.softmax(scores + xp.where(seen, 0.0, -math.inf)), v)


class CrossAttention(nn.Module):
    """The words x (B, t, dim) read the memory (B, T, memory_dim) -> (B, t, dim)."""

    def __init__(self, dim: int, memory_dim: int, heads: int) -> None:
        self.heads = heads
        self.q, self.proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.kv = nn.Linear(memory_dim, 2 * dim, parts=2)

    def project(self, memory: Tensor | Array) -> tuple[Tensor, Tensor]:
        """Its keys and values, each (B, H, T, d)."""
        return ops.split_heads(self.kv(memory), heads=self.heads, parts=2)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, attention: list[Tensor] | None = None) -> Tensor:
        """k, v: of the memory. attention: a list to which the weights (B, H, t, T) are added."""
        q = ops.split_heads(self.q(x), heads=self.heads)
        out = ops.attention(q, k, v, weights=attention is not None)
        if attention is not None:
            out, weights = out
            attention.append(weights.detach())
        return self.proj(ops.merge_heads(out))


class WordBlock(nn.Module):
    """A block of the decoder: attention to the words so far, to the memory, and an MLP."""
    branches = 3

    def __init__(self, dim: int, memory_dim: int, heads: int, mlp_ratio: float) -> None:
        self.norm1, self.attn = nn.LayerNorm(dim), nn.Attention(dim, heads)
        self.norm2, self.cross_attn = nn.LayerNorm(dim), CrossAttention(dim, memory_dim, heads)
        self.norm3, self.mlp = nn.LayerNorm(dim), nn.MLP(dim, round(dim * mlp_ratio))

    def forward(self, x: Tensor, memory: tuple, words: tuple, paths: Array | None = None,
                attention: list[Tensor] | None = None) -> tuple[Tensor, tuple]:
        """x (B, t, dim); memory: its (k, v); words: the (k, v) of the words before x, or () -> x, and the (k,
        v) of all words. paths (B, 3): factors of the branches."""
        q, *new = self.attn.project(self.norm1(x))
        k, v = (ops.concat(*pair, axis=2) for pair in zip(words, new)) if words else new
        out = self.attn.proj(ops.merge_heads(causal_attention(q, k, v)))
        x = x + nn.scaled(out, nn.column(paths, 0))
        x = x + nn.scaled(self.cross_attn(self.norm2(x), *memory, attention), nn.column(paths, 1))
        return nn.mlp_branch(x, self.norm3, self.mlp, nn.column(paths, 2)), (k, v)


@dataclasses.dataclass
class Cache:
    """What the decoder has read. memory, words: for each block the keys and values of the memory, and of the
    words so far; count: how many words."""
    memory: list[tuple]
    words: list[tuple]
    count: int = 0


class Captioner(nn.Module):
    """memory (B, T, encoder_dim), words (B, t) integers, <start> first -> Output; its logits (B, t, V) are of
    the word that follows each.

    vocabulary: the V words; the first three are <pad>, <start>, <end>. length: words of a caption at most,
    with <start> and <end>. It takes no pictures, so it is not registered with the models."""

    def __init__(self, encoder_dim: int, vocabulary: Sequence[str], dim: int = 96, depth: int = 2,
                 heads: int = 3, mlp_ratio: float = 4, length: int = 16) -> None:
        self.vocabulary, self.length = tuple(vocabulary), length
        expect(self.vocabulary[:3] == SPECIAL and len(set(vocabulary)) == len(vocabulary) > 3, "Captioner",
               f"a vocabulary {self.vocabulary[:4]}, expected {', '.join(SPECIAL)} and other words, each "
               "once")
        expect(min(encoder_dim, dim, depth, heads) >= 1 and length >= 2, "Captioner",
               f"encoder_dim {encoder_dim}, dim {dim}, depth {depth}, heads {heads}, length {length}: "
               "expected at least 1, a length of at least 2")
        self.word_embed = nn.Parameter(nn.zeros(len(vocabulary), dim))
        self.pos_embed = nn.Parameter(nn.zeros(length, dim))
        self.blocks = [WordBlock(dim, encoder_dim, heads, mlp_ratio) for _ in range(depth)]
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, len(vocabulary))
        nn.initialise(self)
        for name in ("word_embed", "pos_embed"):
            nn.normal(getattr(self, name), name, std=0.5)  # of the size of the encoders' positions

    def forward(self, memory: Tensor | Array, words: Array, trace: bool = False,
                paths: Array | None = None) -> Output:
        """trace: keep the weights (B, H, t, T) with which words read the memory. paths (B, depth, 3): factors
        of the branches (tasks.drop_paths), in training."""
        return self.step(self.start(memory), words, trace, paths)

    def start(self, memory: Tensor | Array) -> Cache:
        """A Cache of this memory and no words."""
        expected = self.blocks[0].cross_attn.kv.weight.shape[1]
        expect(memory.ndim == 3 and memory.shape[2] == expected, "Captioner",
               lambda: f"{shape_of('memory', memory)}, expected (B, T, {expected})")
        return Cache([block.cross_attn.project(memory) for block in self.blocks], [()] * len(self.blocks))

    def step(self, cache: Cache, words: Array, trace: bool = False, paths: Array | None = None) -> Output:
        """The next words (B, t), after those of the cache, which has them too then."""
        end, attention = cache.count + words.shape[-1], list[Tensor]()
        expect(words.ndim == 2 and words.dtype.kind in "iu" and end <= self.length, "Captioner",
               lambda: f"{shape_of('words', words)} {words.dtype} after {cache.count}, expected (B, t) "
                       f"integers, at most {self.length} in all")
        x = ops.embedding(self.word_embed, words) + self.pos_embed[cache.count:end]
        for i, block in enumerate(self.blocks):
            x, cache.words[i] = block(x, cache.memory[i], cache.words[i], nn.column(paths, i),
                                      attention if trace else None)
        cache.count = end
        return Output(self.head(self.norm(x)), attention=attention)

    def loss(self, out: Output, words: Array, *, smoothing: float = 0.0) -> Loss:
        """Cross-entropy of the next word, mean over the words of a caption, then over captions -> (loss,
        parts). words (B, t + 1): those that were read, and the last. <pad> does not count."""
        xp, (batch, t, V) = array_module(words), out.logits.shape
        there = words[:, 1:] != PAD
        weights = there * (t / there.sum(axis=1, keepdims=True))  # cross_entropy divides by batch t
        targets = (words[:, 1:, None] == xp.arange(V)) * (1 - smoothing) + smoothing / V
        targets = (targets * weights[:, :, None]).reshape(batch * t, V).astype(out.logits.dtype)
        loss = ops.cross_entropy(out.logits.reshape(batch * t, V), targets)
        return loss, {"words": loss}

    def generate(self, memory: Tensor | Array, beam: int = 1) -> Array:
        """memory (B, T, encoder_dim) -> the likeliest words found, (B, length - 1): <end> after the last,
        then <pad>.

        beam: how many captions are kept at each word, those of the largest sum of log-probabilities; 1 is the
        greedy search. Keys and values of what was read are kept, so each step reads one word."""
        xp, batch, V = array_module(self.word_embed.data), len(memory), len(self.vocabulary)
        expect(1 <= beam <= V, "Captioner", f"beam {beam}, expected 1 to {V}, the words of the vocabulary")
        same = xp.arange(batch).repeat(beam)  # row b beam + j: caption j of image b
        words = xp.full((batch * beam, 1), START)
        # at the start all captions of an image are the same: one counts
        scores = xp.where(xp.arange(beam) == 0, 0.0, -math.inf) + xp.zeros((batch, 1))
        over = xp.where(xp.arange(V) == PAD, 0.0, -math.inf)  # what follows <end>
        with no_grad():
            cache = self.start(memory)
            cache.memory = [(k[same], v[same]) for k, v in cache.memory]
            for _ in range(self.length - 1):
                logits = self.step(cache, words[:, -1:]).logits[:, -1]
                ended = (words[:, -1:] == END) | (words[:, -1:] == PAD)
                total = scores.reshape(-1, 1) + xp.where(ended, over, ops.log_softmax(logits).data)
                total = total.reshape(batch, beam * V)
                best = xp.argsort(-total, axis=1, kind="stable")[:, :beam]
                scores = xp.take_along_axis(total, best, axis=1)
                rows = (xp.arange(batch)[:, None] * beam + best // V).reshape(-1)
                words = xp.concatenate([words[rows], (best % V).reshape(-1, 1)], axis=1)
                cache.words = [(k[rows], v[rows]) for k, v in cache.words]
        return words.reshape(batch, beam, -1)[:, 0, 1:]
