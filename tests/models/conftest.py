"""One small model of every family, made without Hugging Face."""

import dataclasses

import jax
import pytest

from align_jax import models
from align_jax.models.families import FAMILIES

SMALL = models.ModelConfig(
  vocab_size=40, embed_dim=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=64
)
CHANGES = {
  "llama": dict(
    tie_embeddings=False, rope_scaling=models.RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
  ),
  "mistral": dict(sliding_window=4, tie_embeddings=False),
  "qwen2": dict(tie_embeddings=True),
  "qwen3": dict(tie_embeddings=False),
  "gemma2": dict(
    sliding_window=4, local_layers=(True, False, True), attention_softcap=50.0, logit_softcap=30.0,
    attention_scale=0.25,
  ),
  "gemma3_text": dict(
    sliding_window=4, local_layers=(True, True, False), rope_local_theta=1e4, rope_theta=1e6,
    attention_scale=0.25,
  ),
}  # fmt: skip


def make(family):
  """(model, parameters in which every number differs)."""
  features = {**FAMILIES[family].features, **CHANGES[family]}
  model = models.Transformer(dataclasses.replace(SMALL, family=family, **features))
  leaves, tree = jax.tree.flatten(models.abstract_params(model))
  rngs = jax.random.split(jax.random.key(0), len(leaves))
  params = [0.2 * jax.random.normal(r, x.shape) for r, x in zip(rngs, leaves)]
  return model, jax.tree.unflatten(tree, params)


@pytest.fixture(scope="session", params=CHANGES)
def family_model(request):
  return make(request.param)


@pytest.fixture(scope="session")
def gemma():
  return make("gemma3_text")


@pytest.fixture(scope="session")
def llama():
  return make("llama")
