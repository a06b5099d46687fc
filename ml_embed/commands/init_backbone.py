"""Make a Qwen3 backbone folder: random weights of a preset size, a tokenizer copied or trained."""

import argparse
from typing import TYPE_CHECKING

from ml_embed.commands import flags
from ml_embed.errors import exit_on_user_error
from ml_embed.files.model_source import find_tokenizer_folder
from ml_embed.files.paths import check_model_output, home_path
from ml_embed.model_folders.backbone import DTYPES, PRESETS, init_backbone
from ml_embed.notices import parse_command
from ml_embed.prepare.tokenizer_training import DEFAULT_VOCAB_SIZE, read_texts, train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--preset", required=True, choices=list(PRESETS), help="shape of the decoder"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--tokenizer",
        metavar="DIR_OR_NAME",
        help="copy the tokenizer of this folder, or of this name on the hub",
    )
    source.add_argument(
        "--train-tokenizer",
        type=home_path,
        nargs="+",
        metavar="TEXTS",
        help=(
            "train a tokenizer on these files, or folders of files: .txt (one text per line), "
            ".parquet or .jsonl (all string columns; a folder of raw training data will do)"
        ),
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help=(
            f"tokens of a trained tokenizer (default {DEFAULT_VOCAB_SIZE}); with --tokenizer, rows "
            "of the token table if more than the tokenizer needs. The rows are rounded up to a "
            "multiple of 64"
        ),
    )
    flags.add_output(parser, "model folder to write")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the random weights (default %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of the weights (default %(default)s); bfloat16 halves them",
    )
    flags.add_overwrite(parser)
    return parse_command(parser, arguments)


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    check_model_output(args.output, args.overwrite)
    tokenizer: PreTrainedTokenizerBase
    if args.train_tokenizer:
        size = DEFAULT_VOCAB_SIZE if args.vocab_size is None else args.vocab_size
        tokenizer = train_tokenizer(read_texts(args.train_tokenizer), size)
        rows = None
    else:
        # Seconds of imports that a mistake or --help need not wait for.
        from ml_embed.prepare.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(find_tokenizer_folder(args.tokenizer), needs_padding=False)
        rows = args.vocab_size
    folder = init_backbone(
        args.preset, tokenizer, args.output, args.seed, args.dtype, rows, args.overwrite
    )
    print(f"wrote {folder}: {args.preset}, {len(tokenizer)} tokens, {args.dtype}")
