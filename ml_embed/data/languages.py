"""How often an epoch draws each language, and which rows these are.

Letters: L languages of a dataset, n_l rows of language l, K batches of a dataset in an epoch.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ml_embed.config import LanguageSampling, Task
from ml_embed.data.random import key_hash, mix, permuted, uniform
from ml_embed.data.split import split_dataset
from ml_embed.data.store import TokenizedDataset


@dataclass(frozen=True)
class RowsByLanguage:
    """The rows that training draws of a dataset, sorted by language."""

    languages: tuple[str, ...]
    """L codes"""
    rows: np.ndarray
    """(train rows,) row numbers, in the fewest bytes that hold them: 1, 2, 4 or 8"""
    offsets: np.ndarray
    """(L + 1,) language l has rows[offsets[l]:offsets[l + 1]]"""

    @property
    def counts(self) -> np.ndarray:
        """(L,) n_l."""
        return np.diff(self.offsets)


def rows_by_language(
    dataset: TokenizedDataset, task: Task, fraction: float, seed: int, train_rows: int
) -> RowsByLanguage:
    """The first `train_rows` training rows of a dataset's split."""
    split = split_dataset(dataset, task, fraction, seed)
    rows = split.training_rows(np.arange(train_rows))
    numbers = dataset.language_numbers[rows]
    offsets = np.zeros(len(dataset.languages) + 1, np.int64)
    offsets[1:] = np.bincount(numbers, minlength=len(dataset.languages)).cumsum()
    rows = rows[numbers.argsort(kind="stable")].astype(np.min_scalar_type(dataset.num_rows))
    return RowsByLanguage(dataset.languages, rows, offsets)


def draws_of_languages(
    weighted: Mapping[str, float], rows: Mapping[str, int], sampling: LanguageSampling
) -> dict[str, float]:
    """How many samples of each language an epoch draws on average.

    In proportion to n_l^alpha, and at most cap times n_l. Their sum is that of `weighted`, unless
    the cap of all languages is reached before.

    Args:
        weighted: code -> n_l, each row counted with the weight of its dataset.
        rows: code -> n_l, each row counted once, for the cap.
        sampling: alpha and cap.
    """
    power = {code: weighted[code] ** sampling.alpha for code in sorted(weighted)}
    left, draws = sum(weighted[code] for code in power), dict.fromkeys(power, 0.0)
    open_ones = list(power)
    while open_ones:
        scale = left / sum(power[code] for code in open_ones)
        draws |= {code: scale * power[code] for code in open_ones}
        most = {code: (sampling.cap or np.inf) * rows[code] for code in open_ones}
        full = [code for code in open_ones if draws[code] > most[code]]
        if not full:
            break
        draws |= {code: most[code] for code in full}
        left -= sum(most[code] for code in full)
        open_ones = [code for code in open_ones if code not in full]
    return draws


@dataclass(frozen=True)
class LanguageDraws:
    """How often an epoch draws each language of one dataset."""

    by_language: RowsByLanguage
    draws: np.ndarray
    """(L,) samples per epoch; of a fraction, some epochs have one sample more"""

    def rows_of_batches(
        self, numbers: np.ndarray, batches: int, total: int, key: tuple[int, str, int]
    ) -> list[np.ndarray]:
        """The rows of some batches of an epoch.

        The samples of the epoch, sorted by language, are dealt to the batches like cards, so that
        all batches have the same mixture to within one sample of each language. Then the batches
        one after another take the next rows of each language, from a random order of them; when
        all were taken, from another one.

        Args:
            numbers: of the batches, 0 to `batches` - 1.
            batches: K, how many the epoch has of this dataset.
            total: samples of the epoch.
            key: (seed, dataset, epoch), which decides all that is random.
        Returns:
            (n,) row numbers of each batch, in a random order.
        """
        ends = self._ends(total, key)
        found = []
        cards = [np.arange(number, total, batches) for number in numbers.tolist()]
        dealt_to = np.repeat(numbers, [len(own) for own in cards])
        card = np.concatenate(cards)
        language = np.searchsorted(ends, card, side="right")
        first, last = np.concatenate([[0], ends])[language], ends[language]
        # Of the language's cards: those of the batches before, and the batch's own before this one.
        before = _dealt_before(dealt_to, last, batches) - _dealt_before(dealt_to, first, batches)
        own_before = (card - dealt_to) // batches + (dealt_to - first) // batches
        rows = self._rows(language, before + own_before, key)
        order_key = key_hash(*key, "places")
        for own in np.split(rows, np.cumsum([len(own) for own in cards])[:-1]):
            found.append(own[mix(own, order_key).argsort(kind="stable")])
        return found

    def _ends(self, total: int, key: tuple[int, str, int]) -> np.ndarray:
        """(L,) where the samples of each language end; in the mean of epochs they are `draws`."""
        ends = self.draws.cumsum()
        ends = np.floor(ends * (total / ends[-1]) + uniform(*key, "languages")).astype(np.int64)
        ends[np.flatnonzero(self.draws)[-1] :] = total
        return ends.clip(max=total)

    def _rows(
        self, language: np.ndarray, places: np.ndarray, key: tuple[int, str, int]
    ) -> np.ndarray:
        """The rows at some places of the epoch's order of each language."""
        counts, offsets = self.by_language.counts, self.by_language.offsets
        passes, places = np.divmod(places, counts[language])
        pass_keys = mix(passes, mix(language, key_hash(*key, "rows of languages")))
        orders = permuted(places, counts[language], pass_keys)
        return self.by_language.rows[offsets[language] + orders].astype(np.int64)


def _dealt_before(number: np.ndarray, cards: np.ndarray, batches: int) -> np.ndarray:
    """How many of the first `cards` cards the batches before batch `number` get."""
    return cards // batches * number + np.minimum(cards % batches, number)
