"""The length-bias experiment, small: its labels, its steps, its rewards, and settings that it refuses."""

import json
import math

import jax
import numpy as np
import pytest

from align_jax import config as config_lib
from align_jax.errors import InputError
from align_jax.evals import results
from align_jax.phases import length_bias, pipeline, sft
from configs import length_bias as settings_file
from configs import sft as sft_config

DEVICES = jax.devices()[:1]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
  """A finished workdir of four steps of SFT."""
  settings = sft_config.get_config()
  settings.model.scratch.update(layers=1, embed_dim=32, heads=2, kv_heads=2, mlp_dim=64)
  settings.data.update(train="microworld:n=64", eval=None, batch_size=8)
  settings.loop.update(steps=4, eval_every=0)
  folder = tmp_path_factory.mktemp("start") / "sft"
  sft.run(config_lib.build(sft.SftConfig, settings.to_dict()), str(folder), DEVICES)
  return folder


def tiny(start, **changes):
  config = settings_file.get_config(str(start))
  config.labels.update(train=64, held_out=80)
  config.reward.data.batch_size = 8
  config.reward.loop.steps = 3
  config.online.prompts.update(train="microworld:n=16", batch_size=4)
  config.online.sampling.update(max_new_tokens=6, samples_per_prompt=2)
  config.online.loop.steps = 2
  config.evaluation.update(
    data="microworld:n=8,split=heldout,draw=2", max_new_tokens=6, batch_size=16
  )
  for model in (config.reward.model, config.online.model):
    model.remat = "none"
  for dotted, value in changes.items():
    config.update_from_flattened_dict({dotted.replace("__", "."): value})
  return config.to_dict()


def steps(start, folder, **changes):
  settings = pipeline.resolve(tiny(start, **changes), str(folder))
  config = config_lib.build(length_bias.LengthBiasConfig, settings)
  return length_bias.Steps(config, folder, DEVICES)


def test_gold_has_nothing_to_do_with_length_and_labels_have_the_planted_bias(start, tmp_path):
  made = steps(start, tmp_path, labels__held_out=4000, labels__flip_longer=0.35)
  found = made.gold_correlation()
  assert abs(found.value) < 0.03
  pairs, _ = made.labelled("heldout")
  judged = made.world.judge_pairs(pairs)
  gold = np.array([a.reward - b.reward for a, b in judged])
  extra = np.array([a.length - b.length for a, b in judged])
  right = (gold > 0)[(gold != 0) & (extra != 0)]
  longer = (gold * extra > 0)[(gold != 0) & (extra != 0)]
  gap = right[longer].mean() - right[~longer].mean()
  assert gap == pytest.approx(0.35, abs=3 * math.sqrt(0.5 / right.size))
  ties = (gold == 0) & (extra != 0)  # a coin that is flipped toward the longer: 0.35 + 0.65 / 2
  assert np.mean(extra[ties] > 0) == pytest.approx(0.675, abs=0.03)


def test_the_experiment_runs_resumes_and_learns_from_the_rewards_that_it_says(start, tmp_path):
  folder = tmp_path / "run"
  report = length_bias.run(tiny(start), str(folder), DEVICES)
  assert [m.name for m in report.models] == ["naive", "residual", "two_head"]
  assert [p.name for p in report.policies] == ["start", "naive", "residual", "two_head"]
  assert report.policies[0].growth.value == 0.0
  slope = json.loads((folder / "residual.json").read_text())["slope"]
  config = json.loads((folder / "policy" / "residual" / "config.json").read_text())
  assert config["rewards"]["length"]["weight"] == pytest.approx(-slope)
  assert config["reward_model"].endswith("reward/naive")
  config = json.loads((folder / "policy" / "two_head" / "config.json").read_text())
  assert list(config["rewards"]) == ["model"] and config["reward_model"].endswith("two_head")
  before = {f: f.stat().st_mtime for f in folder.rglob("lineage.json")}
  again = length_bias.run(tiny(start), str(folder), DEVICES)
  assert {f: f.stat().st_mtime for f in folder.rglob("lineage.json")} == before
  assert results.to_json(again) == results.to_json(report)
  written = json.loads((folder / "length_bias.json").read_text())
  assert written["checks"] == report.checks and len(written["checks"]) == 8
  assert (folder / "length_bias_overview.png").exists() and (
    folder / "audit/naive/audit.html"
  ).exists()


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"labels__flip_longer": 1.5}, "flip_longer"),
    ({"labels__train": 10}, "train and held_out"),
    ({"reward__data__train": "microworld:n=20"}, "labelled"),
    ({"online__reward_model": "runs/reward"}, "reward_model None"),
    ({"online__model__init": "elsewhere"}, "must be config.start"),
    ({"evaluation__scorer": "reward:runs/reward"}, "config.evaluation"),
  ],
)
def test_settings_that_are_set_elsewhere_are_refused(start, tmp_path, changes, words):
  with pytest.raises(InputError, match=words):
    steps(start, tmp_path, **changes)
