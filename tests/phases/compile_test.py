"""What `experiments.compile` compiles is what the phases run: the same batches, states and steps."""

import dataclasses

import jax
import numpy as np
import pytest

from align_jax import config as config_lib
from align_jax import data, models, sharding, worlds
from align_jax.errors import InputError
from align_jax.phases import compile as compile_phase
from align_jax.phases import compile_batches, compile_jobs, preference, train, workspace
from align_jax.phases.sections import DataSection
from align_jax.training import optimizer, preferences, state
from configs import pods, ppo, reward, sft
from configs import preference as preference_config

SHAPE = models.ModelConfig(
  vocab_size=128, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64,
  tie_embeddings=False,
)  # fmt: skip
SECTION = DataSection("microworld:n=64", length=48, batch_size=8, buckets=(96,))


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())


@pytest.fixture(scope="module")
def tokenizer():
  return worlds.Microworld(seed=0).tokenizer()


def like(abstract):
  return {name: (x.dtype, x.ndim) for name, x in abstract.items()}


def real(batch):
  return {name: (np.asarray(x).dtype, np.asarray(x).ndim) for name, x in batch.items()}


def test_batches_are_those_of_the_data_pipeline(mesh, tokenizer):
  world = worlds.Microworld(seed=0)
  records = world.preferences(32)
  plan = data.Batching(8, epochs=1, shuffle=False, pad_last=True)
  pairs = data.tokenise_pairs(records, tokenizer, plan, length=48)
  section = dataclasses.replace(SECTION, buckets=None)
  options = {"length": 48, "batch_size": 8, "seed": 0}
  demonstrations = data.sft_batches(world.demonstrations(32), tokenizer, pack=True, **options)
  feedback = data.feedback_batches(train.as_feedback(records), tokenizer, **options)
  expected = {
    "demonstrations": compile_batches.demonstrations(section, mesh),
    "padded": compile_batches.pairs(section, "padded", mesh, reference=False),
    "shared": compile_batches.pairs(section, "shared", mesh, reference=False),
    "feedback": compile_batches.feedback(section, mesh),
  }
  found = {
    "demonstrations": next(demonstrations),
    "padded": next(iter(data.padded_batches(pairs, 48))),
    "shared": next(iter(data.shared_batches(pairs))),
    "feedback": next(feedback),
  }
  for name, abstract in expected.items():
    assert like(abstract) == real(found[name]), name
  shapes = {n: x.shape[1:] for n, x in expected["padded"].items()}
  assert shapes == {n: np.asarray(x).shape[1:] for n, x in found["padded"].items()}


def test_a_fresh_state_in_shapes_is_the_one_that_is_made(mesh):
  model = models.Transformer(SHAPE, mesh=mesh)
  places = workspace.param_shardings(model, mesh)
  params = jax.jit(lambda k: models.init_params(model, k), out_shardings=places)(jax.random.key(0))
  tx = optimizer.make_optimizer(
    optimizer.OptimizerConfig(learning_rate=1e-3, moment_dtype="bfloat16"), 10
  )
  made = state.create_state(params, tx, 0, mesh)
  shapes = state.abstract_fresh(workspace.abstract_params(model, mesh), tx, mesh)
  assert jax.tree.structure(made) == jax.tree.structure(shapes)
  for x, y in zip(jax.tree.leaves(made), jax.tree.leaves(shapes)):
    assert (x.shape, x.dtype) == (y.shape, y.dtype)
    assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


def build(phase, config, **changes):
  values = config.to_dict()
  for path, value in changes.items():
    *sections, name = path.split("__")
    inner = values
    for section in sections:
      inner = inner[section]
    inner[name] = value
  return compile_jobs.settings(phase, values)


@pytest.mark.parametrize("name", sorted(preferences.MEMBERS))
def test_every_objective_has_a_step(mesh, name):
  config = build("preference", preference_config.get_config(), objective__name=name)
  job = compile_jobs.make("preference", config, SHAPE, mesh)
  after, metrics = jax.eval_shape(job.step, *job.args)
  assert jax.tree.structure(after) == jax.tree.structure(job.args[0])
  assert metrics["loss"].total.shape == ()


@pytest.mark.parametrize(
  "phase, config, changes",
  [
    ("sft", sft, {}),
    ("reward", reward, {}),
    ("reward", reward, {"layout": "padded", "model__lora__rank": 4}),
    ("preference", preference_config, {"model__lora__rank": 4, "reference": "recomputed"}),
    ("ppo", ppo, {}),
    ("ppo", ppo, {"model__lora__rank": 4, "model__lora__base_dtype": "int8", "ema_decay": 0.9}),
    ("prefill", ppo, {}),
    ("decode", ppo, {}),
    ("decode", ppo, {"model__lora__rank": 4}),
  ],
)
def test_every_phase_has_a_step(mesh, phase, config, changes):
  job = compile_jobs.make(phase, build(phase, config.get_config(), **changes), SHAPE, mesh)
  assert jax.eval_shape(job.step, *job.args) is not None


def test_the_real_run_takes_the_same_step(tmp_path, mesh, monkeypatch):
  """The shapes that a real DPO run calls its step with are those that are compiled for it."""
  seen = []

  def watched(*args, **kwargs):
    del args, kwargs

    def run(*args):
      seen.append(jax.tree.map(lambda x: (x.shape, x.dtype), args))
      raise KeyboardInterrupt

    return run

  monkeypatch.setattr(train.step, "make_train_step", watched)
  from align_jax.phases import sft as sft_phase

  config = build("sft", sft.get_config(), data__train="microworld:n=64", data__eval=None)
  with pytest.raises(KeyboardInterrupt):
    sft_phase.run(config, str(tmp_path / "sft"), jax.devices()[:1])
  vocabulary = len(worlds.Microworld().tokenizer())
  shape = workspace.scratch_config(config.model.scratch, vocabulary)
  one = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  job = compile_jobs.make("sft", config, shape, one)
  assert seen == [jax.tree.map(lambda x: (x.shape, x.dtype), job.args)]


def test_bad_input_is_a_sentence(mesh):
  with pytest.raises(InputError, match="phase must be one of"):
    compile_jobs.settings("dpo", {})
  with pytest.raises(InputError, match="did you mean 'llama3-8b'"):
    compile_phase.read_shape("llama3-8B")
  with pytest.raises(InputError, match="needs exactly"):
    compile_phase.build({"jobs": {"x": {"phase": "sft"}}})
  with pytest.raises(InputError, match="cannot be split 4 ways"):
    compile_batches.demonstrations(dataclasses.replace(SECTION, batch_size=6), mesh)
  with pytest.raises(InputError, match="policy gradients only"):
    values = ppo.get_config().to_dict()
    values["policy_gradient"], values["rejection"] = None, {"name": "raft", "keep": 1}
    values["sampling"]["samples_per_prompt"] = 2
    compile_jobs.make("ppo", compile_jobs.settings("ppo", values), SHAPE, mesh)


def test_the_jobs_of_the_readme_are_settings_of_their_phases():
  jobs = compile_phase.build(pods.get_config().to_dict()).jobs
  for name, job in jobs.items():
    config = compile_jobs.settings(job.phase, job.settings)
    assert config_lib.build(type(config), job.settings) == config, name
  assert isinstance(
    compile_jobs.settings("preference", jobs["DPO 70B, 2 slices"].settings),
    preference.PreferenceConfig,
  )
