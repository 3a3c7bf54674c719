"""Reads the modules of a PyTorch model without importing PyTorch."""

from typing import Any


def named_modules(function: str, module: Any) -> list[tuple[str, Any]]:
    """The modules by their dotted names; a module that has two names, as in the state dict, twice.

    Raises:
      ValueError: if this is no PyTorch model, but its state dict, say.
    """
    if not hasattr(module, "named_modules") or isinstance(module, type):
        found = module.__name__ if isinstance(module, type) else type(module).__name__
        raise ValueError(
            f"{function}: module should be a torch.nn.Module, but is {found}; write the model "
            f"itself, because a state dict does not say of which classes its modules are"
        )
    return list(module.named_modules(remove_duplicate=False))


def class_names(module: Any) -> list[str]:
    """The names of the module's class and of those that it inherits from, the nearest first.

    A scripted module (torch.jit.script) has the name of the class that it was made from.
    """
    names = [base.__name__ for base in type(module).__mro__]
    original = getattr(module, "original_name", None)
    return [original, *names] if isinstance(original, str) else names


def own_arrays(module: Any) -> dict[str, Any]:
    """The parameters and buffers that the module itself holds, and its children do not."""
    return {
        **dict(module.named_parameters(recurse=False, remove_duplicate=False)),
        **dict(module.named_buffers(recurse=False, remove_duplicate=False)),
    }


def is_uninitialized(array: Any) -> bool:
    """Whether a lazy module has yet to see the input that gives this array its shape."""
    return type(array).__name__.startswith("Uninitialized")
