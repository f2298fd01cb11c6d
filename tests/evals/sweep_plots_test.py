"""The figures of a sweep show the numbers they were given, and no name covers another."""

import itertools

import numpy as np
import pytest

from align_jax.evals import plots, statistics, sweep, sweep_plots
from align_jax.evals.results import PolicyEvaluation

OBJECTIVES = (
  "dpo", "cdpo", "ipo", "hinge", "robust", "sppo", "apo_zero", "simpo", "orpo", "cpo", "dpop", "kto",
)  # fmt: skip


def run(variant, seed, score, kl):
  point = statistics.Estimate(score, 0.1, score - 0.2, score + 0.2, 100)
  base = statistics.Estimate(0.5, 0.1, 0.3, 0.7, 100)
  spread = statistics.Estimate(kl, 0.1, 0.8 * kl, 1.2 * kl, 100)
  rate = statistics.proportion([1, 0, 1])
  found = PolicyEvaluation(
    policy=f"seed{seed}",
    reference="sft",
    scorer="gold",
    n=100,
    seed=0,
    temperature=1.0,
    max_new_tokens=8,
    score=point,
    reference_score=base,
    score_gain=point,
    win_rate=statistics.win_rate([1.0], [0.0]),
    kl=spread,
    kl_k3=spread,
    length=point,
    reference_length=base,
    finished=rate,
    families={"all": {"score": point, "correct": rate}},
  )
  return sweep.Run(variant, seed, "finished", evaluation=found)


def table(variants, *, spread, seeds=3):
  """Variants near each other: `spread` is how far apart they lie."""
  rng = np.random.default_rng(0)
  runs = []
  for variant in variants:
    score, kl = 1 + spread * rng.normal(), 2 + spread * rng.normal()
    runs += [
      run(variant, s, score + 0.02 * rng.normal(), max(kl + 0.1 * rng.normal(), 0.1))
      for s in range(seeds)
    ]
  return sweep.build_table(runs, metric="score")


SMALL = sweep.build_table(
  [run("dpo", s, 1.0 + 0.1 * s, (1.0 + s) ** 2) for s in range(3)]
  + [sweep.Run("ipo", s, "diverged", "the loss is nan") for s in range(3)],
  metric="score",
)


def offsets(axes):
  return np.concatenate([c.get_offsets() for c in axes.collections if len(c.get_offsets()) > 1])


def test_the_frontier_shows_seeds_and_their_mean():
  axes = sweep_plots.frontier(SMALL).axes[0]
  np.testing.assert_allclose(offsets(axes), [[1, 1.0], [2, 1.1], [3, 1.2]])
  means = [tuple(line.get_xydata()[0]) for line in axes.lines if line.get_marker() == "s"]
  np.testing.assert_allclose(means, [(2.0, 1.1)])
  half = SMALL.rows[0].metrics["score"].half_width
  bars = [b for c in axes.collections if hasattr(c, "get_segments") for b in c.get_segments()]
  assert any(np.allclose(bar, [[2, 1.1 - half], [2, 1.1 + half]]) for bar in bars)


@pytest.mark.parametrize("count, spread", [(12, 1.0), (12, 0.1), (16, 0.3)])
def test_no_name_covers_another_or_leaves_the_frame(count, spread):
  names = [*OBJECTIVES, *(f"extra{i}" for i in range(count - 12))]
  figure = sweep_plots.frontier(table(names, spread=spread))
  axes = figure.axes[0]
  boxes = {t.get_text(): t for t in axes.texts}
  assert set(boxes) == set(names)
  figure.canvas.draw()
  renderer, frame = figure.canvas.get_renderer(), axes.get_window_extent()
  # Without its line to the mark, which a text's own extent would take in.
  extents = {}
  for name, text in boxes.items():
    text.arrow_patch = None
    extents[name] = text.get_window_extent(renderer)
  for (a, one), (b, other) in itertools.combinations(extents.items(), 2):
    assert not one.overlaps(other), f"{a} covers {b}"
  assert all(frame.x0 <= e.x0 and e.x1 <= frame.x1 for e in extents.values())


def test_twelve_objectives_are_told_apart():
  looks = sweep_plots.looks(OBJECTIVES)
  assert len(set(looks.values())) == 12
  assert len({marker for _, marker in looks.values()}) == 12
  assert looks["dpo"] == plots.look_of("dpo")


def test_a_grid_shares_the_look_of_its_objective():
  looks = sweep_plots.looks(("dpo-beta=0.1", "dpo-beta=0.5", "simpo-gamma=1.0", "simpo"))
  assert looks["dpo-beta=0.1"] == looks["dpo-beta=0.5"] == plots.look_of("dpo")
  assert looks["simpo-gamma=1.0"] == looks["simpo"] != looks["dpo-beta=0.1"]


def test_the_leaderboard_has_a_bar_for_every_mean_in_the_tables_order_and_says_what_failed():
  figure = sweep_plots.leaderboard(SMALL, "score")
  axes = figure.axes[0]
  assert [t.get_text() for t in axes.get_yticklabels()] == ["dpo", "ipo"]
  bars = [(p.get_width(), p.get_y() + p.get_height() / 2) for p in axes.patches]
  np.testing.assert_allclose(bars, [(1.1, 0.0)], atol=1e-12)
  assert [t.get_text() for t in axes.texts] == ["3 of 3 failed: diverged"]
  np.testing.assert_allclose(offsets(axes), [[1.0, 0], [1.1, 0], [1.2, 0]])


@pytest.mark.parametrize("metric", sweep.METRICS)
def test_every_metric_has_a_leaderboard(metric):
  one = sweep.build_table([run("dpo", 0, 1.0, 2.0), run("kto", 0, 1.2, 1.0)], metric=metric)
  figure = sweep_plots.leaderboard(one, metric)
  assert plots.to_png(figure, dpi=40).startswith(b"\x89PNG")


def test_one_seed_has_no_interval_and_still_a_place():
  axes = sweep_plots.frontier(table(("dpo", "ipo"), spread=1.0, seeds=1)).axes[0]
  assert {t.get_text() for t in axes.texts} == {"dpo", "ipo"}
