"""What a model loses in fewer bits: the smallest cosine to its own vectors, per language.

Letters: N texts, D vector length.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ml_embed.errors import UserError
from ml_embed.prepare.raw import list_raw_datasets, read_rows
from ml_embed.sample_data.corpus import usable_languages

SMALLEST_COSINE = 0.99
"""Of a text's two vectors, below which a model is not written."""
MOST_TEXTS = 100
"""Of a language."""
ARTICLES = (1, 2, 26)
"""Of the embedded corpus, in each of its languages."""
SHOWN = 12
"""Languages in a card and in an error, the worst first."""
NO_LANGUAGE = "not said"

Encode = Callable[[list[str]], np.ndarray]
"""N texts -> (N, D) unit vectors."""


@dataclass(frozen=True)
class Loss:
    """The smallest cosine of each language's texts."""

    cosines: dict[str, float]
    """language -> cosine, the smallest first"""
    texts: int
    """that were compared"""

    @property
    def smallest(self) -> float:
        return next(iter(self.cosines.values()))

    def to_json(self) -> dict[str, Any]:
        """What stands in the command's JSON line and in the folder."""
        return {
            "smallest_cosine": self.smallest,
            "smallest_cosine_by_language": self.cosines,
            "texts_compared": self.texts,
        }

    def sentence(self) -> str:
        """What the card says."""
        more = "" if len(self.cosines) <= SHOWN else "; all of them stand in int8.json"
        return (
            f"Weights are held in 8 bits. Over {self.texts} texts the smallest cosine between a "
            f"vector and the same in float32 is **{self.smallest:.4f}**. By language, the smallest "
            f"first: {self._worst()}{more}."
        )

    def refusal(self) -> str:
        """Why the model is not written."""
        return (
            f"in 8 bits the vector of a text has a cosine of only {self.smallest:.4f} to the one "
            f"in float32, the limit is {SMALLEST_COSINE} (by language: {self._worst()}); nothing "
            "was written. Export without --int8, or add --allow-loss"
        )

    def _worst(self) -> str:
        worst = list(self.cosines.items())[:SHOWN]
        return ", ".join(f"{language} {cosine:.4f}" for language, cosine in worst)


def measure_loss(encode: Encode, exact: Encode, texts: dict[str, list[str]]) -> Loss:
    """Compare two models on the texts of each language."""
    everything = [text for own in texts.values() for text in own]
    cosines = (encode(everything) * exact(everything)).sum(1)  # (N,)
    ends = np.cumsum([len(own) for own in texts.values()])[:-1]
    cosines = np.nan_to_num(cosines, nan=-1.0)  # a vector that is no number is all lost
    smallest = [float(own.min()) for own in np.split(cosines, ends)]
    ascending = sorted(zip(smallest, texts, strict=True))
    return Loss({language: cosine for cosine, language in ascending}, len(everything))


def texts_by_language(data: Path | None) -> dict[str, list[str]]:
    """At most `MOST_TEXTS` texts of each language.

    Args:
        data: a folder of raw data, best with the column `language`; None is the embedded corpus.
    Raises:
        UserError: it is not there, a row is faulty, or it has no text.
    """
    if data is None:
        languages = usable_languages().values()
        return {own.code: [own.articles[number] for number in ARTICLES] for own in languages}
    found: dict[str, dict[str, None]] = {}  # distinct texts, in order
    for dataset in list_raw_datasets(data):
        for row in read_rows(dataset):
            own = found.setdefault(row.language or NO_LANGUAGE, {})
            own |= dict.fromkeys((row.query, row.passage)[: max(0, MOST_TEXTS - len(own))])
    if not found:
        raise UserError(f"{data} has no rows to compare models on; give other --texts")
    return {language: list(own) for language, own in found.items()}
