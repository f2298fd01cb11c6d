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
  x, late = deferred.late(R, x, matrices)
  anchor, late = deferred.beside(jnp.tanh(x), late)
  return deferred.product(deferred.product(anchor, *late["w"]), *late["v"])


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


@pytest.mark.parametrize("where", ["anchor", "end"])
@pytest.mark.parametrize(
  "value, is_nan", [(1.0, False), (np.inf, False), (0.0, False), (np.nan, True)]
)
def test_gradients_wait_for_both_cotangents_in_the_compiled_program(where, value, is_nan):
  """What is read off a cotangent reaches them, so the program cannot have them without it.

  The end's says which number of x and dy is looked at: its NaN shows if the number next to the first
  is NaN, which otherwise spoils one row or column.
  """
  x, w, _ = _arrays()
  dy = _arrays(1)[0] @ w
  x[0, 1] = np.nan if where == "end" else x[0, 1]

  @jax.jit
  def gradients(d_anchor, d_end, x, dy):
    def both(end, anchor, matrices):
      end, late = deferred.late(R, end, matrices)
      anchor, late = deferred.beside(anchor, late)
      return end, anchor, {name: deferred.product(x, *late[name]) for name in matrices}

    _, back = jax.vjp(both, d_end, d_anchor, {"w": w, "u": w})
    return back((d_end, d_anchor, {"w": dy, "u": dy}))[2]

  odd = jnp.ones((R, D)).at[0, 0].set(value)
  ones = jnp.ones((R, D))
  found = gradients(*((odd, ones) if where == "anchor" else (ones, odd)), x, dy)
  for gradient in found.values():
    if is_nan:
      assert np.isnan(gradient).all()
    else:
      assert_allclose(gradient, x.T @ dy, atol=1e-4)


SMALL = models.ModelConfig(
  vocab_size=50, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48,
  attention_impl="blockwise", remat="dots",
)  # fmt: skip
BEHIND = {"out", "gate", "up", "down"}


@pytest.fixture
def waiting(monkeypatch):
  """The names of the matrices whose gradients wait, of all layers that are traced."""
  found, late = set(), deferred.late

  def spy(rows, end, matrices):
    found.update(matrices)
    return late(rows, end, matrices)

  monkeypatch.setattr(deferred, "late", spy)
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
