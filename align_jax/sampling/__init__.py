"""Generation: tokens, and the log-probs of the distribution they were drawn from."""

from align_jax.sampling.distribution import Decoding, distribution_logprobs, make_decoding
from align_jax.sampling.engine import generate
from align_jax.sampling.samples import Samples, decode_texts

__all__ = [
  "Decoding",
  "Samples",
  "decode_texts",
  "distribution_logprobs",
  "generate",
  "make_decoding",
]
