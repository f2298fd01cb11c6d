"""Rejection sampling: what is kept, the likelihood of exactly that, and that it learns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from align_jax import models, rl
from align_jax.errors import InputError
from align_jax.rl import engine, rejection
from align_jax.rl.rejection import RejectionConfig
from align_jax.training import metrics as metrics_lib
from tests.rl.conftest import EOS, Tokenizer, count_liked, prompt_batches

GROUPS = rl.SamplingConfig(max_new_tokens=8, samples_per_prompt=4)
RAFT = RejectionConfig("raft", keep=1)
REST = RejectionConfig("rest", quantile=0.7)


def iteration(toy, config, *, tx=None, reward=count_liked):
  tx = tx or toy.tx
  draw = rl.policy_draw(
    toy.model, GROUPS, prompts=["a prompt"], tokenizer=Tokenizer(), eos_ids=[EOS], mesh=toy.mesh
  )
  learner = rejection.rejection_learner(toy.model, config, sampling=GROUPS, tx=tx)
  return rl.make_iteration(
    draw, learner, rewards=[rl.text_reward("liked", reward)], shaping=rl.ShapingConfig(),
    sampling=GROUPS, mesh=toy.mesh,
  )  # fmt: skip


def start(toy, tx=None):
  return rl.create_state({"policy": toy.params}, tx or toy.tx, kl_coef=0.0, seed=0, mesh=toy.mesh)


@pytest.mark.parametrize(
  "config",
  [dataclasses.replace(RAFT, epochs=2, minibatches=2), dataclasses.replace(REST, epochs=4)],
  ids=["raft", "rest"],
)
def test_it_learns_and_starts_at_its_identities(toy, config):
  iterate, state, history = iteration(toy, config), start(toy), []
  for batch in prompt_batches(12, 12):
    state, metrics, _ = iterate(state, {"ref": toy.params}, batch)
    history.append(metrics_lib.to_floats(metrics))
  engine.check_identity(history[0], dtype="float32")
  scores = [values["score"] for values in history]
  assert np.mean(scores[-3:]) > scores[0] + 0.4, scores
  assert all(values["rejection/kept_score"] >= values["score"] for values in history)
  assert all(np.isfinite(list(values.values())).all() for values in history)
  if config.name == "raft":
    assert {values["rejection/kept"] for values in history} == {0.25}


@pytest.mark.parametrize("config", [RAFT, REST, RejectionConfig("rest", threshold=1.0)])
def test_the_loss_is_the_likelihood_of_what_is_kept_per_token(toy, config):
  tx, before = optax.sgd(0.05), jax.tree.map(jnp.copy, toy.params)
  state, metrics, rollout = iteration(toy, config, tx=tx)(
    start(toy, tx), {"ref": toy.params}, prompt_batches(1, 8)[0]
  )
  scores = rollout.scores[""]
  if config.name == "raft":
    rows = [max(range(4 * p, 4 * p + 4), key=lambda i: (scores[i], -i)) for p in range(8)]
  else:
    level = np.quantile(scores, 0.7) if config.threshold is None else config.threshold
    rows = np.flatnonzero(scores >= level)
  mask = rollout.response_mask[rows, 1:]

  def loss(params):
    logprobs = models.token_logprobs(
      toy.model, {"params": params}, rollout.tokens[rows], segment_ids=rollout.segment_ids[rows]
    )
    return -jnp.sum(logprobs * mask) / mask.sum()

  value, gradient = jax.jit(jax.value_and_grad(loss))(before)
  values = metrics_lib.to_floats(metrics)
  assert values["loss"] == pytest.approx(float(value), rel=1e-5)
  assert values["rejection/kept"] == pytest.approx(len(rows) / 32)
  assert values["rejection/kept_score"] == pytest.approx(scores[rows].mean())
  jax.tree.map(
    lambda p, b, g: np.testing.assert_allclose(p, b - 0.05 * g, atol=2e-6),
    state.params["policy"],
    before,
    gradient,
  )


def test_where_nothing_reaches_the_threshold_nothing_moves(toy):
  config = RejectionConfig("rest", threshold=100.0)
  before = jax.tree.map(jnp.copy, toy.params)
  state, metrics, _ = iteration(toy, config)(
    start(toy), {"ref": toy.params}, prompt_batches(1, 8)[0]
  )
  values = metrics_lib.to_floats(metrics)
  assert values["rejection/kept"] == values["loss"] == values["grad_norm"] == 0.0
  jax.tree.map(np.testing.assert_array_equal, state.params["policy"], before)


WRONG = [
  ({"name": "sft"}, "name must be one of raft, rest"),
  ({"name": "raft"}, "keep is to be given exactly for raft"),
  ({"name": "rest", "keep": 1, "quantile": 0.5}, "keep is to be given exactly for raft"),
  ({"name": "rest"}, "threshold or quantile"),
  ({"name": "rest", "threshold": 0.0, "quantile": 0.5}, "threshold or quantile"),
  ({"name": "raft", "keep": 1, "quantile": 0.5}, "threshold or quantile"),
  ({"name": "rest", "quantile": 1.5}, "quantile must be in"),
  ({"name": "raft", "keep": 0}, "keep must be at least 1"),
  ({"name": "raft", "keep": 1, "epochs": 0}, "epochs must be at least 1"),
]


@pytest.mark.parametrize("settings, message", WRONG, ids=range(len(WRONG)))
def test_what_is_missing_or_would_be_ignored_is_refused(settings, message):
  with pytest.raises(InputError, match=message):
    RejectionConfig(**settings)


def test_raft_must_reject_something(toy):
  with pytest.raises(InputError, match="set sampling.samples_per_prompt above keep"):
    rejection.rejection_learner(
      toy.model, RejectionConfig("raft", keep=4), sampling=GROUPS, tx=toy.tx
    )
