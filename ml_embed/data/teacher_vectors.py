"""A teacher's vectors of tokenized data, in a folder that `ml_embed.recipe.teacher` writes and
training maps.

`teacher.json` says what they are. Each dataset has a file of its queries' vectors, row i for query
i, and one of its documents', row j for document j. Files are named by a digest of every token of
their texts: datasets that share a corpus share its file, and no others do.

Training does not read all of its data to start. It compares lengths, token counts and samples,
which shows nearly every change of the data; the whole digests are computed where the vectors are
made, so that making them again after a change never keeps a vector of what was there before.

Letters: R rows of a process's share, K negatives, H' the teacher's vector length.
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
SAMPLED_TOKENS = 64  # from each of these places on
SAMPLED_VECTORS = 8
KD_REMEDY = 'set kd_loss to "similarity", which compares cosines and takes any teacher'


@dataclass(frozen=True)
class DatasetTexts:
    """The texts of a tokenized dataset, told apart from others by content and order."""

    rows: int
    documents: int
    check: str
    """digest of their lengths, of some of their tokens, and of how often each token occurs"""


def describe_texts(store: Store) -> dict[str, DatasetTexts]:
    """Of each dataset. Reads the lengths of all texts, and a few of their tokens."""
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
    """Of each dataset the digest of its queries and of its documents.

    Args:
        digest: the lengths of n texts, (n,) int32, and all their tokens, (T,) int32 -> digest.
            Called once a corpus.
    """
    of_corpus: dict[
        tuple[int, int], str
    ] = {}  # in the released layout many datasets have the same corpus
    digests = {}
    for name, dataset in store.datasets.items():
        corpus = dataset.document_lengths.__array_interface__["data"][0], dataset.num_documents
        if corpus not in of_corpus:
            of_corpus[corpus] = digest(dataset.document_lengths, dataset.document_tokens)
        digests[name] = digest(dataset.query_lengths, dataset.query_tokens), of_corpus[corpus]
    return digests


def _digest_of_some(lengths: np.ndarray, tokens: np.ndarray) -> str:
    """Changes with the order of texts, because lengths do, and with changes of their content that
    the samples meet."""
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
    """One file of rows."""

    file: str
    """name in the folder"""
    rows: int
    check: str
    """digest of some of its rows"""

    @classmethod
    def describe(cls, path: Path, dtype: str, width: int) -> "VectorFile":
        """Of a file that is whole."""
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
        mapped.madvise(
            mmap.MADV_RANDOM
        )  # a batch's rows lie anywhere: what stands around them need not be read
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
    """An open folder. Nothing of it is in memory: a batch's rows are read when they are asked
    for."""

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
        """
        Raises:
            UserError: the folder has no record, it is not finished, or it is damaged.
        """
        path = folder / RECORD
        if not path.is_file():
            raise UserError(
                f"{folder} holds no {RECORD}: it is not a folder of teacher vectors, or not "
                "finished. "
                "Make it, or go on with it, by scripts/embed_teacher.py"
            )
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["format_version"] != FORMAT_VERSION:
                raise ValueError(
                    f"format version {record['format_version']!r}, not {FORMAT_VERSION}"
                )
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
        """teacher.json."""
        described = {key: value for key, value in asdict(self).items() if key != "folder"}
        return {"format_version": FORMAT_VERSION, **described}

    def fingerprint(self, names: list[str]) -> str:
        """Tells the vectors of some datasets apart by content, wherever they lie."""
        parts = [f"{self.dtype} {self.width}"]
        for name in sorted(names):
            entry = self.datasets[name]
            parts.append(
                f"{name} {entry.digest} {entry.query_vectors.check} {entry.document_vectors.check}"
            )
        return _digest("\n".join(parts).encode())

    def of_batch(self, batch: ContrastiveBatch, rows: np.ndarray) -> PartVectors:
        """The teacher's vectors of a share: one exit, in the type they are stored in, on the CPU.

        Args:
            batch: the share.
            rows: (R,) the dataset's rows in it, in its order.
        """
        entry = self.datasets[batch.dataset]
        negative_documents = batch.negative_documents.numpy()  # (R, K), -1 for none
        present = negative_documents >= 0
        documents = np.concatenate([batch.passage_documents.numpy(), negative_documents[present]])
        distinct, places = np.unique(
            documents, return_inverse=True
        )  # each is read once, in the order of the file
        found = self._vectors(entry.document_vectors)[distinct][places]
        negatives = np.zeros((*present.shape, self.width), found.dtype)
        negatives[present] = found[len(rows) :]
        parts = (self._vectors(entry.query_vectors)[rows], found[: len(rows)], negatives)
        return PartVectors(*(torch.from_numpy(part).unsqueeze(0) for part in parts))

    def _vectors(self, file: VectorFile) -> np.ndarray:
        # Mapped for each batch anew, in microseconds: a process may not hold thousands of open
        # maps.
        return map_vectors(self.folder / file.file, self.dtype, self.width)


def open_teacher_vectors(
    folder: Path, store: Store, student_width: int, kd_loss: DistillationLoss
) -> TeacherVectors:
    """The vectors of a run's datasets, checked against the data and the student.

    Raises:
        UserError: they are missing, damaged, of other data, or cannot be distilled this way; all
            problems at once.
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
        entry = teacher.datasets.get(name)
        if entry is None:
            problems.append(
                f"dataset {name!r} is not there; run scripts/embed_teacher.py again with the same "
                "flags"
            )
        elif entry.check != texts.check:
            problems.append(
                f"dataset {name!r} has other texts or another order there ({entry.rows} rows, "
                f"{entry.documents} "
                f"documents) than in the data ({texts.rows}, {texts.documents}); run "
                "scripts/embed_teacher.py again"
            )
        else:
            files = (entry.query_vectors, entry.document_vectors)
            found = (file.problem(folder, teacher.dtype, teacher.width) for file in files)
            problems += [
                f"{problem}; run scripts/embed_teacher.py with --overwrite"
                for problem in found
                if problem
            ]
    if problems:
        listing = "\n".join(f"  - {problem}" for problem in problems)
        raise UserError(f"teacher_vectors_path: {folder} does not fit:\n{listing}")
    return teacher
