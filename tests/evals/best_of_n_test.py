"""Best-of-n: the estimator against all choices there are, its KL, and the shape of Gao's curves."""

import itertools
import json
import math
import types

import numpy as np
import pytest

from align_jax.errors import InputError
from align_jax.evals import best_of_n, policy, statistics
from align_jax.evals.best_of_n import best_of_n_kl, best_of_n_scores


def test_golden_values():
  gold, proxy = [[0.1, -0.4, 0.9, 0.3, -1.0]], [[5.0, 1.0, 2.0, 4.0, 3.0]]
  found = [best_of_n_scores(proxy, gold, n)[0] for n in range(1, 6)]
  np.testing.assert_allclose(found, [-0.02, 0.02, 0.05, 0.14, 0.10], atol=1e-12)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("n", range(1, 8))
def test_it_is_the_mean_over_every_choice_of_n(n, tied):
  rng = np.random.default_rng(n)
  gold = rng.normal(size=(3, 7))
  proxy = rng.integers(0, 3, (3, 7)).astype(float) if tied else rng.normal(size=(3, 7))
  expected = np.zeros(3)
  for row in range(3):
    values = []
    for chosen in itertools.combinations(range(7), n):
      best = max(proxy[row, i] for i in chosen)
      values.append(np.mean([gold[row, i] for i in chosen if proxy[row, i] == best]))
    expected[row] = np.mean(values)
  np.testing.assert_allclose(best_of_n_scores(proxy, gold, n), expected, atol=1e-12)


def test_choosing_by_a_score_of_right_and_wrong_is_pass_at_k():
  right = (np.arange(20) < 6).astype(float)[None]
  for n in (1, 2, 5, 15):
    found = best_of_n_scores(right, right, n)[0]
    assert found == pytest.approx(statistics.pass_at_k(20, 6, n), rel=1e-12)


def test_identities_and_invariances():
  rng = np.random.default_rng(0)
  proxy, gold = rng.normal(size=(2, 4, 50))
  np.testing.assert_allclose(best_of_n_scores(proxy, gold, 1), gold.mean(axis=1), atol=1e-12)
  at_best = np.take_along_axis(gold, proxy.argmax(axis=1)[:, None], axis=1)[:, 0]
  np.testing.assert_allclose(best_of_n_scores(proxy, gold, 50), at_best, atol=1e-12)
  order = rng.permutation(50)
  for n in (3, 20):
    found = best_of_n_scores(proxy, gold, n)
    np.testing.assert_allclose(best_of_n_scores(np.exp(proxy), gold, n), found, atol=1e-12)
    np.testing.assert_allclose(
      best_of_n_scores(proxy[:, order], gold[:, order], n), found, atol=1e-12
    )
  own = [best_of_n_scores(proxy, proxy, n).mean() for n in (1, 2, 8, 50)]
  assert own == sorted(own)
  flat = np.zeros((4, 50))  # a selector that cannot tell chooses at random
  np.testing.assert_allclose(best_of_n_scores(flat, gold, 20), gold.mean(axis=1), atol=1e-12)


def test_many_samples_neither_overflow_nor_drift():
  """The best of n uniform numbers is n/(n + 1) on average; here of the even grid of N of them."""
  total = 20_000
  grid = (np.arange(total) + 1.0)[None] / (total + 1)
  for n in (1, 100, 12_000):
    assert best_of_n_scores(grid, grid, n)[0] == pytest.approx(n / (n + 1), rel=1e-9)


def test_it_agrees_with_drawing():
  """Gold plus heavy-tailed noise as proxy: ten thousand draws of n of the N, within 3 errors."""
  rng = np.random.default_rng(4)
  gold = rng.normal(size=60)
  proxy = gold + rng.standard_t(2, size=60)
  for n in (2, 16):
    drawn = np.array([rng.permutation(60)[:n] for _ in range(10_000)])
    chosen = gold[drawn[np.arange(10_000), proxy[drawn].argmax(axis=1)]]
    error = chosen.std() / 100
    assert abs(best_of_n_scores(proxy[None], gold[None], n)[0] - chosen.mean()) < 3 * error


def test_the_kl_has_its_golden_values():
  golden = {1: 0, 2: 0.193147, 4: 0.636294, 16: 1.835089, 64: 3.174508, 1000: 5.908755}
  golden[60_000] = 10.002117
  for n, expected in golden.items():
    assert best_of_n_kl(n) == pytest.approx(expected, abs=1e-6)


def test_the_kl_is_exact_without_ties_and_a_bound_with_them():
  """Of N equally likely responses by rank; in the limit of many, and of two that are all alike."""
  for n in (2, 4, 16):
    weights = best_of_n._rank_weights(100_000, n)
    kl = np.sum(np.where(weights > 0, weights * np.log(np.maximum(weights, 1e-300) * 1e5), 0.0))
    assert kl == pytest.approx(best_of_n_kl(n), abs=2e-3)
    win = 1 - 0.5**n  # two answers of one half, the better one wins unless it is never drawn
    tied = win * math.log(2 * win) + (1 - win) * math.log(2 * (1 - win))
    assert tied < best_of_n_kl(n)


@pytest.mark.parametrize("bent", [0.0, 0.2])
def test_a_misspecified_proxy_is_over_optimised_and_a_linear_truth_is_not(bent):
  """Gold u − q(u² − 1), proxy u and noise: with q > 0 gold peaks and falls, with q = 0 it rises."""
  rng = np.random.default_rng(0)
  u, noise = rng.normal(size=(2, 40, 4096))
  gold, proxy = u - bent * (u**2 - 1), u + 0.3 * noise
  points = best_of_n.curve(proxy, gold, (4, 16, 64, 256, 1024, 4096))
  values = [point.gold.value for point in points]
  assert [point.n for point in points] == [1, 4, 16, 64, 256, 1024, 4096]
  if bent:
    assert 1 <= int(np.argmax(values)) <= 5 and values[-1] < max(values) - 0.05
  else:
    assert values == sorted(values)
  proxies = [point.proxy.value for point in points]
  assert proxies == sorted(proxies)
  gain = points[3].gold_gain
  assert gain.value == pytest.approx(values[3] - values[0], abs=1e-12)


BAD = [
  (np.zeros((2, 3)), np.zeros((2, 4)), 1, "both scores must be"),
  (np.zeros(3), np.zeros(3), 1, "both scores must be"),
  (np.full((1, 3), np.nan), np.zeros((1, 3)), 1, "finite"),
  (np.zeros((1, 3)), np.zeros((1, 3)), 4, r"n must be in \[1, 3\]"),
  (np.zeros((1, 3)), np.zeros((1, 3)), 0, r"n must be in \[1, 3\]"),
]


@pytest.mark.parametrize("proxy, gold, n, message", BAD, ids=range(len(BAD)))
def test_bad_scores_are_refused(proxy, gold, n, message):
  with pytest.raises(ValueError, match=message):
    best_of_n_scores(proxy, gold, n)


@pytest.fixture
def answered(monkeypatch):
  """A policy that answers with numbers of its own, without a model."""
  asked = []

  def respond(of, prompts, tokenizer, settings, mesh, *, samples_per_prompt):
    asked.extend(prompts)
    return policy.Responses(
      tuple(f"{p}{i}" for p in prompts for i in range(samples_per_prompt)), None
    )

  monkeypatch.setattr(policy, "respond", respond)
  return asked


def _evaluate(**changes):
  settings = {"sizes": (2, 4), "samples": 4, "selector_name": "reward:a/b", "scorer_name": "gold"}
  return best_of_n.evaluate_best_of_n(
    types.SimpleNamespace(name="sft"),
    ["a", "b", "c"],
    None,
    lambda prompts, r: np.array([int(t[1:]) * (t[0] == p) for t, p in zip(r.texts, prompts)]),
    lambda prompts, r: np.array([-int(t[1:]) * (t[0] == p) for t, p in zip(r.texts, prompts)]),
    policy.SamplingSettings(max_new_tokens=4),
    **settings | changes,
  )


def test_every_prompt_is_answered_n_times_and_the_result_comes_back_from_disk(answered, tmp_path):
  found = _evaluate()
  assert answered == list("abc")
  assert [point.n for point in found.points] == [1, 2, 4]
  assert found.points[-1].proxy.value == 3.0 and found.points[-1].gold.value == -3.0
  assert found.points[0].gold.value == -1.5
  best_of_n.save(tmp_path, found)
  assert best_of_n.load(tmp_path) == found
  assert (tmp_path / "best_of_n.png").read_bytes()[:4] == b"\x89PNG"
  assert json.loads((tmp_path / "best_of_n.json").read_text())["selector"] == "reward:a/b"


@pytest.mark.parametrize("sizes", [(), (2, 2), (0, 2), (2, 5)])
def test_sizes_that_cannot_be_estimated_are_refused(answered, sizes):
  with pytest.raises(InputError, match="best_of must"):
    _evaluate(sizes=sizes)
  assert not answered
