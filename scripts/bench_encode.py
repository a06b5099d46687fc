"""Measure Embedder.encode on the CPU, against sentence-transformers' encode of the same model."""

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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=200, help="texts to encode (default 200)")
    parser.add_argument("--repeats", type=int, default=3, help="calls of each (default 3)")
    args = parse_command(parser, arguments)

    from ml_embed.benchmarks.common import MIB, print_result, print_table
    from ml_embed.benchmarks.encoding import (
        compare_encoding,
        measure_depths,
        mixed_texts,
        rank_memory,
        write_model,
    )
    from ml_embed.benchmarks.samples import QWEN3_VOCABULARY
    from ml_embed.prepare.tokenizer_training import train_tokenizer

    texts, articles = mixed_texts(args.texts)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        write_model(folder, train_tokenizer(articles, 16_384), rank=256)
        result = compare_encoding(folder, texts, args.repeats)
        depths = measure_depths(folder, texts, [1, 2, 4, 8], args.repeats)
        ranks = rank_memory(folder, [64, 128, 256])
    print_table(
        ["encode", "time"],
        [[name, timing.in_unit(1, "s")] for name, timing in result["seconds"].items()],
    )
    print(f"ratio {result['ratio']:.2f}; vectors agree within {result['difference']:.1e}")
    print_table(
        ["depth", "time", "of 8 layers"],
        [[d, f"{s:.2f} s", f"{s / depths[8]:.0%}"] for d, s in depths.items()],
    )
    print_table(
        ["rank", "parameters in memory"],
        [[rank, f"{size:.0f} MiB"] for rank, size in ranks.items()],
    )
    print(f"(the whole table alone: {QWEN3_VOCABULARY * 256 * 4 / MIB:.0f} MiB)")
    sizes = {"texts": args.texts, "layers": 8, "hidden": 256, "vocabulary": QWEN3_VOCABULARY}
    print_result(
        "encode", result | {"seconds_at_depth": depths, "mib_at_rank": ranks, "sizes": sizes}
    )


if __name__ == "__main__":
    sys.exit(main())
