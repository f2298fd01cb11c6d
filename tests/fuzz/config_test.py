"""Mangled settings: every phase's config is built, or refused in a sentence that names the setting."""

import functools
import importlib
import math

import hypothesis
import pytest
from hypothesis import strategies as st
from ml_collections import config_dict

from align_jax import config as config_lib
from align_jax.errors import InputError
from align_jax.phases import (
  audit,
  benchmark,
  chat,
  evaluate,
  export,
  length_bias,
  online,
  overoptimization_config,
  pipeline,
  preference,
  reward,
  reward_benchmark,
  rounds,
  sft,
  sweep_plan,
)  # fmt: skip
from tests.fuzz import fuzzing
from tests.fuzz.records_test import DROP, places, put

CLASSES = {
  "audit": audit.AuditConfig,
  "chat": chat.ChatConfig,
  "evaluate": evaluate.EvaluateConfig,
  "export": export.ExportConfig,
  "length_bias": length_bias.LengthBiasConfig,
  "grpo": online.OnlineConfig,
  "nash_md": online.OnlineConfig,
  "ppo": online.OnlineConfig,
  "raft": online.OnlineConfig,
  "overoptimization": overoptimization_config.OveroptimizationConfig,
  "quickstart": pipeline.PipelineConfig,
  "preference": preference.PreferenceConfig,
  "reward": reward.RewardConfig,
  "reward_ensemble": reward.RewardConfig,
  "reward_benchmark": reward_benchmark.RewardBenchmarkConfig,
  "rounds": rounds.RoundsConfig,
  "sft": sft.SftConfig,
  "sweep": sweep_plan.SweepConfig,
  "benchmark": benchmark.BenchmarkConfig,
}


def plain(value):
  if isinstance(value, config_dict.ConfigDict | dict):
    return {k: plain(v) for k, v in value.items()}
  return value


@functools.cache
def settings_of(name):
  module = importlib.import_module(f"configs.{name}")
  try:
    values = plain(module.get_config())
  except TypeError:
    values = plain(module.get_config("runs/x"))
  if name == "reward_benchmark":
    values["benchmarks"]["llmbar"] = "llmbar.jsonl"
  config_lib.build(CLASSES[name], values)
  return values


@pytest.mark.parametrize("name", CLASSES)
@fuzzing.tried(15)
@hypothesis.given(draw=st.data())
def test_settings(name, draw):
  values = settings_of(name)
  for _ in range(draw.draw(st.integers(1, 2))):
    paths = [path for path in places(values) if path]
    if not paths:
      break
    path = draw.draw(st.sampled_from(paths))
    kind = draw.draw(st.sampled_from(["replace", "replace", "drop", "add"]))
    if kind == "add" and not isinstance(path[-1], int):
      values = put(values, (*path[:-1], draw.draw(st.one_of(fuzzing.TEXTS, st.integers()))), 1)
    else:
      values = put(values, path, DROP if kind == "drop" else draw.draw(fuzzing.VALUES))
  try:
    built = config_lib.build(CLASSES[name], values)
  except InputError as error:
    keys = {key for path in places(settings_of(name)) for key in path if isinstance(key, str)}
    fuzzing.clear(error, "config", *keys)
    return
  assert config_lib.build(CLASSES[name], config_lib.to_dict(built)) == built


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400, "1", None, True, [1.0]])
def test_a_learning_rate_that_is_none(value):
  values = put(settings_of("sft"), ("optimizer", "learning_rate"), value)
  with pytest.raises(InputError, match="config.optimizer.learning_rate (must be|is too large)"):
    config_lib.build(CLASSES["sft"], values)
