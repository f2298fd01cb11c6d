"""The check of step 0, and what a config or a record may not ask for; runs are in other files."""

import dataclasses
import math
import pathlib
import re

import pytest

from align_jax import config as config_lib
from align_jax import data
from align_jax.errors import InputError
from align_jax.phases import preference
from align_jax.training import preferences
from align_jax.training.preferences import PreferenceConfig
from configs import preference as preference_config

README = pathlib.Path(__file__).resolve().parents[2] / "README.md"


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


def config_of(**changes):
  settings = preference_config.get_config()
  settings.model.init = "runs/sft"
  for dotted, value in changes.items():
    settings.update_from_flattened_dict({dotted.replace("__", "."): value})
  return config_lib.build(preference.PreferenceConfig, settings.to_dict())


@pytest.mark.parametrize(
  "changes, nats",
  [
    ({}, 0.02),
    ({"model__dtype": "bfloat16"}, 1.0),
    ({"reference": "recomputed"}, 1e-3),
    ({"reference": "recomputed", "model__dtype": "bfloat16"}, 1e-3),
    ({"objective__name": "tdpo"}, 1e-3),
  ],
)
def test_only_a_cache_may_round_otherwise(changes, nats):
  """Its batches had other shapes; six times ln 2, or three nats apart, is no rounding."""
  config = config_of(**changes)
  assert preference._rounding(config) == nats
  values = {"loss": math.log(2.0), "rewards/chosen": 0.0, "rewards/rejected": 0.09 * nats}
  preference.check_identity(config.objective, values, nats=nats)
  for wrong in ({"loss": 6 * math.log(2.0)}, {"rewards/chosen": 0.3}):
    with pytest.raises(FloatingPointError, match="at step 0"):
      preference.check_identity(config.objective, values | wrong, nats=nats)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"layout": "packed"}, "config.layout must be one of shared, padded, not 'packed'"),
    ({"records": "thumbs"}, "config.records must be one of pairs, feedback, not 'thumbs'"),
    ({"reference": "disk"}, "config.reference must be one of auto, cached, recomputed, not 'disk'"),
    ({"records": "feedback"}, "dpo learns from pairs; config.records='feedback' is for kto"),
    ({"objective__name": "aot", "accumulate": 2}, "aot sorts .* config.accumulate must be 1"),
    ({"objective__name": "dpo + aot", "accumulate": 2}, "config.accumulate must be 1"),
    ({"objective__name": "kto", "data__batch_size": 1}, "data.batch_size must be over 1"),
    ({"objective__name": "kto", "data__buckets": (32,)}, "data.buckets is not used by .*'kto'"),
    *(
      ({"objective__name": name, "reference": "cached", **more}, f"'cached' is not possible: {why}")
      for name, more, why in (
        ("tdpo", {}, "tdpo reads the reference's whole distributions"),
        ("dpo + tdpo", {}, "dpo . tdpo reads the reference's whole distributions"),
        ("kto", {}, "kto draws mismatched answers anew"),
        ("dpo", {"objective__sync_every": 2}, "objective.sync_every moves the reference"),
      )
    ),
    *(
      ({"objective__name": "simpo", "reference": how}, "config.reference is not used by simpo")
      for how in ("cached", "recomputed")
    ),
    *(
      ({"reference_cache": "cache", **more}, f"config.reference_cache is not used: {why}")
      for more, why in (
        ({"reference": "recomputed"}, "it is recomputed"),
        ({"objective__name": "simpo"}, "simpo has no reference"),
        ({"objective__name": "tdpo"}, "tdpo reads"),
        ({"objective__name": "bco_unpaired"}, "bco_unpaired draws"),
        ({"objective__sync_every": 5}, "objective.sync_every moves"),
      )
    ),
    (
      {"objective__sync_every": 5, "objective__sync_alpha": 0.6, "model__lora__rank": 2},
      "objective.sync_alpha must be 1 with LoRA",
    ),
  ],
)
def test_a_config_that_asks_for_what_cannot_be_is_one_sentence(changes, message):
  with pytest.raises(InputError, match=message) as failure:
    config_of(**changes)
  assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
  "changes, caches",
  [
    ({}, True),
    ({"reference": "cached", "reference_cache": "cache"}, True),
    ({"objective__name": "bco + sft"}, True),
    ({"reference": "recomputed"}, False),
    ({"objective__name": "tdpo"}, False),
    ({"objective__name": "simpo"}, False),
    ({"objective__name": "kto", "records": "feedback"}, False),
    ({"objective__sync_every": 3, "objective__sync_alpha": 0.6}, False),
    ({"objective__sync_every": 3, "model__lora__rank": 2}, False),
  ],
)
def test_log_probs_are_cached_where_they_can_be(changes, caches):
  assert config_of(**changes).caches == caches


def test_the_readme_lists_every_objective_and_no_other():
  section = (
    README.read_text().split("## Preference objectives")[1].split("Objectives on pairs mix")[0]
  )
  listed = re.findall(r"`(\w+)`", section)
  assert sorted(listed) == sorted(preferences.MEMBERS)


def test_every_objective_has_a_place_for_its_settings_in_the_config():
  fields = set(preferences.PreferenceConfig.__dataclass_fields__)
  for name in preferences.MEMBERS:
    settings = preference_config.objective(name).to_dict()
    assert set(settings) == fields
    config_of(objective__name=name)


@pytest.mark.parametrize(
  "objective, field, message",
  [
    ("dpo", {"margin": 0.5}, "a:1: field 'margin' is not used by dpo, only by reward models"),
    ("aot", {"weight": 2.0}, "a:1: aot sorts whole batches"),
    ("dpo + aot", {"label_prob": 0.5}, "a:1: dpo . aot sorts whole batches"),
  ],
)
def test_a_record_that_asks_for_what_has_no_place_is_refused(objective, field, message):
  record = data.Preference(({"role": "user", "content": "a"},), "b", "c", source="a:1")
  config = PreferenceConfig(objective)
  preference.check_records([record], config)
  with pytest.raises(InputError, match=message):
    preference.check_records([record, dataclasses.replace(record, **field)], config)
