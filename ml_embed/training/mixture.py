"""The mixture of languages that a run draws with `language_sampling`, over all datasets."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ml_embed.config import LanguageSampling, TrainConfig, match_settings
from ml_embed.data.languages import LanguageDraws, draws_of_languages, rows_by_language
from ml_embed.data.schedule import DatasetPlan
from ml_embed.data.store import Store
from ml_embed.errors import UserError

_SHOWN = 20
"""languages of the printed mixture: those with the most rows"""


@dataclass(frozen=True)
class LanguageShare:
    """One language in the mixture of a run."""

    rows: int
    """rows that training draws from"""
    draws: float
    """samples per epoch, on average"""
    share: float
    """of all samples"""


def language_draws(
    plans: Sequence[DatasetPlan], store: Store, config: TrainConfig
) -> dict[str, LanguageDraws] | None:
    """How often each language of each dataset is drawn; None without `language_sampling`.

    A language's samples are divided among its datasets in proportion to its rows there, times the
    datasets' weights.

    Raises:
        UserError: the data says no languages.
    """
    sampling = config.language_sampling
    if sampling is None:
        return None
    if not any(dataset.languages for dataset in store.datasets.values()):
        raise UserError(
            f"language_sampling: no dataset of {config.train_data_path} says the language of its "
            "rows; tokenize raw data with a column language, or remove the key"
        )
    rows = {
        plan.name: rows_by_language(
            store.datasets[plan.name],
            plan.task,
            config.held_out_fraction,
            config.seed,
            plan.train_rows,
        )
        for plan in plans
    }
    weights = {plan.name: match_settings(plan.name, config.datasets).weight for plan in plans}
    counts: Counter[str] = Counter()
    weighted: dict[str, float] = {}
    for name, own in rows.items():
        for code, count in zip(own.languages, own.counts.tolist(), strict=True):
            if count:
                counts[code] += count
                weighted[code] = weighted.get(code, 0.0) + weights[name] * count
    draws = draws_of_languages(weighted, counts, sampling)
    factors = {code: draws[code] / weighted[code] for code in draws}
    return {
        name: LanguageDraws(
            own,
            own.counts * weights[name] * np.array([factors.get(c, 0.0) for c in own.languages]),
        )
        for name, own in rows.items()
    }


def with_draws(
    plans: Sequence[DatasetPlan], languages: Mapping[str, LanguageDraws] | None
) -> tuple[DatasetPlan, ...]:
    """The plans with as many samples per epoch as their languages have together."""
    if languages is None:
        return tuple(plans)
    return tuple(
        dataclasses.replace(plan, draws=max(1, round(float(languages[plan.name].draws.sum()))))
        for plan in plans
    )


def mixture_of(languages: Mapping[str, LanguageDraws] | None) -> dict[str, LanguageShare] | None:
    """The mixture over all datasets, the languages with the most rows first."""
    if languages is None:
        return None
    rows: Counter[str] = Counter()
    draws: dict[str, float] = {}
    for own in languages.values():
        for code, count, drawn in zip(
            own.by_language.languages, own.by_language.counts.tolist(), own.draws, strict=True
        ):
            rows[code] += count
            draws[code] = draws.get(code, 0.0) + float(drawn)
    total = sum(draws.values())
    return {
        code: LanguageShare(count, draws[code], draws[code] / total)
        for code, count in sorted(rows.items(), key=lambda item: (-item[1], item[0]))
        if count
    }


def mixture_table(mixture: Mapping[str, LanguageShare], sampling: LanguageSampling) -> str:
    """The mixture in lines: each language's rows, samples per epoch, and its two shares."""
    all_rows = sum(own.rows for own in mixture.values())
    cap = "no cap" if sampling.cap is None else f"cap {sampling.cap:g}"
    lines = [f"languages, drawn with alpha {sampling.alpha:g} and {cap}:"]
    lines.append(f"{'':10}{'rows':>12}{'share':>9}{'per epoch':>12}{'share':>9}{'times':>8}")
    lines += [
        f"{code:10}{own.rows:12,}{own.rows / all_rows:9.2%}{own.draws:12,.0f}{own.share:9.2%}"
        f"{own.draws / own.rows:8.2f}"
        for code, own in list(mixture.items())[:_SHOWN]
    ]
    if len(mixture) > _SHOWN:
        lines.append(f"and {len(mixture) - _SHOWN} more languages: resolved.json has all")
    return "\n".join(lines)
