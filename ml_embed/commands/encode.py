"""Write the vectors of texts, from a model or any cut of it, as the rows of a .npy file.

Row i is the vector of text i. `numpy.load(FILE, mmap_mode="r")` reads them.
"""

import argparse
import json

from ml_embed.errors import exit_on_user_error
from ml_embed.files.digests import add_verify_flag
from ml_embed.files.paths import home_path
from ml_embed.model_folders.cut import add_cut_flags
from ml_embed.notices import bars_wanted, parse_command


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR_OR_NAME",
        help="a trained model or any Qwen3 backbone: a folder, or a name on the hub",
    )
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
    parser.add_argument(
        "--output", type=home_path, required=True, metavar="FILE", help="the .npy file to write"
    )
    add_cut_flags(parser, many=False, default="the largest")
    parser.add_argument(
        "--prompt-name", metavar="NAME", help="saved prompt of the model to put before each text"
    )
    parser.add_argument("--prompt", metavar="TEXT", help="a prompt of your own instead")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default the first GPU, else the CPU)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file at --output")
    add_verify_flag(parser)
    return parse_command(parser, arguments)


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    from ml_embed.inference.embedder import Embedder
    from ml_embed.inference.vector_file import check_vector_file
    from ml_embed.model_folders.seal import verify_model
    from ml_embed.prepare.records import column_texts

    check_vector_file(args.output, args.overwrite)  # mistakes show before a model is loaded
    if args.verify:
        verify_model(args.model)
    model = Embedder.from_pretrained(args.model, args.depth, args.dim, args.rank, args.device)
    count = model.encode_to_file(
        column_texts(args.input, args.column),
        args.output,
        args.prompt_name,
        args.prompt,
        show_progress=None if bars_wanted() else False,
        overwrite=args.overwrite,
    )
    sizes = {"rank": model.rank, "depth": model.depth, "dim": model.dim}
    print(json.dumps({"output": str(args.output), "texts": count, **sizes}))
