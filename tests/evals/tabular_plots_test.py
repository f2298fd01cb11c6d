"""Figures of the tabular world show the numbers they were given: read back from the drawn artists."""

import functools

import numpy as np
import pytest

from align_jax import losses
from align_jax.evals import plots, tabular_plots
from align_jax.worlds import tabular

FAMILY = {
  "DPO": functools.partial(losses.dpo_loss, beta=0.5),
  "IPO": functools.partial(losses.ipo_loss, tau=0.25),
  "CPO": functools.partial(losses.cpo_loss, beta=0.5),
}


@pytest.fixture(scope="module")
def world():
  return tabular.random_world(0)


@pytest.fixture(scope="module")
def run(world):
  objective = tabular.pair_objective(world, tabular.pairs(world), FAMILY["DPO"])
  return tabular.fit(world, objective, steps=40, learning_rate=5.0)


def curves(axes):
  return [line.get_ydata() for line in axes.lines if len(line.get_xdata()) > 2]


def test_a_loss_at_ratios_is_the_loss_and_its_descent():
  chosen, rejected = np.array([1.0, -2.0, 0.0]), np.array([0.5, 3.0, 0.0])
  value, up, down = tabular_plots.at_ratios(FAMILY["DPO"], chosen, rejected)
  doubt = 1 / (1 + np.exp(0.5 * (chosen - rejected)))
  np.testing.assert_allclose(value, -np.log(1 - doubt), rtol=1e-5)
  np.testing.assert_allclose(up, 0.5 * doubt, rtol=1e-5)
  np.testing.assert_allclose(down, -0.5 * doubt, rtol=1e-5)
  # CPO reads no reference: its value there is that of log-probs −4 + ratio, its SFT pull is 1.
  value, up, down = tabular_plots.at_ratios(FAMILY["CPO"], chosen, rejected)
  np.testing.assert_allclose(value, -np.log(1 - doubt) - (chosen - 4.0), rtol=1e-5)
  np.testing.assert_allclose(up + down, 1.0, rtol=1e-5)


def test_shapes_draw_the_pulls_of_every_loss():
  figure = tabular_plots.shapes(FAMILY, reach=4.0)
  panels = [axes for axes in figure.axes if axes.get_title(loc="left") in FAMILY]
  assert [axes.get_title(loc="left") for axes in panels] == list(FAMILY)
  up, down = curves(panels[1])
  margins = np.linspace(-4, 4, len(up))
  np.testing.assert_allclose(up, -2 * (margins - 2.0), atol=1e-4)
  np.testing.assert_allclose(down, -up, atol=1e-4)


def test_journeys_start_at_zero_and_end_where_training_did(run):
  axes = tabular_plots.journeys({"DPO": run}, chosen=1, rejected=0).axes[0]
  drawn = np.array(curves(axes))
  order = [2, 3, 1, 0]  # the others, then chosen and rejected on top of them
  np.testing.assert_allclose(drawn, (run.logps[:, 0] - run.logps[0, 0]).T[order], atol=1e-6)


def test_optima_put_bars_at_the_formula_and_markers_at_the_run(world, run):
  axes = tabular_plots.optima(world, {0.5: {"dpo": run}}).axes[0]
  order = np.argsort(world.rewards[0])
  best = np.exp(tabular.optimum(world, beta=0.5))[0, order]
  np.testing.assert_allclose([bar.get_height() for bar in axes.patches], best, rtol=1e-6)
  np.testing.assert_allclose(curves(axes)[0], np.exp(run.logps[-1, 0, order]), rtol=1e-6)


def test_the_frontier_shows_what_a_run_lacks_at_its_kl(world, run):
  betas = np.geomspace(100.0, 0.1, 400)
  left, right = tabular_plots.reward_frontier(world, {"dpo": [run]}, betas=betas).axes
  ended = left.lines[1].get_xydata()[0]
  np.testing.assert_allclose(ended, [np.sqrt(run.kl[-1]), run.reward[-1]], rtol=1e-6)
  (root, lacking) = right.lines[1].get_xydata()[0]
  frontier = left.lines[0].get_xydata()
  assert lacking < 1e-5
  np.testing.assert_allclose(lacking, run.reward[-1] - np.interp(root, *frontier.T), atol=1e-7)


def test_every_figure_becomes_an_image(world, run):
  up = tabular.thumb_probabilities(world)
  best = {"reverse KL": tabular.optimum(world, beta=0.5)}
  figures = [
    tabular_plots.fields(FAMILY),
    tabular_plots.margins({"DPO": run}, {"DPO": lambda t: np.log(t)}),
    tabular_plots.thumbs(world, up, run, [run, run]),
    tabular_plots.displacements({"DPO": (np.array([0.2, 0.1, 0.7]), -1.0)}),
    tabular_plots.divergences(world, best, {"reverse KL": run}),
  ]
  for figure in figures:
    assert plots.to_png(figure, dpi=40).startswith(b"\x89PNG")
