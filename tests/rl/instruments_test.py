"""Diversity: counted by hand on small batches, and by a slow loop on random ones."""

import math
import types

import numpy as np
import pytest

from align_jax import sampling
from align_jax.errors import InputError
from align_jax.rl import instruments


def rollout(texts, responses):
  """A rollout whose prompts are of one token; rows are padded with 0, which is also a token."""
  length = 1 + max(map(len, responses))
  tokens, mask = np.zeros((2, len(responses), length), np.int32)
  for row, response in enumerate(responses):
    tokens[row, 1 : 1 + len(response)] = response
    mask[row, 1 : 1 + len(response)] = 1
  samples = sampling.Samples(
    tokens=tokens,
    prompt_lengths=np.ones(len(responses), np.int32),
    response_mask=mask.astype(bool),
    logprobs=np.zeros(tokens.shape, np.float32),
    finished=np.ones(len(responses), bool),
  )
  return types.SimpleNamespace(texts=texts, samples=samples)


def test_distinct_texts_by_hand():
  texts = ["a", "a", "a", "b", "c", "d"]  # groups of 3: 1 of 3 and 3 of 3
  assert instruments.distinct_texts(texts, 3) == pytest.approx((1 / 3 + 1) / 2)
  assert instruments.distinct_texts(texts, 2) == pytest.approx((1 / 2 + 1 + 1) / 3)
  assert instruments.distinct_texts(texts, 1) == pytest.approx(4 / 6)


def test_one_answer_to_all_prompts_is_seen_without_groups_too():
  assert instruments.distinct_texts(["no"] * 8, 4) == 1 / 4
  assert instruments.distinct_texts(["no"] * 8, 1) == 1 / 8


def test_answers_shared_between_prompts_do_not_count_within_groups():
  assert instruments.distinct_texts(["a", "b", "a", "b"], 2) == 1.0


def test_bigrams_by_hand():
  """12 23 31 12 | 12: 5 bigrams, 3 of them different; none spans two responses (12 would, 1|1)."""
  found = instruments.distinct_ngrams([np.array([1, 2, 3, 1, 2]), np.array([1, 2])], 2)
  assert found == pytest.approx(3 / 5)


def test_repetition_by_hand():
  """7 tokens of one kind: four 4-grams, one different; then eight that never repeat; then too short."""
  rows = [np.full(7, 5), np.arange(8), np.arange(3)]
  assert instruments.repetition(rows, 4) == pytest.approx((3 / 4 + 0) / 2)


def test_what_others_say_is_no_repetition():
  rows = [np.arange(8)] * 5
  assert instruments.repetition(rows, 4) == 0.0
  assert instruments.distinct_ngrams(rows, 4) == pytest.approx(1 / 5)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n", [1, 2, 4])
def test_equals_counting_with_sets(seed, n):
  rng = np.random.default_rng(seed)
  rows = [rng.integers(0, 4, size) for size in rng.integers(0, 15, 12)]
  grams = [[tuple(r[i : i + n]) for i in range(len(r) - n + 1)] for r in rows]
  everything = sum(grams, [])
  assert instruments.distinct_ngrams(rows, n) == pytest.approx(
    len(set(everything)) / len(everything)
  )
  shares = [1 - len(set(g)) / len(g) for g in grams if g]
  assert instruments.repetition(rows, n) == pytest.approx(np.mean(shares))


def test_the_whole_rollout_reads_sampled_tokens_only():
  """Prompt and padding tokens are 0 everywhere: read, they would be the most frequent bigram."""
  found = instruments.rollout_metrics(rollout(["x", "y"], [[1, 2, 3], [2, 3, 9, 8, 7]]), 2)
  assert found == {
    "distinct/responses": 1.0,
    "distinct/bigrams": pytest.approx(5 / 6),
    "repetition/4grams": 0.0,
  }


@pytest.mark.parametrize("responses", [[[], []], [[], [4]], [[3], [3]]])
def test_empty_and_one_token_responses_give_numbers(responses):
  """Nothing said counts as no variety, so that a collapse to silence is one."""
  found = instruments.rollout_metrics(rollout(["", ""], responses), 2)
  assert all(math.isfinite(v) for v in found.values())
  assert found == {"distinct/responses": 0.5, "distinct/bigrams": 0.0, "repetition/4grams": 0.0}


def test_rows_that_are_no_groups_are_refused():
  with pytest.raises(InputError, match="3 texts are not a multiple of 2"):
    instruments.rollout_metrics(rollout(["a", "b", "c"], [[1], [2], [3]]), 2)
