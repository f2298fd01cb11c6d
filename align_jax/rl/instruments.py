"""How varied the responses of a rollout are: what falls when a policy collapses onto one answer."""

from collections.abc import Sequence

import numpy as np

from align_jax.errors import InputError


def rollout_metrics(rollout, samples_per_prompt: int) -> dict[str, float]:
  """Diversity of B = P·G responses, all shares within [0, 1] and never NaN.

  distinct/responses: texts that differ, of the G to a prompt, averaged over prompts (1/G: one answer
  to each); with G = 1, of all B. distinct/bigrams and repetition/4grams: see `distinct_ngrams` and
  `repetition`.

  Args:
    rollout: with `texts` [B], prompt by prompt, and `samples`, whose `responses()` are B token arrays.
    samples_per_prompt: G.

  Raises:
    InputError: if B is no multiple of G.
  """
  responses = rollout.samples.responses()
  return {
    "distinct/responses": distinct_texts(rollout.texts, samples_per_prompt),
    "distinct/bigrams": distinct_ngrams(responses, 2),
    "repetition/4grams": repetition(responses, 4),
  }


def distinct_texts(texts: Sequence[str], samples_per_prompt: int) -> float:
  """Mean over prompts of |set of its G texts| / G; with G = 1, |set of all texts| / B."""
  if samples_per_prompt < 1 or not texts or len(texts) % samples_per_prompt:
    raise InputError(f"{len(texts)} texts are not a multiple of {samples_per_prompt} a prompt")
  size = samples_per_prompt if samples_per_prompt > 1 else len(texts)
  groups = [texts[i : i + size] for i in range(0, len(texts), size)]
  return float(np.mean([len(set(group)) / size for group in groups]))


def distinct_ngrams(responses: Sequence[np.ndarray], n: int) -> float:
  """distinct-n (Li et al. 2016): different n-grams / all n-grams of the batch; 0 if there are none.

  It falls as the batch grows, so compare it between batches of one size only.

  responses: token ids, one int array [length] each; an n-gram lies within one response.
  """
  windows, _ = _windows(responses, n)
  return len(_unique(windows)) / len(windows) if len(windows) else 0.0


def repetition(responses: Sequence[np.ndarray], n: int) -> float:
  """1 − different / all n-grams within a response, averaged over responses of at least n tokens.

  0 if no response is that long. (Welleck et al. 2020 call it seq-rep-n.)
  """
  windows, rows = _windows(responses, n)
  if not len(windows):
    return 0.0
  different = _unique(np.concatenate([rows[:, None], windows], axis=1))[:, 0]
  total = np.bincount(rows)
  share = np.bincount(different, minlength=len(total))[total > 0] / total[total > 0]
  return float(np.mean(1 - share))


def _windows(responses: Sequence[np.ndarray], n: int) -> tuple[np.ndarray, np.ndarray]:
  """([N, n], [N]): all n-grams, and the response that each is from."""
  found = [
    np.lib.stride_tricks.sliding_window_view(np.asarray(r, np.int64), n) if len(r) >= n else None
    for r in responses
  ]
  kept = [(w, np.full(len(w), row)) for row, w in enumerate(found) if w is not None]
  if not kept:
    return np.empty((0, n), np.int64), np.empty(0, np.int64)
  windows, rows = zip(*kept)
  return np.concatenate(windows), np.concatenate(rows)


def _unique(rows: np.ndarray) -> np.ndarray:
  """The different rows of [N, k], sorted by their first column; faster than np.unique(axis=0)."""
  rows = rows[np.lexsort(rows.T[::-1])]
  return rows[np.concatenate([[True], (rows[1:] != rows[:-1]).any(axis=1)])]
