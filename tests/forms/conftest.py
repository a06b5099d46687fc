"""Trained model folders for the tests of this room."""

from pathlib import Path

import pytest
from helpers.tiny_models import make_tokenizer, write_model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """Made once; tests leave it as it is."""
    return write_model(tmp_path_factory.mktemp("model") / "nested", make_tokenizer(), "per_layer")


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """One with a whole token table and no factors (r = 0)."""
    folder = tmp_path_factory.mktemp("model") / "whole"
    return write_model(folder, make_tokenizer(), "per_layer", factorized=False)
