"""Detectors of losses that leap and of losses that never move, against made-up curves."""

import math

import numpy as np
import pytest

from align_jax.errors import InputError
from align_jax.training import guards, loop

LN2 = math.log(2)


def seen(watch, losses):
  """[(step, what was said)]."""
  said = [(step, watch(step, {"loss": float(loss)})) for step, loss in enumerate(losses)]
  return [(step, text) for step, text in said if text]


def curve(n, *, seed=0, noise=0.05):
  """A loss that falls from 3 to 1."""
  return (
    1 + 2 * np.exp(-np.arange(n) / (n / 4)) + noise * np.random.default_rng(seed).normal(size=n)
  )


@pytest.mark.parametrize("seed", range(10))
def test_one_leap_is_found_at_its_step_and_nowhere_else(seed):
  losses = curve(300, seed=seed)
  assert not seen(guards.spikes(), losses)
  losses[200] += 3.0
  [(step, text)] = seen(guards.spikes(), losses)
  assert step == 200 and "leapt to" in text


def test_a_second_leap_is_not_hidden_by_the_first():
  losses = curve(300)
  losses[[150, 160, 170]] += 3.0
  assert [step for step, _ in seen(guards.spikes(), losses)] == [150, 160, 170]


def test_a_loss_that_stays_up_is_told_once():
  losses = curve(300)
  losses[200:] += 3.0
  assert [step for step, _ in seen(guards.spikes(), losses)] == [200]


def test_scale_and_offset_do_not_matter():
  losses = curve(300)
  losses[200] += 3.0
  for scale, offset in ((1e-3, 0.0), (1e3, 0.0), (1.0, -2.0)):
    assert [s for s, _ in seen(guards.spikes(), scale * losses + offset)] == [200]


def test_a_loss_that_stands_still_has_no_leaps():
  assert not seen(guards.spikes(), np.full(300, LN2))
  assert not seen(guards.spikes(), LN2 + 1e-7 * np.random.default_rng(0).normal(size=300))


def test_few_losses_say_nothing():
  assert not seen(guards.spikes(), [1.0] * 15 + [100.0])


@pytest.mark.parametrize("steps, first", [(100, 49), (1000, 199)])
def test_stuck_is_told_once_after_warm_up(steps, first):
  losses = LN2 + 3e-4 * np.random.default_rng(0).normal(size=steps).clip(-3, 3)
  [(step, text)] = seen(guards.stuck(LN2, steps), losses)
  assert step == first and "has not left ln 2" in text and "nothing is learned" in text


def test_a_loss_that_moves_is_not_stuck():
  """Not even one that is at ln 2 on average, as with labels by coin: batches differ."""
  rng = np.random.default_rng(0)
  assert not seen(guards.stuck(LN2, 300), LN2 + 0.01 * rng.normal(size=300))
  assert not seen(guards.stuck(LN2, 300), LN2 - 1e-4 * np.arange(300))
  almost = np.full(49, LN2)
  assert not seen(guards.stuck(LN2, 100), np.concatenate([almost, [0.68], almost]))


def test_another_start_is_named():
  [(_, text)] = seen(guards.stuck(25.0, 100), np.full(100, 25.01))
  assert "has not left 25," in text
  assert not seen(guards.stuck(25.0, 100), np.full(100, 25.1))


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"spike": "stopp"}, "loop.spike must be one of warn, stop, off, not 'stopp'"),
    ({"stuck": ""}, "loop.stuck must be one of"),
    ({"keep_every": 3}, "keep_every must be a multiple of loop.checkpoint_every"),
    ({"keep_every": 3, "checkpoint_every": 2}, "keep_every must be a multiple"),
    ({"keep_every": -2}, "not negative"),
  ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
  with pytest.raises(InputError, match=message):
    loop.LoopConfig(steps=9, **changes)
