"""Turn a folder of raw contrastive data into token ids for training."""

import argparse
import sys
from pathlib import Path

from ml_embed.errors import exit_on_user_error


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Tokenize raw contrastive data (one .parquet or .jsonl file a dataset; columns query, passage, "
        "negative_1 ... negative_K or negatives) for run.py. An interrupted run is continued by the same command."
    )
    parser.add_argument("--tokenizer", required=True, help="folder of the backbone's tokenizer, or its name on the hub")
    parser.add_argument("--input", required=True, type=Path, help="folder of raw data")
    parser.add_argument("--output", required=True, type=Path, help="folder for token ids; made if it does not exist")
    parser.add_argument(
        "--max-seq-length", type=int, default=2048, help="tokens of a text at most, EOS included (default: 2048)"
    )
    parser.add_argument(
        "--max-samples",
        type=int,
        default=80_000,
        help="rows kept of each dataset, a seeded random choice in file order; 0 = all (default: 80000)",
    )
    parser.add_argument("--num-workers", type=int, default=None, help="tokenizing threads (default: all cores)")
    parser.add_argument("--seed", type=int, default=42, help="of the choice of rows (default: 42)")
    parser.add_argument(
        "--overwrite", action="store_true", help="make all datasets anew; without it, other data there is an error"
    )
    return parser.parse_args(arguments)


@exit_on_user_error
def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    from ml_embed.tokenization import TokenizeOptions, tokenize_folder  # after parsing: --help answers at once

    manifest = tokenize_folder(TokenizeOptions(**vars(options)))
    datasets = manifest["datasets"].values()
    rows, documents, tokens = (sum(entry[key] for entry in datasets) for key in ("rows", "documents", "tokens"))
    print(f"{options.output}: {len(datasets)} datasets, {rows:,} rows, {documents:,} documents, {tokens:,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
