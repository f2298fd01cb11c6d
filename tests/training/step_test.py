"""One step: the same numbers whatever the accumulation, the mesh, the padding and the batch order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax import models, sharding
from align_jax.training import metrics as metrics_lib
from align_jax.training import objectives, preference_objectives, preferences, state, step
from align_jax.training.optimizer import OptimizerConfig, make_optimizer

STEPS = 5
ADAM = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_fraction=0.0), STEPS)
# Invariances are shown with momentum, which is linear in the gradient: Adam divides by its size and
# so turns the rounding of a gradient near zero into a full step.
SGD = make_optimizer(OptimizerConfig(name="sgd", learning_rate=0.3, warmup_fraction=0.0), STEPS)
DPO = preferences.PreferenceConfig("dpo")


def place(params, model, mesh):
  shardings = sharding.tree_shardings(
    models.logical_axes(model), models.abstract_params(model), mesh
  )
  return jax.device_put(params, shardings)


def mesh_of(data=1, fsdp=1, tensor=1):
  count = data * fsdp * tensor
  return sharding.make_mesh(sharding.MeshConfig(data, fsdp, tensor), jax.devices()[:count])


def train(model, params, batch, mesh, *, steps=STEPS, accumulate=1, ref=None, tx=SGD):
  """(losses, final params) of DPO from `params` against `ref` (default: a shifted copy)."""
  ref = jax.tree.map(lambda x: x * 0.9, params) if ref is None else ref
  run_state = state.create_state(place(params, model, mesh), tx, 0, mesh)
  frozen = {"ref": place(ref, model, mesh)}
  run = step.make_train_step(
    preference_objectives.preference_objective(model, DPO), tx, accumulate=accumulate
  )
  losses = []
  for _ in range(steps):
    run_state, metrics = run(run_state, frozen, sharding.put_batch(batch, mesh))
    losses.append(float(metrics["loss"].compute()))
  return np.array(losses), jax.device_get(run_state.params)


@pytest.fixture(scope="module")
def single(tiny_model, tiny_pairs):
  return train(*tiny_model, tiny_pairs, mesh_of())


def assert_same(result, expected, tolerance=3e-6):
  np.testing.assert_allclose(result[0], expected[0], rtol=1e-5)
  for a, b in zip(jax.tree.leaves(result[1]), jax.tree.leaves(expected[1])):
    np.testing.assert_allclose(a, b, atol=tolerance)


@pytest.mark.parametrize(
  "axes", [dict(data=8), dict(fsdp=8), dict(tensor=2), dict(data=2, fsdp=2, tensor=2)], ids=str
)
def test_eight_devices_equal_one(tiny_model, tiny_pairs, single, axes):
  assert_same(train(*tiny_model, tiny_pairs, mesh_of(**axes)), single)


def test_accumulation_changes_nothing(tiny_model, tiny_pairs, single):
  """peers 3.20: the summed gradient is divided once by the total weight."""
  assert_same(train(*tiny_model, tiny_pairs, mesh_of(), accumulate=4), single)


def objective_of(name, model, pairs):
  """(objective, prepare, batch) whose rows weigh differently and differ in length."""
  names = ("tokens", "segment_ids", "response_mask")
  flat = {k: pairs[k].reshape(16, 16) for k in names}
  weight = np.arange(1.0, 17.0, dtype=np.float32)
  if name == "sft":
    mask = flat.pop("response_mask") * weight[:, None]
    positions = np.broadcast_to(np.arange(16, dtype=np.int32), (16, 16))
    return objectives.sft_objective(model), None, flat | {"positions": positions, "loss_mask": mask}
  other = {f"mismatched_{k}": np.roll(v, 3, axis=0) for k, v in flat.items()}
  labels = {"weight": weight, "is_desirable": (np.arange(16) % 3 == 0).astype(np.float32)}
  config = preferences.PreferenceConfig("kto")
  prepare = preference_objectives.prepare(model, preferences.PreferenceConfig("kto"))
  return preference_objectives.preference_objective(model, config), prepare, flat | other | labels


@pytest.mark.parametrize("name", ["sft", "kto"])
def test_accumulation_of_parts_that_weigh_differently_changes_nothing(tiny_model, tiny_pairs, name):
  """peers 3.20, 3.31: a mean of the parts' means would not be the mean; nor a part's baseline."""
  model, params = tiny_model
  objective, prepare, batch = objective_of(name, model, tiny_pairs)
  frozen = {"ref": jax.tree.map(lambda x: 1.1 * x, params)}
  results = []
  for accumulate in (1, 4):
    run_state = state.create_state(place(params, model, mesh_of()), SGD, 0, mesh_of())
    run = step.make_train_step(objective, SGD, accumulate=accumulate, prepare=prepare)
    run_state, metrics = run(run_state, frozen, sharding.put_batch(batch, mesh_of()))
    results.append((metrics_lib.to_floats(metrics), jax.device_get(run_state.params)))
  (expected, of_whole), (values, of_parts) = results
  for key, value in values.items():
    np.testing.assert_allclose(value, expected[key], rtol=2e-5, atol=1e-6, err_msg=key)
  for a, b in zip(jax.tree.leaves(of_parts), jax.tree.leaves(of_whole)):
    np.testing.assert_allclose(a, b, atol=3e-6)


def test_the_policy_is_its_reference_on_the_mesh(tiny_model, tiny_pairs):
  """peers 3.12: the identity of step 0 where it has failed elsewhere, on tensor-parallel shards."""
  model, params = tiny_model
  mesh = mesh_of(data=2, fsdp=2, tensor=2)
  policy, ref = (place(params, model, mesh) for _ in range(2))
  run = step.make_eval_step(preference_objectives.preference_objective(model, DPO))
  values = metrics_lib.to_floats(run(policy, {"ref": ref}, sharding.put_batch(tiny_pairs, mesh)))
  np.testing.assert_allclose(values["loss"], np.log(2.0), rtol=1e-6)
  assert max(abs(values[f"rewards/{side}"]) for side in ("chosen", "rejected")) < 1e-5


def test_batch_order_changes_nothing(tiny_model, tiny_pairs, single):
  order = np.random.default_rng(1).permutation(8)
  shuffled = {k: v[order] for k, v in tiny_pairs.items()}
  assert_same(train(*tiny_model, shuffled, mesh_of()), single)


def test_padding_and_weightless_rows_change_nothing(tiny_model, tiny_pairs, single):
  def pad(k, v):
    if v.ndim == 3:
      v = np.pad(v, ((0, 0), (0, 0), (0, 5)))
    return np.concatenate([v, np.zeros_like(v[:4]) if k == "weight" else v[:4]])

  padded = {k: pad(k, v) for k, v in tiny_pairs.items()}
  assert_same(train(*tiny_model, padded, mesh_of()), single)


def test_a_changed_token_does_change_the_loss(tiny_model, tiny_pairs, single):
  """The control of the tests above: they would notice one token."""
  other = dict(tiny_pairs, tokens=tiny_pairs["tokens"].copy())
  other["tokens"][0, 0, 4] += 1
  losses, _ = train(*tiny_model, other, mesh_of())
  assert np.abs(losses - single[0]).max() > 1e-4


def test_moments_are_sharded_as_their_parameters(tiny_model):
  model, params = tiny_model
  mesh = mesh_of(data=1, fsdp=4, tensor=2)
  made = state.create_state(place(params, model, mesh), ADAM, 0, mesh)
  adam = next(
    s
    for s in jax.tree.leaves(made.opt_state, is_leaf=lambda x: hasattr(x, "mu"))
    if hasattr(s, "mu")
  )
  split = 0
  for moments in (adam.mu, adam.nu):
    for p, m in zip(jax.tree.leaves(made.params), jax.tree.leaves(moments)):
      assert m.sharding.is_equivalent_to(p.sharding, p.ndim)
      split += not p.sharding.is_fully_replicated
  assert split > 10


def test_jit_on_an_auto_mesh_replicates_moments_without_out_shardings(tiny_model):
  """Why `create_state` passes out_shardings; if this fails, JAX has mended the trap."""
  model, params = tiny_model
  opt = jax.jit(ADAM.init)(place(params, model, mesh_of(fsdp=8)))
  mu = next(s for s in jax.tree.leaves(opt, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(s, "mu"))
  assert mu.mu["embedding"].sharding.is_fully_replicated


def test_one_step_equals_a_hand_written_one(tiny_model, tiny_pairs):
  """Adam's first step on the mean DPO loss, written out with plain jax.grad."""
  model, params = tiny_model
  ref = jax.tree.map(lambda x: x * 0.9, params)

  def logps(p):
    rows = {k: jnp.asarray(tiny_pairs[k]) for k in ("tokens", "segment_ids", "response_mask")}
    flat = {k: v.reshape(16, 16) for k, v in rows.items()}
    logits = model.apply({"params": p}, flat["tokens"], segment_ids=flat["segment_ids"])
    scores = jax.nn.log_softmax(logits[:, :-1])
    taken = jnp.take_along_axis(scores, flat["tokens"][:, 1:, None], axis=2)[..., 0]
    return jnp.sum(taken * flat["response_mask"][:, 1:], axis=1).reshape(8, 2)

  def loss(p):
    ratio = logps(p) - logps(ref)
    return jnp.mean(jnp.logaddexp(0.0, -0.1 * (ratio[:, 0] - ratio[:, 1])))

  grads = jax.jit(jax.grad(loss))(params)
  norm = float(jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads))))
  scale = min(1.0, 1.0 / norm)
  expected = jax.tree.map(
    lambda p, g: p - 1e-2 * scale * g / (jnp.abs(scale * g) + 1e-8), params, grads
  )
  losses, result = train(model, params, tiny_pairs, mesh_of(), steps=1, ref=ref, tx=ADAM)
  np.testing.assert_allclose(losses[0], float(loss(params)), rtol=1e-5)
  for g, a, b in zip(*map(jax.tree.leaves, (grads, result, expected))):
    sure = np.abs(g) > 1e-6  # where the sign of the gradient is beyond rounding
    np.testing.assert_allclose(np.asarray(a)[sure], np.asarray(b)[sure], atol=2e-4)


def test_every_entry_point_lowers_from_shapes_alone(tiny_model, tiny_pairs):
  model, _ = tiny_model
  abstract = models.abstract_params(model)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tiny_pairs)
  run_state = jax.eval_shape(
    lambda p: state.TrainState(jnp.zeros((), jnp.int32), p, ADAM.init(p), jax.random.key(0)),
    abstract,
  )
  objective = preference_objectives.preference_objective(model, DPO)
  run = functools.partial(step.train_step, objective=objective, tx=ADAM)
  lowered = jax.jit(run).lower(run_state, {"ref": abstract}, shapes)
  assert "dot_general" in lowered.as_text()
