"""`generate` of transformers, which TRL samples with, next to our sampler."""

import importlib.metadata
import os
import time
from typing import Any

from align_jax.phases.peer_config import GREEDY, Place, compared
from align_jax.phases.peer_process import Channel, cores
from align_jax.phases.peer_trl import memory, wait
from align_jax.training import workdir


def serve(place: Place, name: str, channel: Channel) -> None:
  """Answers the parent until it says stop: first greedy responses to compare, then passes."""
  os.environ.setdefault("HF_HUB_OFFLINE", "1")
  import torch
  import transformers

  torch.set_num_threads(cores())
  config = place.config
  model = transformers.AutoModelForCausalLM.from_pretrained(
    place.model, dtype=getattr(torch, config.model.dtype)
  )
  model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
  model.generation_config.eos_token_id = None  # no token ends a response before its time
  requests = workdir.read_json(place.tokens(name))
  rows = config.tasks[name].data.batch_size
  settings = {"rows": rows, "attention": model.config._attn_implementation}
  settings["versions"] = {p: importlib.metadata.version(p) for p in ("torch", "transformers")}
  check = _greedy(model, requests["check"])
  _pass(model, requests["pass"], rows)  # as often as ours, which compiles
  channel.send({"check": [check], "settings": settings} | memory())
  while channel.goes_on():
    start = time.perf_counter()
    _pass(model, requests["pass"], rows)
    wait()
    channel.send({"seconds": time.perf_counter() - start} | memory())


def _pass(model, requests: list[dict[str, Any]], rows: int) -> None:
  """Batches in the requests' order, each until its longest response has ended."""
  for start in range(0, len(requests), rows):
    batch = requests[start : start + rows]
    longest = max(r["new_tokens"] for r in batch)
    out = _generate(model, batch, longest, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    if out.shape[1] - longest != max(len(r["prompt_ids"]) for r in batch):
      raise RuntimeError("responses are not as long as they were asked to be")


def _greedy(model, requests: list[dict[str, Any]]) -> dict[str, float]:
  """What is compared: every response's mean negative log-prob, by the logits it was chosen from."""
  import torch

  options = {"return_dict_in_generate": True, "output_logits": True}
  out = _generate(model, requests, GREEDY, do_sample=False, **options)
  logprobs = torch.stack(out.logits, dim=1).float().log_softmax(dim=-1)  # [B, N, V]
  chosen = logprobs.gather(-1, out.sequences[:, -GREEDY:, None])[..., 0]
  return compared(chosen.cpu().numpy())


def _generate(model, requests: list[dict[str, Any]], count: int, **options):
  """`count` tokens for every request, prompts padded on the left."""
  import torch

  width = max(len(r["prompt_ids"]) for r in requests)
  ids = torch.zeros((len(requests), width), dtype=torch.long)
  mask = torch.zeros_like(ids)
  for row, real, request in zip(ids, mask, requests):
    row[width - len(request["prompt_ids"]) :] = torch.tensor(request["prompt_ids"])
    real[width - len(request["prompt_ids"]) :] = 1
  with torch.inference_mode():
    return model.generate(
      ids.to(model.device),
      attention_mask=mask.to(model.device),
      max_new_tokens=count,
      pad_token_id=0,
      **options,
    )
