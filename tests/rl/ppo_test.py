"""Tests of PPO: identities at step 0, exact resumption, and that it learns."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from align_jax import losses, models, sharding
from align_jax.errors import InputError
from align_jax.rl import ppo, rewards
from align_jax.training import metrics as metrics_lib
from align_jax.training import state as state_lib
from align_jax.training import step as step_lib

EOS, PAD, LIKED, VOCAB, ROWS = 1, 0, 7, 16, 32
CONFIG = ppo.PpoConfig(
  max_new_tokens=8, epochs=2, minibatches=2, kl_coef=0.02, kl_target=3.0, kl_horizon=2000.0
)


class Tokenizer:
  """Numbers for words; the EOS is a special token."""

  pad_token_id = PAD
  eos_token_id = EOS

  def decode(self, ids, skip_special_tokens):
    return " ".join(str(i) for i in ids if not (skip_special_tokens and i == EOS))


def _count_liked(prompts, texts):
  return np.array([text.split().count(str(LIKED)) for text in texts])


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def model():
  config = models.ModelConfig(
    vocab_size=VOCAB,
    embed_dim=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    mlp_dim=64,
  )
  return models.Transformer(config)


@pytest.fixture(scope="module")
def params(model, mesh):
  params = jax.jit(lambda: models.init_params(model, jax.random.key(0)))()
  return jax.device_put(params, sharding.replicated(mesh))


@pytest.fixture(scope="module")
def value(model, params, mesh):
  head = models.init_scalar_head(jax.random.key(1), model.config.embed_dim)
  return {"trunk": params, "head": jax.device_put(head, sharding.replicated(mesh))}


@pytest.fixture(scope="module")
def batches():
  rng = np.random.default_rng(0)
  lengths = rng.integers(2, 7, (20, ROWS)).astype(np.int32)
  tokens = rng.integers(2, VOCAB, (20, ROWS, 8)).astype(np.int32)
  return [
    {
      "tokens": np.where(np.arange(8) < n[:, None], t, PAD),
      "lengths": n,
      "index": np.zeros(ROWS, int),
    }
    for t, n in zip(tokens, lengths)
  ]


TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-3))


@pytest.fixture(scope="module")
def iterate(model, mesh):
  return ppo.make_iteration(
    model, model, config=CONFIG, tx=TX, rewards=[rewards.text_reward("liked", _count_liked)],
    prompts=["a prompt"], tokenizer=Tokenizer(), eos_ids=[EOS], mesh=mesh,
  )  # fmt: skip


@pytest.fixture(scope="module")
def run(iterate, params, value, mesh, batches):
  """Twenty iterations: the last state, a copy of the fifth, and every iteration's metrics."""
  state = ppo.create_state({"policy": params, "value": value}, TX, CONFIG, 0, mesh)
  history, fifth = [], None
  for step, batch in enumerate(batches):
    if step == 5:
      fifth = jax.tree.map(jnp.copy, state)
    state, metrics, rollout = iterate(state, {"ref": params}, batch)
    history.append(metrics_lib.to_floats(metrics))
  return state, fifth, history, rollout


def test_step_zero_identities(run):
  first = run[2][0]
  ppo.check_identity(first, dtype="float32")
  assert first["ppo/sampler_mismatch"] <= 1e-4
  assert first["ppo/first_ratio_error"] <= 1e-6
  assert abs(first["kl/ref"]) <= 1e-5 and abs(first["kl/ref_k3"]) <= 1e-5


def test_the_first_ratio_is_one_in_every_iteration(run):
  assert max(values["ppo/first_ratio_error"] for values in run[2]) <= 1e-5


def test_sampler_and_trainer_agree_all_along(run):
  assert max(values["ppo/sampler_mismatch_max"] for values in run[2]) <= 1e-4


def test_the_score_rises_and_the_kl_is_reported(run):
  scores = [values["score"] for values in run[2]]
  assert np.mean(scores[-3:]) > np.mean(scores[:3]) + 1.5
  assert run[2][-1]["kl/ref"] > 0.5
  assert all(values["kl/ref_k3"] >= 0 for values in run[2])


def test_metrics_are_there_and_finite(run):
  names = {
    "loss", "score", "score/liked", "kl/ref", "kl/ref_k3", "kl_coef", "entropy", "eos_rate",
    "response_length", "ppo/clip_fraction", "ppo/ratio_max", "ppo/sampler_mismatch", "grad_norm",
    "value/explained_variance", "value/loss", "ppo/policy_loss", "tokens",
  }  # fmt: skip
  for values in run[2]:
    assert names <= set(values)
    assert all(np.isfinite(value) for value in values.values())
    assert values["score"] == pytest.approx(values["score/liked"])
    assert values["ppo/ratio_max"] >= 1.0 and 0 <= values["ppo/clip_fraction"] <= 1
    assert values["entropy"] <= np.log(VOCAB) + 1e-5


def test_the_adaptive_coefficient_follows_the_measured_kl(run):
  for before, after in zip(run[2], run[2][1:]):
    expected = losses.adaptive_kl_coef(
      before["kl_coef"], before["kl/ref"], target=3.0, horizon=2000.0, batch_size=ROWS
    )
    assert after["kl_coef"] == pytest.approx(float(expected), rel=1e-5)


def test_the_critic_follows_the_returns(run):
  first, last = run[2][0], run[2][-1]
  assert last["value/mean"] == pytest.approx(last["score"], abs=1.0)
  assert last["value/loss"] < 0.1 * first["value/loss"]
  assert first["value/explained_variance"] < 0 < last["value/explained_variance"]


def test_a_run_resumed_from_its_state_is_bit_exact(run, iterate, params, batches):
  final, state, history, _ = run
  for step in range(5, 7):
    state, metrics, _ = iterate(state, {"ref": params}, batches[step])
    assert metrics_lib.to_floats(metrics) == history[step]
  assert int(final.step) == 20


def test_the_rollout_holds_what_was_said(run):
  rollout = run[3]
  assert len(rollout.texts) == len(rollout.prompts) == ROWS
  np.testing.assert_array_equal(rollout.scores[""], _count_liked(None, rollout.texts))


def _experience(finished=True):
  rng = np.random.default_rng(0)
  mask = np.zeros((4, 6), np.float32)
  for row, (start, stop) in enumerate([(2, 5), (1, 6), (3, 4), (2, 6)]):
    mask[row, start:stop] = 1
  batch = {name: rng.normal(size=(4, 6)).astype(np.float32) * mask for name in (
    "old_logprobs", "ref_logprobs", "old_values")}  # fmt: skip
  return batch | {"mask": mask}


def test_advantages_are_whitened_gae_of_shaped_rewards():
  batch, scores = _experience(), np.arange(4.0)
  config = dataclasses.replace(CONFIG, whiten_advantages=False)
  plain = ppo.estimate_advantages(batch, scores, 0.1, config)
  expected = np.zeros((4, 6))
  for row in range(4):
    advantage, value = 0.0, 0.0
    on = np.flatnonzero(batch["mask"][row])
    for t in on[::-1]:
      reward = -0.1 * (batch["old_logprobs"] - batch["ref_logprobs"])[row, t]
      reward += scores[row] * (t == on[-1])
      advantage = reward + value - batch["old_values"][row, t] + 0.95 * advantage
      value = batch["old_values"][row, t]
      expected[row, t] = advantage
  np.testing.assert_allclose(plain["advantages"], expected, rtol=1e-4, atol=1e-5)
  white = ppo.estimate_advantages(batch, scores, 0.1, CONFIG)
  on = batch["mask"] > 0
  values = expected[on]
  np.testing.assert_allclose(
    np.asarray(white["advantages"])[on],
    (values - values.mean()) / values.std(),
    rtol=1e-3,
    atol=1e-4,
  )
  np.testing.assert_array_equal(white["returns"], plain["returns"])


def _with_samples(batch):
  """What the metrics of a rollout read besides."""
  rows = np.zeros(4, np.float32)
  extra = {"entropy": np.abs(batch["old_values"]), "sampler_logprobs": batch["old_logprobs"] + 0.01}
  return batch | extra | {"score": np.arange(4.0), "finished": rows, "segment_ids": batch["mask"]}


def test_the_reported_kl_is_the_one_that_is_paid():
  """peers 3.22: with V = 0 and no discount, the first return is the score less its KL."""
  batch = _experience()
  batch["old_values"] = np.zeros((4, 6), np.float32)
  config = dataclasses.replace(CONFIG, lam=1.0, whiten_advantages=False)
  estimated = ppo.estimate_advantages(batch, np.arange(4.0), 0.1, config)
  metrics = metrics_lib.to_floats(ppo._rollout_metrics(_with_samples(estimated), 0.1))
  first = batch["mask"].argmax(axis=1)
  returns = np.asarray(estimated["returns"])[np.arange(4), first]
  np.testing.assert_allclose(returns.mean(), 1.5 - 0.1 * metrics["kl/ref"], rtol=1e-5)
  assert abs(metrics["kl/ref"]) > 0.1


def test_padding_and_empty_responses_leak_into_nothing():
  """peers 3.25, 3.27: garbage off the mask and a row of no tokens change no advantage or metric."""
  batch = _experience()
  batch["mask"][3] = 0
  clean = batch | {k: v * batch["mask"] for k, v in batch.items()}
  garbage = {k: np.where(batch["mask"] > 0, v, np.nan) for k, v in batch.items() if k != "mask"}
  dirty = {k: np.pad(v, ((0, 0), (0, 3)), constant_values=1e4) for k, v in garbage.items()}
  dirty["mask"] = np.pad(batch["mask"], ((0, 0), (0, 3)))
  results = []
  for rows in (clean, dirty):
    estimated = ppo.estimate_advantages(rows, np.arange(4.0), 0.1, CONFIG)
    metrics = ppo._rollout_metrics(_with_samples(estimated), 0.1)
    results.append((estimated["advantages"][:, :6], metrics_lib.to_floats(metrics)))
  np.testing.assert_allclose(results[1][0], results[0][0], rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(results[0][0][3], 0.0)
  assert all(np.isfinite(value) for value in results[1][1].values())
  assert results[1][1] == pytest.approx(results[0][1], rel=1e-5)


def test_accumulation_over_responses_of_different_lengths_changes_nothing(model, params, value):
  """peers 3.20: losses are summed over all response tokens, then divided once."""
  batch = ppo.estimate_advantages(_experience(), np.arange(4.0), 0.1, CONFIG)
  tokens = np.random.default_rng(2).integers(2, VOCAB, (4, 7)).astype(np.int32)
  batch |= {"tokens": tokens, "segment_ids": np.ones((4, 7), np.int32)}
  tx, trainable = optax.sgd(1.0), {"policy": params, "value": value}
  start = state_lib.TrainState(jnp.zeros((), int), trainable, tx.init(trainable), jax.random.key(0))
  objective, results = ppo.ppo_objective(model, model, CONFIG), []
  for parts in (1, 2):
    run = functools.partial(step_lib.train_step, objective=objective, tx=tx, accumulate=parts)
    state, metrics = jax.jit(run)(start, {}, batch)
    results.append((metrics["loss"].compute(), state.params))
  (loss, whole), (loss_of_parts, of_parts) = results
  np.testing.assert_allclose(loss_of_parts, loss, rtol=1e-5)
  for a, b in zip(jax.tree.leaves(of_parts), jax.tree.leaves(whole)):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_explained_variance():
  returns, mask = np.arange(6.0)[None], np.ones((1, 6))
  assert ppo.explained_variance(returns, returns, mask) == 1.0
  assert ppo.explained_variance(returns + 5.0, returns, mask) == 1.0  # an offset is not variance
  assert ppo.explained_variance(np.zeros((1, 6)), returns, mask) == 0.0
  assert ppo.explained_variance(-returns, returns, mask) < 0.0
  assert ppo.explained_variance(returns, np.ones((1, 6)), mask) == 0.0


def test_lora_on_eight_devices_starts_where_full_weights_on_one_do(
  model, params, value, run, batches
):
  """At step 0 an adapter changes nothing: the same seed must give the same rollouts and scores."""
  mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())
  adapted = model.clone(lora_scale=2.0)
  shardings = sharding.tree_shardings(models.logical_axes(model), params, mesh)
  weights = jax.device_put(params, shardings)
  lora = models.init_lora(jax.random.key(2), adapted, rank=2)
  trainable = {"policy": lora, "value": {"lora": lora, "head": value["head"]}}
  trainable = jax.device_put(trainable, sharding.replicated(mesh))
  config = dataclasses.replace(CONFIG, epochs=1, minibatches=1)
  iterate = ppo.make_iteration(
    adapted, adapted, config=config, tx=TX, rewards=[rewards.text_reward("liked", _count_liked)],
    prompts=["a prompt"], tokenizer=Tokenizer(), eos_ids=[EOS], mesh=mesh, accumulate=2,
  )  # fmt: skip
  state = ppo.create_state(trainable, TX, config, 0, mesh)
  state, metrics, _ = iterate(state, {"base": weights, "value": weights}, batches[0])
  values, expected = metrics_lib.to_floats(metrics), run[2][0]
  ppo.check_identity(values, dtype="float32")
  assert values["ppo/sampler_mismatch"] <= 1e-4
  for name in ("score", "response_length", "eos_rate", "entropy", "value/explained_variance"):
    assert values[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
  moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), state.params, trainable)
  assert all(moved["policy"]["layers"][name]["b"] for name in lora["layers"])
  assert all(jax.tree.leaves(moved["value"]["head"]))


def test_identity_check_stops_a_run():
  good = {"ppo/first_ratio_error": 0.0, "kl/ref": 1e-6, "ppo/sampler_mismatch": 1e-6}
  ppo.check_identity(good, dtype="float32")
  for name in good:
    for bad in (0.5, float("nan")):
      with pytest.raises(FloatingPointError, match=name):
        ppo.check_identity(good | {name: bad}, dtype="float32")


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"epochs": 0}, "ppo.epochs must be at least 1"),
    ({"temperature": 0.0}, "temperature must be positive"),
    ({"kl_coef": -0.1}, "kl_coef must not be negative"),
    ({"kl_coef": 0.0, "kl_target": 6.0}, "stays 0 for ever"),
  ],
)
def test_wrong_settings_are_refused(settings, message):
  with pytest.raises(InputError, match=message):
    ppo.PpoConfig(**{"max_new_tokens": 4} | settings)
