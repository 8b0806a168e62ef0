"""The package's own, for the tests of the exercises that use them: a slip in one costs nothing in another."""
import tinytoken as tt


def softmax(x):
    return tt.ops.softmax(x).data


def attention(q, k, v):
    lead = q.shape[:-2]
    q, k, v = (x.reshape(-1, 1, *x.shape[-2:]) for x in (q, k, v))
    out, A = tt.ops.attention(q, k, v, weights=True)
    return out.data.reshape(*lead, *out.shape[-2:]), A.data.reshape(*lead, *A.shape[-2:])


def split_heads(x, heads):
    return tt.ops.split_heads(x, heads=heads).data


def merge_heads(x):
    return tt.ops.merge_heads(x).data
