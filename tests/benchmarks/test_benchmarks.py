"""Short benchmarks: versions agree, and no ratio is under two thirds of the recorded one.

Both versions take turns, so that other work on the machine slows both. benchmark_baselines.json
holds the recorded ratios.
"""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import transformers
from helpers import ROOT
from packaging.version import Version

from ml_embed.benchmarks import tokenizing
from ml_embed.benchmarks.common import measure
from ml_embed.benchmarks.data import BatchShape, measure_batches, measure_opening, write_synthetic
from ml_embed.benchmarks.encoding import compare_encoding, mixed_texts, write_model
from ml_embed.benchmarks.gradcache import measure_batch
from ml_embed.benchmarks.samples import make_sample
from ml_embed.benchmarks.tokenizing import write_articles
from ml_embed.benchmarks.training import compare_training
from ml_embed.benchmarks.training_setup import TrainingShape
from ml_embed.kernels.compilation import COMPILES_SINCE
from ml_embed.prepare.tokenization import TokenizeOptions, tokenize_folder
from ml_embed.prepare.tokenizer_training import train_tokenizer

SCRIPTS = ROOT / "scripts"
RECORDED = json.loads(Path(__file__).with_name("benchmark_baselines.json").read_text())


def assert_not_slower(name: str, measured: float) -> None:
    floor = 2 / 3 * RECORDED[name]
    assert measured >= floor, (
        f"{name}: {measured:.2f}, recorded {RECORDED[name]}, allowed {floor:.2f}"
    )


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return make_sample(tmp_path_factory.mktemp("sample"), rows=200, languages=20, vocabulary=2000)


def best_ratio(timing: dict, slow: str, fast: str) -> float:
    """The ratio of the fastest repeats: other work on the machine can only slow a repeat down."""
    return min(timing[slow].seconds) / min(timing[fast].seconds)


@pytest.mark.alone
def test_training_step(sample, tmp_path):
    """All 151,936 rows of the table, but two layers and short texts: seconds instead of minutes."""
    compiled = Version(transformers.__version__) >= Version(COMPILES_SINCE)
    shape = TrainingShape(4, 4, 64, 64, 2, 128)
    result = compare_training(tmp_path, shape, 2, compiled, num_attention_heads=2, head_dim=32)
    for version, judged in {"fast": result, "compiled": result.get("compiled")}.items():
        if judged:
            assert judged["gradient_difference"] < 1e-5
            assert 0 < judged["share_of_peak"] < 1
            assert_not_slower("training", best_ratio(result["seconds"], "naive", version))


@pytest.mark.alone
def test_batches(sample, tmp_path):
    timing = measure_batches(
        sample.tokenized,
        tmp_path,
        "udhr_retrieval",
        sample.tokenizer.eos_token_id,
        BatchShape(),
        repeats=30,
    )
    assert_not_slower("batches", best_ratio(timing, "naive", "fast"))


@pytest.mark.alone
def test_opening_a_converted_corpus_takes_no_time_and_no_memory(tmp_path):
    write_synthetic(tmp_path / "data", documents=200_000, rows=1000)
    again = measure_opening(tmp_path / "data", tmp_path / "cache", with_naive=False)["again"]
    assert again["seconds"] < 1
    assert again["private_mib"] < 5, "grows with the documents"


@pytest.mark.alone
def test_encoding(tmp_path):
    pytest.importorskip("sentence_transformers")
    texts, articles = mixed_texts(25)
    write_model(
        tmp_path, train_tokenizer(articles[:200], 2000), 64, num_hidden_layers=2, vocab_size=4096
    )
    result = compare_encoding(tmp_path, texts, repeats=3)
    assert_not_slower("encode", best_ratio(result["seconds"], "sentence-transformers", "Embedder"))


@pytest.mark.alone
def test_gradcache_needs_the_memory_of_a_chunk(sample, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    chunks, whole = measure_batch(
        sample.tokenized, tmp_path, sample.tokenizer.eos_token_id, 192, [1024, 0]
    )
    assert chunks["tokens"] == whole["tokens"] > 8 * 1024
    assert chunks["peak_mib"] < whole["peak_mib"] - 100


def test_the_gpu_benchmark_says_when_it_cannot_run():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    run = subprocess.run(
        [sys.executable, SCRIPTS / "bench_gpu.py"], capture_output=True, text=True, check=True
    )
    assert json.loads(run.stdout.splitlines()[-1])["skipped"]


@pytest.mark.alone
def test_tokenizing(sample, tmp_path):
    """End to end against the library's own batches, in one process, unlike the script."""
    _, articles = mixed_texts(1)
    write_articles(articles, tmp_path / "raw" / "texts.parquet", rows=150)
    rows = pq.read_table(tmp_path / "raw" / "texts.parquet").to_pylist()
    texts = [text for row in rows for text in (row["query"], row["passage"], *row["negatives"])]
    library = sample.tokenizer.backend_tokenizer
    options = TokenizeOptions(
        str(sample.tokenizer_folder), tmp_path / "raw", tmp_path / "out", overwrite=True
    )
    timing = measure(
        {
            "raw": lambda: library.encode_batch_fast(texts, add_special_tokens=False),
            "ours": lambda: tokenize_folder(options, progress=False),
        },
        repeats=3,
    )
    assert_not_slower("tokenize_share_of_raw", best_ratio(timing, "raw", "ours"))


@pytest.mark.parametrize("program", [tokenizing._RAW, tokenizing._OURS, tokenizing._NAIVE])
def test_what_new_processes_import_exists(program):
    for node in ast.walk(ast.parse(program)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), node.module
