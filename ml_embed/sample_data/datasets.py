"""Raw training datasets and evaluation sets made of the embedded corpus: retrieval, clustering,
classification."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from ml_embed.errors import UserError
from ml_embed.files.atomic import atomic_file
from ml_embed.sample_data.plan import BLOCK_SIZE, Plan, plan_datasets

RETRIEVAL, CLUSTERING, DIRECTION = "udhr_retrieval", "udhr_clustering", "udhr_direction"
TASKS = {RETRIEVAL: "retrieval", CLUSTERING: "clustering", DIRECTION: "classification"}
# Queries that do not ask for the same article in another language say so: without that, the
# clustering rows would pull a query to its language and the retrieval rows to its meaning.
CLUSTERING_PROMPT = "Instruct: Find a text in the same language.\nQuery: "
DIRECTION_PROMPT = "Instruct: Which way is this text written?\nQuery: "
DIRECTION_LABELS = {"ltr": "left-to-right script", "rtl": "right-to-left script"}
CLUSTERING_NEGATIVES = 15
SHORTEST_SPAN, LONGEST_SPAN = (
    20,
    160,
)  # characters of a direction query, before it is cut to whole words
PIECES_A_TEXT = (
    10  # on average and at most, for direction queries; more would be much the same again
)

Row = dict[str, object]


def build_datasets(
    output_dir: str | Path,
    eval_dir: str | Path,
    languages: int | None = 50,
    seed: int = 0,
    rows: int = 6000,
    eval_rows: int = 400,
    overwrite: bool = False,
) -> Plan:
    """Write three raw training datasets to `output_dir` and three evaluation sets to `eval_dir`, as
    parquet.

    Training: `udhr_retrieval` has `rows` rows (23 negatives each), `udhr_clustering` half as many
        (up to 15 negatives),
    `udhr_direction` a third (1 negative); fewer where the languages do not give as many.
    Evaluation: up to `eval_rows` rows a split, with columns split, query, passage, candidates (list
        of strings, the passage among them at index
    `position`), query_language, passage_language and article (of the passage). The same arguments
    give the same bytes.

    Raises UserError for languages or row counts that cannot be had, and for folders that hold
    something already (`overwrite` replaces these three files in each and leaves anything else) or
    that are one inside the other.
    """
    output_dir, eval_dir = Path(output_dir), Path(eval_dir)
    check_folders(output_dir, eval_dir, overwrite)
    if rows < 6 or eval_rows < 1:
        raise UserError(f"rows {rows} must be at least 6 and eval_rows {eval_rows} at least 1")
    plan = plan_datasets(languages, seed)
    training: dict[str, Iterable[Row]] = {
        RETRIEVAL: retrieval_rows(plan, generator_of("train", RETRIEVAL, seed), rows),
        CLUSTERING: clustering_rows(plan, generator_of("train", CLUSTERING, seed), rows // 2),
        DIRECTION: direction_rows(plan, generator_of("train", DIRECTION, seed), rows // 3),
    }
    evaluation: dict[str, Callable[[Plan, random.Random, int], Iterator[Row]]] = {
        RETRIEVAL: retrieval_cases,
        CLUSTERING: clustering_cases,
        DIRECTION: direction_cases,
    }
    for name, dataset in training.items():
        write_rows(list(dataset), output_dir / f"{name}.parquet")
    for name, cases in evaluation.items():
        write_rows(
            list(cases(plan, generator_of("eval", name, seed), eval_rows)),
            eval_dir / f"{name}.parquet",
        )
    return plan


def retrieval_rows(plan: Plan, rng: random.Random, count: int) -> Iterator[Row]:
    """An article in one language; the same in another; all other training articles in that other
    language."""
    articles = plan.training_articles
    for (source, target), article in sample_product(rng, plan.pairs(unseen=False), articles, count):
        others = [plan.text(target, other) for other in articles if other != article]
        yield {
            "query": plan.text(source, article),
            "passage": plan.text(target, article),
            "negatives": others,
        }


def clustering_rows(plan: Plan, rng: random.Random, count: int) -> Iterator[Row]:
    """A text; another article in its language; a third and other articles in other languages.

    No negative is the query's or the passage's article, so that nothing that is close in meaning is
    pushed away.
    """
    articles = plan.training_articles
    article_pairs = [(a, b) for a in articles for b in articles if a != b]
    for code, (article, other) in sample_product(
        rng, plan.training_languages, article_pairs, count
    ):
        strangers = [stranger for stranger in plan.training_languages if stranger != code]
        third = [number for number in articles if number not in (article, other)]
        chosen = rng.sample(strangers, min(CLUSTERING_NEGATIVES, len(strangers)))
        yield {
            "query": CLUSTERING_PROMPT + plan.text(code, article),
            "passage": plan.text(code, other),
            "negatives": [plan.text(stranger, rng.choice(third)) for stranger in chosen],
        }


def direction_rows(plan: Plan, rng: random.Random, count: int) -> Iterator[Row]:
    """A piece of a text; the label of its script's direction; the other label. As many of either
    direction."""
    cases = _direction_pieces(plan, rng, plan.training_languages, plan.training_articles, count)
    for code, _, piece in cases:
        right = plan.languages[code].direction
        wrong = "rtl" if right == "ltr" else "ltr"
        yield {
            "query": DIRECTION_PROMPT + piece,
            "passage": DIRECTION_LABELS[right],
            "negative_1": DIRECTION_LABELS[wrong],
        }


def retrieval_cases(plan: Plan, rng: random.Random, count: int) -> Iterator[Row]:
    """Choose the query's article among the 6 of its block, all in the passage's language. Chance is
    1/6."""
    unseen_language_pairs = [
        (a, b) for a in plan.unseen_languages for b in plan.unseen_languages if a != b
    ]
    splits = {
        "unseen_pairs": (plan.pairs(unseen=True), plan.training_blocks),
        "unseen_languages": (unseen_language_pairs, plan.training_blocks),
        "unseen_articles": (plan.pairs(unseen=False), (plan.unseen_articles,)),
    }
    for split, (pairs, blocks) in splits.items():
        places = [(article, block) for block in blocks for article in block]
        for (source, target), (article, block) in sample_product(rng, pairs, places, count):
            query, passage = plan.text(source, article), plan.text(target, article)
            candidates = [plan.text(target, number) for number in rng.sample(block, len(block))]
            yield _case(split, query, passage, candidates, source, target, article)


def clustering_cases(plan: Plan, rng: random.Random, count: int) -> Iterator[Row]:
    """Choose the text in the query's language among one article in 6 languages. Chance is 1/6."""
    splits = {
        "unseen_languages": (plan.unseen_languages, plan.training_articles),
        "unseen_articles": (plan.training_languages, plan.unseen_articles),
    }
    for split, (codes, articles) in splits.items():
        article_pairs = [(a, b) for a in articles for b in articles if a != b]
        for code, (article, other) in sample_product(rng, codes, article_pairs, count):
            choices = [
                code,
                *rng.sample([stranger for stranger in codes if stranger != code], BLOCK_SIZE - 1),
            ]
            rng.shuffle(choices)
            candidates = [plan.text(choice, other) for choice in choices]
            query = CLUSTERING_PROMPT + plan.text(code, article)
            yield _case(split, query, plan.text(code, other), candidates, code, code, other)


def direction_cases(plan: Plan, rng: random.Random, count: int) -> Iterator[Row]:
    """Choose the label of the direction of the query's script. Chance is 1/2, and both are equally
    frequent."""
    splits = {
        "unseen_languages": (plan.unseen_languages, plan.training_articles),
        "unseen_articles": (plan.training_languages, plan.unseen_articles),
    }
    for split, (codes, articles) in splits.items():
        for code, article, piece in _direction_pieces(plan, rng, codes, articles, count):
            label = DIRECTION_LABELS[plan.languages[code].direction]
            candidates = rng.sample(list(DIRECTION_LABELS.values()), 2)
            yield _case(split, DIRECTION_PROMPT + piece, label, candidates, code, "eng", article)


def _case(
    split: str,
    query: str,
    passage: str,
    candidates: list[str],
    query_language: str,
    passage_language: str,
    article: int,
) -> Row:
    return {
        "split": split,
        "query": query,
        "passage": passage,
        "candidates": candidates,
        "position": candidates.index(passage),
        "query_language": query_language,
        "passage_language": passage_language,
        "article": article,
    }


def _direction_pieces(
    plan: Plan, rng: random.Random, codes: Sequence[str], articles: Sequence[int], count: int
) -> Iterator[tuple[str, int, str]]:
    """(language, article, piece of its text): up to `count`, an even number, no piece twice,
    directions in turn."""
    by_direction = [
        [code for code in codes if plan.languages[code].direction == way]
        for way in DIRECTION_LABELS
    ]
    texts_of_rarer = min(len(direction) for direction in by_direction) * len(articles)
    seen: set[str] = set()
    for index in range(2 * min(count // 2, PIECES_A_TEXT * texts_of_rarer)):
        while True:
            code, article = rng.choice(by_direction[index % 2]), rng.choice(articles)
            piece = _span(plan.text(code, article), rng)
            if piece not in seen:
                break
        seen.add(piece)
        yield code, article, piece


def _span(text: str, rng: random.Random) -> str:
    """A random piece of a text, of whole words where words are set apart by spaces."""
    length = min(len(text), rng.randint(SHORTEST_SPAN, LONGEST_SPAN))
    start = rng.randint(0, len(text) - length)
    words = text[start : start + length].split(" ")
    whole = words[start > 0 : len(words) - (start + length < len(text))]
    return " ".join(whole if len(whole) > 1 else words).strip()


def sample_product(
    rng: random.Random, first: Sequence, second: Sequence, count: int
) -> Iterator[tuple]:
    """Up to `count` distinct elements of the product of two sequences, in random order."""
    total = len(first) * len(second)
    for index in rng.sample(range(total), min(count, total)):
        yield first[index // len(second)], second[index % len(second)]


def generator_of(part: str, name: str, seed: int) -> random.Random:
    """A generator of its own for every file, so that one file's rows do not depend on another's."""
    return random.Random(f"{part} {name} {seed}")


def check_folders(output_dir: Path, eval_dir: Path, overwrite: bool) -> None:
    """Raises UserError for folders that hold something or are one inside the other."""
    output, evaluation = output_dir.resolve(), eval_dir.resolve()
    if output.is_relative_to(evaluation) or evaluation.is_relative_to(output):
        raise UserError(
            f"{output_dir} and {eval_dir} are the same or one inside the other; the evaluation set "
            "would be trained on"
        )
    for folder in (output_dir, eval_dir):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is not a folder; give another one")
        if folder.is_dir() and any(folder.iterdir()) and not overwrite:
            raise UserError(
                f"{folder} holds something already; give another folder, or allow overwriting"
            )


def write_rows(rows: list[Row], file: Path) -> None:
    """Write a dataset as parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as partial:
        pq.write_table(pa.Table.from_pylist(rows), partial, compression="zstd")
