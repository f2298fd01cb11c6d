"""The project's own files: BUILD covers the tree, the version has one place, imports stay light."""

import ast
import fnmatch
import json
import pathlib
import re
import subprocess
import sys

import pytest

import align_jax

ROOT = pathlib.Path(__file__).resolve().parents[1]


def tree():
  """Python files of the checkout, without what runs and environments leave behind."""
  top = ("align_jax", "experiments", "configs", "tests")
  return [str(p.relative_to(ROOT)) for t in top for p in sorted((ROOT / t).rglob("*.py"))]


def evaluate_build():
  """Runs BUILD with stand-ins for the rules: {rule: {target: sources}}, names and labels as given."""
  targets = {}

  def rule(kind):
    def declare(name, srcs=(), deps=(), **_):
      assert name not in targets, f"{name} is declared twice"
      targets[name] = (kind, list(srcs), list(deps))

    return declare

  def glob(patterns, exclude=()):
    files = [str(p.relative_to(ROOT)) for pattern in patterns for p in sorted(ROOT.glob(pattern))]
    return [f for f in files if not any(fnmatch.fnmatch(f, e.replace("**/", "*")) for e in exclude)]

  names = {k: rule(k) for k in ("py_library", "py_binary", "py_test")}
  nothing = dict.fromkeys(("load", "package", "licenses", "exports_files"), lambda *a, **k: None)
  source = (ROOT / "BUILD").read_text()
  ast.parse(source)
  exec(compile(source, "BUILD", "exec"), names | nothing | {"glob": glob})
  return targets


def test_build_covers_every_file_once_and_every_dependency_exists():
  targets = evaluate_build()
  sources = [s for _, srcs, _ in targets.values() for s in srcs if s != "experiments/__init__.py"]
  missing = set(tree()) - set(sources) - {"experiments/__init__.py"}
  assert not missing, f"BUILD does not cover {sorted(missing)}"
  assert len(sources) == len(set(sources)), "a file belongs to two targets"
  for name, (_, _, deps) in targets.items():
    for dep in deps:
      assert not dep.startswith(":") or dep[1:] in targets, f"{name} depends on unknown {dep}"


def test_build_and_setup_name_the_same_packages():
  setup = re.findall(r'^ +"([a-zA-Z0-9-]+)[\[>]', (ROOT / "setup.py").read_text(), re.MULTILINE)
  build = re.findall(r'"@pypi//([a-z0-9_]+)"', (ROOT / "BUILD").read_text())
  wanted = {name.lower().replace("-", "_") for name in setup}
  tools = {"ipykernel", "pytest_xdist", "ruff"}  # run the tests, but no test imports them
  assert wanted - tools == set(build)


def test_version_is_read_from_the_package():
  out = subprocess.run(
    [sys.executable, "setup.py", "--version"], cwd=ROOT, capture_output=True, text=True, check=True
  )
  assert out.stdout.strip().splitlines()[-1] == align_jax.__version__


def test_import_of_the_package_imports_nothing_heavy():
  """`import align_jax` costs nothing next to `import jax`: it does not even import it."""
  code = "import sys, json, align_jax; print(json.dumps(sorted(sys.modules)))"
  out = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
  )
  heavy = {"jax", "flax", "optax", "orbax", "grain", "transformers", "matplotlib", "numpy"}
  assert not heavy & set(json.loads(out.stdout))


def test_library_code_never_asks_for_devices_or_flags():
  """Only mains may: that is what lets a laptop compile for a pod."""
  offenders = []
  for path in sorted((ROOT / "align_jax").rglob("*.py")):
    if path.name == "app.py":
      continue
    for node in ast.walk(ast.parse(path.read_text())):
      text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
      if text in ("jax.devices", "jax.local_devices", "flags.FLAGS"):
        offenders.append(f"{path.relative_to(ROOT)}:{node.lineno}")
  assert not offenders


ROOMS = [  # each line may import only what stands on the lines above it
  {"errors", "config", "losses"},
  {"hosts"},
  {"sharding"},
  {"models"},
  {"data"},
  {"sampling"},
  {"training"},
  {"worlds"},
  {"rl"},
  {"evals"},
  {"scale"},
  {"phases"},
  {"launch"},
  {"distributed"},
  {"app"},
  {"peer_worker"},
]


@pytest.mark.parametrize("level", range(len(ROOMS)), ids=lambda i: "+".join(sorted(ROOMS[i])))
def test_dependencies_point_one_way(level):
  allowed = set().union(*ROOMS[:level]) | {"errors", "config"}
  for room in ROOMS[level]:
    base = ROOT / "align_jax" / room
    for path in sorted(base.rglob("*.py")) if base.is_dir() else [base.with_suffix(".py")]:
      found = set(re.findall(r"^\s*from align_jax\.(\w+)", path.read_text(), re.MULTILINE))
      for names in re.findall(r"^\s*from align_jax import (.+)$", path.read_text(), re.MULTILINE):
        found |= {n.split(" as ")[0].strip() for n in names.strip("()").split(",") if n.strip()}
      assert found <= allowed | {room}, (
        f"{path.relative_to(ROOT)} imports {found - allowed - {room}}"
      )
