"""Installs align_jax; the version is read from the package, which is never imported here."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "align_jax/__init__.py").read_text()).group(1)

setuptools.setup(
  name="align_jax",
  version=VERSION,
  description="A laboratory for language-model alignment in JAX",
  long_description=(ROOT / "README.md").read_text(),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=setuptools.find_packages(include=["align_jax*", "experiments*", "configs*"]),
  package_data={"align_jax": ["**/*.html", "**/*.css"]},
  install_requires=[
    "absl-py>=2.1",
    "etils[epath]>=1.9",
    "flax>=0.12.8",
    "gguf>=0.17",
    "grain>=0.2.18",
    "huggingface-hub>=0.34",
    "jax>=0.10.2",
    "jinja2>=3.1",
    "matplotlib>=3.9",
    "ml-collections>=1.1",
    "numpy>=2.0",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "pyarrow>=17",
    "qwix>=0.1.8",
    "safetensors>=0.5",
    "tensorboardX>=2.6",
    "tensorstore>=0.1.74",
    "tokenizers>=0.22",
    "tqdm>=4.66",
    "transformers>=5.0",
  ],
  extras_require={
    "tpu": ["jax[tpu]", "etils[epath-gcs]>=1.9"],
    "cuda": ["jax[cuda13]"],
    "compile": ["jax[tpu]"],  # its compiler (libtpu) needs no TPU
    "test": [
      "hypothesis>=6",
      "ipykernel>=6",
      "nbclient>=0.10",
      "nbformat>=5.10",
      "pytest>=8",
      "pytest-xdist>=3",
      "ruff>=0.8",
    ],
  },
)
