"""Long commands under a launcher: the files of one process, whatever number did the work."""

import importlib.util
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from helpers.machines import kill_machine, launch_on, two_machines
from helpers.tiny_models import make_tokenizer, write_model
from helpers.tiny_runs import Launch, dying, victim, wait_for_lines

from ml_embed.commands import embed_teacher, encode, evaluate, mine, score_candidates, tokenize
from ml_embed.distributed.shares import Rows
from ml_embed.evaluation import cube
from ml_embed.inference import vector_file
from ml_embed.prepare import tokenization
from ml_embed.recipe import ann, mining, scoring, teacher

COMMANDS = {
    "tokenize": tokenize,
    "embed_teacher": embed_teacher,
    "mine": mine,
    "score": score_candidates,
    "evaluate": evaluate,
    "encode": encode,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model", make_tokenizer())


@pytest.fixture(scope="module")
def raw(world, tmp_path_factory) -> Path:
    """More datasets than processes."""
    folder = tmp_path_factory.mktemp("raw")
    for path in world.raw.iterdir():
        for number in range(2):
            shutil.copy(path, folder / f"{path.stem}_{number}.parquet")
    return folder


def arguments_of(command: str, world, raw: Path, model: Path, output: Path) -> list[str]:
    backbone = str(world.backbone)
    mining = ["--input", str(world.raw), "--max-score", "2", "--max-ratio", "2", "--top", "20"]
    given = {
        "tokenize": ["--input", str(raw), "--tokenizer", backbone],
        "embed_teacher": ["--data", str(world.tokenized), "--tokenizer", backbone],
        "mine": [*mining, *(["--search", "ann"] if importlib.util.find_spec("faiss") else [])],
        "score": ["--data", str(world.raw)],
        "evaluate": ["--data", str(world.raw), "--baseline", backbone],
        "encode": ["--input", str(world.raw / "facts.parquet"), "--column", "query"],
    }[command]
    output = output / "vectors.npy" if command == "encode" else output
    reads = [] if command == "tokenize" else ["--model", str(model)]
    return ["--output", str(output), *reads, *given]


SMALL = [
    (mining, "ENCODED_BLOCK", 8),
    (mining, "QUERY_BLOCK", 8),
    (scoring, "SCORED_BLOCK", 16),
    (teacher, "BLOCK", 8),
    (cube, "BLOCK", 8),
    (vector_file, "BLOCK", 4),
    (ann, "FEWEST_DOCUMENTS", 28),  # one of the datasets has fewer, and is searched exactly
]
"""What makes many pieces of tiny work."""


def main_in_small_pieces(arguments: list[str]) -> int:
    for module, name, value in SMALL:
        setattr(module, name, value)
    if "VICTIM" in os.environ:
        Rows._write = dying(Rows._write)
        tokenization._write_block = dying(tokenization._write_block)
    command, *given = arguments
    return COMMANDS[command].main(given)


def run(folder: Path, command: str, arguments: list[str], processes: int, **environment) -> Launch:
    return Launch(
        folder, [command, *arguments], processes, main=main_in_small_pieces, environment=environment
    )


def files_of(folder: Path) -> dict[str, bytes]:
    """All but locks and remembered digests."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    files = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    return {name: content for name, content in files.items() if name != ".digests.json"}


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_launch_leaves_that_loses_a_process_another_ends_as_one_process_would(
    world, raw, model, tmp_path, command, monkeypatch, capsys
):
    one, many = (
        arguments_of(command, world, raw, model, tmp_path / name) for name in ("one", "many")
    )
    for change in SMALL:
        monkeypatch.setattr(*change)
    assert COMMANDS[command].main(one) == 0
    result = capsys.readouterr().out.splitlines()[-1].replace("/one", "/many")
    broken = run(tmp_path / "1", command, many, 2, **victim(tmp_path))
    assert broken.wait() == [2, -signal.SIGKILL], broken.printed()
    assert "another process of this run has ended or does not answer" in broken.printed()
    notes = [path.name for path in (tmp_path / "many").rglob("*") if path.is_file()]
    assert any(name.endswith(("done-1", "partial-1.jsonl")) for name in notes), notes
    machines = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}  # each has one process
    again = run(tmp_path / "2", command, many, 3, **machines)
    assert again.wait() == [0, 0, 0], again.printed()
    assert files_of(tmp_path / "many") == files_of(tmp_path / "one")
    said = [path.read_text() for path in again.outputs]
    assert [result in text for text in said] == [True, False, False], "only the first one tells it"


@pytest.fixture
def machines():
    with two_machines() as machines:
        yield machines


@pytest.mark.slow
def test_two_machines_tokenize_into_one_folder(machines, world, tmp_path):
    """The second one is killed when it has made a dataset; both start again."""
    (tmp_path / "raw").mkdir()
    for number in range(12):
        rows = [{"query": f"{i} {number}", "passage": f"text {i} " * 8} for i in range(4000)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "raw" / f"set_{number}.jsonl").write_text(lines)
    flags = ["--input", tmp_path / "raw", "--tokenizer", world.backbone, "--output"]
    assert tokenize.main([str(flag) for flag in [*flags, tmp_path / "one"]]) == 0
    outputs, script = [tmp_path / "first", tmp_path / "second"], "tokenize_data_qwen.py"
    with launch_on(machines, script, [*flags, tmp_path / "many"], outputs) as launchers:
        wait_for_lines(tmp_path / "many" / "manifest.partial-1.jsonl", 1, outputs[1])
        kill_machine(launchers[1])
        assert launchers[0].wait(60) == 1, "what accelerate makes of any failure"
    said = outputs[0].read_text()  # at its next word to the other, or after 30 seconds of silence
    assert "has ended or does not answer" in said or "machine 1 (counted from 0) has not" in said
    assert "what is done is kept" in said
    assert not (tmp_path / "many" / "manifest.json").exists()
    with launch_on(machines, script, [*flags, tmp_path / "many"], outputs) as launchers:
        assert [launcher.wait(120) for launcher in launchers] == [0, 0], outputs[0].read_text()
    assert "datasets are complete already" in outputs[0].read_text()
    assert files_of(tmp_path / "many") == files_of(tmp_path / "one")
