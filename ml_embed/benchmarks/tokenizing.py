"""Tokenizing a file end to end, against the tokenizers library alone and against a naive loop."""

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ml_embed.benchmarks.common import print_result, print_table
from ml_embed.prepare.raw_parquet import write_raw
from ml_embed.prepare.rows import RawRow
from ml_embed.prepare.tokenizer_training import train_tokenizer
from ml_embed.sample_data.plan import plan_datasets, training_texts

_PEAK = """
lines = open("/proc/self/status").read().splitlines()  # getrusage's maximum would be the parent's
peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
"""
_RAW = (
    """
import json, sys, time
import pyarrow.parquet as pq
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[1] + "/tokenizer.json")
texts = []
for row in pq.read_table(sys.argv[2]).to_pylist():
    texts += [row["query"], row["passage"], *row["negatives"]]
tokenizer.encode_batch_fast(texts[:2000], add_special_tokens=False)
start = time.perf_counter()
for i in range(0, len(texts), 8192):
    tokenizer.encode_batch_fast(texts[i:i + 8192], add_special_tokens=False)
seconds = time.perf_counter() - start
"""
    + _PEAK
    + """
size = sum(len(t.encode()) for t in texts)
print(json.dumps({"seconds": seconds, "peak_mib": peak, "bytes": size}))
"""
)
_OURS = (
    """
import json, sys, time
from pathlib import Path
from ml_embed.prepare.tokenization import TokenizeOptions, tokenize_folder
from ml_embed.prepare.tokenizer import load_tokenizer
# The first tokenizer imports much, which is no work on text; "raw" does not count it either.
load_tokenizer(sys.argv[1])
start = time.perf_counter()
folders = Path(sys.argv[2]).parent, Path(sys.argv[3])
options = TokenizeOptions(sys.argv[1], *folders, max_samples=0, overwrite=True)
tokenize_folder(options, progress=False)
seconds = time.perf_counter() - start
"""
    + _PEAK
    + """
print(json.dumps({"seconds": seconds, "peak_mib": peak}))
"""
)
_NAIVE = (
    """
import json, sys, time
import pyarrow.parquet as pq
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
start = time.perf_counter()
rows = pq.read_table(sys.argv[2]).to_pylist()[: int(sys.argv[4])]
texts = [text for row in rows for text in (row["query"], row["passage"], *row["negatives"])]
ids = [tokenizer(text).input_ids for text in texts]
seconds = time.perf_counter() - start
"""
    + _PEAK
    + """
size = sum(len(t.encode()) for t in texts)
print(json.dumps({"seconds": seconds, "peak_mib": peak, "bytes": size}))
"""
)


def write_articles(texts: list[str], path: Path, rows: int, negatives: int = 7) -> None:
    """Write rows of articles, each with a number before it, so that no text occurs twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    numbered = (f"{number} {text}" for number, text in enumerate(itertools.cycle(texts)))
    write_raw(
        path,
        (
            RawRow(next(numbered), next(numbered), list(itertools.islice(numbered, negatives)))
            for _ in range(rows)
        ),
    )


def compare_tokenizing(
    tokenizer: Path, raw: Path, output: Path, repeats: int, naive_rows: int
) -> dict[str, Any]:
    """Speed and peak memory of all three versions, in new processes that take turns.

    Args:
        tokenizer: folder of the tokenizer.
        raw: parquet file of texts.
        output: folder that our version writes, again and again.
        repeats: processes of each version.
        naive_rows: rows of the file that the naive version reads; it is slow.
    """
    arguments = {"raw": (_RAW, ""), "ours": (_OURS, ""), "naive": (_NAIVE, str(naive_rows))}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in arguments}
    for _ in range(repeats):
        for name, (program, extra) in arguments.items():
            runs[name].append(_run(program, tokenizer, raw, output, extra))
    size = runs["raw"][0]["bytes"]
    shares = sorted(
        r["seconds"] / o["seconds"] for r, o in zip(runs["raw"], runs["ours"], strict=True)
    )
    speed = {
        name: sorted(run.get("bytes", size) / run["seconds"] / 1e6 for run in runs[name])
        for name in runs
    }
    middle = repeats // 2
    return {
        "share_of_raw": shares[middle],
        "share_range": (shares[0], shares[-1]),
        "ratio": speed["ours"][middle] / speed["naive"][middle],
        "megabytes_per_second": {name: values[middle] for name, values in speed.items()},
        "megabytes": size / 1e6,
        "peak_mib": {name: max(run["peak_mib"] for run in runs[name]) for name in runs},
    }


def peak_memory(tokenizer: Path, raw: Path, output: Path) -> float:
    """Peak memory, in MiB, of a process that tokenizes a file end to end."""
    return _run(_OURS, tokenizer, raw, output, "")["peak_mib"]


def _run(program: str, tokenizer: Path, raw: Path, output: Path, extra: str) -> dict[str, float]:
    command = [sys.executable, "-c", program, str(tokenizer), str(raw), str(output), extra]
    time.sleep(0.1)
    return json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    )


def report_tokenizing(folder: Path, rows: int, repeats: int) -> None:
    """Measure the tokenizing of `rows` rows; print a table and the JSON line."""
    articles = training_texts(plan_datasets(50, 0))
    tokenizer, output = folder / "tokenizer", folder / "out"
    raw, small = (folder / size / "texts.parquet" for size in ("raw", "small"))
    train_tokenizer(articles, 16_384).save_pretrained(tokenizer)
    write_articles(articles, raw, rows)
    write_articles(articles, small, max(1, rows // 4))
    result = compare_tokenizing(tokenizer, raw, output, repeats, naive_rows=max(1, rows // 20))
    quarter = peak_memory(tokenizer, small, folder / "less")
    speeds, peaks = result["megabytes_per_second"], result["peak_mib"]
    table = [[name, f"{v:.2f}", f"{peaks[name]:.0f} MiB"] for name, v in speeds.items()]
    print_table(["version", "MB/s", "peak memory"], table)
    print(
        f"{result['share_of_raw']:.0%} of the library's own throughput, {result['ratio']:.1f} "
        "times the naive one's"
    )
    print(f"a file a quarter as long: {quarter:.0f} MiB")
    peaks["ours, a quarter of the file"] = quarter
    print_result("tokenize", result | {"sizes": {"rows": rows, "repeats": repeats}})
