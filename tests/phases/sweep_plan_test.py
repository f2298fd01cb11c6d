"""From settings to runs: names, grids, shares of jobs, and one sentence for what is wrong."""

import itertools
import json

import pytest

from align_jax import config as config_lib
from align_jax.errors import InputError
from align_jax.phases import pipeline, sweep, sweep_plan
from align_jax.phases.sweep_plan import SweepConfig
from configs import online_sweep, provocations
from configs import sweep as sweep_config


def settings(**changes):
  values = sweep_config.get_config().to_dict()
  values["variants"] = {"dpo": {}, "ipo": {"objective": {"name": "ipo"}}}
  return values | changes


def plan(tmp_path, **changes):
  return sweep_plan.plan(config_lib.build(SweepConfig, settings(**changes)), tmp_path)


def names(runs):
  return list(dict.fromkeys(run.variant for run in runs))


def test_every_variant_meets_every_seed_and_seeds_come_last(tmp_path):
  runs = plan(tmp_path, seeds=(3, 5))
  assert [(r.variant, r.seed, r.config.seed) for r in runs] == [
    ("dpo", 3, 3), ("ipo", 3, 3), ("dpo", 5, 5), ("ipo", 5, 5),
  ]  # fmt: skip
  assert runs[1].folder == tmp_path / "ipo" / "seed3"
  assert runs[1].config.objective.name == "ipo"
  assert runs[0].config.objective.name == "dpo"  # the base was not touched


def test_a_grid_is_a_cross_product_and_its_settings_are_in_the_name(tmp_path):
  grid = {"optimizer": {"learning_rate": (1e-4, 3e-4)}, "data": {"batch_size": (16, 32)}}
  runs = plan(tmp_path, grid=grid, baseline=None)
  assert names(runs)[:5] == [
    "dpo-learning_rate=0.0001-batch_size=16",
    "dpo-learning_rate=0.0001-batch_size=32",
    "dpo-learning_rate=0.0003-batch_size=16",
    "dpo-learning_rate=0.0003-batch_size=32",
    "ipo-learning_rate=0.0001-batch_size=16",
  ]
  made = {(r.config.objective.name, r.config.optimizer.learning_rate, r.config.data.batch_size)
          for r in runs}  # fmt: skip
  assert made == set(itertools.product(("dpo", "ipo"), (1e-4, 3e-4), (16, 32)))


def test_a_variant_may_have_a_grid_of_its_own(tmp_path):
  variants = {
    "dpo": {"grid": {"objective": {"beta": (0.1, 0.5)}}},
    "ipo": {"objective": {"name": "ipo"}, "grid": {"objective": {"tau": (1.0,)}}},
  }
  runs = plan(tmp_path, variants=variants, baseline="dpo-beta=0.1")
  assert names(runs) == ["dpo-beta=0.1", "dpo-beta=0.5", "ipo-tau=1.0"]
  assert [r.config.objective.beta for r in runs[:3]] == [0.1, 0.5, None]


def test_leaves_that_end_alike_are_named_by_their_path():
  grid = {"optimizer": {"name": ("adamw", "sgd")}, "objective": {"name": ("dpo", "ipo")}}
  assert list(sweep_plan.expand("a", {}, grid))[0] == "a-optimizer.name=adamw-objective.name=dpo"


def test_a_tuple_may_be_an_alternative(tmp_path):
  grid = {"model": {"lora": {"targets": (("query", "key"), ("up",))}}}
  runs = plan(tmp_path, grid=grid, baseline=None)
  assert names(runs)[:2] == ["dpo-targets=query_key", "dpo-targets=up"]
  assert runs[0].config.model.lora.targets == ("query", "key")


def test_a_name_does_not_leave_its_folder():
  (name,) = sweep_plan.expand("a", {}, {"data": {"train": ("../../x y",)}})
  assert "/" not in name and " " not in name


@pytest.mark.parametrize("job_count", range(1, 8))
def test_the_shares_of_all_jobs_are_all_runs_once(tmp_path, job_count):
  runs = plan(tmp_path)
  shares = [sweep.share(runs, i, job_count) for i in range(job_count)]
  assert sorted(r.title for s in shares for r in s) == sorted(r.title for r in runs)
  assert max(map(len, shares)) - min(map(len, shares)) <= 1


RATES = {"optimizer": {"learning_rate": (1e-4, 3e-4)}}


@pytest.mark.parametrize(
  "message, changes",
  [
    ("variant 'dpo': config.objective.betta is not a setting.*'beta'",
     {"variants": {"dpo": {"objective": {"betta": 0.1}}}}),
    ("variant 'ipo': objective.beta is not used by the objective 'ipo'",
     {"variants": {"dpo": {}, "ipo": {"objective": {"name": "ipo", "beta": 0.1}}}}),
    ("variant 'dpo': config.loop.steps must be of type int",
     {"variants": {"dpo": {"loop": {"steps": "many"}}}}),
    ("variant 'dpo': optimizer.learning_rate is set by its overrides and by config.grid",
     {"variants": {"dpo": {"optimizer": {"learning_rate": 1e-3}}}, "grid": RATES}),
    ("variant 'dpo': optimizer.learning_rate is set by config.grid and by its own grid",
     {"variants": {"dpo": {"grid": RATES}}, "grid": RATES}),
    ("variant 'dpo': the grid holds learning_rate=0.1 twice",
     {"grid": {"optimizer": {"learning_rate": (0.1, 0.1)}}}),
    ("variant 'dpo': grid.optimizer.learning_rate must be a tuple of alternatives",
     {"grid": {"optimizer": {"learning_rate": 1e-4}}}),
    ("variant 'dpo': seed is set by the sweep", {"variants": {"dpo": {"seed": 1}}}),
    ("variant 'dpo': model.init is set by the sweep",
     {"variants": {"dpo": {"model": {"init": "x"}}}}),
    ("variants 'dpo' and 'again' have the same settings", {"variants": {"dpo": {}, "again": {}}}),
    ("variant 'a/b': a name is made of", {"variants": {"a/b": {}}}),
    ("variant 'sft': a name is made of", {"variants": {"sft": {}}}),
    ("config.baseline must be one of dpo, ipo, or None, not 'kto'", {"baseline": "kto"}),
    ("config.variants is empty", {"variants": {}}),
    ("config.seeds must be one or more different numbers", {"seeds": (0, 0)}),
    ("config.seeds must be one or more different numbers", {"seeds": ()}),
    (r"config.seeds\[0\] must be of type int", {"seeds": ("0",)}),
    ("config.metric must be one of score, .*'reward'", {"metric": "reward"}),
    ("config.processes must be positive", {"processes": 0}),
    ("config.proceses is not a setting of SweepConfig; did you mean 'processes'", {"proceses": 2}),
    ("config.preference.model.init must be config.start", {"start": "elsewhere"}),
  ],
)  # fmt: skip
def test_wrong_settings_are_one_sentence_before_anything_starts(tmp_path, message, changes):
  def never(index, count):
    raise AssertionError("a worker was started")

  with pytest.raises(InputError, match=message) as failure:
    sweep.run(settings(**changes), str(tmp_path / "sweep"), never)
  assert "\n" not in str(failure.value)
  assert not (tmp_path / "sweep").exists()


def test_a_seed_in_the_base_is_refused(tmp_path):
  values = settings()
  values["preference"]["seed"] = 0
  with pytest.raises(InputError, match="config.preference.seed is not used"):
    config_lib.build(SweepConfig, values)


@pytest.mark.parametrize("index, count", [(2, 2), (-1, 2), (0, 0)])
def test_a_job_outside_its_count_is_refused(tmp_path, index, count):
  with pytest.raises(InputError, match="job_index must lie within"):
    sweep.run(settings(), str(tmp_path), None, job_index=index, job_count=count)


def test_the_default_is_twelve_objectives_and_three_seeds(tmp_path):
  values = pipeline.resolve(sweep_config.get_config().to_dict(), str(tmp_path))
  runs = sweep_plan.plan(config_lib.build(SweepConfig, values), tmp_path)
  assert len(runs) == 36 and len({r.config.objective.name for r in runs}) == 12
  assert {r.config.model.init for r in runs} == {str(tmp_path / "sft")}


@pytest.mark.parametrize("state, done", [("diverged", True), ("crashed", False)])
def test_what_diverged_would_diverge_again_and_what_crashed_is_tried_again(tmp_path, state, done):
  run = plan(tmp_path)[0]
  assert not run.is_done
  run.folder.mkdir(parents=True)
  (run.folder / "failure.json").write_text(json.dumps({"state": state, "reason": "why"}))
  assert run.is_done == done


def online_settings(tmp_path, **changes):
  return pipeline.resolve(online_sweep.get_config().to_dict() | changes, str(tmp_path))


def online_plan(tmp_path, **changes):
  config = config_lib.build(SweepConfig, online_settings(tmp_path, **changes))
  return sweep_plan.plan(config, tmp_path)


def test_online_runs_are_swept_like_others(tmp_path):
  runs = online_plan(tmp_path)
  assert len(runs) == 15
  by_name = {run.variant: run.config for run in runs if run.seed == 2}
  assert by_name["ppo"].policy_gradient.value.lam == 0.95  # a section that the base leaves out
  assert by_name["rloo"].policy_gradient.value is None
  assert {c.seed for c in by_name.values()} == {2}
  assert {c.reward_model for c in by_name.values()} == {str(tmp_path / "reward")}


@pytest.mark.parametrize("name", ["ppo", "rloo"])
def test_over_optimisation_is_the_same_method_without_a_penalty_pushed_harder(tmp_path, name):
  runs = {run.variant: config_lib.to_dict(run.config) for run in online_plan(tmp_path)}
  lines = config_lib.difference(runs[name], runs[f"{name}-kl0"])
  assert [line.partition(":")[0].removeprefix("config.") for line in lines] == [
    "loop.steps", "optimizer.learning_rate", "policy_gradient.kl.coef",
  ]  # fmt: skip
  assert lines[2].endswith("0.1 there, 0.0 here")


@pytest.mark.parametrize(
  "config, count",
  [(online_sweep.get_config("relatives"), 27), (provocations.get_config("@trained"), 4)],
)
def test_the_other_online_sweeps_can_be_planned(tmp_path, monkeypatch, config, count):
  monkeypatch.setattr(sweep_plan.workspace, "tokenizer_of", lambda section: None)
  values = pipeline.resolve(config.to_dict(), str(tmp_path))
  assert len(sweep_plan.plan(config_lib.build(SweepConfig, values), tmp_path)) == count


REWARD = online_sweep.get_config().reward_models.reward.to_dict()


@pytest.mark.parametrize(
  "message, changes",
  [
    ("exactly one of config.preference and config.online is given, not preference and online",
     {"preference": {}}),
    ("exactly one of config.preference and config.online is given, not none", {"online": None}),
    ("config.online.model.init must be config.start", {"online": {"model": {"init": "x"}}}),
    ("config.online.seed is not used", {"online": {"seed": 0}}),
    ("config.reward_models.reward.model.init must be config.start, not 'x'",
     {"reward_models": {"reward": REWARD | {"model": REWARD["model"] | {"init": "x"}}}}),
    ("config.reward_models.other is trained, but no run reads @other",
     {"reward_models": {"reward": REWARD, "other": REWARD}}),
    ("config.reward_models: 'ppo' is made of .* neither sft nor a variant",
     {"reward_models": {"reward": REWARD, "ppo": REWARD}}),
    ("variant 'a': grpo compares the responses", {"variants": {"rloo": {}, "a": {
      "policy_gradient": {"estimator": "grpo"}, "sampling": {"samples_per_prompt": 1}}}}),
    ("variant 'a': config.policy_gradient.gama is not a setting",
     {"variants": {"rloo": {}, "a": {"policy_gradient": {"gama": 1.0}}}}),
  ],
)  # fmt: skip
def test_wrong_online_settings_are_one_sentence(tmp_path, message, changes):
  with pytest.raises(InputError, match=message) as failure:
    online_plan(tmp_path, **changes)
  assert "\n" not in str(failure.value)


def test_a_reward_model_may_be_read_by_the_evaluation_alone(tmp_path):
  """Also of a preference sweep, whose folders of old need not be made anew."""
  values = pipeline.resolve(settings(), str(tmp_path))
  assert "reward_models" not in sweep_plan.shared_settings(config_lib.build(SweepConfig, values))
  values["reward_models"] = pipeline.resolve({"reward": REWARD}, str(tmp_path))
  values["evaluation"]["scorer"] = f"reward:{tmp_path / 'reward'}"
  config = config_lib.build(SweepConfig, values)
  assert sweep_plan.plan(config, tmp_path)
  assert "reward_models" in sweep_plan.shared_settings(config)
