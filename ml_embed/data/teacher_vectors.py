"""A folder of a teacher's vectors of tokenized data: written before training, mapped during it.

`ml_embed.recipe.teacher` writes it. `teacher.json` says what the vectors are. Each dataset has a
file of its queries' vectors, row i for query i, and one of its documents', row j for document j. A
file is named by a digest of all tokens of its texts: datasets that share a corpus share its file,
and no others do.

Training must not read all of its data before it starts. It compares lengths, token counts and some
tokens, which shows nearly every change of the data. The program that writes the vectors compares
digests of all tokens, so that it never keeps a vector of a text that has changed.

Letters: R rows of a process's share, K negatives, H' the teacher's vector length, T tokens.
"""

import hashlib
import json
import mmap
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ml_embed.config import DistillationLoss
from ml_embed.data.batch import ContrastiveBatch, PartVectors
from ml_embed.data.store import Store
from ml_embed.errors import UserError

RECORD = "teacher.json"
FORMAT_VERSION = 2
DTYPES: dict[str, type[np.floating]] = {"float16": np.float16, "float32": np.float32}
SAMPLED_PLACES = 64
"""places of a dataset's tokens that are compared"""
SAMPLED_TOKENS = 64
"""tokens from each of these places on"""
SAMPLED_VECTORS = 8
"""vectors of a file that are compared"""
KD_REMEDY = 'set kd_loss to "similarity", which compares cosines and takes any teacher'


@dataclass(frozen=True)
class DatasetTexts:
    """What identifies the texts of a tokenized dataset and their order."""

    rows: int
    documents: int
    check: str
    """digest of their lengths, of some of their tokens, and of how often each token occurs"""


def describe_texts(store: Store) -> dict[str, DatasetTexts]:
    """Identify the texts of each dataset by their lengths and some of their tokens."""
    described = {}
    for name, (queries, documents) in digest_texts(store, _digest_of_some).items():
        dataset = store.datasets[name]
        check = _digest(
            queries.encode(), documents.encode(), np.ascontiguousarray(dataset.token_counts)
        )
        described[name] = DatasetTexts(dataset.num_rows, dataset.num_documents, check)
    return described


def digest_texts(
    store: Store, digest: Callable[[np.ndarray, np.ndarray], str]
) -> dict[str, tuple[str, str]]:
    """The digests of each dataset's queries and of its documents.

    Args:
        store: the datasets.
        digest: a function of the lengths of n texts, (n,) int32, and all their tokens, (T,) int32.
            Called once per corpus.
    """
    # In the released layout many datasets have the same corpus.
    of_corpus: dict[tuple[int, int], str] = {}
    digests = {}
    for name, dataset in store.datasets.items():
        corpus = dataset.document_lengths.__array_interface__["data"][0], dataset.num_documents
        if corpus not in of_corpus:
            of_corpus[corpus] = digest(dataset.document_lengths, dataset.document_tokens)
        digests[name] = digest(dataset.query_lengths, dataset.query_tokens), of_corpus[corpus]
    return digests


def _digest_of_some(lengths: np.ndarray, tokens: np.ndarray) -> str:
    """A digest of all lengths, which change with the order of texts, and of some tokens."""
    places = np.linspace(0, max(0, len(tokens) - SAMPLED_TOKENS), SAMPLED_PLACES).astype(np.int64)
    samples = (
        np.ascontiguousarray(tokens[place : place + SAMPLED_TOKENS]) for place in places.tolist()
    )
    return _digest(np.ascontiguousarray(lengths), *samples)


def _digest(*parts: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


@dataclass(frozen=True)
class VectorFile:
    """One file of vectors."""

    file: str
    """name in the folder"""
    rows: int
    check: str
    """digest of some of its vectors"""

    @classmethod
    def describe(cls, path: Path, dtype: str, width: int) -> "VectorFile":
        """Describe a file that is complete."""
        vectors = map_vectors(path, dtype, width)
        return cls(path.name, len(vectors), _digest_of_sample(vectors))

    def problem(self, folder: Path, dtype: str, width: int) -> str | None:
        """What is wrong with the file; None if nothing is."""
        path = folder / self.file
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != self.rows * width * np.dtype(DTYPES[dtype]).itemsize:
            return f"{path} does not have the size of {self.rows} vectors"
        if _digest_of_sample(map_vectors(path, dtype, width)) != self.check:
            return f"{path} is damaged"
        return None


def map_vectors(path: Path, dtype: str, width: int) -> np.ndarray:
    """(rows, width), read-only, over a memory map; at least one row."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)  # a batch's rows lie anywhere: read no others with them
    return np.frombuffer(mapped, DTYPES[dtype]).reshape(-1, width)


def _digest_of_sample(vectors: np.ndarray) -> str:
    rows = np.unique(np.linspace(0, len(vectors) - 1, SAMPLED_VECTORS).astype(np.int64))
    return _digest(np.ascontiguousarray(vectors[rows]))


@dataclass(frozen=True)
class DatasetVectors:
    """A dataset's entry in teacher.json."""

    rows: int
    documents: int
    digest: str
    """of every token of its texts"""
    check: str
    """`DatasetTexts.check`"""
    query_vectors: VectorFile
    document_vectors: VectorFile

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> "DatasetVectors":
        files = {key: VectorFile(**entry[key]) for key in ("query_vectors", "document_vectors")}
        return cls(**entry | files)


@dataclass(frozen=True)
class TeacherVectors:
    """An open folder of teacher vectors; only the vectors of a batch are read into memory."""

    folder: Path
    settings: dict[str, Any]
    """model, prompts and the like, as `ml_embed.recipe.teacher` was told"""
    dtype: str
    width: int
    """H', components of a vector"""
    normalized: bool
    """whether they are of unit length"""
    datasets: dict[str, DatasetVectors]

    @classmethod
    def read(cls, folder: Path) -> "TeacherVectors":
        """Open a folder.

        Raises:
            UserError: it has no teacher.json, which is written last, or that is damaged.
        """
        path = folder / RECORD
        if not path.is_file():
            raise UserError(
                f"{folder} holds no {RECORD}: it is not a folder of teacher vectors, or not "
                "finished. Make it, or go on with it, by scripts/embed_teacher.py"
            )
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if (version := record["format_version"]) != FORMAT_VERSION:
                raise ValueError(f"format version {version!r}, not {FORMAT_VERSION}")
            datasets = {
                name: DatasetVectors.from_json(entry) for name, entry in record["datasets"].items()
            }
            dtype, width = record["dtype"], record["width"]
            if dtype not in DTYPES or not isinstance(width, int) or width < 1:
                raise ValueError(f"dtype {dtype!r}, width {width!r}")
            return cls(
                folder, record["settings"], dtype, width, bool(record["normalized"]), datasets
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is damaged or of another version ({error}); make the vectors again with "
                "scripts/embed_teacher.py --overwrite"
            ) from None

    def to_json(self) -> dict[str, Any]:
        """The content of teacher.json."""
        described = {key: value for key, value in asdict(self).items() if key != "folder"}
        return {"format_version": FORMAT_VERSION, **described}

    def fingerprint(self, names: list[str]) -> str:
        """A digest of the vectors of some datasets, the same wherever the folder lies."""
        parts = [f"{self.dtype} {self.width}"]
        for name in sorted(names):
            entry = self.datasets[name]
            parts.append(
                f"{name} {entry.digest} {entry.query_vectors.check} {entry.document_vectors.check}"
            )
        return _digest("\n".join(parts).encode())

    def of_batch(self, batch: ContrastiveBatch, rows: np.ndarray) -> PartVectors:
        """The teacher's vectors of a share: one exit, in the type of the files, on the CPU.

        Args:
            batch: the share.
            rows: (R,) the dataset's rows that it consists of, in its order.
        """
        entry = self.datasets[batch.dataset]
        negative_documents = batch.negative_documents.numpy()  # (R, K), -1 for none
        present = negative_documents >= 0
        documents = np.concatenate([batch.passage_documents.numpy(), negative_documents[present]])
        # Each vector is read once, in the order of the file.
        distinct, places = np.unique(documents, return_inverse=True)
        found = self._vectors(entry.document_vectors)[distinct][places]
        negatives = np.zeros((*present.shape, self.width), found.dtype)
        negatives[present] = found[len(rows) :]
        parts = (self._vectors(entry.query_vectors)[rows], found[: len(rows)], negatives)
        return PartVectors(*(torch.from_numpy(part).unsqueeze(0) for part in parts))

    def problems_of(self, name: str, texts: DatasetTexts) -> list[str]:
        """What is wrong with the vectors of a dataset that has these texts."""
        again = "run scripts/embed_teacher.py"
        entry = self.datasets.get(name)
        if entry is None:
            return [f"dataset {name!r} is not there; {again} again with the same flags"]
        if entry.check != texts.check:
            return [
                f"dataset {name!r} has other texts or another order there ({entry.rows} rows, "
                f"{entry.documents} documents) than in the data ({texts.rows}, "
                f"{texts.documents}); {again} again"
            ]
        files = (entry.query_vectors, entry.document_vectors)
        found = (file.problem(self.folder, self.dtype, self.width) for file in files)
        return [f"{problem}; {again} with --overwrite" for problem in found if problem]

    def _vectors(self, file: VectorFile) -> np.ndarray:
        # Mapped again for each batch, in microseconds: a process may not hold thousands of maps.
        return map_vectors(self.folder / file.file, self.dtype, self.width)


def open_teacher_vectors(
    folder: Path, store: Store, student_width: int, kd_loss: DistillationLoss
) -> TeacherVectors:
    """Open the teacher's vectors of a run and check them against the data and the student.

    Args:
        folder: what holds them.
        store: the run's datasets.
        student_width: components of the student's vectors.
        kd_loss: the distillation loss.
    Raises:
        UserError: vectors are missing, damaged, of other data, or do not fit the loss; all problems
            in one message.
    """
    teacher = TeacherVectors.read(folder)
    problems = []
    if kd_loss == "vectors" and teacher.width < student_width:
        problems.append(
            f"its vectors have {teacher.width} components, fewer than the student's "
            f"{student_width}; {KD_REMEDY}"
        )
    if kd_loss == "vectors" and teacher.normalized:
        problems.append(f"its vectors are of unit length, which the student's are not; {KD_REMEDY}")
    for name, texts in describe_texts(store).items():
        problems += teacher.problems_of(name, texts)
    if problems:
        listing = "\n".join(f"  - {problem}" for problem in problems)
        raise UserError(f"teacher_vectors_path: {folder} does not fit:\n{listing}")
    return teacher
