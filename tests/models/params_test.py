"""Parameters: described without being made, and made as described."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax import models

CONFIG = models.ModelConfig(
  vocab_size=600, embed_dim=64, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=96,
  tie_embeddings=False, qkv_bias=True, qk_norm=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
  return models.Transformer(CONFIG)


@pytest.fixture(scope="module")
def params(model):
  return models.init_params(model, jax.random.key(0))


def test_the_description_is_of_what_is_made(model, params):
  same = lambda x, y: x.shape == y.shape and x.dtype == y.dtype  # noqa: E731
  assert all(jax.tree.leaves(jax.tree.map(same, params, models.abstract_params(model))))
  assert type(params) is dict and type(params["layers"]) is dict


def test_every_axis_of_every_array_is_named(model, params):
  axes = models.logical_axes(model)
  jax.tree.map(lambda x, names: np.testing.assert_equal(len(names), x.ndim), params, axes)
  assert axes["embedding"] == ("vocab", "columns")
  assert axes["layers"]["query"] == ("layers", "embed", "heads", "head_dim")
  assert axes["layers"]["key_bias"] == ("layers", "kv_heads", "head_dim")
  assert axes["layers"]["down"] == ("layers", "mlp", "embed")


def test_the_count_by_hand(model):
  matrices = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96
  vectors = 64 + 2 * 32 + 2 * 16 + 2 * 64
  assert models.num_params(model) == 3 * (matrices + vectors) + 2 * 600 * 64 + 64


def test_initial_scales(params):
  layers = params["layers"]
  for name, std in [("query", 64**-0.5), ("out", (64 * 6) ** -0.5), ("down", (96 * 6) ** -0.5)]:
    assert float(layers[name].std()) == pytest.approx(std, rel=0.05), name
  assert float(params["embedding"].std()) == pytest.approx(1.0, rel=0.05)
  assert (layers["mlp_norm"] == 1).all() and (layers["query_bias"] == 0).all()
  assert not np.allclose(layers["gate"][0], layers["gate"][1]), "layers must not start alike"


def test_a_tied_table_starts_small():
  config = dataclasses.replace(CONFIG, tie_embeddings=True, num_layers=1)
  params = models.init_params(models.Transformer(config), jax.random.key(0))
  assert "unembedding" not in params
  assert float(params["embedding"].std()) == pytest.approx(0.02, rel=0.05)


def test_the_cache_has_the_type_asked_for(model):
  cache = models.init_cache(model, 2, 7, "bfloat16")["layers"]
  assert cache["keys"].shape == cache["values"].shape == (3, 2, 2, 7, 16)
  assert cache["keys"].dtype == jnp.bfloat16
