"""From a sweep's settings to its runs: variants, grids and seeds, all checked before anything starts."""

import copy
import dataclasses
import itertools
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from align_jax import config as config_lib
from align_jax.errors import InputError
from align_jax.evals import sweep as table
from align_jax.phases import evaluate, online, preference, reward, sft, workspace
from align_jax.training import workdir

_NAME = re.compile(r"[A-Za-z0-9][\w.+=-]*")
BASES = {"preference": preference.PreferenceConfig, "online": online.OnlineConfig}


@dataclasses.dataclass(frozen=True)
class SweepConfig:
  """Settings of `experiments.sweep`; `@name` stands for the workdir of what it trains first, once for
  all runs: `@sft`, and the reward models by their names.

  A run is the base, `preference` or `online`, with the overrides of its variant, one alternative of
  every leaf of the grids, and a seed.  A variant's own grid stands under its key `grid`.
  """

  start: str  # "@sft", or the trained model that every run starts from and is compared with
  sft: sft.SftConfig | None
  variants: dict[str, dict]  # name -> nested overrides of the base
  grid: dict  # nested; its leaves are tuples of alternatives
  seeds: tuple[int, ...]
  evaluation: evaluate.EvaluateConfig
  preference: dict | None = None  # the settings of a PreferenceConfig, without its seed; or
  online: dict | None = None  # of an OnlineConfig; one of the two is given
  reward_models: dict[str, reward.RewardConfig] = dataclasses.field(default_factory=dict)
  baseline: str | None = None  # the run name that the others are paired with; None: no differences
  metric: str = "score"  # that the leaderboard is sorted by
  processes: int = 1  # on this machine

  def __post_init__(self):
    if self.processes < 1:
      raise InputError("config.processes must be positive")
    if not self.variants:
      raise InputError("config.variants is empty: a sweep needs at least one variant")
    if not self.seeds or len(set(self.seeds)) < len(self.seeds):
      raise InputError(f"config.seeds must be one or more different numbers, not {self.seeds}")
    if self.metric not in table.METRICS:
      known = ", ".join(table.METRICS)
      raise InputError(f"config.metric must be one of {known}, not {self.metric!r}")
    self._check_base()
    if self.evaluation.policy is not None or self.evaluation.reference is not None:
      raise InputError(
        "config.evaluation: every run's policy is compared with config.start; "
        "leave policy and reference None"
      )

  def _check_base(self):
    given = [name for name in BASES if getattr(self, name) is not None]
    if len(given) != 1:
      found = " and ".join(given) or "none"
      raise InputError(f"exactly one of config.{' and config.'.join(BASES)} is given, not {found}")
    if "seed" in self.settings:
      raise InputError(f"config.{self.base}.seed is not used: a run's seed is one of config.seeds")
    inits = {f"{self.base}.model.init": self.settings.get("model", {}).get("init")}
    inits |= {f"reward_models.{n}.model.init": r.model.init for n, r in self.reward_models.items()}
    for name, init in inits.items():
      if init != self.start:
        raise InputError(f"config.{name} must be config.start, not {init!r}")

  @property
  def base(self) -> str:
    """What the runs are made from: "preference" or "online"."""
    return "preference" if self.preference is not None else "online"

  @property
  def settings(self) -> dict:
    """The base's settings."""
    return getattr(self, self.base)


@dataclasses.dataclass(frozen=True)
class Run:
  """One training and its evaluation."""

  variant: str  # with its grid's settings, e.g. "dpo-learning_rate=0.0001"
  seed: int
  folder: pathlib.Path
  config: preference.PreferenceConfig | online.OnlineConfig

  @property
  def title(self) -> str:
    return f"{self.variant} seed {self.seed}"

  @property
  def is_done(self) -> bool:
    """Whether it need not be started again: evaluated, or failed in a way that would come back."""
    return table.read_run(self.folder, self.variant, self.seed).state in ("finished", "diverged")


def plan(config: SweepConfig, root: pathlib.Path) -> list[Run]:
  """All runs, one seed of every variant after the other, so that an early table compares them all.

  Raises InputError that names the variant whose settings are wrong, or are those of another one, or
  differ from what its folder was made with.
  """
  settings = {}
  for variant, overrides in config.variants.items():
    for name, values in expand(variant, overrides, config.grid).items():
      if name in settings:
        raise InputError(f"two variants are called {name!r}")
      settings[name] = values
  if config.baseline is not None and config.baseline not in settings:
    raise InputError(
      f"config.baseline must be one of {', '.join(settings)}, or None, not {config.baseline!r}"
    )
  runs = [
    Run(name, seed, root / name / f"seed{seed}", _build(config, name, values, seed))
    for seed in config.seeds
    for name, values in settings.items()
  ]
  _check_different(runs[: len(settings)])
  _check_reward_models(config, runs[: len(settings)], root)
  for run in runs:
    _check_folder(run)
  if config.sft is None:
    workspace.tokenizer_of(runs[0].config.model)
  return runs


def expand(variant: str, overrides: Mapping[str, Any], grid: Mapping[str, Any]) -> dict[str, dict]:
  """`{run name: flat overrides}` of a variant: one entry for every combination of the grids' leaves.

  A name carries the last part of every leaf's path with its value, or the whole path where two
  leaves end alike.
  """
  if not _NAME.fullmatch(variant) or variant == "sft":
    raise InputError(f"variant {variant!r}: a name is made of letters, digits and _ . + = -")
  own = overrides.get("grid", {})
  fixed = _flat({k: v for k, v in overrides.items() if k != "grid"})
  leaves = _flat(grid)
  parts = [("its overrides", fixed), ("config.grid", leaves), ("its own grid", _flat(own))]
  for (left, one), (right, other) in itertools.combinations(parts, 2):
    for path in one:
      clash = next((p for p in other if f"{p}.".startswith(f"{path}.")), None)
      clash = clash or next((p for p in other if f"{path}.".startswith(f"{p}.")), None)
      if clash:
        raise InputError(f"variant {variant!r}: {clash} is set by {left} and by {right}")
  leaves = leaves | _flat(own)
  for path, alternatives in leaves.items():
    if not isinstance(alternatives, (tuple, list)) or not alternatives:
      raise InputError(f"variant {variant!r}: grid.{path} must be a tuple of alternatives")
  labels = _labels(list(leaves))
  names = {}
  for values in itertools.product(*leaves.values()):
    parts = [f"{labels[path]}={_text(value)}" for path, value in zip(leaves, values)]
    name = "-".join([variant, *parts])
    if name in names:
      raise InputError(f"variant {variant!r}: the grid holds {', '.join(parts)} twice")
    names[name] = fixed | dict(zip(leaves, values))
  return names


def shared_settings(config: SweepConfig) -> dict[str, Any]:
  """What all runs have in common, which a workdir keeps; the runs themselves may become more."""
  values = config_lib.to_dict(config)
  names = ["start", "sft", "evaluation", *(["reward_models"] if config.reward_models else [])]
  return {name: values[name] for name in names}


def _build(config: SweepConfig, name: str, overrides: dict[str, Any], seed: int):
  settings = copy.deepcopy(config.settings)
  for path, value in overrides.items():
    if path in ("seed", "model.init"):
      raise InputError(f"variant {name!r}: {path} is set by the sweep, not by a variant")
    *sections, last = path.split(".")
    place = settings
    for section in sections:
      if place.get(section) is None:  # a section that the base leaves out
        place[section] = {}
      place = place[section]
      if not isinstance(place, dict):
        raise InputError(f"variant {name!r}: {path}: {section} is not a section with fields")
    place[last] = value
  try:
    return config_lib.build(BASES[config.base], settings | {"seed": seed})
  except InputError as error:
    raise InputError(f"variant {name!r}: {error}") from error


def _check_different(runs: list[Run]):
  seen = {}
  for run in runs:
    key = json.dumps(config_lib.to_dict(run.config), sort_keys=True)
    if key in seen:
      raise InputError(f"variants {seen[key]!r} and {run.variant!r} have the same settings")
    seen[key] = run.variant


def _check_reward_models(config: SweepConfig, runs: list[Run], root: pathlib.Path):
  """Their names are those of no variant, and each is read by some run or by the evaluation."""
  values = [config_lib.to_dict(run.config) for run in runs] + [{"_": config.evaluation.scorer}]
  texts = [x for value in values for x in _flat(value).values() if isinstance(x, str)]
  read = {part.strip().removeprefix("reward:") for text in texts for part in text.split(",")}
  for name in config.reward_models:
    if not _NAME.fullmatch(name) or name == "sft" or name in {run.variant for run in runs}:
      raise InputError(
        f"config.reward_models: {name!r} is made of letters, digits and _ . + = -, and is neither "
        "sft nor a variant"
      )
    if str(root / name) not in read:
      raise InputError(f"config.reward_models.{name} is trained, but no run reads @{name}")


def _check_folder(run: Run):
  file = run.folder / "config.json"
  if not file.exists():
    return
  there = workdir.read_json(file)
  there.pop("phase", None)
  here = json.loads(json.dumps(config_lib.to_dict(run.config)))
  changes = config_lib.difference(there, here)
  if changes:
    raise InputError(
      f"variant {run.variant!r}: {run.folder} belongs to a run with other settings "
      f"({'; '.join(changes)}); give the variant another name"
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for name, value in values.items():
    if isinstance(value, Mapping) and value:
      flat |= _flat(value, f"{prefix}{name}.")
    else:
      flat[prefix + name] = value
  return flat


def _labels(paths: list[str]) -> dict[str, str]:
  last = [path.rpartition(".")[2] for path in paths]
  return {p: p if last.count(end) > 1 else end for p, end in zip(paths, last)}


def _text(value: Any) -> str:
  return re.sub(r"[^\w.+-]+", "_", str(value)).strip("_") or "_"
