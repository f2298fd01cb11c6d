r"""An audit of a reward model on microworld pairs, and on samples of the policies that were trained on it.

  python -m experiments.audit --config=configs/audit.py:runs/quickstart --workdir=runs/audit

On files, here human preferences with three votes a pair; without later policies, and with the features
of the text:

  python -m experiments.audit --config=configs/audit.py:files --workdir=runs/audit_pandalm \
    --config.scorer=runs/smollm2_rm --config.data=pandalm_human/dev.jsonl --config.columns=pandalm \
    --config.invalid=skip --config.categories="('motivation_app',)"
"""

from ml_collections import config_dict

from configs import common


def get_config(runs: str = "runs/quickstart") -> config_dict.ConfigDict:
  config = config_dict.ConfigDict()
  # "<workdir of a reward model>", "implicit:<workdir of a preference run>", "longer"
  config.scorer = f"{runs}/reward"
  config.data = "microworld:n=2048,split=heldout,draw=3"  # preference pairs, or a file of them
  config.columns = config_dict.placeholder(str)  # foreign columns: "pandalm", "prompt=question"
  config.categories = ()  # columns of a file by which its pairs are grouped
  config.limit = config_dict.placeholder(int)
  config.invalid = "raise"  # or "skip": bad rows are left out and counted
  config.chat = True  # plain-text prompts are wrapped in the chat template
  config.length = 48  # tokens a row; longer texts are cut as in training
  config.text_features = False  # regress on surface marks of the text; for files
  config.length_bins = 6
  config.gain_width = 4  # tokens a bin, for gains at equal length; 20 for real texts
  config.drift = config_dict.create(
    policies=tuple(f"{runs}/{name}" for name in ("sft", "dpo", "ipo", "kto", "ppo")),
    prompts="microworld:n=512,split=heldout,draw=2",
    columns=config_dict.placeholder(str),
    chat=True,
    limit=config_dict.placeholder(int),
    samples_per_prompt=4,
    max_new_tokens=24,
    max_prompt_length=32,  # tokens; longer prompts lose their beginning
    temperature=1.0,
  )
  config.batch_size = 128
  config.seed = 0  # of samples, bootstraps and splits
  config.dtype = "float32"
  config.mesh = common.mesh()
  return _files(config) if runs == "files" else config


def _files(config):
  config.scorer = "longer:smollm2"  # or a reward model
  config.data = "pairs.jsonl"
  config.length = 512
  config.batch_size = 16
  config.text_features = True
  config.gain_width = 20
  config.drift = config_dict.placeholder(config_dict.ConfigDict)
  return config
