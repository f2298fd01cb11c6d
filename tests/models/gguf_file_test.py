"""GGUF files written here, with llama.cpp's row order and norms, and read back."""

import dataclasses

import gguf
import jax
import numpy as np
import pytest

from align_jax import models
from align_jax.errors import InputError
from align_jax.models import layout
from align_jax.models.families import FAMILIES, names


def permuted(matrix, heads):
  """llama.cpp's order of q and k rows: the halves of a head interleaved."""
  halves = matrix.reshape(heads, 2, -1, matrix.shape[-1])
  return halves.swapaxes(1, 2).reshape(matrix.shape)


def write(path, model, params, *, quantise=False, skip=(), extra=()):
  c = model.config
  arch = FAMILIES[c.family].gguf
  writer = gguf.GGUFWriter(path, arch)
  writer.add_block_count(c.num_layers)
  writer.add_context_length(c.max_length)
  writer.add_embedding_length(c.embed_dim)
  writer.add_feed_forward_length(c.mlp_dim)
  writer.add_head_count(c.num_heads)
  writer.add_head_count_kv(c.num_kv_heads)
  writer.add_key_length(c.head_dim)
  writer.add_layer_norm_rms_eps(c.norm_eps)
  writer.add_rope_freq_base(c.rope_theta)
  if c.sliding_window:
    writer.add_sliding_window(c.sliding_window)
  for name, value in extra:
    writer.add_string(name, value)
  hf, ours = names(c.post_norms, "hf"), names(c.post_norms, "gguf")
  back = {hf[n].format(i): ours[n].format(i) for n in hf for i in range(c.num_layers)}
  for name, tensor in layout.disassemble(c, params):
    name, tensor = back[name], np.asarray(tensor, np.float32)
    if name in skip:
      continue
    if arch == "llama" and name.endswith("attn_q.weight"):
      tensor = permuted(tensor, c.num_heads)
    if arch == "llama" and name.endswith("attn_k.weight"):
      tensor = permuted(tensor, c.num_kv_heads)
    if c.norm_plus_one and tensor.ndim == 1:
      tensor = tensor + 1.0
    if quantise and tensor.ndim == 2:
      kind = gguf.GGMLQuantizationType.Q8_0
      writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    else:
      writer.add_tensor(name, tensor)
  finish(writer)


def finish(writer):
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


@pytest.fixture
def path(tmp_path):
  return tmp_path / "model.gguf"


def plain_rope(model):
  """GGUF has no word for llama3's rope scaling."""
  return dataclasses.replace(model, config=dataclasses.replace(model.config, rope_scaling=None))


def test_llama_comes_back_with_its_rows_in_order(llama, path):
  model, params = plain_rope(llama[0]), llama[1]
  write(path, model, params)
  again, loaded = models.load_pretrained(str(path))
  assert again.config == model.config
  jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_quantised_matrices_come_back_nearly(llama, path):
  model, params = plain_rope(llama[0]), llama[1]
  write(path, model, params, quantise=True)
  _, loaded = models.load_pretrained(str(path))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.01), loaded, params)
  assert (loaded["layers"]["query"] != params["layers"]["query"]).any()


def test_gemma3_norms_and_windows(gemma, path):
  """GGUF keeps norms plus one, and leaves the 5:1 pattern and the local rope base unsaid."""
  model, params = gemma
  write(path, model, params)
  again, loaded = models.load_pretrained(str(path))
  assert again.config.windowed == (True, True, True) and again.config.rope_local_theta == 1e4
  assert again.config.qk_norm and again.config.rope_theta == 1e6
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), loaded, params)


class TestWhatIsWrongIsNamed:
  def fails(self, path, said):
    with pytest.raises(InputError, match=said):
      models.load_pretrained(str(path))

  def test_a_missing_tensor(self, llama, path):
    write(path, plain_rope(llama[0]), llama[1], skip=("blk.1.ffn_up.weight",))
    self.fails(path, "blk.1.ffn_up.weight.*missing")

  def test_rope_scaling_it_does_not_spell_out(self, llama, path):
    write(path, llama[0], llama[1], extra=[("llama.rope.scaling.type", "yarn")])
    self.fails(path, "yarn")

  def test_another_architecture(self, path):
    finish(gguf.GGUFWriter(path, "mamba"))
    self.fails(path, "mamba")

  def test_a_missing_field(self, path):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    finish(writer)
    self.fails(path, "llama.attention.head_count")

  @pytest.mark.parametrize("content", [b"", b"GGUF", b"something else entirely, and long enough"])
  def test_no_gguf(self, path, content):
    path.write_bytes(content)
    self.fails(path, "no readable GGUF")
