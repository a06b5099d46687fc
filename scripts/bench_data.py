"""Measure opening a corpus and building batches, against a naive version.

The naive version keeps lists of ids and a dict of string ids, and pads its batches.
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
        "--documents",
        type=int,
        default=100_000,
        help="documents of the corpus opened (default 100000)",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=20,
        help="turns of each version, a group of batches each (default 20)",
    )
    parser.add_argument(
        "--skip-naive-opening",
        action="store_true",
        help="it takes about 1 kB of memory per document",
    )
    args = parse_command(parser, arguments)

    from ml_embed.benchmarks.common import print_result, print_table, ratio, ratio_range
    from ml_embed.benchmarks.data import (
        BatchShape,
        measure_batches,
        measure_opening,
        write_synthetic,
    )
    from ml_embed.benchmarks.samples import make_sample

    shape = BatchShape()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sample = make_sample(folder / "sample", rows=2000)
        eos_id = sample.tokenizer.eos_token_id
        timing = measure_batches(
            sample.tokenized, folder / "cache", "udhr_retrieval", eos_id, shape, args.repeats
        )
        write_synthetic(folder / "synthetic", args.documents, max(1, args.documents // 20))
        opening = measure_opening(
            folder / "synthetic", folder / "cache", not args.skip_naive_opening
        )
    print(
        f"batches of {shape.batch_size} rows, {2 + shape.negatives} texts each, same texts in both "
        "versions"
    )
    print_table(
        ["version", "one batch"], [[name, t.in_unit(1000, "ms")] for name, t in timing.items()]
    )
    print(f"opening a corpus of {args.documents:,} documents in a new process")
    rows = [
        [name, f"{x['seconds']:.3f} s", f"{x['private_mib']:.1f} MiB"]
        for name, x in opening.items()
    ]
    print_table(["version", "time", "private memory"], rows)
    result = {
        "ratio": ratio(timing["naive"], timing["fast"]),
        "ratio_range": ratio_range(timing["naive"], timing["fast"]),
        "seconds": timing,
        "sizes": vars(shape) | {"documents": args.documents},
        "opening": opening,
    }
    print_result("data", result)


if __name__ == "__main__":
    sys.exit(main())
