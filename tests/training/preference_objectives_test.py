"""Every preference objective: the same numbers in either layout, and what each reads, in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax import models, sharding
from align_jax.losses import Mean
from align_jax.training import metrics as metrics_lib
from align_jax.training import pair_scores, preferences, state, step
from align_jax.training import preference_objectives as po
from align_jax.training.optimizer import OptimizerConfig, make_optimizer

PAIRED = [name for name, member in preferences.MEMBERS.items() if not member.unpaired]
BATCHWISE = ["aot", "aot_unpaired"]
FREE = ["simpo", "alphapo", "orpo", "cpo", "slic", "sft"]
SHIFT = Mean(jnp.full((), 3.0), jnp.full((), 10.0))
SGD = make_optimizer(OptimizerConfig(name="sgd", learning_rate=0.3, warmup_fraction=0.0), 3)


def objective_of(model, name, chunk=None, **settings):
  return po.preference_objective(model, preferences.PreferenceConfig(name, **settings), chunk=chunk)


def run(objective, trainable, frozen, batch):
  """(metrics as floats but for the count of tokens, gradient)."""
  (loss, metrics), grads = jax.value_and_grad(objective, has_aux=True)(
    trainable, frozen, batch, None
  )
  np.testing.assert_allclose(loss, metrics["loss"].total)
  values = metrics_lib.to_floats(metrics)
  del values["tokens"]  # a prompt that is shared is there once
  return values, grads


def assert_same(found, expected, tolerance=1e-5):
  (values, grads), (other, other_grads) = found, expected
  assert set(values) == set(other)
  for name, value in values.items():
    np.testing.assert_allclose(value, other[name], rtol=tolerance, atol=1e-5, err_msg=name)
  for a, b in zip(*map(jax.tree.leaves, (grads, other_grads))):
    scale = np.abs(b).max()
    assert np.isfinite(scale)
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)


def differ(found, expected):
  return any(
    np.abs(a - b).max() > 1e-3 * np.abs(b).max()
    for a, b in zip(*map(jax.tree.leaves, (found[1], expected[1])))
  )


def batches_for(name, hard, soft):
  return hard if name in BATCHWISE else soft


@pytest.fixture(scope="module")
def plain(toy, hard, soft):
  """`name -> what `run` gives of the padded batch`, computed once for all tests."""
  model, policy, ref = toy

  @functools.cache
  def of(name):
    batch = batches_for(name, hard, soft).padded
    return run(objective_of(model, name), policy, {"ref": ref, "shift": SHIFT}, batch)

  return of


@pytest.mark.parametrize("name", PAIRED)
def test_both_layouts_give_the_same_loss_metrics_and_gradients(toy, hard, soft, plain, name):
  """With weights, soft labels and the reference at hand or read from a cache."""
  model, policy, ref = toy
  layouts, objective = batches_for(name, hard, soft), objective_of(model, name)
  frozen, expected = {"ref": ref, "shift": SHIFT}, plain(name)
  assert any(np.abs(g).max() > 0 for g in jax.tree.leaves(expected[1]))
  assert_same(run(objective, policy, frozen, layouts.shared), expected)
  if not preferences.PreferenceConfig(name).needs_distributions:  # which no cache has
    for batch in (layouts.padded_cached, layouts.shared_cached):
      assert_same(run(objective, policy, {"shift": SHIFT}, batch), expected)


@pytest.mark.parametrize("name", ["dpo", "tdpo", "bco", "aot", "simpo", "dpo*0.5 + sft*2"])
def test_both_layouts_agree_with_lora(toy, hard, soft, name):
  """What trains is the adapter, and the reference is the base without it."""
  model, policy, _ = toy
  layouts, objective = batches_for(name, hard, soft), objective_of(model, name)
  adapter = {"a": 0.3 * policy["query"][:, :2], "b": 0.3 * policy["out"][:2]}
  frozen = {"base": policy, "shift": SHIFT}
  expected = run(objective, adapter, frozen, layouts.padded)
  assert set(expected[1]) == {"a", "b"} and np.abs(expected[1]["b"]).max() > 0
  assert_same(run(objective, adapter, frozen, layouts.shared), expected, 3e-5)


@pytest.mark.parametrize("name", PAIRED)
def test_what_is_empty_contributes_nothing(toy, hard, soft, plain, name):
  """Noise in padding, in rows and slots of no pair and in a pair of no weight: no number moves."""
  model, policy, ref = toy
  layouts, objective = batches_for(name, hard, soft), objective_of(model, name)
  frozen, expected = {"ref": ref, "shift": SHIFT}, plain(name)
  assert_same(run(objective, policy, frozen, noisy_padded(layouts.padded)), expected)
  assert_same(run(objective, policy, frozen, noisy_shared(layouts.shared)), expected)


def noisy_padded(batch):
  idle = (batch["segment_ids"] == 0) | (batch["weight"] == 0)[:, None, None]
  noise = np.random.default_rng(0).integers(0, 200, idle.shape)
  return dict(batch, tokens=np.where(idle, noise, batch["tokens"]).astype(np.int32))


def noisy_shared(batch):
  rng = np.random.default_rng(1)
  assert (batch["segment_ids"] == 0).all(axis=1).any()  # a whole row of nothing is among them
  idle = {"tokens": batch["segment_ids"] == 0, "targets": batch["slots"] < 0}
  idle |= {name: idle["targets"] for name in ("step_mask", "sources")}
  idle |= {name: batch["weight"] == 0 for name in ("margin", "label_prob")}
  noisy = {
    name: np.where(where, rng.integers(1, 60, where.shape), batch[name]).astype(batch[name].dtype)
    for name, where in idle.items()
  }
  return batch | noisy


@pytest.mark.parametrize("name", PAIRED)
def test_a_changed_answer_changes_the_gradient(toy, hard, soft, plain, name):
  """The control of the tests above: they would notice a token."""
  model, policy, ref = toy
  batch = batches_for(name, hard, soft).padded
  first = np.cumsum(batch["step_mask"], axis=-1) * batch["step_mask"] == 1
  changed = np.where(first, (batch["tokens"] + 1) % 200, batch["tokens"])
  other = dict(batch, tokens=changed.astype(np.int32))
  found = run(objective_of(model, name), policy, {"ref": ref, "shift": SHIFT}, other)
  assert differ(found, plain(name))


@pytest.mark.parametrize("name", sorted(set(PAIRED) - set(BATCHWISE)))
def test_a_label_is_a_probability_of_the_order(toy, hard, name):
  """0 is the pair the other way round, 1/2 has no order, and between them it is linear."""
  model, policy, ref = toy
  frozen, objective = {"ref": ref, "shift": SHIFT}, objective_of(model, name)
  swapped = {
    k: v[:, ::-1] if v.ndim == 3 else v for k, v in hard.padded.items()
  }  # [B, 2, T]: answers change sides

  def loss(batch, label):
    batch = dict(batch, label_prob=np.full(8, label, np.float32))
    return float(objective(policy, frozen, batch, None)[0])

  straight, back = loss(hard.padded, 1.0), loss(swapped, 1.0)
  np.testing.assert_allclose(loss(hard.padded, 0.0), back, rtol=1e-5)
  np.testing.assert_allclose(loss(hard.padded, 0.5), loss(swapped, 0.5), rtol=1e-5)
  mixed = 0.3 * straight + 0.7 * back
  np.testing.assert_allclose(loss(hard.padded, 0.3), mixed, rtol=1e-5)
  assert abs(straight - back) > 1e-3 * abs(straight)  # the control


@pytest.mark.parametrize("name, chunk", [("tdpo", 8), ("dpo*0.5 + sft*2", None)])
def test_compiled_and_chunked_is_the_same(toy, soft, name, chunk):
  model, policy, ref = toy
  expected = run(objective_of(model, name), policy, {"ref": ref}, soft.padded)
  for batch in (soft.padded, soft.shared):
    objective = jax.jit(objective_of(model, name, chunk))
    assert_same(run(objective, policy, {"ref": ref}, batch), expected)


@pytest.mark.parametrize("name, wpo", [("bco", False), ("dpo*0.5 + simpo", True)])
def test_accumulation_changes_nothing(toy, soft, name, wpo):
  """peers 3.20, on rows that hold different numbers of pairs, some of them none."""
  model, policy, ref = toy
  config = preferences.PreferenceConfig(name, wpo=wpo)
  objective, mesh = po.preference_objective(model, config), one_device()
  policy, ref = jax.device_put((policy, ref), sharding.replicated(mesh))
  batch = sharding.put_batch(soft.shared, mesh)
  results = []
  for parts in (1, 4):
    made = state.create_state(policy, SGD, 0, mesh, carried=po.carried(config, policy, {}))
    train = step.make_train_step(objective, SGD, accumulate=parts, carry=po.carry(config))
    for _ in range(2):
      made, metrics = train(made, {"ref": ref}, batch)
    results.append((metrics_lib.to_floats(metrics), made.params, made.carried))
  (values, params, carried), (other, other_params, other_carried) = results
  for name, value in values.items():
    np.testing.assert_allclose(value, other[name], rtol=2e-5, atol=1e-6, err_msg=name)
  for a, b in zip(*map(jax.tree.leaves, ((params, carried), (other_params, other_carried)))):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)


def one_device():
  return sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def on_meshes(tokenizer, hard):
  """`(name, mesh settings) -> (losses, params, carried)` of two steps of the real model."""
  config = models.ModelConfig(
    vocab_size=len(tokenizer) + -len(tokenizer) % 8, embed_dim=16, num_layers=1, num_heads=2,
    num_kv_heads=2, head_dim=8, mlp_dim=32,
  )  # fmt: skip
  model = models.Transformer(config)
  params = jax.jit(lambda key: models.init_params(model, key))(jax.random.key(0))
  ref = jax.tree.map(lambda x: 1.2 * x, params)

  def train(name, **axes):
    count = int(np.prod(list(axes.values()) or [1]))
    mesh = sharding.make_mesh(sharding.MeshConfig(**({"fsdp": 1} | axes)), jax.devices()[:count])
    where = sharding.tree_shardings(models.logical_axes(model), models.abstract_params(model), mesh)
    policy, reference = jax.device_put((params, ref), (where, where))
    objective = preferences.PreferenceConfig(name)
    made = state.create_state(
      policy, SGD, 0, mesh, carried=po.carried(objective, policy, {"ref": reference})
    )
    one = step.make_train_step(
      po.preference_objective(model, objective, chunk=8), SGD, carry=po.carry(objective)
    )
    values = []
    for _ in range(2):
      made, metrics = one(made, {"ref": reference}, sharding.put_batch(hard.shared, mesh))
      values.append(metrics_lib.to_floats(metrics))
    return values, jax.device_get((made.params, made.carried))

  return train


@pytest.fixture(scope="module")
def on_one(on_meshes):
  return on_meshes("bco + tdpo")


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_eight_devices_equal_one(on_meshes, on_one, hard, axes):
  """Rows over the devices, and the number of chunks that all of them skip."""
  scored = (hard.shared["slots"] >= 0).sum(axis=1).max()
  assert -(-scored // 8) < hard.shared["slots"].shape[1] // 8  # chunks are skipped
  (expected, trees), (found, other_trees) = on_one, on_meshes("bco + tdpo", **axes)
  for values, other in zip(found, expected):
    for key, value in values.items():
      np.testing.assert_allclose(value, other[key], rtol=3e-5, atol=3e-6, err_msg=key)
  for a, b in zip(*map(jax.tree.leaves, (other_trees, trees))):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("name", PAIRED)
def test_the_loss_at_the_reference_is_the_one_foretold(toy, hard, soft, name):
  """Also with weights and soft labels: both orders of a pair are alike there."""
  model, policy, _ = toy
  config = preferences.PreferenceConfig(name)
  expected = config.identity_loss()
  if expected is None:
    assert name in [*FREE, "r_dpo"]
    return
  frozen = {"ref": policy, "shift": Mean(jnp.zeros(()), jnp.zeros(()))}
  objective = po.preference_objective(model, config)
  for batch in (batches_for(name, hard, soft).padded, batches_for(name, hard, soft).shared):
    values = metrics_lib.to_floats(objective(policy, frozen, batch, None)[1])
    np.testing.assert_allclose(values["loss"], expected, rtol=1e-6)
    assert values["rewards/chosen"] == values["rewards/rejected"] == 0.0


@pytest.mark.parametrize("name", PAIRED)
def test_a_reference_is_needed_exactly_where_it_is_said(toy, hard, name):
  """Without one the free objectives run, and the others say what is missing."""
  model, policy, _ = toy
  config = preferences.PreferenceConfig(name)
  assert config.needs_reference == (name not in FREE)
  objective = po.preference_objective(model, config)
  if name in FREE:
    assert np.isfinite(objective(policy, {}, hard.shared, None)[0])
    return
  with pytest.raises(ValueError, match="needs a reference: frozen has neither 'ref' nor 'base'"):
    objective(policy, {"shift": SHIFT}, hard.shared, None)


class Numbers:
  """log-probs, masks and the like of the padded hard pairs as NumPy arrays [8, 2, T]."""

  def __init__(self, toy, batch):
    model, policy, ref = toy
    scores = pair_scores.score_pairs(
      model, {"params": policy}, batch, chunk=None, collision=True, reference={"params": ref}
    )
    for name, value in scores._asdict().items():
      setattr(self, name, np.asarray(value, np.float64))
    self.ratio = (self.logprobs - self.ref_logprobs) * self.mask


@pytest.fixture(scope="module")
def numbers(toy, hard):
  return Numbers(toy, hard.padded)


def loss_of(toy, batch, name, **settings):
  model, policy, ref = toy
  objective = objective_of(model, name, **settings)
  return metrics_lib.to_floats(objective(policy, {"ref": ref, "shift": SHIFT}, batch, None)[1])


def logistic(x):
  return np.log1p(np.exp(-x))


def test_dpo_and_ipo_in_numpy(toy, hard, numbers):
  sums = numbers.ratio.sum(-1)
  means = sums / numbers.mask.sum(-1)
  expected = {
    "dpo": logistic(0.1 * (sums[:, 0] - sums[:, 1])).mean(),
    "ipo": np.mean((sums[:, 0] - sums[:, 1] - 5.0) ** 2),
    "ipo_mean": np.mean((means[:, 0] - means[:, 1] - 5.0) ** 2),
  }
  for name, value in expected.items():
    np.testing.assert_allclose(loss_of(toy, hard.shared, name)["loss"], value, rtol=1e-5)


def test_tdpo_in_numpy(toy, hard, numbers):
  """K is the sum over a response of KL(reference ‖ policy), of full distributions."""
  sums, kl = numbers.ratio.sum(-1), (numbers.kl * numbers.mask).sum(-1)
  inner = sums[:, 0] - sums[:, 1] - 0.5 * (kl[:, 1] - kl[:, 0])
  found = loss_of(toy, hard.shared, "tdpo", beta=0.2)["loss"]
  np.testing.assert_allclose(found, logistic(0.2 * inner).mean(), rtol=1e-5)


def test_ld_dpo_and_step_dpo_in_numpy(toy, hard, numbers):
  lengths = numbers.mask.sum(-1)
  assert (lengths[:, 0] != lengths[:, 1]).sum() >= 6
  place = np.cumsum(numbers.mask, axis=-1)
  weight = np.where(place > lengths.min(axis=1)[:, None, None], 0.25, 1.0)
  sums = (weight * numbers.ratio).sum(-1)
  found = loss_of(toy, hard.shared, "ld_dpo", beta=0.3, alpha=0.25)["loss"]
  np.testing.assert_allclose(found, logistic(0.3 * (sums[:, 0] - sums[:, 1])).mean(), rtol=1e-5)
  steps = (hard.padded["step_mask"][:, :, 1:] * numbers.ratio).sum(-1)
  found = loss_of(toy, hard.shared, "step_dpo", beta=0.3)["loss"]
  np.testing.assert_allclose(found, logistic(0.3 * (steps[:, 0] - steps[:, 1])).mean(), rtol=1e-5)


def test_r_dpo_and_slic_in_numpy(toy, hard, numbers):
  """The lengths are those of the scored tokens, and SLiC is regularised to the chosen answer."""
  sums, lengths = numbers.ratio.sum(-1), numbers.mask.sum(-1)
  inner = 0.1 * (sums[:, 0] - sums[:, 1]) + 0.05 * (lengths[:, 0] - lengths[:, 1])
  found = loss_of(toy, hard.shared, "r_dpo", alpha=0.05)["loss"]
  np.testing.assert_allclose(found, logistic(inner).mean(), rtol=1e-5)
  logps = (numbers.logprobs * numbers.mask).sum(-1)
  expected = np.maximum(0.0, 2.0 - logps[:, 0] + logps[:, 1]) - 0.3 * logps[:, 0]
  found = loss_of(toy, hard.shared, "slic", delta=2.0, sft_weight=0.3)["loss"]
  np.testing.assert_allclose(found, expected.mean(), rtol=1e-5)


def wpo_of(numbers):
  size = numbers.mask.sum(-1)
  means = ((numbers.logprobs - numbers.collision) * numbers.mask).sum(-1) / size
  return np.minimum(1.0, np.exp(means.sum(axis=1)))


def test_wpo_weighs_a_pair_by_how_likely_it_is_to_be_said(toy, hard, numbers):
  """The mean is over the pairs that are there, not over their weights, which have no gradient."""
  model, policy, ref = toy
  weight, sums = wpo_of(numbers), numbers.ratio.sum(-1)
  values = loss_of(toy, hard.shared, "dpo", wpo=True)
  losses = logistic(0.1 * (sums[:, 0] - sums[:, 1]))
  assert 0 < weight.min() < 0.5 * weight.max()
  np.testing.assert_allclose(values["loss"], np.mean(weight * losses), rtol=1e-5)
  np.testing.assert_allclose(values["wpo/weight"], weight.mean(), rtol=1e-5)
  frozen = {"ref": ref}
  constant = dict(hard.padded, weight=weight.astype(np.float32))
  expected = jax.grad(lambda p: objective_of(model, "dpo")(p, frozen, constant, None)[0])(policy)
  weighed = objective_of(model, "dpo", wpo=True)
  found = jax.grad(lambda p: weighed(p, frozen, hard.shared, None)[0])(policy)
  for a, b in zip(*map(jax.tree.leaves, (found, expected))):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


MIXTURES = [
  {"dpo": 1.0, "sft": 0.2},
  {"sft": 0.2, "dpo": 1.0},
  {"simpo": 0.5, "ipo": 0.1, "bco": 2.0},
  {"aot": 1.0, "dpop": 0.5},
  {"tdpo": 1.0, "orpo": 0.1},
]


@pytest.mark.parametrize("shares", MIXTURES, ids=" + ".join)
@pytest.mark.parametrize("wpo", [False, True])
def test_a_mixture_is_the_weighted_sum_of_its_members(toy, hard, soft, shares, wpo):
  if wpo and "aot" in shares:
    return  # refused, see preferences_test
  model, policy, ref = toy
  frozen, batch = {"ref": ref, "shift": SHIFT}, batches_for(next(iter(shares)), hard, soft).shared
  name = " + ".join(f"{name}*{share}" for name, share in shares.items())
  values, grads = run(objective_of(model, name, wpo=wpo), policy, frozen, batch)
  alone = {m: run(objective_of(model, m, wpo=wpo), policy, frozen, batch) for m in shares}
  total = sum(share * alone[m][0]["loss"] for m, share in shares.items())
  np.testing.assert_allclose(values["loss"], total, rtol=1e-5)
  for member in shares:
    np.testing.assert_allclose(values[f"loss/{member}"], alone[member][0]["loss"], rtol=1e-5)
  expected = jax.tree.map(
    lambda *parts: sum(s * g for s, g in zip(shares.values(), parts)),
    *(alone[m][1] for m in shares),
  )
  for a, b in zip(*map(jax.tree.leaves, (grads, expected))):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize(
  "mixture, lead", [("sft + dpo", "dpo"), ("dpo + sft", "dpo"), ("ipo_mean + bco", "bco")]
)
def test_the_rewards_of_a_mixture_are_those_of_its_leading_loss(toy, hard, mixture, lead):
  """A member that reads means must not turn DPO's rewards to means, nor move BCO's shift."""
  found, expected = (loss_of(toy, hard.shared, name) for name in (mixture, lead))
  for name in ("rewards/chosen", "rewards/rejected", "rewards/margin", "rewards/accuracy"):
    assert found[name] == expected[name]
  other = loss_of(toy, hard.shared, "ipo_mean")
  assert abs(other["rewards/chosen"] - expected["rewards/chosen"]) > 1e-3  # the control
