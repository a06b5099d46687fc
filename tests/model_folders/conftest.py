"""Model folders that tests of this room spoil."""

import shutil
from pathlib import Path

import pytest
from helpers.tiny_models import make_tokenizer, write_model


@pytest.fixture(scope="session")
def nested(tmp_path_factory) -> Path:
    """A trained model folder, made once; tests leave it as it is."""
    return write_model(tmp_path_factory.mktemp("model") / "nested", make_tokenizer(), "per_layer")


@pytest.fixture
def folder(nested, tmp_path) -> Path:
    """A trained model folder that may be changed."""
    return shutil.copytree(nested, tmp_path / "model")
