"""Figures show the numbers they were given: read back from the drawn artists."""

import numpy as np
import pytest

from align_jax.evals import plots, reward_model, statistics
from align_jax.evals.plots import Series
from align_jax.evals.results import PolicyEvaluation


def evaluation(name, score, kl):
  point = statistics.Estimate(score, 0.1, score - 0.2, score + 0.2, 100)
  base = statistics.Estimate(1.0, 0.1, 0.8, 1.2, 100)
  spread = statistics.Estimate(kl, 0.1, 0.81 * kl, 1.21 * kl, 100)
  rate = {"score": point, "correct": statistics.proportion([1, 0, 1])}
  return PolicyEvaluation(
    policy=name,
    reference="sft",
    scorer="gold",
    n=100,
    seed=0,
    temperature=1.0,
    max_new_tokens=8,
    score=point,
    reference_score=base,
    score_gain=point,
    kl=spread,
    kl_k3=spread,
    length=point,
    win_rate=statistics.win_rate([1.0], [0.0]),
    reference_length=base,
    finished=rate["correct"],
    families={"all": rate, "facts": rate, "lists": rate},
  )


EVALUATIONS = {
  "sft": evaluation("sft", 1.0, 0.0),
  "dpo": evaluation("dpo", 1.5, 4.0),
  "ppo": evaluation("ppo", 1.8, 9.0),
}


def pixels(figure):
  return plots.to_png(figure, dpi=40)


def points(axes):
  marked = [line for line in axes.lines if line.get_marker() != "None"]
  return [tuple(map(float, line.get_xydata()[0])) for line in marked]


def test_the_frontier_puts_every_policy_at_its_root_kl_and_score():
  axes = plots.frontier(EVALUATIONS).axes[0]
  assert {(2.0, 1.5), (3.0, 1.8), (0.0, 1.0)} <= set(points(axes))
  bars = [segment for container in axes.collections for segment in _segments(container)]
  # DPO: √(0.81 · 4) = 1.8 to √(1.21 · 4) = 2.2 across, 1.3 to 1.7 up.
  assert any(np.allclose(bar, [[1.8, 1.5], [2.2, 1.5]]) for bar in bars)
  assert any(np.allclose(bar, [[2.0, 1.3], [2.0, 1.7]]) for bar in bars)


def _segments(collection):
  return collection.get_segments() if hasattr(collection, "get_segments") else []


def test_a_sweep_of_one_objective_is_joined_in_the_order_of_its_kl():
  sweep = {f"dpo-beta{b}": evaluation("x", s, k) for b, s, k in ((1, 1.8, 9.0), (2, 1.5, 4.0))}
  line = next(
    l
    for l in plots.frontier(sweep).axes[0].lines
    if len(l.get_xdata()) == 2 and l.get_marker() == plots.look_of("dpo")[1]
  )
  np.testing.assert_allclose(line.get_xydata(), [[2.0, 1.5], [3.0, 1.8]])


def test_objectives_are_told_apart_by_colour_and_by_marker():
  names = ("sft", "reward", "dpo", "ipo", "kto", "ppo")
  colours, markers = zip(*map(plots.look_of, names))
  assert len(set(colours)) == len(set(markers)) == len(names)
  assert plots.look_of("dpo-beta0.05") == plots.look_of("dpo_seed1") == plots.look_of("DPO")
  assert plots.look_of("simpo") == plots.look_of("simpo-2")
  for colour in colours:  # as text on white: a contrast of 4.5 or more
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    assert 1.05 / (linear @ [0.2126, 0.7152, 0.0722] + 0.05) >= 4.5, colour


def test_runs_are_called_as_people_call_them():
  assert plots.title_of("dpo") == "DPO"
  assert plots.title_of("dpo-beta0.05") == "DPO beta0.05"
  assert plots.title_of("reward") == "Reward model"
  assert plots.title_of("simpo") == "simpo"


def test_curves_show_raw_values_their_mean_and_held_out_ones():
  steps = np.arange(100.0)
  values = np.where(steps == 7, np.nan, steps)
  figure = plots.curves(
    "dpo",
    {"loss": Series(steps, values), "eval/loss": Series(steps[::50], steps[::50])},
    levels={"loss": (0.5, "chance")},
  )
  (axes,) = figure.axes
  raw, smooth, held_out, level = axes.lines
  np.testing.assert_array_equal(raw.get_ydata(), values)
  # The running mean of the last five values, of those that there are.
  assert smooth.get_ydata()[50] == 48.0 and smooth.get_ydata()[8] == np.mean([4, 5, 6, 8])
  assert list(held_out.get_ydata()) == [0, 50] and level.get_ydata()[0] == 0.5
  assert axes.get_ylabel() == "nats a pair"
  assert plots.curves("dpo", {"unheard/of": Series(steps, steps)}, levels={}) is None


def test_an_all_nan_curve_draws_nothing_but_does_not_fail():
  nothing = Series(np.arange(3.0), np.full(3, np.nan))
  assert pixels(plots.curves("ppo", {"loss": nothing}, levels={}))


@pytest.mark.parametrize(
  "draw",
  [
    plots.families,
    plots.lengths,
    lambda e: plots.behaviour(e, ["correct"]),
  ],
)
def test_other_figures_name_their_units(draw):
  figure = draw(EVALUATIONS)
  assert all(axes.get_xlabel() for axes in figure.axes)
  assert pixels(figure).startswith(b"\x89PNG")


def test_the_overview_is_the_frontier_beside_the_judge_and_the_reward_model():
  pairs = reward_model.evaluate_pairs(
    np.array([1.0, -1.0]), np.zeros(2), chosen_lengths=np.ones(2), rejected_lengths=np.zeros(2)
  )
  left, judged, rewards = plots.overview(EVALUATIONS, pairs, ["correct"]).axes
  assert {(2.0, 1.5), (3.0, 1.8), (0.0, 1.0)} <= set(points(left))
  assert [text.get_text() for text in judged.get_yticklabels()] == ["correct"]
  assert [x for x, _ in points(judged)] == pytest.approx([2 / 3] * 3)
  # Without a gold judge there is no ceiling to show.
  shown = [text.get_text() for text in rewards.get_yticklabels()]
  assert shown == ["reward model", "“longer wins”"]


def test_the_reward_figure_marks_the_ceiling():
  margins = np.array([1.0, 2.0, -0.5, 3.0])
  found = reward_model.evaluate_pairs(
    margins,
    0 * margins,
    chosen_lengths=np.array([1, 2, 3, 4]),
    rejected_lengths=np.array([2, 2, 2, 2]),
    gold_margins=np.array([1.0, 1.0, 1.0, -1.0]),
  )
  left, right = plots.reward_model(found).axes
  assert any(np.allclose(line.get_xdata(), 0.75) for line in left.lines)  # the gold judge: 3 of 4
  assert f"ECE {found.calibration_error:.3f}" in right.get_title(loc="left")


def test_unknown_intervals_have_no_bars():
  lonely = {"sft": EVALUATIONS["sft"], "dpo": evaluation("dpo", 1.5, float("nan"))}
  assert pixels(plots.frontier(lonely))


def test_ticks_of_kl_are_round_and_apart():
  for limit in (0.5, 2.0, 8.0, 20.0):
    ticks = plots._square_ticks(limit)
    assert 2 <= len(ticks) <= 9 and ticks[0] == 0
    assert np.diff(np.sqrt(ticks)).min() >= limit / 7
