"""Classes by name: tables name what they hold, so that reading a table imports nothing."""

from importlib import import_module


def load_class(target: str):
    """The class behind `module:name`."""
    module, name = target.split(":")
    return getattr(import_module(module), name)
