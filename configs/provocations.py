"""What mode collapse and growing answers look like, when they are asked for; and a run that is well.

  python -m experiments.sweep --config=configs/online_sweep.py --workdir=runs/online_sweep
  python -m experiments.sweep --config=configs/provocations.py:runs/online_sweep \\
    --workdir=runs/provocations
  python -m experiments.dashboard --output=runs/provocations \
    --workdirs=runs/provocations/well/seed0,runs/provocations/phrase/seed0

Model and reward model are those that a sweep has trained already. The limits are the same for all.

  well    the reward model with a KL penalty: no limit is passed.
  phrase  is paid for one answer and nothing else: all prompts get it, and the limit on distinct
          responses ends the run. (Paid for any answer that contains the phrase, a policy still varies
          what it adds: then it is the share of distinct bigrams that falls.)
  wordy   learns without a KL penalty from labellers who like an answer better by `length_bias` gold
          rewards a word: its answers grow.
  length  is paid by the token: answers never end, and the limit on the share that ends stops the run.
"""

from ml_collections import config_dict

from configs import evaluate, online_sweep, reward

FREE = {
  "policy_gradient": {"kl": {"coef": 0.0}},
  "optimizer": {"learning_rate": 2e-3},
}
VARIANTS = {
  "well": {},
  "phrase": {
    "rewards": {
      "model": {"weight": 0.0},
      "phrase": {"kind": "regex", "text": r"sorry, i can not say\.", "weight": 1.0},
    },
  }
  | FREE,
  "wordy": {"reward_model": "@biased"} | FREE,
  "length": {
    "rewards": {"model": {"weight": 0.0}, "length": {"kind": "length", "weight": 0.1}},
    "shaping": {"missing_eos_penalty": 0.0},  # which would pay for the end
  }
  | FREE,
}


def get_config(trained: str = "runs/online_sweep") -> config_dict.ConfigDict:
  config = config_dict.ConfigDict()
  config.start = f"{trained}/sft"
  config.sft = None
  config.reward_models = config_dict.create(biased=reward.get_config())
  config.reward_models.biased.model.init = config.start
  config.reward_models.biased.data.train = "microworld:n=6000,length_bias=0.4"
  config.online = online_sweep.base(steps=40, learning_rate=1e-3, kl_coef=0.1)
  config.online.model.init = config.start
  config.online.reward_model = f"{trained}/reward"
  # Of 4 responses to a prompt; 0.25 is one answer to each, and a limit of 0.25 is never passed.
  config.online.stops.update(distinct_min=0.3, eos_rate_min=0.5, patience=3)
  config.variants = config_dict.ConfigDict(VARIANTS)
  config.grid = config_dict.ConfigDict()
  config.seeds = (0,)
  config.evaluation = evaluate.get_config()
  config.baseline = "well"
  config.metric = "gain"
  config.processes = 2
  return config
