"""Evaluations survive the trip to disk, and what is wrong on disk is named."""

import dataclasses
import json
import math

import pytest

from align_jax.errors import InputError
from align_jax.evals import results, statistics

ESTIMATE = statistics.mean([1.0, 2.0, 4.0])
UNKNOWN = statistics.mean([1.0])
WIN = statistics.win_rate([1.0, 2.0, 4.0], [0.0, 2.0, 5.0])
POLICY = results.PolicyEvaluation(
  policy="dpo",
  reference="sft",
  scorer="gold",
  n=3,
  seed=0,
  temperature=1.0,
  max_new_tokens=8,
  score=ESTIMATE,
  reference_score=ESTIMATE,
  score_gain=ESTIMATE,
  win_rate=WIN,
  kl=ESTIMATE,
  kl_k3=ESTIMATE,
  length=ESTIMATE,
  reference_length=ESTIMATE,
  finished=statistics.proportion([1, 1, 0]),
  families={"facts": {"score": ESTIMATE}},
)
REWARD = results.RewardEvaluation(
  n=2,
  accuracy=statistics.proportion([1, 0]),
  ceiling=None,
  gold_accuracy=None,
  accuracy_chosen_longer=statistics.proportion([1]),
  length_correlation=None,
  accuracy_chosen_shorter=statistics.proportion([0]),
  longer_wins=statistics.proportion([1, 0]),
  margin=ESTIMATE,
  calibration_error=0.1,
  brier=0.2,
  calibration=statistics.calibration_bins([0.6, 0.9], [1, 0]),
)


@pytest.mark.parametrize("evaluation", [POLICY, REWARD])
def test_what_is_saved_is_what_is_loaded(tmp_path, evaluation):
  results.save(tmp_path, evaluation)
  assert results.load(tmp_path) == evaluation
  assert not list(tmp_path.glob("*.part"))


def test_an_unknown_interval_is_null_on_disk_and_nan_again_in_memory(tmp_path):
  results.save(tmp_path, dataclasses.replace(POLICY, kl=UNKNOWN))
  text = (tmp_path / "evaluation.json").read_text()
  assert "NaN" not in text and json.loads(text)["kl"]["low"] is None
  loaded = results.load(tmp_path).kl
  assert math.isnan(loaded.low) and loaded.value == 1.0


def test_samples_keep_their_text_and_an_unscored_one_its_nan(tmp_path):
  prompt = ({"role": "user", "content": "naïve <b>\n\u2028"},)
  samples = (
    results.Sample(prompt, "yes", 1.5, "facts"),
    results.Sample(prompt, "", math.nan, "lists"),
  )
  results.save(tmp_path, POLICY, samples)
  first, second = results.load_samples(tmp_path)
  assert first == samples[0]
  assert second.prompt == prompt and math.isnan(second.score)


def test_sqrt_kl_never_takes_the_root_of_noise():
  below = statistics.Estimate(-0.1, 0.1, -0.3, 0.09, n=9)
  assert dataclasses.replace(POLICY, kl=below).sqrt_kl == (0.0, 0.0, pytest.approx(0.3))


def test_faults_on_disk_are_named(tmp_path):
  with pytest.raises(InputError, match="evaluation.json cannot be read"):
    results.load(tmp_path)
  file = tmp_path / "evaluation.json"
  file.write_text("{")
  with pytest.raises(InputError, match="evaluation.json is not valid JSON"):
    results.load(tmp_path)
  file.write_text('{"kind": "poem"}')
  with pytest.raises(InputError, match="'kind' must be one of policy, reward, not 'poem'"):
    results.load(tmp_path)
  file.write_text(json.dumps(results.to_json(POLICY) | {"n": "three"}))
  with pytest.raises(InputError, match=r"evaluation\.json\.n must be of type int, not 'three'"):
    results.load(tmp_path)
  (tmp_path / "samples.jsonl").write_text('\n{"prompt": []}\n')
  with pytest.raises(InputError, match=r"samples\.jsonl:2\.response must be set"):
    results.load_samples(tmp_path)
  (tmp_path / "samples.jsonl").write_text('{"prompt"\n')
  with pytest.raises(InputError, match=r"samples\.jsonl:1: invalid JSON"):
    results.load_samples(tmp_path)
