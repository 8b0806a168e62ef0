"""Wrong solutions of a1, for the tests of its tests: (exercise, what is wrong, text in the solution, text in
its place). Each costs points of its exercise and of no other. Never released."""

MISTAKES = [
    ("1.1", "gradients swapped", "[unbroadcast(g * b.value, a.value.shape), unbroadcast(g * a.value, "
                                 "b.value.shape)]\n    return Node",
     "[unbroadcast(g * a.value, a.value.shape), unbroadcast(g * b.value, b.value.shape)]\n    return Node"),
    ("1.1", "not summed to the parents' shapes", "return [unbroadcast(g * b.value, a.value.shape), "
                                                 "unbroadcast(g * a.value, b.value.shape)]",
     "return [g * b.value, g * a.value]"),
    ("1.1", "a sum in place of the product", "Node(a.value * b.value, (a, b), vjp)", "Node(a.value + "
                                                                                     "b.value, (a, b), vjp)"),
    ("1.1", "the upstream gradient forgotten", "[unbroadcast(g * b.value,", "[unbroadcast(np.ones_like(g) * "
                                                                            "b.value,"),
    ("1.2", "recursive", """    done, found, waiting = set(), [], [(end, False)]
    while waiting:
        node, parents_are_in = waiting.pop()
        if parents_are_in:
            found.append(node)
        elif id(node) not in done:
            done.add(id(node))
            waiting.append((node, True))
            waiting.extend((parent, False) for parent in node.parents)
    return found
""", """    done, found = set(), []
    def visit(node):
        if id(node) not in done:
            done.add(id(node))
            for parent in node.parents:
                visit(parent)
            found.append(node)
    visit(end)
    return found
"""),
    ("1.2", "the order of the first visit", "            waiting.append((node, True))\n",
     "            found.append(node)\n"),
    ("1.2", "every path walked", "        elif id(node) not in done:\n            done.add(id(node))\n",
     "        else:\n"),
    ("1.2", "from end to start", "            waiting.extend((parent, False) for parent in node.parents)\n   "
                                 " return found",
     "            waiting.extend((parent, False) for parent in node.parents)\n    return found[::-1]"),
    ("1.3", "the last use wins", "parent.grad = parent.grad + part", "parent.grad = part"),
    ("1.3", "a vjp's array is kept, and added to",
     "        node.grad = np.zeros_like(node.value)\n    end.grad = np.ones_like(end.value)\n    for node in "
     "reversed(nodes):\n"
     "        for parent, part in zip(node.parents, node.vjp(node.grad) if node.parents else ()):\n"
     "            parent.grad = parent.grad + part\n",
     "        node.grad = None\n    end.grad = np.ones_like(end.value)\n    for node in reversed(nodes):\n"
     "        for parent, part in zip(node.parents, node.vjp(node.grad) if node.parents else ()):\n"
     "            if parent.grad is None:\n                parent.grad = part\n"
     "            else:\n                parent.grad += part\n"),
    ("1.3", "old gradients kept", "        node.grad = np.zeros_like(node.value)\n    end.grad = "
                                  "np.ones_like(end.value)",
     "        node.grad = np.zeros_like(node.value) if node.grad is None else node.grad\n    end.grad = "
     "np.ones_like(end.value)"),
    ("1.3", "in the wrong direction", "for node in reversed(nodes):", "for node in nodes:"),
    ("1.4", "axes in front kept", "    g = g.sum(axis=tuple(range(g.ndim - len(shape))))\n", ""),
    ("1.4", "axes of length one dropped", "return g.sum(axis=stretched, keepdims=True)",
     "return g.sum(axis=stretched)"),
    ("1.4", "a mean", "g = g.sum(axis=tuple(range(g.ndim - len(shape))))",
     "g = g.mean(axis=tuple(range(g.ndim - len(shape))))"),
    ("1.5", "nothing transposed", "return g @ b.swapaxes(-1, -2), a.swapaxes(-1, -2) @ g",
     "return (g @ b if g.shape[-1] == b.shape[-2] else g[..., :1] * a), a.swapaxes(-1, -2) @ g"),
    ("1.5", "all axes turned", "return g @ b.swapaxes(-1, -2), a.swapaxes(-1, -2) @ g", "return g @ b.T, a.T "
                                                                                        "@ g"),
    ("1.5", "the wrong side", "a.swapaxes(-1, -2) @ g\n    ###", "(g.swapaxes(-1, -2) @ a).swapaxes(-1, -2) "
                                                                 "* 2\n    ###"),
    ("1.6", "zeros", "return p * (g - (p * g).sum(axis=-1, keepdims=True))", "return np.zeros_like(p)"),
    ("1.6", "the mean is not taken off", "return p * (g - (p * g).sum(axis=-1, keepdims=True))",
     "return p * (1 - p) * g"),
    ("1.6", "over all axes", "(p * g).sum(axis=-1, keepdims=True))", "(p * g).sum())"),
    ("1.7", "the mean's share forgotten", "(g - g.mean(axis=-1, keepdims=True) - y *", "(g - y *"),
    ("1.7", "the variance's share forgotten", " - y * (g * y).mean(axis=-1, keepdims=True)) / spread",
     ") / spread"),
    ("1.7", "eps left out", "spread = np.sqrt(x.var(axis=-1, keepdims=True) + eps)",
     "spread = np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)"),
    ("1.8", "ones for the upstream gradient", "g = rng.standard_normal(f(x).shape)",
     "g = np.ones(f(x).shape)"),
    ("1.8", "x is changed", "numeric = np.zeros(x.shape)", "numeric = np.zeros(x.shape)\n    x += 1e-3"),
    ("1.8", "half the difference quotient", ".sum() / (2 * h)", ".sum() / (4 * h)"),
]
