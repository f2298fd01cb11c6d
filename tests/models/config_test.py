"""A configuration that cannot be built says why."""

import dataclasses

import pytest

from align_jax import models


@pytest.mark.parametrize(
  "wrong, said",
  [
    (dict(num_heads=4, num_kv_heads=3), "num_kv_heads 3"),
    (dict(head_dim=7), "head_dim"),
    (dict(num_layers=0), "num_layers"),
    (dict(remat="some"), "remat"),
    (dict(activation="relu"), "relu"),
    (dict(dtype="int8"), "int8"),
    (dict(attention_impl="flash"), "flash"),
    (dict(sliding_window=0), "sliding_window"),
    (dict(local_layers=(True,), sliding_window=4), "local_layers"),
    (dict(local_layers=(True,) * 4), "sliding_window"),
  ],
)
def test_contradictions_are_named(wrong, said):
  with pytest.raises(ValueError, match=said):
    models.ModelConfig(**wrong)


def test_unknown_rope_scaling_is_named():
  with pytest.raises(ValueError, match="yarn"):
    models.RopeScaling("yarn", 2.0)


def test_it_is_hashable_and_frozen():
  config = models.ModelConfig(rope_scaling=models.RopeScaling("linear", 2.0))
  assert hash(config) == hash(dataclasses.replace(config))
  with pytest.raises(dataclasses.FrozenInstanceError):
    config.vocab_size = 3


def test_windows_are_everywhere_unless_layers_are_named():
  assert models.ModelConfig(num_layers=2).windowed == (False, False)
  assert models.ModelConfig(num_layers=2, sliding_window=8).windowed == (True, True)
  mixed = models.ModelConfig(num_layers=2, sliding_window=8, local_layers=(True, False))
  assert mixed.windowed == (True, False)
