"""Online DPO (OAIF, Guo et al. 2024): the best and the worst of the policy's own answers make a pair.

  python -m experiments.ppo --config=configs/online_dpo.py --workdir=runs/online_dpo \\
    --config.model.init=runs/sft --config.reward_model=runs/reward

Another loss on pairs: --config.online_preference.objective.name=ipo (or hinge, slic...).
"""

from ml_collections import config_dict

from configs import online, preference


def get_config() -> config_dict.ConfigDict:
  config = online.online(batch_size=32, samples_per_prompt=4, steps=30, learning_rate=3e-4)
  config.online_preference = config_dict.create(
    name="online_dpo",
    objective=preference.objective("dpo"),  # beta 0.1, as in OAIF
    epochs=1,  # passes over the pairs of an iteration
    minibatches=2,  # optimizer steps a pass
    logits_chunk=config_dict.placeholder(int),  # time steps of logits at once; None: all
  )
  return config
