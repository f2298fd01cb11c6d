"""Rounds of preference collection: choices as the labeller's formula says, and runs that resume exactly."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from align_jax import config as config_lib
from align_jax import data, sharding, worlds
from align_jax.errors import InputError
from align_jax.evals import rounds as report_lib
from align_jax.phases import (
  evaluate,
  preference,
  reward,
  rounds,
  rounds_collect,
  rounds_measure,
  sft,
)
from configs import rounds as rounds_config
from configs import sft as sft_config

HELD_OUT = "microworld:n=12,split=heldout,draw=2"


def tiny(start, **changes):
  """The default settings, shrunk until a round takes seconds; `changes` with __ for dots."""
  config = rounds_config.get_config()
  config.rounds, config.start, config.sft = 2, str(start), None
  config.reward.data.update(train="microworld:n=24", eval=None, batch_size=8)
  config.reward.loop.update(steps=2, eval_every=0)
  config.prompts.update(source="microworld:n=60", per_round=16)
  config.sampling.update(max_new_tokens=8, samples_per_prompt=3, batch_size=48)
  config.labeller.cut = "keep"  # a model of four steps hardly ends a sentence
  config.preference.data.update(eval=None, batch_size=8, length=40)
  config.preference.loop.update(steps=2, eval_every=0)
  for phase in (config.reward, config.preference):
    phase.model.update(init=str(start), remat="none")
  config.probe_pairs = 8
  config.evaluation.update(data=HELD_OUT, max_new_tokens=8, batch_size=16)
  for dotted, value in changes.items():
    config.update_from_flattened_dict({dotted.replace("__", "."): value})
  return config.to_dict()


@pytest.fixture(scope="module")
def start(tmp_path_factory):
  """A finished workdir of four steps of SFT."""
  settings = sft_config.get_config()
  settings.model.scratch.update(layers=1, embed_dim=32, heads=2, kv_heads=2, mlp_dim=64)
  settings.data.update(train="microworld:n=64", eval=None, batch_size=8)
  settings.loop.update(steps=4, eval_every=0)
  folder = tmp_path_factory.mktemp("start") / "sft"
  sft.run(config_lib.build(sft.SftConfig, settings.to_dict()), str(folder), jax.devices()[:1])
  return folder


@pytest.fixture(scope="module")
def finished(start, tmp_path_factory):
  """(root, settings, report) of two rounds with everything switched on."""
  root = tmp_path_factory.mktemp("rounds") / "run"
  settings = tiny(start, earlier_rounds=-1, reference="first")
  return root, settings, rounds.run(settings, str(root), jax.devices()[:1])


def rows(file):
  return [json.loads(line) for line in file.read_text().splitlines()]


def contents(root, names=("preferences.jsonl", "collection.json", "drift.json", "responses.jsonl")):
  return {
    str(f.relative_to(root)): f.read_text() for f in sorted(root.rglob("*")) if f.name in names
  }


def test_pairs_are_in_the_house_format_and_every_prompt_is_new(finished):
  root, _, report = finished
  prompts = []
  for number, collection in enumerate(report.collections, start=1):
    file = root / f"round_{number}" / "preferences.jsonl"
    pairs = data.read_preferences(str(file))
    assert len(pairs) == collection.pairs == 16
    assert all(pair.chosen != pair.rejected for pair in pairs)
    assert all(
      row["source"].startswith(f"round {number}, microworld-0/train:") for row in rows(file)
    )
    prompts += [row["source"].split(", ")[1] for row in rows(file)]
  assert len(set(prompts)) == 32


def test_a_round_trains_on_all_earlier_pairs_from_the_policy_before_it(finished, start):
  root, _, _ = finished
  both = [row for r in (1, 2) for row in rows(root / f"round_{r}" / "preferences.jsonl")]
  assert rows(root / "round_2" / "training.jsonl") == both
  lineage = json.loads((root / "round_2" / "policy" / "lineage.json").read_text())
  parents = {parent["role"]: parent["path"] for parent in lineage["parents"]}
  assert parents == {"policy": str(root / "round_1" / "policy"), "ref": str(start)}
  reward_pairs = rows(root / "round_2" / "reward_train.jsonl")
  assert len(reward_pairs) == 24 + 32
  assert [r["chosen"] for r in reward_pairs[24:]] == [row["chosen"] for row in both]


def test_the_report_agrees_with_what_was_collected(finished):
  root, _, report = finished
  world = worlds.Microworld()
  for number, found in enumerate(report.collections, start=1):
    pairs = data.read_preferences(str(root / f"round_{number}" / "preferences.jsonl"))
    gaps = np.array([a.reward - b.reward for a, b in world.judge_pairs(pairs)])
    np.testing.assert_allclose(found.agreement.value, np.mean((np.sign(gaps) + 1) / 2))
    np.testing.assert_allclose(found.gold_gap.value, np.abs(gaps).mean(), rtol=1e-6)
    assert set(found.reward_models) == {"first", "newest"}
    np.testing.assert_allclose(sum(found.families.values()), 1.0)
  first, second = report.collections
  assert first.reward_models["first"] == first.reward_models["newest"]
  assert second.reward_models["first"] != second.reward_models["newest"]
  assert [p.evaluation.kl_k3.value > 0 for p in report.policies] == [False, True, True]
  assert report.policies[1].kl_previous == report.policies[1].evaluation.kl
  for policy in report.policies[1:]:  # training parts both sides of what it is trained on
    after = policy.pairs[str(policy.round)].margin.value
    assert after > policy.pairs_before.margin.value
  for name in ("rounds.json", "rounds.md", "rounds.html", "rounds.png"):
    assert (root / name).stat().st_size > 1000
  assert json.loads((root / "rounds.json").read_text())["policies"][2]["round"] == 2


def test_again_is_nothing_to_do(finished, capsys):
  root, settings, report = finished
  before = {p: p.stat().st_mtime_ns for p in root.rglob("*.jsonl")}
  assert rounds.run(settings, str(root), jax.devices()[:1]) == report
  assert {p: p.stat().st_mtime_ns for p in root.rglob("*.jsonl")} == before
  assert "training" not in capsys.readouterr().out


class Killed(BaseException):
  pass


def test_killed_in_every_step_the_same_command_ends_with_the_same_bytes(
  finished, tmp_path, monkeypatch
):
  """Round 1 is kept; round 2 dies inside each of its steps in turn, and is then run to its end."""
  root, settings, report = finished
  expected = contents(root)
  shutil.move(root / "round_2", tmp_path / "kept")
  steps = (
    (rounds_collect, "sample"),
    (rounds_collect, "label"),
    (reward, "run"),
    (preference, "run"),
    (rounds_measure, "measure"),
  )

  def die(*args, **kwargs):
    raise Killed

  for module, name in steps:
    with monkeypatch.context() as patch:
      patch.setattr(module, name, die)
      with pytest.raises(Killed):
        rounds.run(settings, str(root), jax.devices()[:1])
  assert rounds.run(settings, str(root), jax.devices()[:1]) == report
  assert contents(root) == expected


def test_a_policy_that_learns_nothing_does_not_drift(start, tmp_path):
  """The control: with steps too small for float32 the policy that comes out is the start."""
  settings = tiny(start, rounds=1, preference__optimizer__learning_rate=1e-30, retrain_reward=False)
  settings |= {"reward": None, "reward_model": None}
  report = rounds.run(settings, str(tmp_path), jax.devices()[:1])
  before, after = report.policies
  assert after.evaluation.kl.value == after.kl_previous.value == after.kl_previous_k3.value == 0
  assert after.evaluation.win_rate.rate.value == 0.5
  assert after.distinct_responses == before.distinct_responses
  assert after.pairs["1"] == after.pairs_before
  assert report.collections[0].reward_models == {}


def test_a_reward_model_may_be_the_labeller(finished, tmp_path):
  """Without noise its labels are its own ranking, of which the gold judge thinks otherwise."""
  root, settings, _ = finished
  tokenizer = worlds.Microworld().tokenizer()
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  prompts = rounds_collect.read_prompts(
    rounds_collect.PromptsSection(**settings["prompts"]), tokenizer, 16, settings["seed"]
  )
  answers = rounds_collect.Answers.read(
    root / "round_1" / "responses.jsonl", prompts, tokenizer, settings["prompts"]["max_length"]
  )
  evaluation = config_lib.build(evaluate.EvaluateConfig, settings["evaluation"])
  scores = rounds_collect.reward_scores(answers, str(root / "reward"), evaluation, tokenizer, mesh)
  found = rounds_collect.label(
    answers, section(judge="reward:x", temperature=0.0, pairs="best_worst", cut="keep"),
    seed=0, number=1, judge=worlds.Microworld().judge, rewards={"first": scores}, judged=scores,
    file=tmp_path / "pairs.jsonl",
  )  # fmt: skip
  assert found.reward_models["first"].accuracy.value == 1.0 > found.agreement.value
  grouped = scores.reshape(16, 3)
  written = np.array([row["scores"]["first"] for row in rows(tmp_path / "pairs.jsonl")])
  np.testing.assert_allclose(written[:, 0], grouped.max(axis=1), atol=1e-4)
  np.testing.assert_allclose(written[:, 1], grouped.min(axis=1), atol=1e-4)


def section(**changes):
  return rounds_collect.LabellerSection(**changes)


def choices(count, utility, **changes):
  """Shares of `count` draws in which each of the answers a, b, c... was chosen, and was rejected."""
  texts = [chr(97 + i) for i in range(len(utility))]
  counts = np.zeros((2, len(utility)))
  for draw in range(count):
    rng = np.random.default_rng((7, draw))
    chosen, rejected = rounds_collect.choose(
      texts, [True] * len(texts), np.array(utility), section(**changes), rng
    )
    counts[0, chosen] += 1
    counts[1, rejected] += 1
  return counts / count


def test_two_answers_are_chosen_as_the_worlds_labeller_would():
  """σ(Δu/T), with slips; 4000 draws have a standard error under 0.008."""
  a, b = (_judgement(reward=x) for x in (1.0, 0.25))
  for flip in (0.0, 0.2):
    expected = worlds.Labeller(temperature=0.68, flip=flip).probabilities([(a, b)])[0]
    found = choices(4000, [1.0, 0.25], flip=flip)[0, 0]
    assert abs(found - expected) < 0.03


def test_best_of_three_is_placketts_and_luces_choice():
  utility, scale = np.array([0.5, 0.0, -0.4]), 0.68
  weights = np.exp(utility / scale)
  found = choices(4000, utility, pairs="best_worst")[0]
  np.testing.assert_allclose(found, weights / weights.sum(), atol=0.03)


def test_without_noise_the_best_wins_and_equal_ones_share():
  found = choices(400, [0.0, 2.0, 1.0], pairs="best_worst", temperature=0.0)
  np.testing.assert_array_equal(found, [[0, 1, 0], [1, 0, 0]])
  assert 0.4 < choices(400, [1.0, 1.0], temperature=0.0)[0, 0] < 0.6


def _judgement(**values):
  defaults = dict.fromkeys(
    ("correct", "harmful", "refused", "sycophantic", "agrees", "malformed"), False
  )
  more = dict(obeyed=None, courteous=False, curt=False, rude=False, fillers=0, length=1)
  return worlds.Judgement(**(defaults | more | values))


@pytest.mark.parametrize(
  "texts, finished, changes, expected",
  [
    ("aaa", (1, 1, 1), {}, "identical"),
    ("abb", (1, 0, 0), {}, "cut"),
    ("abb", (1, 0, 0), {"cut": "keep"}, {0, 1}),
    ("abb", (1, 1, 1), {"drop_ties": True}, "tied"),
    ("abb", (0, 1, 1), {}, "cut"),
    ("abc", (1, 1, 0), {}, {0, 1}),
  ],
)
def test_why_a_prompt_gives_no_pair(texts, finished, changes, expected):
  for draw in range(8):
    rng = np.random.default_rng(draw)
    flags = [bool(f) for f in finished]
    found = rounds_collect.choose(list(texts), flags, np.zeros(3), section(**changes), rng)
    if isinstance(expected, str):
      assert found == expected
    else:
      assert {min(i, 1) if texts == "abb" else i for i in found} == expected


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"rounds": 0}, "must be positive"),
    ({"reference": "last"}, "reference must be one of previous, first"),
    ({"reference": "first", "preference__objective__name": "simpo"}, "simpo, which has none"),
    ({"preference__data__train": "microworld:n=9"}, "train must be 'collected'"),
    ({"preference__data__length": 20}, "must be at least 34"),
    ({"preference__model__init": "smollm2"}, "must be config.start"),
    ({"labeller__judge": "silver"}, "labeller.judge must be"),
    ({"labeller__judge": "reward:x", "labeller__length_bias": 0.1}, "biases are not used"),
    ({"prompts__source": "prompts.jsonl"}, "judges microworld prompts only"),
    ({"evaluation__data": "prompts.jsonl"}, "scorer: 'gold'"),
    ({"evaluation__reference": "x"}, "leave policy and reference"),
    ({"reward_model": "elsewhere"}, "must be '@reward'"),
    ({"sampling__samples_per_prompt": 1}, "must be at least 2"),
    ({"prompts__per_round": 40}, "has 60 prompts of at most 26 tokens, but the rounds need 80"),
  ],
)
def test_bad_settings_are_refused_before_anything_is_trained(start, tmp_path, changes, message):
  settings = tiny(start, **changes)
  with pytest.raises(InputError, match=message):
    rounds.run(settings, str(tmp_path / "run"), jax.devices()[:1])
  assert not list(pathlib.Path(tmp_path).rglob("metrics.jsonl"))


@pytest.mark.parametrize("real", ["", "smollm2,train.jsonl,dev.jsonl,runs/reward"])
def test_both_settings_of_the_config_file_are_settings(real):
  config = rounds_config.get_config(real)
  built = config_lib.build(rounds.RoundsConfig, config.to_dict())
  assert (built.sft is None) == (built.labeller.reward_model == "runs/reward") == bool(real)


def test_retraining_needs_to_know_how(start, tmp_path):
  with pytest.raises(InputError, match="retrain_reward needs config.reward"):
    rounds.run(
      tiny(start) | {"reward": None, "reward_model": "x"}, str(tmp_path), jax.devices()[:1]
    )


def test_statistics_read_back_equal(finished):
  root, _, report = finished
  found = report_lib.load_policy(root / "round_2" / "drift.json")
  assert found == report.policies[2]
