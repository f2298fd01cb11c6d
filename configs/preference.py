"""DPO, IPO or KTO from an SFT checkpoint; `--config.objective.name=ipo` picks another objective.

  python -m experiments.preference --workdir=runs/dpo --config.model.init=runs/sft

A setting of the objective left None takes that objective's default; one it does not use is an error.
"""

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  config = config_dict.ConfigDict()
  config.seed = 0
  config.model = common.model("runs/sft")
  config.data = common.data(
    "microworld:n=6000", "microworld:n=512,split=heldout,draw=1", length=46, batch_size=32
  )
  config.objective = config_dict.create(
    name="dpo",  # dpo, ipo, kto
    beta=config_dict.placeholder(float),  # dpo, kto: strength of the implied KL penalty; 0.1
    tau=config_dict.placeholder(float),  # ipo: margins are pulled to 1 / (2 tau); 0.1
    label_smoothing=config_dict.placeholder(float),  # dpo: share of labels believed flipped; 0
    desirable_weight=config_dict.placeholder(float),  # kto; 1
    undesirable_weight=config_dict.placeholder(float),  # kto; 1
  )
  config.optimizer = common.optimizer(3e-4)
  config.loop = common.loop(120, eval_every=60)
  config.records = "pairs"  # or "feedback", for kto: {"prompt", "completion", "label"}
  config.accumulate = 1
  config.mesh = common.mesh()
  return config
