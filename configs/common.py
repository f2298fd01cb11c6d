"""Sections that several config files share."""

from ml_collections import config_dict


def lora(rank: int = 0):
  config = config_dict.ConfigDict()
  config.rank = rank  # 0 trains all weights
  config.alpha = 32.0  # the adapter is scaled by alpha / rank
  config.targets = ("query", "key", "value", "out", "gate", "up", "down")
  config.base_dtype = "float32"  # of the frozen matrices under the adapters; or int8
  return config


def model(init: str, *, rank: int = 0, remat: str = "dots"):
  config = config_dict.ConfigDict()
  config.init = init  # "scratch", a name ("smollm2"), a Hugging Face folder, or a phase's workdir
  config.lora = lora(rank)
  config.dtype = "float32"  # of activations; weights stay float32
  config.remat = remat  # recomputed in the backward pass: none, dots, full
  config.logits_chunk = config_dict.placeholder(int)  # time steps of logits at once; None: all
  config.attention = "auto"  # or xla (all scores at once), splash (TPU), blockwise (any platform)
  return config


def microworld_model():
  """0.8 M parameters: learns the microworld in about two minutes on two CPU cores."""
  config = model("scratch")
  config.scratch = config_dict.create(
    tokenizer="microworld",
    layers=4,
    embed_dim=128,
    heads=4,
    kv_heads=4,
    mlp_dim=384,
    max_length=64,
  )
  return config


def data(train: str, eval: str | None, *, length: int, batch_size: int):
  config = config_dict.ConfigDict()
  config.train = train  # a file, a folder, hf:org/name:split, "microworld:n=..."; or "A*2 + B*1"
  config.eval = config_dict.placeholder(str)
  if eval:
    config.eval = eval
  config.length = length  # tokens a row
  config.batch_size = batch_size  # rows a step, over all hosts
  config.columns = config_dict.placeholder(
    str
  )  # foreign columns: "prompt=instruction+input,chosen=good"
  config.limit = config_dict.placeholder(int)  # at most so many training records
  config.eval_limit = config_dict.placeholder(int)
  config.invalid = "raise"  # or "skip": bad rows are left out and counted
  config.chat = True  # plain-text prompts are wrapped in the chat template
  config.buckets = config_dict.placeholder(tuple)  # row lengths to choose from
  return config


def optimizer(learning_rate: float, *, weight_decay: float = 0.0, schedule: str = "cosine"):
  return config_dict.create(
    name="adamw",
    learning_rate=learning_rate,
    schedule=schedule,  # after warm-up: constant, linear, cosine
    warmup_fraction=0.05,  # of all steps
    final_fraction=0.1,  # of the peak rate, at the end
    b1=0.9,
    b2=0.95,
    eps=1e-8,
    weight_decay=weight_decay,  # matrices only
    grad_clip=1.0,  # global norm
    moment_dtype="float32",  # of adamw's first moment; bfloat16 halves it
  )


def loop(steps: int, *, eval_every: int = 0, checkpoint_every: int = 0):
  return config_dict.create(
    steps=steps,
    eval_every=eval_every,  # 0: first and last step only
    checkpoint_every=checkpoint_every,  # 0: at the end only
    keep=2,  # newest checkpoints preserved
    keep_every=0,  # and those of every so many steps; 0: no others
    checkpoints="",  # where they go, a folder or a bucket (gs://...); "": into the workdir
    spike="warn",  # a loss that leaps: warn, stop or off
    stuck="warn",  # a loss that stays where it was before anything was learned
  )


def mesh():
  # -1: all devices that are left; context splits the time of long rows
  return config_dict.create(data=1, fsdp=-1, tensor=1, context=1)
