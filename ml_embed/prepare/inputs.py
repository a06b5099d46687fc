"""What `--input` means: a file, the datasets of a folder, or one on the hub; and opening it."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ml_embed.errors import UserError, one_line
from ml_embed.files.json_file import parse_json
from ml_embed.files.paths import is_hub_name
from ml_embed.notices import notice
from ml_embed.prepare.beir import is_beir
from ml_embed.prepare.parallel import (
    CATALOGUES,
    MEMORIES,
    ParallelText,
    is_tatoeba,
    list_parallel,
    parallel_beside,
)
from ml_embed.prepare.records import Reading, Table, open_shards, open_table, stem_and_suffix
from ml_embed.prepare.rows import Record

TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow")
_SHARD = re.compile(r"(?P<split>.+?)-(?P<number>\d{5})-of-(?P<of>\d{5})(-[0-9a-f]+)?")
_SAVED = ("state.json", "dataset_dict.json")
_OF_SAVED = frozenset({"dataset_infos.json", "dataset_info.json", *_SAVED})


@dataclass(frozen=True)
class Source:
    """One dataset, wherever it comes from."""

    path: str
    """a file, a folder, or a dataset's name on the hub"""
    split: str = "train"
    subset: str | None = None
    """which of a hub dataset's configurations"""
    shards: tuple[Path, ...] = ()
    """of a folder that is one dataset in many files"""
    parallel: ParallelText | None = None

    @property
    def name(self) -> str:
        """What the dataset is called."""
        if self.parallel:
            return self.parallel.name
        if self.shards or Path(self.path).is_dir():
            return _folder_name(Path(self.path))
        stem, suffix = stem_and_suffix(Path(self.path))
        if suffix in TABLES:
            return stem
        return "_".join(filter(None, [*self.path.split("/"), self.subset]))

    @property
    def origin(self) -> str:
        """What tells it from other sources of the same name."""
        if self.shards or self.parallel or Path(self.path).exists():
            return str(Path(self.path).resolve())
        return f"{self.path} on the hub, split {self.split}"


def is_missing_path(given: str) -> bool:
    """Whether nothing is there, and it is not written like a name on the hub."""
    return not Path(given).exists() and not is_hub_name(given)


def list_sources(given: str, split: str, subset: str | None) -> list[Source]:
    """The datasets that `--input` means: a file, those of a folder, or a name on the hub.

    Raises:
        UserError: nothing there, or two of one name.
    """
    path = Path(given)
    if path.is_dir():
        return _sources_of_folder(path, split)
    if path.is_file():
        return _sources_of_file(path)
    if stem_and_suffix(path)[1] in (*TABLES, *CATALOGUES, *MEMORIES) or is_missing_path(given):
        raise UserError(f"--input {given} does not exist")
    return [Source(given, split, subset)]


def _sources_of_file(path: Path) -> list[Source]:
    suffix = stem_and_suffix(path)[1]
    if suffix in TABLES and not (suffix == ".tsv" and is_tatoeba(path)):
        return [Source(str(path))]
    found = [Source(str(path), parallel=text) for text in parallel_beside(path)]
    if not found:
        kinds = ", ".join((*TABLES, *CATALOGUES, *MEMORIES))
        raise UserError(
            f"{path} is of a kind that is not read; take one of {kinds}, or one of two files of a "
            "Moses pair (name.en beside name.sw)"
        )
    return found


def _sources_of_folder(folder: Path, split: str) -> list[Source]:
    if is_beir(folder):
        return [Source(str(folder), split)]
    if any((folder / name).is_file() for name in _SAVED):
        return [Source(str(folder), split, shards=_saved_shards(folder, split))]
    here = visible_files(folder)
    tables = [path for path in here if stem_and_suffix(path)[1] in TABLES]
    inner = visible_files(folder / "data") if (folder / "data").is_dir() else []
    if (shards := _hub_shards(tables or inner, folder, split)) is not None:
        return [Source(str(folder), split, shards=shards)]
    sources = [Source(str(p)) for p in tables if not (p.suffix == ".tsv" and is_tatoeba(p))]
    catalogues = [path for path in visible_files(folder, True) if path.suffix in CATALOGUES]
    others = [path for path in here if path.suffix not in CATALOGUES]
    texts = list_parallel([*others, *catalogues], _folder_name(folder))
    sources += [Source(str(text.files[0]), parallel=text) for text in texts]
    if not sources:
        raise UserError(
            f"{folder} holds no {', '.join((*TABLES, *CATALOGUES, *MEMORIES))} file, and no Moses "
            "pair (name.en beside name.sw)"
        )
    for name, number in Counter(source.name for source in sources).items():
        if number > 1:
            raise UserError(f"{folder} holds several files of dataset {name!r}: rename them")
    return sources


def _folder_name(folder: Path) -> str:
    return folder.name if folder.name not in ("", "..") else folder.resolve().name


def visible_files(folder: Path, below: bool = False) -> list[Path]:
    """The files of a folder that are not hidden, sorted; `below` = of the folders in it too."""
    found = folder.rglob("*") if below else folder.iterdir()
    return sorted(path for path in found if path.is_file() and path.name[0] != ".")


def _hub_shards(files: list[Path], folder: Path, split: str) -> tuple[Path, ...] | None:
    """The parts of a split, of files that are called as on the hub; None if they are not."""
    files = [file for file in files if file.name not in _OF_SAVED]
    if not are_shards(files):
        return None
    parts: dict[str, dict[int, Path]] = {}
    totals = {}
    for file in files:
        match = _SHARD.fullmatch(stem_and_suffix(file)[0])
        assert match is not None
        parts.setdefault(match["split"], {})[int(match["number"])] = file
        totals[match["split"]] = int(match["of"])
    if split not in parts:
        raise UserError(
            f"{folder} has no split {split!r}; choose another with --split: "
            f"{', '.join(sorted(parts))}"
        )
    missing = sorted(set(range(totals[split])) - parts[split].keys())
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} of the {totals[split]} parts of split {split!r} are "
            f"missing, the first being number {missing[0]}. Download it again."
        )
    return tuple(parts[split][number] for number in sorted(parts[split]))


def are_shards(files: list[Path]) -> bool:
    """Whether files are called as on the hub: train-00000-of-00002.parquet."""
    return bool(files) and all(_SHARD.fullmatch(stem_and_suffix(file)[0]) for file in files)


def _saved_shards(folder: Path, split: str) -> tuple[Path, ...]:
    """The Arrow files of what `Dataset.save_to_disk` wrote."""
    try:
        if (folder / "dataset_dict.json").is_file():
            splits = parse_json((folder / "dataset_dict.json").read_bytes())["splits"]
            if split not in splits:
                raise UserError(
                    f"{folder} has no split {split!r}; choose another with --split: "
                    f"{', '.join(splits)}"
                )
            folder = folder / split
        state = parse_json((folder / "state.json").read_bytes())
        names = [file["filename"] for file in state["_data_files"]]
        if outside := [name for name in names if Path(name).name != name]:
            raise ValueError(f"state.json names {outside[0]!r}, which is no file of the folder")
        files = tuple(folder / name for name in names)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is no whole saved dataset ({one_line(error)}).") from error
    if not files:
        raise UserError(f"{folder} has no rows. Remove it or fill it.")
    return files


def files_unused(path: Path, sources: list[Source]) -> tuple[str, ...]:
    """Names of the files of a folder that none of its datasets uses."""
    if not path.is_dir():
        return ()
    used = {Path(source.path).name for source in sources}
    used |= {file.name for source in sources for file in source.shards}
    used |= {file.name for source in sources if source.parallel for file in source.parallel.files}
    if any(is_beir(Path(source.path)) for source in sources):
        return ()
    return tuple(file.name for file in visible_files(path) if file.name not in used | _OF_SAVED)


def open_source(source: Source, reading: Reading) -> Table:
    """Open a dataset that is a table. Raises UserError if it cannot be read."""
    if source.shards:
        return open_shards(source.shards, reading)
    if stem_and_suffix(Path(source.path))[1] in TABLES:
        return open_table(Path(source.path), reading)
    return _open_hub(source)


def _open_hub(source: Source) -> Table:
    import datasets

    provenance = _hub_provenance(source.path)
    try:
        stream = datasets.load_dataset(
            source.path,
            source.subset,
            split=source.split,
            streaming=True,
            revision=provenance.get("revision"),
        )
        features = stream.features or {}
        names = list(features) or list(next(iter(stream), {}))
        labels = {
            name: feature.names
            for name, feature in features.items()
            if isinstance(feature, datasets.ClassLabel)
        }
    except Exception as error:
        raise _hub_error(source, error) from error

    def read(_: Iterable[str]) -> Iterator[Record]:
        try:
            for number, values in enumerate(stream):
                yield Record(f"{source.path}, row {number}", values, number)
        except Exception as error:
            raise _hub_error(source, error) from error

    return Table(source.path, names, read, labels, provenance)


def _hub_provenance(name: str) -> dict[str, str]:
    """Name, commit and license of a dataset on the hub; the name alone where it does not answer."""
    from huggingface_hub import dataset_info

    try:
        info = dataset_info(name)
    except Exception as error:  # whether the data can be read, its own loading says
        notice(f"{name}: the hub does not tell revision and license ({one_line(error)})")
        return {"source": name}
    license = getattr(info.card_data, "license", None)
    license = ", ".join(license) if isinstance(license, list) else license
    said = {"source": name, "revision": info.sha, "license": license}
    return {key: text for key, text in said.items() if text}


def _hub_error(source: Source, error: Exception) -> UserError:
    """`datasets` has its own classes of errors, and those of every file format."""
    if isinstance(error, UserError):
        return error
    return UserError(
        f"{source.path} cannot be read ({type(error).__name__}: {one_line(error)}). It is no file "
        "here either: without network access, give a file"
    )
