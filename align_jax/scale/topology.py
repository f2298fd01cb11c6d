"""The devices of a TPU slice that is not here: what the TPU compiler, package `libtpu`, describes."""

import os

from align_jax.errors import InputError
from align_jax.scale.tpus import Slice

_NO_TPU_HERE = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # of the machine, were it one; the topology is named apart
  "TPU_MIN_LOG_LEVEL": "1",  # warnings are read by `report.compile_step`
  "TPU_STDERR_LOG_LEVEL": "1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several compiles may run side by side
}


def devices(tpu: Slice) -> list:
  """All devices of the slice (or slices), for a mesh to compile for.

  Raises:
    InputError: where the package libtpu is missing or does not know this topology.
  """
  # The compiler asks a metadata server which TPU this machine has, unless told that there is none.
  for name, value in _NO_TPU_HERE.items():
    os.environ.setdefault(name, value)
  from jax.experimental import topologies

  name = f"{tpu.generation.name}:{tpu.topology}"
  options = {"num_slices": tpu.slices} if tpu.slices > 1 else {}
  try:
    found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
  except Exception as error:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    raise InputError(
      f"the TPU compiler cannot describe {name}: {reason} (it is the package libtpu: "
      "pip install -e '.[compile]')"
    ) from error
  return list(found.devices)
