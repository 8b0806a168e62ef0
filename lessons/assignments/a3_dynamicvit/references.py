"""The package's own, for the tests of the exercises that use them: a slip in one costs nothing in another."""
import numpy as np

import tinytoken as tt


def draw(logits, noise):
    return tt.ops.gumbel_softmax(logits, np.broadcast_to(noise, logits.shape), tau=1.0, hard=True).data
