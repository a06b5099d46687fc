"""Training runs of the tiny world in the test's own process."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

import run as run_script
from helpers.tiny_world import TinyWorld, write_manifest


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


def with_shared_queries(world, folder: Path, ids: Sequence[str | None] | None = None) -> TinyWorld:
    """The world with its facts alone: rows i and i + 6 ask the same; `ids` are their query_ids."""
    folder.mkdir()
    table = pq.read_table(world.tokenized / "facts_query.parquet")
    rows = table.num_rows
    column = table.schema.get_field_index("query_input_ids")
    shared = table.column(column).take([row % 6 for row in range(rows)])
    table = table.set_column(column, table.schema.field(column), shared)
    if ids is not None:
        table = table.append_column("query_id", pa.array(ids, pa.string()))
    pq.write_table(table, folder / "facts_query.parquet")
    shutil.copy(world.tokenized / "facts_corpus.parquet", folder)
    manifest = json.loads((world.tokenized / "manifest.json").read_text())
    manifest["datasets"] = {"facts": manifest["datasets"]["facts"]}
    write_manifest(folder, manifest)
    return dataclasses.replace(world, tokenized=folder)
