"""Columns of raw data go all the way: `score` trains similarity, `query_id` masks right answers."""

import json

import pytest
from helpers.in_process import train
from huggingface_hub import ModelCard

from ml_embed.prepare.tokenization import TokenizeOptions, tokenize_folder

GRADED = [
    {"query": f"river {n}", "passage": f"stone {n % 5}", "score": n % 4 / 3} for n in range(20)
]
ANSWERS = [
    {
        "query": f"moon {n}",
        "passage": f"light {n}",
        "query_id": f"q{n % 3}",
        "language": ("pt_BR", "swh", "unknown")[n % 3],
    }
    for n in range(12)
]


@pytest.fixture(scope="module")
def settings(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("columns")
    (folder / "raw").mkdir()
    for name, rows in (("graded", GRADED), ("answers", ANSWERS)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "raw" / f"{name}.jsonl").write_text(text)
    options = TokenizeOptions(str(world.backbone), folder / "raw", folder / "tokenized")
    tokenize_folder(options, progress=False)
    return {
        "train_data_path": str(folder / "tokenized"),
        "cache_dir": str(folder / "cache"),
        "train_batch_size": 12,
        "train_steps": 6,
    }


def test_pairs_with_scores_are_trained_by_their_order(world, tmp_path, settings):
    code, lines = train(world, tmp_path, datasets={}, valid_fraction=0.25, **settings)
    assert code == 0
    resolved = json.loads((tmp_path / "run" / "resolved.json").read_text())
    tasks = {plan["name"]: plan["task"] for plan in resolved["datasets"]}
    assert tasks == {"answers": "retrieval", "graded": "similarity"}
    assert any(line.get("graded/training_loss_similarity", 0) > 0.1 for line in lines)
    valid = [line for line in lines if line["split"] == "valid"][-1]
    assert -1 <= valid["graded/spearman"] <= 1
    assert valid["Avg/similarity/valid_loss_similarity"] > 0
    assert "graded/ndcg@10" not in valid
    card = ModelCard.load(tmp_path / "run" / "step_6" / "README.md")
    assert card.data.language == ["pt", "swh"], "without country, and only what looks like a code"


def test_passages_of_one_query_id_are_no_negatives_of_each_other(world, tmp_path, settings):
    """Twelve rows at once, four of each question: each masks the three others."""
    code, lines = train(world, tmp_path, datasets={}, valid_fraction=0, **settings)
    assert code == 0
    counts = {line["masked_by_document"] for line in lines if "answers/training_loss_hard" in line}
    assert counts == {12 * 3}


def test_scores_are_passed_over_where_the_config_says_so(world, tmp_path, settings):
    task = {"graded": {"task": "retrieval"}}
    code, lines = train(world, tmp_path, datasets=task, valid_fraction=0, **settings)
    assert code == 0
    assert any("graded/training_loss_in_batch" in line for line in lines)
    assert not any("graded/training_loss_similarity" in line for line in lines)


def test_similarity_without_scores_is_refused(world, tmp_path, settings, capsys):
    task = {"answers": {"task": "similarity"}}
    code, _ = train(world, tmp_path, datasets=task, valid_fraction=0, **settings)
    assert code == 2
    assert "answers has the task similarity, but 12 of its 12 rows have no score" in (
        capsys.readouterr().err
    )
