"""Tests of the learner: its loss against NumPy, its gradient against that of the exact objective.

The exact part enumerates every response of at most two tokens of a transformer with a vocabulary of
three (token 2 ends a response), or every pair of them, so that nothing is sampled and what differs is bias.
"""

import dataclasses
import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from align_jax import losses, models, rl
from align_jax.rl import policy_gradient, rollouts
from align_jax.training import optimizer
from tests.rl.conftest import PPO, grouped, prompt_batches

CLOSE = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-6)
SAMPLING = rl.SamplingConfig(max_new_tokens=6, samples_per_prompt=2)
ONCE = {"epochs": 1, "minibatches": 1}


# The loss, against loops in NumPy.


@pytest.fixture(scope="module")
def rows():
  """Four scored responses of 3, 4 (with a hole), 1 and 4 tokens, off policy."""
  rng = np.random.default_rng(0)
  mask = np.zeros((4, 7), np.float32)
  for row, (start, stop) in enumerate([(2, 5), (1, 6), (3, 4), (3, 7)]):
    mask[row, start:stop] = 1
  mask[1, 3] = 0
  names = ("old_values", "advantages", "returns")
  arrays = {name: rng.normal(size=(4, 7)).astype(np.float32) * mask for name in names}
  for name in ("old_logprobs", "ref_logprobs"):
    arrays[name] = (rng.normal(-2.8, 0.4, size=(4, 7)) * mask).astype(np.float32)
  arrays["importance"] = rng.uniform(0.5, 2.0, (4, 7)).astype(np.float32)
  tokens = rng.integers(2, 16, (4, 8)).astype(np.int32)
  ptx = {
    "ptx_tokens": rng.integers(2, 16, (4, 2, 5)).astype(np.int32),
    "ptx_positions": np.broadcast_to(np.arange(5, dtype=np.int32), (4, 2, 5)),
    "ptx_segment_ids": np.ones((4, 2, 5), np.int32),
    "ptx_loss_mask": rng.integers(0, 2, (4, 2, 5)).astype(np.float32),
  }
  return arrays | ptx | {
    "mask": mask, "tokens": tokens, "segment_ids": np.ones((4, 8), np.int32),
    "kl_coef": np.full(4, 0.3, np.float32),
  }  # fmt: skip


LOSSES = {
  "ppo": {},
  "dual": {"dual_clip": 1.5, "clip_eps_high": 0.28},
  "cispo": {"loss": "cispo", "clip_eps": None, "clip_eps_high": 0.5},
  "reinforce": {"loss": "reinforce", "clip_eps": None},
  "kl": {"kl": rl.KlConfig(0.3, place="loss", kind="k3")},
  "entropy": {"entropy_coef": 0.2},
  "weighted": {"importance": rl.ImportanceConfig("truncated", 2.0)},
}


def _token_loss(name, logprobs, entropy, rows):
  """One token's loss by the formula, [4, 7]."""
  advantages = rows["advantages"]
  ratio = np.exp(logprobs - rows["old_logprobs"])
  high = 0.28 if name == "dual" else 0.2
  surrogate = np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1 + high) * advantages)
  if name == "dual":
    surrogate = np.where(advantages < 0, np.maximum(surrogate, 1.5 * advantages), surrogate)
  if name == "cispo":
    return -np.minimum(ratio, 1.5) * advantages * logprobs
  if name == "reinforce":
    return -advantages * logprobs
  loss = -surrogate
  if name == "kl":
    d = logprobs - rows["ref_logprobs"]
    loss = loss + 0.3 * ratio * (np.exp(-d) - 1 + d)
  if name == "entropy":
    loss = loss - 0.2 * entropy
  return loss * rows["importance"] if name == "weighted" else loss


def _mean(values, mask, average):
  responses = [values[r][mask[r] > 0] for r in range(4)]
  if average == "sequence":
    return np.mean([response.mean() for response in responses])
  total = sum(response.sum() for response in responses)
  return total / (mask.sum() if average == "token" else 4 * SAMPLING.max_new_tokens)


def _objective(toy, config, value=False):
  objective = policy_gradient.policy_gradient_objective(
    toy.model, toy.model if value else None, config, SAMPLING.temperature
  )
  prepare = functools.partial(
    policy_gradient.averaged, config=config, max_length=SAMPLING.max_new_tokens
  )
  return objective, prepare


@pytest.fixture(scope="module")
def scored(toy, rows):
  score = functools.partial(rollouts.policy_logprobs, toy.model, temperature=1.0, chunk=None)
  return jax.device_get(jax.jit(score)({"params": toy.params}, rows))


@pytest.mark.parametrize("average", ["token", "sequence", "constant"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_is_the_formula_averaged_as_asked(toy, rows, scored, name, average):
  config = grouped("rloo", average=average, **ONCE | LOSSES[name])
  batch = {k: v for k, v in rows.items() if not k.startswith("ptx_")}
  if name != "weighted":
    del batch["importance"]
  objective, prepare = _objective(toy, config)
  trainable = {"policy": toy.params}
  total, metrics = objective(trainable, {}, prepare(None, None, batch), None)
  expected = _mean(_token_loss(name, *scored, rows), rows["mask"], average)
  np.testing.assert_allclose(total, expected, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(metrics["loss"].compute(), expected, rtol=1e-4, atol=1e-6)


def test_value_and_pretraining_losses_are_means_of_their_own(toy, rows, scored):
  config = dataclasses.replace(PPO, ptx_coef=2.0, average="sequence", kl=rl.KlConfig(0.1))
  batch = {k: v for k, v in rows.items() if k != "importance"}
  objective, prepare = _objective(toy, config, value=True)
  trainable = {"policy": toy.params, "value": toy.value}
  total, metrics = objective(trainable, {}, prepare(None, None, batch), None)
  values = np.asarray(rollouts.token_values(toy.model, toy.value, {}, batch))
  clipped = rows["old_values"] + np.clip(values - rows["old_values"], -0.2, 0.2)
  error = np.maximum((values - rows["returns"]) ** 2, (clipped - rows["returns"]) ** 2) / 2
  value_loss = error[rows["mask"] > 0].mean()
  flat = rows["ptx_tokens"].reshape(8, 5)
  logprobs = np.asarray(models.token_logprobs(toy.model, {"params": toy.params}, flat))
  chosen = rows["ptx_loss_mask"].reshape(8, 5)[:, 1:] > 0
  nll = -logprobs[chosen].mean()
  policy_loss = _mean(_token_loss("ppo", *scored, rows), rows["mask"], "sequence")
  np.testing.assert_allclose(metrics["value/loss"].compute(), value_loss, rtol=1e-4)
  np.testing.assert_allclose(metrics["ptx/loss"].compute(), nll, rtol=1e-4)
  np.testing.assert_allclose(total, policy_loss + 0.1 * value_loss + 2.0 * nll, rtol=1e-4)


@pytest.mark.parametrize("average", ["token", "sequence", "constant"])
def test_accumulation_over_responses_of_different_lengths_changes_nothing(toy, rows, average):
  """peers 3.20, with every kind of mean and all losses at once; maxima stay maxima."""
  config = dataclasses.replace(
    PPO, average=average, ptx_coef=0.5, **ONCE, kl=rl.KlConfig(0.1, place="loss", kind="k2")
  )
  objective, prepare = _objective(toy, config, value=True)
  tx, results = optax.sgd(1.0), []
  start = rl.create_state(
    {"policy": toy.params, "value": toy.value}, tx, kl_coef=0.1, seed=0, mesh=toy.mesh
  )
  batch = {k: v for k, v in rows.items() if k != "importance"}
  for parts in (1, 2):
    run = functools.partial(
      policy_gradient.run_updates, objective=objective, tx=tx, epochs=1, minibatches=1,
      accumulate=parts, prepare=prepare,
    )  # fmt: skip
    state, metrics = jax.jit(run)(start, {}, batch)
    results.append((metrics["loss"].compute(), metrics["ppo/ratio_max"], state.params))
  (loss, largest, whole), (loss_of_parts, largest_of_parts, of_parts) = results
  np.testing.assert_allclose(loss_of_parts, loss, rtol=1e-5)
  np.testing.assert_allclose(largest_of_parts, largest, rtol=1e-6)
  for a, b in zip(jax.tree.leaves(of_parts), jax.tree.leaves(whole)):
    np.testing.assert_allclose(a, b, atol=2e-5)


# The gradient, against the exact one.

EOS, LENGTH = 2, 2
RESPONSES = [[EOS], *([a, b] for a in range(2) for b in range(3))]
REWARDS = np.array([0.3, 1.0, -0.5, 0.2, 0.8, -1.0, 0.6], np.float32)
KL_COEF = 0.2


@pytest.fixture(scope="module")
def world():
  """A transformer, a reference, a critic, and all seven responses to the prompt [0]."""
  config = models.ModelConfig(
    vocab_size=3, embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=16
  )
  model = models.Transformer(config)
  params, ref = (models.init_params(model, jax.random.key(seed)) for seed in (0, 1))
  head = models.init_scalar_head(jax.random.key(2), 16)
  tokens = np.array([[0, *r, *[EOS] * (LENGTH - len(r))] for r in RESPONSES], np.int32)
  lengths = np.array([len(r) for r in RESPONSES])
  mask = (np.arange(LENGTH) < lengths[:, None]).astype(np.float32)
  segments = np.pad(mask, ((0, 0), (1, 0)), constant_values=1).astype(np.int32)

  def logps(weights):
    logprobs = models.token_logprobs(model, {"params": weights}, tokens, segment_ids=segments)
    return losses.masked_sum(logprobs, mask, axis=1)

  return types.SimpleNamespace(
    model=model, params=params, ref=ref, value={"trunk": ref, "head": head}, tokens=tokens,
    segments=segments, mask=mask, logps=jax.jit(logps), probs=np.asarray(jnp.exp(logps(params))),
  )  # fmt: skip


def _exact(world, kl_coef=0.0):
  """∇ Σ_y π(y)·(R(y) − β·log π(y)/π_ref(y)), every response counted."""
  ref = world.logps(world.ref)

  def objective(weights):
    logps = world.logps(weights)
    return jnp.sum(jnp.exp(logps) * (REWARDS - kl_coef * (logps - ref)))

  return jax.jit(jax.grad(objective))(world.params)


def _expected_update(world, config, *, group=1, baseline=0.0):
  """Σ over all tuples of `group` responses of their probability times the learner's SGD step."""
  sampling = rl.SamplingConfig(max_new_tokens=LENGTH, samples_per_prompt=group)
  tx = optax.sgd(1.0)
  learner = rl.policy_gradient_learner(
    world.model, config, sampling=sampling, tx=tx,
    value_model=world.model if config.value else None,
  )  # fmt: skip
  arrays = {
    "tokens": world.tokens, "segment_ids": world.segments, "mask": world.mask, "score": REWARDS,
    "sampler_logprobs": world.mask,
  }  # fmt: skip
  params = {"policy": world.params} | ({"value": world.value} if config.value else {})

  def step(rows):
    state = rl.OnlineState(
      jnp.zeros((), int), params, tx.init(params), jax.random.key(0), jnp.float32(config.kl.coef),
      None,
    )  # fmt: skip
    batch = {name: jnp.asarray(x)[rows] for name, x in arrays.items()}
    batch |= {"keep": jnp.ones(group), "baseline": jnp.float32(baseline)}
    moved = learner(state, {"ref": world.ref}, batch)[0].params["policy"]
    return jax.tree.map(jnp.subtract, moved, world.params)

  groups = np.array(list(itertools.product(range(len(RESPONSES)), repeat=group)))
  weights = world.probs[groups].prod(axis=1)
  steps = jax.jit(lambda groups: jax.lax.map(step, groups))(jnp.asarray(groups))
  return jax.tree.map(lambda x: jnp.tensordot(weights, x, 1), steps)


def _error(update, exact, scale):
  """The largest difference to scale · exact, in units of the largest entry of that."""
  pairs = zip(jax.tree.leaves(update), jax.tree.leaves(exact))
  most = max(float(jnp.abs(scale * e).max()) for e in jax.tree.leaves(exact))
  return max(float(jnp.abs(u - scale * e).max()) for u, e in pairs) / most


SUMMED = {"average": "constant"} | ONCE  # Σ over tokens / (B · LENGTH)
EXACT = 1 / LENGTH
IN_REWARD, IN_LOSS = rl.KlConfig(KL_COEF), rl.KlConfig(KL_COEF, place="loss", kind="k3")
MONTE_CARLO = rl.ValueConfig(lam=1.0)
UNBIASED = {
  "reinforce": (grouped("reinforce", **SUMMED, kl=rl.KlConfig(0.0)), 1, EXACT, 0.0),
  "reinforce, loss reinforce": (
    grouped("reinforce", **SUMMED, kl=rl.KlConfig(0.0), loss="reinforce", clip_eps=None), 1, EXACT, 0.0,
  ),
  "reinforce, KL in the reward": (
    grouped("reinforce", **SUMMED, kl=IN_REWARD), 1, EXACT, KL_COEF,
  ),
  "rloo": (grouped("rloo", **SUMMED, kl=rl.KlConfig(0.0)), 2, EXACT, 0.0),
  "rloo, KL in the reward": (grouped("rloo", **SUMMED, kl=IN_REWARD), 2, EXACT, KL_COEF),
  "rloo, cispo": (
    grouped("rloo", **SUMMED, kl=rl.KlConfig(0.0), loss="cispo", clip_eps_high=1.0), 2, EXACT, 0.0,
  ),
  "gae, lambda 1": (
    dataclasses.replace(
      PPO, **SUMMED, kl=rl.KlConfig(0.0), value=MONTE_CARLO, whiten_advantages=False
    ), 1, EXACT, 0.0,
  ),
  "gae, lambda 1, KL in the reward": (
    dataclasses.replace(PPO, **SUMMED, kl=IN_REWARD, value=MONTE_CARLO, whiten_advantages=False),
    1, EXACT, KL_COEF,
  ),
  "dr_grpo is (G - 1)/G of it": (
    grouped("dr_grpo", **SUMMED, kl=rl.KlConfig(0.0)), 2, EXACT / 2, 0.0,
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNBIASED)
def test_the_expected_update_is_the_exact_gradient(world, name):
  config, group, scale, kl_coef = UNBIASED[name]
  update = _expected_update(world, config, group=group, baseline=0.4 if group == 1 else 0.0)
  assert _error(update, _exact(world, kl_coef), scale) < 1e-4


BIASED = {
  "the mean over a response's own tokens": grouped("rloo", average="sequence", **ONCE, kl=rl.KlConfig(0.0)),
  "the mean over the batch's tokens": grouped("rloo", **ONCE, kl=rl.KlConfig(0.0)),
  "division by the group's deviation": grouped("grpo", **SUMMED, kl=rl.KlConfig(0.0)),
  "a critic that is wrong, lambda 0": dataclasses.replace(
    PPO, **SUMMED, kl=rl.KlConfig(0.0), value=rl.ValueConfig(lam=0.0), whiten_advantages=False
  ),
}  # fmt: skip


def _direction(tree):
  flat = jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(tree)])
  return flat / jnp.linalg.norm(flat)


@pytest.mark.parametrize("name", BIASED)
def test_the_others_point_elsewhere(world, name):
  config = BIASED[name]
  update = _expected_update(world, config, group=1 if config.value else 2)
  cosine = float(_direction(update) @ _direction(_exact(world)))
  assert 0.2 < cosine < 0.9999  # the unbiased ones: above 0.9999999


def test_a_mean_over_tokens_hurries_short_responses_as_its_weights_say(world):
  """The known bias of average="sequence": a response of n tokens counts 1/n, not 1/LENGTH."""
  config = grouped("reinforce", average="sequence", **ONCE, kl=rl.KlConfig(0.0))

  def weighted(weights):
    per_token = 1 / world.mask.sum(axis=1)
    return jnp.sum(world.probs * REWARDS * per_token * world.logps(weights))

  known = jax.jit(jax.grad(weighted))(world.params)
  assert _error(_expected_update(world, config), known, 1.0) < 1e-4


def test_a_kl_in_the_loss_misses_what_a_token_does_to_later_states(world):
  """Its gradient is that of each token's KL at the states visited; so it differs for two tokens."""
  config = grouped("reinforce", **SUMMED, kl=IN_LOSS)
  update = _expected_update(world, config)
  assert _error(update, _exact(world, KL_COEF), EXACT) > 1e-3


# What waits, and what stays.


def test_while_the_value_model_warms_up_nothing_else_moves(toy):
  """Policy, its moments, its schedule and the KL coefficient begin when the warm-up is over."""
  config = dataclasses.replace(
    PPO, value=rl.ValueConfig(warmup=2), kl=rl.KlConfig(0.02, target=3.0, horizon=10.0), **ONCE
  )
  schedule = optax.linear_schedule(1e-2, 0.0, 4)
  adam = optax.adamw(schedule, weight_decay=0.1)
  tx = optimizer.by_part(policy=optimizer.delayed(adam, 2), value=optax.adam(1e-2))
  state = toy.state(config, tx=tx)
  sampling = rl.SamplingConfig(max_new_tokens=8)
  iterate = toy.iteration(config, sampling, tx=tx)
  moved = []
  for batch in prompt_batches(4, 8):
    before = jax.tree.map(jnp.copy, state)
    state, metrics, _ = iterate(state, {"ref": toy.params}, batch)
    change = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.params, before.params)
    largest = {name: max(jax.tree.leaves(change[name])) for name in ("policy", "value")}
    moved.append((largest["policy"], largest["value"], float(state.kl_coef)))
  policy, value, kl_coef = zip(*moved)
  assert policy[0] == policy[1] == 0.0 and min(value) > 1e-3
  # Adam's first step is the whole learning rate: the schedule has not moved meanwhile.
  assert policy[2] == pytest.approx(1e-2, rel=0.2) and policy[3] < policy[2]
  np.testing.assert_allclose(kl_coef[:2], 0.02, rtol=1e-6)
  assert kl_coef[2] != kl_coef[1]
