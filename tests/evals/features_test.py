"""Feature regression: a labeller's own coefficients come back, and chance stays chance."""

import numpy as np
import pytest

from align_jax import worlds
from align_jax.evals import features

LABELLER = worlds.Labeller(temperature=0.8, length_bias=0.1, agreement_bias=0.6)


def labelled(n, seed, labeller=LABELLER, family=None):
  judged = worlds.Microworld().judge_pairs(worlds.Microworld().pairs(n, seed=seed, family=family))
  p = labeller.probabilities(judged)
  y = (np.random.default_rng(seed).random(n) < p).astype(float)
  sides = ([_of(j) for j in side] for side in zip(*judged))
  return features.differences(*sides), y, p


def _of(found):
  return {
    "gold": found.reward, "length": float(found.length), "agrees": float(found.agrees)
  }  # fmt: skip


def test_planted_coefficients_are_recovered():
  """The labeller's formula: (1, length bias, agreement bias) / temperature."""
  x, y, _ = labelled(8000, 0, family="opinion")
  found = {f.name: f.coefficient for f in features.regress(x, y, x["length"]).features}
  for name, planted in (("gold", 1 / 0.8), ("length", 0.1 / 0.8), ("agrees", 0.6 / 0.8)):
    assert abs(found[name].value - planted) < 2 * found[name].stderr, name
  assert found["length"].stderr < 0.02 and found["agrees"].stderr < 0.3


def test_every_coefficient_lies_within_two_errors_as_often_as_it_should():
  inside = []
  for seed in range(40):
    x, y, _ = labelled(500, seed, family="opinion")
    for f in features.regress(x, y, x["length"]).features:
      planted = {"gold": 1 / 0.8, "length": 0.1 / 0.8, "agrees": 0.6 / 0.8}[f.name]
      inside.append(abs(f.coefficient.value - planted) < 2 * f.coefficient.stderr)
  assert np.mean(inside) > 0.88


def test_a_shuffled_control_finds_nothing_and_predicts_nothing():
  x, y, _ = labelled(4000, 1)
  found = features.regress(x, y, x["length"])
  assert found.held_out.low > 0.7 and found.held_out.low > found.longer.high
  assert found.shuffled.low < 0.5 < found.shuffled.high
  noise = np.random.default_rng(9).integers(0, 2, 4000).astype(float)
  again = features.regress(x, noise, x["length"])
  assert not any(f.coefficient.excludes(0.0) for f in again.features)


def test_the_labellers_own_probabilities_give_its_formula_exactly():
  """Soft preferences, as those of a reward model: no error is left but the prior's."""
  x, _, p = labelled(2000, 2, family="opinion")
  found = {f.name: f.coefficient.value for f in features.regress(x, p, x["length"]).features}
  np.testing.assert_allclose(
    [found[n] for n in ("gold", "length", "agrees")], [1.25, 0.125, 0.75], rtol=2e-3
  )


def test_nothing_depends_on_which_side_is_first():
  x, y, _ = labelled(1000, 3)
  there = features.regress(x, y, x["length"])
  back = features.regress({n: -c for n, c in x.items()}, 1 - y, -x["length"])
  assert [f.coefficient.value for f in there.features] == pytest.approx(
    [f.coefficient.value for f in back.features], rel=1e-6
  )
  assert there.held_out.value == back.held_out.value


def test_features_without_a_coefficient_say_why():
  x, y, _ = labelled(200, 4)
  x |= {"twice": 2 * x["length"], "never": np.zeros(200), "rare": np.eye(200)[0]}
  found = features.regress(x, y, x["length"])
  assert set(found.left_out) >= {"twice", "never", "rare"}
  assert "follows" in found.left_out["twice"] and "1 pairs" in found.left_out["rare"]
  with pytest.raises(ValueError, match="enough pairs"):
    features.regress({"never": np.zeros(200)}, y, x["length"])


@pytest.mark.parametrize(
  "text, expected",
  [
    ("I'm sorry, but I can't help with that.", {"apology": 1, "refusal": 1, "first person": 2}),
    ("You're right! Perhaps 3 or 4.5, maybe?", {"agreement": 1, "hedges": 2, "numbers": 2}),
    ("# Title\n\n- one\n- two\n1. three\n\n`code`", {"markdown": 1, "list items": 3, "code": 1}),
    ("Happy to help. It is blue.", {"courtesy": 1, "sentences": 2, "words": 6, "refusal": 0}),
    ("", {"words": 0, "variety": 0, "prompt overlap": 0, "sentences": 1}),
  ],
)
def test_features_of_text(text, expected):
  found = features.of_text("what is it", text)
  assert set(found) == set(features.NAMES)
  counted = features._COUNTED
  for name, value in expected.items():
    assert found[name] == pytest.approx(np.log1p(value) if name in counted else value), name


def test_overlap_and_variety():
  found = features.of_text("the red cat", "The cat, the dog.")
  assert found["prompt overlap"] == pytest.approx(2 / 3)
  assert found["variety"] == pytest.approx(3 / 4)
