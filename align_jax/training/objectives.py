"""Objectives: where a model meets a loss.

An objective maps `(trainable, frozen, batch, rng)` to `(loss_sum, {name: Mean})`.  What trains is what
is differentiated: the weights themselves, or LoRA adapters on the frozen weights `frozen["base"]`.
The reference policy is `frozen["ref"]`, or with LoRA the same base without its adapter.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from align_jax import losses, models
from align_jax.errors import InputError
from align_jax.losses import Mean
from align_jax.training.step import Metrics, Objective

# The settings each preference objective reads, with their defaults; any other one is an error.
PREFERENCE_OBJECTIVES = {
  "dpo": {"beta": 0.1, "label_smoothing": 0.0},
  "ipo": {"tau": 0.1},
  "kto": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
}


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
  """A preference objective by name; a setting left None takes the objective's own default."""

  name: str
  beta: float | None = None
  tau: float | None = None
  label_smoothing: float | None = None
  desirable_weight: float | None = None
  undesirable_weight: float | None = None

  def __post_init__(self):
    if self.name not in PREFERENCE_OBJECTIVES:
      known = ", ".join(PREFERENCE_OBJECTIVES)
      raise InputError(f"objective.name must be one of {known}, not {self.name!r}")
    unused = sorted(self._given() - set(PREFERENCE_OBJECTIVES[self.name]))
    if unused:
      raise InputError(f"objective.{unused[0]} is not used by the objective {self.name!r}")

  def _given(self) -> set[str]:
    values = dataclasses.asdict(self)
    return {k for k, v in values.items() if v is not None and k != "name"}

  def settings(self) -> dict[str, float]:
    """The keyword arguments of the loss function."""
    given = {k: getattr(self, k) for k in self._given()}
    return PREFERENCE_OBJECTIVES[self.name] | given


def policy_variables(trainable, frozen) -> dict[str, Any]:
  """The collections to apply the model with: full weights, or base and adapter."""
  if "base" in frozen:
    return {"params": frozen["base"], "lora": trainable}
  return {"params": trainable}


def reference_variables(frozen) -> dict[str, Any]:
  """The frozen reference; with LoRA the base itself, so no second copy exists."""
  return {"params": frozen["ref"] if "ref" in frozen else frozen["base"]}


def response_logps(model, variables, batch, prefix: str = "", *, chunk: int | None) -> jax.Array:
  """[B], the summed log-probs of the response tokens of `batch[prefix + "tokens"]` [B, T]."""
  logprobs = models.token_logprobs(
    model,
    variables,
    batch[prefix + "tokens"],
    segment_ids=batch[prefix + "segment_ids"],
    chunk_size=chunk,
  )
  return losses.masked_sum(logprobs, batch[prefix + "response_mask"][:, 1:], axis=1)


def sft_objective(model, *, chunk: int | None = None) -> Objective:
  """Cross-entropy on response tokens, summed; its weight is their number (times example weights)."""

  def objective(trainable, frozen, batch, rng):
    del rng
    logprobs = models.token_logprobs(
      model,
      policy_variables(trainable, frozen),
      batch["tokens"],
      positions=batch["positions"],
      segment_ids=batch["segment_ids"],
      chunk_size=chunk,
    )
    same_segment = batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1]
    loss = Mean.of(-logprobs, batch["loss_mask"][:, 1:] * same_segment)
    return loss.total, {"loss": loss, "tokens": _token_count(batch["segment_ids"])}

  return objective


def response_scores(model, variables, head, tokens, segment_ids, response_mask) -> jax.Array:
  """[B], the scalar head read at the last response token, found by position, never by token id.

  A row without any response token is read at its last real token.
  """
  hidden = model.apply(variables, tokens, segment_ids=segment_ids, method="hidden")
  places = jnp.arange(tokens.shape[1])
  inside = jnp.where(
    jnp.any(response_mask > 0, axis=1)[:, None], response_mask > 0, segment_ids > 0
  )
  last = jnp.max(jnp.where(inside, places, 0), axis=1)
  at_last = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
  return models.scalar_head(head, at_last)[:, 0]


def reward_variables(trainable, frozen) -> dict[str, Any]:
  """The trunk of a reward or value model: its own weights, or base and adapter."""
  return policy_variables(trainable["lora" if "base" in frozen else "trunk"], frozen)


def reward_objective(model, *, centering: float = 0.0, label_smoothing: float = 0.0) -> Objective:
  """Bradley–Terry on pairs, plus `centering · (r⁺ + r⁻)²`, which pins the free constant.

  Reference: Ouyang et al. 2022 (2203.02155); centring as in Eisenstein et al. 2023 (2312.09244).
  """

  def objective(trainable, frozen, batch, rng):
    del rng
    flat = _flatten_pairs(batch)
    scores = response_scores(
      model,
      reward_variables(trainable, frozen),
      trainable["head"],
      flat["tokens"],
      flat["segment_ids"],
      flat["response_mask"],
    ).reshape(-1, 2)
    chosen, rejected = scores[:, 0], scores[:, 1]
    loss = losses.bradley_terry_loss(
      chosen,
      rejected,
      margin=batch["margin"],
      label_smoothing=label_smoothing,
      label_prob=batch["label_prob"],
    )
    loss = loss + centering * jnp.square(chosen + rejected)
    metrics = _reward_metrics(chosen, rejected, batch["weight"])
    metrics |= {"loss": Mean.of(loss, batch["weight"]), "tokens": _token_count(flat["segment_ids"])}
    return metrics["loss"].total, metrics

  return objective


def preference_objective(model, config: PreferenceConfig, *, chunk: int | None = None) -> Objective:
  """DPO or IPO on pairs, KTO on single responses with a thumb up or down."""
  make = _feedback_objective if config.name == "kto" else _pair_objective
  return make(model, config, chunk)


def _pair_objective(model, config: PreferenceConfig, chunk: int | None) -> Objective:
  loss_function = {"dpo": losses.dpo_loss, "ipo": losses.ipo_loss}[config.name]
  settings = config.settings()

  def objective(trainable, frozen, batch, rng):
    del rng
    flat = _flatten_pairs(batch)
    policy = response_logps(model, policy_variables(trainable, frozen), flat, chunk=chunk)
    ref = response_logps(model, reference_variables(frozen), flat, chunk=chunk)
    policy, ref = policy.reshape(-1, 2), jax.lax.stop_gradient(ref).reshape(-1, 2)
    arguments = (policy[:, 0], policy[:, 1], ref[:, 0], ref[:, 1])
    swapped = (policy[:, 1], policy[:, 0], ref[:, 1], ref[:, 0])
    p = batch["label_prob"]  # 1 for a hard label: then the second term vanishes exactly
    loss = p * loss_function(*arguments, **settings)
    loss += (1.0 - p) * loss_function(*swapped, **settings)
    rewards = settings.get("beta", settings.get("tau")) * (policy - ref)
    metrics = _reward_metrics(rewards[:, 0], rewards[:, 1], batch["weight"])
    metrics |= {
      "loss": Mean.of(loss, batch["weight"]),
      "logps/chosen": Mean.of(policy[:, 0], batch["weight"]),
      "logps/rejected": Mean.of(policy[:, 1], batch["weight"]),
      "tokens": _token_count(flat["segment_ids"]),
    }
    return metrics["loss"].total, metrics

  return objective


def _feedback_objective(model, config: PreferenceConfig, chunk: int | None) -> Objective:
  settings = config.settings()

  def objective(trainable, frozen, batch, rng):
    del rng
    policy = response_logps(model, policy_variables(trainable, frozen), batch, chunk=chunk)
    ref = response_logps(model, reference_variables(frozen), batch, chunk=chunk)
    baseline = batch["kl_baseline"][0]
    loss = losses.kto_loss(
      policy, jax.lax.stop_gradient(ref), batch["is_desirable"], baseline, **settings
    )
    weight, up = batch["weight"], batch["is_desirable"]
    rewards = settings["beta"] * (policy - ref)
    metrics = {
      "loss": Mean.of(loss, weight),
      "rewards/chosen": Mean.of(rewards, weight * up),
      "rewards/rejected": Mean.of(rewards, weight * (1 - up)),
      "rewards/accuracy": Mean.of((rewards > settings["beta"] * baseline) == (up > 0), weight),
      "logps/chosen": Mean.of(policy, weight * up),
      "logps/rejected": Mean.of(policy, weight * (1 - up)),
      "kl/baseline": Mean.of(baseline),
      "tokens": _token_count(batch["segment_ids"], batch["mismatched_segment_ids"]),
    }
    return metrics["loss"].total, metrics

  return objective


def preference_evaluation(
  model, config: PreferenceConfig, *, chunk: int | None = None
) -> Objective:
  """Metrics on held-out pairs; KTO has no loss of pairs, so only its rewards are reported there."""
  if config.name != "kto":
    return _pair_objective(model, config, chunk)
  pairs = _pair_objective(model, PreferenceConfig("dpo", beta=config.settings()["beta"]), chunk)

  def objective(trainable, frozen, batch, rng):
    loss_sum, metrics = pairs(trainable, frozen, batch, rng)
    del metrics["loss"]
    return loss_sum, metrics

  return objective


def kto_prepare(model, *, chunk: int | None = None):
  """`prepare` of KTO: adds `kl_baseline` [B], one number from the mismatched pairs of the whole batch.

  It is computed before the batch is split, so accumulation does not change it.
  """

  def prepare(trainable, frozen, batch):
    policy = response_logps(
      model, policy_variables(trainable, frozen), batch, "mismatched_", chunk=chunk
    )
    ref = response_logps(model, reference_variables(frozen), batch, "mismatched_", chunk=chunk)
    baseline = losses.kto_kl_baseline(policy, ref, weight=batch["weight"])
    return batch | {"kl_baseline": jnp.broadcast_to(baseline, policy.shape)}

  return prepare


def _flatten_pairs(batch):
  """[B, 2, T] to [2B, T]: the rows of a pair stay neighbours, on one device."""
  names = ("tokens", "segment_ids", "response_mask")
  return {k: batch[k].reshape(-1, batch[k].shape[-1]) for k in names}


def _reward_metrics(chosen, rejected, weight) -> Metrics:
  accuracy = jnp.where(chosen == rejected, 0.5, chosen > rejected)  # a tie counts half
  return {
    "rewards/chosen": Mean.of(chosen, weight),
    "rewards/rejected": Mean.of(rejected, weight),
    "rewards/margin": Mean.of(chosen - rejected, weight),
    "rewards/accuracy": Mean.of(accuracy, weight),
  }


def _token_count(*segment_ids) -> jax.Array:
  """Real tokens of a step, a plain sum: adding microbatches adds it too."""
  return sum(jnp.sum(s > 0) for s in segment_ids)
