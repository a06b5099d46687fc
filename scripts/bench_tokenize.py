"""tokenize_data_qwen.py's work end to end (reading, numbering, writing) against the tokenizers library alone.

Both take the distinct texts of the same file; the naive version tokenizes one text after another.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from ml_embed.errors import exit_on_user_error


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--copies", type=int, default=20, help="of about 0.7 MB of distinct text each (default 20)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (default 3)")
    args = parser.parse_args(arguments)

    from ml_embed.benchmarks.common import print_result, print_table
    from ml_embed.benchmarks.samples import make_sample
    from ml_embed.benchmarks.tokenizing import compare_tokenizing, peak_memory, write_raw

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sample = make_sample(folder / "sample", rows=300)
        source = next(sample.raw.glob("*.parquet"))
        raw, small = folder / "raw" / "texts.parquet", folder / "small" / "texts.parquet"
        write_raw(source, raw, args.copies)
        write_raw(source, small, max(1, args.copies // 4))
        result = compare_tokenizing(sample.tokenizer_folder, raw, folder / "out", args.repeats, naive_rows=60)
        result["peak_mib"]["ours, a quarter of the file"] = peak_memory(sample.tokenizer_folder, small, folder / "less")
    speeds, peaks = result["megabytes_per_second"], result["peak_mib"]
    print_table(["version", "MB/s", "peak memory"], [[k, f"{v:.2f}", f"{peaks[k]:.0f} MiB"] for k, v in speeds.items()])
    print(f"{result['share_of_raw']:.0%} of the library's own throughput, {result['ratio']:.1f} times the naive one's")
    print(f"a file a quarter as long: {peaks['ours, a quarter of the file']:.0f} MiB")
    print_result("tokenize", result | {"sizes": vars(args)})


if __name__ == "__main__":
    sys.exit(main())
