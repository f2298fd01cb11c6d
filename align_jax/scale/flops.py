"""Floating-point operations of a traced function: of its matrix products, loops counted in full."""

import math

from jax.extend import core


def count(jaxpr) -> float:
  """Multiplications and additions of all matrix products, over all devices, recomputation included.

  A scan counts as often as it runs; of branches the dearest; a `while` as often as a number in its
  condition allows, and once where there is none (a decoding loop: one token).
  """
  jaxpr = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
  return sum(_of(eqn) for eqn in jaxpr.eqns)


def _of(eqn) -> float:
  name = eqn.primitive.name
  if name == "dot_general":
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[d] for d in contracted)
  if name == "pallas_call":
    estimate = eqn.params.get("cost_estimate")
    if estimate is not None:
      return float(estimate.flops)
    return math.prod(eqn.params["grid_mapping"].grid) * count(eqn.params["jaxpr"])
  inner = [count(j) for j in _jaxprs(eqn.params)]
  if name == "cond":
    return max(inner)
  times = eqn.params["length"] if name == "scan" else 1
  if name == "while":
    times = _most(eqn.params["cond_jaxpr"].jaxpr)
  if name == "shard_map":
    times = math.prod(eqn.params["mesh"].shape[axis] for axis in _manual(eqn.params))
  return times * sum(inner)


def _most(condition) -> int:
  """The least number that the condition of a loop, which counts from 0, wants something below."""
  below = [eqn.invars[1] for eqn in condition.eqns if eqn.primitive.name == "lt"]
  return min((int(x.val) for x in below if isinstance(x, core.Literal)), default=1)


def _manual(params) -> frozenset[str]:
  """The mesh axes over which a shard_map's body runs apart; the name changed between releases."""
  return params.get("newly_manual_axes", params.get("manual_axes"))


def _jaxprs(params):
  """The jaxprs among the parameters of an equation."""
  for name, value in params.items():
    for item in value if isinstance(value, tuple | list) else (value,):
      if isinstance(item, core.Jaxpr | core.ClosedJaxpr) and not name.startswith(("fwd", "bwd")):
        yield item
