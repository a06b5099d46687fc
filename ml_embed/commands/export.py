"""Cut a trained model to a rank, a depth and a vector length, as a model folder of its own.

No training is needed. The folder loads in sentence-transformers, transformers and servers like the
one it came from.
"""

import argparse
import json

from ml_embed.errors import exit_on_user_error
from ml_embed.files.digests import add_verify_flag
from ml_embed.files.paths import home_path
from ml_embed.model_folders.cut import add_cut_flags, add_flag
from ml_embed.notices import parse_command

DTYPES = ("float32", "bfloat16")


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flag(
        parser,
        "--model",
        "--checkpoint",
        required=True,
        metavar="DIR_OR_NAME",
        help="a trained model: a folder, or a name on the hub",
    )
    parser.add_argument(
        "--output", type=home_path, required=True, metavar="DIR", help="the new model folder"
    )
    add_cut_flags(parser, many=False, default="the largest")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights written (default the model's)"
    )
    parser.add_argument(
        "--refactor",
        type=home_path,
        metavar="DATA",
        help="turn the token factors first, so that smaller ranks are the best ones for tokens as "
        "frequent as in this folder of tokenized data",
    )
    parser.add_argument(
        "--allow-untrained", action="store_true", help="take values that were not trained"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a model folder at --output"
    )
    add_verify_flag(parser)
    args = parse_command(parser, arguments)

    import torch

    from ml_embed.model_folders.export import export_model
    from ml_embed.model_folders.seal import verify_model

    if args.verify:
        verify_model(args.model)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    cut = export_model(
        args.model,
        args.output,
        args.depth,
        args.dim,
        args.rank,
        dtype,
        args.allow_untrained,
        args.overwrite,
        args.refactor,
    )
    weights = sum(file.stat().st_size for file in args.output.glob("*.safetensors"))
    print(json.dumps({"output": str(args.output), **vars(cut), "bytes_of_weights": weights}))
