"""Settings of the benchmark next to its peers, and what both sides read them from."""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from align_jax import config as config_lib
from align_jax import models, sharding
from align_jax.errors import InputError
from align_jax.phases import sections
from align_jax.phases.sections import DataSection, ModelSection
from align_jax.training import workdir
from align_jax.training.optimizer import OptimizerConfig

SAMPLE = "sample"
PEERS = {  # whom we are measured next to, and in which phases
  "trl": ("sft", "reward", "dpo", "policy"),
  "tunix": ("sft", "dpo"),
  "transformers": (SAMPLE,),
}
PHASES = tuple(dict.fromkeys(phase for phases in PEERS.values() for phase in phases))
OURS = "align_jax"
RECOMPUTED, CONTINUOUS = "align_jax, reference recomputed", "align_jax, continuous batching"
WAYS = {  # of ours, where a phase has several: their sides by name
  "dpo": {"cached": OURS, "recomputed": RECOMPUTED},
  SAMPLE: {"batches": OURS, "continuous": CONTINUOUS},
}
PREPARE = "prepare"  # what a process does before any side is started
CHECKS = 2  # updates of every side on the same examples, before any pass
GREEDY = 16  # tokens of every response that is compared before any pass of sampling
BETA = 0.1  # of DPO, on both sides: TRL's default and ours
# Of policy updates: the two answers of a record, their advantages, and the clip range.
ANSWERS, ADVANTAGES, CLIP = ("chosen_ids", "rejected_ids"), (1.0, -0.5), 0.2


@dataclasses.dataclass(frozen=True)
class PeerTask:
  """One kind of training, or sampling, on one file."""

  # sft, reward, dpo; policy: PPO's clipped loss of responses that are there already; or sample: to the
  # prompts of demonstrations, responses as long as theirs.
  phase: str
  # batch_size: examples a step; of sft, about as many in packed rows; of policy, two responses each; of
  # sample, responses in flight.
  data: DataSection
  # dpo: ours with the reference cached, recomputed, or both; sample: ours in batches, continuous, or both.
  ways: tuple[str, ...] = ()

  def __post_init__(self):
    sections.check_one_of("tasks.phase", self.phase, PHASES)
    if (self.phase in WAYS) != bool(self.ways):
      raise InputError(
        f"config.tasks.ways is for phases {', '.join(WAYS)}, which need one at least"
      )
    for name in self.ways:
      sections.check_one_of("tasks.ways", name, tuple(WAYS[self.phase]))
    if self.data.batch_size < 2 or self.data.length < 2:
      raise InputError("config.tasks.data: batch_size and length must be at least 2")
    if self.data.eval is not None or self.data.buckets is not None:
      raise InputError("config.tasks.data: eval and buckets are not used: leave them None")

  def sides(self, peers: Sequence[str]) -> tuple[str, ...]:
    """Who is measured, by name, of `peers` those that have the phase; ratios are to the first."""
    having = [peer for peer in peers if self.phase in PEERS[peer]]
    return (*having, *([WAYS[self.phase][way] for way in self.ways] or [OURS]))


@dataclasses.dataclass(frozen=True)
class PeerBenchmarkConfig:
  """Settings of `experiments.benchmark` next to TRL, Tunix and transformers."""

  model: ModelSection  # our settings; its dtype is that of both sides
  tasks: dict[str, PeerTask]  # by name
  optimizer: OptimizerConfig  # of both sides
  batches: int  # of each task, drawn evenly over its lengths: one pass
  repeats: int  # passes of each side
  # True keeps all sides in memory and runs their passes A B A B; False starts each side anew for each
  # of its turns, alone in memory, so that their peaks can be compared.
  interleave: bool
  gradient_checkpointing: bool  # of the peers; the default of TRL is True
  matmul: int  # rows and columns of the product that the machine's peak is measured by
  peers: tuple[str, ...] = tuple(PEERS)  # those that are installed are measured
  shape: str | None = None  # random weights of a named shape, read by model.init's tokenizer
  mesh: sharding.MeshConfig = sharding.MeshConfig()

  def __post_init__(self):
    if min(self.batches, self.repeats, self.matmul) < 1 or not self.tasks:
      raise InputError("config.batches, repeats and matmul must be positive, and tasks given")
    for peer in self.peers:
      sections.check_one_of("peers", peer, tuple(PEERS))
    if self.model.lora.rank:
      raise InputError("config.model.lora.rank must be 0: all weights are trained on both sides")
    if self.model.dtype not in ("float32", "bfloat16"):
      raise InputError("config.model.dtype must be float32 or bfloat16")
    if self.shape is not None:
      models.named_shape(self.shape)
      if self.model.init == "scratch":
        raise InputError("config.shape: with model.init='scratch' the shape is model.scratch's")
    plain = {"name": "adamw", "schedule": "constant", "warmup_fraction": 0.0}
    plain |= {"weight_decay": 0.0, "moment_dtype": "float32"}
    for name, value in plain.items():
      if getattr(self.optimizer, name) != value:
        raise InputError(f"config.optimizer.{name} must be {value!r}: both sides have that")


@dataclasses.dataclass(frozen=True)
class Place:
  """The folder that the processes of one benchmark share."""

  folder: pathlib.Path

  @property
  def config(self) -> PeerBenchmarkConfig:
    return config_lib.build(PeerBenchmarkConfig, workdir.read_json(self.folder / "config.json"))

  @property
  def model(self) -> str:
    """A Hugging Face folder: weights and tokenizer."""
    return str(self.folder / "model")

  @property
  def head(self) -> pathlib.Path:
    """The kernel of the score head, float32 [D]."""
    return self.folder / "head.npy"

  def records(self, task: str, part: str) -> pathlib.Path:
    """Records of a part, "pass" or "check", as our readers read them."""
    return self.folder / "records" / f"{task}.{part}.jsonl"

  def tokens(self, task: str) -> pathlib.Path:
    """{"check", "pass": the same as the peer takes them, "pad_id", and what they count}."""
    return self.folder / "records" / f"{task}.json"


def compared(logprobs: np.ndarray) -> dict[str, float]:
  """What sides that sample are compared by: each greedy response's mean negative log-prob; [B, N]."""
  return {f"nll of response {i}": float(-row.mean()) for i, row in enumerate(logprobs)}
