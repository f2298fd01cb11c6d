"""Records, their sources, and the way from records to batches."""

from align_jax.data.chat import Encoded, stop_ids
from align_jax.data.corpus import pad_id
from align_jax.data.encoding import (
  EncodedPair,
  encode_demonstration,
  encode_feedback,
  encode_preference,
  encode_prompt,
  encode_response,
)
from align_jax.data.mixture import Mixture, mix, mixture_weights
from align_jax.data.pipeline import (
  feedback_batches,
  preference_batches,
  prompt_batches,
  sft_batches,
)
from align_jax.data.records import (
  Demonstration,
  Feedback,
  Preference,
  Prompt,
  fingerprint,
  read_demonstrations,
  read_feedback,
  read_preferences,
  read_prompts,
  to_row,
  write,
)
from align_jax.data.sources import COLUMN_MAPS
from align_jax.data.transcripts import Message

__all__ = [
  "COLUMN_MAPS", "Demonstration", "Encoded", "EncodedPair", "Feedback", "Message", "Mixture",
  "Preference", "Prompt", "encode_demonstration", "encode_feedback", "encode_preference",
  "encode_prompt", "encode_response", "feedback_batches", "fingerprint", "mix", "mixture_weights",
  "pad_id",
  "preference_batches", "prompt_batches", "read_demonstrations", "read_feedback",
  "read_preferences", "read_prompts", "sft_batches", "stop_ids", "to_row", "write",
]  # fmt: skip
