"""Steps of SFT, rewards, DPO and policies next to TRL's and Tunix's, and sampling next to transformers'.

  python -m experiments.benchmark --config=configs/benchmark_peers.py --workdir=runs/benchmark_peers
  python -m experiments.benchmark --config=configs/benchmark_peers.py:gpu --workdir=runs/benchmark_peers

The environment variable ALIGN_JAX_DATA names the folder of hh_rlhf_harmless, alpaca_eval_prefs and
instructions. TRL's side needs `pip install torch transformers trl`, Tunix's (SFT and DPO) Python 3.12 and
`pip install google-tunix`, which nothing else here does; a peer that is not installed is left out, as is
one that `--config.peers='("trl",)'` does not name. SmolLM2-135M in float32 takes some hours on two CPU
cores, most of them TRL's; `:cpu,dpo_hh` measures the tasks that are named. On a GPU: a 1 B random Llama in
bfloat16.
"""

import os

from ml_collections import config_dict

from configs import common

_FILES = {  # task: (phase, folder, columns)
  "dpo_hh": ("dpo", "hh_rlhf_harmless", None),
  "dpo_alpaca": ("dpo", "alpaca_eval_prefs", "prompt=instruction"),
  "reward_hh": ("reward", "hh_rlhf_harmless", None),
  "reward_alpaca": ("reward", "alpaca_eval_prefs", "prompt=instruction"),
  "sft": ("sft", "instructions", "completion=response"),
  "policy_hh": ("policy", "hh_rlhf_harmless", None),
  "sample": ("sample", "instructions", "completion=response"),
}
_WAYS = {"dpo": ("cached", "recomputed"), "sample": ("batches", "continuous")}


def get_config(machine: str = "cpu") -> config_dict.ConfigDict:
  """machine: "cpu" or "gpu", and names of tasks behind it, as in "cpu,dpo_hh,sft"; by default all."""
  machine, *names = machine.split(",")
  if machine not in ("cpu", "gpu"):
    raise ValueError(f"{machine!r} must be 'cpu' or 'gpu'")
  unknown = sorted(set(names) - set(_FILES))
  if unknown:
    raise ValueError(f"{unknown[0]!r} is none of {', '.join(_FILES)}")
  config = config_dict.ConfigDict()
  config.model = common.model("smollm2")
  config.model.logits_chunk = 128
  config.shape = config_dict.placeholder(str)  # random weights of a named shape
  config.tasks = config_dict.ConfigDict()
  for name in names or _FILES:
    config.tasks[name] = task(*_FILES[name])
  config.optimizer = common.optimizer(1e-5, schedule="constant")
  config.optimizer.update(warmup_fraction=0.0, b1=0.9, b2=0.999)  # TRL's defaults
  config.batches = 4  # of 8 examples: a pass
  config.repeats = 3  # passes of each side
  config.interleave = True  # all sides in memory at once; a peak is a process's own
  config.peers = ("trl", "tunix", "transformers")  # those of them that are installed
  config.gradient_checkpointing = True  # of the peers: TRL's default
  config.matmul = 2048
  config.mesh = common.mesh()
  if machine == "gpu":
    config.shape = "llama3.2-1b"
    config.model.update(dtype="bfloat16", remat="full")
    config.update(batches=8, repeats=5, interleave=False, matmul=8192)
    config.peers = ("trl", "transformers")  # Tunix's Llama does not scale its rotations
  return config


def task(phase: str, folder: str, columns: str | None) -> config_dict.ConfigDict:
  config = config_dict.ConfigDict()
  config.phase = phase
  file = os.path.join(os.environ.get("ALIGN_JAX_DATA", ""), folder, "train.jsonl")
  config.data = common.data(file, None, length=1024, batch_size=8)
  if columns:
    config.data.columns = columns
  config.ways = _WAYS.get(phase, ())  # of ours
  return config
