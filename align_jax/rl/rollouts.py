"""Rollouts: what the policy said, and what policy, reference and value model make of it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from align_jax import data, models, sampling
from align_jax.training import objectives


@dataclasses.dataclass(frozen=True)
class Rollout:
  """Prompts and the responses sampled to them, on the host."""

  prompts: Sequence[Any]  # B records
  texts: Sequence[str]  # B responses without special tokens
  samples: sampling.Samples
  scores: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # name -> [B]

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

  def batch(self) -> dict[str, np.ndarray]:
    """What the trainer needs; `sampler_logprobs` and `mask` [B, S-1] belong to tokens[:, 1:]."""
    return {
      "tokens": self.tokens,
      "segment_ids": self.segment_ids,
      "mask": self.response_mask[:, 1:].astype(np.float32),
      "sampler_logprobs": self.samples.logprobs[:, 1:],
      "finished": self.samples.finished,
    }


def sample_rollout(
  model: models.Transformer,
  policy_variables: dict[str, Any],
  batch: dict[str, np.ndarray],
  prompts: Sequence[Any],
  tokenizer: Any,
  *,
  rng: jax.Array,
  max_new_tokens: int,
  temperature: float,
  eos_ids: Sequence[int],
  mesh: jax.sharding.Mesh | None = None,
) -> Rollout:
  """One response to every row of a prompt batch (tokens [B, P], lengths [B], index [B]).

  A row's key is its place in the batch, not its record: a prompt drawn twice is answered twice.
  """
  samples = sampling.generate(
    model,
    policy_variables["params"],
    batch["tokens"],
    lengths=batch["lengths"],
    max_new_tokens=max_new_tokens,
    eos_ids=eos_ids,
    pad_id=data.pad_id(tokenizer),
    rng=rng,
    temperature=temperature,
    lora=policy_variables.get("lora"),
    mesh=mesh,
  )
  texts = sampling.decode_texts(samples, tokenizer)
  return Rollout([prompts[i] for i in batch["index"]], texts, samples)


def value_variables(value: Any, frozen: Any) -> dict[str, Any]:
  """The collections of the value trunk: its own weights, or `frozen["value"]` and adapter."""
  if "lora" in value:
    return {"params": frozen["value"], "lora": value["lora"]}
  return {"params": value["trunk"]}


def token_values(model, value: Any, frozen: Any, batch: dict[str, jax.Array]) -> jax.Array:
  """V of the state *before* each of tokens[:, 1:], [B, S-1] float32."""
  hidden = model.apply(
    value_variables(value, frozen),
    batch["tokens"],
    segment_ids=batch["segment_ids"],
    method=models.Transformer.hidden,
  )
  return models.scalar_head(value["head"], hidden[:, :-1])


def policy_logprobs(
  model, trainable: Any, frozen: Any, batch, temperature: float, logits_chunk: int | None
) -> tuple[jax.Array, jax.Array]:
  """(log-probs of tokens[:, 1:], entropies) [B, S-1] of the policy, on the path that trains."""
  variables = objectives.policy_variables(trainable["policy"], frozen)
  return _logprobs(model, variables, batch, temperature, logits_chunk)


def _logprobs(model, variables, batch, temperature, logits_chunk):
  return models.token_logprobs(
    model,
    variables,
    batch["tokens"],
    segment_ids=batch["segment_ids"],
    chunk_size=logits_chunk,
    temperature=temperature,
    return_entropy=True,
  )


def score_rollout(
  model: models.Transformer,
  value_model: models.Transformer,
  trainable: Any,
  frozen: Any,
  batch: dict[str, jax.Array],
  *,
  temperature: float,
  logits_chunk: int | None,
) -> dict[str, jax.Array]:
  """The batch with `old_logprobs`, `ref_logprobs`, `entropy` and `old_values`, all [B, S-1].

  The policy's log-probs are recomputed on the path that trains, so that the first ratio is exactly
  1; how far the sampler's own are from them is a metric. All are of the tempered distribution.
  """
  old, entropy = policy_logprobs(model, trainable, frozen, batch, temperature, logits_chunk)
  reference = objectives.reference_variables(frozen)
  scored = {
    "old_logprobs": old,
    "entropy": entropy,
    "ref_logprobs": _logprobs(model, reference, batch, temperature, logits_chunk)[0],
    "old_values": token_values(value_model, trainable["value"], frozen, batch),
  }
  # Off the mask nothing is meant, and zeros keep it from ever being read by accident.
  return batch | {k: jnp.where(batch["mask"] > 0, v, 0.0) for k, v in scored.items()}
