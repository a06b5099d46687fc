"""Fixtures that tests of several rooms use."""

import logging
import os

import pytest
import torch
import torch._dynamo
import transformers
from helpers.tiny_world import TinyWorld, make_world
from packaging.version import Version

from ml_embed.kernels.compilation import COMPILES_SINCE


def pytest_configure(config):
    """Tests see no GPU, nor do the processes that they start, but with `-m gpu`.

    So they find the same on every machine.
    """
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["HIP_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny tensors gain nothing from threads, and two cores are shared by child processes."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def silent_package():
    """As in a program that uses the package as a library, whatever command a test ran before."""
    logger = logging.getLogger("ml_embed")
    logger.setLevel(logging.NOTSET)
    logger.handlers, logger.propagate = [], True


@pytest.fixture
def compiled_graphs(monkeypatch) -> list[torch.fx.GraphModule]:
    """What compile_layers traces and differentiates, without the half minute of inductor's C++
    (test_benchmarks.py)."""
    if Version(transformers.__version__) < Version(COMPILES_SINCE):
        pytest.skip("this transformers cannot compile layers")
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda function, **options: compiled(function, **{"backend": backend} | options),
    )
    torch._dynamo.reset()
    return graphs


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> TinyWorld:
    """Made once; tests leave it as it is."""
    return make_world(tmp_path_factory.mktemp("world"))
