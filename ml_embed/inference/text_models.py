"""Any model that gives vectors of texts: one of this project, or one of sentence-transformers."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ml_embed.errors import UserError, one_line
from ml_embed.files.model_identity import model_identity
from ml_embed.files.model_source import find_model_folder
from ml_embed.files.paths import home_path, model_type
from ml_embed.inference.embedder import Embedder
from ml_embed.inference.encoding import choose_device
from ml_embed.model_folders.foreign import ADAPTER_FILE, MODULES_FILE, check_foreign
from ml_embed.model_folders.modules import ForeignModules, read_modules
from ml_embed.model_folders.record import RECORD_FILE


class TextModel(Protocol):
    """Texts in, vectors out."""

    name: str
    """the folder, or the name on the hub"""
    identity: dict[str, str]
    """what the model is, wherever it lies: file -> digest of its content"""
    prompts: dict[str, str]
    """saved ones, name -> text; `encode` puts none in front of texts"""
    dim: int
    device: torch.device
    parameters: int

    def encode(self, texts: Sequence[str], normalize: bool = True) -> np.ndarray:
        """(len(texts), dim) float32, rows of unit length unless `normalize` is False."""


class OwnModel:
    """A model folder of this project, or a backbone."""

    def __init__(self, folder: Path, name: str, device: str | None):
        self.name, self.identity = name, model_identity(folder)
        self._embedder = Embedder.from_pretrained(folder, device=device)
        self.dim, self.device = self._embedder.dim, self._embedder.device
        self.prompts, self.parameters = self._embedder.prompts, self._embedder.num_parameters

    def encode(self, texts: Sequence[str], normalize: bool = True) -> np.ndarray:
        return self._embedder.encode(texts, prompt="", show_progress=False, normalize=normalize)


class SentenceTransformersModel:
    """A folder that sentence-transformers reads; code that comes with a model is not run."""

    def __init__(self, folder: Path, name: str, device: str | None, batch_size: int):
        self.name, self.device = name, choose_device(device)
        self._model = open_sentence_transformer(folder, name, self.device)
        if type(self._model[-1]).__name__ == "Normalize":
            del self._model[-1]  # `encode` does it, where it is wanted
        self._batch_size, self.identity = batch_size, model_identity(folder)
        self.prompts = dict(self._model.prompts)
        self.parameters = sum(parameter.numel() for parameter in self._model.parameters())
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


def open_sentence_transformer(folder: Path, name: str, device: torch.device) -> Any:
    """sentence-transformers' own model of a folder, in which nothing asks for code.

    Raises:
        UserError: the library is missing, or the folder is refused by it or before it.
    """
    return open_foreign(folder, name, "SentenceTransformer", device=str(device))


def open_foreign(folder: Path, name: str, kind: str, **given: Any) -> Any:
    """A model of one of sentence-transformers' classes, of a folder in which nothing asks for code.

    Args:
        folder: the model's.
        name: what it is called in messages.
        kind: the name of the class.
        given: arguments for it.
    Raises:
        UserError: the library is missing, or the folder is refused by it or before it.
    """
    if importlib.util.find_spec("sentence_transformers") is None:
        raise UserError(
            f"{name} is not a model folder of this project (no {RECORD_FILE}); other models "
            "are read with sentence-transformers, which is not installed: pip install "
            "'ml-embed[sentence-transformers]'"
        )
    check_foreign(folder)
    import sentence_transformers

    try:
        return getattr(sentence_transformers, kind)(str(folder), trust_remote_code=False, **given)
    except Exception as error:  # the many kinds of models that it reads fail in as many ways
        raise UserError(f"{name} cannot be read as a model: {one_line(error)}") from None


def load_text_model(name: str | Path, device: str | None = None, batch_size: int = 32) -> TextModel:
    """A model of this project or a plain Qwen3 backbone, or else one of sentence-transformers.

    A folder whose modules are not this project's is sentence-transformers' as a whole.

    Args:
        name: a folder, or a name on the hub.
        device: None is the first GPU if there is one, else the CPU.
        batch_size: texts per forward pass of sentence-transformers; a model of this project packs
            texts by their tokens.
    Raises:
        UserError: there is no such folder, or it cannot be read.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}; it must be at least 1")
    folder, shown = find_model_folder(name), str(home_path(name))
    if is_own(folder):
        return OwnModel(folder, shown, device)
    return SentenceTransformersModel(folder, shown, device, batch_size)


def is_own(folder: Path) -> bool:
    """Whether it is a model folder of this project with its own modules, or a Qwen3 backbone.

    A backbone does not say how to pool. sentence-transformers would take the mean of all tokens;
    training takes the last.
    """
    if (folder / RECORD_FILE).is_file():
        try:
            read_modules(folder)
        except ForeignModules:
            return False
        return True
    # An adapter is refused with the remedy.
    backbone = model_type(folder) == "qwen3" or (folder / ADAPTER_FILE).is_file()
    return backbone and not (folder / MODULES_FILE).is_file()
