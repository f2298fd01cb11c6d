"""RAFT (Dong et al. 2023): fine-tuning on the best of the policy's own answers to every prompt.

  python -m experiments.ppo --config=configs/raft.py --workdir=runs/raft \\
    --config.model.init=runs/sft --config.reward_model=runs/reward

ReST (Gulcehre et al. 2023) keeps what scores well, whatever the prompt: rejection.name=rest,
rejection.keep=None and rejection.quantile=0.75 (or a threshold).
"""

from ml_collections import config_dict

from configs import online


def get_config() -> config_dict.ConfigDict:
  config = online.online(batch_size=32, samples_per_prompt=8, steps=30, learning_rate=3e-4)
  config.rejection = config_dict.create(
    name="raft",
    keep=1,  # of the samples to a prompt
    threshold=config_dict.placeholder(float),  # of rest: this score and above, or
    quantile=config_dict.placeholder(float),  # of rest: from this quantile of an iteration on
    epochs=1,  # passes over what was kept
    minibatches=2,  # optimizer steps a pass
    logits_chunk=config_dict.placeholder(int),  # time steps of logits at once; None: all
  )
  return config
