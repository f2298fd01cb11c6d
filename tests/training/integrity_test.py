"""Checksums of arrays: one number by two ways of counting, and another for any change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax import sharding
from align_jax.training import integrity


def arrays(dtype):
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.integers(0, 2 if dtype == "bool" else 99, shape)).astype(dtype)
          for shape in ((), (1,), (7,), (3, 5), (2, 3, 4))]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_on_the_host_and_on_the_device_it_is_the_same_number(dtype, monkeypatch):
  here = integrity.checksums(arrays(dtype))
  monkeypatch.setattr(integrity, "_SMALL", -1)
  assert integrity.checksums(arrays(dtype)) == here
  mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=4), jax.devices()[:4])
  x = jnp.arange(32, dtype="float32").reshape(8, 4)
  spread = jax.device_put(x, sharding.batch_sharding(mesh))
  assert integrity.checksums({"x": spread}) == integrity.checksums({"x": x})


def test_any_one_bit_of_any_one_number_changes_the_sum():
  """For certain, not only probably: all 32 bits of a few numbers, all at once different."""
  x = np.random.default_rng(0).normal(size=9).astype(np.float32)
  sums = [integrity.checksums({"x": x})["x"]]
  for place in (0, 4, 8):
    for bit in range(32):
      y = x.copy()
      y.view(np.uint32)[place] ^= np.uint32(1 << bit)
      sums.append(integrity.checksums({"x": y})["x"])
  assert len(set(sums)) == len(sums)


def test_changes_that_would_cancel_in_a_plain_sum_do_not():
  x = np.random.default_rng(0).normal(size=64).astype(np.float32)
  signs, swapped, rolled, zeros = x.copy(), x.copy(), np.roll(x, 1), x * 0
  signs[[3, 40]] *= -1  # the top bit of two
  swapped[[3, 40]] = swapped[[40, 3]]
  sums = {integrity.checksums({"x": y})["x"] for y in (x, signs, swapped, rolled, zeros)}
  assert len(sums) == 5


@pytest.mark.parametrize("bit", [0, 15, 31])
def test_the_same_bit_of_any_two_numbers_does_not_cancel(bit):
  """Seen with too little mixing: half of all pairs of signs did."""
  x = np.random.default_rng(0).normal(size=40).astype(np.float32)
  start = integrity.checksums({"x": x})["x"]
  for i in range(40):
    for j in range(i):
      y = x.copy()
      y.view(np.uint32)[[i, j]] ^= np.uint32(1 << bit)
      assert integrity.checksums({"x": y})["x"] != start


def test_keys_of_random_numbers_count_as_well():
  one, other = (integrity.checksums({"rng": jax.random.key(seed)}) for seed in (0, 1))
  assert one != other and one == integrity.checksums({"rng": jax.random.key(0)})


def test_a_record_is_unsealed_only_as_it_was_sealed():
  import json

  text = json.dumps(integrity.seal({"data": {"window": 12}, "b": [1.5, None]}))
  assert integrity.unseal(text) == {"data": {"window": 12}, "b": [1.5, None]}
  for wrong in (
    text.replace("12", "13"),
    text[:-1],
    "[]",
    "{}",
    "null",
    text.replace("1.5", "1.4"),
  ):
    with pytest.raises(integrity.Damaged):
      integrity.unseal(wrong)
