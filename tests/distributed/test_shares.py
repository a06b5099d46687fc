"""Work that processes share: each piece once, the result that of one process, continued by any
number of them."""

import errno
import itertools
import json
import math
import os
import signal
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from helpers.tiny_runs import Launch

from ml_embed.distributed import shares
from ml_embed.distributed.collectives import gather_objects, process_index, world_size
from ml_embed.distributed.launch import launched
from ml_embed.distributed.shares import Rows, leads_its_machine, work_through
from ml_embed.distributed.sole_launch import sole_launch_into
from ml_embed.errors import UserError, exit_on_user_error

SHAPE = (3, 41, 5)


def rows_of(folder: Path, made_of="numbers", block: int = 4) -> Rows:
    return Rows(folder / "rows.bin", np.float32, SHAPE, block, made_of)


def content(start: int, stop: int) -> np.ndarray:
    whole = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    return whole[:, start:stop]


def launch(folder: Path, main, *arguments, processes: int = 2, **environment) -> Launch:
    environment = {name: str(value) for name, value in environment.items()}
    return Launch(folder / "printed", arguments, processes, main=main, environment=environment)


def filled(folder: Path, blocks: list[int], make=content, **options) -> np.ndarray:
    """Fill, and add to `blocks` where each block that was made began."""

    def noted(start: int, stop: int) -> np.ndarray:
        blocks.append(start)
        return make(start, stop)

    return rows_of(folder, **options).fill(noted, "rows", progress=False)


@exit_on_user_error
def main_that_fills(arguments: list[str]) -> int:
    """Fill rows; process VICTIM dies at its third block, while the others wait for it."""
    folder, made = Path(arguments[0]), []

    def make(start: int, stop: int) -> np.ndarray:
        if victim := os.environ.get("VICTIM"):
            if int(victim) == process_index() and len(made) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.05)
        return content(start, stop)

    with launched("cpu"), sole_launch_into(folder, ".lock", "filling"):
        found = filled(folder, made, make)
        np.testing.assert_array_equal(found, content(0, SHAPE[1]))
        everywhere = gather_objects(made)
        if process_index() == 0:
            (folder / "made.json").write_text(json.dumps(everywhere))
    return 0


def test_each_block_is_made_once_by_some_process(tmp_path):
    run = launch(tmp_path, main_that_fills, tmp_path, processes=3)
    assert run.wait() == [0, 0, 0], run.printed()
    made = json.loads((tmp_path / "made.json").read_text())
    assert sorted(itertools.chain(*made)) == list(range(0, SHAPE[1], 4))
    assert (tmp_path / "rows.bin").read_bytes() == content(0, SHAPE[1]).tobytes()
    assert not list(tmp_path.glob(".launch-*"))


def test_a_process_whose_disk_is_full_waits_for_what_the_first_says_of_it(monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "vectors")
    for error, is_ours in ((full, False), (UserError("no good"), False), (KeyError("bug"), True)):
        said = iter([(False, "a request"), (True, "outcome")])
        monkeypatch.setattr(shares, "compute_on_main_process", lambda _, said=said: next(said))
        serve = Mock(side_effect=error)
        if is_ours:
            with pytest.raises(KeyError):
                shares.conduct(Mock(), serve)
        else:
            assert shares.conduct(Mock(), serve) == "outcome"
        serve.assert_called_once_with("a request")


def test_what_a_dead_process_left_is_continued_by_another_number_of_processes(tmp_path):
    run = launch(tmp_path, main_that_fills, tmp_path, VICTIM=1)
    codes = run.wait()
    assert codes == [2, -signal.SIGKILL], run.printed()
    assert "another process of this run has ended" in run.printed()
    assert "what is done is kept" in run.printed()
    journals = list(tmp_path.glob("rows.bin.done-*"))
    assert len(journals) == 2
    with journals[0].open("a") as file:
        file.write("9")  # torn: nobody wrote block 9 or one of the nineties
    lines = [line for path in journals for line in path.read_text().split("\n")[:-1]]
    done = {int(line.split()[0]) for line in lines}
    assert 4 <= len(done) < 11
    blocks: list[int] = []
    np.testing.assert_array_equal(filled(tmp_path, blocks), content(0, SHAPE[1]))
    assert {start // 4 for start in blocks} == set(range(11)) - done
    blocks.clear()
    filled(tmp_path, blocks)
    assert blocks == []


def test_half_made_rows_that_were_damaged_are_made_anew(tmp_path, caplog):
    """A flipped bit of what was done would otherwise stay, without a word."""
    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path, [], lambda a, b: interrupt() if a >= 20 else content(a, b))
    path = tmp_path / "rows.bin"
    damaged = bytearray(path.read_bytes())
    size = content(0, SHAPE[1]).nbytes // math.prod(SHAPE[:-1])  # of a row of one plane
    damaged[9 * size + 1] ^= 1 << 3
    path.write_bytes(damaged)
    blocks: list[int] = []
    np.testing.assert_array_equal(filled(tmp_path, blocks), content(0, SHAPE[1]))
    assert blocks == [8, *range(20, SHAPE[1], 4)]
    assert "rows.bin: rows 8 to 12 are damaged; they are made anew" in caplog.text


def test_rows_of_something_else_are_made_anew(tmp_path):
    filled(tmp_path, [])
    for changed in ({"made_of": "others"}, {"made_of": "others", "block": 8}):
        blocks: list[int] = []
        found = filled(tmp_path, blocks, lambda a, b: content(a, b) + 1, **changed)
        assert len(blocks) == -(-SHAPE[1] // changed.get("block", 4))
        np.testing.assert_array_equal(found, content(0, SHAPE[1]) + 1)
    rows_of(tmp_path).forget()
    assert [path.name for path in tmp_path.iterdir()] == ["rows.bin"]


@pytest.mark.parametrize("suffix", ["done.json", "done-0"])
def test_a_damaged_note_of_what_is_done_is_named(tmp_path, suffix):
    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path, [], lambda start, stop: interrupt() if start else content(start, stop))
    path = tmp_path / f"rows.bin.{suffix}"
    path.write_bytes(path.read_bytes().replace(b"0", b"x").replace(b"[", b"[7"))
    with pytest.raises(UserError, match=r"rows\.bin\.done.* damaged.*to make rows\.bin anew"):
        filled(tmp_path, [])


def interrupt() -> np.ndarray:
    raise KeyboardInterrupt


@exit_on_user_error
def main_with_a_mistake(arguments: list[str]) -> int:
    """The piece 3 is a mistake, or meets a full disk; each process counts what it did."""
    folder, done = Path(arguments[0]), []

    def work(piece: int) -> None:
        if piece == 3:
            full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "piece 3")
            raise full if "FULL" in os.environ else UserError("piece 3 is no good")
        time.sleep(0.02)
        done.append(piece)

    with launched("cpu"):
        try:
            work_through(range(1000), work)
        finally:
            (folder / str(process_index())).write_text(str(len(done)))
    return 0


@pytest.mark.parametrize(
    ("environment", "message"),
    [({}, "piece 3 is no good"), ({"FULL": "1"}, "No space left on device: 'piece 3'")],
)
def test_a_mistake_on_one_process_ends_all_without_the_rest_of_the_work(
    tmp_path, environment, message
):
    run = launch(tmp_path, main_with_a_mistake, tmp_path, **environment)
    assert run.wait() == [2, 2], run.printed()
    for path in run.outputs:
        assert path.read_text().count(message) == 1
    assert sum(int((tmp_path / str(process)).read_text()) for process in (0, 1)) < 100
    assert "Traceback" not in run.printed()


@exit_on_user_error
def main_of_two_machines(arguments: list[str]) -> int:
    """Two processes of one machine and one of another, with work for one of each machine."""
    folder, done = Path(arguments[0]), []
    with launched("cpu"):
        os.environ["LOCAL_RANK"] = "010"[process_index()]
        work_through(
            range(30),
            lambda piece: (done.append(piece), time.sleep(0.01)),
            takes_part=leads_its_machine(),
        )
        everywhere = gather_objects(done)
        if process_index() == 0:
            (folder / "done.json").write_text(json.dumps(everywhere))
    return 0


def test_work_for_one_process_of_each_machine(tmp_path):
    run = launch(tmp_path, main_of_two_machines, tmp_path, processes=3)
    assert run.wait() == [0, 0, 0], run.printed()
    first, second, third = json.loads((tmp_path / "done.json").read_text())
    assert first
    assert third
    assert second == []
    assert sorted(first + third) == list(range(30))


@exit_on_user_error
def main_in_folders(arguments: list[str]) -> int:
    from ml_embed.distributed import launch, sole_launch

    if os.environ["RANK"] == os.environ.get("OLD"):
        launch.metadata.version = lambda name: "0.1"
    sole_launch.SEEN_WITHIN_SECONDS = 0.5
    device = os.environ.get("DEVICE", "cpu")
    folder = Path(arguments[int(os.environ["RANK"])])
    with launched(device), sole_launch_into(folder, ".lock", "filling"):
        assert world_size() == 2
    return 0


def test_processes_that_do_not_share_the_folder_are_told(tmp_path):
    folders = [tmp_path / "one", tmp_path / "other"]
    folders[1].mkdir()
    (folders[1] / ".launch-of_a_killed_one").touch()
    run = launch(tmp_path, main_in_folders, *folders)
    assert run.wait() == [2, 2], run.printed()
    assert f"{folders[1]} is not the folder that the first process" in run.printed()
    assert not list(folders[0].glob(".launch-*"))
    with sole_launch_into(folders[1], ".lock", "filling"):
        assert [path.name for path in folders[1].iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"DEVICE": "cuda:1"}, "--device cuda:1 would put all processes of this launch on one"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "this launch asks for DeepSpeed, which is for tra"),
        ({"OLD": "1"}, '" on process 0, "0.1" on process 1'),
    ],
)
def test_launches_that_these_commands_cannot_use_are_refused(tmp_path, environment, message):
    run = launch(tmp_path, main_in_folders, tmp_path, tmp_path, **environment)
    assert run.wait() == [2, 2], run.printed()
    assert message in run.printed()
