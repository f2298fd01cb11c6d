"""Bad input gives one clear sentence and exit status 2 before anything is compiled."""

import dataclasses
import gzip
import json
import os
import pathlib
import shutil
import subprocess
import sys

import grain
import jax
import pytest
import transformers
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models

from align_jax import config as config_lib
from align_jax.errors import InputError
from align_jax.phases import evaluate, online, preference, records, reward, sft
from align_jax.training import checkpoints
from align_jax.training import state as train_state
from configs import evaluate as evaluate_config
from configs import ppo as ppo_config
from configs import preference as preference_config
from configs import reward as reward_config
from configs import sft as sft_config

ROOT = pathlib.Path(__file__).resolve().parents[2]
PHASES = {
  "sft": (sft.run, sft.SftConfig, sft_config),
  "reward": (reward.run, reward.RewardConfig, reward_config),
  "preference": (preference.run, preference.PreferenceConfig, preference_config),
  "ppo": (online.run, online.OnlineConfig, ppo_config),
  "evaluate": (evaluate.run, evaluate.EvaluateConfig, evaluate_config),
}
TEMPLATE = (
  "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
)
GOOD = {"prompt": "say hi", "chosen": "hi", "rejected": "no"}


@pytest.fixture(autouse=True)
def no_compilation():
  """Fails a test in which XLA compiles anything."""
  compiled = []

  def listen(event: str, seconds: float, **_):
    if event.endswith("backend_compile_duration"):
      compiled.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield
  jax.monitoring.clear_event_listeners()
  assert not compiled


def start(name, workdir, **changes):
  """Runs a phase with dotted settings changed, on one device."""
  run, cls, module = PHASES[name]
  settings = module.get_config()
  for dotted, value in changes.items():
    settings.update_from_flattened_dict({dotted.replace("__", "."): value})
  run(config_lib.build(cls, settings.to_dict()), str(workdir), jax.devices()[:1])


def fails(message, name, tmp_path, **changes):
  with pytest.raises(InputError, match=message) as failure:
    start(name, tmp_path / "run", **changes)
  assert "\n" not in str(failure.value)


def pairs_file(tmp_path, *rows, name="pairs.jsonl"):
  file = tmp_path / name
  file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
  return str(file)


FILES = {
  "invalid JSON": ([GOOD, '{"prompt": '], r"pairs.jsonl:2: .*JSON"),
  "missing field": ([GOOD, GOOD, {"prompt": "a", "chosen": "b"}], r"pairs.jsonl:3: .*'rejected'"),
  "wrong type": ([GOOD | {"chosen": 7}], r"pairs.jsonl:1: .*'chosen'"),
  "empty file": ([], r"pairs.jsonl.* (empty|no records)"),
  "NaN weight": (
    ['{"prompt": "a", "chosen": "b", "rejected": "c", "weight": NaN}'],
    r"pairs.jsonl:1: .*'weight'",
  ),
  "unknown role": (
    [GOOD | {"prompt": [{"role": "boss", "content": "x"}]}],
    r"pairs.jsonl:1: .*'boss'",
  ),
  "label_prob out of range": ([GOOD | {"label_prob": 1.5}], r"pairs.jsonl:1: .*'label_prob'"),
  "misspelt field": (
    [{"prompt": "a", "chosne": "b", "rejected": "c"}],
    r"pairs.jsonl:1: .*'chosne'.*'chosen'",
  ),
  "margin for dpo": ([GOOD | {"margin": 1.0}], r"pairs.jsonl:1: field 'margin' is not used by dpo"),
  "not an object": (["[1, 2]"], r"pairs.jsonl:1: "),
}


@pytest.mark.parametrize("kind", FILES)
def test_bad_record(tmp_path, kind):
  rows, message = FILES[kind]
  fails(message, "preference", tmp_path, data__train=pairs_file(tmp_path, *rows))


def test_bad_held_out_record(tmp_path):
  good = pairs_file(tmp_path, GOOD)
  bad = pairs_file(tmp_path, {"prompt": "a"}, name="dev.jsonl")
  fails("dev.jsonl:1", "reward", tmp_path, data__train=good, data__eval=bad)


def test_truncated_gzip(tmp_path):
  whole = gzip.compress("".join(json.dumps(GOOD) + "\n" for _ in range(500)).encode())
  (tmp_path / "pairs.jsonl.gz").write_bytes(whole[: len(whole) // 2])
  fails("pairs.jsonl.gz", "preference", tmp_path, data__train=str(tmp_path / "pairs.jsonl.gz"))


@pytest.mark.parametrize("source", ["nowhere.jsonl", "pairs.xlsx"])
def test_missing_or_unknown_file(tmp_path, source):
  fails(source, "preference", tmp_path, data__train=str(tmp_path / source))


@pytest.mark.parametrize(
  "source, message",
  [
    ("microworld:n=10,sed=1", "unknown setting 'sed'"),
    ("microworld:n=many", "n must be int, not 'many'"),
    ("microworld:", "how many"),
    ("microworld:n=4,split=dev", "split"),
  ],
)
def test_microworld_source(tmp_path, source, message):
  fails(message, "preference", tmp_path, data__train=source)


@pytest.mark.parametrize(
  "name, changes, message",
  [
    ("preference", {"objective__name": "dop"}, "objective.name must be one of .*'dop'"),
    ("preference", {"objective__tau": 0.1}, "objective.tau is not used"),
    ("preference", {"records": "feedback"}, "dpo learns from pairs"),
    ("preference", {"data__train": "microworld:n=4 + microworld:n=4"}, "each named once"),
    ("preference", {"data__train": "microworld:n=4*2"}, "two or more parts"),
    (
      "preference",
      {"data__train": "microworld:n=4*2 + microworld:n=5"},
      "give every part a weight",
    ),
    (
      "preference",
      {"data__batch_size": 10, "accumulate": 4, "layout": "padded"},
      "10 rows does not split",
    ),
    ("preference", {"accumulate": 0}, "config.accumulate must be positive"),
    ("reward", {"layout": "packed"}, "config.layout must be one of shared, padded"),
    ("preference", {"mesh__data": 3}, "does not cover the 1 devices"),
    ("sft", {"optimizer__name": "adan"}, "optimizer.name"),
    ("sft", {"loop__steps": 0}, "loop.steps"),
    ("sft", {"model__lora__rank": 4}, "model.lora adapts a trained model"),
    ("sft", {"model__scratch__kv_heads": 3}, "model.scratch: sizes"),
    ("preference", {"model__lora__targets": ("q_proj",)}, "lora.targets: 'q_proj'"),
    ("preference", {"model__lora__base_dtype": "int8"}, "lora.base_dtype='int8' needs adapters"),
    (
      "preference",
      {"model__lora__rank": 2, "model__lora__base_dtype": "int4"},
      "base_dtype must be one of",
    ),
    ("ppo", {"loop__eval_every": 5}, "loop.eval_every is not used"),
    ("reward", {"model__logits_chunk": 8}, "logits_chunk is not used"),
    ("sft", {"model__init": "smollm2"}, "model.scratch"),
    ("ppo", {"sampling__temperature": 0.0}, "temperature must be positive"),
    (
      "ppo",
      {
        "policy_gradient__kl__coef": 0.0,
        "policy_gradient__kl__target": 6.0,
        "policy_gradient__kl__horizon": 1e4,
      },
      "kl.target",
    ),
    ("evaluate", {"policy": "nowhere"}, "nowhere"),
    ("preference", {"model__init": "nowhere"}, "nowhere"),
  ],
)
def test_bad_setting(tmp_path, name, changes, message):
  fails(message, name, tmp_path, **changes)


def test_workdir_that_cannot_be_made(tmp_path):
  (tmp_path / "run").write_text("a file, not a folder")
  fails("workdir", "preference", tmp_path)


def test_workdir_of_another_run(tmp_path):
  fails("nowhere", "preference", tmp_path, model__init="nowhere")
  fails("config.seed: 0 there, 1 here", "preference", tmp_path, model__init="nowhere", seed=1)


def phase_folder(tmp_path, kind="policy", **model):
  """A workdir with a model.json and no checkpoint."""
  from align_jax import models
  from align_jax.phases.sections import LoraConfig

  folder = tmp_path / "earlier"
  (folder / "checkpoints").mkdir(parents=True)
  description = {
    "kind": kind,
    "model": dataclasses.asdict(models.ModelConfig(**model)),
    "lora": dataclasses.asdict(LoraConfig()),
    "base": "scratch",
    "inside": None,
  }
  (folder / "model.json").write_text(json.dumps(description))
  (folder / "lineage.json").write_text("{}")  # says that the phase is finished
  return folder


def test_phase_without_checkpoint(tmp_path):
  folder = phase_folder(tmp_path)
  shutil.copytree(hf_folder(tmp_path, {}), folder / "tokenizer")
  fails(
    "holds no checkpoint", "preference", tmp_path, **two_pairs(tmp_path), model__init=str(folder)
  )


@pytest.fixture(scope="module")
def tiny_state(tiny_model):
  key = jax.random.key(0)
  return train_state.TrainState(jax.numpy.zeros((), "int32"), tiny_model[1], (), key)


def test_phase_that_has_not_finished(tmp_path):
  folder = phase_folder(tmp_path)
  (folder / "lineage.json").unlink()
  shutil.copytree(hf_folder(tmp_path, {}), folder / "tokenizer")
  fails("has not finished", "preference", tmp_path, **two_pairs(tmp_path), model__init=str(folder))


def test_checkpoint_of_another_model(tmp_path, tiny_state):
  folder = phase_folder(tmp_path, vocab_size=64, embed_dim=48)
  store = checkpoints.Checkpoints(folder, keep=1)
  store.save(1, tiny_state, iter(grain.MapDataset.source([0]).to_iter_dataset()), metadata={})
  store.close()
  shutil.copytree(hf_folder(tmp_path, {}), folder / "tokenizer")
  fails(
    "does not hold the parameters of this model",
    "preference",
    tmp_path,
    **two_pairs(tmp_path),
    model__init=str(folder),
  )


def two_pairs(tmp_path):
  file = pairs_file(tmp_path, GOOD, GOOD)
  return {"data__train": file, "data__batch_size": 2, "data__eval": None}


def hf_folder(
  tmp_path,
  config,
  template=TEMPLATE,
):
  folder = tmp_path / "hf"
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(config))
  core = Tokenizer(tokenizer_models.WordLevel({"<unk>": 0, "<eos>": 1, "hi": 2}, unk_token="<unk>"))
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=core, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>"
  )
  tokenizer.chat_template = template
  tokenizer.save_pretrained(str(folder))
  return str(folder)


def test_unsupported_architecture(tmp_path):
  folder = hf_folder(tmp_path, {"model_type": "mamba", "architectures": ["MambaForCausalLM"]})
  fails("mamba|Mamba", "preference", tmp_path, model__init=folder)


def test_tokenizer_without_template(tmp_path):
  folder = hf_folder(tmp_path, {}, template=None)
  fails(
    "chat template",
    "sft",
    tmp_path,
    model__scratch__tokenizer=folder,
    data__train=demonstrations(tmp_path),
    data__eval=None,
  )


def demonstrations(tmp_path):
  return pairs_file(tmp_path, {"prompt": "hi", "completion": "hi"}, name="demonstrations.jsonl")


def test_records_that_are_read_are_those_of_the_file(tmp_path):
  """The control: a good file is not refused."""
  file = pairs_file(tmp_path, GOOD, GOOD | {"weight": 0.5})
  assert [r.weight for r in records.read(file, "preferences")] == [1.0, 0.5]


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--config.objective.nam=ipo"], "nam"),
    (["--config.seed=soon"], "seed"),
    (["--config=configs/absent.py"], "absent.py"),
    (["--config.data.train=absent.jsonl"], "absent.jsonl"),
    (["--confg=x"], "confg"),
    (["stray"], "stray"),
  ],
)
def test_command_line_answers_in_a_sentence(tmp_path, arguments, message):
  """Exit status is not 0, and no traceback."""
  command = [
    sys.executable,
    "-m",
    "experiments.preference",
    f"--workdir={tmp_path}/run",
    *arguments,
  ]
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert done.returncode != 0
  assert message in done.stderr + done.stdout
  assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--confg=x"]])
def test_help_and_wrong_flags_touch_no_device(arguments):
  """With a platform that does not exist, only a command that asks for no device can answer."""
  command = [sys.executable, "-m", "experiments.preference", *arguments]
  environment = os.environ | {"JAX_PLATFORMS": "no_such_platform"}
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert "Traceback" not in done.stderr
  assert "no_such_platform" not in done.stderr + done.stdout
