"""A teacher's vectors of tokenized data, computed once, so that training does not run the teacher.

The texts are decoded from their token ids. So a vector belongs to the very query or document that
training reads, and data in the released layout, of which no raw text exists, works too. A
byte-level tokenizer (Qwen3's) gives back every character, after its Unicode normalisation (NFC); a
text that was cut inside a character ends in U+FFFD. Other tokenizers give back what they kept:
lower-case letters, single spaces.

Letters: n texts of a block, T tokens.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ml_embed.data.sources import find_sources
from ml_embed.data.store import Store, TokenizedDataset, open_store
from ml_embed.data.teacher_vectors import (
    DTYPES,
    RECORD,
    DatasetVectors,
    TeacherVectors,
    VectorFile,
)
from ml_embed.distributed.agreement import check_agreement
from ml_embed.distributed.collectives import (
    compute_on_all_processes,
    compute_on_main_process,
)
from ml_embed.distributed.shares import Rows
from ml_embed.distributed.sole_launch import sole_launch_into
from ml_embed.errors import UserError
from ml_embed.files.atomic import disk_errors_are_user_errors
from ml_embed.files.digests import file_digest, value_digest
from ml_embed.files.model_source import find_tokenizer_folder
from ml_embed.files.work_record import Entry, Finished, WorkRecord, journal_of
from ml_embed.inference.encoding import check_finite
from ml_embed.inference.text_models import TextModel
from ml_embed.prepare.prompts import Prompts
from ml_embed.prepare.tokenizer import TextTokenizer, end_token, fingerprint, load_tokenizer

LOCK = ".teacher.lock"
OWN_CACHE = "cache"
REMEDY = "Use another --output, or --overwrite to make that folder anew"
VECTORS_SUFFIX = ".vectors"
BLOCK = 2048  # texts between two writes to disk (see `Rows.block`)
PROBES = ("a", "A short sentence.", "Two sentences. The second is the longer one.")
UNIT_TOLERANCE = 1e-3
CHECKED_TEXTS = 100
SAME_IDS = 0.9


@dataclass(frozen=True)
class TeacherOptions:
    """The flags of scripts/embed_teacher.py."""

    data: Path
    """folder of tokenized data"""
    tokenizer: str
    """folder or hub name of the tokenizer that the data was made with"""
    output: Path
    """folder to write"""
    query_prompt: str = ""
    passage_prompt: str = ""
    """put before queries, and before passages and negatives, for the teacher"""
    strip_prompts: bool = True
    """take away the prompts that the data was tokenized with, if its manifest names any"""
    dtype: str = "float16"
    cache_dir: Path | None = None
    """folder for the converted data, as in a training config; None = one that is removed again"""
    overwrite: bool = False
    """make everything anew instead of refusing; after an interruption, go on with that"""
    verify: bool = False
    """compare all of the data with its digests; False = what has changed since it was last read"""


class TextDecoder:
    """Token ids back to texts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._backend = tokenizer.backend_tokenizer
        self._eos_id = end_token(tokenizer)

    def __call__(self, texts: list[np.ndarray]) -> list[str]:
        """n arrays of ids -> n texts, without the EOS that tokenization appended."""
        ids = [text[:-1] if text[-1] == self._eos_id else text for text in texts]
        # Special tokens stay: one that is left stood in the text itself.
        return self._backend.decode_batch(
            [text.tolist() for text in ids], skip_special_tokens=False
        )

    def as_decoded(self, text: str) -> str:
        """How a text reads that went through ids and back."""
        return self._backend.decode(
            self._backend.encode(text, add_special_tokens=False).ids, skip_special_tokens=False
        )


@dataclass(frozen=True)
class _Part:
    """Texts whose vectors are one file."""

    title: str
    path: Path
    total: int
    ids: Callable[[int], np.ndarray]
    """number of a text -> its token ids"""
    former_prompt: str
    """taken away from a text that begins with it"""
    prompt: str


def tokenizer_of_data(options: TeacherOptions) -> PreTrainedTokenizerBase:
    """The tokenizer that reads the data.

    Raises:
        UserError: there is none, or no data, or the data says that it was made with another.
    """
    manifest = find_sources(options.data).manifest
    tokenizer = load_tokenizer(find_tokenizer_folder(options.tokenizer))
    own = (fingerprint(tokenizer), end_token(tokenizer))
    if manifest is not None and (manifest.tokenizer_fingerprint, manifest.eos_id) != own:
        raise UserError(
            f"--tokenizer: {options.tokenizer} is not the tokenizer that {options.data} was made "
            "with; its texts could not be read back"
        )
    return tokenizer


def embed_teacher(
    model: TextModel, options: TeacherOptions, progress: bool = True
) -> dict[str, Any]:
    """Write the teacher's vectors of every dataset; continues what was begun.

    Datasets that are new in the data are added. Vectors are as the model gives them before any
    normalisation at its end. Memory: a block of texts and vectors.

    Args:
        model: the teacher.
        options: see there.
        progress: bars on stderr.
    Returns:
        the folder's teacher.json.
    Raises:
        UserError: the tokenizer is not the data's, a vector is not finite, or the folder holds
            something else.
    """
    tokenizer = tokenizer_of_data(options)
    probe = model.encode(PROBES, normalize=False)
    norms = np.linalg.norm(probe, axis=1)
    form = {"dtype": options.dtype, "width": probe.shape[1]}
    settings = {
        "files": dict(model.identity),
        "query_prompt": options.query_prompt,
        "passage_prompt": options.passage_prompt,
        "strip_prompts": options.strip_prompts,
    }
    check_agreement(lambda: settings | form)
    output = options.output
    with (
        disk_errors_are_user_errors(output, "Then run the same command again: it continues."),
        sole_launch_into(output, LOCK, "embedding into"),
    ):
        # the first process writes it; the others have a copy to read the settings in
        record = compute_on_main_process(lambda: _open_record(options, settings | form))
        decoder = TextDecoder(tokenizer)
        store = compute_on_all_processes(lambda: _open_data(tokenizer, decoder, options, progress))
        parts = {
            name: _parts(dataset, store, decoder, options)
            for name, dataset in store.datasets.items()
        }
        check_agreement(lambda: {name: [p.path.name for p in pair] for name, pair in parts.items()})
        # A corpus that datasets share is one part.
        by_path = {part.path: part for pair in parts.values() for part in pair}
        for part in tqdm(by_path.values(), unit=" file", desc="files", disable=not progress):
            _embed(part, record, model, decoder, progress)
        described = {"settings": {"model": model.name} | settings, **form}
        described["normalized"] = bool(np.allclose(norms, 1, atol=UNIT_TOLERANCE))
        return compute_on_main_process(lambda: _finish(store, parts, record, described))


def _finish(
    store: Store,
    parts: Mapping[str, tuple[_Part, _Part]],
    record: WorkRecord,
    described: dict[str, Any],
) -> dict[str, Any]:
    """Write teacher.json, and remove what it does not name; its content."""
    folder = record.path.parent
    kept = record.replaced is None and record.path.is_file()
    former = TeacherVectors.read(folder).datasets if kept else {}
    made = {
        name: _entry(dataset, parts[name], record.settings)
        for name, dataset in store.datasets.items()
    }
    vectors = TeacherVectors(folder, datasets=former | made, **described)
    record.finish(vectors.to_json())
    _remove_unused(vectors)
    return vectors.to_json()


def _open_record(options: TeacherOptions, settings: dict[str, Any]) -> WorkRecord:
    """The record of the output folder, whose items are files of vectors.

    Raises:
        UserError: the folder holds something else, or was made otherwise, without `overwrite`.
    """
    folder, path = options.output, options.output / RECORD
    others = [place.name for place in folder.iterdir() if place.name != LOCK]
    if others and not (path.is_file() or journal_of(path).is_file()):
        raise UserError(f"{folder} holds something else ({others[0]}); use another --output")
    record = WorkRecord(path, settings, _read_finished, options.overwrite, REMEDY)
    if options.overwrite and record.replaced is None:
        record.replace_all()
    record.write()
    return record


def _read_finished(path: Path) -> Finished:
    made = TeacherVectors.read(path.parent)
    files: dict[str, Entry] = {
        file.file: {"digest": file.digest}
        for entry in made.datasets.values()
        for file in (entry.query_vectors, entry.document_vectors)
    }
    return made.settings | {"dtype": made.dtype, "width": made.width}, files


def _open_data(
    tokenizer: PreTrainedTokenizerBase,
    decoder: TextDecoder,
    options: TeacherOptions,
    progress: bool,
) -> Store:
    """The datasets, after a look at whether the tokenizer gives back their texts."""
    cache_dir = options.cache_dir or options.output / OWN_CACHE
    store = open_store(options.data, cache_dir, progress, options.verify)
    if store.manifest is None:
        _check_by_texts(store, tokenizer, decoder, options)
    return store


def _check_by_texts(
    store: Store, tokenizer: PreTrainedTokenizerBase, decoder: TextDecoder, options: TeacherOptions
) -> None:
    """Raise UserError if decoded texts, tokenized again, do not give their ids.

    This is for data that does not say what it was made with. The last ids of a text that was cut
    may differ: a part of a word may have other ids than the word began with.
    """
    dataset = next(iter(store.datasets.values()))
    ids = [dataset.document(number) for number in range(min(CHECKED_TEXTS, dataset.num_documents))]
    fits = tokenizer.backend_tokenizer.get_vocab_size() > store.max_token_id
    if fits:
        again = TextTokenizer(tokenizer, max(map(len, ids)) + 1)(decoder(ids))
        same = sum(_common_start(one, other) for one, other in zip(ids, again, strict=True))
        fits = same >= SAME_IDS * sum(map(len, ids))
    if not fits:
        raise UserError(
            f"--tokenizer: {options.tokenizer} does not read the data in {options.data}: texts "
            "that it gives back are other ids when tokenized again. Give the tokenizer that the "
            "data was made with"
        )


def _common_start(one: np.ndarray, other: np.ndarray) -> int:
    """How many first ids are the same."""
    shorter = min(len(one), len(other))
    differing = np.flatnonzero(one[:shorter] != other[:shorter])
    return int(differing[0]) if len(differing) else shorter


def _parts(
    dataset: TokenizedDataset,
    store: Store,
    decoder: TextDecoder,
    options: TeacherOptions,
) -> tuple[_Part, _Part]:
    """A dataset's queries and documents, told apart from others by their digests."""
    former = Prompts()
    if options.strip_prompts and store.manifest is not None:
        former = Prompts.of_manifest(store.manifest.datasets[dataset.name])

    def part(
        kind: str, digest: str, total: int, ids: Callable, former_prompt: str, prompt: str
    ) -> _Part:
        former_prompt = decoder.as_decoded(former_prompt)
        name = value_digest([digest, former_prompt])
        path = options.output / f"{kind}-{name}{VECTORS_SUFFIX}"
        return _Part(f"{dataset.name}: {kind}", path, total, ids, former_prompt, prompt)

    return (
        part(
            "queries",
            dataset.query_digest,
            dataset.num_rows,
            dataset.query,
            former.query,
            options.query_prompt,
        ),
        part(
            "documents",
            dataset.document_digest,
            dataset.num_documents,
            dataset.document,
            former.passage,
            options.passage_prompt,
        ),
    )


def _embed(
    part: _Part, record: WorkRecord, model: TextModel, decoder: TextDecoder, progress: bool
) -> None:
    """Make a file whole."""
    if compute_on_main_process(lambda: _is_done(part, record)):
        return
    name, dtype, width = part.path.name, record.settings["dtype"], record.settings["width"]

    def make(start: int, stop: int) -> np.ndarray:
        texts = decoder([part.ids(number) for number in range(start, stop)])
        texts = [part.prompt + text.removeprefix(part.former_prompt) for text in texts]
        # One call sorts its texts by length, so that little is padded.
        vectors = model.encode(texts, normalize=False)
        check_finite(vectors, texts)
        with np.errstate(over="ignore"):
            stored = vectors.astype(DTYPES[dtype])
        check_finite(stored, texts, f"use --dtype float32: {dtype} is too small")
        return stored

    file = Rows(part.path, DTYPES[dtype], (part.total, width), BLOCK, record.settings)
    file.fill(make, part.title, progress)

    def finish() -> None:
        record.record(name, {"digest": file_digest(part.path)})
        file.forget()

    compute_on_main_process(finish)


def _is_done(part: _Part, record: WorkRecord) -> bool:
    """Whether a file is whole; if not, its making is noted."""
    name = part.path.name
    if (entry := record.entries.get(name)) is not None:
        if part.path.is_file() and file_digest(part.path) == entry["digest"]:
            return True
        record.replace(name, f"{part.path} is not as it was written")
    record.begin(name)
    return False


def _entry(
    dataset: TokenizedDataset, parts: tuple[_Part, _Part], settings: Mapping[str, Any]
) -> DatasetVectors:
    dtype, width = settings["dtype"], settings["width"]
    texts = dataset.query_digest, dataset.document_digest
    files = (VectorFile.describe(part.path, dtype, width) for part in parts)
    return DatasetVectors(dataset.num_rows, dataset.num_documents, *texts, *files)


def _remove_unused(folder: TeacherVectors) -> None:
    """Remove what the finished folder does not need: vectors of former data, and its own cache."""
    used = {
        file.file
        for entry in folder.datasets.values()
        for file in (entry.query_vectors, entry.document_vectors)
    }
    for ending in ("", ".done*"):  # also what is noted of unfinished ones
        for path in folder.folder.glob(f"*{VECTORS_SUFFIX}{ending}"):
            if path.name not in used:
                path.unlink()
    shutil.rmtree(folder.folder / OWN_CACHE, ignore_errors=True)
