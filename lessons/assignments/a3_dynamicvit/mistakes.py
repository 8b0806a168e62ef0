"""Wrong solutions of a3, for the tests of its tests: (exercise, what is wrong, text in the solution, text in
its place). Each costs points of its exercise and of no other. Never released."""

MISTAKES = [
    ("3.1", "one logarithm", "return -np.log(-np.log(u))", "return -np.log(u)"),
    ("3.1", "the noise left out", "winner = (logits + noise).argmax(axis=-1)",
     "winner = logits.argmax(axis=-1)"),
    ("3.1", "the other sign", "winner = (logits + noise).argmax(axis=-1)", "winner = (logits - "
                                                                           "noise).argmax(axis=-1)"),
    ("3.2", "the soft value forward", "return draw(logits, noise), lambda g:", "return soft, lambda g:"),
    ("3.2", "tau forgotten on the way back", "(soft * g).sum(axis=-1, keepdims=True)) / tau",
     "(soft * g).sum(axis=-1, keepdims=True))"),
    ("3.2", "the gradient handed on as it is", "lambda g: soft * (g - (soft * g).sum(axis=-1, "
                                               "keepdims=True)) / tau", "lambda g: g / tau"),
    ("3.3", "the mean over all tokens", "(shared * keep[:, :, None]).sum(axis=1, keepdims=True) / "
                                        "keep.sum(axis=1)[:, None, None]",
     "shared.mean(axis=1, keepdims=True)"),
    ("3.3", "divided by all tokens", "/ keep.sum(axis=1)[:, None, None]", "/ keep.shape[1]"),
    ("3.3", "halves swapped", "local, shared = np.split(", "shared, local = np.split("),
    ("3.3", "logits in place of log-probabilities",
     "return log_softmax(z @ w[\"out3\"].T + w[\"out3_bias\"])",
     "return z @ w[\"out3\"].T + w[\"out3_bias\"]"),
    ("3.4", "each stage by itself", "return np.cumprod(draws, axis=0)", "return draws"),
    ("3.4", "squares before the mean", "((shares - np.asarray(targets)[:, None]) ** 2).mean(axis=1).sum()",
     "((decisions - np.asarray(targets)[:, None, None]) ** 2).mean(axis=(1, 2)).sum()"),
    ("3.4", "a mean over stages", ".mean(axis=1).sum())\n    ### END", ".mean(axis=1).mean())\n    ### END"),
    ("3.4", "one ratio for the batch", "shares = decisions.mean(axis=2)", "shares = decisions.mean(axis=(1, "
                                                                          "2))[:, None]"),
    ("3.5", "student and teacher swapped", "(np.exp(theirs) * (theirs - ours))", "(np.exp(ours) * (ours - "
                                                                                 "theirs))"),
    ("3.5", "all tokens", "(gaps * keep).sum(axis=1) / np.maximum(keep.sum(axis=1), 1)", "gaps.mean(axis=1)"),
    ("3.5", "pooled over the batch", "    return float(kl), float(of_picture.mean())",
     "    return float(kl), float((gaps * keep).sum() / keep.sum())"),
    ("3.6", "in the order of their scores", "places = np.sort(np.argsort(-scores, axis=1, "
                                            "kind=\"stable\")[:, :count], axis=1)",
     "places = np.argsort(-scores, axis=1, kind=\"stable\")[:, :count]"),
    ("3.6", "the lowest", "np.argsort(-scores, axis=1, kind=\"stable\")[:, :count]", "np.argsort(scores, "
                                                                                     "axis=1, kind=\"stable\")[:, :count]"),
    ("3.6", "the class token counted as a patch", "np.take_along_axis(x[:, 1:], places[:, :, None], axis=1)",
     "np.take_along_axis(x, places[:, :, None], axis=1)"),
    ("3.6", "the last of equals", "np.argsort(-scores, axis=1, kind=\"stable\")[:, :count]",
     "np.argsort(scores, axis=1, kind=\"stable\")[:, ::-1][:, :count]"),
    ("3.7", "the class token forgotten", "tokens = left + 1", "tokens = left"),
    ("3.7", "the predictor on what stays", "            total += 1.625 * left * D**2 + left * D / 2\n        "
                                           "    stage += 1\n            left = int(round(N * rho**stage, "
                                           "9))\n",
     "            stage += 1\n            left = int(round(N * rho**stage, 9))\n            total += 1.625 * "
     "left * D**2 + left * D / 2\n"),
    ("3.7", "rounded", "left = int(round(N * rho**stage, 9))", "left = round(N * rho**stage)"),
    ("3.7", "no predictors", "            total += 1.625 * left * D**2 + left * D / 2\n", ""),
]
