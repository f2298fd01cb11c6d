"""Settings of the benchmark next to its peers, and what both sides read them from."""

import dataclasses
import pathlib
from collections.abc import Sequence

from align_jax import config as config_lib
from align_jax import models, sharding
from align_jax.errors import InputError
from align_jax.phases import sections
from align_jax.phases.sections import DataSection, ModelSection
from align_jax.training import workdir
from align_jax.training.optimizer import OptimizerConfig

PHASES = ("sft", "reward", "dpo", "policy")
REFERENCES = ("cached", "recomputed")
PEERS = {  # whom we are measured next to, and in which phases
  "trl": PHASES,
  "tunix": ("sft", "dpo"),
}
OURS, RECOMPUTED = "align_jax", "align_jax, reference recomputed"
PREPARE = "prepare"  # what a process does before any side is started
CHECKS = 2  # updates of every side on the same examples, before any pass
BETA = 0.1  # of DPO, on both sides: TRL's default and ours
# Of policy updates: the two answers of a record, their advantages, and the clip range.
ANSWERS, ADVANTAGES, CLIP = ("chosen_ids", "rejected_ids"), (1.0, -0.5), 0.2


@dataclasses.dataclass(frozen=True)
class PeerTask:
  """One kind of training on one file."""

  phase: str  # sft, reward, dpo or policy: PPO's clipped loss of responses that are there already
  # batch_size: examples a step; of sft, about as many in packed rows; of policy, two responses each.
  data: DataSection
  references: tuple[str, ...] = ()  # dpo: ours with the reference cached, recomputed, or both

  def __post_init__(self):
    sections.check_one_of("tasks.phase", self.phase, PHASES)
    for name in self.references:
      sections.check_one_of("tasks.references", name, REFERENCES)
    if (self.phase == "dpo") != bool(self.references):
      raise InputError("config.tasks.references is for phase 'dpo', which needs one at least")
    if self.data.batch_size < 2 or self.data.length < 2:
      raise InputError("config.tasks.data: batch_size and length must be at least 2")
    if self.data.eval is not None or self.data.buckets is not None:
      raise InputError("config.tasks.data: eval and buckets are not used: leave them None")

  def sides(self, peers: Sequence[str]) -> tuple[str, ...]:
    """Who is measured, by name, of `peers` those that have the phase; ratios are to the first."""
    names = {"cached": OURS, "recomputed": RECOMPUTED}
    having = [peer for peer in peers if self.phase in PEERS[peer]]
    return (*having, *([names[r] for r in self.references] or [OURS]))


@dataclasses.dataclass(frozen=True)
class PeerBenchmarkConfig:
  """Settings of `experiments.benchmark` next to TRL and Tunix."""

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
