"""Reading data and configs loads no library that only models need: commands start quickly."""

import subprocess
import sys

import pytest

HEAVY = {"transformers", "accelerate", "datasets"}
LIGHT = (
    "ml_embed.config",
    "ml_embed.data.store",
    "ml_embed.data.batch",
    "ml_embed.data.loader",
)


@pytest.mark.parametrize("module", LIGHT)
def test_importing_loads_no_model_library(module):
    program = f"import sys, {module}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    loaded = run.stdout.decode().split()
    assert module in loaded
    assert not HEAVY & set(loaded)
