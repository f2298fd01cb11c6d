"""Which checkpoint was made from which: read from lineage.json, laid out, drawn as SVG."""

import dataclasses
import pathlib
from collections.abc import Mapping

import markupsafe

from align_jax import config as config_lib
from align_jax.errors import InputError
from align_jax.evals import plots, results

_BOX, _GAP = (136, 46), (84, 18)  # width and height of a box; space between columns and rows


@dataclasses.dataclass(frozen=True)
class Parent:
  """A checkpoint that a phase started from, and what it served as; step None for a release."""

  role: str
  path: str
  step: int | None = None


@dataclasses.dataclass(frozen=True)
class Lineage:
  """The content of lineage.json."""

  phase: str
  workdir: str
  step: int
  parents: tuple[Parent, ...]
  git_revision: str
  data_fingerprint: str
  command: str
  stopped: str | None = None  # why it ended before its last step, if it did


@dataclasses.dataclass(frozen=True)
class Graph:
  """Names in layers, parents before children, and the roles on each (parent, child) edge.

  A parent that is none of the runs goes by its path.
  """

  layers: tuple[tuple[str, ...], ...]
  roles: dict[tuple[str, str], tuple[str, ...]]


def load(folder: pathlib.Path) -> Lineage:
  """Reads lineage.json; InputError that names the file and the field at fault."""
  file = folder / "lineage.json"
  values = results.read_json(file)
  if not isinstance(values, dict):
    raise InputError(f"{file}: an object is needed, not {type(values).__name__}")
  return config_lib.build(Lineage, values, str(file))


def graph(lineages: Mapping[str, Lineage]) -> Graph:
  """Layers by the longest path from a root. A parent outside the work directory is a root too.

  lineages: by run name. InputError if a run descends from itself.
  """
  names = {pathlib.Path(entry.workdir).resolve(): name for name, entry in lineages.items()}
  roles: dict[tuple[str, str], tuple[str, ...]] = {}
  for child, entry in lineages.items():
    for parent in entry.parents:
      source = names.get(pathlib.Path(parent.path).resolve(), parent.path)
      roles[source, child] = (*roles.get((source, child), ()), parent.role)
  depths = {name: _depth(name, roles, ()) for name in [*(p for p, _ in roles), *lineages]}
  layers = [
    [name for name in dict.fromkeys(depths) if depths[name] == depth]
    for depth in range(max(depths.values(), default=-1) + 1)
  ]
  parents = {parent for parent, _ in roles}
  # A run that others descend from goes on top, near them, and run order decides among the rest.
  order = {name: (name not in parents, place) for place, name in enumerate([*lineages, *depths])}
  return Graph(tuple(tuple(sorted(layer, key=order.__getitem__)) for layer in layers), roles)


def to_svg(found: Graph, lineages: Mapping[str, Lineage]) -> markupsafe.Markup:
  """The graph as one inline SVG element, left to right, with a text alternative."""
  places, height = _places(found)
  width = len(found.layers) * (_BOX[0] + _GAP[0]) - _GAP[0] + 4
  edges = [_edge(places, parent, child, roles) for (parent, child), roles in found.roles.items()]
  boxes = [
    _box(places[name, depth], name, lineages.get(name))
    for depth, layer in enumerate(found.layers)
    for name in layer
  ]
  told = "; ".join(f"{child} from {parent}" for parent, child in found.roles)
  return markupsafe.Markup(
    '<svg xmlns="http://www.w3.org/2000/svg" class="lineage" role="img" viewBox="0 0 {w} {h}"'
    ' width="{w}" height="{h}"><title>Lineage of checkpoints: {told}</title>{body}</svg>'
  ).format(w=width, h=height, told=told, body=markupsafe.Markup("").join([*edges, *boxes]))


def _depth(name: str, roles, below: tuple[str, ...]) -> int:
  if name in below:
    raise InputError(f"the lineage of {name} leads back to itself: {' <- '.join(below)}")
  above = [parent for parent, child in roles if child == name]
  return 1 + max((_depth(p, roles, (*below, name)) for p in above), default=-1)


def _places(found: Graph) -> tuple[dict[tuple[str, int], tuple[float, float]], float]:
  """Left middle of every box, and of the lane by which an edge passes a layer, at (name, depth)."""
  depths = {name: depth for depth, layer in enumerate(found.layers) for name in layer}
  columns = [list(layer) for layer in found.layers]
  for parent in depths:
    last = max((depths[c] for p, c in found.roles if p == parent), default=0)
    for depth in range(depths[parent] + 1, last):
      columns[depth].insert(1, parent)
  rows = max(map(len, columns), default=0)
  height = rows * (_BOX[1] + _GAP[1]) - _GAP[1] + 4
  places = {}
  for depth, column in enumerate(columns):
    top = (height - len(column) * (_BOX[1] + _GAP[1]) + _GAP[1]) / 2
    for row, name in enumerate(column):
      middle = top + row * (_BOX[1] + _GAP[1]) + _BOX[1] / 2
      places[name, depth] = (2 + depth * (_BOX[0] + _GAP[0]), middle)
  return places, height


def _edge(places, parent: str, child: str, roles: tuple[str, ...]) -> markupsafe.Markup:
  start, end = min(d for n, d in places if n == parent), min(d for n, d in places if n == child)
  x, y = places[parent, start]
  path = f"M{x + _BOX[0]:.0f},{y:.0f}"
  x += _BOX[0]
  for depth in range(start + 1, end + 1):
    left, middle = places[child if depth == end else parent, depth]
    path += f" C{x + 40:.0f},{y:.0f} {left - 40:.0f},{middle:.0f} {left:.0f},{middle:.0f}"
    x, y = left, middle
    if depth < end:
      x += _BOX[0]
      path += f" L{x:.0f},{y:.0f}"
  return markupsafe.Markup(
    '<path d="{}" fill="none" stroke="#8a939b" stroke-width="1.4"><title>{} is the {} of {}'
    "</title></path>"
  ).format(path, parent, " and ".join(roles), child)


def _box(place: tuple[float, float], name: str, entry: Lineage | None) -> markupsafe.Markup:
  x, y = place[0], place[1] - _BOX[1] / 2
  colour = plots.look_of(name)[0] if entry else "#68727b"
  note = f"step {entry.step:,}" if entry else "not made here"
  return markupsafe.Markup(
    '<rect x="{x:.0f}" y="{y:.1f}" width="{w}" height="{h}" rx="7" fill="#fff" stroke="{c}"'
    ' stroke-width="1.8"{dash}/><text x="{tx:.0f}" y="{t1:.1f}" class="name" fill="{c}">{title}'
    '</text><text x="{tx:.0f}" y="{t2:.1f}" class="note">{note}</text>'
  ).format(
    x=x,
    y=y,
    w=_BOX[0],
    h=_BOX[1],
    c=colour,
    note=note,
    tx=x + 12,
    t1=y + 20,
    t2=y + 36,
    dash=markupsafe.Markup("" if entry else ' stroke-dasharray="5 4"'),
    title=_shortened(plots.title_of(name) if entry else pathlib.Path(name).name),
  )


def _shortened(text: str, limit: int = 15) -> str:
  return text if len(text) <= limit else text[: limit - 1] + "…"
