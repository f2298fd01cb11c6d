"""The preference step in both layouts, as ratios, on pairs with the lengths of public data.

  python -m experiments.benchmark --config=configs/benchmark.py:FOLDER --workdir=runs/benchmark

FOLDER holds hh_rlhf_harmless/train.jsonl and alpaca_eval_prefs/train.jsonl; by default it is the one
that the environment variable ALIGN_JAX_DATA names.  SmolLM2-135M in float32, all weights trained, takes
some 20 minutes on two CPU cores.  The first variant is the plain one: both answers padded to the
batch's longest, every position through the head, the reference computed again at every step.
"""

import os

from ml_collections import config_dict

from configs import common, preference


def get_config(folder: str = "") -> config_dict.ConfigDict:
  folder = folder or os.environ.get("ALIGN_JAX_DATA", "")
  config = config_dict.ConfigDict()
  config.model = common.model("smollm2")
  config.model.logits_chunk = 128  # None: all logits at once, which here takes over 24 GB padded
  config.data = config_dict.ConfigDict()
  for name in ("hh_rlhf_harmless", "alpaca_eval_prefs"):
    config.data[name] = common.data(
      os.path.join(folder, name, "train.jsonl"), None, length=1024, batch_size=8
    )
  config.data.alpaca_eval_prefs.columns = "prompt=instruction"
  config.objective = preference.objective("dpo")
  config.variants = (
    "padded/recomputed",
    "shared/recomputed",
    "shared/cached",
  )  # or "padded/cached"
  config.batches = 2
  config.repeats = 2
  config.mesh = common.mesh()
  return config
