"""Locks: who holds one, who waits, and file systems that have none."""

import errno
import fcntl
import os
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import Timeout

from ml_embed.data.store import open_store
from ml_embed.distributed.sole_launch import sole_launch, sole_launch_into
from ml_embed.errors import UserError
from ml_embed.files.locks import lock_folder, take_lock


@pytest.fixture(params=["ENOLCK", "ENOTSUP"])
def no_locks(request, monkeypatch):
    """A file system without locks."""

    def refuse(descriptor, operation):
        raise OSError(getattr(errno, request.param), "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_one_holds_and_others_are_refused_or_wait(tmp_path, caplog):
    caplog.set_level("INFO", "ml_embed")
    path = tmp_path / "lock"
    with take_lock(path) as lock:
        assert lock.is_locked
        with pytest.raises(Timeout):
            take_lock(path)
        with pytest.raises(UserError, match="another process is mining into"):
            lock_folder(path, "mining into")
    holds = threading.Event()

    def hold_for_a_while():
        with take_lock(path):
            holds.set()
            time.sleep(0.3)

    threading.Thread(target=hold_for_a_while).start()
    holds.wait()
    with take_lock(path, seconds=-1, waiting="waiting for it") as lock:
        assert lock.is_locked
    assert caplog.messages == ["waiting for it"]


def test_without_locks_all_go_on(no_locks, tmp_path):
    with take_lock(tmp_path / "lock") as lock:
        assert not lock.is_locked
        with lock_folder(tmp_path / "lock", "mining into"), sole_launch(tmp_path / "run"):
            pass


def test_where_the_system_has_no_such_call_the_run_goes_on(tmp_path, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    for _ in range(2):
        with (
            pytest.warns(UserWarning, match="SoftFileLock"),
            lock_folder(tmp_path / "lock", "mining into") as lock,
        ):
            assert lock.is_locked


def test_other_errors_are_not_taken_for_missing_locks(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        take_lock(tmp_path / "file" / "lock")
    with (
        pytest.raises(UserError, match=r"output_dir: .* cannot be written"),
        sole_launch(tmp_path / "file" / "run"),
    ):
        pass


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EPERM])
@pytest.mark.parametrize("call", ["open", "flock"])
def test_a_lock_that_cannot_be_had_is_not_taken_for_one_that_is_held(
    tmp_path, monkeypatch, call, code
):
    """Nobody waits for a process that is not there, not even where waiting has no end."""
    refusal, opened = OSError(code, os.strerror(code)), os.open

    def refuse(*given):
        raise refusal

    def open_others(path, *given, **more):
        return refuse() if str(path).endswith("lock") else opened(path, *given, **more)

    write_released(tmp_path)
    if call == "open":
        monkeypatch.setattr(os, "open", open_others)
    else:
        monkeypatch.setattr(fcntl, "flock", refuse)
    for seconds in (0, 5, -1):
        with pytest.raises(OSError, match=os.strerror(code)):
            take_lock(tmp_path / "lock", seconds)
    with (
        pytest.raises(UserError, match=f"output_dir: .*{os.strerror(code)}"),
        sole_launch(tmp_path / "run"),
    ):
        pass
    with pytest.raises(UserError, match=f"{os.strerror(code)}.* set cache_dir"):
        open_store(tmp_path, tmp_path / "cache", progress=False)
    with (
        pytest.raises(UserError, match=f"{os.strerror(code)}.* Choose another --output"),
        sole_launch_into(tmp_path / "output", ".lock", "tokenizing into"),
    ):
        pass


def write_released(folder) -> None:
    """One row in the layout of the original release."""
    ids = pa.array([[5, 6, 1]], pa.list_(pa.int64()))
    pq.write_table(pa.table({"doc_id": ["d"], "input_ids": ids}), folder / "corpus.parquet")
    pq.write_table(
        pa.table({"query_input_ids": ids, "passage_input_ids": ["d"]}), folder / "x_query.parquet"
    )


def test_data_is_converted_without_locks_and_another_process_is_left_alone(no_locks, tmp_path):
    write_released(tmp_path)
    store = open_store(tmp_path, tmp_path / "cache", progress=False)
    np.testing.assert_array_equal(store.datasets["x"].query(0), [5, 6, 1])
    of_another = store.folder.with_name(f"{store.folder.name}.partial-of_another")
    of_another.mkdir()
    store.folder.rename(tmp_path / "aside")
    open_store(tmp_path, tmp_path / "cache", progress=False)
    assert of_another.is_dir()
