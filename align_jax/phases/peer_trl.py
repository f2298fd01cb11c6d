"""TRL's side of the peer benchmark: its trainers, its loop and its collators, watched and not changed.

Nothing else here knows torch, and nothing here is imported unless TRL is installed.
"""

import importlib.metadata
import os
import time
from typing import Any

import numpy as np

from align_jax.phases import peer_config, peer_trl_policy
from align_jax.phases.peer_config import Place
from align_jax.phases.peer_process import Channel, cores, peak_bytes
from align_jax.training import workdir

PACKAGES = ("torch", "transformers", "trl", "accelerate")
_IDS = ("input_ids", "prompt_ids", "completion_ids")  # what a batch's tokens are called
# Of TRL's settings, those that decide how fast a step is.
_TOLD = (
  "gradient_checkpointing", "bf16", "optim", "max_length", "packing", "padding_free", "pad_to_multiple_of",
  "precompute_ref_log_probs", "dataloader_num_workers", "torch_compile", "use_liger_kernel",
  "activation_offloading", "loss_type", "logging_steps",
)  # fmt: skip


def serve(place: Place, name: str, channel: Channel) -> None:
  """Trains as `trainer.train()` does; between passes it waits for the parent's word."""
  os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
  os.environ.setdefault("HF_HUB_OFFLINE", "1")
  os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
  import torch

  torch.set_num_threads(cores())
  tokens = workdir.read_json(place.tokens(name))
  trainer, seen = _trainer(place, name, tokens)
  trainer.add_callback(_turns(trainer, seen, channel, place.config.batches))
  trainer.train()


class Seen:
  """What passed through `compute_loss`: losses on the device, and how many token places."""

  def __init__(self):
    self.losses, self.places = [], []


def _trainer(place: Place, name: str, tokens: dict[str, Any]):
  import datasets
  import transformers

  datasets.disable_progress_bars()
  config, task = place.config, place.config.tasks[name]
  tokenizer = transformers.AutoTokenizer.from_pretrained(place.model)
  if tokens["pad_id"] is not None:
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(tokens["pad_id"])
  trainer, settings = _classes(task.phase)
  seen, rewards = Seen(), {}
  rows = tokens["check"] * peer_config.CHECKS + tokens["pass"] * (config.repeats + 1)
  watched = _watched(trainer, seen)
  if task.phase == "policy":
    rows, rewards = peer_trl_policy.numbered(rows), {"reward_funcs": peer_trl_policy.unused}
    watched = peer_trl_policy.without_sampling(watched)
  made = watched(
    model=place.model,
    args=settings(**_arguments(place, name) | _own_arguments(task)),
    train_dataset=datasets.Dataset.from_list(rows),
    processing_class=tokenizer,
    **rewards,
  )
  made.remove_callback(transformers.PrinterCallback)
  if task.phase == "reward":
    _set_head(made.model, np.load(place.head))
  return made, seen


def _classes(phase: str):
  import trl

  return {
    "sft": (trl.SFTTrainer, trl.SFTConfig),
    "reward": (trl.RewardTrainer, trl.RewardConfig),
    "dpo": (trl.DPOTrainer, trl.DPOConfig),
    "policy": (trl.GRPOTrainer, trl.GRPOConfig),
  }[phase]


def _own_arguments(task: peer_config.PeerTask) -> dict[str, Any]:
  """What a phase alone has."""
  if task.phase == "policy":
    return peer_trl_policy.arguments(task.data.batch_size)
  own = {"max_length": task.data.length}
  return own | ({"beta": peer_config.BETA} if task.phase == "dpo" else {})


def _arguments(place: Place, name: str) -> dict[str, Any]:
  """What both sides must have alike, and where things go; all else is TRL's default."""
  import torch

  config, task = place.config, place.config.tasks[name]
  on_cpu, rule = not torch.cuda.is_available(), config.optimizer
  return dict(
    output_dir=str(place.folder / "trl"),
    max_steps=peer_config.CHECKS + config.batches * (config.repeats + 1),
    per_device_train_batch_size=task.data.batch_size,
    learning_rate=rule.learning_rate,
    lr_scheduler_type="constant",
    adam_beta1=rule.b1,
    adam_beta2=rule.b2,
    adam_epsilon=rule.eps,
    weight_decay=rule.weight_decay,
    max_grad_norm=rule.grad_clip,
    model_init_kwargs={"dtype": "float32"},  # with bf16 the computation is, by autocast
    bf16=config.model.dtype == "bfloat16",
    gradient_checkpointing=config.gradient_checkpointing,
    train_sampling_strategy="sequential",  # the rows are shuffled already
    use_cpu=on_cpu,
    dataloader_pin_memory=not on_cpu,
    report_to="none",
    save_strategy="no",
    disable_tqdm=True,
  )


def _watched(trainer, seen: Seen):
  """`trainer` on rows that are tokenised, which writes down what passes through `compute_loss`."""

  class Watched(trainer):
    def _prepare_dataset(self, dataset, *args, **kwargs):
      return dataset

    def compute_loss(self, model, inputs, *args, **kwargs):
      ids = [inputs[name] for name in _IDS if name in inputs]
      seen.places.append(sum(x.numel() for x in ids))
      loss = super().compute_loss(model, inputs, *args, **kwargs)
      seen.losses.append(loss.detach())
      return loss

  return Watched


def _set_head(model, kernel: np.ndarray) -> None:
  import torch

  with torch.no_grad():
    model.score.weight.copy_(torch.from_numpy(kernel)[None])


def _turns(trainer, seen: Seen, channel: Channel, batches: int):
  """A callback that reports the checked updates, and then stops the clock behind every pass."""
  import transformers

  checks, started = [], [0.0]

  class Turns(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
      if state.global_step <= peer_config.CHECKS:
        checks.append(_compared(trainer, seen))
        if state.global_step < peer_config.CHECKS:
          return
        channel.send({"check": checks, "settings": _settings(trainer)} | memory())
      elif (state.global_step - peer_config.CHECKS) % batches == 0:
        wait()
        seconds = time.perf_counter() - started[0]
        channel.send({"seconds": seconds, "padded_tokens": sum(seen.places[-batches:])} | memory())
      else:
        return
      if not channel.goes_on():
        control.should_training_stop = True
      started[0] = time.perf_counter()

  return Turns()


def _compared(trainer, seen: Seen) -> dict[str, float]:
  """The newest step's loss, and the means of what its trainer logs of both answers."""
  logged = {k: v[-1] for k, v in trainer._metrics["train"].items() if v}
  found = {"loss": float(seen.losses[-1])}
  if "logps/chosen" in logged:
    found |= {name: logged[name] for name in ("logps/chosen", "logps/rejected")}
  elif "mean_reward" in logged:
    mean, half = logged["mean_reward"], logged["margin"] / 2
    found |= {"rewards/chosen": mean + half, "rewards/rejected": mean - half}
  return found


def _settings(trainer) -> dict[str, Any]:
  """The settings that decide how fast a step is, TRL's defaults among them, and the versions."""
  import torch

  found = {name: getattr(trainer.args, name) for name in _TOLD if hasattr(trainer.args, name)}
  found["attention"] = trainer.model.config._attn_implementation
  found["threads"] = torch.get_num_threads()
  found["collator_pads_to"] = getattr(trainer.data_collator, "pad_to_multiple_of", None)
  known = (str, int, float, bool, list, type(None))
  found = {k: v if isinstance(v, known) else str(v) for k, v in found.items()}
  return found | {"versions": {name: importlib.metadata.version(name) for name in PACKAGES}}


def wait() -> None:
  """Until the device has done what it was told."""
  import torch

  if torch.cuda.is_available():
    torch.cuda.synchronize()


def memory() -> dict[str, int | None]:
  """Peaks of this process so far: resident on the host, and on a GPU."""
  import torch

  device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
  return {"peak_bytes": peak_bytes(), "peak_device_bytes": device}
