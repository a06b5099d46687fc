"""`ml-embed`: every command by one name; the files outside the package only call them."""

import ast
import re
import sys

import pytest
from helpers import ROOT

from ml_embed.commands.main import FILES, main

ENTRANCES = [ROOT / "run.py", ROOT / "tokenize_data_qwen.py", *(ROOT / "scripts").glob("*.py")]


@pytest.fixture(autouse=True)
def own_argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/ml-embed"])


def test_every_command_is_listed_with_its_first_line(capsys):
    room = {path.stem for path in (ROOT / "ml_embed" / "commands").glob("*.py")}
    assert set(FILES) == room - {"__init__", "main", "flags"}
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    listed = re.findall(r"^  ([a-z-]+) +(\S.*\.)$", capsys.readouterr().out, re.MULTILINE)
    assert [name.replace("-", "_") for name, _ in listed] == list(FILES)


def test_a_command_gets_the_flags_that_follow_its_name(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/ml-embed", "export", "--model", "x"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "ml-embed export: error: the following arguments are required: --output" in (
        capsys.readouterr().err
    )
    assert main(["report", "/nowhere", "--quiet"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("given", [[], ["exprot", "--model", "x"]])
def test_a_command_that_is_not_there_is_a_mistake(given, capsys):
    with pytest.raises(SystemExit) as end:
        main(given)
    assert end.value.code == 2
    assert "ml-embed: error: " in capsys.readouterr().err


def test_files_outside_the_package_only_call_the_commands():
    called = []
    for path in ENTRANCES:
        body = ast.parse(path.read_text(encoding="utf-8")).body
        called += [
            node.module.removeprefix("ml_embed.commands.")
            for node in body
            if isinstance(node, ast.ImportFrom) and node.module != "pathlib"
        ]
        kinds = (ast.Import, ast.ImportFrom, ast.Expr, ast.If)
        assert all(isinstance(node, kinds) for node in body), f"{path} has code of its own"
    assert sorted(called) == sorted(FILES)


@pytest.mark.parametrize(
    ("command", "flag", "others"),
    [
        ("evaluate", "--max-queries", "--model=x --data=x --output=x"),
        ("evaluate", "--batch-tokens", "--model=x --data=x --output=x"),
        ("evaluate-mteb", "--batch-tokens", "--model=x --tasks=x --output=x"),
        ("replicate", "--batch-tokens", "--mock --output=x"),
        ("compare-dedicated", "--max-queries", "--config=x --cuts=x --data=x --output=x"),
        ("search", "--top", "--model=x"),
        ("prune-backbone", "--max-texts", "--model=x --output=x"),
        ("estimate-scale", "--document-tokens", ""),
    ],
)
def test_a_number_below_one_is_a_mistake_before_any_work(
    command, flag, others, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main([command, *others.split(), flag, "0"]) == 2
    assert capsys.readouterr().err == f"error: {flag} is 0; it must be at least 1\n"
    with pytest.raises(SystemExit):
        main([command, *others.split(), flag, "1.5"])
    assert "invalid int value: '1.5'" in capsys.readouterr().err
