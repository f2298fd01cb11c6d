"""Records, their sources, and the way from records to batches."""

from align_jax.data.batching import Batching
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
from align_jax.data.judged import Ranking, Rating, pairs_of, read_rankings, read_ratings
from align_jax.data.judged_batches import ranking_batches, rating_batches
from align_jax.data.mixture import Mixture, mix, mixture_weights
from align_jax.data.pairs import Pairs, padded_batches, tokenise_pairs
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
from align_jax.data.shared_rows import shared_batches
from align_jax.data.sources import COLUMN_MAPS
from align_jax.data.transcripts import Message

__all__ = [
  "Batching", "COLUMN_MAPS", "Demonstration", "Encoded", "EncodedPair", "Feedback", "Message",
  "Mixture", "Pairs", "Preference", "Prompt", "Ranking", "Rating", "encode_demonstration",
  "encode_feedback", "encode_preference", "encode_prompt", "encode_response", "feedback_batches",
  "fingerprint", "mix", "mixture_weights", "pad_id", "padded_batches", "pairs_of",
  "preference_batches", "prompt_batches", "ranking_batches", "rating_batches",
  "read_demonstrations", "read_feedback", "read_preferences", "read_prompts", "read_rankings",
  "read_ratings", "sft_batches", "shared_batches", "stop_ids", "to_row", "tokenise_pairs", "write",
]  # fmt: skip
