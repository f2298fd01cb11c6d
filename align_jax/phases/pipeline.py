"""All phases in order, each only if it is not done, and one report at the end."""

import dataclasses
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax

from align_jax import config as config_lib
from align_jax.errors import InputError
from align_jax.evals import report
from align_jax.phases import evaluate, online, preference, reward, sft
from align_jax.training import workdir


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
  """Settings of `experiments.pipeline`: those of its phases; `@sft` stands for that phase's workdir.

  A phase that is None is left out.  Every policy is evaluated against `start`.
  """

  start: str  # "@sft", or the pretrained model that every other phase begins with
  sft: sft.SftConfig | None
  reward: reward.RewardConfig | None
  preference: dict[str, preference.PreferenceConfig]  # one run for every name, e.g. dpo, ipo, kto
  ppo: online.OnlineConfig | None
  evaluation: evaluate.EvaluateConfig
  reward_evaluation: evaluate.EvaluateConfig | None

  def __post_init__(self):
    if (self.reward is None) != (self.reward_evaluation is None):
      raise InputError("config.reward and config.reward_evaluation go together")


@dataclasses.dataclass(frozen=True)
class Task:
  """One run: its folder, how to train it, how to evaluate it."""

  folder: pathlib.Path
  train: Callable[[Any, str, Any], None] | None  # None: nothing to train, only to evaluate
  config: Any
  evaluation: evaluate.EvaluateConfig


def resolve(value, root: str):
  """`@name` inside settings becomes `<root>/name`, in lists "@a,@b" and behind "reward:" too."""
  if isinstance(value, dict):
    return {k: resolve(v, root) for k, v in value.items()}
  if isinstance(value, str):
    return re.sub(r"(^|[:,] ?)@", lambda found: f"{found[1]}{root}/", value)
  return value


def run(settings: dict[str, Any], path: str, devices) -> pathlib.Path:
  """Runs what is not done yet under `path` and returns the report."""
  config = config_lib.build(PipelineConfig, resolve(settings, str(pathlib.Path(path))))
  root = workdir.open_workdir(path, "pipeline", config_lib.to_dict(config))
  for task in tasks(config, root):
    name = task.folder.name
    if task.train and not workdir.is_finished(task.folder):
      print(f"== {name}: training", flush=True)
      task.train(task.config, str(task.folder), devices)
      (task.folder / "evaluation.json").unlink(missing_ok=True)
    if not (task.folder / "evaluation.json").exists():
      print(f"== {name}: evaluating", flush=True)
      evaluate.run(task.evaluation, str(task.folder), devices)
  if jax.process_index() == 0:
    print(f"== report: {report.build_report(root)}", flush=True)
  return root / "report.html"


def tasks(config: PipelineConfig, root: pathlib.Path) -> list[Task]:
  """The runs in the order their checkpoints need."""
  policy = dataclasses.replace(config.evaluation, reference=config.start)
  scorer = []
  if config.reward:
    scorer = [Task(root / "reward", reward.run, config.reward, config.reward_evaluation)]
  if config.sft:
    first = [Task(root / "sft", sft.run, config.sft, policy), *scorer]
  else:
    # The scorer may be the reward model: then nothing can be evaluated before it is trained.
    untrained = dataclasses.replace(policy, policy=config.start)
    first = [*scorer, Task(root / "start", None, None, untrained)]
  preferences = [
    Task(root / name, preference.run, run_config, policy)
    for name, run_config in config.preference.items()
  ]
  last = [Task(root / "ppo", online.run, config.ppo, policy)] if config.ppo else []
  return first + preferences + last
