"""Will it fit, and how fast could it be: phases compiled for TPU slices on a machine that has none."""

import dataclasses
import pathlib
import time
from typing import Any

from align_jax import models, sharding
from align_jax.errors import InputError
from align_jax.models import hf_config, pretrained
from align_jax.phases import compile_jobs
from align_jax.scale import meshes, table, topology, tpus
from align_jax.scale.report import Report, compile_step
from align_jax.training import workdir


@dataclasses.dataclass(frozen=True)
class CompileConfig:
  """Settings of `experiments.compile`: what is compiled, one entry a row of the table."""

  jobs: dict[str, "JobConfig"]

  def __post_init__(self):
    if not self.jobs:
      raise InputError("config.jobs is empty: nothing to compile")


@dataclasses.dataclass(frozen=True)
class JobConfig:
  """One step of one phase for one or more slices."""

  phase: str  # one of compile_jobs.PHASES
  shape: (
    str  # a name in models.SHAPES, a Hugging Face folder (its config.json) or a phase's workdir
  )
  topology: str  # names by commas: "v5e-64,v6e-16", "2xv5p-128", "v5p:4x4x8"
  settings: Any  # the phase's own config


def run(config: CompileConfig, *, suggest: int = 0, output: str | None = None) -> list[dict]:
  """Compiles every job for all of its slices and prints a row as each is done.

  suggest: 0 compiles with the config's own mesh and remat policy; n > 0 compiles the n most promising
  of all that are possible, and keeps the best that fits. output: a JSON file for all that was found.
  """
  plans = [_Plan.read(name, job) for name, job in config.jobs.items()]
  rows, printed = [], table.Printer()
  for plan in plans:
    for tpu in plan.slices:
      for found in plan.compiled(tpu, suggest):
        rows.append(found)
        printed.row(found)
        if output:
          workdir.write_json(pathlib.Path(output), rows)
  return rows


@dataclasses.dataclass(frozen=True)
class _Plan:
  name: str
  phase: str
  shape: models.ModelConfig
  slices: tuple[tpus.Slice, ...]
  config: Any

  @classmethod
  def read(cls, name: str, job: JobConfig) -> "_Plan":
    slices = tuple(tpus.parse(part) for part in job.topology.split(","))
    values = dict(job.settings)
    return cls(
      name, job.phase, read_shape(job.shape), slices, compile_jobs.settings(job.phase, values)
    )

  def compiled(self, tpu: tpus.Slice, suggest: int):
    """One row; with `suggest` one for each candidate, and at last again the best that fits."""
    devices = topology.devices(tpu)
    if not suggest:
      yield self._row(tpu, devices, self.config.mesh, self.config.model.remat)
      return
    found = []
    for mesh, remat in meshes.candidates(self.phase, self.config, self.shape, tpu, most=suggest):
      found.append(self._row(tpu, devices, mesh, remat))
      yield found[-1]
    fitting = [row for row in found if row["fits"]]
    if fitting:
      yield min(fitting, key=lambda row: row["estimate"]) | {"name": f"{self.name}: best"}

  def _row(self, tpu, devices, mesh_config: sharding.MeshConfig, remat: str) -> dict:
    section = dataclasses.replace(self.config.model, remat=remat)
    config = dataclasses.replace(self.config, model=section, mesh=mesh_config)
    mesh = sharding.make_mesh(mesh_config, devices)
    start = time.perf_counter()
    job = compile_jobs.make(self.phase, config, self.shape, mesh)
    report = compile_step(job.step, job.args, tpu, mesh)
    return describe(report) | {
      "name": self.name,
      "phase": self.phase,
      "remat": remat,
      "compile_s": round(time.perf_counter() - start, 1),
    }


def describe(report: Report) -> dict:
  """Everything a report knows, as JSON."""
  derived = ("peak_bytes", "fits", "bound", "estimate")
  return dataclasses.asdict(report) | {name: getattr(report, name) for name in derived}


def read_shape(name: str) -> models.ModelConfig:
  """The shape of that name, of a Hugging Face folder's config.json, or of a phase's model.json."""
  folder = pathlib.Path(name)
  if (folder / "model.json").exists():
    from align_jax import config as config_lib

    return config_lib.build(
      models.ModelConfig, workdir.read_json(folder / "model.json")["model"], "model"
    )
  if (folder / "config.json").exists():
    return hf_config.from_hf(pretrained.read_json(folder / "config.json"), name)
  return models.named_shape(name)


def job_of(phase: str, shape: str, topology_names: str, settings: dict) -> CompileConfig:
  """A table of one job, for a phase's own config file."""
  compile_jobs.settings(phase, settings)  # says what is wrong with it before anything else
  return CompileConfig({phase: JobConfig(phase, shape, topology_names, settings)})


def build(values: dict) -> CompileConfig:
  """From a file that lists jobs; their settings are checked by the phase."""
  fields = {f.name for f in dataclasses.fields(JobConfig)}
  jobs = {}
  for name, job in values.get("jobs", {}).items():
    if set(job) != fields:
      wrong = sorted(set(job) ^ fields)
      raise InputError(
        f"config.jobs.{name}: needs exactly {', '.join(sorted(fields))}; see {wrong}"
      )
    jobs[name] = JobConfig(**job)
  return CompileConfig(jobs)
