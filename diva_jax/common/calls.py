"""Modules that can be called, for functions of the package that have the name of one of its modules."""

import functools
import importlib
import sys
import types


class _Callable(types.ModuleType):
    """A module; calling it calls the function that `_called` imports."""

    def __call__(self, *args, **kw):
        return self._called()(*args, **kw)


def make_callable(module: str, function: str) -> None:
    """Makes a module callable, in addition to what it is.

    The name of a package's attribute is that of the submodule as soon as anything imports the submodule, so a function
    of this name could not be relied on.

    Args:
      module: `__name__` of the module.
      function: `package.module:function`, imported by the first call.
    """
    where, _, name = function.partition(":")
    found = sys.modules[module]
    found._called = functools.cache(lambda: getattr(importlib.import_module(where), name))
    found.__class__ = _Callable
