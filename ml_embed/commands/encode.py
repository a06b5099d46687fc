"""Write the vectors of texts, from a model or any cut of it, as the rows of a .npy file.

Row i is the vector of text i. `numpy.load(FILE, mmap_mode="r")` reads them.
"""

import argparse
import json

from ml_embed.commands import flags
from ml_embed.errors import exit_on_user_error
from ml_embed.files.paths import home_path
from ml_embed.notices import bars_wanted, parse_command


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = flags.new_parser(__doc__)
    flags.add_model(parser)
    parser.add_argument(
        "--input",
        type=home_path,
        required=True,
        metavar="FILE",
        help="a text per line (.txt), or rows (.csv, .tsv, .json, .jsonl, .parquet, .arrow)",
    )
    parser.add_argument(
        "--column", default="text", help="of rows: which one holds the texts (default %(default)s)"
    )
    flags.add_output(parser, "the .npy file to write", metavar="FILE")
    flags.add_cut(parser, many=False, default="the largest")
    parser.add_argument(
        "--prompt-name", metavar="NAME", help="saved prompt of the model to put before each text"
    )
    parser.add_argument("--prompt", metavar="TEXT", help="a prompt of your own instead")
    flags.add_device(parser)
    flags.add_overwrite(parser, "replace the file at --output")
    flags.add_verify(parser)
    return parse_command(parser, arguments)


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    from ml_embed.distributed.launch import launched

    with launched(args.device):
        encode(args)


def encode(args: argparse.Namespace) -> None:
    """This process's part of the work; the first one prints the result."""
    from ml_embed.distributed.agreement import check_agreement
    from ml_embed.distributed.collectives import compute_on_all_processes, process_index
    from ml_embed.files.atomic import disk_errors_are_user_errors
    from ml_embed.files.digests import file_digest
    from ml_embed.files.model_identity import model_identity
    from ml_embed.files.model_source import find_model_folder
    from ml_embed.inference.embedder import Embedder
    from ml_embed.inference.texts import prompt_text
    from ml_embed.inference.vector_file import check_vector_file, encode_into_file
    from ml_embed.model_folders.seal import verify_model
    from ml_embed.prepare.records import column_texts

    def load() -> Embedder:
        check_vector_file(args.output, args.overwrite)  # mistakes show before a model is loaded
        next(column_texts(args.input, args.column), None)
        if args.verify:
            verify_model(args.model)
        return Embedder.from_pretrained(args.model, args.depth, args.dim, args.rank, args.device)

    model = compute_on_all_processes(load)
    prefix = prompt_text(model.prompts, args.prompt_name, args.prompt, model.default_prompt_name)
    sizes = {"rank": model.rank, "depth": model.depth, "dim": model.dim}
    made_of = {
        "model": model_identity(find_model_folder(args.model)),
        "texts": [file_digest(args.input), args.column],
        "prompt": prefix,
        "computed": [model.device.type, str(model.dtype)],
        **sizes,
    }
    check_agreement(lambda: made_of)
    remedy = "Then run the same command again: it continues."
    with disk_errors_are_user_errors(args.output.parent, remedy):
        count = encode_into_file(
            args.output,
            lambda: (prefix + text for text in column_texts(args.input, args.column)),
            lambda texts: model.encode(texts, prompt="", show_progress=False),
            model.dim,
            made_of,
            bars_wanted(),
        )
    if process_index() == 0:
        print(json.dumps({"output": str(args.output), "texts": count, **sizes}))
