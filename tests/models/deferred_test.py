"""Weight gradients that wait: the same numbers, and they do wait."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from align_jax import models, sharding
from align_jax.models import deferred

R, D, F = 24, 6, 10


def _arrays(seed=0):
  rng = np.random.default_rng(seed)
  x, w, v = rng.normal(size=(R, D)), rng.normal(size=(D, F)), rng.normal(size=(F, D))
  return [a.astype(np.float32) for a in (x, w, v)]


def _two_products(x, matrices):
  """tanh(x) W then V, with the gradients of W and V put off to where tanh(x) is made."""
  anchor, slots = deferred.slots(R, jnp.tanh(x), matrices)
  hidden = deferred.product(anchor, matrices["w"], slots["w"])
  return deferred.product(hidden, matrices["v"], slots["v"])


@pytest.mark.parametrize(
  "wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["eager", "jit", "remat"]
)
def test_values_and_gradients_are_those_of_plain_products(wrap):
  x, w, v = _arrays()
  d_out = np.random.default_rng(1).normal(size=(R, D)).astype(np.float32)
  out, back = jax.vjp(wrap(_two_products), x, {"w": w, "v": v})
  dx, found = back(jnp.asarray(d_out))
  anchor = np.tanh(x)
  d_hidden = d_out @ v.T
  assert_allclose(out, anchor @ w @ v, atol=1e-5)
  assert_allclose(found["v"], (anchor @ w).T @ d_out, atol=1e-4)
  assert_allclose(found["w"], anchor.T @ d_hidden, atol=1e-4)
  assert_allclose(dx, d_hidden @ w.T * (1 - anchor**2), atol=1e-4)


def test_gradients_wait_for_the_anchors_cotangent_in_the_compiled_program():
  """What is read off the cotangent reaches them, so the program cannot compute them without it."""
  x, w, v = _arrays()

  @jax.jit
  def gradients(d_anchor, x, dy):
    matrices = {"w": w, "v": v}
    _, back = jax.vjp(lambda m: deferred.slots(R, jnp.asarray(x), m), matrices)
    return back((d_anchor, {"w": (x, dy), "v": (dy, x)}))[0]

  dy = _arrays(1)[0] @ w
  for of_one, is_nan in ((1.0, False), (np.inf, False), (0.0, False), (np.nan, True)):
    d_anchor = np.ones((R, D), np.float32)
    d_anchor[0, 0] = of_one
    found = gradients(d_anchor, x, dy)
    assert np.isnan(found["w"]).all() == np.isnan(found["v"]).all() == is_nan
    if not is_nan:
      assert_allclose(found["w"], x.T @ dy, atol=1e-4)
      assert_allclose(found["v"], dy.T @ x, atol=1e-4)


SMALL = models.ModelConfig(
  vocab_size=50, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48,
  attention_impl="blockwise", remat="dots",
)  # fmt: skip
BEHIND = {"out", "gate", "up", "down"}


@pytest.fixture
def waiting(monkeypatch):
  """The names of the matrices whose gradients wait, of all layers that are traced."""
  found, slots = set(), deferred.slots

  def spy(rows, anchor, matrices):
    found.update(matrices)
    return slots(rows, anchor, matrices)

  monkeypatch.setattr(deferred, "slots", spy)
  return found


def _small(devices):
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:devices])
  model = models.Transformer(SMALL, mesh=mesh)
  tokens = jnp.arange(48).reshape(2, 24)
  params = model.init(jax.random.key(0), tokens)["params"]
  return model, {"params": params}, tokens


@pytest.mark.parametrize("devices, expected", [(1, BEHIND), (2, set())])
def test_matrices_behind_attention_wait_on_one_device(devices, expected, waiting):
  model, variables, tokens = _small(devices)
  assert not waiting  # the weights are made in their own order
  model.apply(variables, tokens)
  assert waiting == expected


def test_adapters_leave_nothing_to_wait_for(waiting):
  model, variables, tokens = _small(1)
  lora = models.init_lora(jax.random.key(1), model, rank=2, targets=("gate",))
  model.apply(variables | {"lora": lora}, tokens)
  assert not waiting
