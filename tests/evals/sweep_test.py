"""The table of a sweep against NumPy and SciPy written out: means, pairs, order, failures, files."""

import csv
import json

import numpy as np
import pytest
from scipy import stats

from align_jax.errors import InputError
from align_jax.evals import results, statistics, sweep, sweep_page

PROMPTS, SEEDS = 20, 3
REFERENCE = np.random.default_rng(9).normal(size=PROMPTS)


def evaluation(scores, kl, length):
  rates = {"score": statistics.mean(scores), "correct": statistics.proportion(scores > 0)}
  return results.PolicyEvaluation(
    policy="seed0",
    reference="sft",
    scorer="gold",
    n=PROMPTS,
    seed=0,
    temperature=1.0,
    max_new_tokens=8,
    score=statistics.mean(scores),
    reference_score=statistics.mean(REFERENCE),
    score_gain=statistics.paired_difference(scores, REFERENCE),
    win_rate=statistics.win_rate(scores, REFERENCE),
    kl=statistics.mean(np.full(PROMPTS, kl)),
    kl_k3=statistics.mean(np.full(PROMPTS, kl)),
    length=statistics.mean(np.full(PROMPTS, length)),
    reference_length=statistics.mean(np.full(PROMPTS, 6.0)),
    finished=statistics.proportion(np.ones(PROMPTS)),
    families={"all": rates},
  )


def scores_of(variant, seed):
  """[PROMPTS]: what a prompt is worth, the variant's gain, its seed's luck, and noise."""
  rng = np.random.default_rng([sum(variant.encode()), seed])
  gain = {"dpo": 0.3, "ipo": 0.9, "kto": 0.5}[variant]
  return REFERENCE + gain + 0.1 * rng.normal() + 0.6 * rng.normal(size=PROMPTS)


def kl_of(variant, seed):
  return {"dpo": 1.0, "ipo": 4.0, "kto": 0.25}[variant] * (1 + 0.1 * seed)


def run(variant, seed, *, first_prompt=0):
  scores = scores_of(variant, seed)
  samples = tuple(
    results.Sample(({"role": "user", "content": f"q{i + first_prompt}"},), "a", float(s), "facts")
    for i, s in enumerate(scores)
  )
  found = evaluation(scores, kl_of(variant, seed), 5.0 + seed)
  return sweep.Run(variant, seed, "finished", evaluation=found, samples=samples)


def runs():
  return [run(variant, seed) for seed in range(SEEDS) for variant in ("dpo", "ipo", "kto")]


def row(table, variant):
  return next(r for r in table.rows if r.variant == variant)


def close(estimate, value, half):
  assert estimate.value == pytest.approx(value, rel=1e-12)
  assert (estimate.high - estimate.low) / 2 == pytest.approx(half, rel=1e-9)


def student(values):
  """(mean, half width) of the 95 % interval of a mean, from SciPy."""
  values = np.asarray(values)
  return values.mean(), stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)


@pytest.mark.parametrize(
  "metric, value",
  [
    ("score", lambda v, s: scores_of(v, s).mean()),
    ("kl", kl_of),
    ("sqrt_kl", lambda v, s: np.sqrt(kl_of(v, s))),
    ("win_rate", lambda v, s: np.mean(scores_of(v, s) > REFERENCE)),
    ("length", lambda v, s: 5.0 + s),
    ("correct", lambda v, s: np.mean(scores_of(v, s) > 0)),
  ],
)
def test_means_and_intervals_are_over_seeds(metric, value):
  table = sweep.build_table(runs(), metric="score", baseline="dpo")
  for variant in ("dpo", "ipo", "kto"):
    close(row(table, variant).metrics[metric], *student([value(variant, s) for s in range(SEEDS)]))


def test_differences_are_paired_by_seed():
  table = sweep.build_table(runs(), metric="score", baseline="dpo")
  gaps = [(scores_of("ipo", s) - scores_of("dpo", s)).mean() for s in range(SEEDS)]
  close(row(table, "ipo").differences["score"], *student(gaps))
  close(
    row(table, "kto").differences["kl"],
    *student([kl_of("kto", s) - kl_of("dpo", s) for s in range(SEEDS)]),
  )
  assert row(table, "dpo").differences == {} and row(table, "dpo").prompt_difference is None


def test_pairing_takes_out_what_the_seeds_share():
  """Control: with a luck that both variants share, the unpaired interval is far wider."""
  luck = [3.0, -2.0, 0.5]

  def lucky(variant, seed):
    scores = scores_of(variant, seed) + luck[seed]
    return sweep.Run(variant, seed, "finished", evaluation=evaluation(scores, 1.0, 5.0))

  own = [lucky(variant, seed) for seed in range(SEEDS) for variant in ("dpo", "ipo")]
  found = row(sweep.build_table(own, metric="score", baseline="dpo"), "ipo")
  assert found.differences["score"].half_width < 0.1 * found.metrics["score"].half_width


def test_differences_over_prompts_keep_a_prompts_seeds_together():
  """The mean over seeds of every prompt's difference, and Student's interval over prompts."""
  table = sweep.build_table(runs(), metric="score", baseline="dpo")
  gaps = np.mean([scores_of("ipo", s) - scores_of("dpo", s) for s in range(SEEDS)], axis=0)
  assert gaps.shape == (PROMPTS,)
  close(row(table, "ipo").prompt_difference, *student(gaps))


def test_other_prompts_are_not_paired():
  other = [run("dpo", 0), run("ipo", 0, first_prompt=1)]
  found = row(sweep.build_table(other, metric="score", baseline="dpo"), "ipo")
  assert found.prompt_difference is None
  assert found.differences["score"].n == 1  # seed by seed it still is


def test_one_seed_has_no_interval_over_seeds_but_one_over_prompts():
  found = row(sweep.build_table([run("dpo", 0), run("ipo", 0)], metric="kl", baseline="dpo"), "ipo")
  assert np.isnan([found.metrics["score"].low, found.differences["score"].high]).all()
  close(found.prompt_difference, *student(scores_of("ipo", 0) - scores_of("dpo", 0)))


FAILED = sweep.Run("ipo", 1, "diverged", "the loss is inf at step 31")


def test_a_failed_seed_is_left_out_of_means_and_pairs_and_is_counted():
  own = [FAILED if (r.variant, r.seed) == ("ipo", 1) else r for r in runs()]
  table = sweep.build_table(own, metric="score", baseline="dpo")
  kept = [0, 2]
  close(row(table, "ipo").metrics["score"], *student([scores_of("ipo", s).mean() for s in kept]))
  gaps = [(scores_of("ipo", s) - scores_of("dpo", s)).mean() for s in kept]
  close(row(table, "ipo").differences["score"], *student(gaps))
  assert table.failed == (FAILED,)
  assert table.summary == "8 of 9 runs finished, 1 failed"
  text = sweep_page.as_markdown(table, {})
  assert "| ipo | 2 of 3, 1 failed |" in text
  assert "- ipo seed 1 diverged: the loss is inf at step 31" in text


@pytest.mark.parametrize(
  "metric, order",
  [
    ("score", ["ipo", "kto", "dpo"]),
    ("kl", ["kto", "dpo", "ipo"]),  # nearest first
    ("sqrt_kl", ["kto", "dpo", "ipo"]),
  ],
)
def test_the_leaderboard_is_sorted_by_any_metric_and_what_failed_comes_last(metric, order):
  own = [sweep.Run("a", s, "crashed", "out of memory") for s in range(SEEDS)] + runs()
  table = sweep.build_table(own, metric=metric)
  assert [r.variant for r in table.rows] == [*order, "a"]


def test_an_unknown_metric_is_said():
  with pytest.raises(InputError, match="metric must be one of score, kl, .*, not 'wins'"):
    sweep.build_table(runs(), metric="wins")


def test_files_hold_the_tables_numbers(tmp_path):
  table = sweep.build_table([*runs(), FAILED], metric="kl", baseline="dpo")
  page = sweep_page.write(tmp_path, table)
  stored = json.loads((tmp_path / "sweep.json").read_text())
  assert [v["variant"] for v in stored["variants"]] == ["kto", "dpo", "ipo"]
  lines = list(csv.DictReader((tmp_path / "sweep.csv").open()))
  for line, values, found in zip(lines, stored["variants"], table.rows):
    assert line["variant"] == values["variant"] == found.variant
    score = found.metrics["score"]
    assert values["metrics"]["score"]["low"] == float(line["score_low"]) == score.low
    assert float(line["sqrt_kl_mean"]) == found.metrics["sqrt_kl"].value
  assert lines[1]["score_difference_mean"] == ""  # the baseline itself
  assert (
    float(lines[2]["score_difference_over_prompts_high"]) == table.rows[2].prompt_difference.high
  )
  assert {"variant": "ipo", "seed": 1, "state": "diverged"}.items() <= stored["runs"][-1].items()
  text = page.read_text()
  assert text.count("data:image/png") == 2 and 'src="http' not in text
  assert "nan" not in text.partition("<tbody>")[2].partition("</tbody>")[0]
  assert (tmp_path / "sweep_frontier.png").exists()


def test_a_table_without_any_finished_run_is_written_too(tmp_path):
  sweep_page.write(tmp_path, sweep.build_table([FAILED], metric="score", baseline="ipo"))
  assert "0 of 1 runs finished, 1 failed" in (tmp_path / "sweep.md").read_text()
  assert not (tmp_path / "sweep_frontier.png").exists()


def test_texts_from_outside_are_escaped(tmp_path):
  nasty = sweep.Run("ipo", 0, "crashed", "<script>alert(1)</script>")
  page = sweep_page.write(tmp_path, sweep.build_table([nasty, run("dpo", 0)], metric="score"))
  assert "<script>alert" not in page.read_text()
