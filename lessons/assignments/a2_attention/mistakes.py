"""Wrong solutions of a2, for the tests of its tests: (exercise, what is wrong, text in the solution, text in
its place). Each costs points of its exercise and of no other. Never released."""

MISTAKES = [
    ("2.1", "nothing taken off", "shares = np.exp(x - x.max(axis=-1, keepdims=True))", "shares = np.exp(x)"),
    ("2.1", "one maximum for all rows", "shares = np.exp(x - x.max(axis=-1, keepdims=True))",
     "shares = np.exp(x - x.max())"),
    ("2.1", "over the wrong axis", "return shares / shares.sum(axis=-1, keepdims=True)", "return shares / "
                                                                                         "shares.sum(axis=0, "
                                                                                         "keepdims=True)"),
    ("2.2", "not divided", "softmax(q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1]))\n    return",
     "softmax(q @ k.swapaxes(-1, -2))\n    return"),
    ("2.2", "divided by d", "softmax(q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1]))\n    return",
     "softmax(q @ k.swapaxes(-1, -2) / q.shape[-1])\n    return"),
    ("2.2", "divided by the number of tokens", "softmax(q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1]))\n   "
                                               " return",
     "softmax(q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-2]))\n    return"),
    ("2.3", "the mean not taken off", "weights * (d_weights - (d_weights * weights).sum(axis=-1, "
                                      "keepdims=True))", "weights * d_weights"),
    ("2.3", "the scale forgotten", ".sum(axis=-1, keepdims=True)) / math.sqrt(q.shape[-1])\n    return "
                                   "d_scores", ".sum(axis=-1, keepdims=True))\n    return d_scores"),
    ("2.3", "the values' weights not turned", "d_scores.swapaxes(-1, -2) @ q, weights.swapaxes(-1, -2) @ g",
     "d_scores.swapaxes(-1, -2) @ q, 2 * weights.swapaxes(-1, -2) @ g"),
    ("2.4", "a reshape alone to split", "x.reshape(batch, tokens, heads, width // heads).transpose(0, 2, 1, "
                                        "3)", "x.reshape(batch, heads, tokens, width // heads)"),
    ("2.4", "a reshape alone to merge", "x.transpose(0, 2, 1, 3).reshape(batch, tokens, heads * width)",
     "x.reshape(batch, tokens, heads * width)"),
    ("2.5", "the largest of all taken off", "top = np.where(seen, scores, -np.inf).max(axis=-1, "
                                            "keepdims=True)", "top = scores.max(axis=-1, keepdims=True)"),
    ("2.5", "nothing sees itself", "np.maximum(keep[:, None, None, :], np.eye(tokens)) > 0",
     "np.maximum(keep[:, None, None, :], 0 * np.eye(tokens)) > 0"),
    ("2.5", "masked after the softmax", "    return weights / weights.sum(axis=-1, keepdims=True)\n    ###",
     "    return weights / np.exp(scores - top).sum(axis=-1, keepdims=True)\n    ###"),
    ("2.5", "ten less", "weights = np.where(seen, np.exp(np.where(seen, scores - top, 0)), 0)",
     "weights = np.exp(scores - top - 10 * (1 - seen))"),
    ("2.6", "the mask left out", "np.where(keep[:, None, None, :] > 0, q @", "np.where(keep[:, None, None, "
                                                                             ":] > -1, q @"),
    ("2.6", "the output matrix left out", "merge_heads(softmax(scores) @ v) @ w[\"out\"].T",
     "merge_heads(softmax(scores) @ v)"),
    ("2.6", "the output matrix not turned", "@ w[\"out\"].T", "@ w[\"out\"]"),
    ("2.7", "no residual round the attention", "x = x + merge_heads(attention(q, k, v)[0])",
     "x = merge_heads(attention(q, k, v)[0])"),
    ("2.7", "keys and values swapped", "merge_heads(attention(q, k, v)[0])", "merge_heads(attention(q, v, "
                                                                             "k)[0])"),
    ("2.7", "the second norm left out", "gelu(layer_norm(x) @ w[\"fc1\"].T)", "gelu(x @ w[\"fc1\"].T)"),
    ("2.7", "the norm after the sum", "np.split(layer_norm(x) @ w[\"qkv\"].T, 3, axis=2)", "np.split(x @ "
                                                                                           "w[\"qkv\"].T, 3, "
                                                                                           "axis=2)"),
]
