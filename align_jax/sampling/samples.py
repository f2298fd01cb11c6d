"""What generation returns."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from align_jax.sampling import stops


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Samples:
  """What was generated: contiguous rows of prompt, then response, then padding."""

  tokens: np.ndarray  # [B, S] int32
  prompt_lengths: np.ndarray  # [B] int32
  response_mask: np.ndarray  # [B, S] bool; true on sampled tokens, the EOS included
  logprobs: np.ndarray  # [B, S] f32, of the token at t under the distribution it was drawn from
  finished: np.ndarray  # [B] bool; an EOS token was drawn, or a stop string completed

  @property
  def lengths(self) -> np.ndarray:
    """[B] numbers of sampled tokens."""
    return self.response_mask.sum(axis=1)

  def responses(self) -> list[np.ndarray]:
    """The sampled tokens of every row, its EOS included."""
    return [row[mask] for row, mask in zip(self.tokens, self.response_mask)]


def decode_texts(samples: Samples, tokenizer: Any, stop: Sequence[str] = ()) -> list[str]:
  """The responses as text, without their special tokens, each up to its first `stop` string."""
  texts = (tokenizer.decode(row, skip_special_tokens=True) for row in samples.responses())
  return [stops.before(text, stop) for text in texts]
