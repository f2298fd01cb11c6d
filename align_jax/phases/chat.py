"""Talk to a checkpoint in the terminal."""

import dataclasses
from collections.abc import Callable

import jax

from align_jax import data, sampling, sharding
from align_jax.errors import InputError
from align_jax.phases import workspace
from align_jax.sharding import MeshConfig


@dataclasses.dataclass(frozen=True)
class ChatConfig:
  """Settings of `experiments.chat`."""

  model: str  # a workdir, a Hugging Face folder or a name
  system: str | None = None  # a system message to begin with
  temperature: float = 0.7  # 0 answers greedily
  top_p: float | None = 0.95
  max_new_tokens: int = 128
  max_prompt_length: int = 1024
  seed: int = 0
  mesh: MeshConfig = MeshConfig()


def run(config: ChatConfig, devices, *, read: Callable[[], str] = input) -> None:
  """Answers line by line until an empty line or the end of input; the conversation is remembered."""
  mesh = sharding.make_mesh(config.mesh, devices)
  loaded = workspace.load(config.model, mesh)
  if loaded.head is not None:
    raise InputError(f"{config.model} is a reward model; only policies answer")
  messages = [{"role": "system", "content": config.system}] if config.system else []
  turn = 0
  while line := _next_line(read):
    messages.append({"role": "user", "content": line})
    answer = reply(config, loaded, messages, turn)
    print(answer, flush=True)
    messages.append({"role": "assistant", "content": answer})
    turn += 1


def reply(config: ChatConfig, loaded: workspace.Loaded, messages, turn: int) -> str:
  """The assistant's next message."""
  tokens = data.encode_prompt(
    data.Prompt(tuple(messages)), loaded.tokenizer, config.max_prompt_length
  )
  samples = sampling.generate(
    loaded.model,
    loaded.params,
    [tokens],
    max_new_tokens=config.max_new_tokens,
    temperature=config.temperature,
    top_p=config.top_p if config.temperature else None,
    rng=jax.random.fold_in(jax.random.key(config.seed), turn),
    eos_ids=data.stop_ids(loaded.tokenizer),
    pad_id=data.pad_id(loaded.tokenizer),
  )
  return sampling.decode_texts(samples, loaded.tokenizer)[0]


def _next_line(read) -> str:
  try:
    return read("> ").strip()
  except EOFError:
    return ""
