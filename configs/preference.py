"""Any preference objective from an SFT checkpoint: `--config.objective.name=ipo`, or "dpo + sft*0.2".

  python -m experiments.preference --workdir=runs/dpo --config.model.init=runs/sft

A setting of the objective left None takes that objective's default; one it does not use is an error.
"""

from ml_collections import config_dict

from configs import common


def _number():
  return config_dict.placeholder(float)


def objective(name: str) -> config_dict.ConfigDict:
  """An objective of the family with every setting at that objective's own default."""
  return config_dict.create(
    name=name,  # the README lists them; or a mixture by weight such as "dpo + sft*0.2"
    beta=_number(),  # strength of the implied KL penalty; 0.1, dpo_norm 5 (Tülu 3), simpo 2
    tau=_number(),  # ipo, ipo_mean: margins are pulled to 1 / (2 tau); 0.1
    label_smoothing=_number(),  # dpo, cdpo, robust, exo, aot: share of labels believed flipped
    gamma=_number(),  # simpo, alphapo: the margin that is asked for; 1
    alpha=_number(),  # r_dpo 0.01 a token; ld_dpo 0.5; tdpo 0.5; alphapo 0.1; f_dpo's alpha
    temperature=_number(),  # discopop; 0.05
    penalty=_number(),  # dpop: weight of falling below the reference; 50 (Smaug)
    delta=_number(),  # slic: the margin in nats; 1
    divergence=config_dict.placeholder(str),  # f_dpo: reverse_kl, forward_kl, js, alpha; js
    sft_weight=_number(),  # cpo 1, slic 0.1: weight of the likelihood of the chosen answer
    detach_chosen=config_dict.placeholder(bool),  # tdpo: True is TDPO2, False with alpha 1 TDPO1
    desirable_weight=_number(),  # kto; 1
    undesirable_weight=_number(),  # kto; 1
    wpo=False,  # pairs weighed by how likely the policy itself is to say them
    sync_every=0,  # TR-DPO: steps between moves of the reference, 512 there; 0 leaves it frozen
    sync_alpha=1.0,  # TR-DPO: how far it moves; 0.6 there
  )


def get_config() -> config_dict.ConfigDict:
  config = config_dict.ConfigDict()
  config.seed = 0
  config.model = common.model("runs/sft")
  config.data = common.data(
    "microworld:n=6000", "microworld:n=512,split=heldout,draw=1", length=46, batch_size=32
  )
  config.model.logits_chunk = 128
  config.objective = objective("dpo")
  config.optimizer = common.optimizer(3e-4)
  config.loop = common.loop(120, eval_every=60)
  config.records = "pairs"  # or "feedback", for kto: {"prompt", "completion", "label"}
  config.layout = (
    "shared"  # the prompt of a pair once, rows packed; or "padded": two whole rows a pair
  )
  config.reference = (
    "auto"  # log-probs "cached" on disk or "recomputed"; auto: cached where it can be
  )
  config.reference_cache = config_dict.placeholder(str)  # a folder to share; None: in the workdir
  config.reference_model = config_dict.placeholder(str)  # another policy; None: model.init itself
  config.reference_memory = "device"  # or "host": a recomputed reference is fetched layer by layer
  config.accumulate = 1
  config.mesh = common.mesh()
  return config
