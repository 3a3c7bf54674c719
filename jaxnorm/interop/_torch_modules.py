"""Reads the modules of a PyTorch model without importing PyTorch."""

from typing import Any


def named_modules(function: str, module: Any) -> list[tuple[str, Any]]:
    """Returns the modules by their dotted names; a module with two names is listed twice.

    Raises:
      ValueError: if this is not a PyTorch model, but a state dict, for example.
    """
    if not hasattr(module, "named_modules") or isinstance(module, type):
        found = module.__name__ if isinstance(module, type) else type(module).__name__
        raise ValueError(
            f"{function}: module should be a torch.nn.Module, but is {found}; pass the PyTorch "
            f"model itself, because a state dict does not say of which classes its modules are"
        )
    return list(module.named_modules(remove_duplicate=False))


def class_names(module: Any) -> list[str]:
    """Returns the names of the module's class and of its base classes, in method resolution order.

    For a scripted module (torch.jit.script), the name of the original class comes first.
    """
    names = [base.__name__ for base in type(module).__mro__]
    original = getattr(module, "original_name", None)
    return [original, *names] if isinstance(original, str) else names


def own_arrays(module: Any) -> dict[str, Any]:
    """Returns the parameters and buffers of the module itself, without those of its children."""
    return {
        **dict(module.named_parameters(recurse=False, remove_duplicate=False)),
        **dict(module.named_buffers(recurse=False, remove_duplicate=False)),
    }


def is_uninitialized(array: Any) -> bool:
    """Returns whether this array of a lazy module does not have a shape yet."""
    return type(array).__name__.startswith("Uninitialized")
