"""A frozen encoder with a captioner that reads its tokens."""
from .. import nn, ops
from ..backend import Array
from ..errors import expect
from ..tensor import Tensor, no_grad
from .captioner import Captioner

TOKENS = ("tokens", "lookup", "both")


class Describer(nn.Module):
    """A frozen encoder and the captioner that reads it: images (B, C, H, W) -> words, as `generate` does.

    tokens: what is read. "tokens" are those of the encoder's Output: a ViT's patches, a LookupViT's
    compressed ones. "lookup" are a LookupViT's lookup tokens, which it has with two classifiers; "both" are
    the compressed ones and then the lookup tokens."""

    def __init__(self, encoder: nn.Module, captioner: Captioner, tokens: str = "tokens") -> None:
        expect(tokens in TOKENS, "Describer", f"tokens {tokens!r}, expected one of {', '.join(TOKENS)}")
        expect(tokens == "tokens" or hasattr(encoder, "lookup_head"), "Describer",
               f"tokens {tokens!r} of a {type(encoder).__name__}, expected those of a LookupViT with "
               "classifiers='both'")
        self.encoder, self.captioner, self.tokens = encoder, captioner, tokens

    def memory(self, images: Tensor | Array) -> Tensor:
        """The encoder's tokens (B, T, encoder_dim). It runs in eval mode and learns nothing."""
        # only with the mean of the heads is a LookupViT's last block run to its end
        call = {} if self.tokens == "tokens" else {"mean_of_heads": True}
        with no_grad():
            out = self.encoder.eval()(images, **call)
            if self.tokens == "both":
                return ops.concat(out.tokens, out.lookup, axis=1)
        return out.tokens if self.tokens == "tokens" else out.lookup

    def forward(self, images: Tensor | Array, beam: int = 1) -> Array:
        return self.captioner.generate(self.memory(images), beam)
