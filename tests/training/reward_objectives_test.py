"""Tests of the objectives of reward models: each rule against a loop, layouts, ensembles."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax import data, losses, models
from align_jax.training import objectives, optimizer, reward_objectives, step
from align_jax.training.reward_objectives import PairLoss
from tests.training.conftest import WIDTH, Toy, toy_params

KEY = jax.random.key(0)


def _head(outputs=None, seed=3):
  return models.init_scalar_head(jax.random.key(seed), WIDTH, outputs)


@pytest.fixture(scope="module")
def judged(tokenizer):
  """(padded, shared) batches of eight pairs with every column that a rule may read."""
  from align_jax import worlds

  records = worlds.Microworld(seed=0).preferences(8)
  weights = [1.0, 0.5, 2.0, 0.0, 1.0, 3.0, 0.25, 1.0]
  records = [
    dataclasses.replace(r, weight=w, label_prob=p) for r, w, p in zip(records, weights, PROBS)
  ]
  plan = data.Batching(8, epochs=1, shuffle=False)
  pairs = data.tokenise_pairs(records, tokenizer, plan, length=46)
  votes = np.random.default_rng(0).choice([-1.0, 0.0, 0.5, 1.0], (8, 3)).astype(np.float32)
  votes[:, 0] = 1.0  # someone voted on each
  columns = {
    "votes": votes,
    "lengths": pairs.response_lengths.astype(np.float32),
    "index": pairs.kept.astype(np.int32),
  }
  pairs = dataclasses.replace(pairs, columns=columns)
  padded = next(data.padded_batches(pairs, 46))
  return padded, next(data.shared_batches(pairs, row_multiple=2))


PROBS = [1.0, 0.5, 0.0, 0.3, 0.9, 1.0, 0.7, 0.2]


def _run(settings, head, batch, params, grad=False):
  objective = reward_objectives.pair_objective(Toy(), settings)
  trainable = {"trunk": params, "head": head}
  if grad:
    return jax.jit(jax.grad(lambda t: objective(t, {}, batch, KEY)[0]))(trainable)
  return jax.jit(lambda t: objective(t, {}, batch, KEY))(trainable)


RULES = {
  "one": (PairLoss(centering=0.1, label_smoothing=0.1), None),
  "ties": (PairLoss(centering=0.1, tie_theta=2.0), None),
  "votes": (PairLoss("votes", centering=0.1, label_smoothing=0.1), 3),
  "spread": (PairLoss("spread"), 2),
  "two": (PairLoss("two", correlation=0.7, orthogonality=0.3), 2),
  "members": (PairLoss("members", centering=0.1, bootstrap=5), 4),
}
each_rule = pytest.mark.parametrize("settings, outputs", RULES.values(), ids=RULES)


@each_rule
def test_both_layouts_give_one_loss_and_one_gradient(judged, toy, settings, outputs):
  padded, shared = judged
  head = _head(outputs)
  (one, metrics), (other, others) = (_run(settings, head, b, toy[1]) for b in (padded, shared))
  np.testing.assert_allclose(one, other, rtol=1e-5)
  for name in set(metrics) - {"tokens"}:
    np.testing.assert_allclose(
      metrics[name].compute(), others[name].compute(), rtol=1e-4, atol=1e-6
    )
  gradients = [_run(settings, head, b, toy[1], grad=True) for b in (padded, shared)]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), *gradients)


def _scores(judged, toy, head):
  """[8, 2, H] of whole rows, without any layout."""
  return _row_scores(judged[0], toy[1], head).reshape(8, 2, -1)


def _row_scores(batch, params, head):
  rows = [batch[k].reshape(-1, batch[k].shape[-1]) for k in ROWS]
  score = functools.partial(objectives.response_scores, Toy())
  return np.asarray(jax.jit(score)({"params": params}, head, *rows))


ROWS = ("tokens", "segment_ids", "response_mask")


def _log_sigmoid(x):
  return -np.log1p(np.exp(-x))


def _bradley_terry(r, q, smoothing, centering):
  q = q * (1 - smoothing) + (1 - q) * smoothing
  d = r[0] - r[1]
  return -q * _log_sigmoid(d) - (1 - q) * _log_sigmoid(-d) + centering * (r[0] + r[1]) ** 2


def test_one_head_a_labeller_learns_from_that_labellers_votes(judged, toy):
  head = _head(3)
  scores, batch = _scores(judged, toy, head), judged[0]
  expected = 0.0
  for p in range(8):
    terms = [
      _bradley_terry(scores[p, :, a], vote, 0.1, 0.1)
      for a, vote in enumerate(batch["votes"][p])
      if vote >= 0
    ]
    expected += batch["weight"][p] * np.mean(terms)
  loss, metrics = _run(RULES["votes"][0], head, judged[0], toy[1])
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  np.testing.assert_allclose(metrics["loss"].weight, batch["weight"].sum())
  # What nobody of a labeller's voted on leaves no trace in that labeller's head.
  absent = dict(batch, votes=batch["votes"].copy())
  absent["votes"][:, 1] = -1.0
  gradient = _run(RULES["votes"][0], head, absent, toy[1], grad=True)["head"]["kernel"]
  assert not np.any(gradient[:, 1]) and np.any(gradient[:, 0])


def test_two_heads_add_up_for_the_labels_and_part_over_length(judged, toy):
  head, (settings, _) = _head(2), RULES["two"]
  scores, batch = _scores(judged, toy, head), judged[0]
  apart = (scores[:, 0] - scores[:, 1]).T  # of the two answers to one prompt, [2, 8]
  extra = batch["lengths"][:, 0] - batch["lengths"][:, 1]

  def correlation(x):
    w = batch["weight"]
    return np.sum(w * x * extra) / np.sqrt(np.sum(w * x * x) * np.sum(w * extra * extra))

  penalty = abs(correlation(apart[0])) - correlation(apart[1])
  angle = abs(float(np.dot(*np.asarray(head["kernel"]).T)))
  labels = [_bradley_terry(scores[p].sum(-1), q, 0, 0) for p, q in enumerate(np.float32(PROBS))]
  expected = np.dot(batch["weight"], labels) / batch["weight"].sum() + 0.7 * penalty + 0.3 * angle
  loss, metrics = _run(settings, head, batch, toy[1])
  np.testing.assert_allclose(metrics["loss"].compute(), expected, rtol=1e-4)
  np.testing.assert_allclose(metrics["rewards/length_penalty"].compute(), penalty, rtol=1e-4)
  quality = scores[..., 0]  # the reward is the quality alone
  margin = np.average(quality[:, 0] - quality[:, 1], weights=batch["weight"])
  np.testing.assert_allclose(metrics["rewards/margin"].compute(), margin, rtol=1e-4, atol=1e-6)


def test_spread_and_ties_are_their_losses_on_the_scores(judged, toy):
  batch = judged[0]
  head = _head(2)
  s = _scores(judged, toy, head)
  each = losses.thurstone_loss(
    s[:, 0, 0], s[:, 1, 0], s[:, 0, 1], s[:, 1, 1], label_prob=np.float32(PROBS)
  )
  loss, _ = _run(RULES["spread"][0], head, batch, toy[1])
  np.testing.assert_allclose(loss, np.dot(batch["weight"], each), rtol=1e-5)
  head = _head()
  s = _scores(judged, toy, head)[..., 0]
  outcome = np.array([1, 0.5, 0, 0, 1, 1, 0.5, 0], np.float32)
  each = losses.rao_kupper_loss(s[:, 0], s[:, 1], outcome, theta=2.0) + 0.1 * s.sum(1) ** 2
  loss, _ = _run(RULES["ties"][0], head, batch | {"label_prob": outcome}, toy[1])
  np.testing.assert_allclose(loss, np.dot(batch["weight"], each), rtol=1e-5)


def test_heads_of_one_trunk_learn_as_if_alone_and_the_trunk_from_their_mean(judged, toy):
  settings = PairLoss("members", centering=0.1)
  head = _head(3)
  together = _run(settings, head, judged[0], toy[1], grad=True)
  alone = [
    _run(
      PairLoss(centering=0.1),
      {"kernel": head["kernel"][:, k], "bias": head["bias"][k]},
      judged[0],
      toy[1],
      grad=True,
    )
    for k in range(3)
  ]
  kernels = np.stack([a["head"]["kernel"] for a in alone], axis=1)
  np.testing.assert_allclose(together["head"]["kernel"] * 3, kernels, rtol=1e-4, atol=1e-6)
  mean = jax.tree.map(lambda *x: sum(x) / 3, *(a["trunk"] for a in alone))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), together["trunk"], mean
  )


def test_bootstrap_weights_are_poisson_and_belong_to_the_record():
  weights = np.asarray(reward_objectives.bootstrap_weights(1, jnp.arange(4000), 3))
  for k in range(4):
    share = np.mean(weights == k)
    assert abs(share - np.exp(-1) / [1, 1, 2, 6][k]) < 0.02
  assert abs(np.corrcoef(weights.T)[0, 1]) < 0.05  # members are resampled independently
  again = reward_objectives.bootstrap_weights(1, jnp.array([7, 3]), 3)
  np.testing.assert_array_equal(again, weights[[7, 3]])
  assert np.any(reward_objectives.bootstrap_weights(2, jnp.arange(4000), 3) != weights)


def _stacked(trees):
  return jax.tree.map(lambda *x: jnp.stack(x), *trees)


@pytest.mark.parametrize(
  "rule",
  [{"weight_decay": 0.1, "grad_clip": 0.02}, {"name": "sgd", "grad_clip": 1e3}],
  ids=["clipped", "plain"],
)
def test_members_under_vmap_take_the_steps_that_each_takes_alone(judged, toy, rule):
  """Clipping, decay and moments too, with weights that differ from member to member."""
  config = optimizer.OptimizerConfig(0.05, schedule="constant", **rule)
  starts = [{"trunk": toy_params(s, len(toy[1]["tokens"])), "head": _head(seed=s)} for s in (1, 2)]
  batches = [judged[0], judged[0] | {"weight": np.roll(judged[0]["weight"], 3) * 2}]
  objective = reward_objectives.pair_objective(Toy(), PairLoss(centering=0.1))

  def steps(params, objective, tx, batch):
    state = step.TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), KEY)
    update = jax.jit(functools.partial(step.train_step, objective=objective, tx=tx))
    for _ in range(3):
      state, _ = update(state, {}, batch)
    return state.params

  alone = [
    steps(p, objective, optimizer.make_optimizer(config, 3), b) for p, b in zip(starts, batches)
  ]
  together = steps(
    _stacked(starts),
    reward_objectives.ensemble_objective(objective, 2),
    optimizer.make_optimizer(config, 3, members=True),
    {str(i): b for i, b in enumerate(batches)},
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), together, _stacked(alone)
  )
  if config.name == "sgd":
    return
  joint = steps(  # the control: one clip over both members is not the same
    _stacked(starts),
    reward_objectives.ensemble_objective(objective, 2),
    optimizer.make_optimizer(config, 3),
    {str(i): b for i, b in enumerate(batches)},
  )
  assert not np.allclose(joint["trunk"]["out"], together["trunk"]["out"], rtol=2e-3, atol=2e-5)


def test_an_ensemble_is_evaluated_on_one_batch_for_all(judged, toy):
  objective = reward_objectives.pair_objective(Toy(), PairLoss())
  members = [{"trunk": toy[1], "head": _head(seed=s)} for s in (1, 2, 3)]
  alone = [objective(m, {}, judged[0], KEY)[1] for m in members]
  _, found = reward_objectives.ensemble_objective(objective, 3)(
    _stacked(members), {}, judged[0], KEY
  )
  for name in ("loss", "rewards/accuracy", "rewards/margin"):
    mean = np.mean([m[name].compute() for m in alone])
    np.testing.assert_allclose(found[name].compute(), mean, rtol=1e-5, atol=1e-6)
  assert int(found["tokens"]) == int(alone[0]["tokens"])


@pytest.fixture(scope="module")
def lists(tokenizer):
  """Four prompts with two to four ranked answers each."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(1, len(tokenizer), (4, 4, 12)).astype(np.int32)
  ends = rng.integers(5, 12, (4, 4, 1))
  ranks = np.array([[2, 1, 0, 0], [1, 3, 2, 2], [4, 3, 2, 1], [1, 2, 3, 0]], np.int32)
  real = (np.arange(12) < ends) & (ranks > 0)[..., None]
  return {
    "tokens": np.where(real, tokens, 0),
    "segment_ids": real.astype(np.int32),
    "response_mask": (real & (np.arange(12) >= 3)).astype(np.float32),
    "ranks": ranks,
    "weight": np.array([1.0, 2.0, 0.0, 0.5], np.float32),
  }


def _list_scores(lists, toy, head):
  flat = [x.reshape(-1, 12) for x in (lists[k] for k in ROWS)]
  return np.asarray(objectives.response_scores(Toy(), {"params": toy[1]}, head, *flat)).reshape(
    4, 4
  )


def test_ranked_lists_by_all_pairs_and_by_plackett_luce(lists, toy):
  head = _head()
  scores = _list_scores(lists, toy, head)
  trainable = {"trunk": toy[1], "head": head}
  centred = [np.mean(s[r > 0] ** 2) for s, r in zip(scores, lists["ranks"])]
  each = np.asarray(losses.all_pairs_loss(scores, lists["ranks"])) + 0.1 * np.array(centred)
  objective = reward_objectives.ranking_objective(Toy(), loss="pairs", centering=0.1)
  loss, metrics = objective(trainable, {}, lists, KEY)
  np.testing.assert_allclose(loss, np.dot(lists["weight"], each), rtol=1e-5)
  strict = lists | {"ranks": np.where(lists["ranks"] == 2, 2, lists["ranks"])}
  strict["ranks"][1] = [1, 4, 2, 3]
  by_rank = [s[np.argsort(r)[(r == 0).sum() :]] for s, r in zip(scores, strict["ranks"])]
  each = [sum(np.log(np.exp(s[k:]).sum()) - s[k] for k in range(len(s))) for s in by_rank]
  objective = reward_objectives.ranking_objective(Toy(), loss="plackett_luce")
  loss, _ = objective(trainable, {}, strict, KEY)
  np.testing.assert_allclose(loss, np.dot(lists["weight"], each), rtol=1e-5)
  right, pairs = 0.0, 0.0
  for s, r, w in zip(scores, lists["ranks"], lists["weight"]):
    for i in range(4):
      for j in range(4):
        if 0 < r[i] < r[j]:
          right, pairs = right + w * (s[i] > s[j]), pairs + w
  np.testing.assert_allclose(metrics["rewards/accuracy"].compute(), right / pairs, rtol=1e-5)


def test_ratings_are_regressed_aspect_by_aspect(lists, toy):
  batch = {k: lists[k][:, 0] for k in ROWS} | {"weight": lists["weight"]}
  batch["ratings"] = np.array([[1, 0], [2, 5], [3, 3], [0, -1]], np.float32)
  batch["rated"] = np.array([[1, 0], [1, 1], [1, 1], [0, 1]], np.float32)
  head = _head(2)
  s = _row_scores(batch, toy[1], head)
  error = (s - batch["ratings"]) ** 2
  each = (error * batch["rated"]).sum(1) / batch["rated"].sum(1)
  objective = reward_objectives.rating_objective(Toy(), ("a", "b"))
  loss, metrics = objective({"trunk": toy[1], "head": head}, {}, batch, KEY)
  np.testing.assert_allclose(loss, np.dot(batch["weight"], each), rtol=1e-5)
  expected = (1 * abs(s[0, 0] - 1) + 2 * abs(s[1, 0] - 2)) / 3
  np.testing.assert_allclose(metrics["ratings/a/error"].compute(), expected, rtol=1e-5)
