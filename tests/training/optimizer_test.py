"""Schedules hit their corner values; weight decay touches matrices only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.errors import InputError
from align_jax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule


def test_schedules_at_their_corners():
  config = OptimizerConfig(learning_rate=1.0, warmup_fraction=0.1, final_fraction=0.1)
  cosine = make_schedule(config, 100)
  np.testing.assert_allclose(
    [cosine(0), cosine(10), cosine(55), cosine(100)], [0.1, 1, 0.55, 0.1], rtol=1e-6
  )
  linear = make_schedule(OptimizerConfig(1.0, schedule="linear", warmup_fraction=0.0), 10)
  np.testing.assert_allclose([linear(0), linear(5), linear(10)], [1.0, 0.55, 0.1], rtol=1e-6)
  constant = make_schedule(OptimizerConfig(0.5, schedule="constant", warmup_fraction=0.0), 10)
  assert constant(9) == 0.5


def test_weight_decay_leaves_vectors_alone():
  params = {
    "layers": {"norm": jnp.ones((2, 3)), "up": jnp.ones((2, 3, 4))},
    "final_norm": jnp.ones(3),
    "embedding": jnp.ones((5, 3)),
  }
  config = OptimizerConfig(1.0, weight_decay=0.5, schedule="constant", warmup_fraction=0.0)
  tx = make_optimizer(config, 10)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = tx.update(zeros, tx.init(params), params)
  moved = {
    jax.tree_util.keystr(k): bool(jnp.any(u != 0))
    for k, u in jax.tree_util.tree_leaves_with_path(updates)
  }
  assert moved == {
    "['embedding']": True,
    "['final_norm']": False,
    "['layers']['norm']": False,
    "['layers']['up']": True,
  }


def test_gradients_are_clipped_by_global_norm():
  tx = make_optimizer(
    OptimizerConfig(1.0, name="sgd", schedule="constant", warmup_fraction=0.0, grad_clip=1.0), 10
  )
  params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
  updates, _ = tx.update({"a": jnp.full(1, 3.0), "b": jnp.full(1, 4.0)}, tx.init(params), params)
  np.testing.assert_allclose([updates["a"][0], updates["b"][0]], [-0.6, -0.8], rtol=1e-6)


@pytest.mark.parametrize(
  "change",
  [
    {"name": "adan"},
    {"schedule": "cosin"},
    {"learning_rate": 0.0},
    {"name": "sgd", "weight_decay": 0.1},
  ],
)
def test_unusable_settings_are_errors(change):
  with pytest.raises(InputError):
    OptimizerConfig(**{"learning_rate": 1.0} | change)
