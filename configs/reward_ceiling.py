"""A reward model at the ceiling of its labels: what it takes on the microworld, in half an hour.

  python -m experiments.pipeline --config=configs/reward_ceiling.py --workdir=runs/ceiling

No model can agree with more than mean max(p, 1 - p) of labels that a labeller gives with probability p.
The small trunk of configs/sft.py stays below, as it can neither copy nor reckon well enough to judge
others who do; this one has six layers and sees nine times the demonstrations, and every comparison
carries the votes of 16 labellers.
"""

from ml_collections import config_dict

from configs import evaluate, reward, sft


def get_config() -> config_dict.ConfigDict:
  config = config_dict.ConfigDict()
  config.start = "@sft"
  config.sft = sft.get_config()
  config.sft.model.scratch.layers = 6
  config.sft.data.update(train="microworld:n=100000,draw=3", batch_size=32)
  config.sft.optimizer.learning_rate = 2e-3
  config.sft.loop.update(steps=3000, eval_every=500)
  config.reward = reward.get_config()
  config.reward.model.init = "@sft"
  config.reward.data.update(train="microworld:n=60000,draw=11,votes=16", batch_size=64)
  config.reward.optimizer.learning_rate = 1e-3
  config.reward.loop.update(steps=1870, eval_every=374)
  config.preference = config_dict.ConfigDict()
  config.ppo = config_dict.placeholder(config_dict.ConfigDict)
  config.evaluation = evaluate.get_config()
  config.reward_evaluation = evaluate.get_config()
  config.reward_evaluation.data = "microworld:n=4096,split=heldout,draw=77"
  return config
