"""Which files a folder of tokenized data holds, and in which of the two layouts."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ml_embed.data.manifest import MANIFEST, Manifest
from ml_embed.errors import UserError
from ml_embed.files.digests import digests_of, value_digest
from ml_embed.files.parquet import open_parquet
from ml_embed.files.work_record import journal_of

QUERY_SUFFIX = "_query.parquet"
CORPUS_SUFFIX = "_corpus.parquet"
SHARED_CORPUS = "corpus.parquet"
CONTINUE = "Run tokenize_data_qwen.py again with the same flags; it continues where it stopped."


@dataclass(frozen=True)
class Sources:
    """The files of a folder of tokenized data."""

    folder: Path
    manifest: Manifest | None
    """of our own layout; None for the originally released layout, which has none"""
    queries: dict[str, Path]
    """the query file of each dataset, sorted by the dataset's name"""
    corpora: dict[str, Path]
    """the corpus file of each dataset; in the released layout many may share one"""

    def files(self) -> Iterator[Path]:
        """Every file once, in a fixed order."""
        yield from sorted({*self.queries.values(), *self.corpora.values()})

    def identity(self, cache_dir: Path, verify: bool = False) -> dict[str, str]:
        """File name -> digest of its content, wherever the folder lies: what the data is.

        Args:
            cache_dir: where digests are remembered if that cannot be beside the data.
            verify: read all files, also those whose digest is remembered.
        Raises:
            UserError: a file is not the one that the manifest was written with.
        """
        digests = digests_of(self.files(), (self.folder, cache_dir), verify)
        identity = {path.name: digest for path, digest in digests.items()}
        if self.manifest is None:
            return identity
        for name, entry in self.manifest.datasets.items():
            for kind, path in (("query", self.queries[name]), ("corpus", self.corpora[name])):
                recorded, found = (entry.digests or {}).get(kind), digests[path]
                if recorded not in (None, found):
                    raise UserError(
                        f"{path} is not the file that {MANIFEST} was written with: its digest was "
                        f"{recorded}, now it is {found}. Copy the file again, or run "
                        "tokenize_data_qwen.py with --overwrite."
                    )
        return identity | {MANIFEST: value_digest(self.manifest.to_json())}


def find_sources(folder: Path) -> Sources:
    """List a folder of tokenized data.

    Raises:
        UserError: the folder is missing, empty or unfinished, or it lacks a file.
    """
    if not folder.is_dir():
        raise UserError(
            f"folder of tokenized data {folder} does not exist. Make it with tokenize_data_qwen.py."
        )
    queries = {
        path.name.removesuffix(QUERY_SUFFIX): path
        for path in sorted(folder.glob(f"*{QUERY_SUFFIX}"))
        if not path.name.startswith(".")
    }
    if not queries:
        raise UserError(
            f"{folder} holds no *{QUERY_SUFFIX} file. Make them with tokenize_data_qwen.py."
        )
    if journal_of(folder / MANIFEST).exists():
        raise UserError(f"{folder}: its tokenization was not finished. {CONTINUE}")
    if (folder / MANIFEST).exists():
        return _own_layout(folder, queries)
    return _released_layout(folder, queries)


def _own_layout(folder: Path, queries: dict[str, Path]) -> Sources:
    manifest = Manifest.read(folder / MANIFEST)
    for name in sorted(queries.keys() ^ manifest.datasets.keys()):
        problem = f"lists {name!r} but {name}{QUERY_SUFFIX} is missing"
        if name in queries:
            problem = f"does not list {queries[name].name}"
        raise UserError(
            f"{folder / MANIFEST} {problem}. Run tokenize_data_qwen.py again, or remove the odd "
            "file."
        )
    corpora = {name: folder / f"{name}{CORPUS_SUFFIX}" for name in queries}
    for path in corpora.values():
        if not path.is_file():
            raise UserError(f"corpus file {path} is missing. Run tokenize_data_qwen.py again.")
    return Sources(folder, manifest, queries, corpora)


def _released_layout(folder: Path, queries: dict[str, Path]) -> Sources:
    corpora: dict[str, Path] = {}
    for name, path in queries.items():
        own, shared = folder / f"{name}{CORPUS_SUFFIX}", folder / SHARED_CORPUS
        if not own.is_file() and not shared.is_file():
            raise UserError(
                f"no corpus for {path}: neither {own.name} nor {SHARED_CORPUS} is in {folder}."
            )
        corpora[name] = own if own.is_file() else shared
        with open_parquet(path) as file:
            if "passage_doc_id" in file.schema_arrow.names:
                raise UserError(
                    f"{folder} has no {MANIFEST}: its tokenization was not finished. {CONTINUE}"
                )
    return Sources(folder, None, queries, corpora)
