"""Checkpoints on disk: how many are kept, and what a full disk, tampering or malice does to
them."""

import json
import pickle
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers.tiny_runs import Inputs, final_state, metrics

import run as run_script
from ml_embed.data.store import open_converted
from ml_embed.errors import UserError
from ml_embed.files.atomic import checksum_problem, write_checksums
from ml_embed.files.paths import numbered_folders
from ml_embed.inference.embedder import Embedder

STEPS = 4


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    return Inputs.write(tmp_path_factory.mktemp("checkpoint") / "inputs")


def config_of(inputs, name: str, **changes) -> Path:
    settings = {
        "train_batch_size": 4,
        "train_steps": STEPS,
        "checkpointing_steps": 1,
        "mrl_dims": [32],
    }
    return inputs.config(name, **settings | changes)


def train(config: Path, *arguments) -> int:
    return run_script.main(["--config", str(config), *map(str, arguments)])


@pytest.fixture(scope="module")
def trained(inputs) -> Path:
    """A run with two resume states and two model folders."""
    assert train(config_of(inputs, "trained", save_total_limit=2)) == 0
    return inputs.run_dir("trained")


@pytest.fixture
def copy(inputs, trained):
    """A copy of the run that may be damaged."""
    folder = inputs.run_dir("copy")
    shutil.copytree(trained, folder)
    yield folder
    shutil.rmtree(folder)


def test_how_many_are_kept(inputs, trained):
    assert [number for number, _ in numbered_folders(trained)] == [3, 4]
    assert [number for number, _ in numbered_folders(trained / "resume")] == [3, 4]
    assert not list(trained.rglob("*.bin"))
    assert not list(trained.rglob("*.pt"))
    assert {path.suffix for path in (trained / "resume").rglob("*") if path.is_file()} == {
        ".json",
        ".safetensors",
    }


def test_a_kill_while_old_ones_are_removed_leaves_nothing(inputs, copy):
    """Killed after its last checkpoint was written, before or while older ones were removed."""
    before = sorted(path.relative_to(copy) for path in copy.rglob("*"))
    shutil.copytree(copy / f"step_{STEPS}", copy / "step_1")
    shutil.copytree(copy / "resume" / f"step_{STEPS}", copy / "resume" / "step_1")
    for folder in (copy, copy / "resume"):
        (folder / ".step_2.partial").mkdir()
        (folder / ".step_2.partial" / "model.safetensors").touch()
    assert train(config_of(inputs, "copy", save_total_limit=2), "--resume", "auto") == 0
    assert sorted(path.relative_to(copy) for path in copy.rglob("*")) == before


def test_folders_of_later_steps_do_not_push_out_new_ones(inputs, copy):
    config = config_of(inputs, "copy", save_total_limit=2)
    assert train(config, "--resume", copy / "resume" / "step_3") == 0
    for number in (90, 91):
        shutil.copytree(copy / "step_4", copy / f"step_{number}")
    assert (
        train(config_of(inputs, "copy", save_total_limit=2, train_steps=6), "--resume", "auto") == 2
    )
    longer = config_of(inputs, "copy", save_total_limit=2, train_steps=6)
    assert train(longer, "--resume", "auto", "--allow-changes") == 0
    assert [number for number, _ in numbered_folders(copy)] == [5, 6, 90, 91]


def test_a_full_disk_stops_the_run_and_keeps_the_last_good_checkpoint(
    inputs, trained, tmp_path, capsys
):
    mounted = tmp_path / "small"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(mounted)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip(
            "a small file system cannot be mounted here (needs root); simulated in "
            "tests/faults/storm.py"
        )
    try:
        config = config_of(inputs, "trained", output_dir=str(mounted))
        assert train(config) == 2
        assert "no space left" in capsys.readouterr().err
        run_dir = mounted / "trained"
        states = numbered_folders(run_dir / "resume")
        assert states
        assert 0 < states[-1][0] < STEPS
        assert all(checksum_problem(path) is None for _, path in states)
        assert not list(run_dir.rglob(".*"))
        assert all(
            json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()
        )
        for _, path in numbered_folders(run_dir):
            shutil.rmtree(path)
        for _, path in states[:-1]:
            shutil.rmtree(path)
        assert (
            train(
                config_of(inputs, "trained", output_dir=str(mounted), save_total_limit=1),
                "--resume",
                "auto",
            )
            == 0
        )
        assert metrics(run_dir) == metrics(trained)
        for name, tensor in final_state(trained).items():
            assert torch.equal(tensor, final_state(run_dir)[name]), name
    finally:
        subprocess.run(["umount", "--lazy", str(mounted)], check=True)  # mapped tensors may live on


def test_a_state_of_an_earlier_version_is_refused_by_a_sentence(inputs, copy, capsys):
    """Its sums were BLAKE2b ones, under no name."""
    for _, state in numbered_folders(copy / "resume"):
        sums = {path.name: "ab" * 64 for path in state.iterdir() if path.name != "checksums.json"}
        (state / "checksums.json").write_text(json.dumps(sums))
    newest = str(state)
    for resume in ("auto", newest):
        assert train(config_of(inputs, "copy"), "--resume", resume) == 2
        said = capsys.readouterr().err
        assert "was saved by another version of ml-embed" in said
        assert "is damaged" not in said


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("state.json", "{}", "is no record of a run"),
        ("state.json", "[1]", "is no record of a run"),
        ("state.json", '{"format_version": 99}', "another version"),
        ("model.safetensors", "no tensors", "cannot be read"),
        ("optimizer.safetensors", "no tensors", "cannot be read"),
    ],
)
def test_wrong_content_under_right_checksums_is_refused(
    inputs, copy, capsys, file, content, message
):
    state = copy / "resume" / "step_4"
    (state / file).write_text(content)
    (state / "checksums.json").unlink()
    write_checksums(state)
    assert train(config_of(inputs, "copy"), "--resume", "auto") == 2
    assert message in capsys.readouterr().err


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.mkdir, (self.marker,)


@pytest.fixture
def marker(tmp_path):
    """A path that exists after the test only if something was executed."""
    path = tmp_path / "executed"
    pickle.loads(pickle.dumps(Payload(path)))
    path.rmdir()  # the payload works
    yield path
    assert not path.exists(), "something was executed"


def write_pickle(path: Path, marker: Path) -> None:
    torch.save({"weight": Payload(marker)}, path)


def with_code(folder: Path, marker: Path) -> None:
    """Give a model folder Python code of its own, and ask for it in every way that transformers
    knows."""
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).mkdir()\n")
    for file in ("config.json", "tokenizer_config.json"):
        settings = json.loads((folder / file).read_text())
        classes = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
        settings["auto_map"] = dict.fromkeys(classes, "evil.Evil") | {
            "AutoTokenizer": ["evil.Evil", "evil.Evil"]
        }
        (folder / file).write_text(json.dumps(settings))


@pytest.fixture
def backbone(inputs, tmp_path) -> Path:
    return shutil.copytree(inputs.folder / "backbone", tmp_path / "backbone")


PICKLE_NAMES = (
    "pytorch_model.bin",
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "model.pt",
)


@pytest.mark.parametrize("key", ["model_path", "teacher_model_path"])
def test_code_in_a_model_folder_is_refused(inputs, backbone, marker, capsys, key, monkeypatch):
    # A question whether to trust it would be answered with yes.
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    plain = (backbone / "config.json").read_text()
    with_code(backbone, marker)
    for file in ("config.json", "tokenizer_config.json"):
        assert train(config_of(inputs, f"evil_{key}", **{key: str(backbone)})) == 2
        message = capsys.readouterr().err
        assert f"{file}" in message
        assert "auto_map asks for code" in message
        with pytest.raises(UserError, match="auto_map asks for code"):
            Embedder.from_pretrained(backbone)
        (backbone / "config.json").write_text(plain)


@pytest.mark.parametrize("key", ["model_path", "teacher_model_path"])
def test_pickles_in_a_model_folder_are_not_run(inputs, backbone, marker, capsys, key):
    for name in PICKLE_NAMES:
        write_pickle(backbone / name, marker)
    name = f"pickles_{key}"
    assert train(config_of(inputs, name, train_steps=1, **{key: str(backbone)})) == 0
    Embedder.from_pretrained(backbone).encode(["a text"])
    (backbone / "model.safetensors").unlink()
    capsys.readouterr()
    assert train(config_of(inputs, f"{name}_pickled", train_steps=1, **{key: str(backbone)})) == 2
    assert "safetensors" in capsys.readouterr().err


def test_a_pickle_in_the_place_of_tensors_is_refused(inputs, backbone, trained, marker, capsys):
    write_pickle(backbone / "model.safetensors", marker)
    assert train(config_of(inputs, "in_place", model_path=str(backbone))) == 2
    assert "cannot be loaded" in capsys.readouterr().err
    model = shutil.copytree(trained / "step_4", backbone.parent / "model")
    write_pickle(model / "nested" / "embedding_factors.safetensors", marker)
    with pytest.raises(UserError, match="embedding_factors"):
        Embedder.from_pretrained(model)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_pickles_in_a_resume_state_are_not_run(inputs, copy, marker, capsys, file):
    state = copy / "resume" / "step_4"
    for name in (file, *PICKLE_NAMES):
        write_pickle(state / name, marker)
    (state / "checksums.json").unlink()
    write_checksums(state)
    assert train(config_of(inputs, "copy"), "--resume", "auto") == 2
    assert capsys.readouterr().err.count("error:") == 1


def test_pickles_in_data_and_cache_are_not_run(inputs, trained, tmp_path, marker, capsys):
    data = shutil.copytree(inputs.folder / "tokenized", tmp_path / "tokenized")
    config = config_of(
        inputs, "data", train_data_path=str(data), cache_dir=str(tmp_path / "cache"), train_steps=1
    )
    assert train(config) == 0
    (store,) = (tmp_path / "cache").glob("store-*/")
    for path in store.glob("*.npy"):
        whole = path.read_bytes()
        np.save(path, np.array([Payload(marker)], dtype=object), allow_pickle=True)
        open_converted.cache_clear()
        assert (
            train(
                config_of(
                    inputs, "data2", train_data_path=str(data), cache_dir=str(tmp_path / "cache")
                )
            )
            == 2
        )
        assert "damaged" in capsys.readouterr().err
        path.write_bytes(whole)
    for name in ("answers_query.parquet", "answers_corpus.parquet", "manifest.json"):
        whole = (data / name).read_bytes()
        write_pickle(data / name, marker)
        assert train(config_of(inputs, "data3", train_data_path=str(data))) == 2
        assert capsys.readouterr().err.count("error:") == 1
        (data / name).write_bytes(whole)
    # Arrow can carry pickled extension types in a schema's metadata.
    table = pq.read_table(data / "answers_corpus.parquet")
    hidden = {
        "ARROW:extension:name": b"arrow.py_extension_type",
        "ARROW:extension:metadata": pickle.dumps(Payload(marker)),
    }
    field = table.schema.field("input_ids").with_metadata(hidden)
    pq.write_table(table.cast(table.schema.set(0, field)), data / "answers_corpus.parquet")
    train(config_of(inputs, "data4", train_data_path=str(data), train_steps=1))
