"""Turn raw contrastive data, or anybody's pairs and labelled texts, into token ids for training."""

import argparse
from typing import Any

from ml_embed.commands import flags
from ml_embed.errors import exit_on_user_error
from ml_embed.files.paths import home_path
from ml_embed.notices import bars_wanted, parse_command


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(
            "Tokenize raw contrastive data (one .parquet or .jsonl file per dataset; columns "
            "query, passage, negative_1 ... negative_K or negatives) for run.py. An interrupted "
            "run is continued by the same command."
        )
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        help="folder of the backbone's tokenizer, or its name on the hub",
    )
    parser.add_argument(
        "--input",
        required=True,
        help=(
            "folder of raw data; or a .csv, .tsv, .json, .jsonl, .parquet or .arrow file, a folder "
            "of them, of a saved dataset or in BEIR's form, parallel text (.po, .mo, .tmx, name.en "
            "beside name.sw), or the name of a dataset on the Hugging Face hub: these are written "
            "to OUTPUT/raw first"
        ),
    )
    parser.add_argument(
        "--output",
        required=True,
        type=home_path,
        help="folder for token ids; made if it does not exist",
    )
    parser.add_argument(
        "--columns",
        metavar="ROLE=COLUMN,...",
        help=(
            "which columns are what, e.g. query=question,passage=answer (and negatives=..., "
            "negative_1=...), or text=review,label=stars for labelled text; default: columns have "
            "the roles' names"
        ),
    )
    parser.add_argument(
        "--split",
        default="train",
        help="split of a dataset on the hub, of a saved one or of a BEIR folder (default: train)",
    )
    parser.add_argument("--subset", help="configuration of a hub dataset, where it has several")
    parser.add_argument(
        "--encoding", default="utf-8", help="of text files, e.g. cp1252 (default: utf-8)"
    )
    parser.add_argument(
        "--delimiter",
        help="between fields of .csv and .tsv files (default: a comma, or a tab)",
    )
    parser.add_argument(
        "--both-directions",
        action="store_true",
        help="of parallel text, also a row from the translation to the source",
    )
    parser.add_argument(
        "--skip-bad-rows",
        action="store_true",
        help="leave faulty rows out and say how many, instead of refusing their file",
    )
    parser.add_argument(
        "--config",
        type=home_path,
        help="training config whose `datasets` give task, prompt, passage_prompt and its share",
    )
    parser.add_argument(
        "--max-seq-length",
        type=int,
        default=2048,
        help="tokens of a text at most, EOS included (default: 2048)",
    )
    parser.add_argument(
        "--max-samples",
        type=int,
        default=80_000,
        help=(
            "rows kept of each dataset, a seeded random choice in file order; 0 = all (default: "
            "80000)"
        ),
    )
    parser.add_argument(
        "--num-workers",
        type=int,
        default=None,
        help="tokenizing threads (default: all cores; of a launch, its share of them)",
    )
    parser.add_argument("--seed", type=int, default=42, help="of all random choices (default: 42)")
    flags.add_overwrite(
        parser,
        "make all datasets anew, or continue doing so after an interruption; without it, other "
        "data there is an error",
    )
    return parse_command(parser, arguments)


@exit_on_user_error
def main(arguments: list[str] | None = None) -> int:
    options = vars(parse_arguments(arguments))
    from ml_embed.distributed.launch import launched  # after parsing: --help answers at once

    with launched("cpu"):
        tokenize(options)
    return 0


def tokenize(options: dict[str, Any]) -> None:
    """This process's part of the work; the first one prints the result."""
    from ml_embed.config import load_config
    from ml_embed.distributed.collectives import compute_on_main_process, process_index
    from ml_embed.prepare.own_data import ImportOptions, raw_folder
    from ml_embed.prepare.records import Reading
    from ml_embed.prepare.summary import language_table, say_what_is_missing
    from ml_embed.prepare.tokenization import TokenizeOptions, tokenize_folder

    config = options.pop("config")
    datasets = load_config(config)[0].datasets if config else {}
    origin = {key: options.pop(key) for key in ("input", "columns", "split", "subset")}
    progress = bars_wanted()
    kept = {key: options[key] for key in ("output", "seed", "overwrite")}
    delimiter = options.pop("delimiter")
    reading = Reading(options.pop("encoding"), "\t" if delimiter == r"\t" else delimiter)
    how = ImportOptions(reading, options.pop("both_directions"), options["skip_bad_rows"])
    folder = compute_on_main_process(
        lambda: raw_folder(**origin, **kept, progress=progress, options=how)
    )
    settings = TokenizeOptions(
        input=folder.path, passed_over=folder.passed_over, datasets=datasets, **options
    )
    manifest = tokenize_folder(settings, progress)
    entries = manifest.datasets.values()
    rows, documents, tokens = (
        sum(getattr(entry, key) for entry in entries) for key in ("rows", "documents", "tokens")
    )
    if process_index() > 0:
        return
    say_what_is_missing(manifest)
    if table := language_table(manifest):
        print(table)
    queries = sum(entry.queries or 0 for entry in entries)
    named = f" of {queries:,} named queries" if queries else ""
    print(
        f"{options['output']}: {len(entries)} datasets, {rows:,} rows{named}, {documents:,} "
        f"documents, {tokens:,} tokens"
    )
