"""Evaluation on held-out microworld prompts by the gold judge, against the model it started from.

  python -m experiments.evaluate --config=configs/evaluate.py --config.reference=runs/sft --workdir=runs/dpo

For a reward model, `data` are preference pairs and no reference is needed.
"""

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  config = config_dict.ConfigDict()
  config.data = "microworld:n=512,split=heldout,draw=2"  # prompts, or pairs for a reward model
  config.policy = config_dict.placeholder(str)  # None: the workdir itself
  config.reference = config_dict.placeholder(str)  # win rate and KL are measured against it
  # the microworld's judge, "reward:<workdir of a reward model>", or "rewards": those of the next line
  config.scorer = "gold"
  config.rewards = config_dict.ConfigDict()  # as in configs/online.py
  config.columns = config_dict.placeholder(str)  # foreign columns: "prompt=question"
  config.chat = True  # plain-text prompts are wrapped in the chat template
  config.limit = config_dict.placeholder(int)
  config.max_new_tokens = 24
  config.max_prompt_length = 32  # longer prompts lose their beginning
  config.length = 46  # tokens a row of preference pairs
  config.temperature = 1.0
  config.batch_size = 128
  config.seed = 0
  config.dtype = "float32"
  # Best-of-n as well: for these n, from best_of_samples (at most batch_size) to a prompt, chosen by the
  # selector ("gold", or "reward:<workdir>") and reported by the scorer.
  config.best_of = ()  # (1, 2, 4, 8, 16)
  config.best_of_samples = config_dict.placeholder(int)  # a few times the largest n
  config.selector = config_dict.placeholder(str)
  config.mesh = common.mesh()
  return config
