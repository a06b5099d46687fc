"""A folder of a teacher's vectors of tokenized data: written before training, mapped during it.

`ml_embed.recipe.teacher` writes it. `teacher.json` says what the vectors are. Each dataset has a
file of its queries' vectors, row i for query i, and one of its documents', row j for document j. A
file is named by a digest of all tokens of its texts: datasets that share a corpus share its file,
and no others do. The record holds the digest of each file.

Letters: R rows of a process's share, K negatives, H' the teacher's vector length, T tokens.
"""

import mmap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ml_embed.config import DistillationLoss
from ml_embed.data.batch import ContrastiveBatch, PartVectors
from ml_embed.data.store import Store, TokenizedDataset
from ml_embed.errors import UserError
from ml_embed.files.digests import digests_of, file_digest, seal_is_broken, sealed
from ml_embed.files.json_file import parse_json

RECORD = "teacher.json"
FORMAT_VERSION = 3
DTYPES: dict[str, type[np.floating]] = {"float16": np.float16, "float32": np.float32}
KD_REMEDY = 'set kd_loss to "similarity", which compares cosines and takes any teacher'


@dataclass(frozen=True)
class VectorFile:
    """One file of vectors."""

    file: str
    """name in the folder"""
    rows: int
    digest: str
    """of its content"""

    @classmethod
    def describe(cls, path: Path, dtype: str, width: int) -> "VectorFile":
        """Describe a file that is complete."""
        return cls(path.name, path.stat().st_size // _row_bytes(dtype, width), file_digest(path))

    def problem(self, folder: Path, dtype: str, width: int) -> str | None:
        """What is wrong with the file but for its content; None if nothing is."""
        path = folder / self.file
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != self.rows * _row_bytes(dtype, width):
            return f"{path} does not have the size of {self.rows} vectors"
        return None


def _row_bytes(dtype: str, width: int) -> int:
    return width * np.dtype(DTYPES[dtype]).itemsize


def map_vectors(path: Path, dtype: str, width: int) -> np.ndarray:
    """(rows, width), read-only, over a memory map; at least one row."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)  # a batch's rows lie anywhere: read no others with them
    return np.frombuffer(mapped, DTYPES[dtype]).reshape(-1, width)


@dataclass(frozen=True)
class DatasetVectors:
    """A dataset's entry in teacher.json."""

    rows: int
    documents: int
    query_digest: str
    document_digest: str
    """of all tokens of its texts, as in `TokenizedDataset`"""
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
            record = parse_json(path.read_bytes())
            if seal_is_broken(record):
                raise ValueError("it has changed since it was written")
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
        return sealed({"format_version": FORMAT_VERSION, **described})

    def identity(self, names: Iterable[str]) -> dict[str, str]:
        """File -> digest of its content, of the vectors of some datasets; and their form."""
        entries = [self.datasets[name] for name in names]
        files = [file for e in entries for file in (e.query_vectors, e.document_vectors)]
        return {RECORD: f"{self.width} x {self.dtype}"} | {f.file: f.digest for f in files}

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

    def problems_of(self, dataset: TokenizedDataset) -> list[str]:
        """What is wrong with the vectors of a dataset that shows without reading them."""
        name, again = dataset.name, "run scripts/embed_teacher.py"
        entry = self.datasets.get(name)
        if entry is None:
            return [f"dataset {name!r} is not there; {again} again with the same flags"]
        texts = dataset.query_digest, dataset.document_digest
        if (entry.query_digest, entry.document_digest) != texts:
            return [
                f"dataset {name!r} has other texts or another order there ({entry.rows} rows, "
                f"{entry.documents} documents) than in the data ({dataset.num_rows}, "
                f"{dataset.num_documents}); {again} again"
            ]
        files = (entry.query_vectors, entry.document_vectors)
        found = (file.problem(self.folder, self.dtype, self.width) for file in files)
        return [f"{problem}; {again} with --overwrite" for problem in found if problem]

    def damaged(self, names: Iterable[str], memory: Sequence[Path], verify: bool) -> list[str]:
        """What is wrong with the content of the vectors of some datasets; see `digests_of`."""
        recorded = {
            self.folder / file: digest
            for file, digest in self.identity(names).items()
            if file != RECORD
        }
        return [
            f"{path} is damaged: its digest was {recorded[path]}, now it is {found}; run "
            "scripts/embed_teacher.py with --overwrite"
            for path, found in digests_of(recorded, memory, verify).items()
            if found != recorded[path]
        ]

    def _vectors(self, file: VectorFile) -> np.ndarray:
        # Mapped again for each batch, in microseconds: a process may not hold thousands of maps.
        return map_vectors(self.folder / file.file, self.dtype, self.width)


def open_teacher_vectors(
    folder: Path,
    store: Store,
    student_width: int,
    kd_loss: DistillationLoss,
    cache_dir: Path | None = None,
    verify: bool = False,
) -> TeacherVectors:
    """Open the teacher's vectors of a run and check them against the data and the student.

    Args:
        folder: what holds them.
        store: the run's datasets.
        student_width: components of the student's vectors.
        kd_loss: the distillation loss.
        cache_dir: where digests are remembered if that cannot be beside the vectors.
        verify: read all vectors, also where their digests are remembered.
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
    memory = (folder,) if cache_dir is None else (folder, cache_dir)
    for dataset in store.datasets.values():
        problems += teacher.problems_of(dataset)
    problems += [] if problems else teacher.damaged(store.datasets, memory, verify)
    if problems:
        listing = "\n".join(f"  - {problem}" for problem in problems)
        raise UserError(f"teacher_vectors_path: {folder} does not fit:\n{listing}")
    return teacher
