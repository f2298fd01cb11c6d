"""Benchmarks from files to tables: what is scored, what is written, and "longer wins" on the real files."""

import json

import jax
import numpy as np
import pytest

from align_jax import config as config_lib
from align_jax.errors import InputError
from align_jax.evals import results
from align_jax.evals.reward_benchmarks import RewardBenchmarks
from align_jax.phases import reward_benchmark, scorers
from align_jax.phases.reward_benchmark import RewardBenchmarkConfig
from configs import reward_benchmark as reward_benchmark_config


def _rows(path):
  return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write(file, rows):
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(file)


def _run(tmp_path, model="longer", limit=None, **files):
  settings = reward_benchmark_config.get_config()
  settings.model, settings.limit = model, limit
  settings.benchmarks.update(files)
  config = config_lib.build(RewardBenchmarkConfig, settings.to_dict())
  return reward_benchmark.run(config, str(tmp_path / "run"), jax.devices()[:1])


def _llmbar(prompt, first, second, label, subset="LLMBar/Natural"):
  return dict(input=prompt, output_1=first, output_2=second, label=label, subset=subset, i=0)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({}, "config.benchmarks: give the files of one or more of rewardbench"),
    ({"benchmarks": {"mmlu": "a.jsonl"}}, "config.benchmarks.mmlu is no known benchmark"),
    ({"benchmarks": {"rmb": "a"}, "limit": 0}, "config.limit must be positive"),
    ({"benchmarks": {"rmb": "a"}, "limits": 3}, "config.limits is not a setting"),
  ],
)
def test_settings_are_refused_before_anything_is_read(changes, message):
  values = {"model": "longer", "benchmarks": {"rmb": None}} | changes
  with pytest.raises(InputError, match=message):
    config_lib.build(RewardBenchmarkConfig, values)


def test_files_are_read_before_a_model_is_loaded(tmp_path, monkeypatch):
  monkeypatch.setattr(scorers, "open_scorer", lambda *_, **__: pytest.fail("loaded too early"))
  rows = [_llmbar("a", "b", "c", 1), _llmbar("a", "b", "c", 3)]
  with pytest.raises(InputError, match="a.jsonl:2: field 'label' must be one of 1, 2, not 3"):
    _run(tmp_path, llmbar=_write(tmp_path / "a.jsonl", rows))


def test_every_answer_gets_its_own_score(tmp_path, monkeypatch, capsys):
  """A scorer that knows the right answers: whatever it is asked in whatever order, it is right."""
  styles = [[f"{q} {kind}{s}" for s in range(3)] for q in "xy" for kind in ("good", "bad")]
  files = {
    "rm_bench": [
      dict(id=i, prompt=f"q{i}", chosen=styles[2 * i], rejected=styles[2 * i + 1], file="code_filtered")
      for i in range(2)
    ],
    "llmbar": [_llmbar(f"p{i}", "good", "bad", 1) for i in range(4)]
    + [_llmbar("p5", "bad", "good", 2), _llmbar("p6", "good", "bad", 2)],
  }  # fmt: skip
  paths = {name: _write(tmp_path / f"{name}.jsonl", rows) for name, rows in files.items()}
  asked = []

  class Scorer:
    name, tokenizer = "knows", None

    def __call__(self, prompts, responses, sources):
      asked.append((list(prompts), list(responses), list(sources)))
      good = np.array(["good" in response for response in responses], float)
      lengths = np.array([len(response) for response in responses])
      return scorers.Scores(good, lengths, np.arange(len(good)) == 0)

  monkeypatch.setattr(scorers, "open_scorer", lambda *_, **__: Scorer())
  found = _run(tmp_path, **paths)
  assert found.benchmarks["llmbar"].overall.accuracy.value == pytest.approx(5 / 6)
  assert found.benchmarks["rm_bench"].matrix == ((1.0,) * 3,) * 3
  assert len(asked) == 2 and len(asked[1][1]) == 12
  assert asked[1][2][:6] == [f"{paths['rm_bench']}:1"] * 6
  assert found.benchmarks["llmbar"].truncated == 1 and found.benchmarks["llmbar"].texts == 12
  assert found.benchmarks["rm_bench"].missing == ("chat", "math", "safety")
  assert "knows" in capsys.readouterr().out
  saved = results.read_json(tmp_path / "run" / "reward_benchmarks.json")
  again = config_lib.build(RewardBenchmarks, saved, finite=False)
  assert results.to_json(again) == results.to_json(found)


def test_a_limit_and_duplicates_are_told(tmp_path):
  rows = [_llmbar(f"p{i}", "longer answer", "short", 1) for i in range(20)]
  rows += [rows[0]] * 3
  path = _write(tmp_path / "a.jsonl", rows)
  whole = _run(tmp_path, llmbar=path).benchmarks["llmbar"]
  assert (whole.items, whole.used, whole.duplicates) == (23, 23, 3)
  few = _run(tmp_path, limit=7, llmbar=path).benchmarks["llmbar"]
  assert (few.items, few.used, few.overall.n) == (23, 7, 7)
  page = (tmp_path / "run" / "reward_benchmarks.html").read_text()
  assert "7 of 23 items, drawn by the hash of their prompt (limit 7)" in page


def test_longer_on_llmbar_is_as_bad_as_its_makers_meant(tmp_path, data_folder):
  """On the adversarial sets the wrong answer was chosen to look better, and mostly is the longer."""
  file = data_folder / "llmbar" / "dev.jsonl"
  found = _run(tmp_path, llmbar=str(file)).benchmarks["llmbar"]
  rows = _rows(file)

  def longer(part):
    signs = [
      (1.5 - row["label"]) * np.sign(len(row["output_1"]) - len(row["output_2"]))
      for row in rows
      if row["subset"] == part
    ]
    return float(np.mean(np.add(signs, 0.5)))

  parts = [longer(f"LLMBar/Adversarial/{s}") for s in ("GPTInst", "GPTOut", "Manual", "Neighbor")]
  shares = {row.name: row for row in found.rows}
  assert shares["Natural"].accuracy.value == pytest.approx(longer("LLMBar/Natural"))
  assert shares["Adversarial"].accuracy.value == pytest.approx(np.mean(parts))
  assert 0.15 < np.mean(parts) < 0.25
  assert shares["overall"].accuracy.value == pytest.approx(
    np.mean([*parts, longer("LLMBar/Natural")])
  )
  assert shares["MT-Bench"].accuracy.low > 0.6  # real preferences like length
  assert shares["overall"].accuracy == shares["overall"].longer


def test_longer_wins_what_is_easy_and_loses_what_is_hard(tmp_path, data_folder):
  """Detailed answers are longer than concise ones, so RM-Bench's triangles are all but decided."""
  file = data_folder / "rm_bench" / "dev.jsonl"
  found = _run(tmp_path, rm_bench=str(file)).benchmarks["rm_bench"]
  rows = _rows(file)
  wins = np.array(
    [[[len(a) > len(b) for b in row["rejected"]] for a in row["chosen"]] for row in rows]
  )
  np.testing.assert_allclose(found.matrix, wins.mean(axis=0))
  chat = wins[[row["file"] == "chat_filtered" for row in rows]].mean(axis=0)
  shares = {row.name: row.accuracy for row in found.rows if row.level != "subset"}
  assert shares["chat, hard"].value == pytest.approx(np.sum(np.triu(chat, 1)) / 3)
  assert shares["chat, normal"].value == pytest.approx(np.trace(chat) / 3)
  assert shares["chat, easy"].value == pytest.approx(np.sum(np.tril(chat, -1)) / 3)
  assert shares["chat, hard"].value < 0.05 and shares["chat, easy"].value > 0.75
  assert shares["overall, hard"].high < shares["overall, normal"].low
  assert shares["overall, normal"].high < shares["overall, easy"].low


def test_shuffled_labels_of_a_real_file_are_chance(tmp_path, data_folder):
  """The control: with labels by the toss of a coin, nothing is left of a preference for length."""
  rows = _rows(data_folder / "llmbar" / "dev.jsonl")
  coin = np.random.default_rng(0).integers(1, 3, size=len(rows))
  tossed = [row | {"label": int(side), "subset": "LLMBar/Natural"} for row, side in zip(rows, coin)]
  found = _run(tmp_path, llmbar=_write(tmp_path / "a.jsonl", tossed)).benchmarks["llmbar"]
  assert found.used == 691 and abs(found.overall.accuracy.value - 0.5) < 0.06
  assert found.overall.accuracy.low < 0.5 < found.overall.accuracy.high


def test_every_real_file_is_read_whole(tmp_path, data_folder):
  paths = {
    "rmb": f"{data_folder}/rmb/dev.jsonl,{data_folder}/rmb/bon_dev.jsonl",
    "judgebench": f"{data_folder}/judgebench/dev.jsonl",
  }
  found = _run(tmp_path, **paths).benchmarks
  assert {name: result.items for name, result in found.items()} == {"rmb": 619, "judgebench": 466}
  assert found["rmb"].missing == found["judgebench"].missing == ()
  judged = [
    (len(row["response_A"]) > len(row["response_B"])) == (row["label"] == "A>B")
    for row in _rows(data_folder / "judgebench" / "dev.jsonl")
    if len(row["response_A"]) != len(row["response_B"])
  ]
  ties = 466 - len(judged)
  assert found["judgebench"].overall.accuracy.value == pytest.approx((sum(judged) + ties / 2) / 466)
  best = [
    all(len(row["best"]["answer"]) > len(loser["answer"]) for loser in row["losers"])
    for row in _rows(data_folder / "rmb" / "bon_dev.jsonl")
    if row["category"].startswith("Helpfulness")
  ]
  shares = {row.name: row for row in found["rmb"].rows if row.level == "section"}
  assert shares["Helpfulness, best of n"].accuracy.value == pytest.approx(np.mean(best))
