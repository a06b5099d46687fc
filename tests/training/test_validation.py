"""The validation grid: every number against the saved model folder, cut there and read by the
Embedder."""

import itertools
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.held_out import held_out_rows, measured, searched
from helpers.in_process import train, with_shared_queries
from helpers.tiny_runs import Inputs, metrics, run
from helpers.tiny_world import TASKS
from oracles import naive_metrics

import run as run_script
from ml_embed import Embedder
from ml_embed.model import MatryoshkaEncoder
from ml_embed.model_folders.cut import Cube, Cut
from ml_embed.prepare.tokenization import TokenizeOptions, tokenize_folder

GRID = {"valid_ranks": [32, 16], "valid_layers": [1, 2], "valid_dims": [64, 8]}
SETTINGS = {
    "valid_fraction": 0.5,
    "num_hard_neg": 9,
    "num_hard_neg_clustering": 9,
}  # all negatives that there are
CUTS = [Cut(*sizes) for sizes in itertools.product((16, 32), (1, 2), (8, 64))]


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """Folder and metrics of a run with a grid, and of the same run without."""
    folder = tmp_path_factory.mktemp("validation")
    code, with_grid = train(world, folder, "grid", **SETTINGS, **GRID)
    code_without, without = train(world, folder, "none", **SETTINGS)
    assert code == code_without == 0
    return folder / "grid", with_grid, without


@pytest.fixture(scope="module")
def held_out(world, tmp_path_factory):
    """Dataset -> its raw held-out rows."""
    return held_out_rows(
        world.config(**SETTINGS, cache_dir=str(tmp_path_factory.mktemp("cache"))), world.raw
    )


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_each_cut_is_what_the_saved_model_cut_there_gives(runs, held_out, cut):
    folder, lines, _ = runs
    valid = [line for line in lines if line["split"] == "valid"][-1]
    model = Embedder.from_pretrained(folder / "step_4", **vars(cut), device="cpu")
    for name, task in TASKS.items():
        for metric, value in measured(model, held_out[name], task).items():
            key = f"{metric}/rank_{cut.rank}_depth_{cut.depth}_dim_{cut.dim}"
            assert valid[f"{name}/{key}"] == valid[f"Avg/{task}/{key}"] == pytest.approx(value), (
                name,
                key,
            )
            if cut == Cut(32, 2, 64):
                assert valid[f"{name}/{metric}"] == pytest.approx(value)


def test_cuts_differ(runs):
    valid = [line for line in runs[1] if line["split"] == "valid"][-1]
    assert len({valid[f"facts/mrr@10/{cut.name}"] for cut in CUTS}) > len(CUTS) / 2


def test_the_grid_adds_its_numbers_and_changes_no_other(runs):
    """Training included: measuring draws nothing at random and leaves the model as it was."""
    _, with_grid, without = runs
    clock = {"time", "seconds", "tokens_per_second"}
    for line, plain in zip(with_grid, without, strict=True):
        added = line.keys() - plain.keys()
        assert all(Cut.of_name(key.rsplit("/", 1)[1]) in CUTS for key in added)
        assert len(added) == (0 if line["split"] == "train" else 3 * 6 * len(CUTS))
        assert {key: value for key, value in line.items() if key not in added | clock} == {
            key: value for key, value in plain.items() if key not in clock
        }


def test_rows_with_nothing_to_be_told_apart_from_are_left_out(world, tmp_path):
    """They would always be right. A dataset of nothing else has no such metric."""
    raw = tmp_path / "raw"
    raw.mkdir()
    rows = pq.read_table(world.raw / "topics.parquet").to_pylist()
    for name, every in (("some", 2), ("none", 1)):
        kept = [
            row | {"negatives": row["negatives"] if i % every else []} for i, row in enumerate(rows)
        ]
        pq.write_table(pa.Table.from_pylist(kept), raw / f"{name}.parquet")
    tokenized = tmp_path / "tokenized"
    tokenize_folder(
        TokenizeOptions(tokenizer=str(world.backbone), input=raw, output=tokenized), progress=False
    )
    settings = SETTINGS | {"train_data_path": str(tokenized), "cache_dir": str(tmp_path / "cache")}
    settings |= {
        "datasets": {name: {"task": "clustering"} for name in ("some", "none")},
        "train_steps": 1,
    }
    code, lines = train(world, tmp_path, valid_dims=[8], **settings)
    assert code == 0
    held_out = held_out_rows(world.config(**settings), raw)["some"]
    choosing = [row for row in held_out if set(row["negatives"]) - {row["passage"]}]
    assert 0 < len(choosing) < len(held_out)
    expected = measured(
        Embedder.from_pretrained(tmp_path / "run" / "step_1", device="cpu"), choosing, "clustering"
    )
    assert expected["recall@1"] < 1
    for metric, value in expected.items():
        assert (
            lines[-1][f"some/{metric}"]
            == lines[-1][f"Avg/clustering/{metric}"]
            == pytest.approx(value)
        )
    assert {key for key in lines[-1] if key.startswith("none/")} == {"none/valid_loss_hard"}


def test_axes_left_out_are_whole(world, tmp_path):
    """Without factors, too: rank 0 is a whole token table."""
    code, lines = train(
        world,
        tmp_path,
        valid_dims=[16],
        use_mel=False,
        mel_ranks=None,
        r=0,
        train_steps=1,
        valid_fraction=0.3,
    )
    assert code == 0
    grid_keys = [key for key in lines[-1] if key.startswith("facts/ndcg@10/")]
    assert grid_keys == ["facts/ndcg@10/rank_0_depth_2_dim_16"]
    resolved = json.loads((tmp_path / "run" / "resolved.json").read_text())
    assert resolved["valid_grid"] == {"ranks": [0], "depths": [2], "dims": [16]}


def test_a_continued_run_may_measure_elsewhere(world, tmp_path, capsys):
    train(world, tmp_path, train_steps=2)
    code, _ = train(
        world, tmp_path, train_steps=2, arguments=["--resume", "auto"], valid_layers=[1]
    )
    assert code == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        (
            {"valid_ranks": [8, 16], "valid_layers": [3], "valid_dims": [12]},
            [
                "valid_ranks: 8 is not trained (trained: 16, 32)",
                "valid_layers: 3",
                "valid_dims: 12",
                "8, 16, 32, 64",
            ],
        ),
        ({"valid_layers": [1], "use_mll": False}, ["valid_layers: 1 is not trained (trained: 2)"]),
        (
            {"valid_ranks": [16], "use_mel": False, "mel_ranks": None, "r": 0},
            ["valid_ranks: 16 is not trained (trained: a whole token table, which has no ranks)"],
        ),
    ],
)
def test_cuts_that_are_not_trained_are_refused(world, tmp_path, capsys, changes, messages):
    code, lines = train(world, tmp_path, **changes)
    printed = capsys.readouterr().err
    assert (code, lines) == (2, [])
    assert all(message in printed for message in messages), printed
    assert not (tmp_path / "run").exists()


def main_that_counts_tokens(arguments: list[str]) -> int:
    """run.py's main; prints the tokens of each forward of more than one text in validation."""
    forward = MatryoshkaEncoder.forward

    def counted(self, input_ids, packed, rank=None):
        if not self.training and len(packed.lengths) > 1:
            print("tokens encoded:", len(input_ids))
        return forward(self, input_ids, packed, rank)

    MatryoshkaEncoder.forward = counted
    return run_script.main(arguments)


@pytest.mark.parametrize("processes", [1, 2])
def test_validation_keeps_the_token_budget_and_its_numbers(tmp_path_factory, processes):
    inputs = Inputs.write(tmp_path_factory.mktemp("budget") / "inputs")
    settings = {
        "valid_fraction": 0.5,
        "train_batch_size": 8 // processes,
        "train_steps": 1,
        "learning_rate": 1e-12,
    }
    largest, valid = {}, {}
    for name, budget in (("whole", 0), ("chunks", 40)):
        config = inputs.config(name, min_lr=0, max_tokens_per_forward=budget, **settings)
        printed = run(inputs, config, processes=processes, main=main_that_counts_tokens)
        largest[name] = max(map(int, re.findall(r"tokens encoded: (\d+)", printed)))
        valid[name] = metrics(inputs.run_dir(name))[-1]
    assert 20 < largest["chunks"] <= 40 < largest["whole"]
    assert valid["whole"].pop("split") == valid["chunks"].pop("split") == "valid"
    assert valid["chunks"] == pytest.approx(valid["whole"], rel=1e-6, abs=1e-6)


def test_cuts_have_names():
    assert Cube((0,), (1, 2), (8,)).cuts == (Cut(0, 1, 8), Cut(0, 2, 8))
    assert Cut.of_name(Cut(64, 2, 32).name) == Cut(64, 2, 32)
    assert Cut.of_name("ndcg@10") is None


def test_data_of_its_own_is_validated_whole_and_all_rows_are_trained_on(world, tmp_path):
    """Against the naive metrics of the saved model on the rows of that data."""
    folder = with_shared_queries(world, tmp_path / "valid").tokenized
    code, lines = train(world, tmp_path, valid_data_path=str(folder), **SETTINGS)
    assert code == 0
    resolved = json.loads((tmp_path / "run" / "resolved.json").read_text())
    assert all(plan["valid_rows"] == 0 for plan in resolved["datasets"])
    assert [plan["valid_rows"] for plan in resolved["valid_datasets"]] == [21]
    valid = [line for line in lines if line["split"] == "valid"][-1]
    assert {key.split("/")[0] for key in valid if "/" in key} == {"facts", "Avg"}
    model = Embedder.from_pretrained(tmp_path / "run" / "step_4", device="cpu")
    rows = pq.read_table(world.raw / "facts.parquet").to_pylist()
    rows = [row | {"query": rows[i % 6]["query"]} for i, row in enumerate(rows)]
    scores, positive = [], []
    for row in rows:
        right = {other["passage"] for other in rows if other["query"] == row["query"]}
        pool = [t for t in searched(rows, "retrieval")[0] if t not in right - {row["passage"]}]
        scores.append((model.encode(pool) @ model.encode(row["query"])).tolist())
        positive.append(pool.index(row["passage"]))
    for metric, value in naive_metrics(scores, positive).items():
        assert valid[f"facts/{metric}"] == pytest.approx(value)
    changed = train(world, tmp_path, arguments=["--resume", "auto"], **SETTINGS)
    assert changed[0] == 2, "without it other rows are trained on"
