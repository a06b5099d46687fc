"""Any model that scores pairs of texts: a cross-encoder, or a model folder of this project.

Letters: P pairs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ml_embed.errors import UserError, one_line
from ml_embed.files.json_file import read_json
from ml_embed.files.model_identity import model_identity
from ml_embed.files.model_source import find_model_folder
from ml_embed.files.paths import home_path
from ml_embed.inference.encoding import choose_device
from ml_embed.inference.text_models import OwnModel, is_own, open_foreign
from ml_embed.model_folders.foreign import DAMAGED, read_listing
from ml_embed.model_folders.record import ModelRecord


class PairModel(Protocol):
    """Pairs of texts in, scores out."""

    name: str
    """the folder, or the name on the hub"""
    identity: dict[str, str]
    """what the model is, wherever it lies: file -> digest of its content"""

    def score(self, queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
        """(P,) float32 logits of the pairs: the document is the likelier, the higher."""


class CrossEncoderModel:
    """A cross-encoder that sentence-transformers reads; a score is its logit, without a sigmoid."""

    def __init__(self, folder: Path, name: str, device: str | None, batch_size: int):
        _check_scores_pairs(folder, name)
        self.name, self.identity = name, model_identity(folder)
        self._batch_size = batch_size
        # An activation that is given keeps the library from calling what the folder names.
        given: dict[str, Any] = {"activation_fn": torch.nn.Identity()}
        device = str(choose_device(device))
        self._model = open_foreign(folder, name, "CrossEncoder", device=device, **given)
        self._try()

    def score(self, queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
        pairs = list(zip(queries, documents, strict=True))
        scores = self._model.predict(pairs, batch_size=self._batch_size, show_progress_bar=False)
        return np.asarray(scores, np.float32)

    def _try(self) -> None:
        """Raise UserError where two pairs of different lengths do not get one score each."""
        try:
            scores = self.score(["a", "a a a"], ["b", "b b b b"])
        except Exception as error:  # the many kinds of models fail in as many ways
            raise UserError(f"{self.name} cannot score pairs: {one_line(error)}") from None
        if scores.ndim > 1:
            raise UserError(
                f"{self.name} gives {scores.shape[1]} numbers for a pair; take a cross-encoder "
                "that gives one score (num_labels 1)"
            )


class OwnPairModel:
    """A model folder of this project; a score is the cosine divided by the trained temperature."""

    def __init__(self, folder: Path, record: ModelRecord, name: str, device: str | None):
        self._model, self._temperature = OwnModel(folder, name, device), record.temperature
        self.name, self.identity = name, self._model.identity

    def score(self, queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
        return (self._vectors(queries) * self._vectors(documents)).sum(1) / self._temperature

    def _vectors(self, texts: Sequence[str]) -> np.ndarray:
        """(P, D); each distinct text is encoded once."""
        places: dict[str, int] = {}
        numbers = [places.setdefault(text, len(places)) for text in texts]
        return self._model.encode(list(places))[numbers]


def load_pair_model(name: str | Path, device: str | None = None, batch_size: int = 32) -> PairModel:
    """A trained model folder of this project, or else a cross-encoder of sentence-transformers.

    Args:
        name: a folder, or a name on the hub.
        device: None is the first GPU if there is one, else the CPU.
        batch_size: pairs per forward pass of a cross-encoder.
    Raises:
        UserError: there is no such folder, or it cannot be read, or it does not score pairs.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}; it must be at least 1")
    folder, shown = find_model_folder(name), str(home_path(name))
    record = ModelRecord.load(folder)
    if record is not None and is_own(folder):
        return OwnPairModel(folder, record, shown, device)
    return CrossEncoderModel(folder, shown, device, batch_size)


def _check_scores_pairs(folder: Path, name: str) -> None:
    """Refuse other models, to which the library would give a head with random weights."""
    modules = [module.kind for module in read_listing(folder)]
    named = read_json(folder / "config.json", DAMAGED).get("architectures")
    kinds = [str(kind) for kind in named] if isinstance(named, list) else []
    has_head = any(kind.endswith("ForSequenceClassification") for kind in kinds)
    if not (has_head or "LogitScore" in modules):
        raise UserError(
            f"{name} is no cross-encoder (its architecture is {', '.join(kinds) or 'not named'}) "
            "and no trained model folder of this project; take one that scores pairs, such as "
            "those of sentence-transformers' class CrossEncoder"
        )
