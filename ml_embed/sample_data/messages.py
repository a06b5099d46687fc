"""Datasets of short messages that translation catalogues hold in nine languages.

Catalogues are gettext's .mo files, as programs come with them. They are not part of this project:
whoever wants the data names a folder of them.
"""

import hashlib
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

from ml_embed.errors import UserError, one_line
from ml_embed.sample_data.datasets import Row, check_folders, write_rows

DATASET = "messages"
TUNING = "tuning"
"""Folder, in that of the evaluation sets, of smaller ones to choose a learning rate by."""
SOURCE_LANGUAGE = "en"
LANGUAGES = ("de", "es", "fr", "ru", "sv", "pl", "ja", "zh_CN")
UNSEEN_MESSAGES = 1600
ROWS_PER_MESSAGE = 24
SHORTEST, LONGEST = 8, 36
"""Characters of a message in English."""
LETTERS = 0.7
"""At least this share of a message are letters."""
MARKS = frozenset("%<{\n(:.")
"""A message with one of these has placeholders, or more than a phrase."""

Message = Mapping[str, str]
"""Language -> text."""


@dataclass(frozen=True)
class MessagesPlan:
    """Rows for training, and for two evaluation sets of which training shows nothing."""

    training: list[Row]
    unseen_pairs: list[Row]
    """Messages of training, in two languages in which training does not pair them."""
    unseen_messages: list[Row]
    tuning_pairs: list[Row]
    """As `unseen_pairs`, others."""
    tuning_messages: list[Row]


def read_messages(catalogues: Path) -> list[Message]:
    """The messages that a folder's catalogues hold in all languages, in an order of their own.

    Catalogues are `.../<language>/LC_MESSAGES/*.mo`, at any depth.

    Raises:
        UserError: a catalogue cannot be read, or a language has none.
    """
    import polib

    found: dict[str, dict[str, str]] = {}
    for language in LANGUAGES:
        files = sorted(
            catalogues.rglob(f"{language}/LC_MESSAGES/*.mo"), key=lambda path: (path.name, path)
        )
        if not files:
            raise UserError(f"{catalogues} has no catalogue {language}/LC_MESSAGES/*.mo")
        for file in files:
            try:
                entries = polib.mofile(str(file))
            except (OSError, ValueError) as error:
                raise UserError(f"{file} cannot be read ({one_line(error)})") from error
            for entry in entries:
                source, text = _clean(entry.msgid), _clean(entry.msgstr)
                if text not in ("", source) and not entry.msgid_plural and _is_phrase(source):
                    message = found.setdefault(source, {})
                    message.setdefault(language, text)
                    message[SOURCE_LANGUAGE] = source
    complete = [source for source, message in found.items() if len(message) == 1 + len(LANGUAGES)]
    # The order does not depend on which other messages there are.
    complete.sort(key=lambda source: hashlib.sha256(source.lower().encode()).hexdigest())
    return [found[source] for source in complete]


def _clean(text: str) -> str:
    """Without the marks of keys that menus underline."""
    return text.replace("_", "").replace("&", "").strip()


def _is_phrase(source: str) -> bool:
    letters = sum(character.isalpha() for character in source)
    return (
        SHORTEST <= len(source) <= LONGEST
        and letters >= LETTERS * len(source)
        and not MARKS & set(source)
    )


def plan_messages(messages: list[Message], seen: int, seed: int = 0) -> MessagesPlan:
    """Of each of the first `seen` messages 24 pairs for training and one for evaluation.

    Raises:
        UserError: there are fewer than `seen` + 1,600 messages.
    """
    if len(messages) < seen + UNSEEN_MESSAGES:
        raise UserError(
            f"the catalogues hold {len(messages)} messages in all languages; {seen} for training "
            f"and {UNSEEN_MESSAGES} for evaluation are asked for"
        )
    rng = random.Random(seed)
    training: list[Row] = []
    tests: list[Row] = []
    for message in messages[:seen]:
        pairs = [pair for pair in permutations(message, 2) if len({*map(message.get, pair)}) == 2]
        held_out = rng.choice(pairs)
        tests.append(_row(message, held_out))
        left = [pair for pair in pairs if {*pair} != {*held_out}]
        drawn = rng.sample(left, min(ROWS_PER_MESSAGE, len(left)))
        training += [_row(message, pair) for pair in drawn]
    rng.shuffle(training)
    rng.shuffle(tests)
    others = [
        _row(message, rng.sample(list(message), 2))
        for message in messages[seen : seen + UNSEEN_MESSAGES]
    ]
    return MessagesPlan(
        training,
        _each_text_once(tests[:700], 700),
        _each_text_once(others[:1100], 1000),
        _each_text_once(tests[700:], 500),
        _each_text_once(others[1100:], 400),
    )


def _row(message: Message, languages: Iterable[str]) -> Row:
    query, passage = languages
    return {"query": message[query], "passage": message[passage]}


def _each_text_once(rows: Iterable[Row], most: int) -> list[Row]:
    """The first `most` rows that repeat no text, so that each query has one right candidate."""
    used: set[str] = set()
    kept: list[Row] = []
    for row in rows:
        texts = {str(row["query"]), str(row["passage"])}
        if not texts & used and len(kept) < most:
            used |= texts
            kept.append(row)
    return kept


def build_messages(
    catalogues: Path,
    output_dir: Path,
    eval_dir: Path,
    rows: int = 1200 * ROWS_PER_MESSAGE,
    seed: int = 0,
    overwrite: bool = False,
) -> MessagesPlan:
    """Write the training dataset `messages` and its evaluation sets.

    Training: `rows` rows, 24 of a message, with query and passage, the message in two languages.
    Evaluation: unseen_pairs and unseen_messages in `eval_dir`, others of both in its `tuning`; the
        candidates of a query are all passages of its file. The same arguments give the same bytes.

    Raises:
        UserError: see `read_messages` and `plan_messages`, and as `build_datasets`.
    """
    check_folders(output_dir, eval_dir, overwrite)
    if rows < ROWS_PER_MESSAGE:
        raise UserError(f"rows {rows} must be at least {ROWS_PER_MESSAGE}, those of one message")
    plan = plan_messages(read_messages(catalogues), rows // ROWS_PER_MESSAGE, seed)
    write_rows(plan.training, output_dir / f"{DATASET}.parquet")
    for folder, pairs, others in (
        (eval_dir, plan.unseen_pairs, plan.unseen_messages),
        (eval_dir / TUNING, plan.tuning_pairs, plan.tuning_messages),
    ):
        write_rows(pairs, folder / "unseen_pairs.parquet")
        write_rows(others, folder / "unseen_messages.parquet")
    return plan
