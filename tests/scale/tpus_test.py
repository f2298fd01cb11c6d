"""The names of slices: counted in cores or in chips, every size wired, nonsense refused with near names."""

import math

import pytest

from align_jax.errors import InputError
from align_jax.scale import tpus


@pytest.mark.parametrize(
  ("name", "chips", "shape", "hosts", "accelerator"),
  [
    ("v5e-256", 256, (16, 16), 64, "v5litepod-256"),
    ("v5e-8", 8, (2, 4), 1, "v5litepod-8"),
    ("v5litepod-16", 16, (4, 4), 4, "v5litepod-16"),
    ("v6e-16", 16, (4, 4), 4, "v6e-16"),
    ("v4-32", 16, (2, 2, 4), 4, "v4-32"),
    ("v5p-8", 4, (2, 2, 1), 1, "v5p-8"),
    ("V5P-128", 64, (4, 4, 4), 16, "v5p-128"),
    ("v5p-384", 192, (4, 4, 12), 48, "v5p-384"),
    ("v5p-1536", 768, (8, 8, 12), 192, "v5p-1536"),
    ("v5p-12288", 6144, (16, 16, 24), 1536, "v5p-12288"),
    ("v5p:4x4x8", 128, (4, 4, 8), 32, "v5p-256"),
  ],
)
def test_documented_sizes(name, chips, shape, hosts, accelerator):
  slice_ = tpus.parse(name)
  assert (slice_.chips, slice_.shape, slice_.hosts) == (chips, shape, hosts)
  assert slice_.accelerator_type == accelerator and slice_.slices == 1


def test_slices_multiply_devices_and_not_hosts_of_a_slice():
  two = tpus.parse("2xv5p-128")
  assert (two.slices, two.devices, two.hosts, two.name) == (2, 128, 16, "2xv5p-128")


def test_a_chip_of_two_devices_splits_its_memory():
  pair = tpus.parse("tpu7x-128")
  assert pair.devices == 128 and pair.hbm_bytes_per_device == 96 * tpus.GIB


@pytest.mark.parametrize("generation", tpus.GENERATIONS.values(), ids=lambda g: g.name)
def test_every_name_is_read_back(generation):
  for name in generation.names():
    slice_ = tpus.parse(name)
    assert slice_.name == name and math.prod(slice_.shape) == slice_.chips
    assert slice_.hosts * generation.chips_of_one_host >= slice_.chips
    assert tpus.parse(f"{generation.name}:{slice_.topology}") == slice_


@pytest.mark.parametrize(
  ("name", "says"),
  [
    ("v5p128", "did you mean v5p-128"),
    ("v7-8", "did you mean"),
    ("h100-8", "known are"),
    ("v5p-100", "names count TensorCores, 2 a chip"),
    ("v5p-7", "names count TensorCores, 2 a chip"),
    ("v5e-12", "names count chips"),
    ("v6e-512", "not a size"),
    ("v5p:4x4", "no v5p slice has this shape"),
    ("v6e:3x5", "no v6e slice has this shape"),
    ("v5p:0x4x4", "no v5p slice has this shape"),
    ("0xv5p-8", "at least one"),
    ("", "known are"),
    (None, "not a TPU"),
    ("v5p-" + "9" * 60, "not a size"),
  ],
)
def test_nonsense_is_refused_with_what_there_is(name, says):
  with pytest.raises(InputError, match=says):
    tpus.parse(name)
