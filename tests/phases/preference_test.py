"""The check of step 0; runs of the whole phase are in pipeline_test."""

import math

import pytest

from align_jax.phases import preference
from align_jax.training.preferences import PreferenceConfig


@pytest.mark.parametrize(
  "objective, loss",
  [
    (PreferenceConfig("dpo"), math.log(2.0)),
    (PreferenceConfig("dpo", beta=0.5, label_smoothing=0.2), math.log(2.0)),
    (PreferenceConfig("ipo", tau=0.5), 1.0),
    (PreferenceConfig("kto"), 0.5),
    (PreferenceConfig("kto", desirable_weight=2.0, undesirable_weight=2.0), 1.0),
  ],
)
def test_a_run_that_does_not_start_at_its_reference_is_stopped(objective, loss):
  """peers 3.11, 3.12: at run time too; six times ln 2 is what broken segments once gave."""
  values = {"loss": loss, "rewards/chosen": 0.0, "rewards/rejected": 0.0}
  preference.check_identity(objective, values)
  for wrong in ({"loss": 6 * loss}, {"loss": 0.9 * loss}, {"rewards/rejected": -0.1}):
    with pytest.raises(FloatingPointError, match="at step 0 policy and reference must agree"):
      preference.check_identity(objective, values | wrong)
