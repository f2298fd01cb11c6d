"""TRL's trainers, run for ten steps on a tiny Llama; what they fed the model and the losses they took.

Only the trainers' own code computes a loss here. They are watched through `compute_loss`.
"""

import dataclasses
import os
import pathlib

import numpy as np
import pytest

from align_jax.training.optimizer import OptimizerConfig

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # trainers report that they were started

STEPS, BATCH = 10, 4
# Adam divides a gradient by its size: with a smaller eps the rounding of one that is zero is a step.
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, schedule="constant", warmup_fraction=0.0, eps=1e-6)
ARCHITECTURE = dict(
  hidden_size=32,
  intermediate_size=64,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=256,
  initializer_range=0.2,  # logits that differ, so that log-probs do
  attention_dropout=0.0,
  attn_implementation="eager",
)


@dataclasses.dataclass(frozen=True)
class Run:
  """Loss and gradient norm [STEPS] before each update, and the tensors of each step in NumPy."""

  losses: np.ndarray
  grad_norms: np.ndarray
  batches: list[dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Trl:
  """The trainers over one pair of saved models: the policy to start from and another reference."""

  policy: str
  ref: str
  tokenizer: object
  workdir: str
  steps = STEPS
  batch = BATCH
  optimizer = OPTIMIZER

  def dpo(self, rows, **settings) -> Run:
    from trl import DPOConfig, DPOTrainer

    return self._train(DPOTrainer, DPOConfig, rows, settings, ref_model=self.load(self.ref))

  def lora_dpo(self, rows, model, **settings) -> Run:
    """With an adapted `model`, which is its own reference without its adapter."""
    from trl import DPOConfig, DPOTrainer

    return self._train(DPOTrainer, DPOConfig, rows, settings, model=model)

  def kto(self, rows, **settings) -> Run:
    from trl import KTOConfig, KTOTrainer

    return self._train(KTOTrainer, KTOConfig, rows, settings, ref_model=self.load(self.ref))

  def reward(self, rows, model, **settings) -> Run:
    from trl import RewardConfig, RewardTrainer

    return self._train(RewardTrainer, RewardConfig, rows, settings, model=model)

  def cpo(self, rows, **settings) -> Run:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    return self._train(CPOTrainer, CPOConfig, rows, settings)

  def orpo(self, rows, **settings) -> Run:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return self._train(ORPOTrainer, ORPOConfig, rows, settings)

  def load(self, folder: str, kind: str = "AutoModelForCausalLM", **changes):
    import torch
    import transformers

    return getattr(transformers, kind).from_pretrained(
      folder, dtype=torch.float32, attn_implementation="eager", **changes
    )

  def _train(self, trainer, config, rows, settings, *, model=None, **models) -> Run:
    import datasets
    import transformers

    datasets.disable_progress_bars()
    seen = Run([], None, [])
    made = watched(trainer, seen)(
      model=self.load(self.policy) if model is None else model,
      args=config(**arguments(self.workdir) | settings),
      train_dataset=datasets.Dataset.from_list(rows),
      processing_class=self.tokenizer,
      **models,
    )
    made.remove_callback(transformers.PrinterCallback)
    made.train()
    parts = made.args.gradient_accumulation_steps
    losses = np.array(seen.losses).reshape(-1, parts).mean(axis=1)
    norms = [float(log["grad_norm"]) for log in made.state.log_history if "grad_norm" in log]
    assert len(losses) == len(norms) == STEPS
    return Run(losses, np.array(norms), seen.batches)


def arguments(workdir: str) -> dict:
  """float32 on CPU, in the order given, AdamW at a constant rate and without decay."""
  return dict(
    output_dir=workdir,
    max_steps=STEPS,
    per_device_train_batch_size=BATCH,
    learning_rate=OPTIMIZER.learning_rate,
    lr_scheduler_type=OPTIMIZER.schedule,
    optim="adamw_torch",
    adam_beta1=OPTIMIZER.b1,
    adam_beta2=OPTIMIZER.b2,
    adam_epsilon=OPTIMIZER.eps,
    weight_decay=OPTIMIZER.weight_decay,
    max_grad_norm=OPTIMIZER.grad_clip,
    train_sampling_strategy="sequential",
    gradient_checkpointing=False,
    bf16=False,
    use_cpu=True,
    dataloader_pin_memory=False,
    report_to="none",
    save_strategy="no",
    logging_steps=1,
    disable_tqdm=True,
  )


def watched(trainer, seen: Run):
  """`trainer`, which writes into `seen` what passes through `compute_loss`."""

  class Watched(trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
      seen.batches.append({k: v.numpy() for k, v in inputs.items() if hasattr(v, "numpy")})
      loss = super().compute_loss(model, inputs, *args, **kwargs)
      seen.losses.append(float(loss.detach()))
      return loss

  return Watched


@pytest.fixture(scope="session")
def trl_runs(tmp_path_factory) -> Trl:
  """The trainers over a random policy and a reference some way from it."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  pytest.importorskip("trl")
  from align_jax import worlds

  root = pathlib.Path(tmp_path_factory.mktemp("trl"))
  tokenizer = worlds.Microworld().tokenizer()
  config = transformers.LlamaConfig(
    vocab_size=len(tokenizer),
    bos_token_id=tokenizer.bos_token_id,
    eos_token_id=tokenizer.eos_token_id,
    pad_token_id=tokenizer.pad_token_id,
    **ARCHITECTURE,
  )
  torch.set_num_threads(1)  # on a busy machine the threads of so small a model mostly wait
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
  model.save_pretrained(root / "policy")
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.02 * torch.randn_like(parameter))
  model.save_pretrained(root / "ref")
  return Trl(str(root / "policy"), str(root / "ref"), tokenizer, str(root / "work"))
