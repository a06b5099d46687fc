"""Flags of export_model.py that belong to one form."""

import pytest
from helpers.scripts import load_script


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--int8"], "--int8 is a form of --onnx"),
        (["--onnx", "--texts", "x"], "--texts belongs to --int8"),
        (["--gguf", "--allow-loss"], "--allow-loss belongs to --int8"),
        (["--onnx", "--dtype", "bfloat16"], "--dtype does not go with this form"),
        (["--gguf", "--refactor", "x"], "--refactor does not go with this form"),
        (["--static", "--depth", "1"], "--depth does not go with this form"),
    ],
)
def test_flags_of_another_form_are_refused(checkpoint, tmp_path, capsys, flags, said):
    arguments = ["--model", str(checkpoint), "--output", str(tmp_path / "out"), *flags]
    assert load_script("export_model").main(arguments) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_one_form_at_a_time(checkpoint, tmp_path, capsys):
    with pytest.raises(SystemExit):
        load_script("export_model").main(
            ["--model", str(checkpoint), "--output", str(tmp_path / "out"), "--onnx", "--gguf"]
        )
    assert "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["--onnx", "--gguf", "--static"])
def test_what_stands_there_is_not_lost(checkpoint, tmp_path, capsys, form):
    (tmp_path / "thesis.txt").write_text("precious")
    arguments = ["--model", str(checkpoint), "--output", str(tmp_path), form, "--overwrite"]
    assert load_script("export_model").main(arguments) == 2
    assert "not a model folder" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--factors-only"], "has a whole token table and no factors; leave --factors-only out"),
        (["--refactor", "x"], "has a whole token table: there are no factors to turn"),
        (["--gguf", "--rank", "16"], "has a whole token table"),
    ],
)
def test_a_whole_table_has_no_factors(whole, tmp_path, capsys, flags, said):
    arguments = ["--model", str(whole), "--output", str(tmp_path / "out"), *flags]
    assert load_script("export_model").main(arguments) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
