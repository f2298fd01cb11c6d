"""The share of a PPO step that is spent sampling, on SmolLM2-135M with LoRA and a critic.

  python -m experiments.benchmark --config=configs/benchmark_online.py --workdir=runs/benchmark_online

Word problems made by code, scored by their answer; the critic starts from the policy. Some three minutes on
two CPU cores.
"""

from ml_collections import config_dict

from configs import common, ppo


def get_config() -> config_dict.ConfigDict:
  config = config_dict.ConfigDict()
  config.online = ppo.get_config()
  config.online.model = common.model("smollm2", rank=8)
  config.online.reward_model = config_dict.placeholder(str)
  config.online.prompts.update(train="arithmetic:n=256", batch_size=32, max_length=64)
  config.online.sampling.update(max_new_tokens=32)
  config.online.rewards = config_dict.create(correct=config_dict.create(kind="numeric", weight=1.0))
  config.online.policy_gradient.update(epochs=1, minibatches=2, logits_chunk=32)
  config.online.loop = common.loop(4)
  return config
