"""YAML from users: what is plain is read as `yaml.safe_load` reads it, and what is hostile is refused at once."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from influencespace.data.yaml_text import MAX_NODES, read_yaml

LINES = ["a: &a [x, x, x, x, x, x, x, x, x]"]
LINES += [
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in zip("abcdefgh", "bcdefghi")
]
BOMB = "\n".join(LINES)
HOSTILE = {
    "alias bomb": BOMB,
    "holds itself": "a: &a [*a]",
    "merge of itself": "a: &a\n  <<: *a",
    "python object": "a: !!python/object/apply:os.system ['true']",
    "python name": "a: !!python/name:os.system",
    "deep list": "a: " + "[" * 3000 + "]" * 3000,
    "deep mapping": "{a: " * 3000 + "1" + "}" * 3000,
    "huge integer": "a: " + "9" * 6000,
    "key twice": "a: 1\nb: 2\na: 3",
    "key twice below": "s:\n  a: 1\n  a: 1",
    "two documents": "a: 1\n---\na: 2",
    "no end": "a: [1",
    "unhashable key": "? [1]\n: 2",
    "unknown alias": "a: *b",
    "control characters": "a: \x07",
}
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_what_is_hostile_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"\S") as error:
        read_yaml(text)
    assert "\n" not in str(error.value)


def test_a_bomb_is_small_as_text_and_refused_for_what_it_stands_for() -> None:
    assert len(BOMB) < 1000
    with pytest.raises(ValueError, match=f"it stands for more than {MAX_NODES:,} values"):
        read_yaml(BOMB)


@given(plain)
def test_plain_values_are_read_back(value: object) -> None:
    assert read_yaml(yaml.safe_dump(value)) == value


def test_a_few_aliases_and_merged_keys_are_allowed() -> None:
    text = "base: &base {steps: 10, dimension: 8}\nproxy: {<<: *base, steps: 20}\ntwice: [*base, *base]"
    assert read_yaml(text) == yaml.safe_load(text)


def test_an_empty_text_is_none() -> None:
    assert read_yaml("") is None
