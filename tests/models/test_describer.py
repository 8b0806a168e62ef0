"""An encoder with a captioner: which tokens are read, and multiply-adds of both together."""
import numpy as np
import pytest

import tinytoken as tt
from small import SMALL, pictures, refuses, shaken
from test_cost import lookup_block, lookup_tail, vit_block
from tinytoken.models import Captioner, Describer, LookupViT, ViT

WORDS = ("<pad>", "<start>", "<end>", "a", "red", "disc", "star")
V, LENGTH = len(WORDS), 5


@pytest.mark.parametrize("tokens, M", [("tokens", 4), ("lookup", 16), ("both", 20)])
def test_macs_of_encoder_and_decoder_are_a_closed_formula(tokens, M):
    """Each block reads the memory once and each word once; word t sees t words and the M tokens."""
    encoder = LookupViT(**SMALL, compressed=(2, 2), classifiers="both")
    D, depth, words, dim = 8, 3, LENGTH - 1, 12
    decoder = Captioner(D, WORDS, dim, depth, heads=2, length=LENGTH)
    of_decoder = depth * (2 * M * D * dim + words * 14 * dim ** 2 + 2 * words * M * dim
                          + words * (words + 1) * dim) + words * dim * V
    of_encoder = 2 * lookup_block(16, 4, D, 4, 0.5, "resoftmax") + 16 * 12 * D + D * 5
    of_encoder += D * 5 if tokens != "tokens" else -lookup_tail(16, 4, D, 0.5, "resoftmax")
    images = pictures().astype("float32")
    assert tt.macs(Describer(encoder, decoder, tokens), images).total == of_decoder + of_encoder
    if tokens == "lookup":  # as many as a ViT's
        vit = Describer(ViT(**SMALL, pool="mean"), decoder)
        assert tt.macs(vit, images).total == of_decoder + 2 * vit_block(16, D) + 16 * 12 * D + D * 5


def test_what_is_read_of_an_encoder():
    encoder, images = shaken(LookupViT(**SMALL, compressed=(2, 2), classifiers="both")), pictures()
    decoder = shaken(Captioner(8, WORDS, 8, 1, 2, length=LENGTH))
    expected = encoder.eval()(images, mean_of_heads=True)
    read = {tokens: Describer(encoder.train(), decoder, tokens).memory(images).data
            for tokens in ("tokens", "lookup", "both")}
    assert np.array_equal(read["tokens"], expected.tokens.data)
    assert np.array_equal(read["lookup"], expected.lookup.data)
    assert np.array_equal(read["both"], np.concatenate([read["tokens"], read["lookup"]], axis=1))
    described = Describer(encoder, decoder, "both")(images, beam=2)
    assert np.array_equal(described, decoder.generate(read["both"], 2))
    with refuses("Describer: tokens 'class', expected one of tokens, lookup, both"):
        Describer(encoder, decoder, "class")
    for other in (ViT(**SMALL), LookupViT(**SMALL, compressed=(2, 2))):
        with refuses(f"Describer: tokens 'both' of a {type(other).__name__}, expected those of a "
                     "LookupViT with classifiers='both'"):
            Describer(other, decoder, "both")
