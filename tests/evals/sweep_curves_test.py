"""Over-optimisation from logged curves: found where it is, and not where there is only noise."""

import json

import numpy as np
import pytest
from scipy import stats

from align_jax.errors import InputError
from align_jax.evals import sweep, sweep_curve_plots, sweep_curves, sweep_page
from align_jax.evals.sweep_curves import Curves, binned, over_optimisation

STEPS = 100


def curves(gold, proxy, *, seed=0, noise=0.0):
  rng = np.random.default_rng(seed)
  drawn = {n: v + noise * rng.normal(size=STEPS) for n, v in (("gold", gold), ("model", proxy))}
  return Curves(np.linspace(0, 16, STEPS), drawn, ("model",))


T = np.linspace(0, 1, STEPS)
HUMP, RISING, FLAT = 4 * T * (1 - T), T, 0 * T  # the hump's best is in the middle


def test_bins_are_means_over_equal_stretches_and_the_root_comes_last():
  run = curves(HUMP, RISING)
  root_kl, scores = binned([run, run])
  assert root_kl.shape == (20,) and scores["gold"].shape == (2, 20)
  np.testing.assert_allclose(root_kl, np.sqrt(run.kl.reshape(20, 5).mean(axis=1)))
  np.testing.assert_allclose(scores["gold"][1], HUMP.reshape(20, 5).mean(axis=1))


def test_runs_of_different_lengths_are_read_up_to_the_shortest():
  long = curves(HUMP, RISING)
  short = Curves(long.kl[:50], {n: v[:50] for n, v in long.scores.items()}, ("model",))
  root_kl, scores = binned([long, short])
  assert len(root_kl) == 20 and root_kl[-1] == pytest.approx(np.sqrt(long.kl[47:50].mean()))
  np.testing.assert_array_equal(scores["gold"][0], scores["gold"][1])


def test_a_hump_falls_by_its_height_while_the_proxy_rises():
  (found,) = over_optimisation([curves(HUMP, RISING, seed=s, noise=0.01) for s in range(3)])
  best = HUMP.reshape(20, 5).mean(axis=1)
  assert found.judge == "gold" and found.shown
  assert found.fall.value == pytest.approx(best.max() - best[-1], abs=0.03)
  assert found.best.value == pytest.approx(best.max() - best[0], abs=0.03)
  assert found.rise["model"].value == pytest.approx(0.475, abs=0.08)
  assert found.root_kl == pytest.approx(np.sqrt(8), abs=0.3)


def test_the_interval_is_students_over_seeds_at_a_best_chosen_by_the_others():
  runs = [curves(HUMP * (1 + 0.2 * s), RISING, seed=s, noise=0.3) for s in range(4)]
  (found,) = over_optimisation(runs)
  gold = np.stack([r.scores["gold"].reshape(20, 5).mean(axis=1) for r in runs])
  falls = []
  for i in range(4):
    best = np.delete(gold, i, axis=0).mean(axis=0).argmax()
    falls.append(gold[i, best] - gold[i, -1])
  half = stats.t.ppf(0.975, 3) * stats.sem(falls)
  assert found.fall.value == pytest.approx(np.mean(falls))
  assert found.fall.high - found.fall.value == pytest.approx(half)


def test_noise_alone_is_no_fall_on_average():
  """Control: the fall from every seed's own best is always positive, and would be found everywhere."""
  falls, own = [], []
  for trial in range(200):
    runs = [curves(FLAT, FLAT, seed=3 * trial + s, noise=1.0) for s in range(3)]
    falls.append(over_optimisation(runs)[0].fall.value)
    _, scores = binned(runs)
    own.append(np.mean(scores["gold"].max(axis=1) - scores["gold"][:, -1]))
  assert abs(np.mean(falls)) < 4 * stats.sem(falls)
  assert np.mean(own) > 20 * stats.sem(own)


@pytest.mark.parametrize(
  "gold, proxy", [(RISING, RISING), (HUMP, FLAT), (HUMP, -RISING), (FLAT, RISING)]
)
def test_a_judge_that_does_not_fall_while_the_proxy_rises_is_not_over_optimised(gold, proxy):
  runs = [curves(gold, proxy, seed=s, noise=0.01) for s in range(3)]
  assert not over_optimisation(runs)[0].shown


def test_one_seed_and_runs_without_a_watched_judge_have_no_answer():
  assert over_optimisation([curves(HUMP, RISING)]) == []
  only = Curves(T, {"gold": HUMP}, ("gold",))
  assert over_optimisation([only, only]) == []


def test_other_rewards_are_not_compared():
  with pytest.raises(InputError, match="runs that log the same rewards"):
    binned([curves(HUMP, RISING), Curves(T, {"gold": HUMP}, ())])


def logged(folder, rewards, *, gold, proxy):
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps({"rewards": rewards}))
  rows = [
    {"step": t, "kl/ref": 16 * x, "score/gold": g, "score/model": p, "score/std": 9.0}
    for t, (x, g, p) in enumerate(zip(T, gold, proxy))
  ]
  (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  return folder


def test_curves_are_read_with_what_was_learned_from(tmp_path):
  rewards = {"model": {"kind": "model", "weight": 1.0}, "gold": {"kind": "gold", "weight": 0.0}}
  found = sweep_curves.read(logged(tmp_path / "run", rewards, gold=HUMP, proxy=RISING))
  assert found.learned == ("model",) and set(found.scores) == {"model", "gold"}
  np.testing.assert_allclose(found.scores["gold"], HUMP)


def test_a_preference_run_has_no_curves(tmp_path):
  assert sweep_curves.read(tmp_path) is None
  (tmp_path / "config.json").write_text("{}")
  (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
  assert sweep_curves.read(tmp_path) is None


def test_the_figure_has_a_panel_a_reward_with_what_is_learned_from_first():
  runs = [curves(HUMP, RISING, seed=s, noise=0.01) for s in range(3)]
  figure = sweep_curve_plots.scores_over_kl({"ppo": runs, "ppo-kl0": runs, "rloo": runs})
  learned, watched = figure.axes[:2]
  titles = [axes.get_title(loc="left") for axes in (learned, watched)]
  assert titles == ["model, learned from", "gold, only watched"]
  lines = [line for line in watched.lines if len(line.get_xdata()) == 20]
  assert len(lines) == 3 * (1 + len(runs))
  means = [line for line in lines if line.get_alpha() is None]
  assert len(means) == 3
  np.testing.assert_allclose(means[0].get_ydata(), binned(runs)[1]["gold"].mean(axis=0))
  rings = [x for x in watched.lines if x.get_markerfacecolor() == "none"]
  assert len(rings) == 3 and not [x for x in learned.lines if x.get_markerfacecolor() == "none"]


def evaluated(seed, reason=None):
  from tests.evals import sweep_test

  found = sweep_test.evaluation(sweep_test.scores_of("dpo", seed), 1.0, 5.0)
  run = curves(HUMP, RISING, seed=seed, noise=0.01)
  return sweep.Run("ppo", seed, "finished", reason, evaluation=found, curves=run)


def test_the_page_shows_the_curves_the_falls_and_what_ended_early(tmp_path):
  reason = "distinct/responses was 0.1 at step 7, below stops.distinct_min = 0.3"
  table = sweep.build_table([evaluated(0), evaluated(1, reason), evaluated(2)], metric="gain")
  assert table.summary == "3 of 3 runs finished (1 stopped early)"
  assert table.rows[0].metrics["gain"].n == 3  # what was stopped is a result
  page = sweep_page.write(tmp_path, table).read_text()
  assert (tmp_path / "sweep_scores.png").exists()
  text = (tmp_path / "sweep.md").read_text()
  assert "| 3, 1 stopped early |" in text and f"- ppo seed 1: {reason}" in text
  assert reason in page and "over-optimised" in page
  stored = json.loads((tmp_path / "sweep.json").read_text())
  fall = stored["over_optimisation"]["ppo"]["gold"]["fall"]
  assert fall["value"] == over_optimisation(table.curves["ppo"])[0].fall.value
