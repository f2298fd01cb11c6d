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
