"""Any model that gives texts vectors: a folder of ours, a plain Qwen3 backbone, or what
sentence-transformers reads."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from ml_embed.errors import UserError, one_line
from ml_embed.files.paths import model_place, model_type
from ml_embed.inference.embedder import Embedder
from ml_embed.inference.encoding import choose_device
from ml_embed.model_folders.model_folder import RECORD_FILE


class TextModel(Protocol):
    """Texts in, vectors out."""

    name: str
    dim: int
    device: torch.device

    def encode(self, texts: Sequence[str], normalize: bool = True) -> np.ndarray:
        """(len(texts), dim) float32: rows of unit length, or what the model gives before it
        normalises at its end."""


def check_finite(
    vectors: np.ndarray,
    title: str,
    start: int,
    problem: str = "the model gives NaN or infinity there; is it damaged?",
) -> None:
    """Raise UserError for the first vector, (n, D), that has NaN or infinity.

    Args:
        title: what the texts are.
        start: number of the first text.
    """
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise UserError(f"{title}, text {start + int(finite.argmin())} (from 0): {problem}")


class OwnModel:
    """A model folder of this project, or a backbone."""

    def __init__(self, folder: Path, device: str | None):
        self.name = str(folder)
        self._embedder = Embedder.from_pretrained(folder, device=device)
        self.dim, self.device = self._embedder.dim, self._embedder.device

    def encode(self, texts: Sequence[str], normalize: bool = True) -> np.ndarray:
        return self._embedder.encode(texts, show_progress=False, normalize=normalize)


class SentenceTransformersModel:
    """Any folder or hub name that sentence-transformers reads; code that comes with a model is not
    run."""

    def __init__(self, name: str, device: str | None, batch_size: int):
        if importlib.util.find_spec("sentence_transformers") is None:
            raise UserError(
                f"{name} is not a model folder of this project (no {RECORD_FILE}); other models "
                "are read with "
                "sentence-transformers, which is not installed: pip install "
                "'ml-embed[sentence-transformers]'"
            )
        from sentence_transformers import SentenceTransformer

        self.name, self.device = name, choose_device(device)
        try:
            self._model = SentenceTransformer(
                name, device=str(self.device), trust_remote_code=False
            )
        except (
            Exception
        ) as error:  # it reads many kinds of models, whose mistakes fail in as many ways
            raise UserError(f"{name} cannot be read as a model: {one_line(error)}") from None
        if type(self._model[-1]).__name__ == "Normalize":
            del self._model[-1]  # `encode` does it, where it is wanted
        self._batch_size = batch_size
        self.dim = self.encode(["a"]).shape[1]

    def encode(self, texts: Sequence[str], normalize: bool = True) -> np.ndarray:
        vectors = self._model.encode(
            list(texts),
            normalize_embeddings=normalize,
            batch_size=self._batch_size,
            show_progress_bar=False,
            prompt="",
        )
        return np.asarray(vectors, np.float32)


def load_text_model(name: str | Path, device: str | None = None, batch_size: int = 32) -> TextModel:
    """A model of ours if the folder says so, or a plain Qwen3 backbone, read like those; otherwise
    one that sentence-transformers reads.

    Args:
        device: None is the first GPU if there is one, else the CPU.
        batch_size: texts in a forward pass of sentence-transformers; a model of ours packs texts by
            their tokens.
    Raises:
        UserError: there is no such folder, or it cannot be read.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}; it must be at least 1")
    folder = model_place(name)
    if (folder / RECORD_FILE).is_file() or _is_backbone(folder):
        return OwnModel(folder, device)
    return SentenceTransformersModel(str(folder), device, batch_size)


def _is_backbone(folder: Path) -> bool:
    """Whether it is a Qwen3 folder that does not say how to pool: sentence-transformers would take
    the mean of all tokens, where training and a live teacher take the last."""
    return model_type(folder) == "qwen3" and not (folder / "modules.json").is_file()
