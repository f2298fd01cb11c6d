"""Folders written and read back, onto meshes too; and whatever is wrong with one is named."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from align_jax import models, sharding
from align_jax.errors import InputError
from align_jax.models import safetensors_files


def assert_equal_trees(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def saved(llama, tmp_path):
  """(folder, its tensors), for a test to spoil."""
  models.save_pretrained(str(tmp_path), *llama)
  return tmp_path, safetensors_numpy.load_file(tmp_path / "model.safetensors")


def test_every_family_returns_as_it_was(family_model, tmp_path):
  model, params = family_model
  models.save_pretrained(str(tmp_path), model, params)
  again, loaded = models.load_pretrained(str(tmp_path))
  assert again.config == model.config
  assert_equal_trees(loaded, params)


def test_shards_hold_what_one_file_holds(llama, tmp_path):
  model, params = llama
  models.save_pretrained(str(tmp_path), model, params, shard_bytes=20_000)
  files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
  assert len(files) > 3 and files[0].startswith("model-00001-of-")
  for path in tmp_path.glob("*.safetensors"):
    tensors = safetensors_numpy.load_file(path)
    assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 20_000
  assert_equal_trees(models.load_pretrained(str(tmp_path))[1], params)


def test_nothing_of_an_earlier_checkpoint_stays(llama, gemma, tmp_path):
  models.save_pretrained(str(tmp_path), *llama, shard_bytes=20_000)
  models.save_pretrained(str(tmp_path), *gemma)
  assert_equal_trees(models.load_pretrained(str(tmp_path))[1], gemma[1])
  assert len(list(tmp_path.glob("*.safetensors*"))) == 1


def test_bfloat16_stays_and_dtype_overrides(llama, tmp_path):
  model, params = llama
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  models.save_pretrained(str(tmp_path), model, half)
  assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
  same, loaded = models.load_pretrained(str(tmp_path))
  assert same.config.dtype == same.config.param_dtype == "bfloat16"
  assert_equal_trees(loaded, half)
  wide, loaded = models.load_pretrained(str(tmp_path), dtype="float32")
  assert wide.config.dtype == "float32"
  assert_equal_trees(loaded, jax.tree.map(lambda x: x.astype(jnp.float32), half))


def test_a_mesh_receives_shards_and_nobody_reads_more(gemma, tmp_path, monkeypatch):
  model, params = gemma
  models.save_pretrained(str(tmp_path), model, params)
  mesh = sharding.make_mesh(sharding.MeshConfig(1, 4, 2), jax.devices())
  sizes = []
  read = safetensors_files.Folder.read

  def spy(self, name, rows, columns):
    part = read(self, name, rows, columns)
    sizes.append((name, part.size))
    return part

  monkeypatch.setattr(safetensors_files.Folder, "read", spy)
  _, loaded = models.load_pretrained(str(tmp_path), mesh=mesh)
  assert_equal_trees(loaded, params)
  where = sharding.tree_shardings(models.logical_axes(model), params, mesh)
  assert jax.tree.map(lambda x: x.sharding, loaded) == where
  c = model.config
  assert max(s for n, s in sizes if "embed_tokens" in n) == c.vocab_size * c.embed_dim // 8
  assert max(s for n, s in sizes if "gate_proj" in n) == c.mlp_dim * c.embed_dim // 8


def test_an_adapter_is_merged_on_the_way_out(llama, tmp_path):
  model, params = llama
  lora = models.init_lora(jax.random.key(0), model, rank=2, targets=("out",))
  lora = jax.tree.map(lambda x: x + 1.0, lora)
  models.save_pretrained(str(tmp_path), model, params, lora=lora)
  assert_equal_trees(
    models.load_pretrained(str(tmp_path))[1], models.merge_lora(params, lora, model.lora_scale)
  )


class TestWhatIsWrongIsNamed:
  def fails(self, folder, *said):
    with pytest.raises(InputError) as caught:
      models.load_pretrained(str(folder))
    for text in said:
      assert text in str(caught.value)

  def rewrite(self, folder, tensors):
    safetensors_numpy.save_file(tensors, folder / "model.safetensors")

  def test_a_missing_tensor(self, saved):
    folder, tensors = saved
    del tensors["model.layers.1.mlp.up_proj.weight"]
    self.rewrite(folder, tensors)
    self.fails(folder, "model.layers.1.mlp.up_proj.weight", "missing")

  def test_an_unexpected_tensor(self, saved):
    folder, tensors = saved
    self.rewrite(folder, {**tensors, "model.layers.0.self_attn.q_proj.bias": np.zeros(64)})
    self.fails(folder, "model.layers.0.self_attn.q_proj.bias", "no place in a llama")

  def test_a_wrong_shape(self, saved):
    folder, tensors = saved
    name = "model.layers.2.self_attn.q_proj.weight"
    self.rewrite(folder, {**tensors, name: tensors[name].T.copy()})
    self.fails(folder, name, "[32, 64], not [64, 32]")

  def test_another_vocabulary(self, saved):
    folder, _ = saved
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 41}))
    self.fails(folder, "model.embed_tokens.weight", "[40, 32], not [41, 32]")

  def test_tensors_of_integers(self, saved):
    folder, tensors = saved
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int32)
    self.rewrite(folder, tensors)
    self.fails(folder, "model.norm.weight", "I32")

  def test_a_truncated_file(self, saved):
    folder, _ = saved
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    self.fails(folder, "model.safetensors")

  def test_a_shard_that_is_not_there(self, llama, tmp_path):
    models.save_pretrained(str(tmp_path), *llama, shard_bytes=20_000)
    next(iter(sorted(tmp_path.glob("model-00002*")))).unlink()
    self.fails(tmp_path, "model-00002")

  def test_no_weights(self, saved):
    folder, _ = saved
    (folder / "model.safetensors").unlink()
    self.fails(folder, "model.safetensors")

  @pytest.mark.parametrize("text, said", [("{", "no JSON"), ("[]", "object")])
  def test_a_broken_config(self, saved, text, said):
    (saved[0] / "config.json").write_text(text)
    self.fails(saved[0], "config.json", said)

  def test_no_config(self, tmp_path):
    self.fails(tmp_path, "config.json does not exist")

  def test_an_unknown_name(self):
    self.fails("smollm3", "smollm3", "smollm2")

  def test_a_hub_that_does_not_answer(self, monkeypatch):
    def download(name, **_):
      assert name == "org/name"
      raise OSError("no route\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    self.fails("hf:org/name", "hf:org/name", "no route")

  def test_no_tokenizer(self, saved):
    with pytest.raises(InputError, match="tokenizer"):
      models.load_tokenizer(str(saved[0]))
