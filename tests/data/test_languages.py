"""How often languages are drawn: against plain loops, for any number of steps built at once."""

import gc
import weakref
from collections import Counter

import numpy as np
import pytest
from helpers.tiny_models import make_tokenizer
from helpers.tiny_runs import write_tokenized
from oracles import deal
from oracles import draws_of_languages as naive_draws

from ml_embed.config import LanguageSampling, parse_config
from ml_embed.data.languages import LanguageDraws, RowsByLanguage, draws_of_languages
from ml_embed.data.random import permuted
from ml_embed.data.schedule import DatasetPlan, Schedule, plan_dataset
from ml_embed.data.split import random_split
from ml_embed.data.store import open_converted, open_store
from ml_embed.errors import UserError
from ml_embed.training.mixture import language_draws, mixture_of, mixture_table, with_draws

ROWS = {"eng": 4000, "deu": 900, "swa": 60, "yor": 7}
# dataset -> language of each row; "plain" says none
LANGUAGES = {
    "wide": ["eng"] * 300 + ["swa", "deu", None] * 20,
    "narrow": ["swa"] * 15 + ["yor"] * 6,
}
DATASETS = {
    name: ("retrieval", rows, 40, (0, 3)) for name, rows in (("wide", 360), ("narrow", 21))
} | {"plain": ("retrieval", 30, 12, (0, 0))}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("languages")
    data = write_tokenized(folder / "tokenized", make_tokenizer(), DATASETS, LANGUAGES)
    return open_store(data, folder / "cache", progress=False)


def config_of(alpha=0.5, cap=None, datasets=None, **changes):
    paths = ("model_path", "experiment_id", "output_dir", "tb_dir", "cache_dir", "train_data_path")
    sampling = {"language_sampling": {"alpha": alpha, "cap": cap}}
    given = dict.fromkeys(paths, "x") | sampling | {"valid_fraction": 0} | changes
    return parse_config(given | {"datasets": datasets or {}})


def plans_of(store, weights=None):
    weights = weights or {}
    return [
        DatasetPlan(name, "retrieval", 2, d.num_rows, 0, round(d.num_rows * weights.get(name, 1)))
        for name, d in store.datasets.items()
    ]


def schedule_of(store, config, weights=None, global_batch=8):
    plans = plans_of(store, weights)
    languages = language_draws(plans, store, config)
    splits = {n: random_split(n, d.num_rows, 0, config.seed) for n, d in store.datasets.items()}
    plans = with_draws(plans, languages)
    return Schedule(plans, splits, global_batch, config.seed, languages), languages


def epoch_of(schedule, epoch):
    steps = range(epoch * schedule.steps_per_epoch, (epoch + 1) * schedule.steps_per_epoch)
    return schedule.batches(steps)


def language_of(store, name, row):
    dataset = store.datasets[name]
    return dataset.languages[dataset.language_numbers[row]]


@pytest.mark.parametrize("alpha", [0, 0.3, 1])
@pytest.mark.parametrize("cap", [None, 1, 4, 50])
def test_draws_are_those_of_the_formula(alpha, cap):
    fast = draws_of_languages(ROWS, ROWS, LanguageSampling(alpha, cap))
    naive = naive_draws(ROWS, sum(ROWS.values()), alpha, cap or 1e9)
    assert fast == pytest.approx(naive)
    assert sum(fast.values()) == pytest.approx(sum(ROWS.values()))
    if cap is None:
        shares = [fast[code] / ROWS[code] ** alpha for code in ROWS]
        assert shares == pytest.approx([shares[0]] * 4)


def test_rows_that_say_no_language_are_undetermined(store):
    assert store.datasets["wide"].languages == ("eng", "swa", "deu", "und")
    assert store.datasets["plain"].languages == ("und",)
    found = [language_of(store, "wide", row) for row in range(360)]
    assert found == [code or "und" for code in LANGUAGES["wide"]]
    assert {language_of(store, "plain", row) for row in range(30)} == {"und"}


@pytest.mark.parametrize(
    ("alpha", "cap", "weights"), [(0.3, None, {}), (0, 3, {"wide": 0.5, "narrow": 2})]
)
def test_an_epoch_has_the_shares_of_the_formula(store, alpha, cap, weights):
    """Each epoch within a sample of each dataset and language, and their mean exactly."""
    settings = {name: {"weight": weight} for name, weight in weights.items()}
    schedule, _ = schedule_of(store, config_of(alpha, cap, settings), weights)
    rows, weighted = Counter(), Counter()
    cells = Counter()
    for name, dataset in store.datasets.items():
        for row in range(dataset.num_rows):
            code = language_of(store, name, row)
            rows[code] += 1
            weighted[code] += weights.get(name, 1)
            cells[name, code] += weights.get(name, 1)
    wanted = draws_of_languages(weighted, rows, LanguageSampling(alpha, cap))
    epochs = 40
    mean = Counter()
    for epoch in range(epochs):
        drawn = Counter()
        for batch in epoch_of(schedule, epoch):
            assert batch.epoch == epoch
            drawn.update((batch.dataset, language_of(store, batch.dataset, r)) for r in batch.rows)
        for (name, code), count in cells.items():
            assert abs(drawn[name, code] - wanted[code] * count / weighted[code]) < 1.5
        for (_, code), count in drawn.items():
            mean[code] += count / epochs
        if cap:
            assert all(sum(drawn[n, c] for n in DATASETS) <= cap * rows[c] + 3 for c in rows)
    for code, draws in wanted.items():
        assert mean[code] == pytest.approx(draws, abs=0.8)
    assert sum(wanted.values()) == pytest.approx(sum(weighted.values()))


def test_with_alpha_1_every_row_comes_once(store):
    schedule, _ = schedule_of(store, config_of(alpha=1))
    for epoch in range(2):
        seen = Counter((b.dataset, int(r)) for b in epoch_of(schedule, epoch) for r in b.rows)
        assert set(seen.values()) == {1}
        assert len(seen) == 360 + 21 + 30


def test_steps_do_not_depend_on_what_they_are_asked_with(store):
    schedule, _ = schedule_of(store, config_of(0.2))
    steps = range(5, 2 * schedule.steps_per_epoch)
    together = schedule.batches(steps)
    again, _ = schedule_of(store, config_of(0.2))
    for step, batch in zip(steps, together, strict=True):
        (alone,) = again.batches([step])
        assert (alone.dataset, alone.rows.tolist()) == (batch.dataset, batch.rows.tolist())
    other, _ = schedule_of(store, config_of(0.2, seed=1))
    assert [b.rows.tolist() for b in other.batches(steps)] != [b.rows.tolist() for b in together]


def test_many_short_orders_at_once_are_permutations():
    sizes = [1, 2, 3, 17, 64, 1000]
    for key in (1, 2**63):
        found = permuted(
            np.concatenate([np.arange(size) for size in sizes]),
            np.repeat(sizes, sizes),
            np.repeat(np.arange(len(sizes), dtype=np.uint64) + np.uint64(key), sizes),
        )
        orders = np.split(found, np.cumsum(sizes)[:-1])
        for size, order in zip(sizes, orders, strict=True):
            assert sorted(order.tolist()) == list(range(size))
        assert orders[5].tolist() != list(range(1000))
    firsts = permuted(np.zeros(4000), np.full(4000, 5), np.arange(4000, dtype=np.uint64))
    assert min(Counter(firsts.tolist()).values()) > 0.85 * 800


def test_a_language_without_rows_is_never_dealt(monkeypatch):
    """Also not where one stands last, and the samples of the others end a rounding below 3."""
    shares = np.array([0.1, 0.6, 0.0])
    assert (shares.cumsum() * (3 / shares.sum()))[1] < 3
    monkeypatch.setattr("ml_embed.data.languages.uniform", lambda *key: 0.0)
    rows = RowsByLanguage(("a", "b", "c"), np.arange(9), np.array([0, 4, 9, 9]))
    (found,) = LanguageDraws(rows, shares).rows_of_batches(np.array([0]), 1, 3, (0, "name", 0))
    assert set(found) <= set(range(4, 9)), "all three of b"


def test_data_that_are_no_longer_used_are_let_go(store):
    """What was found of a dataset for the plan and the schedule does not keep it open."""
    own = open_converted.__wrapped__(store.folder)
    plans = [plan_dataset(dataset, config_of()) for dataset in own.datasets.values()]
    languages = language_draws(plans, own, config_of())
    left = weakref.ref(own.datasets["wide"])
    del own
    gc.collect()
    assert languages is not None
    assert left() is None


@pytest.mark.parametrize("total", [57, 64])
def test_batches_are_dealt_like_cards(total):
    """All have the same mixture; each language's rows come in passes, each in another order."""
    counts = {"a": 10, "b": 3, "c": 5}
    offsets = np.concatenate([[0], np.cumsum(list(counts.values()))])
    rows = RowsByLanguage(tuple(counts), np.arange(18) + 100, offsets)
    shares = np.array([0.5, 0.3, 0.2])
    draws = LanguageDraws(rows, shares * total)
    key, batches = (3, "name", 2), 9
    found = draws.rows_of_batches(np.arange(batches), batches, total, key)
    code = {100 + row: code for i, code in enumerate(counts) for row in range(*offsets[i : i + 2])}
    samples = Counter(code[row] for own in found for row in own.tolist())
    assert all(abs(samples[c] - s * total) < 1 for c, s in zip(counts, shares, strict=True))
    assert max(map(len, found)) - min(map(len, found)) <= 1
    number = {c: np.array([i]) for i, c in enumerate(counts)}
    orders = {
        (c, turn): [
            int(draws._rows(number[c], np.array([turn * n + place]), key)[0]) for place in range(n)
        ]
        for c, n in counts.items()
        for turn in range(samples[c] // n + 1)
    }
    for (c, _), order in orders.items():
        assert sorted(code[row] for row in order) == [c] * counts[c]
        assert len(set(order)) == counts[c], "each row once in a pass"
    assert orders["a", 0] != orders["a", 1]
    for own, hand in zip(found, deal({c: samples[c] for c in counts}, batches), strict=True):
        wanted = []
        for c, places in hand.items():
            for place in places:
                turn, place = divmod(place, counts[c])
                wanted.append(orders[c, turn][place])
        assert sorted(own.tolist()) == sorted(wanted)
    assert found[0].tolist() != sorted(found[0].tolist()), "languages are mixed within a batch"


def test_the_mixture_is_said_and_data_without_languages_is_refused(store, tmp_path):
    config = config_of(0.5, 2)
    _, languages = schedule_of(store, config)
    mixture = mixture_of(languages)
    assert {code: own.rows for code, own in mixture.items()} == {
        "eng": 300, "und": 50, "swa": 35, "deu": 20, "yor": 6
    }  # fmt: skip
    assert sum(own.share for own in mixture.values()) == pytest.approx(1)
    assert mixture["yor"].draws == pytest.approx(12), "the cap"
    table = mixture_table(mixture, config.language_sampling)
    assert "alpha 0.5 and cap 2:" in table
    assert "yor                  6    1.46%          12    2.92%    2.00" in table
    plain = write_tokenized(tmp_path / "plain", make_tokenizer(), {"plain": DATASETS["plain"]})
    silent = open_store(plain, tmp_path / "cache", progress=False)
    assert silent.datasets["plain"].languages == ()
    with pytest.raises(UserError, match=r"language_sampling: no dataset of x says the language"):
        language_draws(plans_of(silent), silent, config)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cap": 2}, r"language_sampling\.alpha: required key is missing"),
        ({"alpha": 1.5}, r"language_sampling\.alpha: 1\.5 must be at most 1"),
        ({"alpha": 0.5, "cap": 0.5}, r"language_sampling\.cap: 0\.5 must be at least 1"),
        ({"alpha": 0.5, "kap": 3}, r"language_sampling\.kap: unknown key; did you mean 'cap'"),
        (0.5, "language_sampling: must be an object of settings, not a number"),
    ],
)
def test_wrong_settings_are_named(given, message):
    with pytest.raises(UserError, match=message):
        config_of(language_sampling=given)
