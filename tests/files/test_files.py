"""Files and folders that are whole whenever they exist, and that say so when they are not."""

import errno
import os
import resource
import subprocess
import sys
import threading

import pyarrow as pa
import pytest
from helpers import ROOT
from safetensors import SafetensorError

from ml_embed.errors import UserError, disk_error, exit_on_user_error
from ml_embed.files.atomic import (
    append_whole,
    atomic_file,
    atomic_folder,
    checksum_problem,
    disk_errors_are_user_errors,
    partial_path,
    remove_folder,
    remove_leftovers,
    write_checksums,
    write_json,
)
from ml_embed.files.paths import check_model_output


@pytest.fixture
def full_disk(tmp_path):
    """A file system of one megabyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip(
            "a small file system cannot be mounted here (needs root); simulated in "
            "tests/faults/storm.py"
        )
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with atomic_folder(tmp_path / "target") as folder:
        (folder / "file").write_text("new")
        assert not (tmp_path / "target").exists()
    assert names(tmp_path) == ["target"]
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "target") as folder:  # noqa: PT012
        (folder / "file").write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["target"]
    assert (tmp_path / "target" / "file").read_text() == "new"


def test_a_folder_is_replaced_whole(tmp_path):
    for text in ("old", "new"):
        with atomic_folder(tmp_path / "target") as folder:
            (folder / text).write_text(text)
    assert names(tmp_path / "target") == ["new"]
    assert names(tmp_path) == ["target"]


def test_what_a_link_points_to_is_replaced(tmp_path):
    (tmp_path / "disk" / "inner").mkdir(parents=True)
    for place in ("inner", "missing"):
        (tmp_path / "link").symlink_to(tmp_path / "disk" / place)
        for text in ("old", "new"):
            with atomic_folder(tmp_path / "link") as folder:
                (folder / text).write_text(text)
        assert (tmp_path / "link").is_symlink()
        assert names(tmp_path / "disk" / place) == ["new"]
        assert names(tmp_path) == ["disk", "link"]
        (tmp_path / "link").unlink()
    assert names(tmp_path / "disk") == ["inner", "missing"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, os.strerror(errno.EIO)), KeyboardInterrupt()])
def test_the_old_folder_is_put_back_where_the_new_one_cannot_take_its_place(
    tmp_path, monkeypatch, error
):
    with atomic_folder(tmp_path / "target") as folder:
        (folder / "file").write_text("old")
    rename = os.rename

    def fail(self, target):
        if self.name.endswith(".partial"):
            raise error
        rename(self, target)

    monkeypatch.setattr("pathlib.Path.rename", fail)
    expected = UserError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected), atomic_folder(tmp_path / "target") as folder:
        (folder / "file").write_text("new")
    assert names(tmp_path) == ["target"]
    assert (tmp_path / "target" / "file").read_text() == "old"


def kill_between_the_renames(tmp_path) -> None:
    """What SIGKILL leaves where `target`, which holds "old", was to be replaced."""
    program = (
        "import os, pathlib, sys\nfrom ml_embed.files.atomic import atomic_folder\nrename = "
        "pathlib.Path.rename\n"
        "def rename_or_die(self, target):\n"
        "    os._exit(9) if self.name.endswith('.partial') and "
        "pathlib.Path('.target.replaced').exists() else 0\n"
        "    return rename(self, target)\n"
        "pathlib.Path.rename = rename_or_die\n"
        "for text in ('old', 'new'):\n"
        "    with atomic_folder(pathlib.Path('target')) as folder:\n"
        "        (folder / 'file').write_text(text)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert (
        subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment).returncode
        == 9
    )
    assert names(tmp_path) == [".target.partial", ".target.replaced"]


@pytest.mark.parametrize("settled_by", ["training", "a look", "a write that fails", "a write"])
def test_what_a_kill_leaves_is_removed_and_a_replaced_folder_put_back(tmp_path, settled_by):
    kill_between_the_renames(tmp_path)
    target = tmp_path / "target"
    if settled_by == "training":
        remove_leftovers(tmp_path)
    elif settled_by == "a look":
        with pytest.raises(UserError, match="exists already"):
            check_model_output(target, overwrite=False)
    elif settled_by == "a write that fails":
        with pytest.raises(UserError, match="cannot be written"), atomic_folder(target):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
    else:
        with atomic_folder(target) as folder:
            (folder / "file").write_text("newest")
    assert names(tmp_path) == ([".target.partial"] if settled_by == "a look" else []) + ["target"]
    assert (target / "file").read_text() == ("newest" if settled_by == "a write" else "old")


def test_a_removed_folder_is_never_half_there(tmp_path, monkeypatch):
    folder = tmp_path / "step_1"
    folder.mkdir()
    (folder / "file").write_text("text")
    monkeypatch.setattr(
        "shutil.rmtree", lambda *args, **kwargs: None
    )  # killed before anything is deleted
    remove_folder(folder)
    monkeypatch.undo()
    assert names(tmp_path) == [".step_1.partial"]
    remove_leftovers(tmp_path)
    assert names(tmp_path) == []


def test_a_full_disk_leaves_the_old_folder_and_no_half_one(full_disk):
    with atomic_folder(full_disk / "target") as folder:
        (folder / "file").write_bytes(bytes(400_000))
    with (
        pytest.raises(UserError, match="no space left on the disk of"),
        atomic_folder(full_disk / "target") as folder,
    ):
        (folder / "file").write_bytes(bytes(800_000))
    assert names(full_disk) == ["target"]
    assert (full_disk / "target" / "file").stat().st_size == 400_000


def test_a_full_disk_under_json_and_appended_lines(full_disk):
    write_json(full_disk / "settings.json", {"a": 1})
    append_whole(full_disk / "log", "first\n")
    (full_disk / "filler").write_bytes(bytes(1024 * 1024 - 3 * 4096))
    with pytest.raises(OSError, match="No space left") as caught:
        append_whole(full_disk / "log", "x" * 100_000)
    assert disk_error(caught.value).errno == errno.ENOSPC
    assert caught.value.filename == str(full_disk / "log")
    with pytest.raises(OSError, match="No space left"):
        write_json(full_disk / "settings.json", {"a": "x" * 100_000})
    assert (full_disk / "log").read_text() == "first\n"
    assert (full_disk / "settings.json").read_text() == '{\n  "a": 1\n}\n'
    assert names(full_disk) == ["filler", "log", "settings.json"]


def test_a_failing_disk_is_a_message(tmp_path):
    with (
        pytest.raises(UserError, match=r"cannot be written .*Input/output"),
        atomic_folder(tmp_path / "target"),
    ):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_a_message(tmp_path):
    (tmp_path / "file").write_text("precious")
    with (
        pytest.raises(UserError, match="cannot be written"),
        atomic_folder(tmp_path / "file" / "target"),
    ):
        raise AssertionError("there is no folder to fill")


def test_a_file_size_limit_cuts_no_line(tmp_path):
    append_whole(tmp_path / "log", "first\n")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            append_whole(tmp_path / "log", "second line\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "log").read_text() == "first\n"


def test_safetensors_reports_full_disks_as_text():
    for text, number in (
        ("Error while serializing: I/O error: No space left on device (os error 28)", 28),
        ("I/O error: Disk quota exceeded (os error 122)", 122),
        ("Error writing bytes to file. Detail: [errno 5] Input/output error", 5),
    ):
        assert disk_error(RuntimeError(text)).errno == number
    assert disk_error(RuntimeError("Error while serializing: (os error 2)")) is None


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_disk_errors_inside_libraries_are_messages(tmp_path, number):
    """safetensors and tokenizers put the number into a text."""
    text = f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})"
    said = "no space left" if number == errno.ENOSPC else rf"cannot .*{os.strerror(number)}"
    with pytest.raises(UserError, match=said), atomic_folder(tmp_path / "target") as folder:  # noqa: PT012
        (folder / "half").touch()
        raise SafetensorError(text)
    with (
        pytest.raises(UserError, match=rf"{said}.*Then run the command again\."),
        disk_errors_are_user_errors(tmp_path, "Then run the command again."),
    ):
        raise pa.ArrowException(f"Detail: [errno {number}] {os.strerror(number)}")
    assert names(tmp_path) == []


def test_a_disk_error_anywhere_is_a_message(capsys):
    """In any command, and in the thread of a library that hands it on."""

    def failing() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "/runs/events")

    @exit_on_user_error
    def main() -> None:
        thread = threading.Thread(target=failing)
        thread.start()
        thread.join()
        failing()

    assert main() == 2
    said = capsys.readouterr().err
    assert "error: [Errno 5] Input/output error: '/runs/events'. See to that disk" in said
    assert "Traceback" not in said

    @exit_on_user_error
    def own_fault() -> None:
        raise OSError(errno.EBADF, "ours")

    with pytest.raises(OSError, match="ours"):
        own_fault()


def test_two_writers_of_one_file(tmp_path):
    path = tmp_path / "vectors.npy"
    with atomic_file(path) as partial:
        partial.write_text("first")
        with (
            pytest.raises(UserError, match=r"vectors\.npy is being written by another process"),
            atomic_file(path),
        ):
            raise AssertionError("both would write into one file")
        assert partial.read_text() == "first"
    assert (path.read_text(), names(tmp_path)) == ("first", ["vectors.npy"])
    partial_path(path).write_text("left by a killed one")
    with atomic_file(path) as partial:
        partial.write_text("second")
    assert (path.read_text(), names(tmp_path)) == ("second", ["vectors.npy"])


@pytest.mark.parametrize("name", ["x" * 255, "猫" * 85, "x" * 246])
def test_the_longest_names(tmp_path, name):
    write_json(tmp_path / name, 1)
    assert names(tmp_path) == [name]
    (tmp_path / name).unlink()
    for text in ("old", "new"):
        with atomic_folder(tmp_path / name) as folder:
            (folder / "file").write_text(text)
    assert names(tmp_path) == [name]
    assert (tmp_path / name / "file").read_text() == "new"
    remove_folder(tmp_path / name)
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["a", "inner/b", "checksums.json"])
def test_every_flipped_bit_and_every_torn_file_is_found(tmp_path, name):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "inner" / "b").write_bytes(b"def")
    write_checksums(tmp_path)
    assert checksum_problem(tmp_path) is None
    path = tmp_path / name
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert checksum_problem(tmp_path) is not None, length
    if name != "checksums.json":  # a flip in its blanks changes nothing that is read
        for position in range(8 * len(whole)):
            flipped = bytearray(whole)
            flipped[position // 8] ^= 1 << position % 8
            path.write_bytes(flipped)
            assert checksum_problem(tmp_path) is not None, position
    path.unlink()
    assert checksum_problem(tmp_path) is not None
