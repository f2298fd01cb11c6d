"""Files from outside are data: nothing in them is ever run."""

import ast
import pathlib
import pickle

import numpy as np
import pytest

from align_jax import data, worlds
from align_jax.errors import InputError

ROOT = pathlib.Path(__file__).resolve().parents[2]
RUNS_CODE = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def trees():
  for folder in ("align_jax", "experiments", "configs"):
    for path in sorted((ROOT / folder).rglob("*.py")):
      yield path.relative_to(ROOT), ast.parse(path.read_text())


def test_no_file_is_unpickled():
  """No module that does it is imported, and NumPy is never allowed to; nor is text evaluated."""
  offenders = []
  for path, tree in trees():
    for node in ast.walk(tree):
      names = []
      if isinstance(node, ast.Import):
        names = [alias.name.split(".")[0] for alias in node.names]
      elif isinstance(node, ast.ImportFrom) and node.module:
        names = [node.module.split(".")[0]]
      elif isinstance(node, ast.Call):
        keywords = {k.arg for k in node.keywords}
        names = [k for k in ("allow_pickle", "trust_remote_code") if k in keywords]
        names += [node.func.id] if getattr(node.func, "id", "") in ("eval", "exec") else []
      bad = RUNS_CODE | {"allow_pickle", "trust_remote_code", "eval", "exec"}
      offenders += [f"{path}:{node.lineno} {name}" for name in names if name in bad]
  assert not offenders


class Evil:
  def __init__(self, target):
    self.target = target

  def __reduce__(self):
    return pathlib.Path.touch, (self.target,)


def test_a_pickle_in_an_array_file_stays_one(tmp_path):
  """The control for what NumPy does by itself, as this code loads arrays."""
  np.savez(tmp_path / "scores.npz", scores=np.array([Evil(tmp_path / "ran")], object))
  with np.load(tmp_path / "scores.npz") as found, pytest.raises(ValueError, match="pickle"):
    found["scores"]
  assert not (tmp_path / "ran").exists()
  pickle.loads(pickle.dumps(Evil(tmp_path / "ran")))
  assert (tmp_path / "ran").exists()


def chat(template):
  tokenizer = worlds.Microworld(seed=0).tokenizer()
  tokenizer.chat_template = template
  record = worlds.Microworld(seed=0).demonstrations(1)[0]
  return next(data.sft_batches([record], tokenizer, length=64, batch_size=1, epochs=1))


GOOD = worlds.Microworld(seed=0).tokenizer().chat_template


@pytest.mark.parametrize(
  "attack",
  [
    "{{ cycler.__init__.__globals__.os.system('touch RAN') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{% set _ = messages.append({'role': 'assistant', 'content': 'yes'}) %}",
    "{% set _ = messages[0].update({'content': 'no'}) %}",
    "{{ lipsum.__globals__['os'].popen('touch RAN').read() }}",
    "{% for i in range(99999999) %}{% endfor %}",
    "{% include '/etc/passwd' %}",
  ],
)
def test_a_chat_template_does_nothing_but_text(tmp_path, monkeypatch, attack):
  """Rendered in a sandbox: no attribute that leads to the interpreter, no change of the messages."""
  monkeypatch.chdir(tmp_path)
  assert chat(GOOD)["tokens"].any()
  with pytest.raises(InputError, match="chat template"):
    chat(attack + GOOD)
  assert not list(tmp_path.iterdir())
