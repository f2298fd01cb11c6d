"""Learning from preferences between samples of one's own: online DPO and its kin, XPO, Nash-MD.

Rows of a rollout are prompt by prompt. Online DPO pairs the best with the worst of G responses of the
policy; XPO and Nash-MD put behind every response of the policy one of an opponent (rows y₀ ỹ₀ y₁ ỹ₁...).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from align_jax import losses, models
from align_jax.errors import InputError
from align_jax.losses import Mean
from align_jax.rl import rollouts
from align_jax.rl.config import SamplingConfig
from align_jax.rl.engine import Draw
from align_jax.rl.state import OnlineState
from align_jax.rl.update import Learner, run_updates
from align_jax.training import objectives, pair_scores, preference_objectives
from align_jax.training import step as step_lib
from align_jax.training.preferences import PreferenceConfig

METHODS = ("online_dpo", "xpo", "nash_md")
_SETTINGS = {
  "online_dpo": {"objective"},
  "xpo": {"beta", "alpha"},
  "nash_md": {"beta", "mixture"},
}
_NOT_ONLINE = {"chosen_step_mask", "pair_mask", "shift"}  # steps, whole batches, memory of steps


@dataclasses.dataclass(frozen=True)
class OnlinePreferenceConfig:
  """A method and its settings; a setting is given exactly where it is used."""

  name: str  # one of METHODS
  objective: PreferenceConfig | None = (
    None  # online_dpo: any objective on pairs; OAIF dpo, ipo, hinge
  )
  beta: float | None = None  # xpo: of DPO, paper 0.1; nash_md: of the KL, TRL 0.1
  alpha: float | None = None  # xpo: weight of exploration; TRL 1e-5
  mixture: float | None = None  # nash_md: the reference's share of the opponent; TRL 0.5
  epochs: int = 1  # passes over the pairs
  minibatches: int = 1  # optimizer steps a pass
  logits_chunk: int | None = None  # time steps of logits held at once; None holds all

  def __post_init__(self):
    if self.name not in METHODS:
      raise InputError(f"name must be one of {', '.join(METHODS)}, not {self.name!r}")
    for setting in ("objective", "beta", "alpha", "mixture"):
      given, used = getattr(self, setting) is not None, setting in _SETTINGS[self.name]
      if given != used:
        raise InputError(f"{setting} {'must be set for' if used else 'is not used by'} {self.name}")
    for name in ("epochs", "minibatches"):
      if getattr(self, name) < 1:
        raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
    if self.logits_chunk is not None and self.logits_chunk < 1:
      raise InputError(f"logits_chunk must be at least 1, not {self.logits_chunk}")
    if self.beta is not None and (self.beta < 0 or (self.beta == 0 and self.name == "xpo")):
      raise InputError("beta must be positive (for nash_md it may be 0)")
    if self.alpha is not None and self.alpha < 0:
      raise InputError("alpha must not be negative")
    if self.mixture is not None and not 0 <= self.mixture <= 1:
      raise InputError("mixture must be in [0, 1]: 0 is self-play, 1 the reference")
    if self.objective is not None:
      self._check_objective(self.objective)

  def _check_objective(self, objective: PreferenceConfig):
    if objective.unpaired or _NOT_ONLINE & objective.arrays:
      raise InputError(f"objective {objective.name!r} is not built for pairs sampled online")
    if objective.sync_every:
      raise InputError("objective.sync_every is not used online: the reference stays")

  @property
  def opponents(self) -> int:
    """Rows of others behind every response of the policy."""
    return 0 if self.name == "online_dpo" else 1

  @property
  def updates(self) -> int:
    """Optimizer steps of one iteration: what a learning-rate schedule counts."""
    return self.epochs * self.minibatches

  def pairs_per_prompt(self, sampling: SamplingConfig) -> int:
    """Pairs learned from, for every prompt of an iteration; InputError if there can be none."""
    if self.name != "online_dpo":
      return sampling.samples_per_prompt
    if sampling.samples_per_prompt < 2:
      raise InputError(
        "online_dpo compares its samples: set sampling.samples_per_prompt to 2 or more"
      )
    return 1


def preference_draw(
  model: models.Transformer,
  config: OnlinePreferenceConfig,
  sampling: SamplingConfig,
  *,
  prompts: Sequence[Any],
  tokenizer: Any,
  eos_ids: Sequence[int],
  mesh: jax.sharding.Mesh,
) -> Draw:
  """Draws G responses of the policy to every prompt and, behind each, its opponent's.

  The opponent is the reference (xpo), or the geometric mixture π^(1−w)·π_ref^w, renormalised token by
  token (nash_md). Arguments as of `policy_draw`.
  """

  def sample(variables, batch, rng, mixture=None):
    return rollouts.sample_rollout(
      model, variables, batch, prompts, tokenizer,
      rng=rng, sampling=sampling, eos_ids=eos_ids, mesh=mesh, mixture=mixture,
    )  # fmt: skip

  def draw(policy, frozen, batch, rng):
    own = objectives.policy_variables(policy, frozen)
    if config.name == "online_dpo":
      return sample(own, batch, rng)
    reference = objectives.reference_variables(frozen)
    ours, theirs = jax.random.split(rng)
    if config.name == "xpo":
      opponent = sample(reference, batch, theirs)
    else:
      opponent = sample(own, batch, theirs, (reference, config.mixture))
    return rollouts.interleave([sample(own, batch, ours), opponent])

  return draw


def preference_learner(
  model: models.Transformer,
  config: OnlinePreferenceConfig,
  *,
  sampling: SamplingConfig,
  tx: optax.GradientTransformation,
  accumulate: int = 1,
) -> Learner:
  """`(state, frozen, batch) -> (state, metrics)`: pairs by score, and `config.updates` steps.

  Of two responses that of the higher score wins; a pair of equal scores has weight 0. Nash-MD's
  preference is σ(difference of scores): calibrated if the score is the sum of Bradley–Terry rewards,
  neither normalised nor clipped. Log-probs are of the distribution that was sampled from.

  Args:
    model: the policy's module (with its `lora_scale`).
    config: the method and its settings.
    sampling: what the batch was sampled with.
    tx: the optimizer.
    accumulate: parts of a minibatch that are differentiated one after the other.
  """
  pairs = {"online_dpo": _best_and_worst, "xpo": _against_opponent, "nash_md": _games}[config.name]
  objective = _objective(model, config, sampling.temperature)
  parts = config.minibatches * accumulate
  group = sampling.samples_per_prompt
  config.pairs_per_prompt(sampling)

  def learn(state: OnlineState, frozen, batch):
    stride = config.opponents + 1
    learned = batch if config.name != "nash_md" else {k: _rows(x, stride) for k, x in batch.items()}
    scored = rollouts.score_rollout(
      model,
      None,
      state.params,
      frozen,
      learned,
      temperature=sampling.temperature,
      chunk=config.logits_chunk,
      parts=parts,
    )
    rows, metrics = pairs(scored, batch["score"], group)
    own = scored if config.name != "xpo" else {k: _rows(x, stride) for k, x in scored.items()}
    metrics |= rollouts.policy_metrics(own)
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
    return state, metrics | changes

  return learn


def _rows(x, stride: int):
  return x[::stride] if jnp.ndim(x) else x


def _best_and_worst(batch, scores, group: int):
  """Pairs [P, 2] of the best and the worst of every group."""
  grouped = scores.reshape(-1, group)
  best, worst, weight = losses.best_and_worst(grouped)
  places = jnp.stack([best, worst], axis=1)
  return _pairs(batch, places + group * jnp.arange(len(grouped))[:, None], scores, weight)


def _against_opponent(batch, scores, group: int):
  """Pairs [P, 2] of winner and loser; `explored` [P] is the place of the reference's response."""
  del group
  best, worst, weight = losses.best_and_worst(scores.reshape(-1, 2))
  places = jnp.stack([best, worst], axis=1) + 2 * jnp.arange(len(best))[:, None]
  rows, metrics = _pairs(batch, places, scores, weight)
  return rows | {"explored": (best == 0).astype(jnp.int32)}, metrics | _win_rate(scores)


def _pairs(batch, places, scores, weight):
  """Rows `places` [P, 2] of the batch, laid out as `preference_objectives` reads them."""
  mask = batch["mask"][places]
  shifted = {"response_mask": mask, "ref_logprobs": batch["ref_logprobs"][places]}
  # In a batch of pairs what belongs to a token stands at its own place, not at its predecessor's.
  rows = {name: jnp.pad(x, ((0, 0), (0, 0), (1, 0))) for name, x in shifted.items()}
  rows |= {name: batch[name][places] for name in ("tokens", "segment_ids")}
  rows |= {"weight": weight, "label_prob": jnp.ones_like(weight)}
  margin = scores[places[:, 0]] - scores[places[:, 1]]
  return rows, {"pairs/kept": Mean.of(weight), "pairs/margin": Mean.of(margin)}


def _games(batch, scores, group: int):
  """The policy's own rows [P] with their summed log-probs and P(y ≻ y′)."""
  del group
  own, theirs = scores.reshape(-1, 2).T
  names = ("tokens", "segment_ids", "mask")
  rows = {name: batch[name] for name in names} | {"preferences": jax.nn.sigmoid(own - theirs)}
  for name in ("old", "ref"):
    rows[f"{name}_logps"] = losses.masked_sum(batch[f"{name}_logprobs"], batch["mask"], axis=1)
  metrics = {"pairs/preference": Mean.of(rows["preferences"])}
  return rows, metrics | {"pairs/margin": Mean.of(own - theirs)} | _win_rate(scores)


def _win_rate(scores):
  own, theirs = scores.reshape(-1, 2).T
  return {"pairs/win_rate": Mean.of(jnp.where(own == theirs, 0.5, own > theirs))}


def _objective(model, config: OnlinePreferenceConfig, temperature: float) -> step_lib.Objective:
  chunk = config.logits_chunk
  if config.name == "xpo":
    return _xpo_objective(model, config, temperature)
  if config.name == "nash_md":
    return _nash_md_objective(model, config, temperature)
  of_pairs = preference_objectives.preference_objective(
    model, config.objective, chunk=chunk, temperature=temperature
  )

  def objective(trainable, frozen, rows, rng):
    loss_sum, metrics = of_pairs(trainable["policy"], frozen, rows, rng)
    del metrics["tokens"]  # counted once an iteration, not once an update
    return loss_sum, metrics

  return objective


def _xpo_objective(model, config: OnlinePreferenceConfig, temperature: float):
  def objective(trainable, frozen, rows, rng):
    del rng
    policy = objectives.policy_variables(trainable["policy"], frozen)
    scores = pair_scores.score_pairs(
      model, policy, rows, chunk=config.logits_chunk, temperature=temperature
    )
    logps = losses.masked_sum(scores.logprobs, scores.mask, axis=-1)
    ref = losses.masked_sum(pair_scores.aligned(rows, "ref_logprobs"), scores.mask, axis=-1)
    explored = jnp.take_along_axis(logps, rows["explored"][:, None], axis=1)[:, 0]
    loss = losses.xpo_loss(*logps.T, *ref.T, explored, beta=config.beta, alpha=config.alpha)
    weight = rows["weight"]
    metrics = objectives.reward_metrics(*(config.beta * (logps - ref)).T, weight) | {
      "loss": Mean.of(loss, weight),
      "xpo/explored_logps": Mean.of(explored, weight),
    }
    return metrics["loss"].total, metrics

  return objective


def _nash_md_objective(model, config: OnlinePreferenceConfig, temperature: float):
  def objective(trainable, frozen, rows, rng):
    del rng
    logprobs, _ = rollouts.policy_logprobs(
      model,
      objectives.policy_variables(trainable["policy"], frozen),
      rows,
      temperature=temperature,
      chunk=config.logits_chunk,
    )
    logps = losses.masked_sum(logprobs, rows["mask"], axis=1)
    loss = losses.nash_md_loss(
      logps, rows["ref_logps"], rows["preferences"], rows["old_logps"], beta=config.beta
    )
    metrics = {"loss": Mean.of(loss)}
    return metrics["loss"].total, metrics

  return objective
