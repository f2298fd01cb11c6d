"""The over-optimisation laboratory from end to end in small: what it computes, and that it does so once."""

import json
import pathlib

import jax
import numpy as np
import pytest

from align_jax import config as config_lib
from align_jax import sampling, sharding, worlds
from align_jax.errors import InputError
from align_jax.evals import overoptimization_report as report_lib
from align_jax.evals import reward_model
from align_jax.phases import overoptimization, records, workers, workspace
from align_jax.phases import overoptimization_steps as steps
from align_jax.phases.overoptimization_config import OveroptimizationConfig
from configs import overoptimization as overoptimization_config


def settings(**changes):
  """The smoke config; `changes` with __ for dots."""
  config = overoptimization_config.get_config("smoke")
  for dotted, value in changes.items():
    config.update_from_flattened_dict({dotted.replace("__", "."): value})
  return config.to_dict()


def one_device(index, count):
  return jax.devices()[:1]


@pytest.fixture(autouse=True, scope="module")
def in_this_process():
  """Tasks one after the other here: processes of their own are tested in workers_test."""

  def serial(tasks, work, *, count, start):
    for task in tasks:
      yield workers.Outcome(task, work(task, start(0, 1), lambda: False))

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(workers, "run", serial)
    yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  root = tmp_path_factory.mktemp("laboratory") / "run"
  return root, overoptimization.run(settings(), str(root), one_device)


def made(root):
  """When the files of steps were written."""
  return {p: p.stat().st_mtime_ns for p in root.rglob("*.npz")}


def pool_of(root):
  config = config_lib.build(OveroptimizationConfig, settings())
  return steps.Pool.read(steps.parts(config, root))


def test_everything_asked_for_is_in_the_report(finished):
  root, found = finished
  assert sorted(c.name for c in found.curves) == [
    "noisy-16", "noisy-32", "tiny-16", "tiny-32", "wide-16",
  ]  # fmt: skip
  assert [e.name for e in found.ensembles] == ["min"] and found.ensembles[0].seeds == 2
  assert [r.name for r in found.rl] == ["kl0", "min"]
  assert (found.prompts, found.samples) == (4, 64)
  assert report_lib.load(root) == found
  assert all(len(r.points) == 4 for r in found.rl)
  for name in ("bon", "rl", "accuracy"):
    assert (root / f"overoptimization_{name}.png").read_bytes()[:4] == b"\x89PNG"
  assert "tiny-16" in (root / "overoptimization.html").read_text()


def test_a_curve_is_the_best_of_its_seeds_choices(finished):
  """From the files: at n = 2 all pairs of samples, with ties by their mean."""
  root, found = finished
  pool = pool_of(root)
  gold = pool.gold[pool.index].astype(float)
  gains = []
  for seed in (0, 1):
    with np.load(root / "proxies" / f"tiny-16-gold-s{seed}" / "scores.npz") as file:
      proxy = file["scores"][pool.index]
    first, second = np.triu_indices(64, 1)
    a, b = proxy[:, first], proxy[:, second]
    chosen = np.where(a > b, gold[:, first], gold[:, second])
    chosen = np.where(a == b, (gold[:, first] + gold[:, second]) / 2, chosen)
    gains.append(chosen.mean(axis=1) - gold.mean(axis=1))
  curve = next(c for c in found.curves if c.name == "tiny-16")
  assert curve.points[1].n == 2
  assert curve.points[1].gold.value == pytest.approx(np.mean(gains), abs=1e-6)
  assert found.start.value == pytest.approx(gold.mean(), abs=1e-6)


def test_peaks_are_compared_with_less_data_and_with_the_smallest_size(finished):
  _, found = finished
  curves = {c.name: c for c in found.curves}
  compared = {
    name: (c.over_less is not None, c.over_smaller is not None) for name, c in curves.items()
  }
  assert compared == {
    "tiny-16": (False, False), "tiny-32": (True, False), "wide-16": (False, True),
    "noisy-16": (False, False), "noisy-32": (True, False),
  }  # fmt: skip
  for name, other, field in (
    ("tiny-32", "tiny-16", "over_less"),
    ("wide-16", "tiny-16", "over_smaller"),
  ):
    gain = curves[name].peak.gain.value - curves[other].peak.gain.value
    assert getattr(curves[name], field).value == pytest.approx(gain, abs=1e-9)


def test_gold_is_what_its_parts_say_of_the_same_choices(finished):
  """Of one sample: the judge's traits, weighed, give back the gold reward but for what is not shown."""
  _, found = finished
  first = [b for b in found.behaviours if b.n == 1]
  assert {b.name for b in first} == {"noisy-32", "tiny-32", "wide-16"}
  traits = {name: e.value for name, e in first[0].found.items()}
  assert traits["malformed"] > 0.9 and traits["correct"] < 0.1  # six steps of SFT teach no sentence
  assert found.start.value < 0 and all(b.found == first[0].found for b in first)


def test_the_pool_holds_every_sample_once(finished):
  """What is scored is what was drawn: gold and texts of the samples, without their repeats."""
  root, _ = finished
  pool = pool_of(root)
  assert pool.index.shape == (4, 64) and pool.index.max() == len(pool.gold) - 1
  assert len(np.unique(pool.index)) == len(pool.gold)
  world = worlds.Microworld()
  prompts = world.prompts(4, "heldout", 7)
  for row, prompt in enumerate(prompts):
    used = np.unique(pool.index[row])
    rows = np.concatenate([pool.tokens, pool.lengths[:, None]], axis=1)[used]
    assert len(np.unique(rows, axis=0)) == len(used)
    expected = world.gold_rewards([prompt] * len(used), pool.texts[used].tolist())
    np.testing.assert_allclose(pool.gold[used], expected)


def test_repeats_are_told_by_their_tokens_and_their_end():
  """Padding may be any token: a row that ends earlier is another one."""
  tokens = np.array([[5, 7, 0], [5, 7, 0], [5, 7, 0], [5, 8, 8]], np.int32)
  mask = np.array([[0, 1, 0], [0, 1, 0], [0, 1, 1], [0, 1, 1]], bool)
  drawn = sampling.Samples(tokens, np.ones(4, np.int32), mask, np.zeros((4, 3)), np.ones(4, bool))
  found = steps._without_repeats(drawn, 2, worlds.Microworld().tokenizer())
  assert found["index"].tolist() == [[0, 0], [1, 2]] or found["index"].tolist() == [[0, 0], [2, 1]]
  assert found["prompt"].tolist() == [0, 1, 1]
  np.testing.assert_array_equal(found["lengths"][found["index"]].reshape(-1), [1, 1, 2, 2])


def test_scores_are_those_of_the_plain_way(finished):
  """In length buckets without repeats, against one row at a time as reward models are trained on it."""
  root, _ = finished
  pool = pool_of(root)
  folder = root / "proxies" / "wide-16-gold-s0"
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  loaded = workspace.load(str(folder), mesh)
  with np.load(folder / "scores.npz") as file:
    scores = file["scores"]
  for row in (0, len(scores) // 2, len(scores) - 1):
    start, length = pool.prompt_lengths[row], pool.lengths[row]
    mask = np.zeros((1, pool.tokens.shape[1]), bool)
    mask[0, start : start + length] = True
    one = sampling.Samples(
      pool.tokens[row : row + 1], pool.prompt_lengths[row : row + 1], mask,
      np.zeros(mask.shape, np.float32), np.ones(1, bool),
    )  # fmt: skip
    expected = reward_model.response_rewards(
      loaded.model, {"params": loaded.params}, loaded.head, one, batch_size=1
    )
    assert scores[row] == pytest.approx(expected[0], abs=1e-5)


def test_proxies_learn_from_the_labels_their_arm_says(finished):
  root, _ = finished
  for name, temperature, n in (("tiny-32-gold-s1", 1e-6, 32), ("tiny-16-t0.68-s0", 0.68, 16)):
    config = json.loads((root / "proxies" / name / "config.json").read_text())
    train = config["data"]["train"]
    assert f"n={n},draw=6" in train and f"temperature={temperature!r}" in train
    assert config["model"]["init"] == str(root / "sft" / "tiny")
    assert config["loop"]["steps"] == max(3, n // 8)
  world = worlds.Microworld()
  sure = world.preferences(200, labeller=worlds.Labeller(temperature=1e-6), seed=6)
  gaps = [a.reward - b.reward for a, b in world.judge_pairs(sure)]
  assert min(gaps) >= 0 and np.mean(np.array(gaps) > 0) > 0.8


def test_independent_proxies_share_neither_trunk_nor_comparisons(tmp_path):
  values = settings()
  values["arms"]["wide"] |= {"independent": True, "seeds": (0, 1)}
  config = config_lib.build(OveroptimizationConfig, values)
  shared, own = (
    [config.reward_config(proxy, tmp_path) for proxy in config.members(config.arms[arm], 16)]
    for arm in ("tiny", "wide")
  )
  assert len({c.model.init for c in shared}) == len({c.data.train for c in shared}) == 1
  assert [pathlib.Path(c.model.init).name for c in own] == ["wide", "wide-s1"]
  first, second = (records.read(c.data.train, "preferences") for c in own)
  assert first[0].prompt != second[0].prompt
  trunks = {t.folder.name: config.sft_config(t.what).seed for t in steps.plan(config, tmp_path)[0]}
  assert trunks == {"tiny": 0, "wide": 0, "wide-s1": 1}


def test_an_ensembles_run_learns_from_all_members(finished):
  root, _ = finished
  rewards = json.loads((root / "rl" / "min" / "config.json").read_text())["rewards"]
  members = [str(root / "proxies" / f"tiny-16-gold-s{seed}") for seed in (0, 1)]
  assert rewards["proxy"]["source"] == ",".join(members) and rewards["proxy"]["combine"] == "min"
  assert rewards["gold"]["weight"] == 0
  row = json.loads((root / "rl" / "min" / "metrics.jsonl").read_text().splitlines()[0])
  assert {"score/proxy", "score/gold", "kl/ref"} <= set(row)


def test_again_is_nothing_to_do(finished):
  root, found = finished
  before = made(root)

  def never(index, count):
    raise AssertionError("a worker was started")

  assert overoptimization.run(settings(), str(root), never) == found
  assert made(root) == before


def test_what_is_lost_is_made_again_to_the_same_report(finished):
  """Killed between any two of its steps: part of the pool, a proxy's scores, a start are not there."""
  root, found = finished
  for lost in ("pool/001/samples.npz", "proxies/wide-16-gold-s0/scores.npz", "rl/start.npz"):
    (root / lost).unlink()
  before = made(root)
  assert overoptimization.run(settings(), str(root), one_device) == found
  after = made(root)
  assert len(after) == len(before) + 3
  same = {p for p in before if after[p] == before[p]}
  assert {p.relative_to(root).parts[0] for p in before if p not in same} <= {"proxies"}
  assert all("wide-16" in str(p) for p in before if p not in same)


def test_one_more_proxy_costs_only_itself(finished):
  root, found = finished
  before = made(root)
  values = settings()
  values["arms"]["wide"]["comparisons"] = (16, 24)
  more = overoptimization.run(values, str(root), one_device)
  after = made(root)
  assert {p.parent.name for p in set(after) - set(before)} == {"wide-24-gold-s0"}
  assert all(after[p] == t for p, t in before.items())
  assert [c for c in more.curves if c.name != "wide-24"] == list(found.curves)


def test_another_pool_in_the_same_folder_is_refused(finished):
  root, _ = finished
  with pytest.raises(InputError, match="config.temperature: 1.0 there, 0.7 here"):
    overoptimization.run(settings(pool__temperature=0.7), str(root), one_device)


def test_a_step_that_fails_is_named_and_the_others_are_done(tmp_path, monkeypatch, capsys):
  def fail(task, devices):
    if task.what.size == "wide":
      raise FloatingPointError("the loss is nan")
    (task.folder / "lineage.json").write_text("{}")

  monkeypatch.setitem(steps._WORK, "sft", fail)
  with pytest.raises(
    InputError, match="sft wide: FloatingPointError: the loss is nan .see .*log.txt"
  ):
    overoptimization.run(settings(), str(tmp_path), one_device)
  assert "Traceback" in capsys.readouterr().err  # of the folder's log, but for pytest
  assert (tmp_path / "sft" / "tiny" / "lineage.json").exists()


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"policy": "huge"}, "config.policy must be one of config.sizes"),
    ({"pool__batch_size": 48}, "batch_size divide samples"),
    ({"pool__temperature": 0.0}, "pool.temperature must be positive"),
    ({"pool__prompts": "prompts.jsonl"}, "config.pool.prompts must be of the microworld"),
    ({"reward__model__init": "runs/sft"}, "config.reward.model.init must be 'trunk'"),
    ({"reward__data__train": "microworld:n=9,temperature=1"}, "the temperature is that of"),
    ({"reward__data__train": "microworld:n=20"}, "config.reward.data.train has 20 comparisons"),
    ({"arms__wide__size": "huge"}, "arms.wide.size must be one of"),
    ({"arms__wide__seeds": (1, 1)}, "seeds must list"),
    ({"arms__wide__temperature": -1.0}, "temperature not negative"),
    ({"ensembles__min__arm": "wide"}, "combines the seeds of arm 'wide', which has one"),
    ({"ensembles__min__comparisons": 17}, "there is no arm 'tiny' with 17"),
    ({"ensembles__min__combine": "max"}, "combine must be one of"),
    ({"rl_runs": {}}, "config.rl and config.rl_runs go together"),
    ({"rl__model__init": "runs/sft"}, "model.init must be 'policy'"),
    ({"rl__rewards__gold__weight": 1.0}, "of weight 0|and weight 0"),
    ({"best_of": (1, 128)}, "best_of must lie in"),
    ({"rl_window": 1}, "rl_window and start_samples at least 2"),
    ({"rl_fit_share": 1.0}, "rl_fit_share must lie between"),
    ({"epochs": 0.0}, "epochs and processes must be positive"),
  ],
)
def test_settings_that_cannot_be_are_refused_before_anything_starts(changes, message, tmp_path):
  values = settings(**{k: v for k, v in changes.items() if k != "rl_runs"})
  values |= {k: v for k, v in changes.items() if k == "rl_runs"}
  with pytest.raises(InputError, match=message):
    overoptimization.run(values, str(tmp_path / "run"), one_device)
  assert not (tmp_path / "run").exists()


def test_the_full_config_is_one_that_could_run():
  config = config_lib.build(OveroptimizationConfig, overoptimization_config.get_config().to_dict())
  assert len(config.proxies) == 61 and len(config.rl_runs) == 8
