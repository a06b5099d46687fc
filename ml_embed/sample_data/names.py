"""The embedded corpus of names of territories and languages, and datasets made of it.

A meaning is what is named: a territory or a language.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, permutations
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ml_embed.errors import UserError
from ml_embed.sample_data.datasets import (
    Row,
    check_folders,
    generator_of,
    sample_product,
    write_rows,
)
from ml_embed.sample_data.plan import UNSEEN_PAIR_SHARE

if TYPE_CHECKING:
    import pyarrow as pa

NAMES_FILE = Path(__file__).with_name("names.parquet")
DATASET = "names"
MIN_LANGUAGES = 5  # fewer have no pair to hold out
UNSEEN_MEANING_SHARE = 0.1
NEGATIVES = 7


class Meaning(NamedTuple):
    """What is named."""

    kind: str
    """"territory" or "language"."""
    code: str


@dataclass(frozen=True)
class NamesPlan:
    """Which names are trained on, and which are held out."""

    names: Mapping[str, Mapping[Meaning, str]]
    """Language -> all meanings -> name."""
    unseen_meanings: frozenset[Meaning]
    """Found nowhere in training."""
    unseen_pairs: frozenset[tuple[str, str]]
    """Pairs (a < b) of languages of which training has no row, in either direction."""

    @cached_property
    def meanings(self) -> tuple[Meaning, ...]:
        return tuple(next(iter(self.names.values())))

    @cached_property
    def training_meanings(self) -> tuple[Meaning, ...]:
        return tuple(meaning for meaning in self.meanings if meaning not in self.unseen_meanings)

    def pairs(self, unseen: bool) -> list[tuple[str, str]]:
        """Ordered pairs of two languages: all those never paired in training, or all the others."""
        return [
            pair
            for pair in permutations(self.names, 2)
            if (tuple(sorted(pair)) in self.unseen_pairs) == unseen
        ]

    def is_equal(self, source: str, target: str, meaning: Meaning) -> bool:
        """Whether both languages write the name alike, so that it is found without knowing it."""
        return self.names[source][meaning].casefold() == self.names[target][meaning].casefold()

    def count_equal(self) -> tuple[int, int]:
        """Names in two languages that are alike, which are left out, and all there are."""
        pairs = list(combinations(self.names, 2))
        equal = sum(self.is_equal(*pair, meaning) for pair in pairs for meaning in self.meanings)
        return equal, len(pairs) * len(self.meanings)


def load_names() -> pa.Table:
    """The whole corpus, a row a name: language, kind, code, name (strings).

    Every meaning, a kind and code, has one name in each of the 40 languages.
    """
    import pyarrow.parquet as pq

    return pq.read_table(NAMES_FILE)


def plan_names(languages: int | None = None, seed: int = 0, kind: str | None = None) -> NamesPlan:
    """Take the first `languages` (None is all), and choose by `seed` what is held out.

    `kind` takes only meanings of it. Raises UserError if there are not that many languages.
    """
    names: dict[str, dict[Meaning, str]] = {}
    for row in load_names().to_pylist():
        if kind not in (None, row["kind"]):
            continue
        names.setdefault(row["language"], {})[Meaning(row["kind"], row["code"])] = row["name"]
    count = len(names) if languages is None else languages
    if not MIN_LANGUAGES <= count <= len(names):
        raise UserError(
            f"{count} languages cannot be had; ask for {MIN_LANGUAGES} to {len(names)}, or for all"
        )
    names = dict(list(names.items())[:count])
    rng = random.Random(f"names {seed}")
    pairs = sorted((min(pair), max(pair)) for pair in combinations(names, 2))
    unseen = round(UNSEEN_MEANING_SHARE * len(names["en"]))
    return NamesPlan(
        names=names,
        unseen_meanings=frozenset(rng.sample(_of_own_names(names), unseen)),
        unseen_pairs=frozenset(rng.sample(pairs, round(UNSEEN_PAIR_SHARE * len(pairs)))),
    )


def _of_own_names(names: Mapping[str, Mapping[Meaning, str]]) -> list[Meaning]:
    """The meanings of which no name, in any language, is also another meaning's."""
    meanings_of: dict[str, set[Meaning]] = {}
    for of_language in names.values():
        for meaning, name in of_language.items():
            meanings_of.setdefault(name.casefold(), set()).add(meaning)
    shared = set().union(*(found for found in meanings_of.values() if len(found) > 1))
    return sorted(set(names["en"]) - shared)


def build_names(
    output_dir: str | Path,
    eval_dir: str | Path,
    languages: int | None = None,
    seed: int = 0,
    rows: int = 60_000,
    eval_rows: int = 400,
    overwrite: bool = False,
    kind: str | None = None,
) -> NamesPlan:
    """Write the raw training dataset `names` to `output_dir`, its evaluation set to `eval_dir`.

    Training: up to `rows` rows, with 7 negatives each; `kind` takes only names of that kind.
    Evaluation: up to `eval_rows` rows a split, with columns split, query, passage, candidates (list
        of strings, the passage among them), position (of the passage there), query_language,
        passage_language, kind and code. The same arguments give the same bytes.

    Raises UserError as `build_datasets`.
    """
    output_dir, eval_dir = Path(output_dir), Path(eval_dir)
    check_folders(output_dir, eval_dir, overwrite)
    if rows < 1 or eval_rows < 1:
        raise UserError(f"rows {rows} and eval_rows {eval_rows} must be at least 1")
    plan = plan_names(languages, seed, kind)
    training = name_rows(plan, generator_of("train", DATASET, seed), rows)
    evaluation = name_cases(plan, generator_of("eval", DATASET, seed), eval_rows)
    write_rows(list(training), output_dir / f"{DATASET}.parquet")
    write_rows(list(evaluation), eval_dir / f"{DATASET}.parquet")
    return plan


def name_rows(plan: NamesPlan, rng: random.Random, count: int) -> Iterator[Row]:
    """A name in one language; the same in another; other names of that kind in that other one.

    All rows of a meaning have one query_id: its name in a third language is not wrong.
    """
    drawn = sample_product(rng, plan.pairs(unseen=False), plan.training_meanings, count)
    for (source, target), meaning in drawn:
        if plan.is_equal(source, target, meaning):
            continue
        query, passage = plan.names[source][meaning], plan.names[target][meaning]
        others = {
            plan.names[target][other]
            for other in plan.training_meanings
            if other.kind == meaning.kind
        }
        yield {
            "query_id": ":".join(meaning),
            "query": query,
            "passage": passage,
            "negatives": rng.sample(sorted(others - {query, passage}), NEGATIVES),
        }


def name_cases(plan: NamesPlan, rng: random.Random, count: int) -> Iterator[Row]:
    """Choose the query's meaning among all names in the passage's language."""
    splits = {
        "unseen_pairs": (plan.pairs(unseen=True), plan.training_meanings),
        "unseen_meanings": (plan.pairs(unseen=False), sorted(plan.unseen_meanings)),
    }
    for split, (pairs, meanings) in splits.items():
        for (source, target), meaning in sample_product(rng, pairs, meanings, count):
            if plan.is_equal(source, target, meaning):
                continue
            passage = plan.names[target][meaning]
            candidates = sorted(set(plan.names[target].values()))
            rng.shuffle(candidates)
            yield {
                "split": split,
                "query": plan.names[source][meaning],
                "passage": passage,
                "candidates": candidates,
                "position": candidates.index(passage),
                "query_language": source,
                "passage_language": target,
                **meaning._asdict(),
            }
