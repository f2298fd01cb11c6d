"""Our reader of GGUF against the package's own, and against files cut short."""

import gguf
import numpy as np
import pytest

from align_jax.errors import InputError
from align_jax.models import gguf_reader


@pytest.fixture
def path(tmp_path):
  rng = np.random.default_rng(0)
  writer = gguf.GGUFWriter(tmp_path / "some.gguf", "llama")
  writer.add_uint32("some.count", 7)
  writer.add_float32("some.scale", 0.25)
  writer.add_bool("some.flag", True)
  writer.add_string("some.text", "füße")
  writer.add_array("some.texts", ["a", "", "ß"])
  writer.add_array("some.numbers", [3, -1, 2])
  writer.add_array("some.floats", [0.5, -1.5])
  writer.add_tensor("plain", rng.normal(size=(3, 5)).astype(np.float32))
  writer.add_tensor("half", rng.normal(size=(4,)).astype(np.float16))
  for kind in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1):
    matrix = rng.normal(size=(3, 64)).astype(np.float32)
    writer.add_tensor(kind.name, gguf.quants.quantize(matrix, kind), raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return tmp_path / "some.gguf"


def test_it_reads_what_the_package_reads(path):
  fields, tensors = gguf_reader.read(path)
  reference = gguf.GGUFReader(path)
  theirs = {n: f.contents() for n, f in reference.fields.items() if not n.startswith("GGUF.")}
  assert fields == theirs and fields["some.text"] == "füße"
  assert set(tensors) == {t.name for t in reference.tensors}
  for tensor in reference.tensors:
    ours = tensors[tensor.name]
    assert ours.shape == tuple(reversed(tensor.shape.tolist())) and ours.type == tensor.tensor_type
    np.testing.assert_array_equal(
      gguf.quants.dequantize(ours.data, ours.type),
      gguf.quants.dequantize(tensor.data, tensor.tensor_type),
    )


def test_every_cut_is_noticed(path):
  whole = path.read_bytes()
  for length in [*range(0, len(whole) - 32, 37)]:
    path.write_bytes(whole[:length])
    with pytest.raises(InputError, match="some.gguf is no readable GGUF"):
      gguf_reader.read(path)


def test_other_versions_are_named(path):
  path.write_bytes(b"GGUF\x01\x00\x00\x00" + path.read_bytes()[8:])
  with pytest.raises(InputError, match="version is 1"):
    gguf_reader.read(path)


def test_no_file(tmp_path):
  with pytest.raises(InputError, match="does not exist"):
    gguf_reader.read(tmp_path / "none.gguf")
