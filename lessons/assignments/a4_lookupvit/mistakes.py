"""Wrong solutions of a4, for the tests of its tests: (exercise, what is wrong, text in the solution, text in
its place). Each costs points of its exercise and of no other. Never released."""

MISTAKES = [
    ("4.1", "not antialiased", "centres[:, None]) / max(s, 1))", "centres[:, None]))"),
    ("4.1", "centres without the half", "centres = (np.arange(b) + 0.5) * s - 0.5", "centres = np.arange(b) "
                                                                                    "* s"),
    ("4.1", "columns first", "np.kron(axis_weights(grid[0], size[0]), axis_weights(grid[1], size[1]))",
     "np.kron(axis_weights(grid[1], size[1]), axis_weights(grid[0], size[0]))"),
    ("4.1", "rows not divided", "return triangle / triangle.sum(axis=1, keepdims=True)", "return triangle / "
                                                                                         "max(s, 1)"),
    ("4.2", "over the compressed tokens", "A = softmax(scores)\n", "A = softmax(scores, axis=2)\n"),
    ("4.2", "not divided", "scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])", "scores = q @ "
                                                                                       "k.swapaxes(-1, -2)"),
    ("4.3", "renorm divided by rows", "mass = A.sum(axis=2, keepdims=True)", "mass = A.sum(axis=3, "
                                                                             "keepdims=True)"),
    ("4.3", "resoftmax over the lookup tokens", "R = softmax(scores, axis=2)", "R = softmax(scores, axis=3)"),
    ("4.3", "0 / 0", "R = A / np.where(mass > 0, mass, 1)", "R = A / mass"),
    ("4.3", "resoftmax of the probabilities", "R = softmax(scores, axis=2)", "R = softmax(A, axis=2)"),
    ("4.4", "the second use forgotten", " + values @ g_written.swapaxes(-1, -2)\n", "\n"),
    ("4.4", "the first use forgotten", "d_A = g_answers @ v.swapaxes(-1, -2) + values", "d_A = values"),
    ("4.4", "no softmax on the way", "return A * (d_A - (A * d_A).sum(axis=-1, keepdims=True))",
     "return d_A"),
    ("4.5", "the norm before the projection", "q = norm(linear(F_p, w, \"gather_q\"), w, \"gather_norm_q\")",
     "q = linear(norm(F_p, w, \"gather_norm_q\"), w, \"gather_q\")"),
    ("4.5", "values from before the refinement", "    F_p = refine(F_p + linear(merge_heads(answers), w, "
                                                 "\"gather_proj\"))\n    values = "
                                                 "split_heads(linear(norm(F_p, w, \"infuse_norm\"), w, "
                                                 "\"infuse_v\"), heads)\n",
     "    values = split_heads(linear(norm(F_p, w, \"infuse_norm\"), w, \"infuse_v\"), heads)\n    F_p = "
     "refine(F_p + linear(merge_heads(answers), w, \"gather_proj\"))\n"),
    ("4.5", "no residual in (a)", "refine(F_p + linear(", "refine(linear("),
    ("4.5", "the light MLP does not add", "    return F_l + linear(gelu(", "    return linear(gelu("),
    ("4.6", "a ViT's block", "return (4 * N + 15 * M) * D**2 + (3 * N * M + 2 * M**2) * D",
     "return 12 * N * D**2 + 2 * N**2 * D"),
    ("4.6", "the infusion's product forgotten", "(3 * N * M + 2 * M**2) * D\n",
     "(2 * N * M + 2 * M**2) * D\n"),
    ("4.6", "the last block whole", "total - D * K - (2 * N + M) * D**2 - N * M * D", "total - D * K"),
    ("4.7", "the table not resized", "+ resize_matrix(table_grid, size) @ table", "+ table[:1]"),
    ("4.7", "the table resized from the patches' grid", "resize_matrix(table_grid, size) @ table",
     "resize_matrix(size, size) @ (resize_matrix(table_grid, size)[::-1] @ table)"),
]
