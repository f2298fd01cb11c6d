"""The audit as a command: pairs of a world and of files, votes, categories, policies, and bad settings."""

import json

import jax
import numpy as np
import pytest

from align_jax import config as config_lib
from align_jax import worlds
from align_jax.errors import InputError
from align_jax.evals import audit as audit_lib
from align_jax.phases import audit, reward, sft
from configs import audit as audit_config
from configs import reward as reward_settings
from configs import sft as sft_config

DEVICES = jax.devices()[:1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """A folder with finished workdirs sft and reward, of a few steps each."""
  folder = tmp_path_factory.mktemp("runs")
  settings = sft_config.get_config()
  settings.model.scratch.update(layers=1, embed_dim=32, heads=2, kv_heads=2, mlp_dim=64)
  settings.data.update(train="microworld:n=64", eval=None, batch_size=8)
  settings.loop.update(steps=4, eval_every=0)
  sft.run(config_lib.build(sft.SftConfig, settings.to_dict()), str(folder / "sft"), DEVICES)
  settings = reward_settings.get_config()
  settings.model.init = str(folder / "sft")
  settings.data.update(train="microworld:n=64", eval=None, batch_size=8)
  settings.loop.update(steps=4, eval_every=0)
  built = config_lib.build(reward.RewardConfig, settings.to_dict())
  reward.run(built, str(folder / "reward"), DEVICES)
  return folder


def settings(runs, **changes):
  config = audit_config.get_config(str(runs))
  config.data = "microworld:n=120,split=heldout,draw=3,length_bias=0.2"
  config.drift.policies = (f"{runs}/sft",)
  config.drift.update(
    prompts="microworld:n=6,split=heldout", samples_per_prompt=2, max_new_tokens=6
  )
  config.batch_size = 16
  for dotted, value in changes.items():
    name = dotted.replace("__", ".")
    if name == "drift":
      config.drift = value
    else:
      config.update_from_flattened_dict({name: value})
  return config_lib.build(audit.AuditConfig, config.to_dict())


def test_a_world_is_audited_whole(runs, tmp_path):
  found = audit.run(settings(runs), str(tmp_path / "audit"), DEVICES)
  assert audit_lib.load(tmp_path / "audit").n == found.n == 120
  assert set(found.groups) == {"all", "family", "length", "agreement"}
  assert sum(g.accuracy.n for g in found.groups["family"]) == 120
  pairs = worlds.Microworld().preferences(120, "heldout", worlds.Labeller(length_bias=0.2), seed=3)
  judged = worlds.Microworld().judge_pairs(pairs)
  p = worlds.Labeller(length_bias=0.2).probabilities(judged)
  whole = found.groups["all"][0]
  assert whole.ceiling == pytest.approx(worlds.label_ceiling(p))
  assert whole.gold_judge == pytest.approx(worlds.gold_agreement(p, judged))
  assert found.planted["length"] == pytest.approx(0.2 / 0.68)
  assert found.planted["correct"] == pytest.approx(2 / 0.68)
  assert [d.name for d in found.drift] == ["sft"] and found.drift[0].n == 12
  assert (tmp_path / "audit" / "audit.html").exists()


def test_the_gold_reward_is_the_sum_of_what_is_regressed_on():
  """So that its weights are the planted coefficients."""
  world = worlds.Microworld()
  weights = {f"{k}": v for k, v in vars(worlds.RewardWeights()).items() if k != "word"}
  for pair in world.pairs(400):
    for reply in pair.replies:
      found = world.judge(pair.prompt, reply)
      parts = audit.judged(found, pair.prompt.meta["restricted"])
      assert sum(w * parts[k] for k, w in weights.items()) == pytest.approx(found.reward)


def test_longer_always_wins_is_what_it_says(runs, tmp_path):
  found = audit.run(settings(runs, scorer="longer", drift=None), str(tmp_path), DEVICES)
  whole, split = found.groups["all"][0], found.length.split
  assert whole.accuracy.value == whole.longer.value
  assert (split.longer.value, split.shorter.value) == (1.0, 0.0)
  assert found.length.correlation.pearson.value == pytest.approx(1.0)
  assert found.drift == ()


def write(folder, rows):
  file = folder / "pairs.jsonl"
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(file)


def test_files_are_grouped_by_their_columns_and_votes(runs, tmp_path):
  pairs = worlds.Microworld().preferences(60, seed=5)
  votes = [{"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 1.0, "b": 0.0, "c": 1.0}]
  rows = [
    {"prompt": p.prompt[-1]["content"], "chosen": p.chosen, "rejected": p.rejected,
     "labels": votes[i % 2], "kind": f"kind {i % 3}", "tags": ["x", "y"]}
    for i, p in enumerate(pairs)
  ]  # fmt: skip
  config = settings(
    runs, data=write(tmp_path, rows), categories=("kind", "tags"), text_features=True, drift=None
  )
  found = audit.run(config, str(tmp_path / "audit"), DEVICES)
  assert [g.accuracy.n for g in found.groups["kind"]] == [20, 20, 20]
  assert [g.name for g in found.groups["tags"]] == ["x, y"]
  assert [(g.name, g.accuracy.n) for g in found.groups["agreement"]] == [
    ("67 %", 30),
    ("100 %", 30),
  ]
  assert found.groups["all"][0].ceiling == pytest.approx(5 / 6)
  assert found.groups["all"][0].gold is None and found.planted == {}
  assert set(found.features) == {"text"}
  assert [c.name for c in found.spread.categories] == ["kind 0", "kind 1", "kind 2"]
  with pytest.raises(InputError, match="pairs.jsonl:1.*'scenario'"):
    other = settings(runs, data=config.data, categories=("scenario",), drift=None)
    audit.run(other, str(tmp_path / "other"), DEVICES)


def test_short_names_tell_workdirs_apart():
  assert audit.names(["runs/a/sft", "runs/a/ppo"]) == ["sft", "ppo"]
  assert audit.names(["runs/a/ppo", "runs/b/ppo"]) == ["a/ppo", "b/ppo"]


def test_few_pairs_and_bad_settings_are_said(runs, tmp_path):
  with pytest.raises(InputError, match="too few to audit"):
    few = settings(runs, data="microworld:n=20", drift=None)
    audit.run(few, str(tmp_path / "few"), DEVICES)
  with pytest.raises(InputError, match="categories"):
    settings(runs, categories=("family",))
  with pytest.raises(InputError, match="samples_per_prompt"):
    settings(runs, drift__samples_per_prompt=1)
  with pytest.raises(InputError, match="each once"):
    settings(runs, drift__policies=("a", "a"))
  with pytest.raises(InputError, match="is a reward model"):
    wrong = settings(runs, drift__policies=(f"{runs}/reward",))
    audit.run(wrong, str(tmp_path / "wrong"), DEVICES)


def test_real_votes_are_read(data_folder, runs, tmp_path):
  """PandaLM's three annotators: the shares are those counted in the file by hand."""
  file = data_folder / "pandalm_human" / "dev.jsonl"
  config = settings(
    runs, scorer="longer", data=str(file), columns="pandalm", categories=("motivation_app",),
    invalid="skip", text_features=True, drift=None,
  )  # fmt: skip
  found = audit.run(config, str(tmp_path / "audit"), DEVICES)
  rows = [json.loads(line) for line in file.read_text().splitlines()]
  rows = [row for row in rows if all(isinstance(row[f"response{i}"], str) for i in (1, 2))]
  votes = [[row[f"annotator{i}"] for i in (1, 2, 3)] for row in rows]
  unanimous = sum(len(set(v)) == 1 and v[0] != 0 for v in votes)
  by = {g.name: g.accuracy.n for g in found.groups["agreement"]}
  assert by["100 %"] == unanimous
  assert found.n <= len(rows) and np.isfinite(found.groups["all"][0].votes.value)
