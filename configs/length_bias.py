"""Labels that favour the longer response, three reward models on them, and a policy on each.

  python -m experiments.length_bias --config=configs/length_bias.py --workdir=runs/length_bias

From a policy that there is already, which saves the first two minutes:

  python -m experiments.length_bias --config=configs/length_bias.py:runs/quickstart/sft \\
    --workdir=runs/length_bias
"""

from ml_collections import config_dict

from configs import common, evaluate, online, reward, sft


def get_config(start: str = "@sft") -> config_dict.ConfigDict:
  config = config_dict.ConfigDict()
  config.seed = 0  # of the labels and of samples
  config.start = start  # "@sft", trained first; or a trained policy
  config.sft = sft.get_config() if start == "@sft" else None
  config.labels = config_dict.create(
    train=12_000,  # pairs
    held_out=2048,
    flip_longer=0.3,  # share of labels that go to the longer side, whatever else is true
    temperature=0.68,  # of the labeller, before flips
    world=0,  # seed of the microworld
  )
  config.reward = reward.get_config()
  config.reward.model.init = start
  config.reward.data = common.data("labelled", None, length=46, batch_size=32)
  config.reward.loop = common.loop(600)
  config.debias = config_dict.create(correlation=1.0, orthogonality=1.0)  # of the two-head model
  # Advantages are divided by their deviation: the three rewards differ in scale.
  config.online = online.online(batch_size=16, samples_per_prompt=4, steps=40, learning_rate=5e-4)
  config.online.policy_gradient = online.policy_gradient("grpo")
  config.online.model.init = start
  config.online.reward_model = config_dict.placeholder(str)
  config.online.rewards = config_dict.ConfigDict()  # set for every policy
  config.evaluation = evaluate.get_config()
  config.length_bins = 6
  return config
