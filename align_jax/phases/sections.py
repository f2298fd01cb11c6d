"""The sections that the configs of several phases share."""

import dataclasses

from align_jax.errors import InputError
from align_jax.models.config import ATTENTION


@dataclasses.dataclass(frozen=True)
class ScratchConfig:
  """A Llama-shaped model with random weights."""

  tokenizer: str  # "microworld" or a Hugging Face folder
  layers: int
  embed_dim: int
  heads: int
  kv_heads: int
  mlp_dim: int
  max_length: int  # positions

  def __post_init__(self):
    sizes = (self.layers, self.embed_dim, self.heads, self.kv_heads, self.mlp_dim, self.max_length)
    if min(sizes) < 1 or self.heads % self.kv_heads or self.embed_dim % (2 * self.heads):
      raise InputError(
        "model.scratch: sizes must be positive, kv_heads divide heads, and 2 * heads divide embed_dim"
      )


def check_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
  """Raises InputError that names the setting unless its value is a known one."""
  if value not in known:
    raise InputError(f"config.{name} must be one of {', '.join(known)}, not {value!r}")


BASE_DTYPES = ("float32", "int8")
LORA_TARGETS = ("query", "key", "value", "out", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Low-rank adapters: what trains when `rank` is positive."""

  rank: int = 0  # 0 trains all weights
  alpha: float = 32.0  # the adapter is scaled by alpha / rank
  targets: tuple[str, ...] = LORA_TARGETS
  base_dtype: str = "float32"  # of the frozen matrices under them; or int8, with a scale an output

  def __post_init__(self):
    check_one_of("model.lora.base_dtype", self.base_dtype, BASE_DTYPES)
    if self.base_dtype != "float32" and not self.rank:
      raise InputError(f"lora.base_dtype={self.base_dtype!r} needs adapters: lora.rank is 0")
    if self.rank < 0 or self.alpha <= 0 or not self.targets:
      raise InputError(
        "lora.rank must not be negative, lora.alpha positive, lora.targets not empty"
      )
    unknown = sorted(set(self.targets) - set(LORA_TARGETS))
    if unknown:
      raise InputError(f"lora.targets: {unknown[0]!r} is none of {', '.join(LORA_TARGETS)}")

  @property
  def scale(self) -> float:
    return self.alpha / self.rank if self.rank else 1.0


@dataclasses.dataclass(frozen=True)
class ModelSection:
  """Where the weights come from, and how they are computed with."""

  init: (
    str  # "scratch", a name such as "smollm2", a Hugging Face folder, or an earlier phase's workdir
  )
  scratch: ScratchConfig | None = None  # given exactly when init is "scratch"
  lora: LoraConfig = LoraConfig()
  dtype: str = "float32"  # of activations; weights stay float32
  remat: str = "none"  # what the backward pass recomputes: none, dots or full
  logits_chunk: int | None = None  # time steps of logits held at once; None holds all
  # Of whole rows: xla (all scores at once), splash (the TPU kernel), blockwise (tiles, on any platform);
  # auto is splash on TPU, blockwise on CPU and where time is split over the mesh, and xla elsewhere.
  attention: str = "auto"

  def __post_init__(self):
    check_one_of("model.attention", self.attention, ATTENTION)
    if (self.init == "scratch") != (self.scratch is not None):
      raise InputError(
        f"model.scratch is for model.init='scratch' and needed there, but init is {self.init!r}"
      )
    if self.scratch is not None and self.lora.rank:
      raise InputError(
        "model.lora adapts a trained model: with model.init='scratch' its rank must be 0"
      )


LAYOUTS = ("shared", "padded")  # of pairs: the prompt once and rows packed, or two whole rows


MEMORIES = ("device", "host")  # where the weights of a frozen reference rest between uses


@dataclasses.dataclass(frozen=True)
class DataSection:
  """Records, and the rows they become."""

  train: str  # a file, a folder, hf:org/name:split, "microworld:seed=0,n=1000"; or "A*2 + B*1", a mixture
  length: int  # tokens a row
  batch_size: int  # rows a step, over all hosts
  eval: str | None = None  # held-out records, same formats
  columns: str | None = (
    None  # foreign columns: a known map, or "prompt=instruction+input,chosen=good"
  )
  limit: int | None = None  # at most so many training records
  eval_limit: int | None = None
  invalid: str = "raise"  # or "skip": bad rows are left out and counted
  chat: bool = True  # plain-text prompts are wrapped in the chat template
  buckets: tuple[int, ...] | None = (
    None  # row lengths to choose from; None: `length`, or shared rows' own
  )
