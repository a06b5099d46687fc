"""Nested cuts beside models trained alone: what is trained and compared, and that it resumes."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ml_embed import Embedder
from ml_embed.commands import compare_dedicated
from ml_embed.evaluation.cube import evaluate_cube
from ml_embed.evaluation.intervals import bootstrap, difference
from ml_embed.evaluation.metrics import values_of_ranks

CUTS = ["16:1:8", "32:2:16"]
RATES = ["1e-3", "1e-2"]


@pytest.fixture(scope="module")
def compared(world, tmp_path_factory):
    """The command's arguments and its output folder."""
    folder = tmp_path_factory.mktemp("compared")
    config = world.write_config(folder / "config.json", "mine", train_steps=2, valid_fraction=0)
    arguments = ["--config", str(config), "--cuts", *CUTS, "--seeds", "0", "1"]
    arguments += ["--learning-rates", *RATES, "--data", str(world.raw / "facts.parquet")]
    arguments += ["--tuning-data", str(world.raw / "topics.parquet")]
    arguments += ["--output", str(folder / "compared")]
    assert compare_dedicated.main(arguments) == 0
    return arguments, folder / "compared"


def test_models_alone_are_trained_for_their_cut_alone(world, compared):
    _, output = compared
    runs = sorted(path.name for path in (output / "runs").iterdir() if path.is_dir())
    assert len(runs) == 3 * (2 + 1), "rates are tried at the first seed alone"
    name = "rank_16_depth_1_dim_8_seed_0_lr_0.01"
    assert name in runs
    resolved = json.loads((output / "runs" / name / "resolved.json").read_text())
    nested = json.loads((output / "runs/nested_seed_0_lr_0.01/resolved.json").read_text())
    assert (resolved["ranks"], resolved["exits"]) == ([16], [1])
    assert dict(zip(resolved["dims"], resolved["dim_weights"], strict=True)) == {64: 0, 8: 1}
    for same in ("total_steps", "datasets", "global_batch_size"):
        assert resolved[same] == nested[same]
    (folder,) = (output / "starts").glob("depth_1_*")
    start = load_file(folder / "model.safetensors")
    whole = load_file(world.backbone / "model.safetensors")
    for key, tensor in start.items():
        torch.testing.assert_close(tensor, whole[key].float())
    assert not any("layers.1." in key for key in start)


def test_the_numbers_are_those_of_the_folders(world, compared, capsys):
    _, output = compared
    result = json.loads((output / "comparison.json").read_text())
    assert result["seeds"] == [0, 1]
    row = next(row for row in result["rows"] if row["rank"] == 16)
    data, tuning = world.raw / "facts.parquet", world.raw / "topics.parquet"

    def values(run: str, data=data) -> np.ndarray:
        folder = output / "runs" / run / "step_2"
        found = evaluate_cube(folder, data, [16], [1], [8], per_query=True, progress=False)
        return values_of_ranks(found["rows"][0]["ranks"])["recall@1"]

    for seed, own in enumerate(row["seeds"]):
        names = ("nested", "rank_16_depth_1_dim_8")
        pair = [
            values(f"{name}_seed_{seed}_lr_{result['learning_rates'][name]['best']:g}")
            for name in names
        ]
        assert own["nested"] == pytest.approx(pair[0].mean())
        assert own["alone"] == pytest.approx(pair[1].mean())
        expected = bootstrap([np.stack(pair)], difference)
        assert own["difference"] == pytest.approx([expected.value, expected.low, expected.high])
    differences = [own["difference"][0] for own in row["seeds"]]
    assert row["difference"] == pytest.approx(np.mean(differences))
    assert row["range"] == [min(differences), max(differences)]
    rates = result["learning_rates"]["rank_16_depth_1_dim_8"]
    scores = {
        rate: values(f"rank_16_depth_1_dim_8_seed_0_lr_{rate}", tuning).mean()
        for rate in ("0.001", "0.01")
    }
    assert {rate: rates[rate] for rate in scores} == pytest.approx(scores)
    assert scores[f"{rates['best']:g}"] == max(scores.values())
    assert (output / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "depth 1, dim 8, rank 16" in (output / "comparison.html").read_text()


def test_what_is_trained_is_not_trained_again(compared, capsys):
    arguments, output = compared
    before = {path: path.stat().st_mtime_ns for path in output.glob("runs/*/step_2/*")}
    numbers = (output / "comparison.json").read_text()
    assert compare_dedicated.main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in output.glob("runs/*/step_2/*")} == before
    assert (output / "comparison.json").read_text() == numbers
    printed = capsys.readouterr().out
    assert "nested" in printed
    assert "depth 2, dim 16, rank 32" in printed


def test_a_nested_run_is_taught_by_the_whole_model_of_its_seed(world, tmp_path, compared, capsys):
    """Models alone, and what they are compared with, stay as they are."""
    arguments, output = compared
    arguments = [*arguments[: arguments.index("--learning-rates")], *arguments[-6:]]
    arguments[arguments.index(CUTS[0])] = "32:2:64"
    untaught = (output / "comparison.json").read_bytes()
    alone = {path: path.stat().st_mtime_ns for path in output.glob("runs/*rank*/step_2/*")}
    assert compare_dedicated.main([*arguments, "--taught"]) == 0
    assert (output / "comparison.json").read_bytes() == untaught
    assert alone == {path: path.stat().st_mtime_ns for path in alone}
    result = json.loads((output / "comparison_taught.json").read_text())
    assert result["taught"] is True
    for seed in (0, 1):
        (run,) = (output / "runs").glob(f"taught_seed_{seed}_*")
        config = json.loads((run / "config.json").read_text())
        assert config["kd_loss"] == "similarity"
        teacher = f"runs/rank_32_depth_2_dim_64_{run.name.removeprefix('taught_')}/step_2"
        assert config["teacher_model_path"] == str(output / teacher)
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        assert any(line.get("distillation_loss", 0) > 0 for line in lines)
    told = "learned from the whole model alone"
    assert told in (output / "comparison_taught.html").read_text()
    assert told not in (output / "comparison.html").read_text()


def test_a_model_alone_gives_short_vectors(compared):
    _, output = compared
    folder = output / "runs/rank_16_depth_1_dim_8_seed_0_lr_0.001/step_2"
    model = Embedder.from_pretrained(folder, dim=8, device="cpu")
    assert model.encode("a text").shape == (8,)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--learning-rates", "1e-3", "1e-2"], "choose by --tuning-data"),
        (["--learning-rates", "-1"], "learning_rate: -1.0 must be greater than 0"),
        (["--seeds", "0", "-5"], "seed: -5 must be at least 0"),
        (
            ["--learning-rates", "1e-3", "1.0000001e-3", "--tuning-data", "README.md"],
            "two are alike",
        ),
        (["--tuning-data", "nowhere"], "evaluation data nowhere does not exist"),
        (["--taught"], "the teacher is the whole model alone; add 32:2:64 to --cuts"),
        (["--taught", "--set", "teacher_model_path=here"], "the config names a teacher already"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(world, tmp_path, capsys, more, message):
    config = world.write_config(tmp_path / "config.json", "mine")
    given = ["--config", str(config), "--data", str(world.raw), "--output", str(tmp_path / "out")]
    assert compare_dedicated.main([*given, "--cuts", "32:2:8", *more]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out/runs").exists()


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        ("16:1", "'16:1' must have the form rank:depth:dim"),
        ("16:9:8", "16:9:8: the nested run has no depth 9; its whole is 32:2:64"),
        ("0:1:8", "0:1:8: the nested run has no rank 0"),
        ("64:1:8", "64:1:8: the nested run has no rank 64"),
    ],
)
def test_cuts_that_cannot_be(world, tmp_path, capsys, cuts, message):
    config = world.write_config(tmp_path / "config.json", "mine")
    given = ["--config", str(config), "--data", str(world.raw), "--output", str(tmp_path / "out")]
    assert compare_dedicated.main([*given, "--cuts", cuts]) == 2
    assert message in capsys.readouterr().err
