"""The files of `scripts/` as modules."""

import importlib.util
from types import ModuleType

from helpers import ROOT


def load_script(name: str) -> ModuleType:
    """`scripts/<name>.py`, freshly executed, without running its `main`."""
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
