"""XPO (Xie et al. 2024): an answer of the policy against one of the reference, and a bonus to explore.

  python -m experiments.ppo --config=configs/xpo.py --workdir=runs/xpo \\
    --config.model.init=runs/sft --config.reward_model=runs/reward
"""

from ml_collections import config_dict

from configs import online


def get_config() -> config_dict.ConfigDict:
  config = online.online(batch_size=64, samples_per_prompt=1, steps=30, learning_rate=3e-4)
  config.online_preference = config_dict.create(
    name="xpo",
    beta=0.1,  # of DPO; the paper's
    alpha=1e-5,  # of the bonus; TRL 1e-5
    epochs=1,  # passes over the pairs of an iteration
    minibatches=2,  # optimizer steps a pass
    logits_chunk=config_dict.placeholder(int),  # time steps of logits at once; None: all
  )
  return config
