"""Attention by tiles and over a mesh is attention by its definition, and never holds [T, T] scores."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from align_jax import models
from align_jax.models import attention, blockwise, context_attention
from tests.models.whole_rows import AXES, Case, compare

LENGTH = 96


@pytest.fixture
def small_tiles(monkeypatch):
  monkeypatch.setattr(blockwise, "BLOCK", 16)
  monkeypatch.setattr(blockwise, "SERIAL_BLOCK", 16)


@pytest.mark.parametrize(
  "case",
  [
    Case(LENGTH, "blockwise", branches=False, window=9),
    Case(LENGTH - 7, "blockwise", window=9, softcap=3.0),  # padded to whole tiles
    Case(LENGTH, "blockwise", branches=False, segments=False),
    Case(LENGTH, "blockwise", mesh=(1, 1, 1, 1), window=9, softcap=3.0),  # heads one by one
    Case(LENGTH - 7, "blockwise", mesh=(1, 1, 1, 1), branches=False),
    Case(LENGTH, "blockwise", mesh=(2, 1, 2, 2), window=9),
    Case(LENGTH, "blockwise", mesh=(1, 1, 2, 4), softcap=3.0),  # four devices share two key heads
    Case(LENGTH, "blockwise", mesh=(1, 1, 8, 1), branches=False),
    Case(LENGTH, "blockwise", mesh=(1, 4, 1, 2), kv_heads=3, group=1),  # nothing divides
  ],
  ids=str,
)
def test_tiles_are_attention_by_its_definition(case, small_tiles):
  assert compare(case) < 3e-6


def test_a_window_longer_by_one_is_told_apart(small_tiles):
  assert compare(Case(LENGTH, "blockwise", window=9), wrong_window=10) > 1e-2


@pytest.mark.parametrize("of", ["segments", "branches"])
@pytest.mark.parametrize("serial", [False, True])
def test_tiles_that_nobody_sees_are_skipped(serial, of, small_tiles):
  """Keys and values out of sight are NaN: looked at, even a weight of 0 would carry them on.

  Of branches: a trunk of 16 tokens, a branch of 16 that is NaN, and one of 32 behind it, whose tokens
  see the trunk, of value 3, and their own, of value 1, with equal weights.
  """
  ids, one = jnp.arange(64)[None], jnp.ones((1, 64), jnp.int32)
  x = jnp.ones((1, 64, 1, 1, 4))
  unseen = slice(0 if of == "segments" else 16, 32)
  poisoned = jnp.ones((1, 64, 1, 4)).at[:, unseen].set(jnp.nan)

  def found(start):
    """Outputs behind place 32, and the gradient of their sum by the keys that they see."""
    branches = jnp.where(ids < 16, 0, jnp.where(ids < start, 1, 2))
    rows = attention.Rows(
      ids, ids, *((1 + (ids >= start), None) if of == "segments" else (one, branches))
    )
    how = blockwise.Options(1.0, None, None, serial=serial)

    def output(k):
      v = k.at[:, :16].mul(3.0)
      return blockwise.attend(x, k, v, rows, rows, how)[:, 32:]

    gradient = jax.vjp(output, poisoned)[1](jnp.ones((1, 32, 1, 1, 4)))[0]
    return output(poisoned), gradient[:, 32:]

  own, trunk = np.arange(1, 33), 16 if of == "branches" else 0
  outputs, gradient = found(32)
  expected = np.broadcast_to(
    ((3 * trunk + own) / (trunk + own))[None, :, None, None, None], outputs.shape
  )
  np.testing.assert_allclose(outputs, expected, rtol=1e-6)
  assert np.isfinite(gradient).all()
  outputs, gradient = found(33)  # the control: those before reach into the tile behind 32
  assert np.isnan(outputs).any() and np.isnan(gradient).any()


def test_rows_that_do_not_split_are_refused():
  with pytest.raises(ValueError, match="98 tokens do not split over 4 parts"):
    compare(Case(98, "blockwise", mesh=(2, 1, 4, 1)))


def scores_held(impl, length):
  """Shapes with `length` twice in a compiled forward and backward pass."""
  q = jax.ShapeDtypeStruct((1, length, 2, 2, 8), jnp.float32)
  k = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
  ids = jnp.arange(length)[None]
  rows = attention.Rows(ids, ids, ids // 100, None)

  def loss(q, k, v):
    if impl == "xla":
      mask = attention.sequence_mask(length, rows.segment_ids, None)
      probs = attention.attention_probs(q, k, mask, scale=1.0, softcap=None)
      return attention.attend(probs, v).sum()
    return context_attention.attend(
      q, k, v, rows, None, impl=impl, mesh=context_attention.ambient(None), scale=1.0, softcap=None
    ).sum()

  compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k).compile()
  shapes = re.findall(r"\w+\[([\d,]+)\]", compiled.as_text())
  return {s for s in shapes if s.split(",").count(str(length)) > 1}


def test_no_array_holds_all_scores():
  assert not scores_held("blockwise", 2048)
  assert scores_held("xla", 2048)


MIXED = models.ModelConfig(
  vocab_size=50, embed_dim=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48,
  sliding_window=5, local_layers=(True, False, True), attention_softcap=20.0, remat="dots",
)  # fmt: skip
SIZE = 48


def model_inputs():
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 50, (2, SIZE)).astype(np.int32)
  sizes, numbers = (9, 7, 8, 6, 5, 9, 4), ((1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2), (0, 0))
  segments = np.concatenate([[s] * n for n, (s, _) in zip(sizes, numbers)])
  branches = np.concatenate([[b] * n for n, (_, b) in zip(sizes, numbers)])
  starts = (0, 9, 9, 0, 6, 6, 0)
  positions = np.concatenate([np.arange(n) + start for n, start in zip(sizes, starts)])
  rows = (np.tile(x, (2, 1)).astype(np.int32) for x in (positions, segments, branches))
  return jnp.asarray(tokens), *(jnp.asarray(x) for x in rows)


def random_params(model):
  leaves, tree = jax.tree.flatten(models.abstract_params(model))
  rng = np.random.default_rng(3)
  return tree.unflatten([0.2 * rng.normal(size=x.shape).astype(np.float32) for x in leaves])


def built(impl, mesh=None):
  return models.Transformer(dataclasses.replace(MIXED, attention_impl=impl), mesh=mesh)


def loss_and_grads(model, params, inputs):
  real = (inputs[2] > 0)[..., None]

  def loss(params, *inputs):
    return jnp.sum(jnp.sin(model.apply({"params": params}, *inputs)) * real)

  return jax.jit(jax.value_and_grad(loss))(params, *inputs)


@pytest.mark.parametrize("shape", [None, (1, 1, 1, 1), (1, 2, 2, 2)])
def test_a_model_is_the_same_by_tiles(shape, small_tiles):
  """Layers with and without a window in one scan, rematerialised; long rows split over devices.

  On one device gradients wait for attention's backward pass, see `deferred`.
  """
  mesh = shape and jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 4)
  plain, tiled = built("xla"), built("blockwise", mesh)
  params, inputs = random_params(plain), model_inputs()
  loss, grads = loss_and_grads(plain, params, inputs)
  other_loss, other_grads = loss_and_grads(tiled, params, inputs)
  np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(other_grads)):
    np.testing.assert_allclose(b, a, rtol=0, atol=2e-5 * np.abs(a).max())


@pytest.mark.parametrize("shape", [None, (1, 1, 1, 1)])
def test_several_models_at_once(shape, small_tiles):
  """vmap over parameters, as for ensembles: logits, losses and gradients."""
  mesh = shape and jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 4)
  model, inputs = built("blockwise", mesh), model_inputs()
  params = random_params(model)
  each = params, jax.tree.map(lambda x: 1.1 * x, params)
  both = jax.tree.map(lambda *x: jnp.stack(x), *each)
  apply = jax.jit(lambda p: model.apply({"params": p}, *inputs))
  logits = jax.jit(jax.vmap(apply))(both)
  loss, grads = jax.jit(jax.vmap(lambda p: loss_and_grads(model, p, inputs)))(both)
  for i, one in enumerate(each):
    np.testing.assert_allclose(logits[i], apply(one), rtol=0, atol=1e-4)
    expected = loss_and_grads(model, one, inputs)
    np.testing.assert_allclose(loss[i], expected[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected[1])):
      np.testing.assert_allclose(a[i], b, rtol=0, atol=2e-5 * np.abs(b).max())


def test_probabilities_are_there_for_those_who_ask(small_tiles):
  """A tap or an edit of attention_probs is served whatever computes attention otherwise."""
  plain, tiled = built("xla"), built("blockwise")
  params, (tokens, *_) = random_params(plain), model_inputs()
  apply = {m: jax.jit(lambda v, m=m: m.apply(v, tokens, mutable=["taps"])) for m in (plain, tiled)}
  (logits, taps), (tiled_logits, tiled_taps) = (
    apply[m]({"params": params}) for m in (plain, tiled)
  )
  np.testing.assert_array_equal(tiled_logits, logits)
  probs = tiled_taps["taps"]["layers"]["attention_probs"]
  np.testing.assert_array_equal(probs, taps["taps"]["layers"]["attention_probs"])
  edit = {"project": jnp.zeros((3, 1, SIZE)).at[:, 0, 0].set(1.0)}  # nobody sees the first token
  edits = {"params": params, "edits": {"layers": {"attention_probs": edit}}}
  edited, tiled_edited = (jax.jit(m.apply)(edits, tokens) for m in (plain, tiled))
  np.testing.assert_array_equal(tiled_edited, edited)
  assert np.abs(edited - logits).max() > 1e-3


def mesh_of(platform, context=1):
  device = platform and AbstractDevice(device_kind="some", num_cores=1, platform=platform)
  return AbstractMesh((1, 2, context, 2), AXES, (AxisType.Auto,) * 4, abstract_device=device)


@pytest.mark.parametrize(
  "mesh, length, expected",
  [
    (mesh_of("tpu"), 4096, "splash"),
    (mesh_of("tpu"), 128, "xla"),
    (mesh_of("tpu", 4), 4096, "splash"),
    (mesh_of("gpu"), 4096, "xla"),
    (mesh_of("cpu", 4), 4096, "blockwise"),
    (mesh_of("cpu"), 256, "blockwise"),
    (mesh_of("cpu"), 255, "xla"),
    (mesh_of("cpu", 4), 4098, "xla"),
    (AbstractMesh((), ()), 4096, "by_platform"),
    (AbstractMesh((), ()), 64, "xla"),
  ],
)
def test_auto_goes_by_the_devices_of_the_mesh(mesh, length, expected):
  assert context_attention.choose("auto", length, mesh) == expected
  assert context_attention.choose("xla", length, mesh) == "xla"


def test_without_a_mesh_the_platform_decides_when_the_program_is_lowered():
  model = models.Transformer(dataclasses.replace(MIXED, attention_impl="auto", head_dim=64))
  params, tokens = models.abstract_params(model), jax.ShapeDtypeStruct((1, 384), jnp.int32)

  def loss(params, tokens):
    return model.apply({"params": params}, tokens).sum()

  with jax.default_matmul_precision("default"):
    traced = jax.jit(jax.grad(loss)).trace(params, tokens)
    on_tpu, on_cpu = (traced.lower(lowering_platforms=(p,)).as_text() for p in ("tpu", "cpu"))
  assert "tpu_custom_call" in on_tpu and "384x384x" not in on_tpu
  assert "tpu_custom_call" not in on_cpu and "384x384x" in on_cpu


@pytest.mark.parametrize(
  "shape, platform, length, expected",
  [
    ((1, 1, 1, 1), "cpu", 256, True),
    ((1, 1, 1, 1), "cpu", 255, False),
    ((1, 2, 1, 1), "cpu", 256, False),
    ((1, 1, 1, 1), "tpu", 256, False),
    ((1, 1, 1, 1), "gpu", 256, False),
  ],
)
def test_one_core_attends_on_a_mesh_of_one_cpu(shape, platform, length, expected):
  device = AbstractDevice(device_kind="some", num_cores=1, platform=platform)
  mesh = AbstractMesh(shape, AXES, (AxisType.Auto,) * 4, abstract_device=device)
  assert context_attention.on_one_core("auto", length, mesh) == expected


def test_splash_on_a_mesh_of_other_devices_is_refused():
  with pytest.raises(
    ValueError, match="splash is a kernel for TPUs and the mesh is of cpu devices"
  ):
    context_attention.choose("splash", 256, mesh_of("cpu"))
