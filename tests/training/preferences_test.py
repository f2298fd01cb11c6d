"""Objectives by name: settings that no loss takes, mixtures, and what a run can tell from the name."""

import inspect
import math

import pytest

from align_jax import losses
from align_jax.errors import InputError
from align_jax.training.preferences import MEMBERS, PreferenceConfig

FREE = {"simpo", "alphapo", "orpo", "cpo", "slic", "sft"}
UNPAIRED = {"kto", "apo_zero_unpaired", "bco_unpaired"}


def test_every_loss_on_responses_can_be_named_in_a_config():
  """Those of policies against one another or a reference; not those of reward models or of PPO.

  XPO and Nash-MD learn from their own samples: they are named by `rl.online_preference`.
  """

  def arguments(name):
    return inspect.signature(getattr(losses, name)).parameters

  of_responses = {
    name.removesuffix("_loss")
    for name in losses.__all__
    if name.endswith("_loss") and any(a.startswith("policy_") for a in arguments(name))
  }
  assert set(MEMBERS) == of_responses - {"xpo", "nash_md"} and len(MEMBERS) == 31


@pytest.mark.parametrize("name", MEMBERS)
def test_a_member_has_a_default_for_every_setting_and_no_other(name):
  member = MEMBERS[name]
  kinds = inspect.signature(member.loss).parameters.values()
  assert set(member.defaults) == {p.name for p in kinds if p.kind is p.KEYWORD_ONLY}
  assert set(member.defaults) <= set(PreferenceConfig.__dataclass_fields__)


def test_what_the_names_say():
  assert {n for n in MEMBERS if PreferenceConfig(n).unpaired} == UNPAIRED
  assert {n for n in MEMBERS if PreferenceConfig(n).batchwise} == {"aot", "aot_unpaired"}
  assert {n for n in MEMBERS if not PreferenceConfig(n).needs_reference} == FREE
  assert {n for n in MEMBERS if PreferenceConfig(n).needs_distributions} == {"tdpo"}


@pytest.mark.parametrize("name", MEMBERS)
def test_a_setting_that_is_given_replaces_the_default_and_only_that(name):
  member = MEMBERS[name]
  for setting, default in member.defaults.items():
    value = 0.25 if isinstance(default, float) else default
    if name == "f_dpo" and setting == "alpha":
      continue  # given exactly with divergence="alpha"
    config = PreferenceConfig(name, **{setting: value})
    assert config.settings(member) == member.defaults | {setting: value}


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"name": ""}, "objective.name must be one of dpo, .*, not ''"),
    ({"name": "dpo +"}, "objective.name must be one of .*, not ''"),
    ({"name": "dpo + dop"}, "objective.name must be one of .*, not 'dop'"),
    ({"name": "dpo + dpo*2"}, "names dpo twice"),
    ({"name": "dpo*half"}, "'half' is no weight"),
    ({"name": "dpo*2*3"}, r"'2\*3' is no weight"),
    ({"name": "dpo*0"}, "weights must be positive and finite"),
    ({"name": "dpo*-1"}, "weights must be positive and finite"),
    ({"name": "dpo*nan"}, "weights must be positive and finite"),
    ({"name": "dpo + sft*inf"}, "weights must be positive and finite"),
    ({"name": "kto + sft"}, "'kto . sft': only objectives on pairs can be mixed"),
    ({"name": "dpo*"}, "'' is no weight"),
    ({"name": "dpo", "gamma": 1.0}, "objective.gamma is not used by the objective 'dpo'"),
    ({"name": "dpo + sft", "gamma": 1.0}, "objective.gamma is not used by .* 'dpo . sft'"),
    ({"name": "dpo", "penalty": 5.0}, "objective.penalty is not used by"),
    ({"name": "dpo", "detach_chosen": False}, "objective.detach_chosen is not used by"),
    ({"name": "dpo", "desirable_weight": 1.0}, "objective.desirable_weight is not used by"),
    ({"name": "dpo", "divergence": "js"}, "objective.divergence is not used by"),
    ({"name": "dpo", "beta": 0.0}, "objective: .*beta"),
    ({"name": "dpo + sft", "beta": -1.0}, "objective: .*beta"),
    ({"name": "robust", "label_smoothing": 0.5}, "objective: .*label_smoothing"),
    ({"name": "discopop", "temperature": 2.0}, "objective: .*temperature"),
    ({"name": "f_dpo", "divergence": "kl"}, "objective: .*divergence"),
    ({"name": "f_dpo", "alpha": 0.5}, "objective: .*alpha"),
    ({"name": "ld_dpo", "alpha": 1.5}, "objective: .*alpha"),
    ({"name": "kto", "wpo": True}, "objective.wpo weighs pairs, and 'kto' has none"),
    ({"name": "aot", "wpo": True}, "objective.wpo weighs pairs one by one, which 'aot' mixes"),
    ({"name": "dpo + aot_unpaired", "wpo": True}, "objective.wpo weighs pairs one by one"),
    ({"name": "dpo", "sync_every": -1}, "objective.sync_every must not be negative"),
    ({"name": "dpo", "sync_every": 2, "sync_alpha": 0.0}, r"sync_alpha in \(0, 1\]"),
    ({"name": "dpo", "sync_every": 2, "sync_alpha": 1.5}, r"sync_alpha in \(0, 1\]"),
    ({"name": "dpo", "sync_alpha": 0.6}, "sync_alpha is not used while objective.sync_every is 0"),
    ({"name": "simpo + sft", "sync_every": 2}, "'simpo . sft' has no reference to move"),
  ],
)
def test_a_wrong_setting_is_one_sentence(settings, message):
  """peers 3.16: before anything compiles; what is out of range is said by the loss itself."""
  with pytest.raises(InputError, match=message) as failure:
    PreferenceConfig(**settings)
  assert "\n" not in str(failure.value)


def test_a_mixture_is_read_as_it_is_written():
  config = PreferenceConfig(" dpo + sft * 0.2+ipo*1e1")
  assert [(m.name, w) for m, w in config.members] == [("dpo", 1.0), ("sft", 0.2), ("ipo", 10.0)]
  assert config.needs_reference and not config.needs_distributions
  assert not PreferenceConfig("simpo + sft").needs_reference
  assert (
    PreferenceConfig("dpo + aot").batchwise and PreferenceConfig("sft + tdpo").needs_distributions
  )


def test_a_setting_of_a_mixture_goes_to_all_members_that_take_it():
  config = PreferenceConfig("dpo + simpo + sft", beta=0.5)
  assert [config.settings(m).get("beta") for m, _ in config.members] == [0.5, 0.5, None]
  config = PreferenceConfig("dpo + simpo + sft")
  assert [config.settings(m).get("beta") for m, _ in config.members] == [0.1, 2.0, None]


@pytest.mark.parametrize(
  "name, settings, scale",
  [
    ("dpo", {"beta": 0.3}, 0.3),
    ("ipo", {"tau": 0.7}, 0.7),
    ("sft", {}, 1.0),
    ("sft + dpo", {}, 0.1),
    ("ipo + bco", {"tau": 0.7, "beta": 0.2}, 0.2),
  ],
)
def test_rewards_are_scaled_by_the_loss_that_has_a_scale(name, settings, scale):
  assert PreferenceConfig(name, **settings).reward_scale == scale


LN2 = math.log(2.0)


@pytest.mark.parametrize(
  "name, settings, loss",
  [
    ("dpo", {"beta": 0.7}, LN2),
    ("cdpo", {"label_smoothing": 0.3}, LN2),
    ("robust", {"label_smoothing": 0.3}, LN2),
    ("ipo", {"tau": 0.5}, 1.0),
    ("ipo_mean", {"tau": 0.5}, 1.0),
    ("hinge", {}, 1.0),
    ("sppo", {"beta": 0.25}, 8.0),  # both log-ratios are 1 / (2 beta) from their points
    ("apo_zero", {}, 1.0),
    ("bco", {}, 2 * LN2),
    ("tdpo", {}, LN2),
    ("kto", {"desirable_weight": 2.0, "undesirable_weight": 2.0}, 1.0),
    ("dpo*2 + ipo*0.5", {}, 2 * LN2 + 12.5),
  ],
)
def test_the_loss_at_the_reference(name, settings, loss):
  assert PreferenceConfig(name, **settings).identity_loss() == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize(
  "name, settings",
  [
    ("simpo", {}),
    ("dpo + sft", {}),
    ("r_dpo", {}),
    ("dpo", {"wpo": True}),
    ("kto", {"desirable_weight": 2.0}),
  ],
)
def test_no_loss_is_foretold_where_it_depends_on_the_batch(name, settings):
  assert PreferenceConfig(name, **settings).identity_loss() is None
