"""All README pages are executed: commands and Python on tiny models and data under the names they
use; their tables, links and paths are compared with what is there.
"""

import argparse
import dataclasses
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from helpers import ROOT
from helpers.catalogues import write_catalogues
from helpers.scripts import load_script
from helpers.teachers import write_cross_encoder
from helpers.tiny_models import make_tokenizer, write_model
from safetensors.torch import load_file

import run as run_script
import tokenize_data_qwen
from ml_embed.commands import build_sample_data, evaluate_mteb, train
from ml_embed.config import DatasetConfig, LanguageSampling, TrainConfig, field_docs, parse_config
from ml_embed.model import factorize_table

# In the order in which a newcomer reads them: a page may use what the commands before it made.
PAGES = (
    "README.md",
    "configs/README.md",
    "configs/scale.md",
    "scripts/README.md",
    "tests/README.md",
    "ml_embed/README.md",
    "ml_embed/benchmarks/README.md",
    "ml_embed/sample_data/README.md",
)
TEXT = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
FOLDERS = ("configs", "scripts", "tests", "ml_embed")
PREFIX = r"(?:[A-Z_]+=\S+ )*"
# Commands that would measure for minutes: their arguments are parsed here, and tests/benchmarks,
# tests/training/test_resume.py, tests/evaluation/test_replication.py and a machine with a GPU run
# the rest.
ONLY_PARSED = re.compile(
    r"scripts/(bench_|compare_|check_gpu|replicate)\w*\.py|tests/(faults/storm|clients/run)\.py"
)
# Of export_model.py; tracing takes long: tests/forms and tests/clients run it.
FORMS = {"--onnx"}
INSTALLED_ALREADY = "pip install -c constraints.txt -e ."
TINY = [
    "checkpointing_steps=0",
    "train_steps=2",
    "train_batch_size=4",
    "global_batch_size=0",
    "r=32",
    "max_seq_length=24",
    "num_hard_neg=2",
    "report_to=[]",
]
# What the pages show, and what the tiny model and a run of two steps have in its place.
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
    "--factorize 128": "--factorize 32",
    "depth=8, dim=256, rank=128": "depth=1, dim=16, rank=32",
    "rank=128, dim=256": "rank=32, dim=16",
    "0.6B-3d-ml/epoch_1": "distilled/step_2",
    "0.6B-3d-ml/epoch_2": "0.6B-3d-ml/step_2",
    "stage-1/epoch_1": "stage-1/step_2",
    "--preset 160M": "--layers 1 --hidden-size 32 --intermediate-size 48",
    "--model runs/quickstart/model/step_400": (
        "--corpus faq.csv --column answer --model models/Qwen3-0.6B"
    ),
    "--languages 50": "--languages 8 --rows 60 --eval-rows 12",
    "--catalogues catalogues": "--catalogues catalogues --rows 240",
    "--corpus names --output": "--corpus names --languages 5 --rows 60 --eval-rows 12 --output",
}


def made_smaller(text: str) -> str:
    for shown, tiny in SMALLER.items():
        text = text.replace(shown, tiny)
    return text


def blocks(page: str, languages: str = r"\w*") -> list[tuple[str, str]]:
    """(language, text) of a page's fenced blocks, in order."""
    return re.findall(rf"^```({languages})\n(.*?)^```$", TEXT[page], flags=re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[str]:
    lines = [re.split(r"\s#", line)[0].strip() for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def laptop(world, tmp_path_factory) -> Path:
    """A folder where every path that the pages name exists, tiny."""
    folder = tmp_path_factory.mktemp("laptop")
    (folder / "my_data").mkdir()
    (folder / "my_data" / "raw").symlink_to(world.raw)
    (folder / "my_data" / "retrieval").mkdir()
    (folder / "my_data" / "retrieval" / "facts.parquet").symlink_to(world.raw / "facts.parquet")
    shutil.copytree(world.backbone, folder / "models" / "Qwen3-0.6B")
    write_model(folder / "models" / "teacher", make_tokenizer())
    write_cross_encoder(folder / "models" / "cross-encoder", make_tokenizer())
    released = shutil.copytree(world.backbone, folder / "models" / "released")
    table = load_file(released / "model.safetensors")["embed_tokens.weight"]
    for name, factor in zip(("U.pth", "V.pth"), factorize_table(table, 64), strict=True):
        torch.save(factor, released / name)
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "queries.txt").write_text("how is it written?\nwhat is the number?\n")
    questions = "".join(
        f"how is number {i} written?,the number {i} is written {i}\n" for i in range(12)
    )
    (folder / "faq.csv").write_text("question,answer\n" + questions)
    reviews = "".join(
        f"a {word} thing number {i},{word}\n" for i in range(6) for word in ("good", "bad")
    )
    (folder / "reviews.csv").write_text("review,stars\n" + reviews)
    (folder / "my_data" / "multilingual").mkdir()
    numbers = [
        {"query": f"{which} number {i}", "passage": f"it is {which} {i}", "language": code}
        for code, which, rows in (("eng", "the", 12), ("swa", "nambari", 4))
        for i in range(rows)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in numbers)
    (folder / "my_data" / "multilingual" / "numbers.jsonl").write_text(lines)
    write_catalogues(folder / "catalogues", messages=1610)
    (folder / "translations").symlink_to(ROOT / "tests" / "cases" / "rows" / "catalogues")
    return folder


class Reader:
    """Somebody who follows the pages in order, each command once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self._monkeypatch = monkeypatch
        # Its tasks come from the hub (see test_mteb.py), and the corpus' source from npm.
        monkeypatch.setattr(evaluate_mteb, "evaluate", lambda args: None)
        corpora = {
            name: (lambda _, file=file: pq.read_table(file), file)
            for name, (_, file) in build_sample_data.CORPORA.items()
        }
        monkeypatch.setattr(build_sample_data, "CORPORA", corpora)
        monkeypatch.setattr(build_sample_data, "write_corpus", lambda table, output: None)
        self._done: set[tuple[str, ...]] = set()

    def follow(self, command: str) -> None:
        words = shlex.split(made_smaller(re.sub(f"^{PREFIX}", "", command)))
        if words[:2] == ["accelerate", "launch"]:
            script = next(i for i, word in enumerate(words) if word.endswith(".py"))
            check_launch(words[2:script])
            words = ["python", *words[script:]]
        if tuple(words) in self._done or command == INSTALLED_ALREADY:
            return
        self._done.add(tuple(words))
        if words[0] == "bash":
            check_bash(*words[1:])
        elif words[0] == "sbatch":
            script = words.index("scripts/train.slurm")
            check_bash(words[script])
            train.parse_arguments(words[script + 1 :])
        elif words[:3] == ["python", "-m", "pytest"]:
            assert all((ROOT / word).exists() for word in words[3:] if word[0] != "-"), command
        else:
            assert words[0] == "python", command
            assert self._run(words[1], words[2:]) == 0, command

    def _run(self, script: str, arguments: list[str]) -> int | None:
        if ONLY_PARSED.fullmatch(script) or FORMS & set(arguments):
            return self._parse(script, arguments)
        if script == "run.py":
            return run_training(arguments)
        if script == "tokenize_data_qwen.py":
            return tokenize_data_qwen.main(arguments)
        return load_script(Path(script).stem).main(arguments)

    def _parse(self, script: str, arguments: list[str]) -> int | None:
        """The exit code of a command that ends as soon as it has understood its arguments."""
        parse = argparse.ArgumentParser.parse_args

        def parse_and_end(parser, given=None, namespace=None):
            parse(parser, given, namespace)
            raise SystemExit(0)

        with self._monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_end)
            patch.setattr(sys, "argv", [script, *arguments])
            with pytest.raises(SystemExit) as end:
                runpy.run_path(str(ROOT / script), run_name="__main__")
        return end.value.code


def check_launch(flags: list[str]) -> None:
    """accelerate's own parser takes the flags, and the config file is there."""
    from accelerate.commands.launch import launch_command_parser

    known, rest = launch_command_parser().parse_known_args([*flags, "run.py"])
    assert known.training_script == "run.py"
    assert not rest
    assert (ROOT / known.config_file).is_file()


def check_bash(script: str, *arguments: str) -> None:
    """bash can read the script, which knows the flags. (CI and people run it.)"""
    subprocess.run(["bash", "-n", ROOT / script], check=True)
    text = (ROOT / script).read_text(encoding="utf-8")
    assert all(flag in text for flag in arguments if flag.startswith("--")), (script, arguments)


def run_training(arguments: list[str]) -> int:
    if "configs/quickstart.json" in arguments:  # scripts/quickstart.sh runs it as it is
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


def test_every_command_and_every_python_block_runs(laptop, monkeypatch):
    monkeypatch.chdir(laptop)
    reader, followed, executed = Reader(monkeypatch), 0, 0
    for page in PAGES:
        for language, block in blocks(page, "bash|python"):
            if language == "bash":
                for command in commands(block):
                    reader.follow(command)
                    followed += 1
            else:
                names: dict = {}
                exec(made_smaller(block), names)
                assert len(names["vectors"]) in (1, 2)
                assert names["vectors"].shape[1] == 16
                executed += 1
    assert followed >= 40
    assert executed >= 2


def test_every_block_is_of_a_kind_that_is_checked():
    for page in PAGES:
        for language, block in blocks(page):
            assert language in ("bash", "python", "json", ""), page
            commanding = re.search(rf"^{PREFIX}(python|bash|accelerate|pip) ", block, re.MULTILINE)
            assert language == "bash" or not commanding, block


def test_the_json_of_the_pages_is_accepted():
    shown = [block for page in PAGES for _, block in blocks(page, "json")]
    assert any('"datasets"' in block for block in shown)
    required = {
        field.name: "x"
        for field in dataclasses.fields(TrainConfig)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    for block in shown:
        if '"datasets"' in block:
            parse_config(required | json.loads("{" + block + "}"))
        else:
            assert {"query", "passage", "negatives"} == json.loads(block).keys()


@pytest.mark.parametrize("cls", [TrainConfig, DatasetConfig, LanguageSampling])
def test_the_key_tables_are_the_configs_own(cls):
    table = "\n".join(key_table(cls))
    assert table in TEXT["configs/README.md"], f"put this into configs/README.md:\n\n{table}"


def key_table(cls: type) -> Iterator[str]:
    """The lines of a table of keys."""
    yield from ("| key | default | values | meaning |", "|---|---|---|---|")
    docs, hints = field_docs(cls), typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        default = "required"
        if field.default is not dataclasses.MISSING:
            default = f"`{json.dumps(field.default)}`"
        elif field.default_factory is not dataclasses.MISSING:
            default = f"`{json.dumps(field.default_factory())}`"
        values = values_of(hints[field.name], field.metadata)
        yield f"| `{field.name}` | {default} | {values} | {docs[field.name]} |"


def values_of(hint: typing.Any, limits: typing.Mapping[str, float | None]) -> str:
    """Type and range of a key in words."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        options = [option for option in typing.get_args(hint) if option is not types.NoneType]
        return ", ".join(values_of(option, limits) for option in options)
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{json.dumps(choice)}`" for choice in typing.get_args(hint))
    names = {int: "whole number", float: "number", bool: "`true`, `false`", str: "text"}
    if typing.get_origin(hint) is tuple:
        words = f"list of {names[typing.get_args(hint)[0]]}s".replace("texts", "names")
    else:
        words = names.get(hint, "object")
    signs = {"low": "≥", "above": ">", "high": "≤", "below": "<"}
    given = {kind: limits[kind] for kind in signs if limits.get(kind) is not None}
    limited = [f"{signs[kind]} {limit:g}" for kind, limit in given.items()]
    return " ".join([words, ", ".join(limited)]).strip()


def test_the_tables_of_the_page_on_scale_are_the_commands_own(capsys):
    assert load_script("estimate_scale").main([]) == 0
    assert capsys.readouterr().out in TEXT["configs/scale.md"]


def test_every_link_leads_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)]+)\)", TEXT[page]):
            path, _, heading = link.partition("#")
            if link.startswith("http"):
                continue
            target = (ROOT / page).parent / path if path else ROOT / page
            assert target.exists(), f"{page}: {link}"
            if heading:
                assert heading in headings(target), f"{page}: {link}"


def headings(page: Path) -> set[str]:
    """The names under which GitHub links to the headings of a page."""
    found = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in found}


def test_every_path_that_a_page_names_exists():
    known = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")}
    known |= {path.name for path in ROOT.iterdir()}
    rooms = {path.name for path in (ROOT / "ml_embed").iterdir() if path.is_dir()}
    for page in PAGES:
        for path in re.findall(r"`([\w.-]+(?:/[\w.-]*)*)`", TEXT[page]):
            first, _, rest = path.partition("/")
            if first in FOLDERS and rest:
                assert (ROOT / path).exists(), f"{page}: {path}"
            elif page.startswith("ml_embed/") and first in rooms and rest:
                assert (ROOT / "ml_embed" / path).exists(), f"{page}: {path}"
            elif not rest and path.endswith((".py", ".sh", ".toml", ".yaml")):
                assert path in known, f"{page}: {path}"


def test_every_script_config_and_page_is_told_of():
    for folder in ("scripts", "configs"):
        for path in sorted((ROOT / folder).glob("*.*")):
            name = f"`{folder}/{path.name}`"
            assert path.suffix == ".md" or name in TEXT[f"{folder}/README.md"], name
    for page in PAGES[1:]:
        assert f"]({page}" in TEXT["README.md"], f"README.md does not lead to {page}"
    assert {str(path.relative_to(ROOT)) for f in FOLDERS for path in (ROOT / f).rglob("*.md")} | {
        "README.md"
    } == set(PAGES)


def test_the_table_of_rooms_names_every_file():
    rows = re.findall(
        r"^\| \d+ \| `(\w+)/` \|[^|]*\| ([^|]*) \|$", TEXT["ml_embed/README.md"], re.M
    )
    assert {room: sorted(re.findall(r"`(\w+)`", files)) for room, files in rows} == {
        folder.name: sorted(path.stem for path in folder.glob("*.py") if path.name != "__init__.py")
        for folder in (ROOT / "ml_embed").iterdir()
        if folder.is_dir() and folder.name != "__pycache__"
    }


def test_the_front_page_is_short():
    assert len(TEXT["README.md"].splitlines()) < 180
