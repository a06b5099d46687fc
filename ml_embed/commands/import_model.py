"""Make a model folder of a released model (U.pth, V.pth), or of any Qwen3 embedding model.

A released model is plain Qwen3 weights beside the token factors U.pth (V, r) and V.pth (r, H). The
new folder has all its cuts by the published rule. The product of the factors is compared with the
token table that lies beside them.

--factorize replaces the token table of any other Qwen3 embedding model by its best factors of a
rank, without training, and says how much of the table is lost at each rank.
"""

import argparse
import json

from ml_embed.commands import flags
from ml_embed.errors import exit_on_user_error
from ml_embed.notices import parse_command, warn

SAME_TABLE = 1e-4
"""Share of a table's squared norm that bfloat16's rounding can make; measured: 3e-6"""


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = flags.new_parser(__doc__)
    flags.add_model(parser, "the model to import: a folder, or a name on the hub")
    flags.add_output(parser, "the new model folder")
    parser.add_argument(
        "--factorize",
        type=int,
        metavar="RANK",
        help="of a model that was not released with factors: rank of those to make",
    )
    flags.add_refactor(parser, "--frequencies")
    flags.add_overwrite(parser)
    flags.add_verify(parser)
    return parse_command(parser, arguments)


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)

    from ml_embed.model_folders.importing import import_model
    from ml_embed.reports.tables import aligned, number_text

    if args.verify:
        from ml_embed.model_folders.seal import verify_model

        verify_model(args.model)
    imported = import_model(args.model, args.output, args.factorize, args.refactor, args.overwrite)
    record, error = imported.record, imported.error
    columns = {"lost of the table": [number_text(100 * lost) + " %" for lost in error.values()]}
    print(aligned("rank", [str(rank) for rank in error], columns))
    if args.factorize is None and error[record.ranks[-1]] > SAME_TABLE:
        warn(
            f"the token table beside the factors is another one: {error[record.ranks[-1]]:.2g} of "
            "its squared norm differ. The new folder holds the product of the factors, for all "
            "programs"
        )
    sizes = {"ranks": record.ranks, "depths": record.exits, "dims": record.dims}
    difference = {"lost": error, "largest_difference": imported.largest}
    print(json.dumps({"output": str(args.output), **sizes, **difference}))
