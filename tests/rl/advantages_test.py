"""Tests of the way from scores to advantages."""

import dataclasses

import numpy as np
import pytest

from align_jax import rl
from align_jax.rl import rollouts
from align_jax.rl.advantages import estimate_advantages, explained_variance, importance_weights
from align_jax.training import metrics as metrics_lib
from tests.rl.conftest import PPO, grouped

SCORES = np.arange(4.0, dtype=np.float32)
UNWHITENED = dataclasses.replace(PPO, whiten_advantages=False)


def _experience():
  """Four responses of 3, 4 (with a hole), 1 and 4 tokens."""
  rng = np.random.default_rng(0)
  mask = np.zeros((4, 6), np.float32)
  for row, (start, stop) in enumerate([(2, 5), (1, 6), (3, 4), (2, 6)]):
    mask[row, start:stop] = 1
  mask[1, 3] = 0
  names = ("old_logprobs", "ref_logprobs", "old_values", "sampler_logprobs", "entropy")
  batch = {name: rng.normal(size=(4, 6)).astype(np.float32) * mask for name in names}
  return batch | {"mask": mask, "score": SCORES}


def _estimate(batch, config, kl_coef=0.1, group=2, baseline=0.0):
  return estimate_advantages(
    batch, config, samples_per_prompt=group, kl_coef=kl_coef, baseline=baseline
  )


def _k1(batch):
  return ((batch["old_logprobs"] - batch["ref_logprobs"]) * batch["mask"]).sum(axis=1)


def _loop_gae(batch, kl_coef, lam):
  expected = np.zeros((4, 6))
  for row in range(4):
    advantage, value = 0.0, 0.0
    on = np.flatnonzero(batch["mask"][row])
    for t in on[::-1]:
      reward = -kl_coef * (batch["old_logprobs"] - batch["ref_logprobs"])[row, t]
      reward += SCORES[row] * (t == on[-1])
      advantage = reward + value - batch["old_values"][row, t] + lam * advantage
      value = batch["old_values"][row, t]
      expected[row, t] = advantage
  return expected


def test_gae_of_shaped_rewards_and_its_whitening():
  batch = _experience()
  plain, expected = _estimate(batch, UNWHITENED), _loop_gae(batch, 0.1, 0.95)
  np.testing.assert_allclose(plain["advantages"], expected, rtol=1e-4, atol=1e-5)
  white, on = _estimate(batch, PPO), batch["mask"] > 0
  normal = (expected[on] - expected[on].mean()) / expected[on].std()
  np.testing.assert_allclose(np.asarray(white["advantages"])[on], normal, rtol=1e-3, atol=1e-4)
  np.testing.assert_array_equal(white["returns"], plain["returns"])


@pytest.mark.parametrize("lam, expected", [(0.0, "delta"), (1.0, "return - V")])
def test_gae_at_its_ends(lam, expected):
  batch = _experience()
  config = dataclasses.replace(UNWHITENED, value=rl.ValueConfig(lam=lam))
  advantages = np.asarray(_estimate(batch, config)["advantages"])
  row, on = 1, np.flatnonzero(batch["mask"][1])
  values = batch["old_values"][row, on]
  rewards = -0.1 * (batch["old_logprobs"] - batch["ref_logprobs"])[row, on]
  rewards[-1] += SCORES[row]
  if expected == "delta":
    wanted = rewards + np.append(values[1:], 0.0) - values
  else:
    wanted = np.cumsum(rewards[::-1])[::-1] - values
  np.testing.assert_allclose(advantages[row, on], wanted, rtol=1e-4, atol=1e-5)


def _grouped_by_hand(name, scores):
  pairs, out = scores.reshape(2, 2), []
  for group in pairs:
    for i, score in enumerate(group):
      if name == "rloo":
        out.append(score - group[1 - i])
      elif name == "grpo":
        out.append((score - group.mean()) / (group.std(ddof=1) + 1e-4))
      else:
        out.append(score - group.mean())
  out = np.array(out)
  return (out - out.mean()) / out.std() if name == "reinforce_pp_baseline" else out


@pytest.mark.parametrize("name", rl.GROUPED)
def test_groups_are_compared_and_every_token_gets_its_response_s_advantage(name):
  batch = _experience()
  estimated = _estimate(batch, grouped(name))["advantages"]
  expected = _grouped_by_hand(name, SCORES - 0.1 * _k1(batch))
  np.testing.assert_allclose(estimated, expected[:, None] * batch["mask"], rtol=1e-4, atol=1e-5)


def test_reinforce_takes_off_the_baseline_and_its_kl():
  batch = _experience()
  estimated = _estimate(batch, grouped("reinforce"), baseline=0.7)["advantages"]
  expected = (SCORES - 0.1 * _k1(batch) - 0.7)[:, None] * batch["mask"]
  np.testing.assert_allclose(estimated, expected, rtol=1e-5, atol=1e-6)


def test_a_kl_in_the_loss_is_not_in_the_reward_as_well():
  batch = _experience()
  config = grouped("reinforce", kl=rl.KlConfig(0.1, place="loss", kind="k2"))
  estimated = _estimate(batch, config)["advantages"]
  np.testing.assert_allclose(estimated, SCORES[:, None] * batch["mask"], rtol=1e-6)


def test_the_reported_kl_is_the_one_that_is_paid():
  """peers 3.22: with V = 0 and no discount, the first return is the score less its KL."""
  batch = _experience()
  batch["old_values"] = np.zeros((4, 6), np.float32)
  config = dataclasses.replace(UNWHITENED, value=rl.ValueConfig(lam=1.0))
  returns = np.asarray(_estimate(batch, config)["returns"])
  metrics = metrics_lib.to_floats(rollouts.policy_metrics(batch))
  first = batch["mask"].argmax(axis=1)
  paid = 1.5 - 0.1 * metrics["kl/ref"]
  np.testing.assert_allclose(returns[np.arange(4), first].mean(), paid, rtol=1e-5)
  assert abs(metrics["kl/ref"]) > 0.1


@pytest.mark.parametrize("name", ["gae", "reinforce", "reinforce_pp", *rl.GROUPED])
def test_padding_and_empty_responses_leak_into_nothing(name):
  """peers 3.25, 3.27: garbage off the mask and a row of no tokens change no advantage or metric."""
  gamma = {"gamma": 1.0} if name == "reinforce_pp" else {}
  config = PPO if name == "gae" else grouped(name, **gamma)
  batch = _experience()
  batch["mask"][3] = 0
  arrays = {k: v for k, v in batch.items() if v.ndim == 2 and k != "mask"}
  same = {"mask": batch["mask"], "score": SCORES}
  clean = {k: v * batch["mask"] for k, v in arrays.items()} | same
  garbage = {k: np.where(batch["mask"] > 0, v, np.nan) for k, v in arrays.items()}
  dirty = {k: np.pad(v, ((0, 0), (0, 3)), constant_values=1e4) for k, v in garbage.items()}
  dirty |= {"mask": np.pad(batch["mask"], ((0, 0), (0, 3))), "score": SCORES}
  results = []
  for rows in (clean, dirty):
    estimated = _estimate(rows, config)
    values = metrics_lib.to_floats(rollouts.policy_metrics(estimated))
    results.append((np.asarray(estimated["advantages"])[:, :6], values))
  np.testing.assert_allclose(results[1][0], results[0][0], rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(results[0][0][3], 0.0)
  assert all(np.isfinite(value) for value in results[1][1].values())
  assert results[1][1] == pytest.approx(results[0][1], rel=1e-5)


def test_importance_weights_by_name():
  batch = _experience()
  ratio = np.exp(batch["old_logprobs"] - batch["sampler_logprobs"])
  truncated = grouped("rloo", importance=rl.ImportanceConfig("truncated", 1.5))
  weights = importance_weights(batch, truncated)["importance"]
  np.testing.assert_allclose(weights, np.minimum(ratio, 1.5), rtol=1e-5)
  masked = grouped("rloo", importance=rl.ImportanceConfig("masked", 1.5, 0.5))
  inside = (ratio >= 0.5) & (ratio <= 1.5)
  assert not inside.all()
  weights = importance_weights(batch, masked)["importance"]
  np.testing.assert_allclose(weights, ratio * inside, rtol=1e-5)
  assert "importance" not in importance_weights(batch, grouped("rloo"))


def test_explained_variance():
  returns, mask = np.arange(6.0)[None], np.ones((1, 6))
  assert explained_variance(returns, returns, mask) == 1.0
  assert explained_variance(returns + 5.0, returns, mask) == 1.0  # an offset is not variance
  assert explained_variance(np.zeros((1, 6)), returns, mask) == 0.0
  assert explained_variance(-returns, returns, mask) < 0.0
  assert explained_variance(returns, np.ones((1, 6)), mask) == 0.0
