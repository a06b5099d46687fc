"""The wheel in an environment without this clone: `ml-embed` alone trains, exports and encodes."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT

from ml_embed import Embedder
from ml_embed.commands.main import FILES

SHIPPED = ("ml_embed", "pyproject.toml", "README.md", "LICENSE")
SETTINGS = ["train_steps=2", "train_batch_size=4", "r=32", "report_to=[]", "checkpointing_steps=0"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """`ml-embed` of an environment that holds the wheel; what it depends on is this one's."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"  # building leaves files where it reads
    source.mkdir()
    for name in SHIPPED:
        place = ROOT / name
        (shutil.copytree if place.is_dir() else shutil.copy)(place, source / name)
    pip(sys.executable, "wheel", "--no-build-isolation", "--wheel-dir", folder, source)
    venv.create(folder / "environment", with_pip=False)
    python = folder / "environment" / "bin" / "python"
    site = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    ).strip()
    # A folder that is named here counts as a place of packages, but its own .pth files do not:
    # those are what an editable installation of this clone consists of.
    (Path(site) / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = folder.glob("ml_embed-*.whl")
    pip(sys.executable, "--python", python, "install", "--no-index", wheel)
    return python.parent / "ml-embed"


def pip(python, *arguments):
    command = [python, "-m", "pip", "-q", "--disable-pip-version-check", *arguments, "--no-deps"]
    subprocess.run(list(map(str, command)), check=True)


def run(command: Path, *arguments) -> str:
    """What it prints, run where nothing of this clone is found."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [command, *map(str, arguments)],
        env=environment,
        cwd=command.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_comes_from_the_wheel(installed):
    where = run(installed.with_name("python"), "-c", "import ml_embed; print(ml_embed.__file__)")
    assert where.startswith(str(installed.parents[1]))
    assert all(f"  {file.replace('_', '-')} " in run(installed, "--help") for file in FILES)


@pytest.mark.slow
def test_from_raw_data_to_vectors(installed, world, tmp_path):
    tokenizing = ["--tokenizer", world.backbone, "--input", world.raw, "--output", tmp_path / "tok"]
    run(installed, "tokenize", *tokenizing, "--max-seq-length", "24")
    config = world.write_config(tmp_path / "c.json", "one", output_dir=str(tmp_path))
    paths = [f"train_data_path={tmp_path / 'tok'}", "max_seq_length=24"]
    python, launching = installed.with_name("python"), ["-m", "accelerate.commands.launch"]
    launching += ["--config_file", ROOT / "configs" / "accelerate_cpu.yaml", "--no_python"]
    training = ["train", "--config", config, "--set", *paths, *SETTINGS]
    run(python, *launching, installed, *training)
    (model,) = tmp_path.glob("one/step_*")
    cut = ["--model", model, "--output", tmp_path / "cut", "--depth", "1", "--rank", "32"]
    run(installed, "export", *cut, "--dim", "16")
    (tmp_path / "texts.txt").write_text("a text\nanother one\n")
    files = ["--input", tmp_path / "texts.txt", "--output", tmp_path / "vectors.npy"]
    run(installed, "encode", "--model", tmp_path / "cut", *files)
    expected = Embedder.from_pretrained(model, 1, 16, 32).encode(["a text", "another one"])
    assert np.abs(np.load(tmp_path / "vectors.npy") - expected).max() < 1e-6
