"""Iterated preference collection: sample the policy, label, train on the labels, measure, and again."""

import dataclasses
import functools
import json
import pathlib
from typing import Any

from align_jax import config as config_lib
from align_jax import data, sharding, worlds
from align_jax.errors import InputError
from align_jax.evals import results, rounds_page
from align_jax.evals import rounds as report_lib
from align_jax.phases import (
  evaluate,
  pipeline,
  preference,
  records,
  reward,
  rounds_collect,
  rounds_measure,
  sections,
  sft,
  workers,
  workspace,
)
from align_jax.training import workdir

COLLECTED = "collected"  # what preference.data.train says: the pairs of the rounds


@dataclasses.dataclass(frozen=True)
class RoundsConfig:
  """Settings of `experiments.rounds`; `@sft` and `@reward` are the workdirs of what it trains first.

  Round r samples the policy of round r - 1 on fresh prompts, has the labeller choose, and trains that
  policy on the pairs. Seeds of trainings count up by one a round.
  """

  seed: int  # of prompts, samples and labels
  rounds: int
  start: str  # "@sft", or the trained model that round 1 samples and all are compared with
  sft: sft.SftConfig | None
  reward: reward.RewardConfig | None  # trained before round 1, as "@reward"
  reward_model: str | None  # whose accuracy on fresh pairs is followed: "@reward" or a workdir
  prompts: rounds_collect.PromptsSection
  sampling: rounds_collect.SamplingSection
  labeller: rounds_collect.LabellerSection
  preference: preference.PreferenceConfig  # of every round; model.init is `start`
  evaluation: evaluate.EvaluateConfig
  earlier_rounds: int = 0  # whose pairs are trained on again; -1: all of them
  reference: str = "previous"  # round's policy; or "first": the start, in every round
  retrain_reward: bool = False  # after every round, on its own data and all pairs so far
  probe_pairs: int = 256  # of every round, whose log-probs later policies are asked for

  def __post_init__(self):
    if min(self.rounds, self.prompts.per_round, self.probe_pairs) < 1:
      raise InputError("config: rounds, prompts.per_round and probe_pairs must be positive")
    if self.earlier_rounds < -1:
      raise InputError("config.earlier_rounds must be -1 (all), 0 or positive")
    sections.check_one_of("reference", self.reference, ("previous", "first"))
    self._check_preference()
    self._check_judges()
    self._check_reward()

  def _check_preference(self):
    section, found = self.preference.data, self.preference
    if found.model.init != self.start:
      raise InputError(f"config.preference.model.init must be config.start, not {found.model.init}")
    if section.train != COLLECTED or section.columns or section.limit:
      raise InputError(
        f"config.preference.data: train must be {COLLECTED!r}, and columns and limit None: the "
        "rounds collect the pairs"
      )
    if found.records != "pairs" or found.reference_model:
      raise InputError(
        "config.preference: records must be 'pairs', and reference_model None: "
        "config.reference sets it"
      )
    if self.reference == "first" and not found.objective.needs_reference:
      raise InputError(f"config.reference is not used by {found.objective.name}, which has none")
    longest = self.prompts.max_length + self.sampling.max_new_tokens
    if section.length < longest:
      raise InputError(
        f"config.preference.data.length must be at least {longest}, prompts.max_length plus "
        "sampling.max_new_tokens, so that no response is cut"
      )

  def _check_judges(self):
    if self.labeller.judge == "gold" and not records.is_world(self.prompts.source):
      raise InputError(
        "config.labeller.judge: 'gold' judges microworld prompts only; use 'reward:<workdir>'"
      )
    if self.evaluation.policy is not None or self.evaluation.reference is not None:
      raise InputError(
        "config.evaluation: every policy is compared with config.start; leave policy and reference "
        "None"
      )
    if self.evaluation.scorer == "gold" and not records.is_world(self.evaluation.data):
      raise InputError("config.evaluation.scorer: 'gold' judges microworld prompts only")

  def _check_reward(self):
    if self.reward is not None and self.reward_model is None:
      raise InputError("config.reward is not used: config.reward_model must be '@reward'")
    if self.retrain_reward and self.reward is None:
      raise InputError("config.retrain_reward needs config.reward: how a reward model is trained")
    if self.retrain_reward and "*" in self.reward.data.train:
      raise InputError("config.retrain_reward: config.reward.data.train must not have weights")


def run(settings: dict[str, Any], path: str, devices) -> report_lib.Report:
  """Runs what is not done yet under `path`; the report is written anew after every round."""
  workspace.single_process("collection in rounds")
  root = pathlib.Path(path)
  config = config_lib.build(RoundsConfig, pipeline.resolve(settings, str(root)))
  if config.reward is not None and config.reward_model != str(root / "reward"):
    raise InputError(
      f"config.reward_model must be '@reward' where config.reward trains it, not "
      f"{config.reward_model}"
    )
  steps = Steps(config, root, tuple(devices))
  for number in range(1, config.rounds + 1):
    steps.preference_config(number)  # so that its mistakes are said before hours of training
  workdir.open_workdir(root, "rounds", config_lib.to_dict(config))
  with workers.lock(root / "lock"):
    steps.prepare()
    for number in range(config.rounds + 1):
      if steps.advance(number) or number == config.rounds:
        report = steps.report(number)
        print(f"== report: {rounds_page.write(root, report)}", flush=True)
  return report


@dataclasses.dataclass(frozen=True)
class Steps:
  """The steps of every round; each leaves a file that says it is done, and is then passed over."""

  config: RoundsConfig
  root: pathlib.Path
  devices: tuple

  def folder(self, number: int) -> pathlib.Path:
    return self.root / (f"round_{number}" if number else "start")

  def policy(self, number: int) -> str:
    """Where the policy of round `number` is; round 0 is the start."""
    return str(self.folder(number) / "policy") if number else self.config.start

  @functools.cached_property
  def mesh(self):
    return sharding.make_mesh(self.config.preference.mesh, self.devices)

  @functools.cached_property
  def tokenizer(self):
    return workspace.tokenizer_of(self.config.preference.model)

  @functools.cached_property
  def prompts(self) -> list[data.Prompt]:
    """Those of all rounds, in their order."""
    section = self.config.prompts
    count = self.config.rounds * section.per_round
    return rounds_collect.read_prompts(section, self.tokenizer, count, self.config.seed)

  def prompts_of(self, number: int) -> list[data.Prompt]:
    size = self.config.prompts.per_round
    return self.prompts[(number - 1) * size : number * size]

  @functools.cached_property
  def ruler(self) -> rounds_measure.Ruler:
    return rounds_measure.Ruler.make(self._evaluation, self.devices, self.mesh)

  @property
  def _evaluation(self) -> evaluate.EvaluateConfig:
    return dataclasses.replace(self.config.evaluation, reference=self.config.start)

  def prepare(self) -> None:
    """Trains the start and the first reward model where the config asks for it."""
    self._train("sft", sft)
    if not (self.folder(self.config.rounds) / "drift.json").exists():
      len(self.prompts)  # too few of them is said before a reward model is trained
    self._train("reward", reward)

  def _train(self, name: str, phase) -> None:
    section, folder = getattr(self.config, name), self.root / name
    if section is not None and not workdir.is_finished(folder):
      print(f"== {name}: training", flush=True)
      phase.run(section, str(folder), self.devices)

  def advance(self, number: int) -> bool:
    """Whatever of a round is not done, if anything; of round 0 the start is measured."""
    folder = self.folder(number)
    if (folder / "drift.json").exists():
      return False
    folder.mkdir(parents=True, exist_ok=True)
    if number:
      self._collect(number)
      if self.config.retrain_reward and not workdir.is_finished(folder / "reward"):
        print(f"== round {number}: training a reward model", flush=True)
        reward.run(self.reward_config(number), str(folder / "reward"), self.devices)
      if not workdir.is_finished(folder / "policy"):
        print(f"== round {number}: training", flush=True)
        self._write_training(number)
        preference.run(self.preference_config(number), self.policy(number), self.devices)
    print(f"== {folder.name}: measuring", flush=True)
    self._measure(number)
    return True

  def _collect(self, number: int) -> None:
    folder, config = self.folder(number), self.config
    if not (folder / "responses.jsonl").exists():
      print(f"== round {number}: sampling", flush=True)
      rounds_collect.sample(
        workspace.load(self.policy(number - 1), self.mesh, dtype=config.preference.model.dtype),
        self.prompts_of(number),
        config.sampling,
        seed=config.seed,
        number=number,
        max_prompt_length=config.prompts.max_length,
        file=folder / "responses.jsonl",
        mesh=self.mesh,
      )
    if not (folder / "collection.json").exists():
      _save(folder / "collection.json", self._label(number))
    found = report_lib.load_collection(folder / "collection.json")
    if not found.pairs:
      why = ", ".join(f"{name} {share.value:.0%}" for name, share in found.dropped.items())
      raise InputError(f"round {number}: no prompt gave a pair to train on ({why})")

  def _label(self, number: int) -> report_lib.Collection:
    folder, config = self.folder(number), self.config
    prompts, length = self.prompts_of(number), config.prompts.max_length
    answers = rounds_collect.Answers.read(
      folder / "responses.jsonl", prompts, self.tokenizer, length
    )
    models = self._reward_models(number)
    scores = {
      init: rounds_collect.reward_scores(answers, init, self._evaluation, self.tokenizer, self.mesh)
      for init in {*models.values(), config.labeller.reward_model} - {""}
    }
    judge = None
    if records.is_world(config.prompts.source):
      judge = worlds.Microworld(seed=records.parse_world(config.prompts.source).seed).judge
    return rounds_collect.label(
      answers,
      config.labeller,
      seed=config.seed,
      number=number,
      judge=judge,
      rewards={name: scores[init] for name, init in models.items()},
      judged=scores.get(config.labeller.reward_model),
      file=folder / "preferences.jsonl",
    )

  def _reward_models(self, number: int) -> dict[str, str]:
    """The first reward model, and the newest that has not seen this round's pairs."""
    if self.config.reward_model is None:
      return {}
    models = {"first": self.config.reward_model}
    if self.config.retrain_reward:
      before = self.folder(number - 1) / "reward"
      models["newest"] = str(before) if number > 1 else self.config.reward_model
    return models

  def _write_training(self, number: int) -> None:
    earlier = self.config.earlier_rounds
    if earlier:
      first = 1 if earlier < 0 else max(1, number - earlier)
      results.write_text(self._training_file(number), self._pairs_text(first, number))

  def _training_file(self, number: int) -> pathlib.Path:
    name = "training.jsonl" if self.config.earlier_rounds else "preferences.jsonl"
    return self.folder(number) / name

  def _pairs_text(self, first: int, last: int) -> str:
    files = (self.folder(r) / "preferences.jsonl" for r in range(first, last + 1))
    return "".join(file.read_text(encoding="utf-8") for file in files)

  def preference_config(self, number: int) -> preference.PreferenceConfig:
    """The settings of one round's training."""
    config, first = self.config.preference, self.config.reference == "first"
    return dataclasses.replace(
      config,
      seed=config.seed + number - 1,
      model=dataclasses.replace(config.model, init=self.policy(number - 1)),
      data=dataclasses.replace(config.data, train=str(self._training_file(number))),
      reference_model=self.config.start if first and number > 1 else None,
    )

  def reward_config(self, number: int) -> reward.RewardConfig:
    """The settings of one round's reward model; writes the records that it is trained on."""
    config, folder = self.config.reward, self.folder(number)
    own, held_out = records.read_split(config.data, "preferences")
    files = {"train": records.all_records(own), "eval": held_out}
    sources = {}
    for name, found in files.items():
      sources[name] = str(folder / f"reward_{name}.jsonl") if found else None
      if found:
        text = "".join(json.dumps(data.to_row(pair), ensure_ascii=False) + "\n" for pair in found)
        text += self._pairs_text(1, number) if name == "train" else ""
        results.write_text(pathlib.Path(sources[name]), text)
    own_format = {"columns": None, "limit": None, "eval_limit": None}
    return dataclasses.replace(
      config,
      seed=config.seed + number,
      data=dataclasses.replace(config.data, **sources, **own_format),
    )

  def _measure(self, number: int) -> None:
    folder, limit = self.folder(number), self.config.probe_pairs
    ruler = self.ruler
    policy = ruler.load(self.policy(number))
    previous = ruler.load(self.policy(max(0, number - 1)))
    pairs = {
      r: data.read_preferences(str(self.folder(r) / "preferences.jsonl"))[:limit]
      for r in range(1, number + 1)
    }
    length = self.config.preference.data.length
    drift, samples = rounds_measure.measure(ruler, number, policy, previous, pairs, length)
    results.save(pathlib.Path(self.policy(number)) if number else folder, drift.evaluation, samples)
    _save(folder / "drift.json", drift)

  def report(self, last: int) -> report_lib.Report:
    """What rounds 0 to `last` found."""
    policies = (report_lib.load_policy(self.folder(r) / "drift.json") for r in range(last + 1))
    collections = (
      report_lib.load_collection(self.folder(r) / "collection.json") for r in range(1, last + 1)
    )
    return report_lib.Report(self.config.rounds, tuple(policies), tuple(collections))


def _save(file: pathlib.Path, found) -> None:
  text = json.dumps(results.to_json(found), indent=2, allow_nan=False)
  results.write_text(file, text + "\n")
