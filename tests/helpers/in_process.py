"""Training runs of the tiny world in the test's own process."""

import json

import pyarrow.parquet as pq

import run as run_script


def train(world, tmp_path, experiment_id="run", arguments=(), **changes) -> tuple[int, list[dict]]:
    """Run run.py's main in this process; its exit code and metrics."""
    config = world.write_config(
        tmp_path / f"{experiment_id}.json", experiment_id, output_dir=str(tmp_path), **changes
    )
    code = run_script.main(["--config", str(config), *arguments])
    metrics = tmp_path / experiment_id / "metrics.jsonl"
    return code, [
        json.loads(line) for line in metrics.read_text().splitlines()
    ] if metrics.exists() else []


def dataset_rows(world, name):
    """(query ids, passage, negatives) of every row and every document's ids, from the parquet."""
    query = pq.read_table(world.tokenized / f"{name}_query.parquet").to_pylist()
    documents = [
        row["input_ids"]
        for row in pq.read_table(world.tokenized / f"{name}_corpus.parquet").to_pylist()
    ]
    return [
        (r["query_input_ids"], r["passage_doc_id"], r["negative_doc_ids"]) for r in query
    ], documents
