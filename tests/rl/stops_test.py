"""Stops: each limit by its side, its patience and its sentence, and nothing that is set is ignored."""

import math
import re

import pytest

from align_jax.errors import InputError
from align_jax.rl import stops
from align_jax.rl.stops import StopConfig, make_stop

# setting: (metric, a value that is fine, the limit, a value beyond it)
CASES = {
  "kl_max": ("kl/ref", 39.9, 40.0, 41.2),
  "distinct_min": ("distinct/responses", 0.51, 0.5, 0.49),
  "bigrams_min": ("distinct/bigrams", 0.2, 0.1, 0.01),
  "repetition_max": ("repetition/4grams", 0.0, 0.3, 0.31),
  "length_min": ("response_length", 5.0, 4.0, 3.5),
  "length_max": ("response_length", 5.0, 24.0, 24.5),
  "entropy_min": ("entropy", 1.0, 0.1, 0.05),
  "eos_rate_min": ("eos_rate", 1.0, 0.5, 0.4),
  "ratio_max": ("ppo/ratio_max", 1.0, 10.0, 11.0),
  "mismatch_max": ("ppo/sampler_mismatch", 0.0, 0.01, 0.02),
}


def steps_of(stop, metric, values):
  """{step: reason} of the steps at which there is one."""
  told = {i: stop(i, {metric: v, "loss": 0.0}) for i, v in enumerate(values)}
  return {i: reason for i, reason in told.items() if reason}


def test_every_limit_is_tried_here():
  assert set(CASES) == set(stops.BOUNDS)


@pytest.mark.parametrize("name", CASES)
def test_a_limit_is_passed_on_its_own_side_and_not_reached_by_equality(name):
  metric, fine, limit, beyond = CASES[name]
  stop = make_stop(StopConfig(**{name: limit}))
  reasons = steps_of(stop, metric, [fine, limit, beyond, math.nan, fine])
  assert set(reasons) == {2, 3}
  assert reasons[2].startswith(f"{metric} was {beyond:g}")
  side = "above" if beyond > limit else "below"
  assert f"at step 2, {side} stops.{name} = {limit:g}" in reasons[2]


def test_the_sentence_has_number_unit_step_and_bound():
  stop = make_stop(StopConfig(kl_max=40))
  assert stop(17, {"kl/ref": 41.23}) == (
    "kl/ref was 41.23 nats at step 17, above stops.kl_max = 40"
  )


def test_patience_counts_steps_in_a_row_and_each_limit_for_itself():
  stop = make_stop(StopConfig(kl_max=10, entropy_min=0.1, patience=3))
  kl = [11, 11, 1, 11, 11, 11]  # twice, then three times
  entropy = [1, 0.0, 0.0, 1, 1, 1]  # steps 0 to 2 are beyond one limit or the other
  told = [stop(i, {"kl/ref": k, "entropy": e}) for i, (k, e) in enumerate(zip(kl, entropy))]
  assert told[:5] == [None] * 5
  assert told[5].endswith("above stops.kl_max = 10, the 3rd step in a row")


def test_several_limits_passed_at_once_are_all_named():
  told = make_stop(StopConfig(kl_max=10, eos_rate_min=0.5))(3, {"kl/ref": 20.0, "eos_rate": 0.0})
  assert "stops.kl_max" in told and "stops.eos_rate_min" in told


def test_a_drop_is_measured_from_the_best_step_so_far():
  """The best is 2 at step 2: 1.0 is no more than 1 below it, 0.9 is; -5 at the start was no drop."""
  stop = make_stop(StopConfig(score_drop=1.0))
  reasons = steps_of(stop, "score", [-5.0, 1.0, 2.0, 2.0, 1.0, 0.9])
  assert set(reasons) == {5}
  assert "below its best, 2 at step 2" in reasons[5]


def test_a_steady_fall_is_a_drop_and_a_steady_rise_is_none():
  """A comparison with the previous step would see neither."""
  stop = make_stop(StopConfig(score_drop=1.0))
  assert min(steps_of(stop, "score", [3 - 0.3 * i for i in range(10)])) == 4
  assert not steps_of(make_stop(StopConfig(score_drop=1.0)), "score", range(10))


def test_the_first_steps_are_not_looked_at():
  stop = make_stop(StopConfig(eos_rate_min=0.5, first_step=3))
  assert set(steps_of(stop, "eos_rate", [0.0, 0.0, 0.0, 1.0, 0.0])) == {4}


def test_shown_the_same_history_a_new_stop_says_the_same():
  """What a resumed run does: the memory is a function of the lines in metrics.jsonl."""
  config = StopConfig(kl_max=10, score_drop=1.0, patience=4)
  values = [{"kl/ref": 8.0 + i % 5, "score": math.sin(i)} for i in range(12)]
  values += [{"kl/ref": 12.0, "score": 0.0}] * 6
  whole = make_stop(config)
  told = [whole(i, v) for i, v in enumerate(values)]
  assert any(told)
  for cut in (1, 13, 15):
    resumed = make_stop(config)
    again = [resumed(i, v) for i, v in enumerate(values[:cut])]
    again += [resumed(i, v) for i, v in enumerate(values) if i >= cut]
    assert again == told
  forgetful = make_stop(config)  # the control: without the history it says something else
  assert [forgetful(i, v) for i, v in enumerate(values) if i >= 15] != told[15:]


def test_nothing_is_watched_unless_a_limit_is_set():
  assert make_stop(StopConfig()) is None


def test_a_metric_that_is_not_logged_is_an_error_and_not_a_pass():
  with pytest.raises(InputError, match="stops.ratio_max watches ppo/ratio_max"):
    make_stop(StopConfig(ratio_max=10.0))(0, {"kl/ref": 1.0})
  StopConfig(kl_max=10.0).check_logged(["kl/ref", "loss"])
  with pytest.raises(InputError, match="stops.score_drop watches score"):
    StopConfig(score_drop=1.0).check_logged(["kl/ref", "loss"])


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"kl_max": -1.0}, "stops.kl_max must lie between 0 and infinity, not -1"),
    ({"kl_max": math.nan}, "stops.kl_max"),
    ({"distinct_min": 1.5}, "stops.distinct_min must lie between 0 and 1, not 1.5"),
    ({"eos_rate_min": 80.0}, "stops.eos_rate_min"),
    ({"ratio_max": 0.5}, "stops.ratio_max must lie between 1 and infinity"),
    ({"score_drop": 0.0}, "stops.score_drop must be positive"),
    ({"length_min": 9.0, "length_max": 9.0}, "length_min must be less"),
    ({"kl_max": 1.0, "patience": 0}, "stops.patience must be at least 1"),
    ({"kl_max": 1.0, "first_step": -1}, "stops.first_step"),
    ({"patience": 3}, "not used: no limit is set"),
  ],
)
def test_nonsense_is_refused(settings, message):
  with pytest.raises(InputError, match=re.escape(message)):
    StopConfig(**settings)
