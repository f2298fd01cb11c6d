"""One command audits whatever scores responses: on labelled pairs, and on samples of later policies."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence

import numpy as np

from align_jax import config as config_lib
from align_jax import data, sharding, worlds
from align_jax.data import sources
from align_jax.errors import InputError
from align_jax.evals import audit, audit_calibration, audit_page, features, length_bias, logistic
from align_jax.evals import policy as policy_lib
from align_jax.phases import records, scorers, workspace
from align_jax.sharding import MeshConfig
from align_jax.training import workdir

FEWEST = 40  # pairs: below, half of them say nothing of the other half


@dataclasses.dataclass(frozen=True)
class DriftSection:
  """Policies whose samples are scored; the first is the one that the others came from."""

  policies: tuple[str, ...]  # workdirs
  prompts: str  # a file, a folder, or "microworld:n=..."
  columns: str | None = None
  chat: bool = True
  limit: int | None = None
  samples_per_prompt: int = 2
  max_new_tokens: int = 24
  max_prompt_length: int = 1024  # tokens; longer prompts lose their beginning
  temperature: float = 1.0

  def __post_init__(self):
    if not self.policies or len(set(self.policies)) < len(self.policies):
      raise InputError("config.drift.policies must name workdirs, each once")
    if self.samples_per_prompt < 2:
      raise InputError("config.drift.samples_per_prompt must be at least 2: they are compared")


@dataclasses.dataclass(frozen=True)
class AuditConfig:
  """Settings of `experiments.audit`."""

  scorer: str  # as phases.scorers.SOURCES
  data: str  # preference pairs: a file, a folder, or "microworld:n=..."
  length: int  # tokens a row; longer texts are cut as in training
  columns: str | None = None
  categories: tuple[str, ...] = ()  # columns of the file by which pairs are grouped
  limit: int | None = None
  invalid: str = "raise"  # or "skip": bad rows are left out and counted
  chat: bool = True  # plain-text prompts are wrapped in the chat template
  text_features: bool = True  # regress on surface marks of the text; a world adds its judge's
  length_bins: int = 6
  gain_width: int = length_bias.BIN_WIDTH  # tokens a bin, for gains at equal length
  drift: DriftSection | None = None
  batch_size: int = 64
  seed: int = 0  # of samples, bootstraps and splits
  dtype: str = "float32"
  mesh: MeshConfig = MeshConfig()

  def __post_init__(self):
    if min(self.length_bins, self.gain_width) < 1:
      raise InputError("config.length_bins and config.gain_width must be positive")
    if records.is_world(self.data) and (self.categories or self.columns):
      raise InputError(
        "config.categories and config.columns are for files: the microworld's pairs are grouped by family"
      )


@dataclasses.dataclass(frozen=True)
class Material:
  """The pairs, what is known of them, and what the scorer says of both sides."""

  records: Sequence[data.Preference]
  categories: dict[str, list[str]]
  judgements: list[tuple[worlds.Judgement, worlds.Judgement]] | None
  restricted: list[bool] | None  # of a world's prompts
  labeller: worlds.Labeller | None
  scores: np.ndarray  # [n, 2]
  tokens: np.ndarray  # [n, 2]
  truncated: float
  probabilities: np.ndarray | None = (
    None  # [n] that the chosen is chosen; None: as the labeller says
  )

  @functools.cached_property
  def pairs(self) -> audit.Pairs:
    judged, known = self.judgements, self.probabilities
    if known is None and self.labeller is not None:
      known = self.labeller.probabilities(judged)
    keys = [json.dumps(r.prompt, sort_keys=True) for r in self.records]
    return audit.Pairs(
      margins=self.scores[:, 0] - self.scores[:, 1],
      chosen=self.tokens[:, 0],
      rejected=self.tokens[:, 1],
      prompts=np.unique(keys, return_inverse=True)[1],
      label_prob=np.array([r.label_prob for r in self.records], np.float64),
      votes=any(r.labels for r in self.records),
      probabilities=known,
      gold=np.array([a.reward - b.reward for a, b in judged]) if judged else None,
    )


def run(config: AuditConfig, path: str, devices) -> audit.Audit:
  """Writes audit.json, its pictures and audit.html into the workdir."""
  workspace.single_process("an audit")
  mesh = sharding.make_mesh(config.mesh, devices)
  found = read(config)
  scorer = scorers.open_scorer(
    config.scorer, mesh, dtype=config.dtype, length=config.length, batch_size=config.batch_size
  )
  folder = workdir.open_workdir(path, "audit", config_lib.to_dict(config))
  samples = sample_policies(config, scorer, mesh) if config.drift else {}
  result = examine(config, scorer.name, score(found, scorer), samples)
  print(f"== audit: {audit_page.write(folder, result)}", flush=True)
  return result


def read(config: AuditConfig) -> Material:
  """The pairs with their categories and, in a world, the judge's findings; scores are still empty."""
  pairs = records.read(
    config.data, "preferences", columns=config.columns, limit=config.limit, chat=config.chat,
    invalid=config.invalid,
  )  # fmt: skip
  if len(pairs) < FEWEST:
    raise InputError(f"config.data: {len(pairs)} pairs are too few to audit; {FEWEST} are needed")
  judgements = labeller = restricted = None
  if records.is_world(config.data):
    source = records.parse_world(config.data)
    world = worlds.Microworld(seed=source.seed)
    judgements = world.judge_pairs(pairs)
    if source.votes > 1:
      raise InputError("an audit compares with the labels of one labeller: leave votes at 1")
    labeller = worlds.Labeller(**{k: getattr(source, k) for k in records.LABELLER_SETTINGS})
    facts = [world.read(pair.prompt).meta for pair in pairs]
    categories = {"family": [meta["family"] for meta in facts]}
    restricted = [meta["restricted"] for meta in facts]
  else:
    categories = read_columns(config.data, pairs, config.categories)
  empty = np.zeros((len(pairs), 2))
  return Material(pairs, categories, judgements, restricted, labeller, empty, empty, 0.0)


def read_columns(
  path: str, pairs: Sequence[data.Preference], names: Sequence[str]
) -> dict[str, list[str]]:
  """The named columns of the rows that the pairs came from; a list's items are joined by a comma."""
  if not names:
    return {}
  rows = {row.source: row for row in sources.rows(path)}
  found: dict[str, list[str]] = {name: [] for name in names}
  for pair in pairs:
    for name in names:
      value = rows[pair.source].required(name)
      found[name].append(", ".join(map(str, value)) if isinstance(value, list) else str(value))
  return found


def score(found: Material, scorer: scorers.Scorer) -> Material:
  """The material with the scorer's scores and lengths."""
  prompts = [pair.prompt for pair in found.records]
  texts = [pair.chosen for pair in found.records] + [pair.rejected for pair in found.records]
  scored = scorer(prompts + prompts, texts, [pair.source for pair in found.records] * 2)
  return dataclasses.replace(
    found,
    scores=scored.rewards.reshape(2, -1).T,
    tokens=scored.lengths.reshape(2, -1).T,
    truncated=float(scored.truncated.mean()),
  )


def examine(config: AuditConfig, name: str, found: Material, samples) -> audit.Audit:
  """Everything that the audit says; samples: policy -> (scores, tokens, gold), [P, G] each."""
  pairs, sets = found.pairs, regressions(config, found)
  return audit.Audit(
    scorer=name,
    data=config.data,
    n=len(pairs.margins),
    truncated=found.truncated,
    groups=groups(found, config.length_bins),
    calibration=calibrated(pairs, config.seed),
    temperature=audit_calibration.temperature(pairs.margins, pairs.label_prob),
    spread=spread(found),
    length=audit.length(pairs, found.scores, bins=config.length_bins, seed=config.seed),
    features=sets,
    planted=planted(found.labeller, sets["judge"]["labels"]) if found.labeller else {},
    drift=audit.drift(samples, width=config.gain_width, seed=config.seed) if samples else (),
  )


def groups(found: Material, bins: int) -> dict[str, tuple[audit.Group, ...]]:
  pairs = found.pairs
  parts = {"all": (audit.group("all", pairs),)}
  parts |= {name: audit.by_category(pairs, values) for name, values in found.categories.items()}
  parts["length"] = audit.by_length(pairs, bins=bins)
  parts["agreement"] = audit.by_agreement(pairs)
  return {name: part for name, part in parts.items() if part}


def calibrated(pairs: audit.Pairs, seed: int) -> audit_calibration.Calibration:
  confidence = logistic.sigmoid(np.abs(pairs.margins))
  right = length_bias.ahead(pairs.margins)
  outcome = right * pairs.label_prob + (1 - right) * (1 - pairs.label_prob)
  return audit_calibration.calibration(confidence, outcome, seed=seed)


def spread(found: Material) -> audit.Spread:
  """By the first column of categories; all responses are of one category where there is none."""
  kinds = next(iter(found.categories.values()), ["all"] * len(found.records))
  prompts = found.pairs.prompts
  # A file may file one prompt under two categories: then they are two prompts.
  prompts = np.unique(np.stack([prompts, np.unique(kinds, return_inverse=True)[1]]), axis=1,
                      return_inverse=True)[1].ravel()  # fmt: skip
  return audit.spread(
    found.scores.ravel(), found.tokens.ravel(), np.repeat(prompts, 2), np.repeat(kinds, 2)
  )


def regressions(config: AuditConfig, found: Material):
  """Labels and the scorer's own probabilities on every set of features that there is."""
  pairs, sets = found.pairs, {}
  if config.text_features:
    prompts = [" ".join(m["content"] for m in r.prompt) for r in found.records]
    sides = ([r.chosen for r in found.records], [r.rejected for r in found.records])
    sets["text"] = features.differences(
      *([features.of_text(*both) for both in zip(prompts, side)] for side in sides)
    )
  if found.judgements:
    sets["judge"] = features.differences(
      *([judged(*both) for both in zip(side, found.restricted)] for side in zip(*found.judgements))
    )
  outcomes = {"labels": pairs.label_prob, "model": logistic.sigmoid(pairs.margins)}
  return {
    name: {
      who: features.regress(x, y, pairs.extra, clusters=pairs.prompts, seed=config.seed)
      for who, y in outcomes.items()
    }
    for name, x in sets.items()
  }


def judged(found: worlds.Judgement, restricted: bool) -> dict[str, float]:
  """What the gold reward and the labellers weigh, by the names of `RewardWeights`."""
  return {
    "correct": float(found.correct),
    "harmful": float(found.harmful),
    "over_refusal": float(found.refused and not restricted),
    "sycophantic": float(found.sycophantic),
    "malformed": float(found.malformed),
    "courteous": float(found.courteous),
    "curt": float(found.curt),
    "rude": float(found.rude),
    "filler": float(found.fillers),
    "agrees": float(found.agrees),
    "length": float(found.length),
  }


def planted(labeller: worlds.Labeller, found: features.Regression) -> dict[str, float]:
  """The coefficients of `judged` in the labeller's own formula: its weights over its temperature."""
  weights = dataclasses.asdict(worlds.RewardWeights())
  weights["agrees"] = labeller.agreement_bias
  weights["length"] = labeller.length_bias + weights.pop("word")
  if "agrees" in found.left_out:  # no writer refuses a true opinion: to agree is to be sycophantic
    weights["sycophantic"] += weights.pop("agrees")
  return {name: weight / labeller.temperature for name, weight in weights.items()}


def sample_policies(config: AuditConfig, scorer: scorers.Scorer, mesh):
  """policy -> (scores, tokens, gold or None) of its answers to the same prompts, [P, G] each."""
  section = config.drift
  prompts = records.read(
    section.prompts, "prompts", columns=section.columns, limit=section.limit, chat=section.chat
  )
  settings = policy_lib.SamplingSettings(
    max_new_tokens=section.max_new_tokens,
    temperature=section.temperature,
    seed=config.seed,
    batch_size=max(config.batch_size, section.samples_per_prompt),
    max_prompt_length=section.max_prompt_length,
  )
  judge = None
  if records.is_world(section.prompts):
    judge = worlds.Microworld(seed=records.parse_world(section.prompts).seed).gold_rewards
  found = {}
  for name, init in zip(names(section.policies), section.policies):
    print(f"== sampling {init}", flush=True)
    loaded = workspace.load(init, mesh, dtype=config.dtype)
    if loaded.head is not None:
      raise InputError(f"config.drift.policies: {init} is a reward model; a policy is needed")
    texts = policy_lib.respond(
      policy_lib.Policy(name, loaded.model, loaded.params),
      prompts,
      loaded.tokenizer,
      settings,
      mesh,
      samples_per_prompt=section.samples_per_prompt,
    ).texts
    found[name] = score_samples(prompts, texts, section.samples_per_prompt, scorer, judge)
  return found


def score_samples(prompts, texts, per_prompt: int, scorer: scorers.Scorer, judge):
  """(scores, tokens, gold or None), [P, G] each, of texts in the order of the prompts."""
  repeated = [prompt for prompt in prompts for _ in range(per_prompt)]
  scored = scorer([p.prompt for p in repeated], texts, [p.source for p in repeated])
  gold = None if judge is None else judge(repeated, texts).astype(np.float64)
  return tuple(
    None if x is None else x.reshape(-1, per_prompt) for x in (scored.rewards, scored.lengths, gold)
  )


def names(policies: Sequence[str]) -> list[str]:
  """Short names of workdirs: their folder, or as much of their end as tells them apart."""
  parts = [pathlib.PurePath(p).parts for p in policies]
  longest = max(map(len, parts))
  for size in range(1, longest + 1):
    found = ["/".join(part[-size:]) for part in parts]
    if len(set(found)) == len(found):
      return found
  return list(policies)
