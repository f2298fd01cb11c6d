"""Nash-MD (Munos et al. 2023): to win against the mixture of oneself and the reference, near the latter.

  python -m experiments.ppo --config=configs/nash_md.py --workdir=runs/nash_md \\
    --config.model.init=runs/sft --config.reward_model=runs/reward
"""

from ml_collections import config_dict

from configs import online


def get_config() -> config_dict.ConfigDict:
  config = online.online(batch_size=64, samples_per_prompt=2, steps=30, learning_rate=3e-4)
  config.online_preference = config_dict.create(
    name="nash_md",
    beta=0.02,  # of the KL to the reference; a win is worth 1/2
    mixture=0.5,  # the reference's share of the opponent; 0 is self-play
    epochs=1,  # passes over the responses of an iteration
    minibatches=2,  # optimizer steps a pass
    logits_chunk=config_dict.placeholder(int),  # time steps of logits at once; None: all
  )
  return config
