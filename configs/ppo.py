"""PPO as in InstructGPT (Ouyang et al. 2022) from an SFT checkpoint and a reward model, on the microworld.

  python -m experiments.ppo --workdir=runs/ppo \\
    --config.model.init=runs/sft --config.reward_model=runs/reward
"""

from ml_collections import config_dict

from configs import online


def get_config() -> config_dict.ConfigDict:
  config = online.online(batch_size=64, samples_per_prompt=1, steps=30, learning_rate=3e-4)
  config.policy_gradient = online.policy_gradient("gae")
  config.policy_gradient.gamma = 1.0
  config.policy_gradient.whiten_advantages = True
  config.policy_gradient.value = config_dict.create(
    lam=0.95,
    coef=0.1,  # OAI and N+ 0.1
    clip_eps=0.2,  # OAI and N+ 0.2
    warmup=0,  # iterations in which the value model alone learns
  )
  config.ema_decay = config_dict.placeholder(float)  # keep an average instead; InstructGPT 0.992
  config.value_optimizer = config_dict.placeholder(config_dict.ConfigDict)  # None: as the policy's
  return config
