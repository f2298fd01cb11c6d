"""Rollouts: what the policy said, and what policy, reference and value model make of it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from align_jax import data, losses, models
from align_jax import sampling as generation
from align_jax.losses import Mean
from align_jax.rl import layout
from align_jax.rl.config import SamplingConfig
from align_jax.training import objectives
from align_jax.training import step as step_lib

_TILE = 128  # tokens: what attention by tiles goes by


@dataclasses.dataclass(frozen=True)
class Rollout:
  """Prompts and the responses sampled to them, on the host."""

  prompts: Sequence[Any]  # B records
  texts: Sequence[str]  # B responses without special tokens
  samples: generation.Samples
  scores: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # name -> [B]
  facts: dict[str, np.ndarray] = dataclasses.field(
    default_factory=dict
  )  # what the learner saw, [B]

  @property
  def tokens(self) -> np.ndarray:
    """[B, S] int32."""
    return self.samples.tokens

  @property
  def response_mask(self) -> np.ndarray:
    """[B, S] bool, true on sampled tokens."""
    return self.samples.response_mask

  @property
  def segment_ids(self) -> np.ndarray:
    """[B, S] int32, 1 on prompt and response: by length, so padding may be any token."""
    ends = self.samples.prompt_lengths + self.samples.lengths
    return (np.arange(self.tokens.shape[1]) < ends[:, None]).astype(np.int32)

  def take(self, rows: np.ndarray) -> "Rollout":
    """The rows of these numbers, in this order."""
    return Rollout(
      [self.prompts[row] for row in rows],
      [self.texts[row] for row in rows],
      jax.tree.map(lambda x: x[rows], self.samples),
      {name: values[rows] for name, values in self.scores.items()},
    )

  def batch(self, *, whole: bool = False) -> dict[str, np.ndarray]:
    """What the trainer needs; `sampler_logprobs` and `mask` [B, W-1] belong to tokens[:, 1:].

    W ≤ S as `learned_width` has it: what it cuts off is padding. With `whole` W is S.
    """
    segment_ids = self.segment_ids
    width = segment_ids.shape[1]
    if not whole:
      width = learned_width(int(segment_ids.sum(axis=1).max()), width)
    return {
      "tokens": self.tokens[:, :width],
      "segment_ids": segment_ids[:, :width],
      "mask": self.response_mask[:, 1:width].astype(np.float32),
      "sampler_logprobs": self.samples.logprobs[:, 1:width],
      "finished": self.samples.finished,
    }


def learned_width(longest: int, width: int) -> int:
  """How many columns of rows [B, width] are learned from, where the longest row has `longest` tokens.

  The next eighth of the width, in whole tiles: a learner is compiled for eight widths at most, and
  for one where rows are short.
  """
  step = -(-width // (8 * _TILE)) * _TILE
  return min(-(-longest // step) * step, width)


def sample_rollout(
  model: models.Transformer,
  variables: dict[str, Any],
  batch: dict[str, np.ndarray],
  prompts: Sequence[Any],
  tokenizer: Any,
  *,
  rng: jax.Array,
  sampling: SamplingConfig,
  eos_ids: Sequence[int],
  mesh: jax.sharding.Mesh | None = None,
  mixture: tuple[dict[str, Any], float] | None = None,
) -> Rollout:
  """G responses to every row of a prompt batch (tokens [P, W], lengths [P], index [P]).

  A row's key is its place in the batch, not its record: a prompt drawn twice is answered twice.
  `mixture` = (variables, weight) draws from the geometric mixture with a second model.
  """
  samples = generation.generate(
    model,
    variables["params"],
    batch["tokens"],
    lengths=batch["lengths"],
    max_new_tokens=sampling.max_new_tokens,
    eos_ids=eos_ids,
    pad_id=data.pad_id(tokenizer),
    rng=rng,
    temperature=sampling.temperature,
    lora=variables.get("lora"),
    mesh=mesh,
    samples_per_prompt=sampling.samples_per_prompt,
    slots=sampling.slots,
    stop=sampling.stop,
    tokenizer=tokenizer if sampling.stop else None,
    mixture=mixture,
  )
  texts = generation.decode_texts(samples, tokenizer)
  index = np.repeat(batch["index"], sampling.samples_per_prompt)
  return Rollout([prompts[i] for i in index], texts, samples)


def concatenate(parts: Sequence[Rollout]) -> Rollout:
  """The rows of all parts, one part after the other; they must be of one width."""
  samples = jax.tree.map(lambda *x: np.concatenate(x), *(part.samples for part in parts))
  names = parts[0].scores
  return Rollout(
    [prompt for part in parts for prompt in part.prompts],
    [text for part in parts for text in part.texts],
    samples,
    {name: np.concatenate([part.scores[name] for part in parts]) for name in names},
  )


def interleave(parts: Sequence[Rollout]) -> Rollout:
  """Row 0 of every part, then row 1 of every part...: one response of each to every prompt."""
  together, rows = concatenate(parts), len(parts[0].texts)
  return together.take(np.arange(len(parts) * rows).reshape(len(parts), rows).T.reshape(-1))


def value_variables(value: Any, frozen: Any) -> dict[str, Any]:
  """The collections of the value trunk: its own weights, or `frozen["value"]` and adapter."""
  if "lora" in value:
    return {"params": frozen["value"], "lora": value["lora"]}
  return {"params": value["trunk"]}


def token_values(model, value: Any, frozen: Any, batch: dict[str, jax.Array]) -> jax.Array:
  """V of the state *before* each of tokens[:, 1:], [B, S-1] float32; of laid out rows 0 off the mask."""
  variables = value_variables(value, frozen)
  if "layout" in batch:
    hidden = models.shared_hidden(model, variables, batch["layout"])
    return layout.by_response(batch["layout"], models.scalar_head(value["head"], hidden))
  hidden = model.apply(
    variables,
    batch["tokens"],
    segment_ids=batch["segment_ids"],
    method=models.Transformer.hidden,
  )
  return models.scalar_head(value["head"], hidden[:, :-1])


def policy_logprobs(
  model, variables, batch, *, temperature: float, chunk: int | None
) -> tuple[jax.Array, jax.Array]:
  """(log-probs of tokens[:, 1:], entropies) [B, S-1], 0 off the mask, on the path that trains.

  Where the batch has a `layout`, the model sees its rows.
  """
  settings = {"chunk_size": chunk, "temperature": temperature, "return_entropy": True}
  if "layout" in batch:
    rows = batch["layout"]
    found = models.target_scores(
      model, variables, models.shared_hidden(model, variables, rows), rows["targets"],
      where=rows["scored"], **settings,
    )  # fmt: skip
    return tuple(layout.by_response(rows, x) for x in found)
  tokens, segment_ids = batch["tokens"], batch["segment_ids"]
  return models.token_logprobs(
    model, variables, tokens, segment_ids=segment_ids, where=batch["mask"], **settings
  )


def score_rollout(
  model: models.Transformer,
  value_model: models.Transformer | None,
  trainable: Any,
  frozen: Any,
  batch: dict[str, jax.Array],
  *,
  temperature: float,
  chunk: int | None,
  parts: int = 1,
) -> dict[str, jax.Array]:
  """The batch with `old_logprobs`, `ref_logprobs`, `entropy` and, with a critic, `old_values` [B, S-1].

  The policy's log-probs are recomputed on the path that trains, so that the first ratio is exactly
  1; how far the sampler's own are from them is a metric. All are of the tempered distribution.
  `parts` are computed one after the other: the memory is that of B / parts rows. A `layout` of the
  batch is that of these parts.
  """
  policy = objectives.policy_variables(trainable["policy"], frozen)
  reference = objectives.reference_variables(frozen)
  settings = {"temperature": temperature, "chunk": chunk}

  def score(rows):
    old, entropy = policy_logprobs(model, policy, rows, **settings)
    scored = {"old_logprobs": old, "entropy": entropy}
    scored["ref_logprobs"] = policy_logprobs(model, reference, rows, **settings)[0]
    if value_model is not None:
      scored["old_values"] = token_values(value_model, trainable["value"], frozen, rows)
    return scored

  names = {"tokens", "segment_ids", "mask", "layout"}
  scored = _in_parts(score, {k: x for k, x in batch.items() if k in names}, parts)
  # Off the mask nothing is meant, and zeros keep it from ever being read by accident.
  return batch | {k: jnp.where(batch["mask"] > 0, v, 0.0) for k, v in scored.items()}


def policy_metrics(batch: dict[str, jax.Array]) -> step_lib.Metrics:
  """How far the policy is from its reference and from its sampler, of a batch of `score_rollout`."""
  mask, old = batch["mask"], batch["old_logprobs"]

  def kl(kind):
    estimate = losses.kl_estimate(old, batch["ref_logprobs"], kind=kind)
    return Mean.of(losses.masked_sum(estimate, mask, axis=1))

  gap = jnp.abs(batch["sampler_logprobs"] - old)
  return {
    "kl/ref": kl("k1"),
    "kl/ref_k3": kl("k3"),
    "entropy": Mean.of(batch["entropy"], mask),
    "ppo/sampler_mismatch": Mean.of(gap, mask),
    "ppo/sampler_mismatch_max": jnp.max(jnp.where(mask > 0, gap, 0.0)),
  }


def _in_parts(function, rows, parts: int):
  """function(rows), in interleaved parts one after the other."""
  if parts == 1:
    return function(rows)
  return step_lib.joined_parts(jax.lax.map(function, step_lib.interleaved_parts(rows, parts)))
