"""GRPO (Shao et al. 2024) from an SFT checkpoint against a reward model, on the microworld: no critic.

  python -m experiments.ppo --config=configs/grpo.py --workdir=runs/grpo \\
    --config.model.init=runs/sft --config.reward_model=runs/reward
"""

from ml_collections import config_dict

from configs import online


def get_config() -> config_dict.ConfigDict:
  config = online.online(batch_size=16, samples_per_prompt=4, steps=30, learning_rate=3e-4)
  config.policy_gradient = online.policy_gradient("grpo")
  config.policy_gradient.average = "sequence"
  config.policy_gradient.kl.update(coef=0.05, place="loss", kind="k3")
  return config
