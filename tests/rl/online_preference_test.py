"""Online preferences: who is paired with whom, the losses of exactly those pairs, and that each learns."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from align_jax import models, rl
from align_jax.errors import InputError
from align_jax.rl import engine, online_preference
from align_jax.rl.online_preference import OnlinePreferenceConfig
from align_jax.training import metrics as metrics_lib
from align_jax.training.preferences import PreferenceConfig
from tests.rl.conftest import EOS, Tokenizer, count_liked, prompt_batches

SAMPLING = rl.SamplingConfig(max_new_tokens=8)
GROUPS = dataclasses.replace(SAMPLING, samples_per_prompt=4)
DPO = OnlinePreferenceConfig("online_dpo", objective=PreferenceConfig("dpo", beta=0.1))
XPO = OnlinePreferenceConfig("xpo", beta=0.1, alpha=1e-4)
NASH = OnlinePreferenceConfig("nash_md", beta=0.02, mixture=0.5)
CLOSE = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)


def iteration(toy, config, settings=SAMPLING, *, tx=None, reward=count_liked, model=None):
  tx, model = tx or toy.tx, model or toy.model
  draw = online_preference.preference_draw(
    model, config, settings, prompts=["a prompt"], tokenizer=Tokenizer(), eos_ids=[EOS],
    mesh=toy.mesh,
  )  # fmt: skip
  learner = online_preference.preference_learner(model, config, sampling=settings, tx=tx)
  return rl.make_iteration(
    draw, learner, rewards=[rl.text_reward("liked", reward)], shaping=rl.ShapingConfig(),
    sampling=settings, mesh=toy.mesh, opponents=config.opponents,
  )  # fmt: skip


def start(toy, *, tx=None, policy=None):
  trainable = {"policy": toy.params if policy is None else policy}
  return rl.create_state(trainable, tx or toy.tx, kl_coef=0.0, seed=0, mesh=toy.mesh)


def moved(toy, size=0.3):
  """Other weights of the same shapes."""
  leaves, tree = jax.tree.flatten(toy.params)
  keys = jax.random.split(jax.random.key(5), len(leaves))
  noise = [size * jax.random.normal(k, x.shape) * jnp.std(x) for k, x in zip(keys, leaves)]
  return jax.tree.unflatten(tree, [x + n for x, n in zip(leaves, noise)])


LEARNERS = {
  "dpo": (dataclasses.replace(DPO, epochs=2, minibatches=2), GROUPS),
  "xpo": (dataclasses.replace(XPO, epochs=2), GROUPS),
  "nash_md": (NASH, dataclasses.replace(GROUPS, temperature=0.9)),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_every_method_learns_and_starts_at_its_identities(toy, name):
  config, settings = LEARNERS[name]
  iterate, state, history = iteration(toy, config, settings), start(toy), []
  for batch in prompt_batches(12, 12):
    state, metrics, rollout = iterate(state, {"ref": toy.params}, batch)
    history.append(metrics_lib.to_floats(metrics))
  first = history[0]
  engine.check_identity(first, dtype="float32")
  assert first["ppo/sampler_mismatch"] <= 1e-4 and abs(first["kl/ref_k3"]) <= 1e-5
  assert int(state.step) == 12
  assert len(rollout.texts) == 12 * 4 * (config.opponents + 1)
  rise = np.mean([h["score"] for h in history[-3:]]) - first["score"]
  assert rise > (0.15 if name == "nash_md" else 0.4), [h["score"] for h in history]
  assert all(np.isfinite(list(h.values())).all() for h in history)
  if config.opponents:  # the opponent is the weaker one by now
    assert np.mean([h["pairs/win_rate"] for h in history[-3:]]) > 0.52


@pytest.mark.parametrize(
  "objective, expected",
  [("dpo", np.log(2)), ("ipo + hinge*2", 1 / (4 * 0.1**2) + 2), ("tdpo", np.log(2))],
)
def test_online_dpo_takes_any_objective_on_pairs_and_starts_at_its_own_identity(
  toy, objective, expected
):
  config = dataclasses.replace(DPO, objective=PreferenceConfig(objective))
  iterate = iteration(toy, config, GROUPS)
  _, metrics, _ = iterate(start(toy), {"ref": toy.params}, prompt_batches(1, 8)[0])
  assert metrics_lib.to_floats(metrics)["loss"] == pytest.approx(expected, rel=1e-5)


# One step of plain gradient descent against the loss of the rows, picked by hand.

RATE = 0.05


def _logps(toy, params, rollout, temperature):
  """[B], summed over the responses, by the model's own log-probs."""
  logprobs = models.token_logprobs(
    toy.model, {"params": params}, rollout.tokens, segment_ids=rollout.segment_ids,
    temperature=temperature,
  )  # fmt: skip
  return jnp.sum(logprobs * rollout.response_mask[:, 1:], axis=1)


def _one_step(toy, config, settings, ref, by_hand):
  """The new weights after an iteration, and those of descending by_hand(logps, ref_logps, rollout)."""
  tx, params = optax.sgd(RATE), moved(toy, 0.1)
  before = jax.tree.map(jnp.copy, params)
  state, metrics, rollout = iteration(toy, config, settings, tx=tx)(
    start(toy, tx=tx, policy=params), {"ref": ref}, prompt_batches(1, 8)[0]
  )
  temperature = settings.temperature
  ref_logps = np.asarray(jax.jit(lambda p: _logps(toy, p, rollout, temperature))(ref))

  def loss(params):
    return by_hand(_logps(toy, params, rollout, temperature), ref_logps, rollout.scores[""])

  value, gradient = jax.jit(jax.value_and_grad(loss))(before)
  expected = jax.tree.map(lambda p, g: p - RATE * g, before, gradient)
  for found, wanted in zip(jax.tree.leaves(state.params["policy"]), jax.tree.leaves(expected)):
    np.testing.assert_allclose(found, wanted, atol=3e-6)
  assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient)) > 1e-3
  return value, metrics_lib.to_floats(metrics), rollout


TEMPERED = dataclasses.replace(SAMPLING, temperature=0.8)


def test_online_dpo_is_dpo_on_the_best_and_the_worst_that_differ(toy):
  settings = dataclasses.replace(TEMPERED, samples_per_prompt=3)
  counted = {}

  def by_hand(logps, ref, scores):
    groups = [range(3 * p, 3 * p + 3) for p in range(8)]
    of = scores.__getitem__  # of equal scores the earlier is the better
    pairs = [[max(rows, key=of), min(reversed(rows), key=of)] for rows in groups]
    good, bad = np.array([pair for pair in pairs if scores[pair[0]] > scores[pair[1]]]).T
    counted["kept"] = len(good)
    delta = (logps - ref)[good] - (logps - ref)[bad]
    return jnp.mean(jnp.log1p(jnp.exp(-0.1 * delta)))

  value, metrics, _ = _one_step(toy, DPO, settings, moved(toy), by_hand)
  assert 0 < counted["kept"] < 8  # some are tied
  assert metrics["loss"] == pytest.approx(float(value), rel=1e-5)
  assert metrics["pairs/kept"] == pytest.approx(counted["kept"] / 8)


def test_xpo_is_dpo_against_the_reference_with_its_bonus(toy):
  config = dataclasses.replace(XPO, alpha=0.02)

  def by_hand(logps, ref, scores):
    own = np.flatnonzero(scores[::2] != scores[1::2]) * 2
    sign = np.sign(scores[own] - scores[own + 1])
    delta = sign * ((logps - ref)[own] - (logps - ref)[own + 1])
    return jnp.mean(jnp.log1p(jnp.exp(-0.1 * delta)) + 0.02 * logps[own + 1])

  value, metrics, rollout = _one_step(toy, config, TEMPERED, moved(toy), by_hand)
  assert metrics["loss"] == pytest.approx(float(value), rel=1e-5)
  assert metrics["score"] == pytest.approx(rollout.scores[""][::2].mean())
  assert metrics["score"] != pytest.approx(rollout.scores[""].mean())


def test_nash_md_is_the_policy_gradient_of_winning_at_a_price(toy):
  def by_hand(logps, ref, scores):
    own, theirs = scores[::2], scores[1::2]
    preference = 1 / (1 + np.exp(theirs - own))
    price = 0.02 * (jax.lax.stop_gradient(logps[::2]) - ref[::2])
    return jnp.mean((price - (preference - 0.5)) * logps[::2])

  _, metrics, rollout = _one_step(toy, NASH, TEMPERED, moved(toy), by_hand)
  own, theirs = rollout.scores[""].reshape(-1, 2).T
  assert metrics["pairs/preference"] == pytest.approx(np.mean(1 / (1 + np.exp(theirs - own))))
  assert metrics["pairs/win_rate"] == pytest.approx(np.mean((own > theirs) + 0.5 * (own == theirs)))


# Who is drawn.


@pytest.mark.parametrize("name, share", [("xpo", 1.0), ("nash_md", 0.3)])
def test_opponents_are_the_reference_or_the_mixture(toy, name, share):
  """The log-probs that the sampler reports of them are those of that distribution, token by token."""
  config = XPO if name == "xpo" else dataclasses.replace(NASH, mixture=share)
  settings = dataclasses.replace(SAMPLING, samples_per_prompt=2, temperature=0.8)
  ref = moved(toy)
  draw = online_preference.preference_draw(
    toy.model, config, settings, prompts=["a prompt"], tokenizer=Tokenizer(), eos_ids=[EOS],
    mesh=toy.mesh,
  )  # fmt: skip
  batch = prompt_batches(1, 5)[0]
  rollout = draw(toy.params, {"ref": ref}, batch, jax.random.key(3))
  assert len(rollout.texts) == 20
  own_logits, ref_logits = (
    toy.model.apply({"params": p}, rollout.tokens, None, rollout.segment_ids)[:, :-1]
    for p in (toy.params, ref)
  )
  shares = np.where(np.arange(20) % 2, share, 0.0)[:, None, None]
  logits = ((1 - shares) * own_logits + shares * ref_logits) / 0.8
  expected = np.take_along_axis(
    np.asarray(jax.nn.log_softmax(logits)), rollout.tokens[:, 1:, None], axis=-1
  )[..., 0]
  mask = rollout.response_mask[:, 1:]
  np.testing.assert_allclose(rollout.samples.logprobs[:, 1:][mask], expected[mask], atol=1e-4)
  prompts = [tuple(t[:n]) for t, n in zip(rollout.tokens, rollout.samples.prompt_lengths)]
  assert all(len(set(prompts[4 * p : 4 * p + 4])) == 1 for p in range(5))


def test_with_lora_the_reference_is_the_base(toy):
  adapted = toy.model.clone(lora_scale=2.0)
  lora = models.init_lora(jax.random.key(2), adapted, rank=2)
  lora = jax.tree.map(lambda x: x + 0.1, lora)  # has learned something
  frozen, batch = {"base": toy.params}, prompt_batches(1, 8)[0]
  iterate = iteration(toy, XPO, model=adapted)
  state, metrics, rollout = iterate(start(toy, policy=lora), frozen, batch)
  theirs = np.arange(1, 16, 2)
  bare = jax.jit(
    lambda p: models.token_logprobs(
      toy.model, {"params": p}, rollout.tokens, segment_ids=rollout.segment_ids
    )
  )(toy.params)
  bare = np.asarray(bare)
  mask = rollout.response_mask[theirs, 1:]
  np.testing.assert_allclose(
    rollout.samples.logprobs[theirs, 1:][mask], bare[theirs][mask], atol=1e-4
  )
  assert metrics_lib.to_floats(metrics)["ppo/sampler_mismatch"] <= 1e-4
  assert any(
    bool(jnp.any(a != b))
    for a, b in zip(jax.tree.leaves(state.params["policy"]), jax.tree.leaves(lora))
  )


@pytest.mark.parametrize("config, settings", [(DPO, GROUPS), (XPO, SAMPLING)])
def test_where_all_scores_are_equal_nothing_moves(toy, config, settings):
  state = start(toy)
  before = jax.tree.map(jnp.copy, state.params)
  iterate = iteration(toy, config, settings, reward=lambda prompts, texts: np.ones(len(texts)))
  state, metrics, _ = iterate(state, {"ref": moved(toy)}, prompt_batches(1, 8)[0])
  values = metrics_lib.to_floats(metrics)
  assert values["pairs/kept"] == values["loss"] == values["grad_norm"] == 0.0
  jax.tree.map(np.testing.assert_array_equal, state.params, before)


def test_a_run_resumed_from_its_state_is_bit_exact(toy):
  iterate, batches = iteration(toy, dataclasses.replace(NASH, minibatches=2)), prompt_batches(3, 8)
  frozen = {"ref": toy.params}
  state, _, _ = iterate(start(toy), frozen, batches[0])
  saved = jax.tree.map(jnp.copy, state)
  ends = []
  for state in (state, saved):  # noqa: B020
    for batch in batches[1:]:
      state, _, rollout = iterate(state, frozen, batch)
    ends.append((state.params, rollout.tokens))
  jax.tree.map(np.testing.assert_array_equal, *ends)


# Settings.

WRONG = [
  ({"name": "ppo"}, "name must be one of online_dpo"),
  ({"name": "online_dpo"}, "objective must be set for online_dpo"),
  ({"name": "xpo", "beta": 0.1}, "alpha must be set for xpo"),
  ({"name": "xpo", "beta": 0.0, "alpha": 0.1}, "beta must be positive"),
  ({"name": "xpo", "beta": 0.1, "alpha": -0.1}, "alpha must not be negative"),
  ({"name": "xpo", "beta": 0.1, "alpha": 0.1, "mixture": 0.5}, "mixture is not used by xpo"),
  ({"name": "nash_md", "beta": 0.1, "mixture": 1.5}, "mixture must be in"),
  ({"name": "nash_md", "beta": 0.1, "mixture": 0.5, "epochs": 0}, "epochs must be at least 1"),
  ({"name": "nash_md", "beta": 0.1, "mixture": 0.5, "logits_chunk": 0}, "logits_chunk must be"),
  ({"name": "online_dpo", "objective": PreferenceConfig("kto")}, "'kto' is not built for"),
  ({"name": "online_dpo", "objective": PreferenceConfig("bco")}, "'bco' is not built for"),
  ({"name": "online_dpo", "objective": PreferenceConfig("step_dpo")}, "'step_dpo' is not built"),
  ({"name": "online_dpo", "objective": PreferenceConfig("aot")}, "'aot' is not built for"),
  (
    {"name": "online_dpo", "objective": PreferenceConfig("dpo", sync_every=5)},
    "objective.sync_every is not used",
  ),
]


@pytest.mark.parametrize("settings, message", WRONG, ids=range(len(WRONG)))
def test_what_is_missing_or_would_be_ignored_is_refused(settings, message):
  with pytest.raises(InputError, match=message):
    OnlinePreferenceConfig(**settings)


def test_online_dpo_needs_samples_to_compare(toy):
  with pytest.raises(InputError, match="samples_per_prompt to 2 or more"):
    online_preference.preference_learner(toy.model, DPO, sampling=SAMPLING, tx=toy.tx)
  assert DPO.pairs_per_prompt(GROUPS) == 1 and XPO.pairs_per_prompt(GROUPS) == 4
