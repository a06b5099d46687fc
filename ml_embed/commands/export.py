"""Cut a trained model to a rank, a depth and a vector length, as a model folder of its own.

No training is needed. The folder loads in sentence-transformers, transformers and servers like the
one it came from. --onnx, --gguf and --static write it in the form of other programs instead.
"""

import argparse
import json
from typing import Any

from ml_embed.commands import flags
from ml_embed.errors import UserError, exit_on_user_error
from ml_embed.files.paths import check_model_output, home_path
from ml_embed.notices import parse_command

DTYPES = ("float32", "bfloat16")


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    parser = flags.new_parser(__doc__)
    flags.add_renamed(
        parser,
        "--model",
        "--checkpoint",
        required=True,
        metavar="DIR_OR_NAME",
        help="a trained model: a folder, or a name on the hub",
    )
    flags.add_output(parser, "the new model folder")
    flags.add_cut(parser, many=False, default="the largest")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights written (default the model's)"
    )
    flags.add_refactor(parser)
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--factors-only",
        action="store_true",
        help="leave the token table out; only ML-Embed reads such a folder",
    )
    form.add_argument(
        "--onnx", action="store_true", help="a graph for onnxruntime, FastEmbed, transformers.js"
    )
    form.add_argument("--gguf", action="store_true", help="one file for llama.cpp")
    form.add_argument(
        "--static", action="store_true", help="the token table alone, for model2vec; no layers"
    )
    parser.add_argument(
        "--int8", action="store_true", help="with --onnx: hold the weights in 8 bits"
    )
    parser.add_argument(
        "--texts",
        type=home_path,
        metavar="RAW",
        help="with --int8: raw data, best with a column `language`, on whose texts the loss is "
        "measured (default the embedded corpus in 375 languages)",
    )
    parser.add_argument(
        "--allow-loss",
        action="store_true",
        help="with --int8: write the model though a text's cosine falls below 0.99",
    )
    parser.add_argument(
        "--allow-untrained", action="store_true", help="take values that were not trained"
    )
    flags.add_overwrite(parser)
    flags.add_verify(parser)
    args = parse_command(parser, arguments)

    _check_together(args)
    if args.verify:
        from ml_embed.model_folders.seal import verify_model

        verify_model(args.model)
    report = _export_form(args) if args.onnx or args.gguf or args.static else _export_folder(args)
    print(json.dumps({"output": str(args.output)} | report))


def _check_together(args: argparse.Namespace) -> None:
    """Raise UserError for flags that belong to others."""
    if args.int8 and not args.onnx:
        raise UserError("--int8 is a form of --onnx; add that, or leave --int8 out")
    for flag in ("texts", "allow_loss"):
        if getattr(args, flag) and not args.int8:
            raise UserError(f"--{flag.replace('_', '-')} belongs to --int8; leave it out")
    for flag, forms in (
        ("dtype", ["onnx", "static"]),
        ("refactor", ["onnx", "gguf", "static"]),
        ("depth", ["static"]),
    ):
        if getattr(args, flag) and any(getattr(args, form) for form in forms):
            raise UserError(
                f"--{flag} does not go with this form; leave it out, or write a model folder with "
                "it first and give that as --model"
            )


def _export_folder(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from ml_embed.model_folders.export import export_model

    cut = export_model(
        args.model,
        args.output,
        args.depth,
        args.dim,
        args.rank,
        getattr(torch, args.dtype) if args.dtype else None,
        args.allow_untrained,
        args.overwrite,
        args.refactor,
        args.factors_only,
    )
    from ml_embed.model_folders.record import weights_folder

    weights = sum(file.stat().st_size for file in weights_folder(args.output).glob("*.safetensors"))
    return vars(cut) | {"bytes_of_weights": weights}


def _export_form(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from ml_embed.forms.gguf import export_gguf
    from ml_embed.forms.onnx import Int8, export_onnx
    from ml_embed.forms.static import export_static
    from ml_embed.model_folders.export import open_part

    check_model_output(args.output, args.overwrite, home_path(args.model))
    part = open_part(args.model, args.depth, args.dim, args.rank, args.allow_untrained)
    if args.gguf:
        dtype = getattr(torch, args.dtype) if args.dtype else None
        report = export_gguf(part, args.output, dtype)
    elif args.static:
        report = export_static(part, args.output)
    else:
        report = export_onnx(
            part, args.output, Int8(args.texts, args.allow_loss) if args.int8 else None
        )
    sizes = vars(part.cut) | ({"depth": 0} if args.static else {})
    return sizes | report
