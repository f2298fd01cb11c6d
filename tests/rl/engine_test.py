"""Tests of whole iterations: identities at step 0, exact resumption, and that each estimator learns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax import losses, models, rl, sharding
from align_jax.rl import engine
from align_jax.training import metrics as metrics_lib
from tests.rl.conftest import PPO, SAMPLING, VOCAB, count_liked, grouped, prompt_batches

ROWS = 32


@pytest.fixture(scope="module")
def batches():
  return prompt_batches(20, ROWS)


@pytest.fixture(scope="module")
def iterate(toy):
  return toy.iteration(PPO, SAMPLING)


@pytest.fixture(scope="module")
def run(toy, iterate, batches):
  """Twenty iterations: the last state, a copy of the fifth, and every iteration's metrics."""
  state = toy.state(PPO)
  history, fifth = [], None
  for step, batch in enumerate(batches):
    if step == 5:
      fifth = jax.tree.map(jnp.copy, state)
    state, metrics, rollout = iterate(state, {"ref": toy.params}, batch)
    history.append(metrics_lib.to_floats(metrics))
  return state, fifth, history, rollout


def test_step_zero_identities(run):
  first = run[2][0]
  engine.check_identity(first, dtype="float32")
  assert first["ppo/sampler_mismatch"] <= 1e-4
  assert first["ppo/first_ratio_error_max"] <= 1e-6
  assert abs(first["kl/ref"]) <= 1e-5 and abs(first["kl/ref_k3"]) <= 1e-5


def test_the_first_ratio_is_one_in_every_iteration(run):
  assert max(values["ppo/first_ratio_error_max"] for values in run[2]) <= 1e-5


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
    "value/explained_variance", "value/loss", "ppo/policy_loss", "tokens", "time/sample",
    "time/score", "time/train", "sampling/tokens_per_s",
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


def _timeless(values):
  return {k: v for k, v in values.items() if "time/" not in k and "tokens_per_s" not in k}


def test_a_run_resumed_from_its_state_is_bit_exact(run, toy, iterate, batches):
  final, state, history, _ = run
  for step in range(5, 7):
    state, metrics, _ = iterate(state, {"ref": toy.params}, batches[step])
    assert _timeless(metrics_lib.to_floats(metrics)) == _timeless(history[step])
  assert int(final.step) == 20


def test_the_rollout_holds_what_was_said(run):
  rollout = run[3]
  assert len(rollout.texts) == len(rollout.prompts) == ROWS
  np.testing.assert_array_equal(rollout.scores[""], count_liked(None, rollout.texts))


GROUPS = dataclasses.replace(SAMPLING, samples_per_prompt=4)
IN_LOSS = rl.KlConfig(0.02, place="loss", kind="k3")
LEARNERS = {
  "grpo": (grouped("grpo", average="sequence", kl=IN_LOSS), GROUPS),
  "rloo": (grouped("rloo"), GROUPS),
  "dr_grpo": (grouped("dr_grpo", average="constant"), GROUPS),
  "reinforce_pp": (grouped("reinforce_pp", gamma=1.0), SAMPLING),
  "cispo": (
    grouped("reinforce_pp_baseline", loss="cispo", clip_eps=None, clip_eps_high=4.0), GROUPS
  ),
  "gspo": (grouped("grpo", loss="gspo", average="sequence", clip_eps=3e-2), GROUPS),
  "reinforce": (
    grouped("reinforce", loss="reinforce", clip_eps=None, epochs=1, minibatches=1), SAMPLING
  ),
  "dapo": (
    grouped("grpo", clip_eps_high=0.28, extra_draws=1, entropy_coef=1e-3,
            importance=rl.ImportanceConfig("truncated", 2.0)), GROUPS
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEARNERS)
def test_every_estimator_learns_and_starts_on_policy(toy, name):
  settings, sampling = LEARNERS[name]
  prompts = ROWS // sampling.samples_per_prompt * (settings.extra_draws + 1)
  state, history = toy.state(settings), []
  iterate = toy.iteration(settings, sampling)
  for batch in prompt_batches(14, prompts):
    state, metrics, rollout = iterate(state, {"ref": toy.params}, batch)
    history.append(metrics_lib.to_floats(metrics))
  engine.check_identity(history[0], dtype="float32")
  assert len(rollout.texts) == ROWS
  assert np.mean([h["score"] for h in history[-3:]]) > history[0]["score"] + 0.4
  assert max(h["ppo/first_ratio_error_max"] for h in history) <= 1e-5
  assert all(np.isfinite(list(h.values())).all() for h in history)


def test_groups_of_equal_scores_are_replaced_or_left_out(toy):
  """DAPO's dynamic sampling: with a reward that is 1 for half of the prompts, constant per prompt."""

  def by_prompt(prompts, texts):  # groups 0 and 2 differ, groups 1 and 3 do not
    scores = np.zeros((len(texts) // 2, 2))
    scores[0::2, 0] = 1.0
    return scores.reshape(-1)

  sampling = dataclasses.replace(SAMPLING, samples_per_prompt=2)
  reward, key = rl.text_reward("r", by_prompt), jax.random.key(0)
  kept = {}
  for extra in (0, 1, 2):
    settings = grouped("rloo", extra_draws=extra, epochs=1, minibatches=1)
    iterate = toy.iteration(settings, sampling, reward=reward)
    batch = prompt_batches(1, 4 * (extra + 1))[0]
    _, metrics, rollout = iterate(toy.state(settings), {"ref": toy.params}, batch)
    kept[extra] = metrics.get("dynamic/kept"), metrics.get("dynamic/draws"), rollout.scores[""]
  del key
  assert kept[0][:2] == (None, None)
  np.testing.assert_array_equal(kept[0][2], [1, 0, 0, 0, 1, 0, 0, 0])
  assert kept[1][:2] == (1.0, 2.0) and kept[2][:2] == (1.0, 2.0)  # the third draw is not needed
  np.testing.assert_array_equal(kept[1][2], [1, 0] * 4)


def test_what_cannot_be_replaced_moves_nothing(toy):
  """With every score equal the batch is empty: parameters stay, and nothing is NaN."""
  sampling = dataclasses.replace(SAMPLING, samples_per_prompt=2)
  settings = grouped("grpo", extra_draws=1, kl=rl.KlConfig(0.5, place="loss", kind="k2"))
  reward = rl.text_reward("r", lambda prompts, texts: np.ones(len(texts)))
  state = toy.state(settings)
  before = jax.tree.map(jnp.copy, state.params)
  iterate = toy.iteration(settings, sampling, reward=reward)
  state, metrics, _ = iterate(state, {"ref": toy.params}, prompt_batches(1, 8)[0])
  values = metrics_lib.to_floats(metrics)
  assert values["dynamic/kept"] == 0.0 and values["loss"] == 0.0 and values["grad_norm"] == 0.0
  jax.tree.map(np.testing.assert_array_equal, state.params, before)


def test_lora_on_eight_devices_starts_where_full_weights_on_one_do(toy, run, batches):
  """At step 0 an adapter changes nothing: the same seed must give the same rollouts and scores."""
  mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())
  adapted = toy.model.clone(lora_scale=2.0)
  shardings = sharding.tree_shardings(models.logical_axes(toy.model), toy.params, mesh)
  weights = jax.device_put(toy.params, shardings)
  lora = models.init_lora(jax.random.key(2), adapted, rank=2)
  trainable = {"policy": lora, "value": {"lora": lora, "head": toy.value["head"]}}
  trainable = jax.device_put(trainable, sharding.replicated(mesh))
  config = dataclasses.replace(PPO, epochs=1, minibatches=1)
  iterate = toy.iteration(config, SAMPLING, model=adapted, mesh=mesh, accumulate=2)
  state = rl.create_state(trainable, toy.tx, kl_coef=0.02, seed=0, mesh=mesh)
  state, metrics, _ = iterate(state, {"base": weights, "value": weights}, batches[0])
  values, expected = metrics_lib.to_floats(metrics), run[2][0]
  engine.check_identity(values, dtype="float32")
  assert values["ppo/sampler_mismatch"] <= 1e-4
  for name in ("score", "response_length", "eos_rate", "entropy", "value/explained_variance"):
    assert values[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
  moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), state.params, trainable)
  assert all(moved["policy"]["layers"][name]["b"] for name in lora["layers"])
  assert all(jax.tree.leaves(moved["value"]["head"]))


def test_identity_check_stops_a_run():
  good = {"ppo/first_ratio_error_max": 0.0, "kl/ref": 1e-6, "ppo/sampler_mismatch": 1e-6}
  engine.check_identity(good, dtype="float32")
  for name in good:
    for bad in (0.5, float("nan")):
      with pytest.raises(FloatingPointError, match=name):
        engine.check_identity(good | {name: bad}, dtype="float32")
