"""The one exception a person can act on."""


class InputError(ValueError):
  """Bad input from outside: one clear sentence that names the file, line and field at fault."""


def one_line(text: object, limit: int = 200) -> str:
  """What a file says, fit for a sentence: on one line, without control characters, cut where too long."""
  text = str(text)
  cut = text if len(text) <= limit else text[: limit - 1] + "…"
  return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)
