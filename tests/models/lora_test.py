"""Adapters: nothing at first, the merged weights afterwards, and only what is asked for."""

import dataclasses

import jax
import numpy as np
import pytest

from align_jax import models, sharding


@pytest.fixture(scope="module")
def subject(tiny_model):
  model, params = tiny_model
  return dataclasses.replace(model, lora_scale=1.5), params, np.arange(24).reshape(2, 12)


def test_a_fresh_adapter_is_the_identity(subject):
  model, params, tokens = subject
  lora = models.init_lora(jax.random.key(0), model, rank=3)
  adapted = model.apply({"params": params, "lora": lora}, tokens)
  np.testing.assert_allclose(adapted, model.apply({"params": params}, tokens), atol=1e-6)


def test_its_first_gradient_is_not_zero(subject):
  """Of b, while a waits: an adapter of two zeros would never move."""
  model, params, tokens = subject
  lora = models.init_lora(jax.random.key(0), model, rank=3, targets=("query", "down"))
  loss = lambda lora: models.token_logprobs(model, {"params": params, "lora": lora}, tokens).sum()  # noqa: E731
  for adapter in jax.jit(jax.grad(loss))(lora)["layers"].values():
    assert np.abs(adapter["b"]).max() > 1e-3
    np.testing.assert_allclose(adapter["a"], 0.0, atol=1e-6)


@pytest.mark.parametrize("targets", [("query",), ("out", "gate"), models.lora.transformer.WEIGHTS])
def test_merged_equals_apart(subject, targets):
  model, params, tokens = subject
  lora = models.init_lora(jax.random.key(0), model, rank=3, targets=targets)
  lora = jax.tree.map(lambda x: x + 0.2, lora)
  apart = jax.jit(model.apply)({"params": params, "lora": lora}, tokens)
  merged = jax.jit(model.apply)(
    {"params": models.merge_lora(params, lora, model.lora_scale)}, tokens
  )
  scale = np.abs(apart).max()
  np.testing.assert_allclose(apart / scale, merged / scale, atol=5e-6)
  assert np.abs(apart - model.apply({"params": params}, tokens)).max() > 0.01


def test_axes_match_and_can_be_sharded(subject):
  model, _, _ = subject
  lora = jax.eval_shape(lambda key: models.init_lora(key, model, rank=4), jax.random.key(0))
  mesh = sharding.make_mesh(sharding.MeshConfig(1, 4, 2), jax.devices())
  shardings = sharding.tree_shardings(models.lora_axes(lora), lora, mesh)
  assert shardings["layers"]["out"]["a"].spec[1] == "tensor"
  assert shardings["layers"]["up"]["b"].spec[2] == "tensor"


@pytest.mark.parametrize("wrong", [dict(targets=("q_proj",)), dict(targets=()), dict(rank=0)])
def test_unknown_targets_and_ranks_raise(subject, wrong):
  with pytest.raises(ValueError, match="LoRA"):
    models.init_lora(jax.random.key(0), subject[0], **{"rank": 2, **wrong})


@pytest.fixture(scope="module")
def int8(subject):
  """(int8 base, the float32 weights that it stands for)."""
  params = subject[1]
  base = models.quantise_base(params)
  return base, models.merge_lora(base, {"layers": {}}, 1.0)


def test_an_int8_weight_is_off_by_half_a_step_at_most(subject, int8):
  """A step of an output is its own largest weight over 127.5, and nothing else is touched."""
  _, params, _ = subject
  base, meant = int8
  matrices = models.lora.transformer.WEIGHT_AXES
  for name, (inputs, _) in matrices.items():
    weight, axes = np.asarray(params["layers"][name]), tuple(range(1, 1 + len(inputs)))
    step = np.abs(weight).max(axes, keepdims=True) / 127.5
    off = np.abs(weight - meant["layers"][name])
    assert (off <= step * 0.5001).all()
    assert off.max() > 0.3 * step.max()  # it was rounded
    assert base["layers"][name].qvalue.dtype == np.int8
  others = set(params["layers"]) - set(matrices)
  assert others
  assert all(base["layers"][name] is params["layers"][name] for name in others)
  assert base["embedding"] is params["embedding"]


def test_adapters_learn_on_an_int8_base_as_on_what_it_stands_for(subject, int8):
  model, params, tokens = subject
  lora = models.init_lora(jax.random.key(0), model, rank=3)
  lora = jax.tree.map(lambda x: x + 0.1, lora)

  @jax.jit
  def value_and_grad(base, lora):
    loss = lambda lora: models.token_logprobs(model, {"params": base, "lora": lora}, tokens).sum()  # noqa: E731
    return jax.value_and_grad(loss)(lora)

  base, meant = int8
  value, grads = value_and_grad(base, lora)
  wanted, wanted_grads = value_and_grad(meant, lora)
  np.testing.assert_allclose(value, wanted, rtol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()), grads, wanted_grads
  )
  assert abs(value - value_and_grad(params, lora)[0]) > 1e-4  # and not as on the float32 weights


def test_an_int8_base_is_split_like_the_weights(subject, int8):
  model, _, tokens = subject
  base, _ = int8
  mesh = sharding.make_mesh(sharding.MeshConfig(1, 4, 2), jax.devices())
  where = sharding.tree_shardings(models.logical_axes(model), base, mesh)
  whole = sharding.tree_shardings(models.logical_axes(model), models.abstract_params(model), mesh)
  assert where["layers"]["up"].qvalue == whole["layers"]["up"]
  assert where["layers"]["up"].scale.spec == jax.sharding.PartitionSpec(None, None, "tensor")
  rows = np.concatenate([tokens, tokens])
  split = jax.jit(model.clone(mesh=mesh).apply)({"params": jax.device_put(base, where)}, rows)
  np.testing.assert_allclose(split, jax.jit(model.apply)({"params": base}, rows), atol=2e-5)
