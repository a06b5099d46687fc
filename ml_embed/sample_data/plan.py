"""What is trained on and what is held out: languages, articles, and pairs of languages."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations, permutations

from ml_embed.errors import UserError
from ml_embed.sample_data.corpus import ARTICLES, Language, usable_languages

# Roughly by number of speakers, so that any first N of them are widely spoken; the 50 have 20
# scripts and 12 families.
FIRST_LANGUAGES = """
eng cmn_hans hin spa arb fra ben por_BR rus urd ind deu_1996 jpn mar tel tur tam vie kor pes_1 swh
jav ita tha guj kan pbu hau_NG mya pol yor ukr mal amh ibo uig_arab nld ron_2006 tgl khm sin
uzn_latn kaz heb ell_monotonic hun swe ces bul fin
"""
# Never trained on, however many languages are asked for. First those with a close relative among
# the first 50 (as Galician has in Portuguese), then those with a distant one or none, or a script
# of their own, then right-to-left ones.
UNSEEN_LANGUAGES = """
glg dan slk bel mkd azj_latn afr xho nep lao
kat hye eus haw quy nav wol bod mlt chr_uppercase
ydd skr div aii
"""
MIN_LANGUAGES = (
    8  # under that there is too little of each script direction and too few pairs to hold any out
)
BLOCK_SIZE = 6  # articles among which an evaluation row chooses
UNSEEN_PAIR_SHARE = 0.2


@dataclass(frozen=True)
class Plan:
    """Who plays which part. Languages are codes of the corpus; articles are numbers from 1 to
    30."""

    languages: Mapping[str, Language]
    """All languages below, by code."""
    training_languages: tuple[str, ...]
    """No two of one group, none of the group of an unseen one."""
    unseen_languages: tuple[str, ...]
    """Found nowhere in training."""
    training_blocks: tuple[tuple[int, ...], ...]
    """The articles that are trained on, in blocks of 6 that are alike in length."""
    unseen_articles: tuple[int, ...]
    """The block that training has in no language."""
    unseen_pairs: frozenset[tuple[str, str]]
    """Pairs (a < b) of training languages of which training has no row, in either direction."""

    @property
    def training_articles(self) -> tuple[int, ...]:
        return tuple(sorted(article for block in self.training_blocks for article in block))

    def text(self, language: str, article: int) -> str:
        return self.languages[language].articles[article]

    def declaration_lengths(self) -> dict[str, int]:
        """Characters of all 30 articles together, by language."""
        return {
            code: sum(map(len, language.articles.values()))
            for code, language in self.languages.items()
        }

    def pairs(self, unseen: bool) -> list[tuple[str, str]]:
        """Ordered pairs of two training languages: all those never paired in training, or all the
        others."""
        return [
            pair
            for pair in permutations(self.training_languages, 2)
            if (tuple(sorted(pair)) in self.unseen_pairs) == unseen
        ]


def plan_datasets(languages: int | None = 50, seed: int = 0) -> Plan:
    """Choose the training languages (the first `languages`; None is all there are) and, by `seed`,
    the hold-outs.

    Raises UserError if there are not that many languages.
    """
    usable = usable_languages()
    available = _training_candidates(usable)
    count = len(available) if languages is None else languages
    if not MIN_LANGUAGES <= count <= len(available):
        raise UserError(
            f"{count} languages cannot be had; ask for {MIN_LANGUAGES} to {len(available)}, or for "
            "all"
        )
    training, unseen = tuple(available[:count]), tuple(UNSEEN_LANGUAGES.split())
    rng = random.Random(f"plan {seed}")
    blocks = length_blocks(usable)
    unseen_articles = blocks[rng.randrange(1, len(blocks) - 1)]  # of middling length
    pairs = sorted((min(pair), max(pair)) for pair in combinations(training, 2))
    return Plan(
        languages={code: usable[code] for code in (*training, *unseen)},
        training_languages=training,
        unseen_languages=unseen,
        training_blocks=tuple(block for block in blocks if block != unseen_articles),
        unseen_articles=unseen_articles,
        unseen_pairs=frozenset(rng.sample(pairs, round(UNSEEN_PAIR_SHARE * len(pairs)))),
    )


def length_blocks(languages: Mapping[str, Language]) -> list[tuple[int, ...]]:
    """All articles in blocks of 6, shortest first, by their median share of a whole declaration.

    Choosing within such a block, the length of a text tells little about which article it is.
    """
    shares: dict[int, list[float]] = {article: [] for article in ARTICLES}
    for language in languages.values():
        total = sum(map(len, language.articles.values()))
        for article, text in language.articles.items():
            shares[article].append(len(text) / total)
    ranked = sorted(ARTICLES, key=lambda article: (statistics.median(shares[article]), article))
    return [tuple(sorted(ranked[i : i + BLOCK_SIZE])) for i in range(0, len(ranked), BLOCK_SIZE)]


def training_texts(plan: Plan) -> list[str]:
    """Every article that may be trained on, once: what a tokenizer may learn from.

    (The folder of raw datasets has the same texts, so `init_backbone.py --train-tokenizer` can be
    given that.)
    """
    return [
        plan.text(code, article)
        for code in plan.training_languages
        for article in plan.training_articles
    ]


def _training_candidates(usable: Mapping[str, Language]) -> list[str]:
    """Languages in the order in which they are taken, one of each group, none of an unseen
    language's group."""
    taken = {usable[code].group for code in UNSEEN_LANGUAGES.split()}
    candidates = []
    for code in (*FIRST_LANGUAGES.split(), *usable):
        if usable[code].group not in taken:
            taken.add(usable[code].group)
            candidates.append(code)
    return candidates
