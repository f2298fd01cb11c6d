"""A round's policy on held-out prompts: against the start, against the policy before it, on old pairs."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from align_jax import data, sampling
from align_jax.evals import policy as policy_lib
from align_jax.evals import rounds, statistics
from align_jax.evals.results import Sample
from align_jax.phases import evaluate, workspace


@dataclasses.dataclass(frozen=True)
class Ruler:
  """What every policy is measured with: the start, its answers, and how others are asked and scored."""

  settings: evaluate.EvaluateConfig
  start: policy_lib.Policy
  answers: policy_lib.Responses  # of the start
  prompts: Sequence[data.Prompt]
  tokenizer: object
  scorer: policy_lib.Scorer
  judge: policy_lib.Judge | None
  mesh: object

  @classmethod
  def make(cls, settings: evaluate.EvaluateConfig, devices, mesh) -> "Ruler":
    """settings.reference is the start."""
    found = evaluate.sample_reference(settings, devices)
    scorer, judge = evaluate.make_scorer(settings, found.loaded, mesh)
    start = named(settings.reference, found.loaded)
    prompts = evaluate.read_prompts(settings)
    return cls(
      settings, start, found.responses, prompts, found.loaded.tokenizer, scorer, judge, mesh
    )

  def load(self, init: str) -> policy_lib.Policy:
    """A policy by its workdir; the start itself is not loaded twice."""
    if init == self.settings.reference:
      return self.start
    return named(init, workspace.load(init, self.mesh, dtype=self.settings.dtype))


def named(init: str, loaded: workspace.Loaded) -> policy_lib.Policy:
  """The policy under the name by which reports know it: a round's is round_2, not policy."""
  folder = pathlib.Path(init)
  name = folder.parent.name if folder.name == "policy" else folder.name
  return policy_lib.Policy(name, loaded.model, loaded.params)


def measure(
  ruler: Ruler,
  number: int,
  policy: policy_lib.Policy,
  previous: policy_lib.Policy,
  pairs: Mapping[int, Sequence[data.Preference]],
  length: int,
) -> tuple[rounds.PolicyDrift, tuple[Sample, ...]]:
  """Measures policy `number`; `pairs` are those of every round up to it, rows of `length` tokens."""
  sampling_settings = evaluate.sampling_settings(ruler.settings)
  same = policy is ruler.start
  answers = (
    ruler.answers
    if same
    else policy_lib.respond(policy, ruler.prompts, ruler.tokenizer, sampling_settings, ruler.mesh)
  )
  evaluation, kept = policy_lib.evaluate_policy(
    policy,
    ruler.start,
    ruler.prompts,
    ruler.tokenizer,
    ruler.scorer,
    sampling_settings,
    scorer_name=ruler.settings.scorer,
    judge=ruler.judge,
    responses=answers,
    reference_responses=ruler.answers,
    mesh=ruler.mesh,
  )
  k1, k3 = _kl(policy, previous, answers.samples, ruler.settings)
  texts, bigrams = rounds.distinct(answers.texts)
  drift = rounds.PolicyDrift(
    round=number,
    evaluation=evaluation,
    kl_previous=statistics.mean(k1),
    kl_previous_k3=statistics.mean(k3),
    distinct_responses=texts,
    distinct_bigrams=bigrams,
    pairs={str(r): _pair_logprobs(ruler, policy, found, length) for r, found in pairs.items()},
    pairs_before=(
      _pair_logprobs(ruler, previous, pairs[number], length) if pairs.get(number) else None
    ),
  )
  return drift, kept


def _kl(policy, previous, samples, settings: evaluate.EvaluateConfig):
  options = {"temperature": settings.temperature, "batch_size": settings.batch_size}
  ours, theirs = (
    policy_lib.response_logprobs(which, samples, **options) for which in (policy, previous)
  )
  return policy_lib.sequence_kl(ours, theirs, np.asarray(samples.response_mask))


def _pair_logprobs(ruler: Ruler, policy, pairs: Sequence[data.Preference], length: int):
  encoded = [e for p in pairs for e in data.encode_preference(p, ruler.tokenizer, length)]
  tokens = np.full((len(encoded), length), data.pad_id(ruler.tokenizer), np.int32)
  mask = np.zeros(tokens.shape, bool)
  for row, sequence in enumerate(encoded):
    tokens[row, : len(sequence.tokens)] = sequence.tokens
    mask[row, : len(sequence.tokens)] = sequence.response_mask
  samples = sampling.Samples(
    tokens,
    np.argmax(mask, axis=1).astype(np.int32),
    mask,
    np.zeros(tokens.shape, np.float32),
    np.ones(len(tokens), bool),
  )
  logprobs = policy_lib.response_logprobs(
    policy, samples, temperature=1.0, batch_size=ruler.settings.batch_size
  )
  sums = logprobs.sum(axis=1, dtype=np.float64).reshape(-1, 2)
  return rounds.pair_logprobs(sums[:, 0], sums[:, 1])
