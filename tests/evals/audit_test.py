"""The audit's arithmetic: groups, exact decompositions, length, drift, and files that come back equal."""

import dataclasses
import json

import numpy as np
import pytest
from scipy import stats

from align_jax.errors import InputError
from align_jax.evals import (
  audit,
  audit_calibration,
  audit_page,
  features,
  length_bias,
  logistic,
  results,
)


def make_pairs(n=1200, seed=0, **changes):
  rng = np.random.default_rng(seed)
  gold = rng.normal(size=n)
  p = logistic.sigmoid(gold / 0.7)
  first = rng.random(n) < p
  sign = np.where(first, 1.0, -1.0)
  tokens = rng.integers(4, 40, (n, 2)).astype(float)
  tokens = np.where(first[:, None], tokens, tokens[:, ::-1])
  margins = sign * gold + 0.05 * (tokens[:, 0] - tokens[:, 1])
  found = {
    "margins": margins, "chosen": tokens[:, 0], "rejected": tokens[:, 1],
    "prompts": np.arange(n) // 2, "label_prob": np.ones(n),
    "probabilities": np.where(first, p, 1 - p), "gold": sign * gold,
  }  # fmt: skip
  return audit.Pairs(**(found | changes))


def test_a_group_holds_what_loops_over_its_pairs_give():
  pairs = make_pairs()
  rows = np.arange(1200) % 3 == 0
  found = audit.group("third", pairs, rows)
  m, g, p = pairs.margins[rows], pairs.gold[rows], pairs.probabilities[rows]
  assert found.accuracy.value == pytest.approx(np.mean(m > 0)) and found.accuracy.n == 400
  assert found.longer.value == pytest.approx(
    np.mean([0.5 if e == 0 else float(e > 0) for e in pairs.extra[rows]])
  )
  assert found.gold.value == pytest.approx(np.mean((m > 0) == (g > 0)))
  assert found.ceiling == pytest.approx(np.mean(np.maximum(p, 1 - p)))
  assert found.gold_judge == pytest.approx(np.mean(np.where(g > 0, p, 1 - p)))
  assert found.votes is None


def test_the_gold_judge_meets_the_ceiling_and_noise_does_not():
  pairs = make_pairs(8000)
  judge = audit.group("gold", dataclasses.replace(pairs, margins=pairs.gold))
  assert judge.accuracy.low < judge.ceiling < judge.accuracy.high
  assert judge.gold.value == 1.0 and judge.gold_judge == pytest.approx(judge.ceiling)
  noise = audit.group(
    "noise", dataclasses.replace(pairs, margins=np.random.default_rng(1).normal(size=8000))
  )
  assert noise.accuracy.low < 0.5 < noise.accuracy.high
  assert not noise.accuracy.high > noise.ceiling


def test_votes_are_agreed_with_at_random_and_their_ceiling_is_the_majority():
  share = np.tile([1.0, 2 / 3, 2 / 3, 0.5], 30)
  pairs = make_pairs(120, label_prob=share, votes=True, probabilities=None, gold=None)
  found = audit.group("all", pairs)
  right = pairs.margins > 0
  assert found.votes.value == pytest.approx(np.mean(np.where(right, share, 1 - share)))
  assert found.ceiling == pytest.approx(share.mean())
  by = audit.by_agreement(pairs)
  assert [g.name for g in by] == ["50 %", "67 %", "100 %"]
  assert [g.n for g in by] == [30, 60, 30]
  assert [g.accuracy.n for g in by] == [
    0,
    60,
    30,
  ] and found.accuracy.n == 90  # of ties none is right
  assert audit.by_agreement(dataclasses.replace(pairs, votes=False)) == ()


def test_length_groups_hold_every_pair_once_and_their_names_their_span():
  pairs = make_pairs()
  groups = audit.by_length(pairs, bins=6)
  assert sum(g.accuracy.n for g in groups) == 1200
  for low, high in zip(groups, groups[1:]):
    assert low.longer.value <= high.longer.value
  assert groups[0].name.startswith("−") and groups[-1].name.startswith("+")
  # Scores that like length are right where the chosen is longer, and wrong where it is shorter.
  assert groups[-1].accuracy.low > groups[0].accuracy.high


def test_equal_lengths_stay_in_one_part():
  parts = audit.quantile_parts([1, 1, 1, 1, 1, 2], 3)
  assert [sorted(p.tolist()) for p in parts] == [[0, 1, 2, 3, 4], [5]]


def test_the_spread_adds_up_to_the_variance_and_each_part_is_found():
  rng = np.random.default_rng(2)
  kind = np.repeat(np.arange(40), 500)
  prompt = np.repeat(np.arange(40 * 50), 10)
  scores = (
    2 * rng.normal(size=40)[kind] + rng.normal(size=2000)[prompt] + 0.5 * rng.normal(size=20_000)
  )
  found = audit.spread(scores, np.ones(20_000), prompt, [f"k{i:02d}" for i in kind])
  parts = (found.between_categories, found.between_prompts, found.within_prompts)
  assert sum(parts) == pytest.approx(1.0, abs=1e-9)
  assert found.variance == pytest.approx(scores.var())
  means = np.array([scores[kind == k].mean() for k in range(40)])
  assert found.between_categories == pytest.approx(means.var() / scores.var())
  assert found.within_prompts * found.variance == pytest.approx(0.25 * 0.9, rel=0.05)
  # The error of a mean is that of prompts: responses of one prompt are no further evidence.
  assert found.categories[0].score.stderr > 2 * scores[kind == 0].std() / np.sqrt(500)
  with pytest.raises(ValueError, match="two categories"):
    audit.spread(scores[:2], np.ones(2), [0, 0], ["a", "b"])


def test_a_length_bias_is_seen_and_taken_off():
  pairs = make_pairs(6000)
  side = np.random.default_rng(3).normal(size=6000)
  half = (pairs.margins - 0.05 * pairs.extra) / 2
  tokens = np.stack([pairs.chosen, pairs.rejected], axis=1)
  scores = np.stack([side + half, side - half], axis=1) + 0.05 * tokens
  found = audit.length(pairs, scores)
  assert found.split.gap.low > 0.1 and abs(found.gold_split.gap.value) < 0.05
  assert found.residual.slope == pytest.approx(0.05, abs=0.005)
  assert abs(found.residual_correlation) < 0.03 < found.correlation.pearson.low
  assert found.residual_gold.low > found.residual_accuracy.high
  assert found.residual_gold.value > audit.group("all", pairs).gold.value + 0.03
  assert found.residual_matched.value == pytest.approx(found.split.matched.value, abs=0.03)
  assert found.bins[-1].model.low > 0.7 and found.bins[-1].gold.high < 0.6
  for b in found.bins:
    assert b.labels.low - 0.01 <= b.planted <= b.labels.high + 0.01


def test_planted_gaps_do_not_depend_on_which_labels_were_drawn():
  pairs = make_pairs(4000)
  turn = np.random.default_rng(4).random(4000) < 0.5
  swap = lambda x, y: (np.where(turn, y, x), np.where(turn, x, y))  # noqa: E731
  chosen, rejected = swap(pairs.chosen, pairs.rejected)
  sign = np.where(turn, -1, 1)
  swapped = dataclasses.replace(
    pairs, chosen=chosen, rejected=rejected, margins=sign * pairs.margins, gold=sign * pairs.gold,
    probabilities=np.where(turn, 1 - pairs.probabilities, pairs.probabilities),
  )  # fmt: skip
  scores = np.stack([pairs.margins, 0 * pairs.margins], axis=1)
  there, back = audit.length(pairs, scores), audit.length(swapped, scores)
  assert there.labels_gap_planted == pytest.approx(back.labels_gap_planted, abs=1e-12)
  assert [b.planted for b in there.bins] == pytest.approx([b.planted for b in back.bins])


def test_drift_of_the_first_policy_is_none_and_of_a_shifted_one_is_seen():
  rng = np.random.default_rng(5)
  first = rng.normal(size=(500, 4))
  tokens = rng.integers(10, 30, (500, 4)).astype(float)
  gold = first + rng.normal(size=(500, 4))
  exploit = first + 2, tokens + 15, rng.normal(size=(500, 4)) - 1
  found = audit.drift({"sft": (first, tokens, gold), "ppo": exploit}, width=5)
  start, later = found
  assert start.shift == start.distance == start.gain.gain.value == 0.0
  assert start.out_of_range.low < 0.01 < start.out_of_range.high
  assert start.win_rate.raw.value == 0.5
  assert later.shift == pytest.approx(2 / first.std())
  high = np.quantile(first, 0.995)
  assert later.out_of_range.value == pytest.approx(np.mean(first + 2 > high), abs=1e-9)
  assert later.distance == pytest.approx(stats.ks_2samp(first.ravel(), (first + 2).ravel())[0])
  assert start.accuracy.low > 0.65 and later.accuracy.high < 0.55
  assert later.gold_win_rate.high < 0.5 < later.win_rate.raw.low
  assert start.accuracy.n == 1000  # pairs (0, 1) and (2, 3) of every prompt


def test_policies_without_a_gold_judge_have_no_gold():
  x = np.random.default_rng(6).normal(size=(30, 2))
  (found,) = audit.drift({"sft": (x, np.round(20 + x), None)})
  assert found.gold is found.accuracy is found.longer is found.gold_win_rate is None


def whole(seed=0):
  pairs = make_pairs(400, seed)
  scores = np.stack([pairs.margins, 0 * pairs.margins], axis=1)
  x = {"gold": pairs.gold, "length": pairs.extra}
  regressed = {
    "labels": features.regress(x, pairs.label_prob, pairs.extra),
    "model": features.regress(x, logistic.sigmoid(pairs.margins), pairs.extra),
  }
  rng = np.random.default_rng(seed)
  samples = {
    name: (rng.normal(size=(40, 2)), rng.integers(4, 30, (40, 2)).astype(float), None)
    for name in ("sft", "ppo")
  }
  right = length_bias.ahead(pairs.margins)
  return audit.Audit(
    scorer="<b>reward</b>",
    data="pairs.jsonl",
    n=400,
    truncated=0.25,
    groups={"all": (audit.group("all", pairs),), "length": audit.by_length(pairs)},
    calibration=audit_calibration.calibration(logistic.sigmoid(np.abs(pairs.margins)), right),
    temperature=audit_calibration.temperature(pairs.margins, pairs.label_prob),
    spread=audit.spread(
      scores.ravel(), np.ones(800), np.repeat(pairs.prompts, 2), np.repeat(["a"] * 400, 2)
    ),
    length=audit.length(pairs, scores),
    features={"judge": regressed},
    planted={"gold": 1 / 0.7, "length": 0.0},
    drift=audit.drift(samples),
  )


def test_an_audit_is_written_and_read_back(tmp_path):
  found = whole()
  page = audit_page.write(tmp_path, found)
  assert results.to_json(audit.load(tmp_path)) == results.to_json(found)
  html = page.read_text()
  assert "&lt;b&gt;reward" in html and "<b>reward" not in html
  assert "http" not in html.replace("http://www.w3.org", "")  # needs no other file
  for name in ("accuracy", "calibration", "length", "features_judge", "drift"):
    assert (tmp_path / f"audit_{name}.png").read_bytes()[:4] == b"\x89PNG"
  assert "25.0 % of the responses were cut" in html and "longer wins" in html


def test_a_spoilt_audit_is_named_by_file_and_field(tmp_path):
  audit_page.write(tmp_path, whole())
  values = json.loads((tmp_path / "audit.json").read_text())
  values["calibration"]["nll"] = "low"
  (tmp_path / "audit.json").write_text(json.dumps(values))
  with pytest.raises(InputError, match=r"audit\.json\.calibration\.nll"):
    audit.load(tmp_path)


def test_one_number_a_pair_is_asked_for():
  with pytest.raises(ValueError, match="one number a pair"):
    make_pairs(gold=np.zeros(3))
