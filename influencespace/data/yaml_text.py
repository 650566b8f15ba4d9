"""YAML from users: plain values only, none of which grows beyond what was written."""

from typing import Any

import yaml

MAX_NODES = 100_000
"""Values of a document, those that stand in several places by aliases counted each time."""


def read_yaml(text: str) -> Any:
    """The value of a document; raises ValueError, in one line, for what is not YAML, repeats a key, is too deep or too large."""
    try:
        loader = _Plain(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


class _Plain(yaml.SafeLoader):
    """yaml.SafeLoader for text that may be hostile: a few aliases of aliases stand for billions of values."""

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None and _size(node, {}) > MAX_NODES:
            raise ValueError(f"it stands for more than {MAX_NODES:,} values")
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        if isinstance(node, yaml.MappingNode):
            self.flatten_mapping(node)
            seen = set()
            for key, _ in node.value:
                name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
                if name is not None and name in seen and not getattr(node, "merged", False):
                    raise ValueError(f"the key {key.value!r} is there twice")
                seen.add(name)
        return super().construct_mapping(node, deep=deep)

    def flatten_mapping(self, node: Any) -> None:
        merge = "tag:yaml.org,2002:merge"
        node.merged = getattr(node, "merged", False) or any(key.tag == merge for key, _ in node.value)
        super().flatten_mapping(node)


def _size(node: Any, known: dict[int, float]) -> float:
    """Values that a node stands for; infinite where it holds itself."""
    if id(node) not in known:
        known[id(node)] = float("inf")  # until it is known
        below = node.value if isinstance(node.value, list) else []
        parts = (part for one in below for part in (one if isinstance(one, tuple) else (one,)))
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]
