"""Finds and replaces the states of norms in pytrees.

A tree is any pytree, such as dicts, lists, tuples, `FrozenDict`, dataclasses of flax.struct and
`nnx.State`, or a mapping that is not registered as a pytree.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
from jax.tree_util import DictKey, keystr

STATE = ("mean", "var", "count", "accumulation")

Path = tuple[Any, ...]
Tree = TypeVar("Tree")


def is_state(node: Any) -> bool:
    """Returns whether this is the state of a norm: a mapping with a mean and a variance."""
    return {"mean", "var"} <= arrays(node, ("mean", "var")).keys()


def arrays(node: Any, keys: tuple[str, ...]) -> dict[str, Any]:
    """Returns the arrays that a mapping has under these keys; arrays in Flax variables are unboxed.

    Values that are None or mappings are not arrays and are left out.
    """
    if not isinstance(node, Mapping):
        return {}
    found = {key: _unboxed(node[key]) for key in keys if key in node}
    return {k: a for k, a in found.items() if a is not None and not _is_mapping(a)}


def find(
    tree: Any, wanted: Callable[[Any], bool] = is_state, path: Path = ()
) -> Iterator[tuple[Path, Any]]:
    """Yields every mapping for which `wanted` is True, with its path; by default the states.

    The other entries of a state's mapping, such as further norms, are searched too. Its
    accumulation is part of the state and is not searched.
    """
    below, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_mapping)
    for rest, node in below:
        if not _is_mapping(node):
            continue
        here = (*path, *rest)
        if wanted(node):
            yield here, node
        for key, value in _parts(node).items():
            if key != "accumulation":
                yield from find(value, wanted, (*here, DictKey(key)))


def states(tree: Any) -> list[tuple[str, dict[str, Any]]]:
    """Returns the path of each state, such as ['block']['norm'], and its arrays as a dict."""
    return [(keystr(path), _state(node)) for path, node in find(tree)]


def map_states(function: str, change: Callable[[str, Any], Any], tree: Tree) -> Tree:
    """Returns the tree with `change` applied to every state; raises an error if there is none.

    The types of the containers are kept. In a mapping that contains a state, only the entries of
    the state are changed.
    """
    if next(find(tree), None) is None:
        raise ValueError(
            f"{function}: batch_stats should be a state with the keys 'mean', 'var' and 'count', "
            f"or a tree that holds some, such as a dict or a list of them, but holds none "
            f"[no-states]"
        )

    def walk(path: Path, tree: Any) -> Any:
        below, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_mapping)
        structure: Any = treedef
        return structure.unflatten([mapped((*path, *rest), node) for rest, node in below])

    def mapped(path: Path, node: Any) -> Any:
        if not _is_mapping(node):
            return node
        own, parts = STATE if is_state(node) else (), _parts(node)
        new = {k: walk((*path, DictKey(k)), value) for k, value in parts.items() if k not in own}
        if own:
            changed = change(keystr(path), _state(node))
            new |= {k: _boxed(parts.get(k), value) for k, value in changed.items()}
        return _like(node, {key: new[key] for key in parts if key in new} | new)

    new: Tree = walk((), tree)
    return new


def names(path: Path) -> tuple[str, ...]:
    """Returns the names of the parts of a path: keys, indices and attributes."""
    return tuple(keystr((part,), simple=True) for part in path)


def leaves(tree: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields every leaf of the tree, with its path as names; None is a leaf."""
    below, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: node is None or _is_mapping(node)
    )
    for path, node in below:
        if not _is_mapping(node):
            yield names(path), node
            continue
        for key, value in _parts(node).items():
            for rest, leaf in leaves(value):
                yield (*names(path), str(key), *rest), leaf


def at(tree: Any, name: Sequence[str]) -> Any:
    """Returns the node at this path of names in the tree, or None."""
    for part in name:
        tree = _named(tree).get(part)
    return tree


def replaced(tree: Any, name: Sequence[str], new: Any) -> Any:
    """Returns the tree with a new node at this path of names; the types of the containers are kept.

    None removes the node, and the mappings that are empty afterwards. In a list or a dataclass, an
    empty dict replaces the node, so that the other nodes keep their names.
    """
    first, *rest = name
    parts = _named(tree)
    if first not in parts:
        return tree
    changed = replaced(parts[first], rest, new) if rest else new
    if new is None and not changed and _is_mapping(tree):
        return _like(tree, {k: part for k, part in _parts(tree).items() if str(k) != first})
    parts[first] = {} if changed is None else changed
    if _is_mapping(tree):
        return _like(tree, dict(zip(_parts(tree), parts.values(), strict=True)))
    structure: Any = jax.tree.structure(tree, is_leaf=lambda part: part is not tree)
    return structure.unflatten(parts.values())


def _named(node: Any) -> dict[str, Any]:
    """Returns the children of a container of any type, by name."""
    if _is_mapping(node):
        return {str(key): part for key, part in _parts(node).items()}
    if jax.tree_util.all_leaves([node]):
        return {}
    below, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda part: part is not node)
    return {names(path)[0]: part for path, part in below}


def _is_mapping(node: Any) -> bool:
    return isinstance(node, Mapping)


def _parts(node: Any) -> dict[Any, Any]:
    """Returns the stored values of a mapping, without the wrappers of `nnx.State` around dicts."""
    if jax.tree_util.all_leaves([node]):
        return dict(node)
    below, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda part: part is not node)
    stored = {path[0].key: part for path, part in below}
    return {key: stored[key] for key in node}


def _state(node: Any) -> dict[str, Any]:
    """Returns the state in a mapping, with its arrays unboxed."""
    parts = _parts(node)
    return {key: _unboxed(parts[key]) for key in STATE if parts.get(key) is not None}


def _unboxed(value: Any) -> Any:
    """Returns the array in a Flax variable, which is a pytree with one leaf."""
    if isinstance(value, list | tuple) or jax.tree_util.all_leaves([value]):
        return value
    found = jax.tree.leaves(value, is_leaf=_is_mapping)
    return found[0] if len(found) == 1 else value


def _boxed(box: Any, value: Any) -> Any:
    """Returns a new value in a box of the same type."""
    if _is_mapping(box) or _unboxed(box) is box:
        return value
    structure: Any = jax.tree.structure(box, is_leaf=_is_mapping)
    return structure.unflatten([value])


def _like(node: Any, new: dict[str, Any]) -> Any:
    """Returns the new entries in a mapping of the same class as the old one."""
    if type(node) is dict:
        return new
    try:
        return type(node)(new)
    except TypeError:
        return new
