"""Reports as lines of a table, in the terminal."""

COLUMNS = (
  "name", "slice", "mesh", "remat", "args", "temp", "peak / HBM", "fits", "PFLOP", "ICI", "DCN",
  "least step", "bound by",
)  # fmt: skip
_WIDTHS = (26, 11, 26, 5, 6, 6, 13, 4, 7, 7, 6, 10, 8)


def cells(row: dict) -> list[str]:
  """One report as text: bytes of one device in GB, seconds of one step."""
  sent = sum(row["collective_bytes"].values())
  mesh = " ".join(f"{axis}={n}" for axis, n in row["mesh"].items()) or "1"
  peak = f"{_gb(row['peak_bytes'])} / {_gb(row['hbm_bytes'])}"
  known = row["error"] is None
  return [
    row["name"],
    row["topology"],
    mesh,
    row["remat"],
    _gb(row["argument_bytes"]),
    _gb(row["temp_bytes"]),
    peak,
    "yes" if row["fits"] else "NO",
    f"{row['flops'] / 1e15:.3g}",
    _gb(sent) if known else "-",
    _gb(row["dcn_bytes"]) if row["dcn_bytes"] else "-",
    f"{row['estimate']:.3g} s" if known else "-",
    row["bound"] if known else "-",
  ]


def _gb(size: float) -> str:
  return f"{size / 1e9:.3g}"


class Printer:
  """Prints a header once, then a line a row."""

  def __init__(self):
    self._started = False

  def row(self, row: dict):
    if not self._started:
      print(_line(COLUMNS), flush=True)
      self._started = True
    print(_line(cells(row)), flush=True)
    if row["error"]:
      print(f"  {row['error']}", flush=True)


def _line(values) -> str:
  return "  ".join(text.ljust(width) for text, width in zip(values, _WIDTHS)).rstrip()
