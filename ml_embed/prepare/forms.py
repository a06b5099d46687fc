"""Forms that rows of training data have elsewhere: which one a file has, and its rows in our form.

| form | columns |
|---|---|
| ours | query, passage, negatives or negative_1, ... |
| FlagEmbedding | query, pos, neg, pos_scores, neg_scores, prompt |
| Tevatron | query, positive_passages, negative_passages: objects with title and text |
| ms-swift | messages, positive_messages, negative_messages: one user message per text |
| sentence-transformers | anchor, positive, negative or negative_1, ... |
| the same, scored | sentence1, sentence2, score |

Where a query has several positives, each makes a row, and the rows share a `query_id`: the data's,
or a digest of the query's text.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ml_embed.prepare.numbering import text_digest
from ml_embed.prepare.rows import (
    FaultyRow,
    RawRow,
    list_of,
    number_of,
    query_id_of,
    raw_columns,
    row_of,
    scores_of,
    text_of,
)

Values = Mapping[str, Any]
RowsOf = Callable[[Values, str], list[RawRow]]


@dataclass(frozen=True)
class Form:
    """One tool's form of rows."""

    name: str
    needs: frozenset[str]
    """columns that tell it"""
    reads: frozenset[str]
    """further columns"""
    rows: RowsOf


def form_of(names: Sequence[str]) -> Form | None:
    """The form of a file with these columns; None if it is none of them."""
    return next((form for form in FORMS if form.needs <= set(names)), None)


def one_row_each(
    query: str,
    positives: Sequence[str],
    negatives: list[str],
    query_id: str | None,
    pos_scores: Sequence[float | None] = (),
    neg_scores: list[float] | None = None,
    language: str | None = None,
) -> list[RawRow]:
    """A row for each positive of a query."""
    name = query_id or query_id_of_text(query)
    scores = pos_scores or [None] * len(positives)
    return [
        RawRow(query, positive, negatives, name, language, None, score, neg_scores)
        for positive, score in zip(positives, scores, strict=True)
    ]


def query_id_of_text(query: str) -> str:
    """The name of a query that has none: equal texts have equal names."""
    return text_digest(query.encode()).hex()


def _given_id(values: Values, where: str) -> str | None:
    for name in ("query_id", "id", "_id"):
        if name in values:
            return query_id_of(values[name], name, where)
    return None


def _language(values: Values) -> str | None:
    language = values.get("language")
    return language if isinstance(language, str) and language else None


def _texts(values: Values, column: str, where: str, text_is_list: bool = True) -> list[Any]:
    return list_of(values.get(column), column, where, text_is_list)


def _checked(texts: list[Any], column: str, where: str) -> list[str]:
    """Texts of which none may be missing."""
    return [text_of({column: text}, column, where) for text in texts]


def _positives(texts: list[Any], column: str, where: str) -> list[str]:
    if not texts:
        raise FaultyRow(f"{where}: {column!r} is empty: the query has no right passage.")
    return _checked(texts, column, where)


# --- each form


def _own(values: Values, where: str) -> list[RawRow]:
    return [row_of(values, raw_columns(values, where), where, text_is_list=True)]


def _flag_embedding(values: Values, where: str) -> list[RawRow]:
    positives = _positives(_texts(values, "pos", where), "pos", where)
    negatives = _texts(values, "neg", where)
    return one_row_each(
        text_of(values, "query", where),
        positives,
        [text for text in negatives if text_or_none(text, "neg", where)],
        _given_id(values, where),
        scores_of(values.get("pos_scores"), positives, where) or (),
        scores_of(values.get("neg_scores"), negatives, where),
        _language(values),
    )


def text_or_none(text: Any, column: str, where: str) -> str | None:
    """A text that may be empty. Raises FaultyRow for anything else."""
    return text_of({column: text}, column, where) if text not in (None, "") else None


def _tevatron(values: Values, where: str) -> list[RawRow]:
    sides = []
    for column in ("positive_passages", "negative_passages"):
        passages = _texts(values, column, where, text_is_list=False)
        if not all(isinstance(passage, dict) for passage in passages):
            raise FaultyRow(f"{where}: {column!r} must be a list of objects with 'text'.")
        sides.append([titled(passage, where) for passage in passages])
    positives = _positives(sides[0], "positive_passages", where)
    query, given = text_of(values, "query", where), _given_id(values, where)
    return one_row_each(query, positives, sides[1], given, language=_language(values))


def titled(passage: Values, where: str) -> str:
    """title + " " + text, as the tools that write the two apart train on them."""
    title = text_or_none(passage.get("title"), "title", where)
    text = text_or_none(passage.get("text"), "text", where)
    joined = " ".join(part for part in (title, text) if part).strip()
    return text_of({"text": joined}, "text", where)


def _ms_swift(values: Values, where: str) -> list[RawRow]:
    query = _user_message(values.get("messages"), "messages", where)
    sides = [
        [
            _user_message(messages, column, where)
            for messages in _texts(values, column, where, text_is_list=False)
        ]
        for column in ("positive_messages", "negative_messages")
    ]
    positives = _positives(sides[0], "positive_messages", where)
    rows = one_row_each(query, positives, sides[1], _given_id(values, where))
    score = number_of(values.get("label"), "label", where)
    return [row._replace(score=score) for row in rows]


def _user_message(messages: Any, column: str, where: str) -> str:
    is_one = isinstance(messages, list) and len(messages) == 1 and isinstance(messages[0], dict)
    if not is_one or messages[0].get("role") != "user":
        raise FaultyRow(
            f"{where}: each text of {column!r} must be one message of the role 'user'; what stands "
            "there has another role or several messages. Join them into one text yourself."
        )
    return text_of(messages[0], "content", where)


def _renamed(query: str, passage: str, negative: str) -> RowsOf:
    def rows(values: Values, where: str) -> list[RawRow]:
        renamed = {
            "query" if name == query else "passage" if name == passage
            else "negative_0" if name == negative else name: value
            for name, value in values.items()
            if name != "negatives"
        }  # fmt: skip
        return _own(renamed, where)

    return rows


FORMS = (
    Form("ours", frozenset({"query", "passage"}), frozenset(), _own),
    Form(
        "FlagEmbedding",
        frozenset({"query", "pos"}),
        frozenset(
            {"neg", "pos_scores", "neg_scores", "prompt", "id", "_id", "query_id", "language"}
        ),
        _flag_embedding,
    ),
    Form(
        "Tevatron",
        frozenset({"query", "positive_passages"}),
        frozenset({"negative_passages", "query_id", "language"}),
        _tevatron,
    ),
    Form(
        "ms-swift",
        frozenset({"messages", "positive_messages"}),
        frozenset({"negative_messages", "label", "id"}),
        _ms_swift,
    ),
    Form(
        "sentence-transformers triplets",
        frozenset({"anchor", "positive"}),
        frozenset({"negative"}),
        _renamed("anchor", "positive", "negative"),
    ),
    Form(
        "sentence-transformers pairs with scores",
        frozenset({"sentence1", "sentence2", "score"}),
        frozenset(),
        _renamed("sentence1", "sentence2", ""),
    ),
)
