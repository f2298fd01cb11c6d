"""A real model on real preferences, on two CPU cores: SmolLM2-135M-Instruct with LoRA.

  python -m experiments.pipeline --config=configs/smollm2.py:FOLDER --workdir=runs/smollm2

FOLDER holds train.jsonl and dev.jsonl with instruction, input, chosen, rejected; it is by default
polite_prefs_tiny of the folder that the environment variable ALIGN_JAX_DATA names.  Reward model, DPO and
PPO against that reward model take under 25 minutes each; policies are scored by the reward model.
"""

import os

from ml_collections import config_dict

from configs import common, evaluate, ppo, preference, reward

COLUMNS = "prompt=instruction+input"
LENGTH = 96  # tokens of prompt and response; 99 % of the rows fit


def get_config(folder: str = "") -> config_dict.ConfigDict:
  folder = folder or os.path.join(os.environ.get("ALIGN_JAX_DATA", ""), "polite_prefs_tiny")
  config = config_dict.ConfigDict()
  config.start = "smollm2"
  config.sft = config_dict.placeholder(dict)  # the model is instruction-tuned already
  config.reward = _pairs(reward.get_config(), folder, steps=30)
  config.preference = config_dict.create(dpo=_pairs(preference.get_config(), folder, steps=30))
  config.preference.dpo.model.logits_chunk = 128
  config.ppo = _ppo(folder)
  config.evaluation = _evaluation(os.path.join(folder, "dev.jsonl"), limit=48)
  config.evaluation.scorer = "reward:@reward"
  config.reward_evaluation = _evaluation(os.path.join(folder, "dev.jsonl"), limit=111)
  return config


def _pairs(config, folder: str, steps: int):
  config.model = common.model("smollm2", rank=8)
  config.data = common.data(
    os.path.join(folder, "train.jsonl"),
    os.path.join(folder, "dev.jsonl"),
    length=LENGTH,
    batch_size=8,
  )
  config.data.columns = COLUMNS
  config.data.eval_limit = 64
  config.optimizer = common.optimizer(2e-4)
  config.loop = common.loop(steps, checkpoint_every=10)
  return config


def _ppo(folder: str):
  config = ppo.get_config()
  config.model = common.model("smollm2", rank=8)
  config.reward_model = "@reward"
  config.prompts.train = os.path.join(folder, "train.jsonl")
  config.prompts.columns = COLUMNS
  config.prompts.batch_size = 16
  config.prompts.max_length = 80
  del config.rewards.gold  # which judges the microworld only
  config.sampling.max_new_tokens = 32
  config.policy_gradient.epochs = 1
  config.policy_gradient.minibatches = 2
  config.optimizer = common.optimizer(2e-4, schedule="constant")
  config.loop = common.loop(10, checkpoint_every=5)
  return config


def _evaluation(data: str, limit: int):
  config = evaluate.get_config()
  config.data = data
  config.columns = COLUMNS
  config.limit = limit
  config.max_new_tokens = 48
  config.temperature = 0.7  # what one would chat with; KL is of the tempered distributions
  config.max_prompt_length = 80
  config.length = LENGTH
  config.batch_size = 16
  return config
