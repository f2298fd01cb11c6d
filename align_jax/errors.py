"""The one exception a person can act on."""


class InputError(ValueError):
  """Bad input from outside: one clear sentence that names the file, line and field at fault."""
