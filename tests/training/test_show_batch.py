"""run.py --show-batch: the texts of the first batches as they were written, and what is masked."""

import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.in_process import train

from ml_embed.config import DatasetConfig
from ml_embed.prepare.tokenization import TokenizeOptions, tokenize_folder

ROWS = [
    {"query": "river\nstone", "passage": "light moon", "negatives": ["forest", "bread music"]},
    {"query": "river\nstone", "passage": "bread music", "negatives": ["candle"]},
    {"query": "winter", "passage": "harbour", "negatives": []},
]
PROMPT = "garden: "


@pytest.fixture(scope="module")
def tokenized(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("show")
    (folder / "raw").mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "raw" / "tiny.parquet")
    options = TokenizeOptions(
        tokenizer=str(world.backbone),
        input=folder / "raw",
        output=folder / "tokenized",
        datasets={"tiny": DatasetConfig(prompt=PROMPT)},
    )
    tokenize_folder(options, progress=False)
    return folder / "tokenized"


def test_texts_prompts_negatives_scores_and_masks_are_shown(world, tokenized, tmp_path, capsys):
    settings = {"datasets": {"tiny": {"prompt": PROMPT}}, "valid_fraction": 0}
    code, lines = train(
        world, tmp_path, "show", ["--show-batch", "2"], train_data_path=str(tokenized), **settings
    )
    assert (code, lines) == (0, [])
    assert not (tmp_path / "show").exists(), "nothing is trained"
    shown = capsys.readouterr().out
    batches = re.split(r"^step \d+: tiny \(retrieval\), 3 rows, \d+ tokens\n", shown, flags=re.M)
    assert batches[0] == ""
    assert len(batches) == 3
    for batch in batches[1:]:
        rows = re.split(r"^  \d\. ", batch, flags=re.M)[1:]
        numbers = {passage_of(row): number for number, row in enumerate(rows, start=1)}
        for row in rows:
            own = next(r for r in ROWS if r["passage"] == passage_of(row))
            query = (PROMPT + own["query"]).replace("\n", "\\n")
            assert row.startswith(f"query     {query}<")
            for negative in own["negatives"]:
                masked = "  [masked]" if negative == "bread music" else ""
                assert re.search(rf"negative  {negative}<\|[a-z_]+\|>{re.escape(masked)}\n", row)
            others = {"light moon": "bread music", "bread music": "light moon"}
            other = others.get(own["passage"])
            said = f"masked    the documents of {numbers[other]}, which" if other else ""
            assert said in row
            assert ("     masked " in row) == bool(other)


def passage_of(row: str) -> str:
    return re.search(r"passage   (.*?)<", row).group(1)


def test_a_negative_number_of_batches_is_refused(world, tmp_path, capsys):
    code, _ = train(world, tmp_path, arguments=["--show-batch", "-1"])
    assert code == 2
    assert "--show-batch is -1" in capsys.readouterr().err
