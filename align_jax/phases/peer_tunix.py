"""Tunix's side of the peer benchmark: its Llama and its trainers, in their own loop, a constant apart.

Nothing else here knows Tunix, and nothing here is imported unless it is installed. Its trainers compile a
step for every shape they meet, so that rows are as long as the longest record: one shape, as its own
tokenising makes them.
"""

import functools
import importlib.metadata
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params as llama_params
from tunix.sft import peft_trainer
from tunix.sft.dpo import dpo_trainer

from align_jax.errors import InputError
from align_jax.phases import peer_config, peer_ours
from align_jax.phases.peer_config import Place
from align_jax.phases.peer_process import Channel
from align_jax.training import optimizer, workdir

_ROPE = llama.apply_rope
# What Tunix calls the numbers that are compared.
_NAMES = {
  "loss": "loss",
  "logps/chosen": "log_probs/chosen",
  "logps/rejected": "log_probs/rejected",
}


def serve(place: Place, name: str, channel: Channel, devices) -> None:
  """Trains as `trainer.train()` does; between passes its iterator of batches waits for the parent."""
  mesh = jax.sharding.Mesh(np.array(devices).reshape(-1, 1), ("fsdp", "tp"))
  task, tokens = place.config.tasks[name], workdir.read_json(place.tokens(name))
  make = {"sft": _demonstrations, "dpo": _pairs}[task.phase]
  parts = make(tokens, task.data.batch_size)
  with mesh:
    trainer = _trainer(place, task.phase, mesh)
    trainer.train(_turns(trainer, task.phase, parts, channel, place, devices))


def _trainer(place: Place, phase: str, mesh):
  config = place.config
  model = _load(place, mesh)
  tx = optimizer.make_optimizer(config.optimizer, peer_ours.STEPS)
  if phase == "sft":
    trainer = peft_trainer.PeftTrainer(model, tx, peft_trainer.TrainingConfig(eval_every_n_steps=1))
    return trainer.with_gen_model_input_fn(_causal)
  settings = dpo_trainer.DPOTrainingConfig(eval_every_n_steps=1, beta=peer_config.BETA)
  return dpo_trainer.DPOTrainer(model, _load(place, mesh), tx, settings)


def _load(place: Place, mesh):
  """Its Llama with the weights of the model folder, in the type that it computes in."""
  found = workdir.read_json(pathlib.Path(place.model) / "config.json")
  scaled = (found.get("rope_scaling") or {}).get("rope_type", "default") != "default"
  if found["model_type"] != "llama" or scaled:
    raise InputError("config.peers: tunix is measured with Llama models without rope scaling only")
  config = llama.ModelConfig(
    num_layers=found["num_hidden_layers"],
    vocab_size=found["vocab_size"],
    embed_dim=found["hidden_size"],
    hidden_dim=found["intermediate_size"],
    num_heads=found["num_attention_heads"],
    head_dim=found["head_dim"],
    num_kv_heads=found["num_key_value_heads"],
    rope_theta=found["rope_theta"],
    norm_eps=found["rms_norm_eps"],
    weight_tying=found["tie_word_embeddings"],
    remat_config=llama.RematConfig[_remat(place)],
  )
  # Tunix 0.1.7 rotates by its default of 1,000,000 whatever its config says: both sides must agree.
  llama.apply_rope = functools.partial(_ROPE, rope_theta=config.rope_theta)
  dtype = jnp.dtype(place.config.model.dtype)
  return llama_params.create_model_from_safe_tensors(place.model, config, mesh, dtype)


def _remat(place: Place) -> str:
  return "DECODER" if place.config.gradient_checkpointing else "NONE"


def _causal(batch) -> dict[str, Any]:
  """Rows are padded behind their tokens, which no token before them sees."""
  rows, length = batch.input_tokens.shape
  return {
    "input_tokens": batch.input_tokens,
    "input_mask": batch.input_mask,
    "positions": jnp.broadcast_to(jnp.arange(length), (rows, length)),
    "attention_mask": jnp.broadcast_to(jnp.tri(length, dtype=bool), (rows, length, length)),
  }


def _turns(trainer, phase: str, parts, channel: Channel, place: Place, devices) -> Iterator:
  """The batches of the checked updates, and then those of every pass that the parent asks for."""
  (check,) = parts["check"]
  yield from [check] * (peer_config.CHECKS + 1)  # it writes a step's metrics behind the next
  history = {
    name: trainer.metrics_logger.get_metric_history("", _NAMES[name], "train")
    for name in peer_ours.COMPARED[phase]
  }
  checks = [{name: float(x[i]) for name, x in history.items()} for i in range(peer_config.CHECKS)]
  versions = {"google-tunix": importlib.metadata.version("google-tunix"), "jax": jax.__version__}
  settings = {"remat": _remat(place), "versions": versions}
  jax.block_until_ready(nnx.state(trainer.model))
  channel.send({"check": checks, "settings": settings} | peer_ours.memory(devices))
  while channel.goes_on():
    start = time.perf_counter()
    yield from parts["pass"]
    jax.block_until_ready(nnx.state(trainer.model))
    seconds, places = time.perf_counter() - start, sum(_places(b) for b in parts["pass"])
    channel.send({"seconds": seconds, "padded_tokens": places} | peer_ours.memory(devices))


def _places(batch) -> int:
  """Token places of a batch: of pairs, of both rows."""
  if isinstance(batch, peft_trainer.TrainingInput):
    return batch.input_tokens.size
  return 2 * batch.prompt_ids.size + batch.chosen_ids.size + batch.rejected_ids.size


def _demonstrations(tokens, size: int) -> dict[str, list]:
  length = max(len(s["input_ids"]) for part in ("check", "pass") for s in tokens[part])

  def batch(rows):
    ids, _ = _padded([s["input_ids"] for s in rows], length)
    learned, _ = _padded([[int(t != -100) for t in s["labels"]] for s in rows], length)
    return peft_trainer.TrainingInput(ids, learned)

  return _in_batches(tokens, size, batch)


def _pairs(tokens, size: int) -> dict[str, list]:
  """Prompts stand at the right end of their places, answers at the left of theirs."""
  rows = tokens["check"] + tokens["pass"]
  prompt = max(len(s["prompt_ids"]) for s in rows)
  answer = max(len(s[name]) for s in rows for name in ("chosen_ids", "rejected_ids"))

  def batch(rows):
    reverse, mask = _padded([s["prompt_ids"][::-1] for s in rows], prompt)
    chosen = _padded([s["chosen_ids"] for s in rows], answer)
    rejected = _padded([s["rejected_ids"] for s in rows], answer)
    return dpo_trainer.TrainingInput(reverse[:, ::-1], mask[:, ::-1], *chosen, *rejected)

  return _in_batches(tokens, size, batch)


def _in_batches(tokens, size: int, make) -> dict[str, list]:
  return {
    part: [make(tokens[part][i : i + size]) for i in range(0, len(tokens[part]), size)]
    for part in ("check", "pass")
  }


def _padded(rows: list[list[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
  """(rows filled up with zeros behind, where they are real), int32 [N, length] each."""
  ids, mask = np.zeros((2, len(rows), length), np.int32)
  for i, row in enumerate(rows):
    ids[i, : len(row)] = row
    mask[i, : len(row)] = 1
  return ids, mask
