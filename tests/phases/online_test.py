"""Online learning as a phase: runs of every kind, killed and resumed, stopped with a reason, refused."""

import json
import pathlib
import types

import jax
import numpy as np
import pytest

from align_jax import config as config_lib
from align_jax import sharding
from align_jax.errors import InputError
from align_jax.phases import online, online_benchmark, pipeline, workspace
from align_jax.rl import engine
from align_jax.training import checkpoints
from configs import grpo, nash_md, online_dpo, ppo, quickstart, raft, xpo

WORLD, STEPS = "microworld:n=32", 6


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A folder with a tiny policy `sft` and a tiny reward model `reward`."""
  root, settings = tmp_path_factory.mktemp("online"), quickstart.get_config()
  settings.sft.model.scratch.update(layers=1, embed_dim=32, heads=2, kv_heads=2, mlp_dim=64)
  for phase in (settings.sft, settings.reward):
    phase.data.update(train=WORLD, eval="microworld:n=8,split=heldout,draw=1", batch_size=8)
    phase.loop.update(steps=2, eval_every=0)
  config = config_lib.build(
    pipeline.PipelineConfig, pipeline.resolve(settings.to_dict(), str(root))
  )
  for task in pipeline.tasks(config, root)[:2]:
    task.train(task.config, str(task.folder), jax.devices()[:1])
  return root


def _settings(root: pathlib.Path, base=ppo, **changes) -> online.OnlineConfig:
  """The settings of a config file, small, with `a__b=value` set at config.a.b."""
  config = base.get_config()
  config.model.init, config.reward_model = str(root / "sft"), str(root / "reward")
  config.prompts.update(train=WORLD, batch_size=4)
  config.sampling.update(max_new_tokens=6, samples_per_prompt=2)
  config.loop.update(steps=STEPS, checkpoint_every=2)
  config.rollouts.update(every=1, rows=2)
  values = config.to_dict()
  for name, value in changes.items():
    *path, last = name.split("__")
    section = values
    for part in path:
      section = section[part]
    section[last] = value
  return config_lib.build(online.OnlineConfig, values)


def _run(config, folder, devices=1):
  online.run(config, str(folder), jax.devices()[:devices])
  return types.SimpleNamespace(
    lines=_lines(folder / "metrics.jsonl"),
    said=_lines(folder / "rollouts.jsonl"),
    lineage=json.loads((folder / "lineage.json").read_text()),
    folder=folder,
  )


def _lines(file):
  lines = [json.loads(line) for line in file.read_text().splitlines()]
  clock = ("time/", "tokens_per_s")
  return [{k: v for k, v in line.items() if not any(c in k for c in clock)} for line in lines]


FULL = {
  "policy_gradient__kl": {"coef": 0.1, "target": 1.0, "horizon": 100.0},
  "policy_gradient__ptx_coef": 0.5,
  "policy_gradient__value": {"lam": 0.9, "coef": 0.5, "clip_eps": 0.2, "warmup": 1},
  "policy_gradient__minibatches": 2,
  "shaping__normalise": True,
  "ema_decay": 0.5,
  "ptx": {"train": "microworld:n=32,draw=7", "length": 32, "rows_per_response": 1},
}


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory):
  """PPO with everything that has a state of its own, from beginning to end."""
  return _run(_settings(trained, **FULL), tmp_path_factory.mktemp("whole") / "run")


def test_everything_is_logged(whole):
  first = whole.lines[0]
  names = {"score/model", "score/gold", "ptx/loss", "value/loss", "kl_coef", "distinct/responses"}
  assert names <= set(first) and [line["step"] for line in whole.lines] == list(range(STEPS))
  assert first["kl/ref"] == pytest.approx(0.0, abs=1e-5)
  assert len({line["kl_coef"] for line in whole.lines}) > 3
  roles = {p["role"]: pathlib.Path(p["path"]).name for p in whole.lineage["parents"]}
  assert roles == {"policy": "sft", "ref": "sft", "reward_model": "reward", "value": "reward"}
  assert {row["step"] for row in whole.said} == set(range(STEPS))
  assert all(row["kl"] == pytest.approx(0.0, abs=1e-5) for row in whole.said if row["step"] < 2)
  assert any(abs(row["kl"]) > 1e-3 for row in whole.said if row["step"] == STEPS - 1)
  assert (whole.folder / "dashboard.html").exists()


def test_the_average_of_the_policies_is_what_is_kept(whole):
  """After six iterations, of which the first moves nothing: between the start and the last policy."""
  params = _saved(whole.folder)["params"]
  distance = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), params["ema"], params["policy"])
  assert max(jax.tree.leaves(distance)) > 1e-5
  assert json.loads((whole.folder / "model.json").read_text())["inside"] == "ema"
  kept = workspace.load(
    str(whole.folder), sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  )
  jax.tree.map(np.testing.assert_array_equal, kept.params, params["ema"])


class Killed(BaseException):
  """Like SIGKILL: nothing is saved on the way out."""


@pytest.mark.parametrize("after", [1, 3, 5])
def test_a_killed_run_resumes_bit_exactly(whole, trained, tmp_path, monkeypatch, after):
  """Policy, value, both optimizers, KL coefficient, score moments, prompts, pretraining rows."""
  make, calls = engine.make_iteration, []

  def dying(*args, **settings):
    iterate = make(*args, **settings)

    def one(*args):
      calls.append(1)
      if len(calls) == after + 1:
        raise Killed
      return iterate(*args)

    return one

  config = _settings(trained, **FULL)
  with monkeypatch.context() as patch:
    patch.setattr(online.rl, "make_iteration", dying)
    with pytest.raises(Killed):
      _run(config, tmp_path / "run")
  assert not (tmp_path / "run" / "lineage.json").exists()
  resumed = _run(config, tmp_path / "run")
  assert resumed.lines == whole.lines and resumed.said == whole.said
  saved = [_saved(folder) for folder in (tmp_path / "run", whole.folder)]
  assert {"params", "opt_state", "kl_coef", "moments", "rng", "step"} <= set(saved[0])
  jax.tree.map(np.testing.assert_array_equal, *saved)


def _saved(folder):
  """The whole state as it lies on disk: keys of random numbers as the integers they are made of."""
  from orbax.checkpoint import v1 as ocp

  path = checkpoints._folder(folder) / str(checkpoints.latest_step(folder))
  state = ocp.load(path, checkpointable_name="state")
  return jax.tree.map(
    lambda x: jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x,
    state,
  )


def test_grpo_on_eight_devices_needs_no_reward_model_but_the_one_it_is_given(trained, tmp_path):
  config = _settings(
    trained, grpo, loop__steps=2, prompts__batch_size=8, mesh={"data": 4, "fsdp": 2, "tensor": 1},
    policy_gradient__extra_draws=1, rewards={"gold": {"kind": "gold"}}, reward_model=None,
  )  # fmt: skip
  run = _run(config, tmp_path / "run", devices=8)
  assert [p["role"] for p in run.lineage["parents"]] == ["policy", "ref"]
  assert run.lines[0]["score"] == pytest.approx(run.lines[0]["score/gold"])
  assert "value/loss" not in run.lines[0] and run.lines[0]["dynamic/draws"] in (1.0, 2.0)


def test_a_critic_without_a_reward_model_starts_from_the_policy(trained, tmp_path):
  config = _settings(
    trained, loop__steps=1, rewards={"gold": {"kind": "gold"}}, reward_model=None,
    model__lora__rank=2,
  )  # fmt: skip
  run = _run(config, tmp_path / "run")
  roles = {p["role"]: pathlib.Path(p["path"]).name for p in run.lineage["parents"]}
  assert roles == {"policy": "sft", "ref": "sft", "value": "sft"}


@pytest.mark.parametrize("base", [online_dpo, xpo, nash_md, raft])
def test_the_other_methods_run_on_the_same_loop(trained, tmp_path, base):
  """From their own configs, two iterations each; the policy begins as its reference and moves."""
  group = base.get_config().sampling.samples_per_prompt
  settings = {"loop__steps": 2, "sampling__samples_per_prompt": group}
  run = _run(_settings(trained, base, **settings), tmp_path / "run")
  assert [line["step"] for line in run.lines] == [0, 1]
  assert run.lines[0]["kl/ref"] == pytest.approx(0.0, abs=1e-5) != run.lines[1]["kl/ref"]
  assert all(np.isfinite(line["loss"]) and "score/gold" in line for line in run.lines)


def test_a_reward_is_standardised_over_responses_of_the_starting_policy(trained, tmp_path):
  """Logged beside the raw one it is an affine function of it, the same at every step."""
  terms = {
    "raw": {"kind": "model", "weight": 0.0},
    "standard": {"kind": "model", "weight": 1.0, "standardise": 16},
  }
  config = _settings(trained, grpo, rewards=terms, loop__steps=3)
  lines = _run(config, tmp_path / "run").lines
  raw, standard = (np.array([line[f"score/{n}"] for line in lines]) for n in ("raw", "standard"))
  slope, offset = np.polyfit(raw, standard, 1)
  np.testing.assert_allclose(slope * raw + offset, standard, atol=1e-3)
  assert slope > 1.5  # an untrained reward model's scores lie close together
  assert abs(standard[0]) < 1.5


def test_the_benchmark_says_what_a_step_spends_its_time_on(trained, tmp_path):
  config = online_benchmark.OnlineBenchmarkConfig(_settings(trained, grpo, loop__steps=3))
  results = online_benchmark.run(config, str(tmp_path), jax.devices()[:1])
  lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1:]
  spent = {n: np.mean([json.loads(line)[n] for line in lines]) for n in results["seconds"]}
  assert set(spent) == {"time/sample", "time/score", "time/train"} and results["iterations"] == 2
  assert results["shares"]["time/sample"] == pytest.approx(
    spent["time/sample"] / sum(spent.values())
  )
  with pytest.raises(InputError, match="the first compiles"):
    online_benchmark.OnlineBenchmarkConfig(_settings(trained, grpo, loop__steps=2))


def test_a_stop_ends_the_run_and_says_why(trained, tmp_path):
  stops = {"length_max": 0.5, "patience": 2}
  run = _run(_settings(trained, grpo, stops=stops), tmp_path / "run")
  assert len(run.lines) < STEPS and run.lineage["step"] == len(run.lines)
  assert "response_length was" in run.lineage["stopped"]


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"policy_gradient": None}, "exactly one of policy_gradient"),
    ({"policy_gradient__ptx_coef": 1.0}, "ptx and a positive policy_gradient.ptx_coef go together"),
    ({"ptx": FULL["ptx"]}, "ptx and a positive policy_gradient.ptx_coef go together"),
    (
      {"policy_gradient__value": {"warmup": STEPS}},
      "value.warmup must be less than loop.steps",
    ),
    ({"sampling__samples_per_prompt": 0}, "samples_per_prompt must be at least 1"),
    ({"stops": {"patience": 3}}, "no limit is set"),
    ({"stops": {"distinct_min": 0.5}}, "is never passed"),
    ({"model__logits_chunk": 4}, "set policy_gradient.logits_chunk"),
  ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, changes, message):
  with pytest.raises(InputError, match=message):
    _settings(tmp_path, **changes)


def test_a_group_of_one_has_nothing_to_compare_with(tmp_path):
  with pytest.raises(InputError, match="rloo|grpo compares the responses"):
    _settings(tmp_path, grpo, sampling__samples_per_prompt=1)
  with pytest.raises(InputError, match="value_optimizer is not used"):
    _settings(tmp_path, grpo, value_optimizer={"learning_rate": 1e-3})


def test_rows_that_do_not_split_are_refused_before_anything_is_loaded(trained, tmp_path):
  config = _settings(tmp_path, policy_gradient__minibatches=3, model__init=str(trained / "sft"))
  with pytest.raises(InputError, match="a batch of 8 rows does not split"):
    online.run(config, str(tmp_path / "run"), jax.devices()[:1])
