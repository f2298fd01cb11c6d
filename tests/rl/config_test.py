"""Tests of the settings of online learning: what does not go together is refused by name."""

import dataclasses

import pytest

from align_jax import rl
from align_jax.errors import InputError
from tests.rl.conftest import PPO, grouped

CRITIC_FREE = grouped("rloo")


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"estimator": "a2c"}, "estimator must be one of gae, reinforce"),
    ({"loss": "trpo"}, "loss must be one of ppo"),
    ({"average": "mean"}, "average must be one of token"),
    ({"epochs": 0}, "epochs must be at least 1"),
    ({"entropy_coef": -0.1}, "must not be negative"),
    ({"value": rl.ValueConfig()}, "value is to be given exactly when estimator is gae"),
    ({"gamma": 1.0}, "gamma is to be given exactly for gae, reinforce_pp"),
    ({"whiten_rewards": True}, "whiten_rewards is not used by the estimator rloo"),
    ({"estimator": "reinforce", "extra_draws": 1}, "extra_draws needs groups"),
    ({"clip_eps": None}, "clip_eps is to be given"),
    ({"loss": "reinforce", "epochs": 1, "minibatches": 1}, "clip_eps is to be given"),
    ({"loss": "reinforce", "clip_eps": None}, "one epoch, one minibatch"),
    ({"loss": "cispo"}, "cispo needs clip_eps_high"),
    ({"loss": "gspo", "average": "sequence", "dual_clip": 3.0}, "dual_clip is not used by"),
    ({"loss": "gspo"}, "set average to sequence"),
    (
      {"estimator": "reinforce_pp", "gamma": 1.0, "loss": "gspo", "average": "sequence"},
      "which reinforce_pp does not give",
    ),
    (
      {"estimator": "reinforce_pp_baseline", "whiten_advantages": True},
      "leave whiten_advantages false",
    ),
  ],
)
def test_settings_that_would_not_be_used_are_refused(settings, message):
  with pytest.raises(InputError, match=message):
    dataclasses.replace(CRITIC_FREE, **settings)


def test_gae_needs_its_critic_and_discount():
  for missing in ("value", "gamma"):
    with pytest.raises(InputError, match=f"{missing} is to be given"):
      dataclasses.replace(PPO, **{missing: None})


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: rl.SamplingConfig(0), "max_new_tokens must be at least 1"),
    (lambda: rl.SamplingConfig(4, temperature=0.0), "temperature must be positive"),
    (lambda: rl.SamplingConfig(4, samples_per_prompt=0), "samples_per_prompt must be at least 1"),
    (lambda: rl.SamplingConfig(4, slots=0), "slots must be at least 1"),
    (lambda: rl.KlConfig(-0.1), "kl.coef must not be negative"),
    (lambda: rl.KlConfig(0.0, target=6.0, horizon=1e4), "stays 0 for ever"),
    (lambda: rl.KlConfig(0.1, target=6.0), "go together"),
    (lambda: rl.KlConfig(0.1, place="loss"), "kl.kind is to be given exactly when"),
    (lambda: rl.KlConfig(0.1, kind="k3"), "kl.kind is to be given exactly when"),
    (lambda: rl.KlConfig(0.1, place="loss", kind="k4"), "k1, k2 or k3"),
    (lambda: rl.KlConfig(0.1, place="advantage"), "reward or loss"),
    (lambda: rl.ValueConfig(coef=0.0), "value.coef must be positive"),
    (lambda: rl.ImportanceConfig("clipped", 2.0), "truncated or masked"),
    (lambda: rl.ImportanceConfig("masked", 2.0), "importance.low is to be given"),
    (lambda: rl.ImportanceConfig("truncated", 2.0, 0.5), "importance.low is to be given"),
    (lambda: rl.ImportanceConfig("masked", 0.5, 2.0), "low < high"),
  ],
)
def test_wrong_sections_are_refused(make, message):
  with pytest.raises(InputError, match=message):
    make()
