"""One iteration of online learning: sample, score, learn; with what each of them took."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from align_jax import hosts, losses, models, sharding
from align_jax.losses import Mean
from align_jax.rl import instruments, rollouts
from align_jax.rl import rewards as rewards_lib
from align_jax.rl import shaping as shaping_lib
from align_jax.rl import state as state_lib
from align_jax.rl.config import SamplingConfig
from align_jax.rl.update import Learner
from align_jax.training import objectives
from align_jax.training import step as step_lib

# (policy's trainable, frozen, prompt batch, key) -> its responses, prompt by prompt
Draw = Callable[[Any, Any, dict[str, np.ndarray], jax.Array], rollouts.Rollout]


def policy_draw(
  model: models.Transformer,
  sampling: SamplingConfig,
  *,
  prompts: Sequence[Any],
  tokenizer: Any,
  eos_ids: Sequence[int],
  mesh: jax.sharding.Mesh,
) -> Draw:
  """Draws G responses of the policy to every prompt of a batch.

  Args:
    model: the policy's module (with its `lora_scale`).
    sampling: how many, how long, at what temperature.
    prompts: the records that the batches' `index` points into.
    tokenizer: gives the padding id and turns responses into text.
    eos_ids: the tokens that end a response.
    mesh: rows are split over `data` and `fsdp`.
  """

  def draw(policy, frozen, batch, rng):
    variables = objectives.policy_variables(policy, frozen)
    return rollouts.sample_rollout(
      model, variables, batch, prompts, tokenizer,
      rng=rng, sampling=sampling, eos_ids=eos_ids, mesh=mesh,
    )  # fmt: skip

  return draw


def make_iteration(
  draw: Draw,
  learner: Learner,
  *,
  rewards: Sequence[rewards_lib.Reward],
  shaping: shaping_lib.ShapingConfig,
  sampling: SamplingConfig,
  mesh: jax.sharding.Mesh,
  opponents: int = 0,
  extra_draws: int = 0,
  ema_decay: float | None = None,
  layouts: Callable | None = None,
) -> Callable:
  """`(state, frozen, batch) -> (state, metrics, rollout)`: sample, score, learn.

  Args:
    draw: answers a batch of prompts.
    learner: changes the parameters; compiled here, once.
    rewards: the terms of the score.
    shaping: what is done to their sum.
    sampling: what `draw` was made with.
    mesh: rows are split over `data` and `fsdp`.
    opponents: rows of others that `draw` puts behind every response of the policy. They are scored,
      and the learner sees them, but they count in no metric of the responses.
    extra_draws: k of dynamic sampling. A batch then holds k + 1 times as many prompts as are learned
      from; a group of equal scores is replaced by the next that differs, as long as there are any.
    layouts: (state, samples) -> what the learner's batch has as `layouts`; see `layout.make_layouts`.
    ema_decay: d; after every iteration params["ema"] = d·params["ema"] + (1 − d)·params["policy"].

  Returns:
    A function that reuses the memory of the state it is given. A batch is one of
    `data.prompt_batches` (tokens [P, W], lengths [P], index [P]) and may hold `ptx_` rows, which
    pass through to the learner.
  """
  every = opponents + 1
  group = every * sampling.samples_per_prompt
  compiled = compile_learner(
    learner, shaping=shaping, sampling=sampling, every=every, ema_decay=ema_decay
  )

  def iterate(state, frozen, batch):
    clock = _Clock()
    rollout, keep, of_draws = _collect(
      draw, rewards, state, frozen, batch, group, extra_draws, clock
    )
    rows = rollout.batch(whole=layouts is not None) | {"score": rollout.scores[""], "keep": keep}
    rows |= {name: x for name, x in batch.items() if name.startswith("ptx_")}
    placed = sharding.put_batch(rows, mesh, whole=True)
    if layouts is not None:
      placed["layouts"] = layouts(state, rollout.samples)
    state, metrics = clock.time("train", compiled, state, frozen, placed)
    facts = {n[5:]: hosts.fetch(metrics.pop(n)) for n in list(metrics) if n.startswith("rows/")}
    rollout = dataclasses.replace(rollout, facts=facts)
    own = rollout.take(np.arange(0, len(rollout.texts), every))
    metrics |= {f"score/{name}": Mean.of(x) for name, x in own.scores.items() if name}
    metrics |= instruments.rollout_metrics(own, sampling.samples_per_prompt)
    metrics |= of_draws | clock.metrics()
    metrics["sampling/tokens_per_s"] = of_draws["sampling/tokens"] / clock.seconds["sample"]
    return state, metrics, rollout

  return iterate


def compile_learner(
  learner: Learner,
  *,
  shaping: shaping_lib.ShapingConfig,
  sampling: SamplingConfig,
  every: int = 1,
  ema_decay: float | None = None,
) -> Callable:
  """The jitted part of an iteration, `(state, frozen, scored rows) -> (state, metrics)`.

  It reuses the memory of its state. `every`: rows a response of the policy, opponents included.
  """
  learn = functools.partial(
    _learn,
    learner=learner,
    shaping=shaping,
    max_length=sampling.max_new_tokens,
    every=every,
    ema_decay=ema_decay,
  )
  return jax.jit(learn, donate_argnums=0)


class _Clock:
  """Seconds spent on each part of an iteration."""

  def __init__(self):
    self.seconds: dict[str, float] = {}

  def time(self, name: str, function, *args):
    start = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
    return result

  def metrics(self) -> dict[str, float]:
    return {f"time/{name}": seconds for name, seconds in self.seconds.items()}


def _collect(draw, rewards, state, frozen, batch, group: int, extra_draws: int, clock: _Clock):
  """(scored rollout, rows to learn from [B] float32, metrics), drawn until all groups differ."""
  wanted = len(batch["lengths"]) // (extra_draws + 1)
  drawn, differ = [], np.zeros(0, bool)
  for turn in range(extra_draws + 1):
    part = {
      k: batch[k][turn * wanted : (turn + 1) * wanted] for k in ("tokens", "lengths", "index")
    }
    key = jax.random.fold_in(state.key(state_lib.SAMPLING), turn)
    rollout = clock.time("sample", draw, state.params["policy"], frozen, part, key)
    scores = clock.time("score", rewards_lib.score, rewards, rollout)
    drawn.append(dataclasses.replace(rollout, scores=scores))
    if not extra_draws:
      break
    groups = jnp.asarray(scores[""].reshape(-1, group))
    differ = np.concatenate([differ, np.asarray(losses.dynamic_sampling_mask(groups)) > 0])
    if differ.sum() >= wanted:
      break
  metrics = {"sampling/tokens": float(sum(d.samples.lengths.sum() for d in drawn))}
  if not extra_draws:
    return drawn[0], np.ones(len(drawn[0].texts), np.float32), metrics
  # Groups that differ come first, in the order they were drawn; what is missing is filled up with others.
  chosen = np.argsort(~differ, kind="stable")[:wanted]
  rows = (chosen[:, None] * group + np.arange(group)).reshape(-1)
  metrics |= {"dynamic/draws": float(len(drawn)), "dynamic/kept": float(differ[chosen].mean())}
  keep = np.repeat(differ[chosen], group).astype(np.float32)
  return rollouts.concatenate(drawn).take(rows), keep, metrics


def _learn(
  state: state_lib.OnlineState,
  frozen: Any,
  batch: dict[str, jax.Array],
  *,
  learner: Learner,
  shaping: shaping_lib.ShapingConfig,
  max_length: int,
  ema_decay: float | None,
  every: int,
) -> tuple[state_lib.OnlineState, step_lib.Metrics]:
  """The compiled part: shapes the scores, learns, counts the iteration.

  The learner's batch has the shaped `score`, the `raw_score`, and a `baseline` [] that has not seen
  them: the mean of all earlier scores, or 0 where scores are normalised by it.
  """
  lengths = jnp.sum(batch["mask"], axis=1)
  scores, moments = shaping_lib.shape_scores(
    batch["score"], batch["finished"], lengths, state.moments, shaping, max_length=max_length
  )
  baseline = jnp.zeros(()) if shaping.normalise else state.moments.mean
  shaped = batch | {"score": scores, "raw_score": batch["score"], "baseline": baseline}
  state, metrics = learner(state, frozen, shaped)
  metrics |= {
    "score": Mean.of(batch["score"][::every]),
    "score/std": jnp.std(batch["score"][::every]),
    "response_length": Mean.of(lengths[::every]),
    "eos_rate": Mean.of(batch["finished"][::every]),
    "tokens": jnp.sum(batch["segment_ids"] > 0),
  }
  params = state.params if ema_decay is None else _averaged(state.params, ema_decay)
  return dataclasses.replace(state, step=state.step + 1, params=params, moments=moments), metrics


def _averaged(params, decay: float):
  def blend(average, weight):
    return decay * average + (1 - decay) * weight

  return params | {"ema": jax.tree.map(blend, params["ema"], params["policy"])}


# How far the sampler's log-probs may be from the trainer's on average, in nats a token: rounding that
# differs with the order of summation, and far below what a wrong mask or temperature causes.
_MISMATCH = {"float32": 0.05, "bfloat16": 0.3, "float16": 0.3}


def check_identity(values: dict[str, float], *, dtype: str) -> None:
  """Stops a run unless, at step 0, the policy is its reference and the trainer its own sampler.

  Raises:
    FloatingPointError: if the first ratio is not 1, the KL to the reference not 0, or the sampler's
      log-probs are further from the trainer's than rounding in `dtype` explains.
  """
  bounds = {"ppo/first_ratio_error_max": 1e-3, "kl/ref": 1e-3}
  bounds["ppo/sampler_mismatch"] = _MISMATCH[dtype]
  for name, bound in bounds.items():
    if name in values and not abs(values[name]) <= bound:
      raise FloatingPointError(f"at step 0 {name} must be 0; it is {values[name]:.6f}")
