"""Mangled model folders, GGUF files and workdirs: read as they were, or refused by the name of the file."""

import json
import pathlib
import shutil

import gguf
import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from align_jax import models, worlds
from align_jax.errors import InputError
from align_jax.evals import lineage
from align_jax.phases import workspace
from align_jax.phases.reward_heads import RewardHead
from align_jax.training import workdir
from tests.fuzz import fuzzing
from tests.fuzz.records_test import DROP, places, put
from tests.models.conftest import make

FAMILIES = ("llama", "qwen2", "gemma3_text")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """A saved model of each family, the first with a tokenizer."""
  made = {}
  for family in FAMILIES:
    made[family] = tmp_path_factory.mktemp(family)
    tokenizer = worlds.Microworld().tokenizer() if family == "llama" else None
    models.save_pretrained(str(made[family]), *make(family), tokenizer=tokenizer)
  return made


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
  path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_context_length(64)
  writer.add_embedding_length(32)
  writer.add_block_count(1)
  writer.add_feed_forward_length(64)
  writer.add_head_count(4)
  writer.add_head_count_kv(2)
  writer.add_key_length(16)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre("smollm")
  writer.add_token_list(["a", "b", "ab", "<s>"])
  writer.add_token_merges(["a b"])
  writer.add_token_types([1, 1, 1, 3])
  writer.add_bos_token_id(3)
  shapes = {
    "token_embd": (40, 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,),
    "blk.0.attn_q": (64, 32), "blk.0.attn_k": (32, 32), "blk.0.attn_v": (32, 32),
    "blk.0.attn_output": (32, 64), "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32),
    "blk.0.ffn_down": (32, 64),
  }  # fmt: skip
  for name, shape in shapes.items():
    writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  models.load_pretrained(str(path))
  models.load_tokenizer(str(path))
  return path


def mangled(draw, value):
  """A JSON value with one part replaced, dropped or added."""
  path = draw.draw(st.sampled_from([path for path in places(value) if path]))
  kind = draw.draw(st.sampled_from(["replace", "replace", "drop"]))
  return put(value, path, DROP if kind == "drop" else draw.draw(fuzzing.VALUES))


def written(draw, content: bytes) -> bytes:
  """Bytes cut, flipped, or with some put in."""
  at = draw.draw(st.integers(0, len(content) - 1))
  cut, other = draw.draw(
    st.sampled_from([(9**9, b""), (1, b"\xff"), (1, b"\0"), (8, b"\xff" * 8), (0, b"x"), (4, b"")])
  )
  return content[:at] + other + content[at + cut :]


def text_of(draw, value) -> bytes:
  try:
    text = json.dumps(value).encode()
  except ValueError:  # a number of more digits than Python writes
    text = b"9" * 5000
  return written(draw, text) if draw.draw(st.integers(0, 3)) == 0 else text


def read_or_refused(read, *names):
  try:
    return read()
  except InputError as error:
    fuzzing.clear(error, *names)
    return None


@pytest.mark.parametrize("family", FAMILIES)
@fuzzing.tried(15)
@hypothesis.given(draw=st.data())
def test_config_json(folders, family, draw):
  folder = folders[family]
  good = (folder / "config.json").read_bytes()
  try:
    (folder / "config.json").write_bytes(text_of(draw, mangled(draw, json.loads(good))))
    read_or_refused(lambda: models.load_pretrained(str(folder)), str(folder))
  finally:
    (folder / "config.json").write_bytes(good)


@fuzzing.tried(30)
@hypothesis.given(draw=st.data())
def test_safetensors(folders, draw):
  folder = folders["llama"]
  file = folder / "model.safetensors"
  good = file.read_bytes()
  header = int.from_bytes(good[:8], "little") + 8
  try:
    if draw.draw(st.booleans()):
      file.write_bytes(written(draw, good[:header]) + good[header:])
    else:
      file.write_bytes(good[: draw.draw(st.integers(0, len(good) - 1))])
    read_or_refused(lambda: models.load_pretrained(str(folder)), str(folder))
  finally:
    file.write_bytes(good)


@fuzzing.tried(15)
@hypothesis.given(draw=st.data())
def test_index_of_shards(folders, tmp_path_factory, draw):
  folder = folders["llama"].parent / "sharded"
  if not folder.exists():
    shutil.copytree(folders["llama"], folder)
  index = {"metadata": {}, "weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}
  file = folder / "model.safetensors.index.json"
  file.write_bytes(text_of(draw, mangled(draw, index)))
  read_or_refused(lambda: models.load_pretrained(str(folder)), str(folder))


@fuzzing.tried(30)
@hypothesis.given(draw=st.data())
def test_tokenizer_files(folders, draw):
  folder = folders["llama"]
  file = folder / draw.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
  good = file.read_bytes()
  try:
    file.write_bytes(text_of(draw, mangled(draw, json.loads(good))))
    read_or_refused(lambda: models.load_tokenizer(str(folder)), str(folder))
  finally:
    file.write_bytes(good)


@fuzzing.tried(60)
@hypothesis.given(draw=st.data())
def test_gguf(gguf_file, draw):
  file = gguf_file.with_name("mangled.gguf")
  good = gguf_file.read_bytes()
  header = good.index(b"blk.0.ffn_down.weight") + 64
  if draw.draw(st.integers(0, 4)):
    file.write_bytes(written(draw, good[:header]) + good[header:])
  else:
    file.write_bytes(good[: draw.draw(st.integers(0, len(good) - 1))])
  read_or_refused(lambda: models.load_pretrained(str(file)), str(file))
  read_or_refused(lambda: models.load_tokenizer(str(file)), str(file))


@fuzzing.tried(60)
@hypothesis.given(draw=st.data())
def test_files_of_a_workdir(tmp_path_factory, draw):
  """model.json, config.json and lineage.json of a run, as a later phase reads them."""
  folder = tmp_path_factory.getbasetemp() / "run"
  folder.mkdir(exist_ok=True)
  section = workspace.ModelSection(init="smollm2")
  settings = {"model": {"init": "smollm2"}, "seed": 0, "objective": {"beta": 0.1}}
  good = {
    "model.json": workspace.config_lib.to_dict(
      workspace.Description("reward", make("llama")[0].config, section.init, head=RewardHead())
    ),
    "config.json": {"phase": "sft"} | settings,
    "lineage.json": {
      "phase": "sft", "workdir": str(folder), "step": 3, "git_revision": "x", "command": "python",
      "parents": [{"role": "policy", "path": "smollm2", "step": None}], "data_fingerprint": "0",
    },
  }  # fmt: skip
  reads = {
    "model.json": lambda: workspace.read_description(folder),
    "config.json": lambda: workdir.open_workdir(folder, "sft", settings),
    "lineage.json": lambda: lineage.load(pathlib.Path(folder)),
  }
  name = draw.draw(st.sampled_from(list(good)))
  (folder / name).write_bytes(text_of(draw, mangled(draw, good[name])))
  read_or_refused(reads[name], str(folder))
  if name == "model.json":
    read_or_refused(lambda: workspace.member_count(str(folder)), str(folder))


def test_without_mangling_all_of_it_is_read(folders, gguf_file):
  for family, folder in folders.items():
    model, params = models.load_pretrained(str(folder))
    same = jax.tree.map(lambda a, b: bool((a == b).all()), params, make(family)[1])
    assert all(jax.tree.leaves(same))
  assert models.load_tokenizer(str(folders["llama"])).vocab_size > 0
