"""Compute a teacher's vectors of tokenized data once, for training with `teacher_vectors_path`.

The texts are read back from the data's token ids, so the teacher may have any tokenizer. Its
vectors lie in a folder, for each dataset those of the queries and of the documents, and training
maps them into memory. The same command goes on with what was interrupted, adds datasets that are
new in the data, and makes those anew whose texts have changed.
"""

import argparse
import json

from ml_embed.commands import flags
from ml_embed.errors import exit_on_user_error
from ml_embed.files.paths import check_writable, home_path
from ml_embed.notices import bars_wanted, parse_command


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = flags.new_parser(__doc__)
    flags.add_model(
        parser, "the teacher: a model of this project, or any that sentence-transformers reads"
    )
    parser.add_argument(
        "--data", type=home_path, required=True, metavar="DIR", help="folder of tokenized data"
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="DIR_OR_NAME",
        help="the tokenizer that the data was made with",
    )
    flags.add_output(parser, "folder for the vectors")
    flags.add_prompts(parser, "teacher")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument(
        "--strip-prompts",
        dest="strip_prompts",
        action="store_true",
        default=True,
        help=(
            "take away the prompts that the data was tokenized with, where its manifest names them "
            "(default)"
        ),
    )
    prompts.add_argument(
        "--keep-prompts", dest="strip_prompts", action="store_false", help="leave them in the texts"
    )
    parser.add_argument(
        "--dtype",
        choices=["float16", "float32"],
        default="float16",
        help="of the stored vectors (default float16)",
    )
    flags.add_batch_size(parser, "texts in a forward pass of a sentence-transformers model")
    flags.add_device(parser)
    parser.add_argument(
        "--cache-dir",
        type=home_path,
        metavar="DIR",
        help="the cache_dir of your training config, so that the data is "
        "converted once for both (default a folder in --output that is removed at the end)",
    )
    flags.add_overwrite(parser, "make everything anew, or go on with that after an interruption")
    flags.add_verify(parser)
    return parse_command(parser, arguments)


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    from ml_embed.distributed.launch import launched

    with launched(args.device):
        embed(args)


def embed(args: argparse.Namespace) -> None:
    """This process's part of the work; the first one prints the result."""
    from ml_embed.distributed.collectives import compute_on_all_processes, process_index
    from ml_embed.inference.text_models import TextModel, load_text_model
    from ml_embed.model_folders.seal import verify_model
    from ml_embed.recipe.teacher import TeacherOptions, embed_teacher, tokenizer_of_data

    def prepare() -> tuple[TextModel, TeacherOptions]:
        options = TeacherOptions(
            data=args.data,
            tokenizer=args.tokenizer,
            output=args.output,
            query_prompt=args.query_prompt,
            passage_prompt=args.passage_prompt,
            strip_prompts=args.strip_prompts,
            dtype=args.dtype,
            cache_dir=args.cache_dir,
            overwrite=args.overwrite,
            verify=args.verify,
        )
        check_writable(args.output)  # mistakes show before a model is loaded
        if args.verify:
            verify_model(args.model)
        tokenizer_of_data(options)
        return load_text_model(args.model, args.device, args.batch_size), options

    record = embed_teacher(*compute_on_all_processes(prepare), progress=bars_wanted())
    if process_index() == 0:
        print(json.dumps({"output": str(args.output), **record}, ensure_ascii=False))
