"""Aggregates of reward-model benchmarks against NumPy and counting by hand; intervals by simulation."""

import json
import math

import numpy as np
import pytest

from align_jax import config as config_lib
from align_jax.data import benchmarks
from align_jax.data.benchmarks import Item
from align_jax.evals import results, reward_benchmarks, reward_benchmarks_page, statistics
from align_jax.evals.statistics import Estimate


def item(section, subset, prompt="p", *, right=1, wrong=1, name=""):
  prompt = ({"role": "user", "content": str(prompt)},)
  return Item(prompt, ("yes",) * right, ("no",) * wrong, section, subset, name)


def table(benchmark, items, rewards, lengths=None):
  lengths = rewards if lengths is None else lengths
  pairs = [
    [(np.array(c, float), np.array(r, float)) for c, r in side] for side in (rewards, lengths)
  ]
  return reward_benchmarks.table(benchmark, items, *pairs)


def by_name(rows):
  heads = [row for row in rows if row.level != "subset"]
  assert len({row.name for row in heads}) == len(heads)
  return {row.name: row for row in heads}


def test_rewardbench_weighs_subsets_by_their_published_sizes():
  """The oracle: counts of the file, weights of the benchmark, whatever the file's own counts are."""
  rng = np.random.default_rng(0)
  subsets = [(s, name) for s, part in benchmarks.REWARDBENCH.items() for name in part]
  items = [item(*subsets[i], prompt=n) for n, i in enumerate(rng.integers(len(subsets), size=900))]
  rewards = rng.normal(size=(900, 2)).round(1)  # with some ties, which are lost
  lengths = rng.integers(1, 9, size=(900, 2))
  found = by_name(table("rewardbench", items, _pairs(rewards), _pairs(lengths)))

  def oracle(values):
    wins, sections = values[:, 0] > values[:, 1], {}
    for section, part in benchmarks.REWARDBENCH.items():
      means = [np.mean([w for w, i in zip(wins, items) if i.subset == name]) for name in part]
      sections[section] = np.average(means, weights=list(part.values()))
    return sections | {"overall": np.average(list(sections.values()), weights=[1, 1, 1, 1, 0.5])}

  assert (rewards[:, 0] == rewards[:, 1]).sum() > 20
  for field, values in (("accuracy", rewards), ("longer", lengths)):
    for name, expected in oracle(values).items():
      assert getattr(found[name], field).value == pytest.approx(expected, abs=1e-12), name
  for row in found.values():
    difference = row.accuracy.value - row.longer.value
    assert row.over_longer.value == pytest.approx(difference, abs=1e-12)


def test_math_prm_counts_as_much_as_all_code_however_few_its_rows():
  items = [item("Reasoning", "math-prm", 0)] + [item("Reasoning", "hep-go", i) for i in range(1, 9)]
  found = by_name(table("rewardbench", items, [([1], [0])] + [([0], [1])] * 8))
  assert found["Reasoning"].accuracy.value == pytest.approx(984 / (984 + 164))
  assert found["Reasoning"].n == 9 and found["overall"].accuracy.value == pytest.approx(984 / 1148)


def test_rm_bench_is_a_matrix_of_styles_by_hand():
  """Two questions; a right answer's row against the wrong answers' columns."""
  items = [item("chat", "chat", i, right=3, wrong=3) for i in range(2)]
  first = ([1, 3, 5], [2, 4, 4])  # wins: row 0 none; row 1 column 0; row 2 all
  second = ([3, 3, 3], [1, 3, 5])  # wins: column 0; a tie is lost; none
  rewards = [first, second]
  matrix = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 1]]) + np.array([[1, 0, 0]] * 3)
  arrays = [(np.array(c), np.array(r)) for c, r in rewards]
  np.testing.assert_array_equal(reward_benchmarks.matrix(arrays), matrix / 2)
  found = by_name(table("rm_bench", items, rewards))
  assert found["chat, hard"].accuracy.value == 0.0  # (0,1), (0,2), (1,2)
  assert found["chat, normal"].accuracy.value == pytest.approx((1 + 0 + 1) / 6)
  assert found["chat, easy"].accuracy.value == pytest.approx((2 + 2 + 1) / 6)
  assert found["chat"].accuracy.value == pytest.approx(7 / 18) == found["overall"].accuracy.value
  assert found["chat"].n == 2


def test_rm_bench_averages_safety_first_and_then_domains():
  def won(share):
    return ([1, 1, 1], [0, 0, 0]) if share else ([0, 0, 0], [1, 1, 1])

  kinds = [("chat", "chat", 1)] * 3 + [("safety", "safety-refuse", 1)] * 5
  kinds += [("safety", "safety-response", 0)] * 2 + [("code", "code", 0)]
  items = [item(s, name, i, right=3, wrong=3) for i, (s, name, _) in enumerate(kinds)]
  found = by_name(table("rm_bench", items, [won(x) for _, _, x in kinds]))
  assert found["safety"].accuracy.value == 0.5  # not 5/7
  assert found["overall"].accuracy.value == pytest.approx((1 + 0.5 + 0) / 3)


def test_rmb_needs_the_best_above_all_losers():
  items = [
    item("Helpfulness, pairs", "Chat/A", 0),
    item("Helpfulness, pairs", "Chat/B", 0),
    item("Helpfulness, best of n", "Chat/A", 1, wrong=3),
    item("Helpfulness, best of n", "Chat/A", 2, wrong=2),
    item("Harmlessness, pairs", "S1", 3),
  ]
  rewards = [([2], [1]), ([1], [2]), ([3], [1, 2, 3]), ([3], [1, 2]), ([5], [4])]
  found = by_name(table("rmb", items, rewards))
  assert found["Helpfulness, pairs"].accuracy.value == 0.5
  assert found["Helpfulness, best of n"].accuracy.value == 0.5  # a tie with a loser is lost
  assert found["overall"].accuracy.value == pytest.approx((0.5 + 0.5 + 1) / 3)
  subsets = [row.name for row in table("rmb", items, rewards) if row.level == "subset"]
  assert subsets == ["Chat/A", "Chat/B", "Chat/A", "S1"]


def test_judgebench_pools_pairs_and_llmbar_averages_subsets():
  judged = [item("math", "livebench-math", i) for i in range(3)] + [item("coding", "livecodebench")]
  found = by_name(table("judgebench", judged, [([1], [0])] * 2 + [([0], [0])] + [([0], [1])]))
  assert found["math"].accuracy.value == pytest.approx(2.5 / 3)
  assert found["overall"].accuracy.value == 2.5 / 4  # a tie is half, pairs are pooled
  kinds = [("Natural", "Natural", 1), ("Adversarial", "GPTOut", 1), ("Adversarial", "Manual", 0)]
  kinds += [("Adversarial", "Manual", 0)] * 3 + [
    ("Adversarial", "Neighbor", 1),
    ("MT-Bench",) * 2 + (0,),
  ]
  items = [item(*kind[:2], i) for i, kind in enumerate(kinds)]
  found = by_name(table("llmbar", items, [([kind[2]], [0.5]) for kind in kinds]))
  assert found["Adversarial"].accuracy.value == pytest.approx((1 + 0 + 1) / 3)
  assert found["overall"].accuracy.value == pytest.approx((1 + 4 * 2 / 3) / 5)
  assert found["overall"].n == 7 and found["MT-Bench"].accuracy.value == 0.0
  only = table("llmbar", items[-1:], [([0], [1])])
  assert [(row.level, row.name) for row in only] == [("section", "MT-Bench")]


def test_rewardbench_2_shares_ties_at_the_top_and_averages_sections():
  items = [item("Math", "Math", i, wrong=3) for i in range(3)] + [
    item("Focus", "Focus", 9, wrong=3)
  ]
  rewards = [([3], [1, 2, 2]), ([3], [3, 3, 1]), ([1], [2, 2, 2]), ([4], [1, 2, 3])]
  found = by_name(table("rewardbench2", items, rewards))
  assert found["Math"].accuracy.value == pytest.approx((1 + 1 / 3 + 0) / 3)
  assert found["overall"].accuracy.value == pytest.approx((4 / 9 + 1) / 2)


def test_ties_of_rewardbench_2_by_hand():
  """Two numbers: one perfect, one where the right answers lie further apart than they are above."""
  items = [
    item("Ties", "Ties", "a", right=1, wrong=2, name="ref:1"),
    item("Ties", "Ties", "b", right=3, wrong=2, name="tied:1"),
    item("Ties", "Ties", "c", right=1, wrong=1, name="ref:2"),
    item("Ties", "Ties", "d", right=2, wrong=1, name="tied:2"),
  ]
  rewards = [([5], [1, 3]), ([4, 5, 4.5], [1, 2]), ([1], [2]), ([6, 4], [3])]
  # 1: spread 1, gap 2, single gap 2. 2: spread 2, gap 1, single gap -1, so its reference is wrong.
  margins = np.tanh([2 / 1 - 1, -1 / 2 - 1])
  expected = 0.3 * 1 + 0.3 * 0.5 + 0.2 * 0.5 + 0.2 * 0.5 + 0.01 * margins.mean()
  found = by_name(table("rewardbench2", items, rewards))
  assert found["Ties"].accuracy.value == pytest.approx(expected, abs=1e-12)
  assert found["Ties"].accuracy.low <= expected <= found["Ties"].accuracy.high
  assert found["overall"].accuracy.value == pytest.approx(expected)
  # Right answers that are all alike: the spread is 0 and the margin term is 1.
  even = [([5], [1, 3]), ([4, 4, 4], [1, 2]), ([3], [2]), ([4, 4], [3])]
  assert by_name(table("rewardbench2", items, even))["Ties"].accuracy.value == pytest.approx(1.01)
  # One half of a number alone has no margins.
  alone = by_name(table("rewardbench2", items[:1], rewards[:1]))
  assert alone["Ties"].accuracy.value == pytest.approx(0.3)


def test_comparisons_are_split_by_which_answer_is_longer():
  items = [item("Helpfulness, best of n", "A", 0, wrong=3), item("Helpfulness, pairs", "A", 1)]
  rewards = [([2], [1, 3, 0]), ([1], [0])]
  lengths = [([10], [5, 8, 20]), ([7], [7])]
  found = by_name(table("rmb", items, rewards, lengths))["overall"]
  assert (found.right_longer.value, found.right_longer.n) == (0.5, 2)  # won 1, lost 3
  assert (found.right_shorter.value, found.right_shorter.n) == (1.0, 1)
  assert found.right_length == (3 * 10 + 7) / 4 and found.wrong_length == (5 + 8 + 20 + 7) / 4
  assert found.longer.value == 0.0  # one loser is longer; equal lengths are a tie, which is lost


def test_a_scorer_of_length_is_the_baseline_and_shuffled_labels_are_chance():
  rng = np.random.default_rng(1)
  lengths = rng.integers(1, 10_000, size=(2000, 2))
  items = [item("Natural", "Natural", i) for i in range(2000)]
  ordered = np.sort(lengths, axis=1)[:, ::-1]  # the right answer is always the longer
  found = by_name(table("llmbar", items, _pairs(ordered)))["overall"]
  assert found.accuracy == found.longer and found.accuracy.value > 0.99
  assert found.over_longer.value == 0.0 == found.over_longer.half_width
  shuffled = np.where(rng.random((2000, 1)) < 0.5, ordered, ordered[:, ::-1])
  chance = by_name(table("llmbar", items, _pairs(shuffled)))["overall"].accuracy
  assert abs(chance.value - 0.5) < 0.04 and chance.low < 0.5 < chance.high


def test_repeated_prompts_widen_the_interval_and_a_perfect_score_keeps_one():
  values, alone = np.tile([1.0, 0.0], 50).repeat(4), [str(i) for i in range(400)]
  wilson = statistics.proportion(values)
  assert reward_benchmarks.rate(values, alone) == wilson
  four = [str(i // 4) for i in range(400)]  # every prompt four times, its answers alike
  found = reward_benchmarks.rate(values, four)
  few = statistics.proportion(np.tile([1.0, 0.0], 50))
  assert found.value == wilson.value and found.n == 400
  assert (found.low, found.high) == pytest.approx((few.low, few.high), abs=2e-3)
  perfect = reward_benchmarks.rate(np.ones(400), four)
  assert (perfect.low, perfect.high) == statistics.wilson_interval(100, 100)


def test_intervals_of_weighted_means_cover_as_often_as_they_say():
  """Few examples near 1, where p ± 1.96 SE would often have no width at all."""
  rng = np.random.default_rng(2)
  weights, rates, sizes = np.array([1.0, 3.0, 2.0]), np.array([0.95, 0.8, 0.98]), (15, 20, 12)
  truth, covered, plain = np.average(rates, weights=weights), 0, 0
  for _ in range(1500):
    parts = [statistics.proportion(rng.random(n) < p) for n, p in zip(sizes, rates)]
    found = reward_benchmarks.combine(list(zip(weights, parts)))
    covered += found.low <= truth <= found.high
    plain += abs(found.value - truth) <= 1.96 * found.stderr
  assert 0.93 < covered / 1500 < 0.99 and covered > plain


def test_a_combination_is_the_weighted_mean_and_its_error():
  parts = [(1.0, Estimate(0.5, 0.1, 0.3, 0.7, 10)), (3.0, Estimate(0.9, 0.02, 0.8, 0.95, 40))]
  found = reward_benchmarks.combine(parts)
  assert found.value == pytest.approx(0.8) and found.n == 50
  assert found.stderr == pytest.approx(math.hypot(0.1, 0.06) / 4)
  assert found.low == pytest.approx(0.8 - math.hypot(0.2, 0.3) / 4)
  assert found.high == pytest.approx(0.8 + math.hypot(0.2, 0.15) / 4)


def test_items_are_drawn_by_their_prompts_hash_in_any_order():
  items = [item("Natural", "Natural", i // 2, name=str(i)) for i in range(60)]
  few = reward_benchmarks.draw(items, 10)
  assert len(few) == 10 and [int(i.id) for i in few] == sorted(int(i.id) for i in few)
  prompts = {i.unit for i in few}
  assert len(prompts) == 5  # both of every one
  assert prompts == {i.unit for i in reward_benchmarks.draw(items[::-1], 10)}
  assert prompts < {i.unit for i in reward_benchmarks.draw(items, 20)}  # more are those and others
  assert reward_benchmarks.draw(items, None) == reward_benchmarks.draw(items, 99) == items
  # Both prompts of a number among the ties are drawn together.
  ties = [
    item("Ties", "Ties", f"{k}{i}", name=f"{k}:{i}") for i in range(30) for k in ("ref", "tied")
  ]
  drawn = reward_benchmarks.draw(ties, 12)
  assert len({i.unit for i in drawn}) == 6


def _report(scorer="rm"):
  items = [item("Adversarial", "GPTOut", i) for i in range(4)] + [item("Natural", "Natural", 9)]
  rewards = [([1], [0]), ([0], [1]), ([1], [0]), ([1], [0]), ([0], [1])]
  lengths = [([5], [4]), ([5], [9]), ([5], [9]), ([5], [9]), ([3], [4])]
  one = reward_benchmarks.BenchmarkResult(
    files={"a.jsonl": "f" * 64, "hf:b": None},
    items=9, used=5, duplicates=1, texts=10, truncated=2, missing=("Somewhere",),
    rows=table("llmbar", items, rewards, lengths),
  )  # fmt: skip
  styles = [item("chat", "chat", i, right=3, wrong=3) for i in range(2)]
  numbers = [([1, 3, 5], [2, 4, 4]), ([3, 3, 3], [1, 3, 5])]
  matrix = reward_benchmarks.matrix([(np.array(c), np.array(r)) for c, r in numbers])
  two = reward_benchmarks.BenchmarkResult(
    files={"c.jsonl": "e" * 64}, items=2, used=2, duplicates=0, texts=12, truncated=0, missing=(),
    rows=table("rm_bench", styles, numbers), matrix=matrix, longer_matrix=matrix,
  )  # fmt: skip
  return reward_benchmarks.RewardBenchmarks(
    scorer=scorer, source="runs/<rm>", length=512, limit=5, unit="tokens", chat_template="d" * 64,
    benchmarks={"llmbar": one, "rm_bench": two},
  )  # fmt: skip


def test_results_read_back_and_the_page_says_what_they_are(tmp_path):
  report = _report()
  page = reward_benchmarks_page.write(tmp_path, report)
  again = config_lib.build(
    reward_benchmarks.RewardBenchmarks,
    results.read_json(tmp_path / "reward_benchmarks.json"),
    finite=False,
  )
  assert results.to_json(again) == results.to_json(report)
  html = page.read_text()
  for text in (
    "runs/&lt;rm&gt;", "5 of 9 items, drawn by the hash of their prompt (limit 5)", "f" * 64,
    "2 of 10 texts were cut to 512 tokens", "No item of Somewhere", "1 of them repeat another one",
    "chat template: " + "d" * 64, "a tie counts half", "RM-Bench by style", "data:image/png;base64,",
  ):  # fmt: skip
    assert text in html, text
  assert (tmp_path / "reward_benchmarks.png").read_bytes()[:4] == b"\x89PNG"
  # 3 of 4 adversarial and 0 of 1 natural, four to one.
  assert "60.0 %" in html
  text = reward_benchmarks_page.as_text(report)
  assert "LLMBar           overall                           5" in text
  json.loads((tmp_path / "reward_benchmarks.json").read_text(), parse_constant=pytest.fail)


def test_the_summary_claims_no_difference_that_the_interval_does_not_show():
  told = " ".join(reward_benchmarks_page.sentences(_report()))
  assert "LLMBar: 60.0 %" in told and "(the two cannot be told apart)" in told
  assert "longer answer gives" not in " ".join(
    reward_benchmarks_page.sentences(_report(scorer="longer"))
  )


def test_nothing_to_count_is_refused():
  with pytest.raises(ValueError, match="at least one item"):
    table("llmbar", [], [])


def _pairs(values):
  return [([a], [b]) for a, b in values]
