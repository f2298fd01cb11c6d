"""What every command's process sets before it computes."""

import os
import pathlib
import subprocess
import sys

import jaxlib
import pytest

_SUM = """
from align_jax import app
app.prepare()
import jax, jax.numpy as jnp
x = jnp.ones((512, 576))
text = jax.jit(lambda x: (x * x).sum(0)).lower(x).compile().as_text()
print(len(jax.devices()), text.count("ynn_fusion"))
"""


def _devices_and_ynn_fusions(flags: str, tmp_path) -> tuple[int, int]:
  environment = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)}
  found = subprocess.run(
    [sys.executable, "-c", _SUM], env=environment, capture_output=True, text=True, check=True
  )
  devices, fusions = found.stdout.split()
  return int(devices), int(fusions)


@pytest.mark.skipif(jaxlib.__version__ != "0.10.2", reason="the flag is set for jaxlib 0.10.2")
def test_sums_on_cpu_are_xlas_own_unless_the_user_says_otherwise(tmp_path):
  assert _devices_and_ynn_fusions("--xla_force_host_platform_device_count=2", tmp_path) == (2, 0)
  reductions = "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_REDUCE"
  devices, fusions = _devices_and_ynn_fusions(reductions, tmp_path)
  assert devices == 1 and fusions > 0


_PAGES = """
import os, sys
from align_jax import app
print("begins", flush=True)
app.use_huge_pages()
block = bytearray(1 << 27)
maps = open("/proc/self/smaps").read()
flags = [line for line in maps.splitlines() if line.startswith("VmFlags")]
print(os.getpid(), sys.argv[1:], sum(" hg" in line for line in flags) > 0)
"""
_ON_DEMAND = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
  not _ON_DEMAND.exists() or "[madvise]" not in _ON_DEMAND.read_text(),
  reason="this kernel does not give huge pages on demand",
)
@pytest.mark.parametrize("given, starts", [(None, 2), ("glibc.malloc.tcache_count=7", 1)])
def test_commands_get_huge_pages_unless_the_user_says_something_of_glibc(given, starts):
  environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
  environment |= {"GLIBC_TUNABLES": given} if given else {}
  command = [sys.executable, "-c", _PAGES, "--config.x=1", "a b"]
  child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
  *begins, found = child.communicate()[0].splitlines()
  assert begins == ["begins"] * starts
  assert found == f"{child.pid} ['--config.x=1', 'a b'] {given is None}"
