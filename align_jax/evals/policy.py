"""Sample a policy, score what it said, and measure how far it moved from its reference."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from align_jax import data, hosts, models, sampling
from align_jax.errors import InputError
from align_jax.evals import statistics
from align_jax.evals.results import RATES, PolicyEvaluation, Sample
from align_jax.evals.statistics import Estimate

# (prompts, Responses) -> [n] scores: a judge of texts, or a reward model of the tokens as sampled.
Scorer = Callable[[Sequence[Any], "Responses"], np.ndarray]
# (prompt, response) -> an object whose attributes RATES are bools, or None: not applicable.
Judge = Callable[[Any, str], Any]


@dataclasses.dataclass(frozen=True)
class Policy:
  """A model with its weights under a name; `lora` are its adapters, None if merged or absent."""

  name: str
  model: models.Transformer
  params: Any
  lora: Any = None

  @property
  def variables(self) -> dict[str, Any]:
    return {"params": self.params} | ({} if self.lora is None else {"lora": self.lora})


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
  """How responses are drawn; KL is measured between the distributions at this temperature."""

  max_new_tokens: int
  temperature: float = 1.0
  seed: int = 0
  batch_size: int = 64
  max_prompt_length: int = 1024

  def __post_init__(self):
    if self.temperature <= 0:
      raise InputError("temperature must be positive: a greedy policy has no KL to estimate")


@dataclasses.dataclass(frozen=True)
class Responses:
  """What one policy answered, in the order of the prompts, with the tokens it was sampled as."""

  texts: tuple[str, ...]
  samples: sampling.Samples


def sequence_kl(
  logprobs: np.ndarray, ref_logprobs: np.ndarray, mask: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Σ_t log r_t (k1) and Σ_t (1/r_t - 1 + log r_t) (k3) of each response, r = π/π_ref.

  Over responses sampled from π, the mean of either is KL(π ‖ π_ref) of whole responses in nats.
  logprobs, ref_logprobs, mask [B, T] -> two arrays [B]. Ratios are capped at e²⁰ against overflow.
  """
  mask = np.asarray(mask, bool)
  ratio = np.where(mask, np.asarray(logprobs, np.float64) - ref_logprobs, 0.0)
  return ratio.sum(axis=1), (np.expm1(np.clip(-ratio, -20, 20)) + ratio).sum(axis=1)


def by_family(
  families: Sequence[str], scores: np.ndarray, lengths: np.ndarray, judgements: Sequence[Any]
) -> dict[str, dict[str, Estimate]]:
  """Mean score and length, and the judge's rates, within every family and over "all".

  families [n]; scores, lengths [n]; judgements [n], or empty when there is no judge. A rate that
  applies to no item of a family is left out.
  """
  labels = np.asarray(families)
  table = {}
  for family in ["all", *sorted(set(families))]:
    rows = np.flatnonzero((labels == family) | (family == "all"))
    table[family] = {
      "score": statistics.mean(scores[rows]),
      "length": statistics.mean(lengths[rows]),
    } | _rates([judgements[row] for row in rows] if judgements else [])
  return table


def respond(
  policy: Policy,
  prompts: Sequence[Any],
  tokenizer,
  settings: SamplingSettings,
  mesh=None,
  *,
  samples_per_prompt: int = 1,
) -> Responses:
  """Responses, prompt by prompt. The draws depend on (seed, prompt's place), not on the batch.

  Two policies are so given the same noise: equal weights answer alike, and the paired difference of
  similar ones has less variance.
  """
  tokens = [data.encode_prompt(prompt, tokenizer, settings.max_prompt_length) for prompt in prompts]
  samples = sampling.generate(
    policy.model,
    policy.params,
    tokens,
    max_new_tokens=settings.max_new_tokens,
    temperature=settings.temperature,
    rng=jax.random.key(settings.seed),
    eos_ids=data.stop_ids(tokenizer),
    pad_id=data.pad_id(tokenizer),
    lora=policy.lora,
    mesh=mesh,
    prompt_ids=np.arange(len(tokens)),
    batch_size=settings.batch_size,
    samples_per_prompt=samples_per_prompt,
  )
  return Responses(tuple(sampling.decode_texts(samples, tokenizer)), samples)


def response_logprobs(
  policy: Policy, samples: sampling.Samples, *, temperature: float, batch_size: int
) -> np.ndarray:
  """Log-probs of the sampled tokens under any policy, [B, T]; 0 off the response."""
  tokens, mask = np.asarray(samples.tokens), np.asarray(samples.response_mask)
  out = np.zeros(tokens.shape, np.float32)
  for rows in _row_blocks(len(tokens), batch_size):
    logprobs = _token_logprobs(policy.model, policy.variables, tokens[rows], temperature)
    out[rows, 1:] = hosts.fetch(logprobs)
  return np.where(mask, out, 0.0)


def evaluate_policy(
  policy: Policy,
  reference: Policy,
  prompts: Sequence[Any],
  tokenizer,
  scorer: Scorer,
  settings: SamplingSettings,
  *,
  scorer_name: str = "gold",
  judge: Judge | None = None,
  responses: Responses | None = None,
  reference_responses: Responses | None = None,
  mesh=None,
) -> tuple[PolicyEvaluation, tuple[Sample, ...]]:
  """Samples both policies on the same prompts, scores both, and reports the paired comparison.

  prompts: data.Prompt records [n], whose meta may name a "family". responses and
  reference_responses: what `respond` gave for either policy with the same settings, to sample it
  once for many comparisons. Returns the evaluation and one Sample a prompt; `results.save` writes both.
  """
  if not prompts:
    raise InputError("an evaluation needs at least one prompt")
  theirs = reference_responses or respond(reference, prompts, tokenizer, settings, mesh)
  same = policy.params is reference.params and policy.lora is reference.lora
  ours = theirs if same else responses or respond(policy, prompts, tokenizer, settings, mesh)
  scores, their_scores = _scores(scorer, prompts, ours), _scores(scorer, prompts, theirs)
  judgements = [judge(p, t) for p, t in zip(prompts, ours.texts)] if judge else []
  families = [prompt.meta.get("family", "all") for prompt in prompts]
  lengths = np.asarray(ours.samples.lengths, float)
  k1, k3 = _kl_to(reference, policy, ours.samples, settings)
  evaluation = PolicyEvaluation(
    policy=policy.name,
    reference=reference.name,
    scorer=scorer_name,
    n=len(prompts),
    seed=settings.seed,
    temperature=settings.temperature,
    max_new_tokens=settings.max_new_tokens,
    **_comparison(scores, their_scores),
    kl=statistics.mean(k1),
    kl_k3=statistics.mean(k3),
    length=statistics.mean(lengths),
    reference_length=statistics.mean(theirs.samples.lengths),
    finished=statistics.proportion(np.asarray(ours.samples.finished)),
    families=by_family(families, scores, lengths, judgements),
  )
  return evaluation, _kept(prompts, ours.texts, scores, families)


def _comparison(scores: np.ndarray, their_scores: np.ndarray) -> dict[str, Any]:
  return {
    "score": statistics.mean(scores),
    "reference_score": statistics.mean(their_scores),
    "score_gain": statistics.paired_difference(scores, their_scores),
    "win_rate": statistics.win_rate(scores, their_scores),
  }


def _scores(scorer: Scorer, prompts: Sequence[Any], responses: Responses) -> np.ndarray:
  scores = np.asarray(scorer(prompts, responses), np.float64)
  if scores.shape != (len(prompts),):
    raise ValueError(f"the scorer gave shape {scores.shape} for {len(prompts)} responses.")
  return scores


def _kl_to(
  reference: Policy, policy: Policy, samples: sampling.Samples, settings: SamplingSettings
) -> tuple[np.ndarray, np.ndarray]:
  # Both sides are recomputed by one function, so that equal weights give exactly 0: the sampler's
  # own log-probs differ from these by the rounding of another order of summation.
  score = functools.partial(
    response_logprobs,
    samples=samples,
    temperature=settings.temperature,
    batch_size=settings.batch_size,
  )
  return sequence_kl(score(policy), score(reference), np.asarray(samples.response_mask))


def _kept(
  prompts: Sequence[Any], texts: Sequence[str], scores: np.ndarray, families: Sequence[str]
) -> tuple[Sample, ...]:
  return tuple(
    Sample(tuple(dict(message) for message in prompt.prompt), text, float(score), family)
    for prompt, text, score, family in zip(prompts, texts, scores, families)
  )


def _rates(judgements: Sequence[Any]) -> dict[str, Estimate]:
  rates = {}
  for name in RATES:
    verdicts = [getattr(judgement, name) for judgement in judgements]
    applicable = [float(verdict) for verdict in verdicts if verdict is not None]
    if applicable:
      rates[name] = statistics.proportion(applicable)
  return rates


def _row_blocks(rows: int, size: int) -> list[np.ndarray]:
  # The last block repeats its final row up to full size: one shape, one compilation.
  return [np.minimum(np.arange(start, start + size), rows - 1) for start in range(0, rows, size)]


@functools.partial(jax.jit, static_argnames=("model", "temperature"))
def _token_logprobs(model, variables, tokens: jax.Array, temperature: float) -> jax.Array:
  return models.token_logprobs(model, variables, tokens, chunk_size=128, temperature=temperature)
