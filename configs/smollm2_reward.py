"""A reward model on SmolLM2-135M-Instruct from people's preferences, LoRA, on two CPU cores.

  python -m experiments.reward --config=configs/smollm2_reward.py:FOLDER --workdir=runs/smollm2_reward

FOLDER is by default what the environment variable ALIGN_JAX_DATA names. Two sets of human judgements:
hh_rlhf_harmless (1,514 pairs, one judgement each) and pandalm_human (690 pairs, three annotators). Then
`experiments.audit` looks into the model and `experiments.reward_benchmark` scores it on benchmarks.
"""

import os

from ml_collections import config_dict

from configs import common, reward


def get_config(folder: str = "") -> config_dict.ConfigDict:
  folder = folder or os.environ.get("ALIGN_JAX_DATA", "")
  harmless, helpful = (os.path.join(folder, name) for name in ("hh_rlhf_harmless", "pandalm_human"))
  config = reward.get_config()
  config.model = common.model("smollm2", rank=16)
  config.data = common.data(
    f"{harmless}/train.jsonl + pandalm:{helpful}/train.jsonl",
    f"pandalm:{helpful}/dev.jsonl",
    length=384,
    batch_size=16,
  )
  config.data.invalid = "skip"  # six responses in pandalm_human's dev.jsonl are booleans
  config.votes = "soft"  # the share of annotators
  config.optimizer = common.optimizer(3e-4)
  config.loop = common.loop(137, checkpoint_every=20)  # an epoch
  return config
