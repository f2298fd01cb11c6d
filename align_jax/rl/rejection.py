"""Rejection sampling: supervised fine-tuning on those of one's own samples that score well."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from align_jax import losses, models
from align_jax.errors import InputError
from align_jax.losses import Mean
from align_jax.rl import rollouts
from align_jax.rl.config import SamplingConfig
from align_jax.rl.state import OnlineState
from align_jax.rl.update import Learner, run_updates
from align_jax.training import objectives
from align_jax.training import step as step_lib

METHODS = ("raft", "rest")


@dataclasses.dataclass(frozen=True)
class RejectionConfig:
  """Which responses are kept, and how they are learned; a setting is given exactly where it is used."""

  name: str  # one of METHODS
  keep: int | None = None  # raft: the k best of the G responses to every prompt; paper 1
  threshold: float | None = None  # rest: all of this (shaped) score and above, or
  quantile: float | None = None  # rest: all from this quantile of the iteration's scores on
  epochs: int = 1  # passes over what was kept
  minibatches: int = 1  # optimizer steps a pass
  logits_chunk: int | None = None  # time steps of logits held at once; None holds all

  def __post_init__(self):
    if self.name not in METHODS:
      raise InputError(f"name must be one of {', '.join(METHODS)}, not {self.name!r}")
    if (self.keep is not None) != (self.name == "raft"):
      raise InputError("keep is to be given exactly for raft")
    if (self.threshold is not None) + (self.quantile is not None) != (self.name == "rest"):
      raise InputError("threshold or quantile, one of them, is to be given exactly for rest")
    if self.quantile is not None and not 0 <= self.quantile <= 1:
      raise InputError(f"quantile must be in [0, 1], not {self.quantile}")
    for name in ("keep", "epochs", "minibatches", "logits_chunk"):
      if getattr(self, name) is not None and getattr(self, name) < 1:
        raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")

  @property
  def updates(self) -> int:
    """Optimizer steps of one iteration: what a learning-rate schedule counts."""
    return self.epochs * self.minibatches

  def check(self, sampling: SamplingConfig) -> None:
    """Raises InputError where nothing would be rejected."""
    if self.keep is not None and self.keep >= sampling.samples_per_prompt:
      raise InputError(
        f"raft keeps {self.keep} of {sampling.samples_per_prompt} responses to a prompt: set "
        "sampling.samples_per_prompt above keep"
      )


def kept(scores: jax.Array, config: RejectionConfig, samples_per_prompt: int) -> jax.Array:
  """1 for every response that is learned from, 0 for the others; scores [B], prompt by prompt."""
  if config.keep is not None:
    groups = scores.reshape(-1, samples_per_prompt)
    return losses.best_of_group(groups, keep=config.keep).reshape(-1)
  threshold = config.threshold
  if config.quantile is not None:
    threshold = jnp.quantile(scores, config.quantile)
  return losses.above_threshold(scores, threshold=threshold)


def rejection_learner(
  model: models.Transformer,
  config: RejectionConfig,
  *,
  sampling: SamplingConfig,
  tx: optax.GradientTransformation,
  accumulate: int = 1,
) -> Learner:
  """`(state, frozen, batch) -> (state, metrics)`: −log π per token of what is kept, `updates` steps.

  Likelihoods are at temperature 1, as in any fine-tuning: the policy of that temperature is what
  learns to say what was kept. A minibatch in which nothing was kept changes nothing but the
  optimizer's moments.

  Args:
    model: the policy's module (with its `lora_scale`).
    config: what is kept.
    sampling: what the batch was sampled with; its rows are listed prompt by prompt.
    tx: the optimizer.
    accumulate: parts of a minibatch that are differentiated one after the other.

  References:
    Dong et al. 2023 (RAFT), https://arxiv.org/abs/2304.06767; Gulcehre et al. 2023 (ReST),
    https://arxiv.org/abs/2308.08998, both with the loss of supervised fine-tuning. They fine-tune on
    one large set of samples for a while; here a step samples anew, and `epochs` is that while.
  """
  config.check(sampling)
  objective = _nll_objective(model, config)
  parts = config.minibatches * accumulate

  def learn(state: OnlineState, frozen, batch):
    scored = rollouts.score_rollout(
      model,
      None,
      state.params,
      frozen,
      batch,
      temperature=sampling.temperature,
      chunk=config.logits_chunk,
      parts=parts,
    )
    keep = kept(batch["score"], config, sampling.samples_per_prompt)
    rows = {name: batch[name] for name in ("tokens", "segment_ids")}
    rows["mask"] = batch["mask"] * keep[:, None]
    state, changes = run_updates(
      state,
      frozen,
      rows,
      objective=objective,
      tx=tx,
      epochs=config.epochs,
      minibatches=config.minibatches,
      accumulate=accumulate,
    )
    metrics = rollouts.policy_metrics(scored) | {
      "rejection/kept": Mean.of(keep),
      "rejection/kept_score": Mean.of(batch["raw_score"], keep),
    }
    return state, metrics | changes

  return learn


def _nll_objective(model: models.Transformer, config: RejectionConfig) -> step_lib.Objective:
  def objective(trainable, frozen, rows, rng):
    del rng
    variables = objectives.policy_variables(trainable["policy"], frozen)
    loss = objectives.nll(model, variables, rows, rows["mask"], chunk=config.logits_chunk)
    return loss.total, {"loss": loss}

  return objective
