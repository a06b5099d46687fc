"""The README is executed: its commands and Python run on a tiny model and data under the names it
uses."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from helpers import ROOT
from helpers.scripts import load_script
from helpers.tiny_models import make_tokenizer, write_model

import run as run_script
import tokenize_data_qwen
from ml_embed.config import DatasetConfig, TrainConfig, field_docs, parse_config

README = (ROOT / "README.md").read_text(encoding="utf-8")
# Run by CI itself, or installing what is installed already.
RUN_ELSEWHERE = (
    "bash scripts/quickstart.sh",
    "bash scripts/test.sh",
    "pip install -c constraints.txt -e .",
)
TINY = [
    "checkpointing_steps=0",
    "train_steps=2",
    "train_batch_size=4",
    "r=32",
    "max_seq_length=24",
    "num_hard_neg=2",
    "report_to=[]",
]
PREFIX = r"(?:[A-Z_]+=\S+ )*"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = [
        line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines()
    ]
    return [line for line in lines if line and line not in RUN_ELSEWHERE]


@pytest.fixture(scope="module")
def laptop(world, tmp_path_factory):
    """A folder where every path that the README names exists, tiny."""
    folder = tmp_path_factory.mktemp("laptop")
    (folder / "my_data").mkdir()
    (folder / "my_data" / "raw").symlink_to(world.raw)
    (folder / "my_data" / "retrieval").mkdir()
    (folder / "my_data" / "retrieval" / "facts.parquet").symlink_to(world.raw / "facts.parquet")
    shutil.copytree(world.backbone, folder / "models" / "Qwen3-0.6B")
    write_model(folder / "models" / "teacher", make_tokenizer())
    (folder / "configs").symlink_to(ROOT / "configs")
    questions = "".join(
        f"how is number {i} written?,the number {i} is written {i}\n" for i in range(12)
    )
    (folder / "faq.csv").write_text("question,answer\n" + questions)
    reviews = "".join(
        f"a {word} thing number {i},{word}\n" for i in range(6) for word in ("good", "bad")
    )
    (folder / "reviews.csv").write_text("review,stars\n" + reviews)
    return folder


def check_launch(flags: list[str]) -> None:
    """accelerate's own parser takes the flags, and the config file is there."""
    from accelerate.commands.launch import launch_command_parser

    known, rest = launch_command_parser().parse_known_args([*flags, "run.py"])
    assert known.training_script == "run.py"
    assert not rest
    assert (ROOT / known.config_file).is_file()


def run_command(command: str) -> int:
    words = shlex.split(re.sub(f"^{PREFIX}", "", command))
    if words[:2] == ["accelerate", "launch"]:
        script = words.index("run.py")
        check_launch(words[2:script])
        words = ["python", *words[script:]]
    assert words[0] == "python", command
    script, arguments = words[1], words[2:]
    if script == "run.py":
        return run_training(arguments)
    if script == "tokenize_data_qwen.py":
        return tokenize_data_qwen.main(arguments)
    module = load_script(Path(script).stem)
    if (
        script == "scripts/evaluate_mteb.py"
    ):  # its data come from the hub; tests/test_mteb.py has a task of its own
        module.evaluate = lambda args: None
    return module.main(arguments)


def run_training(arguments: list[str]) -> int:
    if "configs/quickstart.json" in arguments:  # CI runs it as it is
        return 0
    settings = [word for word in arguments if "=" in word]
    options = [word for word in arguments if word not in (*settings, "--set")]
    if not any(setting.startswith("train_data_path=") for setting in settings):
        settings.append("train_data_path=my_data/tokenized")
    again = "configs/config.json" in arguments and Path("output/0.6B-3d-ml").exists()
    if (
        again
        and "--resume" not in options
        and not any("experiment_id=" in setting for setting in settings)
    ):
        settings.append(f"experiment_id=again-{len(list(Path('output').iterdir()))}")
    return run_script.main([*options, "--set", *settings, *TINY])


# What the README shows, and what the tiny model and a run of two steps have in its place.
SMALLER = {
    "--depth 8 28": "--depth 1 2",
    "--dim 256 1024": "--dim 16 64",
    "valid_ranks=[128,512]": "valid_ranks=[32]",
    "valid_layers=[8,28]": "valid_layers=[1,2]",
    "valid_dims=[256,1024]": "valid_dims=[16,64]",
    "lora_r=16": "lora_r=4",
    "--depth 8": "--depth 1",
    "--rank 128": "--rank 32",
    "--dim 256": "--dim 16",
    "depth=8, dim=256, rank=128": "depth=1, dim=16, rank=32",
    "0.6B-3d-ml/epoch_2": "0.6B-3d-ml/step_2",
    "stage-1/epoch_1": "stage-1/step_2",
    "--preset 160M": "--layers 1 --hidden-size 32 --intermediate-size 48",
}


def made_smaller(text: str) -> str:
    for shown, tiny in SMALLER.items():
        text = text.replace(shown, tiny)
    return text


def test_every_command_of_the_readme_runs(laptop, monkeypatch):
    monkeypatch.chdir(laptop)
    seen = commands()
    assert len(seen) >= 15
    for command in seen:
        assert run_command(made_smaller(command)) == 0, command


def test_the_python_of_the_readme_runs(laptop, monkeypatch):
    monkeypatch.chdir(laptop)
    assert Path("my_models/small").is_dir(), "made by the commands above it in the README"
    for block in blocks("python"):
        names = {}
        exec(made_smaller(block), names)
        assert len(names["vectors"]) in (1, 2)
        assert names["vectors"].shape[1] == 16


def test_the_json_of_the_readme_is_accepted():
    shown = blocks("json")
    assert any('"datasets"' in block for block in shown)
    for block in shown:
        if '"datasets"' in block:
            required = dict.fromkeys(
                (
                    "model_path",
                    "experiment_id",
                    "output_dir",
                    "tb_dir",
                    "cache_dir",
                    "train_data_path",
                ),
                "x",
            )
            parse_config(required | json.loads("{" + block + "}"))
        else:
            assert {"query", "passage", "negatives"} == json.loads(block).keys()


@pytest.mark.parametrize("cls", [TrainConfig, DatasetConfig])
def test_the_key_tables_are_the_configs_own(cls):
    for line in config_table(cls):
        assert line in README, line


def config_table(cls) -> list[str]:
    """The lines of the README's table of keys."""
    import dataclasses

    lines = ["| key | default | meaning |", "|---|---|---|"]
    docs = field_docs(cls)
    for field in dataclasses.fields(cls):
        default = "required"
        if field.default is not dataclasses.MISSING:
            default = f"`{json.dumps(field.default)}`"
        elif field.default_factory is not dataclasses.MISSING:
            default = f"`{json.dumps(field.default_factory())}`"
        lines.append(f"| `{field.name}` | {default} | {docs[field.name]} |")
    return lines


def test_paths_that_the_readme_names_exist():
    for path in re.findall(r"\]\(([^)#]+)\)", README):
        assert path.startswith("http") or (ROOT / path).exists(), path
    for path in re.findall(r"`((?:configs|scripts|tests|ml_embed)/[\w./-]+)`", README):
        assert (ROOT / path).exists(), path
