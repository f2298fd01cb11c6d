"""Rewards as composable functions, each logged by its name."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from align_jax import hosts, models, sharding
from align_jax.errors import InputError
from align_jax.rl.rollouts import Rollout
from align_jax.training import objectives


@dataclasses.dataclass(frozen=True)
class Reward:
  """A named term of the score; it is logged as `score/<name>` before it is weighted."""

  name: str
  function: Callable[[Rollout], np.ndarray]  # -> [B]
  weight: float = 1.0


def text_reward(
  name: str,
  function: Callable[[Sequence[Any], Sequence[str]], np.ndarray],
  *,
  weight: float = 1.0,
) -> Reward:
  """A reward from any Python function (prompts, responses) -> [B], such as a gold judge."""
  return Reward(name, lambda rollout: function(rollout.prompts, rollout.texts), weight)


def model_reward(
  name: str,
  model: models.Transformer,
  weights: Any,
  *,
  weight: float = 1.0,
  mesh: jax.sharding.Mesh | None = None,
) -> Reward:
  """A reward model {"trunk", "head"}, read at the last response token (found by position).

  Rows are split over the `data` and `fsdp` axes of `mesh`, if there is one.
  """
  score = jax.jit(functools.partial(_model_scores, model))

  def function(rollout: Rollout) -> np.ndarray:
    rows = rollout.tokens, rollout.segment_ids, rollout.response_mask
    placed = rows if mesh is None else sharding.put_batch(rows, mesh, whole=True)
    return hosts.fetch(score(weights, *placed))

  return Reward(name, function, weight)


def standardised(reward: Reward, reference: Rollout) -> Reward:
  """(r − μ) / σ with μ and σ (population) of the same reward over the B responses of `reference`.

  With responses of the policy before it learns, the start has mean 0 and variance 1, so that weights,
  clips and members of an ensemble mean the same whatever a reward model's offset and scale.

  Raises:
    InputError: if the reward is the same for all of them, or they are fewer than two.

  References:
    Ziegler et al. 2019, https://arxiv.org/abs/1909.08593 (256 samples); Ouyang et al. 2022 (the mean
    only), https://arxiv.org/abs/2203.02155.
  """
  values = _checked(reward, reference).astype(np.float64)
  mean, std = values.mean(), values.std()
  if not std > 1e-6 * max(1.0, abs(mean)):
    raise InputError(
      f"reward '{reward.name}' cannot be standardised: it is {mean:g} for each of {len(values)} "
      "reference responses"
    )
  return dataclasses.replace(reward, function=lambda r: (reward.function(r) - mean) / std)


ENSEMBLES = ("mean", "min", "uwo")


def combine_members(
  values: np.ndarray, combine: str, variance_coef: float | None = None
) -> np.ndarray:
  """mean: mean_k r_k.  min: min_k r_k (worst case, WCO).  uwo: mean_k r_k − λ · var_k r_k.

  var is the population's, ddof = 0, as in the paper's best-of-n; its PPO code has ddof = 1, which is
  K / (K − 1) times the λ.

  Args:
    values: [K, ...] scores of the members, on one scale.
    combine: one of `ENSEMBLES`.
    variance_coef: λ ≥ 0 of uwo, and needed there; paper: 0.5 for best-of-n, 0.1 for PPO. 0 is the mean.

  Returns:
    [...], of the type of `values`.

  Raises:
    InputError: for another `combine`, or a `variance_coef` that is missing, negative or not used.

  References:
    Coste et al. 2023, https://arxiv.org/abs/2310.02743.
  """
  check_combination(combine, variance_coef)
  if combine == "min":
    return values.min(axis=0)
  mean = values.mean(axis=0)
  return mean if combine == "mean" else mean - variance_coef * values.var(axis=0)


def check_combination(combine: str, variance_coef: float | None) -> None:
  """Raises InputError for what `combine_members` cannot do."""
  if combine not in ENSEMBLES:
    raise InputError(f"combine must be one of {', '.join(ENSEMBLES)}, not {combine!r}")
  if (combine == "uwo") != (variance_coef is not None) or (variance_coef or 0.0) < 0:
    raise InputError("variance_coef is for combine='uwo': needed there, never negative, else None")


def ensemble_reward(
  name: str,
  members: Sequence[Reward],
  *,
  combine: str = "mean",
  variance_coef: float | None = None,
  weight: float = 1.0,
) -> tuple[Reward, Reward]:
  """One reward from K, and beside it, with weight 0, their spread `<name>/spread`.

  The spread is their standard deviation, ddof = 0.

  Args:
    name: of the sum.
    members: at least two. Reward models have arbitrary offsets, which only the mean does not care
      about: for min and uwo each must be `standardised` first. Their own weights must be 1.
    combine: as in `combine_members`.
    variance_coef: as in `combine_members`.
    weight: of the combined reward.

  References:
    Coste et al. 2023, https://arxiv.org/abs/2310.02743.
  """
  check_combination(combine, variance_coef)
  if len(members) < 2 or any(member.weight != 1.0 for member in members):
    raise InputError("an ensemble takes two members or more, each of weight 1")
  values = _once(lambda rollout: np.stack([_checked(member, rollout) for member in members]))

  def combined(rollout: Rollout) -> np.ndarray:
    return combine_members(values(rollout), combine, variance_coef)

  spread = Reward(f"{name}/spread", lambda rollout: values(rollout).std(axis=0), 0.0)
  return Reward(name, combined, weight), spread


def _once(function: Callable[[Rollout], np.ndarray]) -> Callable[[Rollout], np.ndarray]:
  """The function, remembering what it gave for the last rollout it was called with."""
  last: list = [None, None]

  def cached(rollout: Rollout) -> np.ndarray:
    if last[0] is not rollout:
      last[:] = rollout, function(rollout)
    return last[1]

  return cached


def length_reward(name: str, *, target: int | None = None, weight: float = 1.0) -> Reward:
  """The number of sampled tokens n, its EOS included; or with a target L, 1 − |n / L − 1|.

  Without a target `weight` is the price of a token: −0.01 takes 0.01 off for each. With one it is a
  triangle: 1 at n = L, 0 at 0 and at 2L, and negative beyond, so that it never stops pulling.

  References:
    Singhal et al. 2023, https://arxiv.org/abs/2310.03716 (the triangle, used there as the only reward).
  """
  if target is not None and target < 1:
    raise InputError(f"a length reward's target must be at least 1 token, not {target}")

  def function(rollout: Rollout) -> np.ndarray:
    lengths = np.asarray(rollout.samples.lengths, np.float64)
    return lengths if target is None else 1.0 - np.abs(lengths / target - 1.0)

  return Reward(name, function, weight)


def verified_reward(
  name: str, check: Callable[..., bool], *, field: str | None = None, weight: float = 1.0
) -> Reward:
  """1 where a check of `rl.verifiers` passes, else 0.

  Args:
    name: of the term.
    check: `(response) -> bool`, or with `field` `(response, reference) -> bool`.
    field: the entry of a prompt's `meta` that holds the reference answer, a text or a number.
    weight: of the term.

  Raises:
    InputError: when scored, if a prompt has no such entry, or one that the check cannot use.
  """

  def passes(prompt: Any, text: str) -> bool:
    if field is None:
      return check(text)
    answer = reference_answer(prompt, field)
    try:
      return check(text, answer)
    except ValueError as error:
      raise InputError(f"{prompt.source or 'prompt'}: field '{field}': {error}") from error

  def function(prompts: Sequence[Any], texts: Sequence[str]) -> np.ndarray:
    return np.array([passes(*row) for row in zip(prompts, texts)], np.float32)

  return text_reward(name, function, weight=weight)


def reference_answer(prompt: Any, field: str) -> str:
  """`prompt.meta[field]` as text; raises InputError, naming the record, without a text or number."""
  value = prompt.meta.get(field)
  if isinstance(value, bool) or not isinstance(value, str | int | float):
    complaint = "is missing" if value is None else f"must be a text or a number, not {value!r}"
    found = ", ".join(f"'{name}'" for name in prompt.meta) or "none"
    raise InputError(
      f"{prompt.source or 'prompt'}: field '{field}' {complaint} (found: {found}; `columns` can name it)"
    )
  return str(value)


def _model_scores(model, weights, tokens, segment_ids, response_mask):
  return objectives.response_scores(
    model, {"params": weights["trunk"]}, weights["head"], tokens, segment_ids, response_mask
  )


def score(rewards: Sequence[Reward], rollout: Rollout) -> dict[str, np.ndarray]:
  """Every reward by its name, and under "" their weighted sum; all [B] float32.

  Every host asks every reward about all responses; what the first one is told counts, if a function
  is not one of its arguments alone.

  Raises:
    InputError: if there is none, names repeat, or a function returns another shape or a NaN.
  """
  names = [reward.name for reward in rewards]
  if not names or len(set(names)) < len(names):
    raise InputError(f"rewards must be named, each differently, and at least one; got {names}")
  scores = hosts.agreed({reward.name: _checked(reward, rollout) for reward in rewards})
  return scores | {"": sum(reward.weight * scores[reward.name] for reward in rewards)}


def _checked(reward: Reward, rollout: Rollout) -> np.ndarray:
  values = np.asarray(reward.function(rollout), np.float32)
  if values.shape != (len(rollout.texts),):
    raise InputError(
      f"reward '{reward.name}' must return one number for each of {len(rollout.texts)} responses, "
      f"got shape {values.shape}"
    )
  if not np.all(np.isfinite(values)):
    row = int(np.argmin(np.isfinite(values)))
    raise InputError(f"reward '{reward.name}' is {values[row]} for response {rollout.texts[row]!r}")
  return values
