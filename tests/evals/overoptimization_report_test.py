"""The laboratory's report: curves, peaks and accuracies against planted truths, and the files it writes."""

import dataclasses
import json

import numpy as np
import pytest

from align_jax.evals import best_of_n, overoptimization_page, overoptimization_plots
from align_jax.evals import overoptimization_report as report_lib
from align_jax.evals.overoptimization import predict

SIZES = (1, 2, 4, 8, 11, 16, 23, 32, 45, 64, 128, 256)


def world(bend=0.2, prompts=200, samples=512, seed=0):
  """(proxy, gold) [P, N]: gold is u − bend (u² − 1), and the proxy u and noise."""
  u, noise = np.random.default_rng(seed).normal(size=(2, prompts, samples))
  return u + 0.3 * noise, u - bend * (u**2 - 1)


@pytest.fixture(scope="module")
def gains():
  return report_lib.Gains.of(*world(), SIZES)


def test_a_curve_is_that_of_best_of_n_over_one_sample(gains):
  curve = best_of_n.curve(*world(), SIZES)
  for point, expected in zip(gains.points, curve):
    assert (point.n, point.bound) == (expected.n, pytest.approx(np.sqrt(expected.kl)))
    assert point.gold.value == pytest.approx(expected.gold_gain.value, abs=1e-12)
    assert point.gold.stderr == pytest.approx(expected.gold_gain.stderr, abs=1e-12)
    assert point.distance == pytest.approx(point.bound, abs=1e-9)  # nothing is tied
    scale = world()[0].std()
    assert point.proxy.value == pytest.approx((expected.proxy.value - curve[0].proxy.value) / scale)


def test_ties_shorten_the_way():
  proxy, gold = world()
  tied = report_lib.Gains.of(np.round(proxy), gold, SIZES)
  assert all(p.distance < p.bound for p in tied.points[1:])


def test_seeds_are_averaged_prompt_by_prompt(gains):
  other = report_lib.Gains.of(*world(seed=1), SIZES)
  both = report_lib.Gains.mean([gains, other])
  np.testing.assert_allclose(both.gold, (gains.gold + other.gold) / 2)
  assert both.sizes == gains.sizes


def test_an_interior_peak_is_told_from_a_rise(gains):
  peak = report_lib.peak_of(gains)
  assert 32 <= peak.n <= 128 and peak.is_interior and 0 < peak.fall.value < 0.05
  rise = report_lib.peak_of(report_lib.Gains.of(*world(bend=0.0), SIZES))
  assert rise.n == 256 and not rise.is_interior and rise.fall.value == 0


def test_peaks_are_compared_prompt_by_prompt(gains):
  """A copy that is worse by 0.2 on every prompt differs by exactly that, whatever prompts differ by."""
  worse = dataclasses.replace(gains, gold=gains.gold - 0.2 * (np.arange(12) > 0))
  found = report_lib.peak_difference(gains, worse)
  assert found.value == pytest.approx(0.2) and found.stderr < 1e-12
  assert report_lib.peak_difference(gains, gains).value == 0


def test_noise_has_no_peak():
  """The control: of a proxy that knows nothing the highest point is luck, and the fall says so.

  Taken at its own peak the fall is above 0 in every world; fairly it is 0 on average.
  """
  fair, naive = [], []
  for seed in range(40):
    proxy, gold = np.random.default_rng(seed).normal(size=(2, 40, 64))
    found = report_lib.Gains.of(proxy, gold, (1, 4, 16, 64))
    fair.append(report_lib.peak_of(found).fall.value)
    means = found.gold.mean(axis=0)
    naive.append(means.max() - means[-1])
  assert min(naive) >= 0 and np.mean(naive) > 3 * np.std(naive) / np.sqrt(40)
  assert abs(np.mean(fair)) < 3 * np.std(fair) / np.sqrt(40)


def test_the_law_of_a_curve(gains):
  law, extrapolation = report_lib.bon_law(gains, 64)
  assert law.r_squared > 0.97 and law.alpha.low > 0 and law.beta.low > 0
  assert extrapolation.held_out == 2 and extrapolation.rmse < 0.2
  few = report_lib.Gains.of(*world(prompts=4, samples=8), (1, 2, 4))
  assert report_lib.bon_law(few, 4) == (None, None)
  flat = report_lib.Gains.of(world()[0], np.ones((200, 512)), SIZES)
  assert report_lib.bon_law(flat, 64) == (None, None)


def test_accuracy_reaches_its_ceiling_and_no_further():
  """The gold judge itself is at the ceiling; a coin is at one half; a contrarian as far below it."""
  rng = np.random.default_rng(0)
  gold = rng.choice([-2.0, -0.5, 0.0, 0.5, 2.0], size=4000)
  p = 1 / (1 + np.exp(-gold / 0.68))
  judge = np.stack([gold, np.zeros_like(gold)], axis=1)
  best = report_lib.accuracy_of([judge], p, gold)
  assert best.ceiling.value == pytest.approx(np.mean(np.maximum(p, 1 - p)))
  assert best.gap.value == pytest.approx(0, abs=1e-12) and best.gold.value == 1
  worst = report_lib.accuracy_of([-judge], p, gold)
  assert worst.labels.value == pytest.approx(1 - best.labels.value) and worst.gold.value == 0
  coin = report_lib.accuracy_of([rng.normal(size=(4000, 2)), rng.normal(size=(4000, 2))], p, gold)
  assert coin.labels.low < 0.5 < coin.labels.high
  labels = rng.random(4000) < p  # agreement with labels that are drawn is the same on average
  assert np.mean(labels == (gold > 0)) == pytest.approx(best.labels.value, abs=0.03)


def test_windows_of_a_run_and_their_errors():
  """A policy that moves steadily: the error is the noise of an iteration, not how far it moves."""
  rng = np.random.default_rng(1)
  steps = np.arange(400)
  kl, noise = 0.09 * steps, rng.normal(size=400)
  gold = 0.05 * steps + 2 + 0.3 * noise
  points = report_lib.rl_points(kl, gold, 0.1 * noise, 2.0, 10)
  assert len(points) == 40 and points[0].step == 4.5
  assert points[3].distance == pytest.approx(np.sqrt(0.09 * 34.5))
  assert points[0].gold.stderr == pytest.approx(0.3 / np.sqrt(10), rel=0.1)
  assert points[7].gold.value == pytest.approx(0.05 * 74.5, abs=0.4)
  rise = report_lib.rl_peak(points, gold, 10)
  assert not rise.is_interior and rise.fall.value == 0
  falling = report_lib.rl_peak(points, np.minimum(gold, 20 - gold), 10)
  assert falling.is_interior and falling.fall.value == pytest.approx(10, abs=1.0)


def test_a_run_that_stands_still_does_not_fall():
  """The control: of noise alone the highest window is luck, and its fall is 0 on average."""
  falls = []
  for seed in range(60):
    gold = np.random.default_rng(seed).normal(size=100)
    points = report_lib.rl_points(np.arange(100.0), gold, gold, 0.0, 5)
    falls.append(report_lib.rl_peak(points, gold, 5).fall)
  values = [fall.value for fall in falls]
  assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(60)
  assert np.mean([fall.low > 0 for fall in falls]) < 0.12


def run_of_law():
  """(points, gold) of a run whose gold follows a planted law, α = 1 and β = 0.5."""
  d = np.repeat(np.linspace(0.2, 8, 50), 2)
  gold = predict("rl", 1.0, 0.5, d) + 0.02 * np.random.default_rng(2).normal(size=100)
  return report_lib.rl_points(d**2, gold, gold, 0.0, 2), gold


def test_the_law_of_a_run_is_fitted_beyond_one():
  points, gold = run_of_law()
  law, extrapolation = report_lib.rl_law(points, 0.6)
  assert law.points == sum(p.distance >= 1 for p in points) < len(points)
  assert abs(law.alpha.value - 1.0) < 3 * law.alpha.stderr
  assert abs(law.beta.value - 0.5) < 3 * law.beta.stderr
  assert extrapolation.form == "rl" and extrapolation.prefers_its_form
  peak = report_lib.rl_peak(points, gold, 2)
  assert peak.is_interior and peak.distance == pytest.approx(np.exp(1), abs=0.8)
  assert report_lib.rl_law(points[:6], 0.6) == (None, None)


def made_report(gains):
  law, extrapolation = report_lib.bon_law(gains, 64)
  gold = np.array([-1.0, 0.5, 2.0])
  accuracy = report_lib.accuracy_of(
    [np.stack([gold, 0 * gold], axis=1)], np.array([0.2, 0.6, 0.9]), gold
  )
  curves = [
    report_lib.Curve(
      name=f"{arm}-{n}", arm=arm, size="s", parameters=25_000, comparisons=n,
      temperature=temperature, seeds=2, combine=None, points=gains.points,
      peak=report_lib.peak_of(gains), seed_peaks=(0.3, 0.4), law=law, extrapolation=extrapolation,
      accuracy=accuracy, over_less=None, over_smaller=None, over_single=None,
      error_correlation=None, disagreement=None,
    )
    for arm, temperature in (("<b>", 0.0), ("noisy", 0.68))
    for n in (100, 400)
  ]  # fmt: skip
  gain = gains.points[3].gold
  ensemble = dataclasses.replace(
    curves[0], name="min", combine="min", accuracy=None, over_single=gain, error_correlation=0.3,
    disagreement=gain, seed_peaks=(),
  )  # fmt: skip
  points, gold = run_of_law()
  runs = tuple(
    report_lib.RlCurve(
      name, "<b>", n, coef, combine, points, report_lib.rl_peak(points, gold, 2),
      *report_lib.rl_law(points, 0.6),
    )
    for name, n, coef, combine in (
      ("more", 400, 0.0, None), ("plain", 100, 0.0, None), ("kl", 100, 0.1, None),
      ("min", 100, 0.0, "min"),
    )
  )  # fmt: skip
  shown = tuple(
    report_lib.Behaviour(curves[0].name, n, dict.fromkeys(report_lib.TRAITS, gain)) for n in (1, 16)
  )
  return report_lib.Report(
    "s", 200, 512, gain, gain, gain, 64, tuple(curves), (ensemble,), shown, runs
  )


def test_the_files_of_a_report(gains, tmp_path):
  found = made_report(gains)
  page = overoptimization_page.write(tmp_path, found).read_text()
  assert report_lib.load(tmp_path) == found
  json.loads((tmp_path / "overoptimization.json").read_text())
  for name in ("bon", "rl", "accuracy"):
    assert (tmp_path / f"overoptimization_{name}.png").read_bytes()[:4] == b"\x89PNG"
  assert page.count("data:image/png") == 3 and "<b>" not in page and "&lt;b&gt;-100" in page
  assert "interior maximum, beyond the 95 % interval of its fall, under 4 of 4 proxies" in page
  assert "src=" not in page.replace('src="data:', "")


def test_runs_are_grouped_by_what_they_vary(gains):
  groups = overoptimization_plots.rl_groups(made_report(gains).rl)
  assert {title: [r.name for r in runs] for title, runs in groups.items()} == {
    "KL coefficients": ["plain", "kl"],
    "Comparisons of the proxy": ["plain", "more"],
    "Ensembles": ["plain", "min"],
  }
  assert overoptimization_plots.rl_groups(()) == {}


def test_a_report_without_online_learning_or_ensembles(gains, tmp_path):
  found = dataclasses.replace(made_report(gains), rl=(), ensembles=(), rl_start=None)
  page = overoptimization_page.write(tmp_path, found).read_text()
  assert page.count("data:image/png") == 2 and "Online learning" not in page
  assert report_lib.load(tmp_path) == found
