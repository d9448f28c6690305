"""``attn_implementation="clara_fast"`` for everyone who imports clara_fast, at no cost to those who do not need it.

transformers' model code takes seconds to import, so it is not imported for the registration: that waits for it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_MODELS = "transformers.modeling_utils"


def register_attention() -> None:
    """Register now if transformers' model code is imported, else as soon as it is."""
    if _MODELS in sys.modules:
        _register()
    elif not any(isinstance(finder, _Once) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Once())


def _register() -> None:
    try:
        importlib.import_module("clara_fast.modeling.attention")
    except Exception as error:
        # Someone is importing transformers: that must not fail because of us.
        warnings.warn(f'attn_implementation="clara_fast" is not there: {error}', stacklevel=2)


class _Once(MetaPathFinder):
    """Finds ``transformers.modeling_utils`` as it would be found without us, and registers after it has run."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _MODELS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register()

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec
