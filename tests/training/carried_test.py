"""What an objective takes from step to step: BCO's running mean, TR-DPO's moving reference."""

import functools
import json

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from align_jax import sharding
from align_jax.losses import Mean
from align_jax.training import loop, preferences, state, step
from align_jax.training import preference_objectives as po

TX = optax.sgd(0.05)


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])


class Run:
  """An objective's compiled step on the toy, from the policy's own parameters or an adapter's."""

  def __init__(self, toy, mesh, config, *, lora=False):
    model, policy, ref = toy
    policy, ref = jax.device_put((policy, ref), sharding.replicated(mesh))
    adapter = {"a": 0.3 * policy["query"][:, :2], "b": 0.0 * policy["out"][:2]}
    self.trainable = adapter if lora else policy
    self.frozen = {"base": policy} if lora else {} if config.sync_every else {"ref": ref}
    self.carried = po.carried(config, self.trainable, self.frozen)
    self.mesh = mesh
    self.step = step.make_train_step(
      po.preference_objective(model, config), TX, carry=po.carry(config)
    )

  def start(self):
    return state.create_state(self.trainable, TX, 0, self.mesh, carried=self.carried)

  def states(self, batch, steps):
    """(state, metrics) behind every step; the states are copies, since a step takes its own."""
    at, found = self.start(), []
    for _ in range(steps):
      at, metrics = self.step(at, self.frozen, sharding.put_batch(batch, self.mesh))
      found.append(jax.device_get((at.params, at.carried, metrics)))
    return found


def test_objectives_that_carry_nothing_carry_nothing(toy):
  for name in ("dpo", "tdpo", "simpo", "kto"):
    config = preferences.PreferenceConfig(name)
    assert po.carry(config) is None and po.carried(config, toy[1], {}) == {}


@pytest.fixture(scope="module")
def bco(toy, mesh, soft):
  return Run(toy, mesh, preferences.PreferenceConfig("bco", beta=0.3)).states(soft.shared, 4)


def test_bco_starts_at_no_shift_and_goes_on_at_the_mean_of_all_rewards_so_far(bco):
  """Of both answers, weighted; the batch at hand is not among them."""
  totals = weights = 0.0
  for _, carried, metrics in bco:
    expected = totals / weights if weights else 0.0
    np.testing.assert_allclose(metrics["bco/shift"].total, expected, rtol=1e-5)
    for name in ("rewards/chosen", "rewards/rejected"):
      totals, weights = totals + metrics[name].total, weights + metrics[name].weight
    np.testing.assert_allclose(carried["shift"].total, totals, rtol=1e-5)
    np.testing.assert_allclose(carried["shift"].weight, weights, rtol=1e-6)
  assert weights == pytest.approx(4 * 2 * 8.75)
  assert abs(totals / weights) > 0.1


def test_bco_reads_its_shift(bco, toy, soft):
  """The second loss is the one at the first rewards' mean, in NumPy from the metrics of one pair."""
  model, _, ref = toy
  params, carried, _ = bco[0]
  rewards = po.preference_objective(model, preferences.PreferenceConfig("dpo", beta=0.3))
  sides = []
  one = np.zeros(8, np.float32)
  for pair in np.flatnonzero(soft.padded["weight"]):
    batch = dict(soft.padded, weight=one + (np.arange(8) == pair))
    metrics = rewards(params, {"ref": ref}, batch, None)[1]
    sides.append([float(metrics[f"rewards/{side}"].total) for side in ("chosen", "rejected")])
  chosen, rejected = np.array(sides).T
  shift = float(carried["shift"].compute())
  weight, p = (soft.padded[k][soft.padded["weight"] > 0] for k in ("weight", "label_prob"))

  def loss(up, down):
    return np.log1p(np.exp(-(up - shift))) + np.log1p(np.exp(down - shift))

  expected = np.sum(weight * (p * loss(chosen, rejected) + (1 - p) * loss(rejected, chosen)))
  np.testing.assert_allclose(bco[1][2]["loss"].total, expected, rtol=1e-5)


@pytest.mark.parametrize("alpha", [1.0, 0.6])
@pytest.mark.parametrize("name", ["dpo", "tdpo"])
def test_the_reference_moves_every_so_many_steps_and_stays_between(toy, mesh, soft, name, alpha):
  config = preferences.PreferenceConfig(name, sync_every=2, sync_alpha=alpha)
  run = Run(toy, mesh, config)
  reference = jax.device_get(run.trainable)  # where the policy starts
  for number, (params, carried, _) in enumerate(run.states(soft.shared, 5), start=1):
    if number % 2 == 0:
      reference = jax.tree.map(lambda r, p: (1 - alpha) * r + alpha * p, reference, params)
    for a, b in zip(*map(jax.tree.leaves, (carried["ref"], reference))):
      np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    assert np.abs(params["head"] - carried["ref"]["head"]).max() > 0 or number % 2 == 0


def test_the_loss_is_against_the_reference_that_has_moved(toy, mesh, hard):
  """Hard syncs return DPO to ln 2 at the step behind; a frozen reference does not."""

  def losses(**settings):
    run = Run(toy, mesh, preferences.PreferenceConfig("dpo", beta=0.5, **settings))
    run.frozen = {"ref": run.trainable}  # what is carried goes before it
    return [float(m["loss"].compute()) for *_, m in run.states(hard.shared, 5)]

  synced, frozen = losses(sync_every=2), losses()
  for values, at in ((synced, (0, 2, 4)), (frozen, (0,))):
    for number, value in enumerate(values):
      assert (abs(value - np.log(2.0)) < 1e-5) == (number in at)
  np.testing.assert_allclose(synced[:2], frozen[:2], rtol=1e-5)


def test_with_lora_the_adapter_is_what_the_reference_takes_over(toy, mesh, hard):
  run = Run(toy, mesh, preferences.PreferenceConfig("dpo", beta=0.5, sync_every=2), lora=True)
  assert set(run.carried) == {"ref_lora"}
  found = run.states(hard.shared, 3)
  losses = [float(metrics["loss"].compute()) for *_, metrics in found]
  assert [abs(value - np.log(2.0)) < 1e-5 for value in losses] == [True, False, True]
  start = jax.device_get(run.trainable)
  for expected, (_, carried, _) in zip((start, found[1][0], found[1][0]), found):
    for a, b in zip(*map(jax.tree.leaves, (carried["ref_lora"], expected))):
      np.testing.assert_array_equal(a, b)


def test_what_is_carried_lies_where_it_came_from_and_fresh_scalars_everywhere(toy):
  """A scalar made on one device would not go with parameters on eight."""
  mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=8), jax.devices())
  params = {"w": jax.device_put(np.ones((8, 4), np.float32), sharding.batch_sharding(mesh))}
  carried = {"shift": Mean(jnp.zeros(()), jnp.zeros(())), "ref": params}
  made = state.create_state(params, TX, 0, mesh, carried=carried)
  assert made.carried["ref"]["w"].sharding.is_equivalent_to(params["w"].sharding, 2)
  assert made.carried["shift"].total.sharding.is_fully_replicated
  assert len(made.carried["shift"].total.sharding.device_set) == 8


def test_what_is_carried_is_saved_and_restored(toy, mesh, soft, tmp_path):
  """Stopped between two moves of the reference and resumed: every later loss is the same, to a bit."""
  config = preferences.PreferenceConfig("bco", beta=0.3, sync_every=3, sync_alpha=0.6)
  run = Run(toy, mesh, config)
  assert set(run.carried) == {"shift", "ref"}

  def fit(folder, stop=None):
    folder.mkdir(exist_ok=True)
    # A data set whose every element is the batch: grain's iterators save their own place.
    batches = iter(
      grain.MapDataset.range(100)
      .map(lambda _: soft.shared)
      .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    )

    def one(at, batch):
      if stop is not None and int(at.step) == stop:
        raise InterruptedError
      return run.step(at, run.frozen, batch)

    return loop.fit(
      run.start(),
      name="test",
      step=one,
      batches=batches,
      put=functools.partial(sharding.put_batch, mesh=mesh),
      config=loop.LoopConfig(steps=8, checkpoint_every=2),
      workdir=folder,
      metadata={},
      hooks=loop.Hooks(),
    )

  whole = fit(tmp_path / "whole")
  with pytest.raises(InterruptedError):
    fit(tmp_path / "parts", stop=5)
  resumed = fit(tmp_path / "parts")
  assert isinstance(resumed.carried["shift"], Mean)
  for a, b in zip(*map(jax.tree.leaves, ((whole.params, whole.carried),
                                         (resumed.params, resumed.carried)))):  # fmt: skip
    np.testing.assert_array_equal(a, b)
  written = [
    [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    for name in ("whole", "parts")
  ]
  assert [row["loss"] for row in written[0]] == [row["loss"] for row in written[1]]
  assert [row["step"] for row in written[1]] == list(range(8))
  shifts = [row["bco/shift"] for row in written[1]]
  # Nothing known yet, then the rewards of the start: 0 up to the rounding of two ways to compile.
  np.testing.assert_allclose(shifts[:2], 0.0, atol=1e-6)
  assert np.abs(shifts[2:]).min() > 1e-4
  assert len(set(shifts[1:])) == 7  # the control: the shift moves all the time
