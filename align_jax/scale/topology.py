"""The devices of a TPU slice that is not here: what the TPU compiler, package `libtpu`, describes."""

import os

from align_jax.errors import InputError
from align_jax.scale.tpus import Slice


def devices(tpu: Slice) -> list:
  """All devices of the slice (or slices), for a mesh to compile for.

  Raises:
    InputError: where the package libtpu is missing or does not know this topology.
  """
  # The compiler asks a metadata server which TPU this machine has, unless told that there is none.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
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
