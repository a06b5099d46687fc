"""Measure tokenizing a file, with reading and writing, against the tokenizers library alone.

Both take the same texts, none of which occurs twice. A naive version tokenizes text by text.
"""

import argparse
import sys
import tempfile
from pathlib import Path

# works from a clone that is not installed, too
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ml_embed.errors import exit_on_user_error
from ml_embed.notices import parse_command


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", type=int, default=10_000, help="of 9 texts, 3.5 kB, each (default 10000)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (default 3)")
    args = parse_command(parser, arguments)

    from ml_embed.benchmarks.common import print_result, print_table
    from ml_embed.benchmarks.tokenizing import compare_tokenizing, peak_memory, write_raw
    from ml_embed.prepare.tokenizer_training import train_tokenizer
    from ml_embed.sample_data.plan import plan_datasets, training_texts

    articles = training_texts(plan_datasets(50, 0))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer, raw, small = (
            folder / "tokenizer",
            folder / "raw" / "texts.parquet",
            folder / "small" / "texts.parquet",
        )
        train_tokenizer(articles, 16_384).save_pretrained(tokenizer)
        write_raw(articles, raw, args.rows)
        write_raw(articles, small, max(1, args.rows // 4))
        result = compare_tokenizing(
            tokenizer, raw, folder / "out", args.repeats, naive_rows=max(1, args.rows // 20)
        )
        result["peak_mib"]["ours, a quarter of the file"] = peak_memory(
            tokenizer, small, folder / "less"
        )
    speeds, peaks = result["megabytes_per_second"], result["peak_mib"]
    print_table(
        ["version", "MB/s", "peak memory"],
        [[k, f"{v:.2f}", f"{peaks[k]:.0f} MiB"] for k, v in speeds.items()],
    )
    print(
        f"{result['share_of_raw']:.0%} of the library's own throughput, {result['ratio']:.1f} "
        "times the naive one's"
    )
    print(f"a file a quarter as long: {peaks['ours, a quarter of the file']:.0f} MiB")
    print_result("tokenize", result | {"sizes": vars(args)})


if __name__ == "__main__":
    sys.exit(main())
