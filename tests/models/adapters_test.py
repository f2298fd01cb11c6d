"""PEFT's folder, without PEFT: written, read, and refused where it says what we cannot do."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from align_jax import models
from align_jax.errors import InputError


@pytest.fixture
def saved(llama, tmp_path):
  model = dataclasses.replace(llama[0], lora_scale=2.0)
  lora = models.init_lora(jax.random.key(0), model, rank=4, targets=("query", "out", "down"))
  lora = jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(1), x.shape), lora)
  models.save_adapter(str(tmp_path), model, lora, base="some/base")
  return tmp_path, llama[0], lora


def respell(folder, **fields):
  path = folder / "adapter_config.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_it_returns_as_it_was(saved):
  folder, base, lora = saved
  model, loaded = models.load_adapter(str(folder), base)
  assert model.lora_scale == 2.0 and model.config == base.config
  assert jax.tree.structure(loaded) == jax.tree.structure(lora)
  jax.tree.map(np.testing.assert_array_equal, loaded, lora)


def test_names_and_shapes_are_those_of_peft(saved):
  folder, base, _ = saved
  tensors = safetensors_numpy.load_file(folder / "adapter_model.safetensors")
  module = "base_model.model.model.layers.2.mlp.down_proj"
  assert tensors[f"{module}.lora_A.weight"].shape == (4, base.config.mlp_dim)
  assert tensors[f"{module}.lora_B.weight"].shape == (base.config.embed_dim, 4)
  assert len(tensors) == 3 * 2 * base.config.num_layers
  config = json.loads((folder / "adapter_config.json").read_text())
  assert config["target_modules"] == ["down_proj", "o_proj", "q_proj"]
  assert (config["r"], config["lora_alpha"]) == (4, 8.0)


def test_rank_stabilised_scale(saved):
  folder, base, _ = saved
  respell(folder, use_rslora=True, lora_alpha=6)
  assert models.load_adapter(str(folder), base)[0].lora_scale == 3.0


@pytest.mark.parametrize(
  "fields, said",
  [
    (dict(peft_type="IA3"), "IA3"),
    (dict(use_dora=True), "use_dora"),
    (dict(bias="all"), "bias"),
    (dict(modules_to_save=["lm_head"]), "modules_to_save"),
    (dict(rank_pattern={"q_proj": 8}), "rank_pattern"),
    (dict(target_modules=["q_proj", "lm_head"]), "lm_head"),
    (dict(target_modules="all-linear"), "all-linear"),
    (dict(target_modules=["q_proj", "o_proj", "down_proj", "v_proj"]), "v_proj.lora_A"),
    (dict(target_modules=["q_proj", "o_proj"]), "down_proj"),
    (dict(r=3), "shape"),
  ],
)
def test_what_does_not_fit_is_named(saved, fields, said):
  folder, base, _ = saved
  respell(folder, **fields)
  with pytest.raises(InputError, match=said):
    models.load_adapter(str(folder), base)


def test_no_adapter(tmp_path, llama):
  with pytest.raises(InputError, match="adapter_config.json"):
    models.load_adapter(str(tmp_path), llama[0])
