"""Templates read back what they write."""

from align_jax.worlds import templates


def test_fill_and_match_are_inverse():
  template = templates.Template("tell me the {relation} of {name}.", "begin with {word}.")
  slots = {"relation": "pet", "name": "mira", "word": "lamp"}
  messages = template.fill(slots)
  assert [m["role"] for m in messages] == ["system", "user"]
  assert messages[1]["content"] == "tell me the pet of mira."
  assert template.match(messages) == slots


def test_match_refuses_other_text_roles_and_words():
  template = templates.Template("tell me the {relation} of {name}.")
  assert template.match([{"role": "user", "content": "tell me the pet of mira"}]) is None
  assert template.match([{"role": "user", "content": "tell me the pet of jam."}]) is None
  assert template.match([{"role": "system", "content": "tell me the pet of mira."}]) is None


def test_a_repeated_slot_must_say_the_same_twice():
  template = templates.Template("{name} is {name}.")
  assert template.match([{"role": "user", "content": "mira is mira."}]) == {"name": "mira"}
  assert template.match([{"role": "user", "content": "mira is anna."}]) is None


def test_requests_hold_out_a_diagonal():
  table = templates.requests("one", "two", "three")
  assert len({t.user for t in table}) == 12
  assert [t.user for t in table if t.heldout] == ["please one.", "can you two?", "three now."]
