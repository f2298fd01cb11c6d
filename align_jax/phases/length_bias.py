"""What a length bias of the labels does to a reward model and to a policy, and what takes it away.

Labels are made of a gold reward that has nothing to do with length, and a share of them is flipped
toward the longer response. On them a plain reward model is trained, which is also residualised on
length, and a two-head one; a policy is trained on each of the three and compared with its start.
"""

import dataclasses
import functools
import json
import pathlib
import random
from typing import Any

import numpy as np

from align_jax import config as config_lib
from align_jax import data, sharding, worlds
from align_jax.errors import InputError
from align_jax.evals import audit as audit_lib
from align_jax.evals import audit_page, length_bias, length_bias_page, results, statistics
from align_jax.evals import policy as policy_lib
from align_jax.phases import (
  audit,
  evaluate,
  online,
  pipeline,
  reward,
  reward_config,
  scorers,
  sft,
  workers,
  workspace,
)
from align_jax.phases.rewards import RewardConfig
from align_jax.training import workdir

LABELLED = "labelled"  # what reward.data says: the pairs labelled here
# Of form, nothing is rewarded: courtesies and fillers are words, and curt answers lack some.
WEIGHTS = worlds.RewardWeights(courteous=0.0, curt=0.0, rude=0.0, filler=0.0)
VARIANTS = ("naive", "residual", "two_head")


@dataclasses.dataclass(frozen=True)
class LabelsSection:
  """The pairs, and how their labels come about."""

  train: int  # pairs
  held_out: int
  flip_longer: float  # share of labels that go to the longer side, whatever else is true
  temperature: float = 0.68  # of the labeller, before flips
  world: int = 0  # seed of the microworld

  def __post_init__(self):
    if not 0 <= self.flip_longer <= 1:
      raise InputError(f"config.labels.flip_longer must be in [0, 1], not {self.flip_longer}")
    if min(self.train, self.held_out) < audit.FEWEST:
      raise InputError(f"config.labels: train and held_out must be at least {audit.FEWEST}")


@dataclasses.dataclass(frozen=True)
class LengthBiasConfig:
  """Settings of `experiments.length_bias`."""

  seed: int  # of the labels and of samples
  start: str  # "@sft", or a trained policy that all start from
  sft: sft.SftConfig | None
  labels: LabelsSection
  reward: reward_config.RewardConfig  # of both reward models; data is `labelled`
  debias: reward_config.DebiasSection  # of the two-head one
  online: online.OnlineConfig  # of all policies; its rewards are set here
  evaluation: evaluate.EvaluateConfig  # prompts and sampling; scored by this experiment's gold
  length_bins: int = 6

  def __post_init__(self):
    if self.reward.data.train != LABELLED or self.reward.data.eval or self.reward.debias:
      raise InputError(
        f"config.reward: data.train must be {LABELLED!r}, data.eval and debias None: pairs are "
        "labelled here, and config.debias is the other model's"
      )
    if self.online.rewards or self.online.reward_model:
      raise InputError("config.online: rewards must be empty, reward_model None: they are set here")
    if any(init != self.start for init in (self.reward.model.init, self.online.model.init)):
      raise InputError("config.reward.model.init and config.online.model.init must be config.start")
    e = self.evaluation
    if e.policy or e.reference or e.rewards or e.best_of or e.scorer != "gold":
      raise InputError("config.evaluation: policies, scorer and rewards are set here: leave them")


def run(settings: dict[str, Any], path: str, devices) -> length_bias_page.Report:
  """Runs what is not done yet under `path`, and writes length_bias.json, .html and the pictures."""
  workspace.single_process("the length-bias experiment")
  root = pathlib.Path(path)
  config = config_lib.build(LengthBiasConfig, pipeline.resolve(settings, str(root)))
  workdir.open_workdir(root, "length_bias", config_lib.to_dict(config))
  steps = Steps(config, root, tuple(devices))
  with workers.lock(root / "lock"):
    steps.train_models()
    report = length_bias_page.Report(
      flip_longer=config.labels.flip_longer,
      gold_correlation=steps.gold_correlation(),
      models=tuple(steps.examine(name) for name in VARIANTS),
      policies=tuple(steps.policy(name) for name in ("start", *VARIANTS)),
    )
  print(f"== report: {length_bias_page.write(root, report)}", flush=True)
  return report


@dataclasses.dataclass(frozen=True)
class Steps:
  """The steps of the experiment; each leaves files that say it is done, and is then passed over."""

  config: LengthBiasConfig
  root: pathlib.Path
  devices: tuple

  @functools.cached_property
  def mesh(self):
    return sharding.make_mesh(self.config.online.mesh, self.devices)

  @functools.cached_property
  def world(self) -> worlds.Microworld:
    return worlds.Microworld(seed=self.config.labels.world, weights=WEIGHTS)

  def labelled(self, split: str) -> tuple[list[data.Preference], np.ndarray]:
    """The pairs of a split, and P(the chosen is chosen) of each, in closed form."""
    section = self.config.labels
    n = section.train if split == "train" else section.held_out
    pairs = self.world.pairs(n, split, self.config.seed)
    judged = self.world.judge_pairs(pairs)
    fair = worlds.Labeller(temperature=section.temperature).probabilities(judged)
    lengths = np.array([[a.length, b.length] for a, b in judged])
    p = length_bias.flip_toward_longer(fair, *lengths.T, share=section.flip_longer)
    rng = random.Random(f"labels/{split}/{self.config.seed}")
    first = np.array([rng.random() < x for x in p])
    found = []
    for pair, swap in zip(pairs, ~first):
      chosen, rejected = pair.replies[::-1] if swap else pair.replies
      found.append(data.Preference(pair.prompt.prompt, chosen, rejected, source=pair.prompt.source))
    return found, np.where(first, p, 1 - p)

  def train_models(self) -> None:
    """The start, if it is to be trained, and both reward models."""
    if self.config.sft is not None and not workdir.is_finished(self.root / "sft"):
      print("== sft: training", flush=True)
      sft.run(self.config.sft, str(self.root / "sft"), self.devices)
    file = self.root / "labelled.jsonl"
    if not file.exists():
      lines = (json.dumps(data.to_row(pair)) + "\n" for pair in self.labelled("train")[0])
      results.write_text(file, "".join(lines))
    section = dataclasses.replace(self.config.reward.data, train=str(file))
    plain = dataclasses.replace(self.config.reward, data=section)
    two_head = dataclasses.replace(plain, debias=self.config.debias, centering=0.0)
    for name, settings in (("naive", plain), ("two_head", two_head)):
      if not workdir.is_finished(self.reward_model(name)):
        print(f"== reward model {name}: training", flush=True)
        reward.run(settings, self.reward_model(name), self.devices)

  def reward_model(self, name: str) -> str:
    """Where the model of a variant is; the residual one is the naive one's scores less length."""
    return str(self.root / "reward" / ("naive" if name == "residual" else name))

  def scorer(self, name: str) -> scorers.Scorer:
    return scorers.open_scorer(
      self.reward_model(name), self.mesh, length=self.config.reward.data.length,
      batch_size=self.config.evaluation.batch_size,
    )  # fmt: skip

  @functools.cached_property
  def held_out(self) -> audit.Material:
    """The held-out pairs without scores."""
    pairs, probabilities = self.labelled("heldout")
    judged = self.world.judge_pairs(pairs)
    facts = [self.world.read(pair.prompt).meta for pair in pairs]
    empty = np.zeros((len(pairs), 2))
    return audit.Material(
      records=pairs,
      categories={"family": [meta["family"] for meta in facts]},
      judgements=judged,
      restricted=[meta["restricted"] for meta in facts],
      labeller=None,
      scores=empty,
      tokens=empty,
      truncated=0.0,
      probabilities=probabilities,
    )

  def gold_correlation(self) -> statistics.Estimate:
    """Of gold reward and length within the held-out prompts: about 0, or this is no experiment."""
    judged = self.held_out.judgements
    gold, lengths = (
      np.array([[getattr(x, name) for x in both] for both in judged]).ravel()
      for name in ("reward", "length")
    )
    prompts = np.repeat(np.arange(len(judged)), 2)
    return length_bias.correlation(gold, lengths, prompts, seed=self.config.seed).pearson

  @functools.cached_property
  def residual(self) -> length_bias.Residual:
    """λ of the naive model, over both responses of the pairs that it was trained on."""
    file = self.root / "residual.json"
    if not file.exists():
      pairs = self.labelled("train")[0]
      texts = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
      scored = self.scorer("naive")([pair.prompt for pair in pairs] * 2, texts)
      keys = [json.dumps(pair.prompt) for pair in pairs] * 2
      found = length_bias.fit_residual(scored.rewards, scored.lengths, keys)
      workdir.write_json(file, dataclasses.asdict(found))
    return config_lib.build(length_bias.Residual, workdir.read_json(file), str(file), finite=False)

  def examine(self, name: str) -> length_bias_page.Model:
    """A reward model on the held-out pairs; its whole audit is in audit/<name>."""
    folder = self.root / "audit" / name
    if not (folder / "audit.json").exists():
      folder.mkdir(parents=True, exist_ok=True)
      found = audit.score(self.held_out, self.scorer(name))
      if name == "residual":
        scores = self.residual.apply(found.scores, found.tokens)
        found = dataclasses.replace(found, scores=scores)
      settings = audit.AuditConfig(
        scorer=name,
        data=f"microworld, {self.config.labels.flip_longer:.0%} of the labels flipped to the longer",
        length=self.config.reward.data.length,
        text_features=False,
        length_bins=self.config.length_bins,
        seed=self.config.seed,
      )
      audit_page.write(folder, audit.examine(settings, name, found, {}))
    found = audit_lib.load(folder)
    whole, part = found.groups["all"][0], found.length
    return length_bias_page.Model(
      name=name,
      accuracy=whole.accuracy,
      ceiling=whole.ceiling,
      gold=whole.gold,
      correlation=part.correlation.pearson,
      slope=part.correlation.slope,
      split=part.split,
      gold_gap=part.model_gap,
      labels_gap=part.labels_gap,
      labels_gap_planted=part.labels_gap_planted,
      bins=part.bins,
    )

  def policy(self, name: str) -> length_bias_page.Policy:
    """Trains the policy of a variant, and measures it and the start on the same prompts."""
    folder = self.root / "policy" / name
    init = self.config.start if name == "start" else str(folder)
    if name != "start" and not workdir.is_finished(folder):
      print(f"== policy {name}: training", flush=True)
      online.run(self.online_config(name), str(folder), self.devices)
    file = folder / "length_bias.json"
    if not file.exists():
      print(f"== policy {name}: measuring", flush=True)
      folder.mkdir(parents=True, exist_ok=True)
      evaluation, growth = self._measure(name, init)
      found = length_bias_page.Policy(name, growth, evaluation)
      text = json.dumps(results.to_json(found), indent=2, allow_nan=False)
      results.write_text(file, text + "\n")
    return config_lib.build(
      length_bias_page.Policy, results.read_json(file), str(file), finite=False
    )

  def online_config(self, name: str) -> online.OnlineConfig:
    """The settings of a variant's policy: the residual's reward is the model's less λ a token."""
    rewards = {"model": RewardConfig("model")}
    if name == "residual":
      rewards["length"] = RewardConfig("length", weight=-self.residual.slope)
    return dataclasses.replace(
      self.config.online, rewards=rewards, reward_model=self.reward_model(name)
    )

  @functools.cached_property
  def _start(self):
    """(the start, its answers, prompts, tokenizer, sampling settings)."""
    loaded = workspace.load(self.config.start, self.mesh, dtype=self.config.evaluation.dtype)
    start = policy_lib.Policy("start", loaded.model, loaded.params)
    prompts = evaluate.read_prompts(self.config.evaluation)
    settings = evaluate.sampling_settings(self.config.evaluation)
    answers = policy_lib.respond(start, prompts, loaded.tokenizer, settings, self.mesh)
    return start, answers, prompts, loaded.tokenizer, settings

  def _measure(self, name: str, init: str):
    """(evaluation against the start by this experiment's gold, growth of the answers)."""
    start, answers, prompts, tokenizer, settings = self._start
    policy, ours = start, answers
    if name != "start":
      loaded = workspace.load(init, self.mesh, dtype=self.config.evaluation.dtype)
      policy = policy_lib.Policy(name, loaded.model, loaded.params)
      ours = policy_lib.respond(policy, prompts, tokenizer, settings, self.mesh)
    evaluation, _ = policy_lib.evaluate_policy(
      policy,
      start,
      prompts,
      tokenizer,
      lambda asked, said: self.world.gold_rewards(asked, said.texts),
      settings,
      scorer_name="gold without form",
      judge=self.world.judge,
      responses=ours,
      reference_responses=answers,
      mesh=self.mesh,
    )
    lengths = np.stack([ours.samples.lengths, answers.samples.lengths], axis=1)
    growth = statistics.bootstrap(
      lengths, lambda rows: rows[:, 0].sum() / rows[:, 1].sum() - 1, seed=self.config.seed
    )
    return evaluation, growth
