"""YAML that nobody has to trust: no tags but YAML's own, and no more of it than it looks."""

from __future__ import annotations

from typing import Any

import yaml

MAX_YAML_BYTES = 2**18
_MAX_NODES = 20_000
_MAX_DEPTH = 64


class YamlError(ValueError):
    """Says what is wrong with it."""


def load_yaml(content: str | bytes) -> Any:
    """Raises: YamlError if it is none, too long, too deep, or too much once its aliases and merges are written out."""
    if len(content) > MAX_YAML_BYTES:
        raise YamlError(f"more than {MAX_YAML_BYTES} bytes")
    try:
        root = yaml.compose(content, Loader=yaml.SafeLoader)
        if root is not None:
            _written_out(root, {}, 0)
        return yaml.safe_load(content)
    except YamlError:
        raise
    # Besides its own errors: of dates and numbers that there are not, of bytes that are no text, and of nesting.
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError, AttributeError) as error:
        raise YamlError(str(error)) from error


def _written_out(node: yaml.Node, known: dict[int, int | None], depth: int) -> int:
    """How many nodes there are where each alias is what it stands for. Merges repeat what they merge likewise."""
    if id(node) in known:
        size = known[id(node)]
        if size is None:
            raise YamlError("an alias within what it stands for")
        return size
    if depth > _MAX_DEPTH:
        raise YamlError(f"nested more than {_MAX_DEPTH} deep")
    known[id(node)] = None
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    size = 1 + sum(_written_out(part, known, depth + 1) for part in parts)
    if size > _MAX_NODES:
        raise YamlError(f"more than {_MAX_NODES} values, with aliases written out")
    known[id(node)] = size
    return size
