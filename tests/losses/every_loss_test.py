"""What holds of every loss on preferences or rewards: tested from one table, which must be whole."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from align_jax import losses

ELSEWHERE = {  # have tests of their own
  "all_pairs_loss",
  "cispo_loss",
  "cross_entropy_loss",
  "decorrelation_loss",
  "gspo_loss",
  "gspo_token_loss",
  "kl_loss",
  "nash_md_loss",
  "ppo_policy_loss",
  "ppo_value_loss",
  "reinforce_loss",
  "thurstone_loss",
}
CASES = [
  ("dpo_loss", {"beta": 0.5}),
  ("dpo_loss", {"beta": 0.5, "label_smoothing": 0.2}),
  ("cdpo_loss", {"beta": 0.5, "label_smoothing": 0.2}),
  ("ipo_loss", {"tau": 0.5}),
  ("ipo_mean_loss", {"tau": 0.5}),
  ("hinge_loss", {"beta": 0.5}),
  ("robust_loss", {"beta": 0.5, "label_smoothing": 0.2}),
  ("exo_loss", {"beta": 0.5, "label_smoothing": 1e-3}),
  ("discopop_loss", {"beta": 0.5, "temperature": 0.5}),
  ("discopop_loss", {"beta": 0.5, "temperature": 1.0}),
  ("dpo_norm_loss", {"beta": 2.0}),
  ("dpop_loss", {"beta": 0.5, "penalty": 3.0}),
  ("r_dpo_loss", {"beta": 0.5, "alpha": 0.1}),
  ("f_dpo_loss", {"beta": 0.5, "divergence": "reverse_kl"}),
  ("f_dpo_loss", {"beta": 0.5, "divergence": "forward_kl"}),
  ("f_dpo_loss", {"beta": 0.5, "divergence": "js"}),
  ("f_dpo_loss", {"beta": 0.5, "divergence": "alpha", "alpha": 0.5}),
  ("nca_loss", {"beta": 0.5}),
  ("bco_loss", {"beta": 0.5}),
  ("sppo_loss", {"beta": 0.5}),
  ("apo_zero_loss", {"beta": 0.5}),
  ("apo_down_loss", {"beta": 0.5}),
  ("aot_loss", {"beta": 0.5, "label_smoothing": 0.2}),
  ("aot_unpaired_loss", {"beta": 0.5, "label_smoothing": 0.2}),
  ("kto_loss", {"beta": 0.5, "desirable_weight": 1.5}),
  ("apo_zero_unpaired_loss", {"beta": 0.5}),
  ("bco_unpaired_loss", {"beta": 0.5}),
  ("simpo_loss", {"beta": 2.0, "gamma": 0.5}),
  ("alphapo_loss", {"beta": 2.0, "gamma": 0.5, "alpha": 0.25}),
  ("alphapo_loss", {"beta": 2.0, "gamma": 0.5, "alpha": -0.25}),
  ("orpo_loss", {"beta": 0.5}),
  ("cpo_loss", {"beta": 0.5}),
  ("slic_loss", {"delta": 1.0, "sft_weight": 0.1}),
  ("sft_loss", {}),
  ("ld_dpo_loss", {"beta": 0.5, "alpha": 0.3}),
  ("step_dpo_loss", {"beta": 0.5}),
  ("tdpo_loss", {"beta": 0.5, "alpha": 0.5}),
  ("xpo_loss", {"beta": 0.5, "alpha": 0.1}),
  ("bradley_terry_loss", {"centering": 0.01, "margin": 0.5, "label_smoothing": 0.1}),
  ("plackett_luce_loss", {}),
  ("rao_kupper_loss", {"theta": 2.0}),
]
OUT_OF_RANGE = {
  "beta": (0.0, -0.1, float("nan")),
  "tau": (0.0, -1.0),
  "label_smoothing": (-0.1, 0.6),
  "temperature": (0.0, 1.1),
  "penalty": (-1.0,),
  "gamma": (-0.1,),
  "delta": (-1.0,),
  "sft_weight": (-1.0,),
  "centering": (-0.1,),
  "theta": (0.9,),
}
ALPHA = {  # its range differs from loss to loss
  "r_dpo_loss": (-0.1,),
  "f_dpo_loss": (0.0, 1.1),
  "ld_dpo_loss": (-0.1, 1.1),
  "tdpo_loss": (-0.1,),
  "xpo_loss": (-0.1,),
  "alphapo_loss": (float("nan"), float("inf")),
}
OPEN_ENDS = [("exo_loss", 0.0), ("exo_loss", 0.5), ("robust_loss", 0.5)]

each_case = pytest.mark.parametrize(
  "name, settings", CASES, ids=[f"{i}-{name}" for i, (name, _) in enumerate(CASES)]
)
each_loss = pytest.mark.parametrize("name, settings", list({n: (n, s) for n, s in CASES}.values()))


def _example(argument: str, rng, rows: int):
  """An array for the argument of that name: the contract of names is what the objectives rely on."""
  place = np.arange(rows)
  if argument in ("shift", "kl_baseline"):
    return np.float32(0.3)
  if argument == "is_desirable":
    return (place % 2).astype(np.float32)
  if argument == "outcome":
    return (place % 3 / 2).astype(np.float32)
  if argument == "pair_mask":
    return (place % 3 != 2).astype(np.float32)
  if argument.endswith("lengths"):
    return rng.integers(1, 9, rows).astype(np.float32)
  if argument.endswith("mask"):
    return (rng.random((rows, 5)) < 0.7).astype(np.float32)
  if argument == "rewards" or argument.endswith("logprobs"):
    return rng.normal(-1.0, 0.7, (rows, 5)).astype(np.float32)
  if argument.endswith(("logps", "kl", "rewards")):
    low, high = (0.1, 1.0) if argument.endswith("kl") else (-3.0, -0.3)
    return rng.uniform(low, high, rows).astype(np.float32)
  raise AssertionError(f"no example for the argument {argument}")


def _arguments(name: str, kind) -> list[str]:
  parameters = inspect.signature(getattr(losses, name)).parameters.values()
  return [p.name for p in parameters if p.kind is kind]


def _case(name: str, settings: dict, rows: int = 6):
  """The loss with its settings, its arrays by name, and the names of those that are learned."""
  rng = np.random.default_rng(1)  # no hinge and no tie of a sort lies within a finite difference
  names = _arguments(name, inspect.Parameter.POSITIONAL_OR_KEYWORD)
  arrays = {argument: _example(argument, rng, rows) for argument in names}
  learned = [x for x in names if x.startswith("policy") or x.endswith("rewards")]
  return functools.partial(getattr(losses, name), **settings), arrays, learned


def test_the_table_holds_every_loss():
  exported = {name for name in losses.__all__ if name.endswith("_loss")}
  assert {name for name, _ in CASES} | ELSEWHERE == exported


@each_case
def test_result_is_one_float32_per_row_and_the_same_when_compiled(name, settings):
  loss, arrays, _ = _case(name, settings)
  result = loss(**arrays)
  assert result.shape == (6,) and result.dtype == jnp.float32
  np.testing.assert_allclose(jax.jit(loss)(**arrays), result, rtol=1e-5, atol=1e-6)


@each_case
def test_half_precision_is_computed_in_float32(name, settings):
  loss, arrays, _ = _case(name, settings)
  halves = {k: jnp.asarray(v, jnp.bfloat16) for k, v in arrays.items()}
  result = loss(**halves)
  assert result.dtype == jnp.float32
  np.testing.assert_array_equal(
    result, loss(**{k: v.astype(jnp.float32) for k, v in halves.items()})
  )


@each_case
def test_gradient_is_that_of_finite_differences(name, settings):
  loss, arrays, learned = _case(name, settings)

  def of_learned(*values):
    return loss(**arrays | dict(zip(learned, values)))

  values = tuple(arrays[x] for x in learned)
  jax.test_util.check_grads(of_learned, values, 1, ["rev"], rtol=2e-2, atol=2e-3, eps=1e-2)
  gradients = jax.grad(lambda *x: of_learned(*x).sum(), range(len(learned)))(*values)
  assert all(np.any(g != 0) for g in gradients)


@each_case
def test_extremes_are_finite(name, settings):
  ends = (-1e4, -1e-9, 0.0, 1e4)
  first, second = np.array(list(itertools.product(ends, ends)), np.float32).T
  loss, arrays, learned = _case(name, settings, rows=len(first))
  for argument, value in arrays.items():
    if argument.startswith("ref"):
      arrays[argument] = np.zeros_like(value)
  values = []
  for argument, end in zip(learned, (first, second, first)):
    values.append(
      np.zeros_like(arrays[argument]) + (end if arrays[argument].ndim == 1 else end[:, None])
    )
  if learned == ["rewards"]:  # a ranked list has its extremes along the row
    values = [np.stack([first, second, second, first, first], axis=1)]

  def total(*values):
    result = loss(**arrays | dict(zip(learned, values)))
    return result.sum(), result

  gradients, result = jax.grad(total, range(len(learned)), has_aux=True)(*values)
  assert np.all(np.isfinite(result))
  assert all(np.all(np.isfinite(g)) for g in gradients)


@each_loss
def test_a_wrong_rank_or_shape_is_refused_by_name(name, settings):
  loss, arrays, _ = _case(name, settings)
  for argument, value in arrays.items():
    with pytest.raises(ValueError, match=f"^{name}: {argument} must"):
      loss(**arrays | {argument: np.asarray(value)[..., None]})
    if len(arrays) > 1 and value.ndim:
      with pytest.raises(ValueError, match=f"^{name}: .*one shape.*{argument}"):
        loss(**arrays | {argument: value[:3]})


@each_loss
def test_a_setting_out_of_range_is_refused_by_name(name, settings):
  _, arrays, _ = _case(name, settings)
  ranges = OUT_OF_RANGE | {"alpha": ALPHA.get(name, ())}
  for setting in _arguments(name, inspect.Parameter.KEYWORD_ONLY):
    for value in ranges.get(setting, ()):
      options = settings | {setting: value}
      if name == "f_dpo_loss" and setting == "alpha":
        options["divergence"] = "alpha"
      with pytest.raises(ValueError, match=f"^{name}: {setting} must be"):
        getattr(losses, name)(**arrays, **options)


@pytest.mark.parametrize("name, value", OPEN_ENDS)
def test_a_smoothing_at_an_open_end_is_refused(name, value):
  _, arrays, _ = _case(name, {})
  with pytest.raises(ValueError, match=f"^{name}: label_smoothing must be in"):
    getattr(losses, name)(**arrays, beta=0.1, label_smoothing=value)
