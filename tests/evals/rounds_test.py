"""The drift statistics against counts made by hand and by NumPy, and what the page says of them."""

import dataclasses
import json
import math

import numpy as np
import pytest

from align_jax.evals import results, rounds, rounds_page, rounds_plots, statistics
from align_jax.evals.rounds import Response


def response(text, gold, reward, length=None):
  return Response(text, length or len(text.split()), {"gold": gold, "first": reward})


PROMPTS = [  # three samples each: (text, gold, reward)
  [response("a b", 1.0, 2.0), response("a b c", 0.0, 1.0), response("a b", 1.0, 2.0)],
  [response("x", 0.5, -1.0), response("x y z w", 0.5, 3.0), response("y", 0.5, 0.0)],
  [response("q", 2.0, 0.0)] * 3,
  [response("m n", -1.0, 0.0), response("k", 1.0, 0.5), response("l", 0.0, 0.5)],
  [response("u v", 0.0, 0.0), response("w", 2.0, 1.0), response("t", 0.0, 0.5)],
]
CHOICES = [(0, 1), (1, 0), "identical", (1, 2), (0, 1)]
FAMILIES = ["fact", "fact", "copy", "copy", "fact"]


@pytest.fixture
def found():
  return rounds.collection(3, PROMPTS, CHOICES, FAMILIES)


def test_pairs_and_what_is_lost_are_counted(found):
  assert (found.round, found.prompts, found.samples_per_prompt, found.pairs) == (3, 5, 3, 4)
  shares = {name: share.value for name, share in found.dropped.items()}
  assert shares == {"identical": 0.2, "cut": 0.0, "tied": 0.0}
  np.testing.assert_allclose(found.distinct.value, np.mean([2 / 3, 1, 1 / 3, 1, 1]))
  assert found.families == {"copy": 0.25, "fact": 0.75}


def test_lengths_of_both_sides(found):
  chosen, rejected = np.array([2, 4, 1, 2.0]), np.array([3, 1, 1, 1.0])
  for estimate, values in ((found.chosen_length, chosen), (found.rejected_length, rejected)):
    np.testing.assert_allclose(estimate.value, values.mean())
    np.testing.assert_allclose(estimate.stderr, values.std(ddof=1) / 2)
  assert found.chosen_longer.value == (0 + 1 + 0.5 + 1) / 4


def test_the_gold_judge_on_the_labels(found):
  """Margins are +1, 0 (a tie), +1 and -2."""
  assert found.agreement.value == (1 + 0.5 + 1 + 0) / 4
  assert found.gold_ties.value == 0.25
  assert found.gold_gap.value == (1 + 0 + 1 + 2) / 4
  golds = [r.scores["gold"] for group in PROMPTS for r in group]
  np.testing.assert_allclose(found.gold.value, np.mean(golds))


def test_a_reward_model_on_the_labels_and_on_gold(found):
  """Its margins are +1, +4, 0 (half), -1: on labels 2.5 of 4; on gold 1, –, half, 1 of 3."""
  model = found.reward_models["first"]
  assert model.accuracy.value == 2.5 / 4
  np.testing.assert_allclose(model.gold_accuracy.value, 2.5 / 3)
  assert model.ceiling == found.agreement
  rewards = [r.scores["first"] for group in PROMPTS for r in group]
  np.testing.assert_allclose(found.reward_scores["first"].value, np.mean(rewards))


def test_without_a_gold_judge_nothing_is_said_of_it():
  bare = [[Response(r.text, r.length, {}) for r in group] for group in PROMPTS]
  found = rounds.collection(1, bare, CHOICES, FAMILIES)
  assert found.gold is found.agreement is found.gold_ties is found.gold_gap is None
  assert found.reward_models == found.reward_scores == {}


def test_a_round_without_pairs_is_described_not_divided_by():
  found = rounds.collection(1, PROMPTS, ["identical"] * 5, FAMILIES)
  assert found.pairs == 0 and found.families == {} and found.reward_models == {}
  assert math.isnan(found.agreement.value) and found.dropped["identical"].value == 1.0
  results.to_json(found)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_distinct_falls_from_one_to_one_nth_when_all_say_the_same(n):
  assert rounds.distinct([f"{i} is {i + 1}" for i in range(n)]) == (1.0, 1.0)
  texts, bigrams = rounds.distinct(["same old words"] * n)
  np.testing.assert_allclose((texts, bigrams), 1 / n)
  assert rounds.distinct(["one"] * n)[1] is None and rounds.distinct([]) == (None, None)


def test_pair_logprobs_are_paired():
  rng = np.random.default_rng(0)
  chosen = rng.normal(-9, 3, 50)
  rejected = chosen - 0.5 + rng.normal(0, 0.1, 50)
  found = rounds.pair_logprobs(chosen, rejected)
  np.testing.assert_allclose(found.margin.value, (chosen - rejected).mean())
  assert found.margin.half_width < found.chosen.half_width / 5


def estimate(value, half=0.1):
  return statistics.Estimate(value, half / 2, value - half, value + half, 64)


def policy(number, score, kl):
  """A policy drift with these numbers."""
  sides = rounds.PairLogprobs(estimate(-5.0 - number), estimate(-6.0), estimate(1.0 - number))
  evaluation = results.PolicyEvaluation(
    policy=f"round_{number}", reference="sft", scorer="gold", n=64, seed=0, temperature=1.0,
    max_new_tokens=8, score=estimate(score), reference_score=estimate(1.0),
    score_gain=estimate(score - 1.0), win_rate=statistics.WinRate(32, 0, 32, estimate(0.5)),
    kl=estimate(kl), kl_k3=estimate(kl), length=estimate(7.0), reference_length=estimate(7.0),
    finished=estimate(0.9, 0.01), families={},
  )  # fmt: skip
  return rounds.PolicyDrift(
    number, evaluation, estimate(kl / 2), estimate(kl / 2), 0.8, None,
    {str(r): sides for r in range(1, number + 1)}, sides if number else None,
  )  # fmt: skip


@pytest.fixture
def report(found):
  first, last = (dataclasses.replace(found, round=r) for r in (1, 2))
  worse = dataclasses.replace(found.reward_models["first"], accuracy=estimate(0.1, 0.01))
  last = dataclasses.replace(last, reward_models={"first": worse}, pairs=3)
  return rounds.Report(
    3, (policy(0, 1.0, 0.0), policy(1, 1.4, 0.5), policy(2, 1.5, 1.5)), (first, last)
  )


def test_everything_is_written_and_reads_back_equal(report, tmp_path):
  rounds_page.write(tmp_path, report)
  values = json.loads((tmp_path / "rounds.json").read_text())
  assert values["rounds"] == 3 and len(values["policies"]) == 3 and len(values["collections"]) == 2
  for place, text in (("policies", rounds.load_policy), ("collections", rounds.load_collection)):
    for number, row in enumerate(values[place]):
      file = tmp_path / f"{place}.json"
      file.write_text(json.dumps(row))
      assert text(file) == getattr(report, place)[number]
  html = (tmp_path / "rounds.html").read_text()
  assert "data:image/png" in html and html.count("<table") == len(rounds_page.tables(report)) == 5


def test_tables_have_one_cell_a_column_and_old_pairs_start_with_the_policy_that_said_them(report):
  for table in rounds_page.tables(report):
    assert all(len(row) == len(table.columns) for row in table.rows), table.title
  old = next(t for t in rounds_page.tables(report) if t.title.startswith("Old pairs"))
  values = [[cell[0] for cell in row[1:]] for row in old.rows]
  # pairs of round 1 and 2 by the start, policy 1 and policy 2
  assert values == [
    ["−6.00 / −6.00", "–"],
    ["−6.00 / −6.00", "−7.00 / −6.00"],
    ["−7.00 / −6.00", "−7.00 / −6.00"],
  ]


def test_the_words_follow_the_intervals(report):
  text = " ".join(rounds_page.sentences(report))
  assert "After 2 of 3 rounds the score is 1.50, +0.50 over the start" in text
  assert "agrees with 10.0 % of the last round’s labels, after 62.5 % in round 1; the gold" in text
  assert "40.0 % of the prompts gave no pair" in text
  last = report.collections[1]
  unsure = dataclasses.replace(last.reward_models["first"], accuracy=estimate(0.1, 0.3))
  last = dataclasses.replace(last, reward_models={"first": unsure})
  vague = dataclasses.replace(report, collections=(report.collections[0], last))
  assert "in round 1 (their intervals overlap)" in " ".join(rounds_page.sentences(vague))
  unfinished = dataclasses.replace(report, policies=report.policies[:1], collections=())
  assert rounds_page.sentences(unfinished) == ["No round is finished; this is the start."]


def test_a_picture_is_drawn_however_little_is_known(report):
  bare = [[Response(r.text, r.length, {}) for r in group] for group in PROMPTS]
  only = rounds.collection(1, bare, ["cut"] * 5, ["all"] * 5)
  for policies, collections in (
    (report.policies, report.collections),
    (report.policies[:1], ()),
    (report.policies[:2], (only,)),
  ):
    figure = rounds_plots.drift(rounds.Report(3, policies, collections))
    assert len(figure.axes) == 9
