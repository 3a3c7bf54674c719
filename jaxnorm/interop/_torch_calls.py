"""Calls a PyTorch model in evaluation mode, and records the order and outputs of its modules."""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxnorm.interop._leaves import RUNNING
from jaxnorm.interop._torch_modules import named_modules
from jaxnorm.interop._trees import array, join


class TorchCalls:
    """One call of a PyTorch model.

    Attributes:
      output: the output of the model.
      order: the position of each module in the order of the calls, by name. A module that is not
        called, such as the projection of an attention layer, comes right after its parent.
      outputs: the first tensor that each module in `keep` returned, as a NumPy array.
    """

    def __init__(
        self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, keep: set[str]
    ):
        modules = named_modules("match", module)
        positions: dict[int, int] = {}
        returned: dict[int, Any] = {}
        kept = {id(m) for name, m in modules if name in keep}

        def pre_hook(m: Any, _: Any) -> None:
            positions.setdefault(id(m), len(positions))

        def hook(m: Any, _: Any, output: Any) -> None:
            if id(m) in kept and id(m) not in returned and hasattr(output, "detach"):
                # The next module may change it in place.
                returned[id(m)] = array("match", "output", output.detach().float().cpu()).copy()

        with _evaluating(module), contextlib.ExitStack() as stack:
            for _, m in modules:
                stack.callback(m.register_forward_pre_hook(pre_hook).remove)
                stack.callback(m.register_forward_hook(hook).remove)
            self.output = module(*args, **kwargs)
        self.order = _order(modules, positions)
        self.outputs = {name: returned[id(m)] for name, m in modules if id(m) in returned}


def with_distinct_values(module: Any) -> Any:
    """Returns a copy of the model in which no two parameters or running statistics are equal.

    If two norms have the same values, exchanging them does not change the output.
    """
    import torch

    module = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(0)
    visited: set[int] = set()
    with torch.no_grad():
        for prefix, m in named_modules("match", module):
            parameters = dict(m.named_parameters(recurse=False))
            buffers = dict(m.named_buffers(recurse=False))
            kept = {k: a for k, a in buffers.items() if k in ("weight", "bias", *RUNNING[:2])}
            for name, a in {**parameters, **kept}.items():
                if id(a) in visited or not a.is_floating_point():
                    continue
                visited.add(id(a))
                noise = torch.randn(a.shape, generator=generator)
                a.copy_(_perturbed(join(prefix, name), a, noise.to(a.device, a.dtype)))
    return module


def _perturbed(name: str, a: Any, noise: Any) -> Any:
    """Returns the tensor plus noise of a tenth of the size of its values."""
    if name.endswith(RUNNING[1]):
        return a * (0.2 * noise).exp()
    if a.ndim < 2:
        return a + 0.1 * noise
    size = a.square().mean().sqrt()
    return a + noise * (0.1 * size if size > 0 else a[0].numel() ** -0.5)


@contextlib.contextmanager
def _evaluating(module: Any) -> Iterator[None]:
    """Sets evaluation mode without gradients; restores the mode of every module afterwards."""
    import torch

    modes = [(m, m.training) for m in module.modules()]
    try:
        module.eval()
        with torch.no_grad():
            yield
    finally:
        for m, training in modes:
            m.training = training


def _order(modules: list[tuple[str, Any]], positions: Mapping[int, int]) -> dict[str, int]:
    def first_call(name: str, m: Any) -> int:
        while id(m) not in positions and name:
            name = name.rpartition(".")[0]
            m = by_name[name]
        return positions.get(id(m), len(positions))

    by_name = dict(modules)
    # Sorting is stable: modules with the same position stay in the order of registration.
    names = sorted(by_name, key=lambda name: first_call(name, by_name[name]))
    return {name: position for position, name in enumerate(names)}


def tensors_of(output: Any) -> list[np.ndarray]:
    """Returns the tensors in a PyTorch model's output: one, or a tuple, list or mapping of them."""
    if hasattr(output, "detach"):
        return [array("match", "output", output.detach().cpu())]
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, tuple | list):
        return [a for part in output for a in tensors_of(part)]
    if output is None:
        return []
    raise TypeError(
        f"match: module should return tensors, or a tuple or dict of them, but returns "
        f"{type(output).__name__}; wrap it in a module that does"
    )
