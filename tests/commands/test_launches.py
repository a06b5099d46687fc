"""Long commands under a launcher: the files of one process, whatever number did the work."""

import os
import signal
import time
from pathlib import Path

import pytest
from helpers.tiny_models import make_tokenizer, write_model
from helpers.tiny_runs import Launch

from ml_embed.distributed.shares import Rows


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model", make_tokenizer())


def arguments_of(command: str, world, model: Path, output: Path) -> list[str]:
    flags = ["--output", str(output), "--model", str(model)]
    if command == "embed_teacher":
        return [*flags, "--data", str(world.tokenized), "--tokenizer", str(world.backbone)]
    if command == "evaluate":
        return [*flags, "--data", str(world.raw), "--baseline", str(world.backbone)]
    mining = ["--input", str(world.raw), "--max-score", "2", "--max-ratio", "2", "--top", "20"]
    return [*flags, *mining, *(["--search", "ann"] if command == "mine with ann" else [])]


def main_in_small_pieces(arguments: list[str]) -> int:
    """A command's main, whose work is many pieces. Process VICTIM dies when it has made the third
    one; the others are slow, so that it comes to that."""
    from ml_embed.commands import embed_teacher, evaluate, mine
    from ml_embed.evaluation import cube
    from ml_embed.recipe import ann, mining, teacher

    mining.ENCODED_BLOCK = mining.QUERY_BLOCK = teacher.BLOCK = cube.BLOCK = 8
    ann.FEWEST_DOCUMENTS = 20
    command, *given = arguments
    if (victim := os.environ.get("VICTIM")) is not None:
        write, calls = Rows._write, iter(range(1000))

        def write_or_die(*block):
            if os.environ["RANK"] == victim and next(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.1 * (os.environ["RANK"] != victim))
            write(*block)

        Rows._write = write_or_die
    mains = {"embed_teacher": embed_teacher, "mine": mine, "evaluate": evaluate}
    return mains[command.split()[0]].main(given)


def run(folder: Path, command: str, arguments: list[str], processes: int, **environment) -> Launch:
    given = {name: str(value) for name, value in environment.items()}
    return Launch(
        folder, [command, *arguments], processes, main=main_in_small_pieces, environment=given
    )


def files_of(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("command", ["embed_teacher", "mine", "mine with ann", "evaluate"])
def test_a_launch_that_lost_a_process_is_continued_by_another_to_the_files_of_one_process(
    world, model, tmp_path, command
):
    if command == "mine with ann":
        pytest.importorskip("faiss")
    alone = run(tmp_path / "0", command, arguments_of(command, world, model, tmp_path / "one"), 1)
    arguments = arguments_of(command, world, model, tmp_path / "many")
    broken = run(tmp_path / "1", command, arguments, 2, VICTIM=1)
    codes = broken.wait()
    assert codes == [2, -signal.SIGKILL], broken.printed()
    assert "another process of this run has ended or does not answer" in broken.printed()
    again = run(tmp_path / "2", command, arguments, 3)
    assert again.wait() == [0, 0, 0], again.printed()
    assert alone.wait() == [0], alone.printed()
    assert files_of(tmp_path / "many") == files_of(tmp_path / "one")
    result = alone.printed().splitlines()[-1]
    said = [path.read_text().replace("many", "one") for path in again.outputs]
    assert [result in text for text in said] == [True, False, False], "only the first one tells it"
