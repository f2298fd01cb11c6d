"""PPO as InstructGPT has it: per-token KL in the reward, GAE, clipped policy and value losses.

Trainable: {"policy": weights or lora, "value": {"trunk" or "lora", "head"}}. Frozen: "base" (with a
LoRA policy; it is then the reference as well) or "ref", and "value" (with a LoRA value model).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from align_jax import losses, models, sharding
from align_jax.errors import InputError
from align_jax.losses import Mean
from align_jax.rl import rewards as rewards_lib
from align_jax.rl import rollouts
from align_jax.rl import shaping as shaping_lib
from align_jax.training import objectives
from align_jax.training import state as state_lib
from align_jax.training import step as step_lib


@dataclasses.dataclass(frozen=True)
class PpoConfig:
  """Hyper-parameters; N+ is Huang et al. 2024 (2403.17031), OAI is Ziegler et al. 2019."""

  max_new_tokens: int
  temperature: float = 1.0  # InstructGPT 1; OAI and N+ 0.7
  epochs: int = 4  # passes over a batch; OAI and N+ 4, InstructGPT 1
  minibatches: int = 1  # optimizer steps a pass; OAI and N+ 1, InstructGPT 8
  clip_eps: float = 0.2
  clip_eps_high: float | None = None  # DAPO 0.28
  dual_clip: float | None = None  # 3 where used
  value_clip_eps: float | None = 0.2
  value_coef: float = 0.1
  entropy_coef: float = 0.0
  gamma: float = 1.0
  lam: float = 0.95
  kl_coef: float = 0.05  # N+ 0.05, InstructGPT 0.02, Llama 2 0.005 to 0.01
  kl_target: float | None = None  # nats a sequence; makes kl_coef adaptive; OAI 6
  kl_horizon: float = 10_000.0  # episodes
  whiten_rewards: bool = False  # scale only; OAI does
  whiten_advantages: bool = True
  shaping: shaping_lib.ShapingConfig = shaping_lib.ShapingConfig()
  logits_chunk: int | None = None  # time steps of logits held at once; None holds all

  def __post_init__(self):
    for name in ("max_new_tokens", "epochs", "minibatches"):
      if getattr(self, name) < 1:
        raise InputError(f"ppo.{name} must be at least 1, not {getattr(self, name)}")
    if self.temperature <= 0:
      raise InputError("ppo.temperature must be positive: a greedy policy does not explore")
    if self.kl_coef < 0 or (self.kl_target is not None and self.kl_target <= 0):
      raise InputError("ppo.kl_coef must not be negative, and ppo.kl_target positive")
    if self.kl_target is not None and self.kl_coef == 0:
      raise InputError("ppo.kl_target would adapt a kl_coef of 0, which stays 0 for ever")

  @property
  def updates(self) -> int:
    """Optimizer steps of one iteration: what a learning-rate schedule counts."""
    return self.epochs * self.minibatches


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PpoState:
  """All that an iteration changes; saved and restored whole, a run resumes bit-exactly.

  Every random number is drawn from `fold_in(rng, step)`, so `rng` itself never changes.
  """

  step: jax.Array  # iterations done
  params: Any  # {"policy", "value"}
  opt_state: optax.OptState
  rng: jax.Array
  kl_coef: jax.Array
  moments: shaping_lib.Moments  # of the scores


def create_state(
  trainable: Any, tx: optax.GradientTransformation, config: PpoConfig, seed: int, mesh
) -> PpoState:
  """A fresh state around {"policy", "value"}, whose arrays are copied and keep their placement."""
  train = state_lib.create_state(trainable, tx, seed, mesh)
  scalars = jnp.float32(config.kl_coef), shaping_lib.Moments.empty()
  kl_coef, moments = jax.device_put(scalars, sharding.replicated(mesh))
  return PpoState(train.step, train.params, train.opt_state, train.rng, kl_coef, moments)


def estimate_advantages(
  batch: dict[str, jax.Array], scores: jax.Array, kl_coef: jax.Array, config: PpoConfig
) -> dict[str, jax.Array]:
  """The batch with `advantages` = whiten(GAE(KL-shaped rewards)) and `returns`, both [B, T].

  Rewards are whitened (scale only) before GAE where asked for; returns never are.
  """
  mask = batch["mask"]
  rewards = losses.kl_shaped_rewards(
    scores, batch["old_logprobs"], batch["ref_logprobs"], mask, kl_coef=kl_coef
  )
  if config.whiten_rewards:
    rewards = losses.masked_whiten(rewards, mask, shift_mean=False)
  advantages, returns = losses.gae(
    rewards, batch["old_values"], mask, gamma=config.gamma, lam=config.lam
  )
  if config.whiten_advantages:
    advantages = losses.masked_whiten(advantages, mask)
  return batch | {"advantages": advantages, "returns": returns}


def ppo_objective(
  model: models.Transformer, value_model: models.Transformer, config: PpoConfig
) -> step_lib.Objective:
  """Policy loss + value_coef · value loss − entropy_coef · entropy, summed over response tokens."""

  def objective(trainable, frozen, batch, rng):
    del rng
    mask = batch["mask"]
    logprobs, entropy = rollouts.policy_logprobs(
      model, trainable, frozen, batch, config.temperature, config.logits_chunk
    )
    values = rollouts.token_values(value_model, trainable["value"], frozen, batch)
    policy_loss = losses.ppo_policy_loss(
      logprobs,
      batch["old_logprobs"],
      batch["advantages"],
      clip_eps=config.clip_eps,
      clip_eps_high=config.clip_eps_high,
      dual_clip=config.dual_clip,
    )
    value_loss = losses.ppo_value_loss(
      values, batch["old_values"], batch["returns"], clip_eps=config.value_clip_eps
    )
    loss = policy_loss + config.value_coef * value_loss
    if config.entropy_coef:
      loss -= config.entropy_coef * entropy
    metrics = {
      "loss": Mean.of(loss, mask),
      "ppo/policy_loss": Mean.of(policy_loss, mask),
      "value/loss": Mean.of(value_loss, mask),
    } | _ratio_metrics(logprobs, batch, config)
    return metrics["loss"].total, metrics

  return objective


def _ratio_metrics(logprobs, batch, config: PpoConfig):
  """How far the policy has moved within this iteration; a maximum travels as Mean(maximum, 1)."""
  mask, advantages = batch["mask"], batch["advantages"]
  ratio = losses.probability_ratio(logprobs, batch["old_logprobs"])
  ratio = jnp.where(mask > 0, jax.lax.stop_gradient(ratio), 1.0)
  high = config.clip_eps if config.clip_eps_high is None else config.clip_eps_high
  binds = jnp.where(
    advantages > 0, ratio > 1 + high, (advantages < 0) & (ratio < 1 - config.clip_eps)
  )
  one = jnp.ones(())
  return {
    "ppo/clip_fraction": Mean.of(binds, mask),
    "ppo/kl_old": Mean.of(losses.kl_estimate(batch["old_logprobs"], logprobs, kind="k3"), mask),
    "ppo/ratio_max": Mean(jnp.max(ratio), one),
    "ppo/first_ratio_error": Mean(jnp.max(jnp.abs(ratio - 1.0)), one),
  }


def learn(
  state: PpoState,
  frozen: Any,
  batch: dict[str, jax.Array],
  *,
  model: models.Transformer,
  value_model: models.Transformer,
  config: PpoConfig,
  tx: optax.GradientTransformation,
  accumulate: int = 1,
) -> tuple[PpoState, step_lib.Metrics]:
  """One iteration on a scored rollout: advantages, then `epochs` passes in shuffled minibatches.

  Args:
    state: of which `params` sampled the rollout.
    frozen: see the top of this file.
    batch: of `Rollout.batch()`, and `score` [B].

  Returns:
    The state after `config.updates` optimizer steps, and the metrics of the iteration.
  """
  scores, moments = shaping_lib.shape_scores(
    batch["score"], batch["finished"], state.moments, config.shaping
  )
  batch = rollouts.score_rollout(
    model,
    value_model,
    state.params,
    frozen,
    batch,
    temperature=config.temperature,
    logits_chunk=config.logits_chunk,
  )
  batch = estimate_advantages(batch, scores, state.kl_coef, config)
  metrics = _rollout_metrics(batch, state.kl_coef)
  objective = ppo_objective(model, value_model, config)
  update = functools.partial(step_lib.train_step, objective=objective, tx=tx, accumulate=accumulate)
  train, changes = _update(state, frozen, batch, update, config)
  kl_coef = _next_kl_coef(state.kl_coef, metrics["kl/ref"].compute(), len(scores), config)
  state = PpoState(state.step + 1, train.params, train.opt_state, state.rng, kl_coef, moments)
  return state, metrics | changes


def _update(state: PpoState, frozen, batch, update: Callable, config: PpoConfig):
  """All optimizer steps of an iteration in one scan over shuffled minibatches."""
  rows = batch["tokens"].shape[0]
  if rows % config.minibatches:
    raise InputError(f"{rows} prompts cannot be split into ppo.minibatches = {config.minibatches}")
  keys = jax.random.split(_key(state, 1), config.epochs)
  order = jax.vmap(lambda key: jax.random.permutation(key, rows))(keys)
  order = order.reshape(config.updates, rows // config.minibatches)
  names = (
    "tokens", "segment_ids", "mask", "old_logprobs", "old_values", "advantages", "returns"
  )  # fmt: skip

  def body(train, rows):
    return update(train, frozen, {name: batch[name][rows] for name in names})

  train = state_lib.TrainState(
    state.step * config.updates, state.params, state.opt_state, _key(state, 2)
  )
  train, metrics = jax.lax.scan(body, train, order)
  return train, {name: _over_updates(name, value) for name, value in metrics.items()}


def _over_updates(name: str, value: Mean):
  """Of the stacked [updates] metrics: the maximum of maxima, the first of firsts, else the sum."""
  if name == "ppo/ratio_max":
    return jnp.max(value.compute())
  if name == "ppo/first_ratio_error":
    return value.compute()[0]
  return jax.tree.map(lambda x: jnp.sum(x, axis=0), value)


def _rollout_metrics(batch, kl_coef) -> step_lib.Metrics:
  mask, old = batch["mask"], batch["old_logprobs"]

  def kl(kind):
    estimate = losses.kl_estimate(old, batch["ref_logprobs"], kind=kind)
    return Mean.of(losses.masked_sum(estimate, mask, axis=1))

  gap = jnp.abs(batch["sampler_logprobs"] - old)
  return {
    "score": Mean.of(batch["score"]),
    "score/std": jnp.std(batch["score"]),
    "kl/ref": kl("k1"),
    "kl/ref_k3": kl("k3"),
    "kl_coef": kl_coef,
    "entropy": Mean.of(batch["entropy"], mask),
    "response_length": Mean.of(jnp.sum(mask, axis=1)),
    "eos_rate": Mean.of(batch["finished"]),
    "ppo/sampler_mismatch": Mean.of(gap, mask),
    "ppo/sampler_mismatch_max": jnp.max(jnp.where(mask > 0, gap, 0.0)),
    "value/mean": Mean.of(batch["old_values"], mask),
    "value/explained_variance": explained_variance(batch["old_values"], batch["returns"], mask),
    "tokens": jnp.sum(batch["segment_ids"] > 0),
  }


def explained_variance(values: jax.Array, returns: jax.Array, mask: jax.Array) -> jax.Array:
  """1 − Var(R − V)/Var(R) over the mask: 1 is a perfect critic, 0 one that knows only the mean.

  values, returns, mask [B, T] -> []; 0 where all returns are equal.
  """

  def variance(x):
    return losses.masked_mean((x - losses.masked_mean(x, mask)) ** 2, mask)

  total = variance(returns)
  known = total > 1e-12
  return jnp.where(known, 1.0 - variance(returns - values) / jnp.where(known, total, 1.0), 0.0)


def _next_kl_coef(kl_coef, kl, batch_size: int, config: PpoConfig):
  if config.kl_target is None:
    return kl_coef
  return losses.adaptive_kl_coef(
    kl_coef, kl, target=config.kl_target, horizon=config.kl_horizon, batch_size=batch_size
  )


def _key(state: PpoState, use: int) -> jax.Array:
  """The key of one use (0 sampling, 1 shuffling, 2 training) in this iteration."""
  return jax.random.fold_in(jax.random.fold_in(state.rng, state.step), use)


def make_iteration(
  model: models.Transformer,
  value_model: models.Transformer,
  *,
  config: PpoConfig,
  tx: optax.GradientTransformation,
  rewards: Sequence[rewards_lib.Reward],
  prompts: Sequence[Any],
  tokenizer: Any,
  eos_ids: Sequence[int],
  mesh: jax.sharding.Mesh,
  accumulate: int = 1,
) -> Callable[[PpoState, Any, dict], tuple[PpoState, step_lib.Metrics, rollouts.Rollout]]:
  """`(state, frozen, prompt batch) -> (state, metrics, rollout)`: sample, score, learn.

  Args:
    model: the policy's module (with its `lora_scale`).
    value_model: the value model's; it may differ, but must share the tokenizer.
    config: hyper-parameters.
    tx: the optimizer; it steps `config.updates` times an iteration.
    rewards: the terms of the score.
    prompts: the records that the batches' `index` points into.
    tokenizer: gives the padding id and turns responses into text.
    eos_ids: the tokens that end a response.
    mesh: rows are split over `data` and `fsdp`.
    accumulate: parts of a minibatch that are differentiated one after the other.

  Returns:
    A function that compiles once and reuses the memory of the state it is given. A prompt batch is
    one of `data.prompt_batches`: tokens [B, P], lengths [B], index [B].
  """
  settings = {"config": config, "tx": tx, "accumulate": accumulate}
  compiled = jax.jit(
    functools.partial(learn, model=model, value_model=value_model, **settings), donate_argnums=0
  )

  def iterate(state, frozen, batch):
    rollout = rollouts.sample_rollout(
      model,
      objectives.policy_variables(state.params["policy"], frozen),
      batch,
      prompts,
      tokenizer,
      rng=_key(state, 0),
      max_new_tokens=config.max_new_tokens,
      temperature=config.temperature,
      eos_ids=eos_ids,
      mesh=mesh,
    )
    scores = rewards_lib.score(rewards, rollout)
    rollout = dataclasses.replace(rollout, scores=scores)
    scored = sharding.put_batch(rollout.batch() | {"score": scores[""]}, mesh)
    state, metrics = compiled(state, frozen, scored)
    by_name = {f"score/{name}": Mean.of(x) for name, x in scores.items() if name}
    return state, metrics | by_name, rollout

  return iterate


# How far the sampler's log-probs may be from the trainer's on average, in nats a token: rounding that
# differs with the order of summation, and far below what a wrong mask or temperature causes.
_MISMATCH = {"float32": 0.05, "bfloat16": 0.3, "float16": 0.3}


def check_identity(values: dict[str, float], *, dtype: str) -> None:
  """Stops a run unless, at step 0, the policy is its reference and the trainer its own sampler.

  Raises:
    FloatingPointError: if the first ratio is not 1, the KL to the reference not 0, or the sampler's
      log-probs are further from the trainer's than rounding in `dtype` explains.
  """
  bounds = {"ppo/first_ratio_error": 1e-3, "kl/ref": 1e-3, "ppo/sampler_mismatch": _MISMATCH[dtype]}
  for name, bound in bounds.items():
    if not abs(values[name]) <= bound:
      raise FloatingPointError(f"at step 0 {name} must be 0; it is {values[name]:.6f}")
