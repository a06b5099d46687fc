"""Prune a Qwen3 backbone to fewer layers and to its most active hidden and MLP dimensions.

Which dimensions are active is measured on calibration text. The new folder is a plain backbone, to
be trained: `run.py` takes it as model_path and transformers loads it.
"""

import json

from ml_embed.commands import flags
from ml_embed.errors import UserError, exit_on_user_error
from ml_embed.files.paths import home_path
from ml_embed.model_folders.backbone import PRESETS
from ml_embed.notices import bars_wanted, parse_command


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    parser = flags.new_parser(__doc__)
    parser.add_argument("--model", required=True, metavar="DIR", help="the backbone to prune")
    flags.add_output(parser, "the new backbone folder")
    parser.add_argument(
        "--preset", choices=list(PRESETS), help="take the three sizes from a published shape"
    )
    parser.add_argument("--layers", type=int, help="first decoder layers to keep (default all)")
    parser.add_argument(
        "--hidden-size", type=int, metavar="N", help="hidden dimensions to keep (default all)"
    )
    parser.add_argument(
        "--intermediate-size", type=int, metavar="N", help="MLP dimensions to keep (default all)"
    )
    parser.add_argument(
        "--texts",
        type=home_path,
        nargs="+",
        default=[],
        metavar="PATH",
        help=(
            "calibration text: .txt (one text per line), .parquet or .jsonl files (all string "
            "columns), or folders of them, such as the raw training data; needed to cut a width"
        ),
    )
    parser.add_argument(
        "--max-texts",
        action=flags.AtLeastOne,
        default=2048,
        help="texts read, from all files in turn (default 2048)",
    )
    parser.add_argument(
        "--max-seq-length", type=int, default=512, help="tokens read of a text (default 512)"
    )
    flags.add_device(parser)
    flags.add_overwrite(parser)
    args = parse_command(parser, arguments)
    sizes = [args.layers, args.hidden_size, args.intermediate_size]
    if args.preset:
        if any(size is not None for size in sizes):
            raise UserError(
                "--preset gives all three sizes; leave --layers, --hidden-size and "
                "--intermediate-size out"
            )
        preset = PRESETS[args.preset]
        sizes = [preset.num_hidden_layers, preset.hidden_size, preset.intermediate_size]

    from ml_embed.recipe.pruning import calibration_texts, prune_backbone

    texts = calibration_texts(args.texts, args.max_texts)
    layers, hidden, intermediate = sizes
    result = prune_backbone(
        args.model,
        args.output,
        layers,
        hidden,
        intermediate,
        texts,
        max_seq_length=args.max_seq_length,
        device=args.device,
        overwrite=args.overwrite,
        progress=bars_wanted(),
    )
    print(json.dumps({"output": str(args.output), **result}))
