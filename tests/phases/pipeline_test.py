"""The whole chain on a model of one layer: every phase from the checkpoint of the one before."""

import json

import jax
import numpy as np
import pytest

from align_jax import config as config_lib
from align_jax import models, sharding
from align_jax.errors import InputError
from align_jax.phases import export, pipeline, workspace
from align_jax.training import checkpoints, workdir
from configs import quickstart, reward_ceiling

WORLD = "microworld:n=64"
HELD_OUT = "microworld:n=16,split=heldout,draw=1"


def tiny(lora: bool = False):
  """The quickstart's settings, shrunk until a phase takes seconds."""
  config = quickstart.get_config()
  config.sft.model.scratch.update(layers=1, embed_dim=32, heads=2, kv_heads=2, mlp_dim=64)
  phases = [config.sft, config.reward, *config.preference.values()]
  for phase in phases:
    phase.data.update(train=WORLD, eval=HELD_OUT, batch_size=8)
    phase.loop.update(steps=4, eval_every=0, checkpoint_every=2)
  config.ppo.prompts.update(train=WORLD, batch_size=8)
  config.ppo.sampling.max_new_tokens = 8
  config.ppo.loop.steps = 2
  if lora:
    for phase in (*phases[1:], config.ppo):
      phase.model.lora.rank = 2
    for phase in (*phases[2:], config.ppo):
      phase.model.lora.base_dtype = "int8"
  config.evaluation.update(data=HELD_OUT, max_new_tokens=8, batch_size=16)
  config.reward_evaluation.update(data=HELD_OUT, batch_size=16)
  return config.to_dict()


def lines(file):
  return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """(root, settings) of a pipeline that ran to its end."""
  root, settings = tmp_path_factory.mktemp("pipeline"), tiny()
  pipeline.run(settings, str(root), jax.devices()[:1])
  return root, settings


PHASES = ("sft", "reward", "dpo", "ipo", "kto", "ppo")


@pytest.mark.parametrize("phase", PHASES)
def test_every_phase_leaves_metrics_checkpoint_lineage_and_evaluation(finished, phase):
  folder = finished[0] / phase
  steps = [line["step"] for line in lines(folder / "metrics.jsonl") if "loss" in line]
  assert steps == list(range(2 if phase == "ppo" else 4))
  lineage = json.loads((folder / "lineage.json").read_text())
  roles = {parent["role"]: parent["path"].rpartition("/")[2] for parent in lineage["parents"]}
  assert roles == {
    "sft": {},
    "reward": {"trunk": "sft"},
    "ppo": {"policy": "sft", "ref": "sft", "reward_model": "reward", "value": "reward"},
  }.get(phase, {"policy": "sft", "ref": "sft"})
  assert all(parent["step"] == 4 for parent in lineage["parents"])
  assert len(lineage["data_fingerprint"]) == 64
  assert json.loads((folder / "evaluation.json").read_text())["n"] == 16


@pytest.mark.parametrize("phase, loss", [("dpo", np.log(2)), ("ipo", 25.0), ("kto", 0.5)])
def test_first_loss_is_that_of_a_policy_that_is_its_reference(finished, phase, loss):
  first = next(line for line in lines(finished[0] / phase / "metrics.jsonl") if "loss" in line)
  np.testing.assert_allclose(first["loss"], loss, rtol=1e-5)


def test_ppo_starts_at_ratio_one_and_kl_zero(finished):
  first = next(line for line in lines(finished[0] / "ppo" / "metrics.jsonl") if "loss" in line)
  assert first["ppo/first_ratio_error_max"] < 1e-5
  assert abs(first["kl/ref"]) < 1e-5
  assert first["ppo/sampler_mismatch_max"] < 1e-4


def test_sft_evaluated_against_itself_ties_everywhere(finished):
  """The control of every comparison with it."""
  evaluation = json.loads((finished[0] / "sft" / "evaluation.json").read_text())
  assert evaluation["score_gain"]["value"] == evaluation["kl"]["value"] == 0.0
  assert evaluation["win_rate"]["rate"]["value"] == 0.5


def test_report_is_one_page_with_its_pictures(finished):
  page = (finished[0] / "report.html").read_text()
  assert all(name in page.lower() for name in PHASES)
  assert len(list(finished[0].glob("report_*.png"))) >= 3


def test_again_is_nothing_to_do(finished, capsys):
  root, settings = finished
  before = {p: p.stat().st_mtime_ns for p in root.rglob("metrics.jsonl")}
  pipeline.run(settings, str(root), jax.devices()[:1])
  assert {p: p.stat().st_mtime_ns for p in root.rglob("metrics.jsonl")} == before
  assert "training" not in capsys.readouterr().out


def test_another_config_is_refused(finished):
  root, settings = finished
  changed = settings | {"evaluation": settings["evaluation"] | {"seed": 1}}
  with pytest.raises(InputError, match="config.evaluation.seed: 0 there, 1 here"):
    pipeline.run(changed, str(root), jax.devices()[:1])


def test_exported_policy_loads_as_a_plain_model(finished, tmp_path):
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  export.run(export.ExportConfig(str(finished[0] / "dpo")), str(tmp_path / "hf"), jax.devices()[:1])
  ours = workspace.load(str(finished[0] / "dpo"), mesh)
  again = workspace.load(str(tmp_path / "hf"), mesh)
  tokens = np.arange(2, 12, dtype=np.int32)[None]
  np.testing.assert_allclose(
    again.model.apply({"params": again.params}, tokens),
    ours.model.apply({"params": ours.params}, tokens),
    atol=1e-5,
  )
  assert again.tokenizer.chat_template == ours.tokenizer.chat_template


def test_reward_model_is_not_exported_or_trained_as_a_policy(finished, tmp_path):
  with pytest.raises(InputError, match="reward model"):
    export.run(export.ExportConfig(str(finished[0] / "reward")), str(tmp_path), jax.devices()[:1])


def test_with_lora_on_eight_devices(finished, tmp_path):
  """Adapters train on frozen weights, int8 for DPO and PPO; the next phases load them merged into
  the base that they were trained on."""
  root, settings = finished[0], tiny(lora=True)
  (tmp_path / "sft").symlink_to(root / "sft")
  settings["preference"] = {"dpo": settings["preference"]["dpo"]}
  pipeline.run(settings, str(tmp_path), jax.devices())
  model_file = json.loads((tmp_path / "dpo" / "model.json").read_text())
  assert model_file["lora"]["rank"] == 2
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  base, tuned = (workspace.load(str(tmp_path / name), mesh) for name in ("sft", "dpo"))
  moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), base.params, tuned.params)
  assert moved["layers"]["query"] and not moved["embedding"]
  description = workspace.read_description(tmp_path / "dpo")
  abstract = workspace.abstract_lora(base.model, description.lora, mesh)
  adapter = checkpoints.load_params(tmp_path / "dpo", abstract, step=4)
  trained_on = models.quantise_base(base.params)
  merged = models.merge_lora(trained_on, adapter, description.lora.scale)
  jax.tree.map(np.testing.assert_array_equal, tuned.params, merged)
  resting = workspace.frozen_base(base, description.lora, mesh)
  jax.tree.map(np.testing.assert_array_equal, resting.params, trained_on)
  assert workspace.frozen_base(resting, description.lora, mesh) is resting
  assert workdir.is_finished(tmp_path / "ppo")


def test_a_pipeline_may_end_at_its_reward_model(tmp_path):
  settings = pipeline.resolve(reward_ceiling.get_config().to_dict(), str(tmp_path))
  config = config_lib.build(pipeline.PipelineConfig, settings)
  found = pipeline.tasks(config, tmp_path)
  assert [task.folder.name for task in found] == ["sft", "reward"]
  assert config.reward.model.init == str(tmp_path / "sft")


@pytest.mark.parametrize(
  "text, expected",
  [
    ("@sft", "R/sft"),
    ("reward:@reward", "reward:R/reward"),
    ("@a,@b, @c", "R/a,R/b, R/c"),
    ("average:@a,@b", "average:R/a,R/b"),
    ("me@home", "me@home"),
  ],
)
def test_names_of_phases_stand_for_their_workdirs(text, expected):
  assert pipeline.resolve({"x": {"y": text}}, "R") == {"x": {"y": expected}}
