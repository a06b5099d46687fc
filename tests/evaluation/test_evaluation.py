"""Ranks and metrics against plain Python; the cube of a small model against one cell at a time."""

import errno
import importlib.util
import json
import math
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.scripts import load_script
from helpers.tiny_models import (
    DIMS,
    EXITS,
    RANKS,
    TEXTS,
    make_tokenizer,
    random_backbone,
    write_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import naive_metrics

from ml_embed import Embedder
from ml_embed.config import DatasetConfig
from ml_embed.errors import UserError
from ml_embed.evaluation.cube import evaluate_baseline, evaluate_cube
from ml_embed.evaluation.data import behind_prompts, read_test_sets
from ml_embed.evaluation.metrics import (
    METRICS,
    chance_metrics,
    metrics_of_ranks,
    ranks_of_positives,
    ranks_of_scores,
)
from ml_embed.reports.plots import plot_cube
from ml_embed.reports.tables import MEANING, cube_tables
from ml_embed.reports.tables import test_set_table as table_of_test_sets


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1
    )


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 2**31))
def test_metrics_are_those_of_sorting(queries, documents, seed):
    generator = np.random.default_rng(seed)
    # A permutation: no two scores of a row are within the tie tolerance.
    scores = np.stack([generator.permutation(documents) for _ in range(queries)]) / documents
    positive = generator.integers(0, documents, queries)
    found = metrics_of_ranks(ranks_of_scores(scores, positive))
    assert found == pytest.approx(naive_metrics(scores.tolist(), positive.tolist()))


def test_a_constant_model_does_not_win():
    vectors = torch.nn.functional.normalize(torch.full((101, 96), 0.3) + 0.1, dim=1)
    ranks = ranks_of_positives(vectors[:50], vectors, torch.arange(50), at_once=7)
    assert torch.equal(ranks, torch.full((50,), 51.0, dtype=torch.float64))
    assert metrics_of_ranks(ranks) == {"recall@1": 0.0, "mrr@10": 0.0, "ndcg@10": 0.0}
    assert torch.equal(ranks_of_scores(vectors[:50] @ vectors.T, torch.arange(50)), ranks)


def test_a_model_of_nan_ranks_last():
    vectors = torch.full((20, 8), torch.nan)
    assert ranks_of_positives(vectors[:3], vectors, torch.arange(3)).tolist() == [20.0] * 3
    assert ranks_of_scores(vectors[:3], torch.zeros(3)).tolist() == [8.0] * 3


def test_ties_count_half():
    scores = torch.tensor([[0.5, 0.9, 0.5, 0.5, 0.1], [0.2, 0.2, 0.1, -torch.inf, -torch.inf]])
    assert ranks_of_scores(scores, torch.tensor([0, 1])).tolist() == [3.0, 1.5]


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_ranks_do_not_depend_on_how_many_documents_are_scored_at_once(at_once):
    queries, documents = unit(37, 24), unit(90, 24, seed=1)
    documents[40:60] = documents[:20]  # exact ties
    positive = torch.arange(37) * 2
    expected = ranks_of_scores(queries @ documents.T, positive)
    assert torch.equal(ranks_of_positives(queries, documents, positive, at_once), expected)
    assert expected.frac().any()


def test_excluded_pairs_do_not_compete():
    queries, documents = unit(5, 8), unit(30, 8, seed=1)
    positive = torch.tensor([3, 4, 5, 6, 7])
    pairs = torch.tensor(
        [(q, d) for q in range(5) for d in range(0, 30, 1 + q) if d != positive[q]]
    )
    scores = queries @ documents.T
    scores[pairs[:, 0], pairs[:, 1]] = -torch.inf
    expected = ranks_of_scores(scores, positive)
    assert torch.equal(ranks_of_positives(queries, documents, positive, 4, pairs), expected)
    assert not torch.equal(expected, ranks_of_positives(queries, documents, positive))


def test_chance_is_the_mean_over_all_ranks():
    sizes = [2, 2, 5, 30]
    every_rank = [metrics_of_ranks(np.arange(1, size + 1)) for size in sizes]
    for name, value in chance_metrics(sizes).items():
        assert value == pytest.approx(sum(metrics[name] for metrics in every_rank) / len(sizes))
    assert chance_metrics([4])["recall@1"] == 0.25


def test_no_queries_give_nan():
    assert all(math.isnan(value) for value in metrics_of_ranks([]).values())


ROWS = [
    {
        "split": "seen",
        "query": TEXTS[0],
        "passage": TEXTS[1],
        "candidates": [TEXTS[3], TEXTS[1], TEXTS[4]],
    },
    {"split": "unseen", "query": TEXTS[3], "passage": TEXTS[0], "candidates": [TEXTS[0], TEXTS[5]]},
    {
        "split": "seen",
        "query": TEXTS[5],
        "passage": TEXTS[3],
        "candidates": [TEXTS[1], TEXTS[3], TEXTS[3]],
    },
    {"split": "seen", "query": TEXTS[4], "passage": TEXTS[6], "candidates": [*TEXTS[:4], TEXTS[6]]},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluation")
    tokenizer = make_tokenizer()
    for sharing in ("shared", "per_layer"):
        write_model(root / sharing, tokenizer, sharing)
    random_backbone(tokenizer).save_pretrained(root / "plain")
    tokenizer.save_pretrained(root / "plain")
    (root / "candidates").mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), root / "candidates" / "articles.parquet")
    return root


@pytest.mark.parametrize("sharing", ["shared", "per_layer"])
def test_every_cut_is_what_the_cut_model_achieves(folders, sharing):
    result = evaluate_cube(folders / sharing, folders / "candidates", device="cpu", progress=False)
    assert len(result["rows"]) == len(RANKS) * len(EXITS) * len(DIMS) * 2
    assert json.loads(json.dumps(result)) == result
    for row in result["rows"]:
        cut = {"depth": row["depth"], "dim": row["dim"], "rank": row["rank"]}
        model = Embedder.from_pretrained(folders / sharing, **cut, device="cpu")
        cases = [case for case in ROWS if case["split"] == row["split"]]
        scores, positive = [], []
        for case in cases:
            candidates = sorted(set(case["candidates"]))
            scores.append((model.encode(candidates) @ model.encode_query(case["query"])).tolist())
            positive.append(candidates.index(case["passage"]))
        assert {name: row[name] for name in ("recall@1", "mrr@10", "ndcg@10")} == naive_metrics(
            scores, positive
        )
        held = sum(parameter.numel() for parameter in model._encoder.parameters())
        assert row["parameters"] == held
        assert (row["bytes_per_vector"], row["trained"], row["queries"]) == (
            4 * model.dim,
            True,
            len(cases),
        )
    assert len({row["mrr@10"] for row in result["rows"]}) > 3, "the cuts make no difference"
    seen = next(row for row in result["rows"] if row["split"] == "seen")
    assert seen["chance"]["recall@1"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 5) / 3)


def test_raw_data_is_searched_whole(folders, tmp_path):
    rows = [
        {"query": TEXTS[0], "passage": TEXTS[1], "negatives": [TEXTS[3], TEXTS[5]]},
        {"query": TEXTS[3], "passage": TEXTS[0], "negatives": []},
        {"query": TEXTS[0], "passage": TEXTS[4], "negatives": [TEXTS[6]]},
        {"query": TEXTS[0], "passage": TEXTS[1], "negatives": [TEXTS[5]]},
    ]
    data = tmp_path / "articles.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = evaluate_cube(folders / "shared", data, [32], [3], [16], device="cpu", progress=False)
    model = Embedder.from_pretrained(folders / "shared", dim=16, device="cpu")
    corpus = [TEXTS[i] for i in (0, 1, 3, 4, 5, 6)]
    scores, positive, sizes = [], [], []
    # (query, its passage): the query's own text and its other passage do not compete.
    for query, right, out in ((0, 1, (0, 4)), (0, 4, (0, 1)), (3, 0, (3,))):
        kept = [text for text in corpus if text not in [TEXTS[i] for i in out]]
        scores.append((model.encode(kept) @ model.encode_query(TEXTS[query])).tolist())
        positive.append(kept.index(TEXTS[right]))
        sizes.append(len(kept))
    (row,) = result["rows"]
    assert {name: row[name] for name in ("recall@1", "mrr@10", "ndcg@10")} == pytest.approx(
        naive_metrics(scores, positive)
    )
    assert row["chance"] == chance_metrics(sizes)
    assert (row["queries"], row["dataset"], row["split"]) == (3, "articles", "all")
    texts, (first_row,) = read_test_sets(data, max_queries=1)
    assert (len(texts.texts), len(first_row.corpus)) == (4, 3)


SAID = [*TEXTS[:2], "water", *TEXTS[3:7]]
BY_LANGUAGE = {
    "one": [  # query, passage, negatives, language
        (0, 1, [3, 5], "eng"),
        (3, 0, [], "eng"),
        (4, 6, [2], "swa"),
    ],
    "two": [
        (0, 4, [6], "swa"),  # a query of "one", with another right answer
        (6, 2, [], None),
        (5, 3, [], "swa"),  # its passage is an "eng" one, too
    ],
    "three": [(2, 1, [], None)],  # a file that says no language at all
}


def write_by_language(folder):
    folder.mkdir()
    for name, rows in BY_LANGUAGE.items():
        written = [
            {
                "query": SAID[query],
                "passage": SAID[passage],
                "negatives": [SAID[i] for i in negatives],
                "language": language,
            }
            for query, passage, negatives, language in rows
        ]
        lines = "".join(json.dumps(row) + "\n" for row in written)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


def test_languages_are_searched_in_one_corpus_and_within(folders, tmp_path):
    data = write_by_language(tmp_path / "data")
    result = evaluate_cube(
        folders / "shared", data, [16, 32], [1], [16], device="cpu", progress=False,
        by_language=True,
    )  # fmt: skip
    rows = [(q, p, n, code or "und") for own in BY_LANGUAGE.values() for q, p, n, code in own]
    spoken = {
        code: {i for q, p, n, own in rows if own == code for i in (p, *n)} for *_, code in rows
    }
    corpus = sorted(set().union(*spoken.values()))
    right = {q: {p for other, p, *_ in rows if other == q} for q, *_ in rows}
    assert len(result["languages"]) == 2 * 3
    for row in result["languages"]:
        model = Embedder.from_pretrained(
            folders / "shared", rank=row["rank"], depth=1, dim=16, device="cpu"
        )
        found = {"mixed": ([], []), "within": ([], [])}
        shares = []
        for query, passage, _, language in rows:
            if language != row["language"]:
                continue
            wrong = [i for i in corpus if i not in {*right[query], query}]
            score = model.encode(SAID) @ model.encode_query(SAID[query])
            for where, kept in (("mixed", corpus), ("within", sorted(spoken[language]))):
                kept = [passage, *(i for i in kept if i in wrong)]
                found[where][0].append(score[kept].tolist())
                found[where][1].append(0)
            wrong.sort(key=lambda i: -score[i])
            nearest = wrong[:10]
            shares.append(sum(i in spoken[language] for i in nearest) / len(nearest))
        for where, (scores, positive) in found.items():
            assert row[where] == pytest.approx(naive_metrics(scores, positive)), (row, where)
        assert row["own_language@10"] == pytest.approx(sum(shares) / len(shares))
        assert row["documents"] == len(spoken[row["language"]])
        assert row["own_language_share"] == pytest.approx(row["documents"] / len(corpus))
        assert row["queries"] == len(shares)
    assert any(row["mixed"] != row["within"] for row in result["languages"])


def test_the_script_tells_of_languages(folders, tmp_path, capsys):
    data, output = write_by_language(tmp_path / "data"), tmp_path / "out"
    flags = ["--model", str(folders / "shared"), "--device", "cpu", "--by-language"]
    main = load_script("evaluate").main
    sizes = ["--depth", "1", "--dim", "16"]
    assert main([*flags, "--data", str(data), "--output", str(output), *sizes]) == 0
    printed = capsys.readouterr().out
    lines = printed[printed.index("own@10 = share") :].splitlines()
    columns = ["language", "queries", "documents", "within", "mixed", "own@10", "by", "chance"]
    assert lines[2].split() == columns
    assert [line.split()[0] for line in lines[3:7]] == ["eng", "swa", "und", "mean"]
    rows = json.loads((output / "evaluation.json").read_text())["model"]["languages"]
    assert {row["language"] for row in rows} == {"eng", "swa", "und"}
    assert main([*flags, "--data", str(folders / "candidates"), "--output", str(output)]) == 2
    assert "at least two languages in a column language; found none" in capsys.readouterr().err


def test_a_plain_baseline_is_read_at_the_same_depths(folders):
    options = {"device": "cpu", "progress": False}
    result = evaluate_cube(folders / "shared", folders / "candidates", **options)
    baseline = evaluate_baseline(folders / "plain", folders / "candidates", result, **options)
    assert {(row["rank"], row["depth"], row["dim"]) for row in baseline["rows"]} == {
        (0, depth, dim) for depth in EXITS for dim in DIMS
    }
    table = table_of_test_sets(result, baseline, "recall@1", {}).splitlines()
    assert table[-1].split()[0] == "mean"
    assert [float(value) for value in table[-1].split()[1:]] == pytest.approx(
        [
            np.mean([row[key] for row in table_rows])
            for table_rows, key in _columns(result, baseline)
        ],
        abs=6e-4,
    )
    assert "rank 16" in cube_tables(result, "mrr@10")


def _columns(result, baseline):
    whole = [
        row for row in result["rows"] if (row["rank"], row["depth"], row["dim"]) == (32, 3, 64)
    ]
    before = [row for row in baseline["rows"] if (row["depth"], row["dim"]) == (3, 64)]
    return ([row["chance"] for row in whole], "recall@1"), (before, "recall@1"), (whole, "recall@1")


def test_sizes_the_model_does_not_have(folders):
    with pytest.raises(UserError, match="depth 4 is not possible"):
        evaluate_cube(folders / "shared", folders / "candidates", depths=[1, 4])
    sizes = [[np.int64(value)] for value in (8, 2, 24)]
    numpy = evaluate_cube(
        folders / "shared", folders / "candidates", *sizes, device="cpu", progress=False
    )
    result = evaluate_cube(
        folders / "shared", folders / "candidates", [8], [2], [24], device="cpu", progress=False
    )
    assert [row["trained"] for row in result["rows"]] == [False, False]
    assert json.loads(json.dumps(numpy)) == result


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"passage": "missing"}, "row 1: the passage is not among"),
        ({"candidates": None}, "row 1: the passage is not among"),
        ({"query": None}, "row 1: query, passage and all candidates must be strings"),
    ],
)
def test_bad_candidates_are_named(tmp_path, change, message):
    pq.write_table(pa.Table.from_pylist([ROWS[0], ROWS[1] | change]), tmp_path / "bad.parquet")
    with pytest.raises(UserError, match=message):
        read_test_sets(tmp_path)


def test_the_script_writes_numbers_and_a_picture(folders, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    flags = ["--model", folders / "shared", "--baseline", folders / "plain", "--device", "cpu"]
    flags += ["--data", folders / "candidates", "--output", tmp_path / "out"]
    assert load_script("evaluate").main([*map(str, flags)]) == 0
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert written["model"]["rows"]
    assert written["baseline"]["rows"]
    assert (tmp_path / "out" / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert "articles / unseen" in capsys.readouterr().out


def test_without_matplotlib_the_numbers_are_still_written(folders, tmp_path, capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name)
    )
    flags = ["--model", folders / "shared", "--data", folders / "candidates", "--dim", 8]
    flags += ["--output", tmp_path]
    assert load_script("evaluate").main([*map(str, flags), "--device", "cpu"]) == 0
    assert "ml-embed[plot]" in capsys.readouterr().out
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert not (tmp_path / "evaluation.png").exists()
    with pytest.raises(UserError, match="matplotlib"):
        plot_cube(written["model"], tmp_path / "evaluation.png")


def test_no_number_is_lost_to_a_disk_that_fills_up(folders, tmp_path, capsys, monkeypatch):
    flags = ["--model", folders / "shared", "--data", folders / "candidates", "--dim", 8]
    flags += ["--output", tmp_path]
    assert load_script("evaluate").main([*map(str, flags), "--device", "cpu"]) == 0
    written = json.loads((tmp_path / "evaluation.json").read_text())

    def full(path, value):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("ml_embed.files.atomic.write_json", full)
    capsys.readouterr()
    assert load_script("evaluate").main([*map(str, flags), "--device", "cpu"]) == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1]) == written
    assert "No space left on device" in printed.err


def test_mistakes_at_the_command_line(folders, tmp_path, capsys):
    script = load_script("evaluate")
    flags = ["--model", str(folders / "shared"), "--output", str(tmp_path / "out")]
    assert script.main([*flags, "--data", str(tmp_path / "nowhere")]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err
    assert script.main([*flags, "--data", str(folders / "candidates"), "--batch-tokens", "0"]) == 2
    assert not (tmp_path / "out").exists()


def test_former_names_of_the_cut_flags_are_taken_but_not_shown(folders, tmp_path, capsys):
    script = load_script("evaluate")
    flags = ["--model", folders / "shared", "--data", folders / "candidates", "--device", "cpu"]
    for number, axes in enumerate((("rank", "depth", "dim"), ("ranks", "depths", "dims"))):
        sizes = [f"--{axes[0]}", 32, f"--{axes[1]}", 1, 3, f"--{axes[2]}", 8, 16]
        output = tmp_path / str(number)
        assert script.main([*map(str, [*flags, *sizes, "--output", output])]) == 0
    first, second = (
        json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("0", "1")
    )
    assert first == second
    assert {(row["rank"], row["depth"], row["dim"]) for row in first["model"]["rows"]} == {
        (32, depth, dim) for depth in (1, 3) for dim in (8, 16)
    }
    capsys.readouterr()
    with pytest.raises(SystemExit):
        script.main(["--help"])
    shown = capsys.readouterr().out
    assert "--rank N" in shown
    assert "--ranks" not in shown


def test_the_metrics_that_can_be_asked_for_are_those_computed():
    assert tuple(MEANING) == METRICS


def test_queries_and_documents_get_the_prompts_of_the_folder(folders, tmp_path):
    rows = [{"query": TEXTS[i], "passage": TEXTS[i + 1], "negatives": [TEXTS[5]]} for i in (0, 3)]
    for name in ("articles", "others"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_test_sets(tmp_path)
    prompts = {"query": "q: ", "document": "d: ", "others": "o: "}
    texts, sets = behind_prompts(*read, prompts)
    for found, plain, prompt in zip(sets, read[1], ("q: ", "o: "), strict=True):
        pairs = ((found.queries, plain.queries, prompt), (found.corpus, plain.corpus, "d: "))
        for numbers, former, front in pairs:
            expected = [front + read[0].texts[n] for n in former]
            assert [texts.texts[n] for n in numbers] == expected
    assert len(texts.texts) == len(set(texts.texts))
    result = evaluate_cube(folders / "shared", tmp_path, device="cpu", progress=False)
    assert result["prompts"] == Embedder.from_pretrained(folders / "shared").prompts
    datasets = {"oth*": DatasetConfig(prompt="c: ", passage_prompt="")}
    texts, sets = behind_prompts(*read, prompts, datasets)
    for found, query, document in zip(sets, ("q: ", "c: "), ("d: ", ""), strict=True):
        assert all(texts.texts[n].startswith(query) for n in found.queries)
        assert [texts.texts[n] for n in found.corpus] == [
            document + read[0].texts[n] for n in read[1][0].corpus
        ]


def test_the_script_takes_prompts_of_a_config_and_names_what_has_none(folders, tmp_path, capsys):
    row = {"query": TEXTS[0], "passage": TEXTS[1], "negatives": [TEXTS[5]]}
    (tmp_path / "data").mkdir()
    for name in ("articles", "others"):
        (tmp_path / "data" / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    nothing = {"prompt": "", "passage_prompt": ""}
    datasets = {"others": {"prompt": "c: "}, "articles": nothing}
    (tmp_path / "config.json").write_text(json.dumps({"datasets": datasets}))
    flags = {"--model": folders / "shared", "--data": tmp_path / "data"}
    flags |= {"--output": tmp_path / "out", "--config": tmp_path / "config.json"}
    words = [str(word) for flag in flags.items() for word in flag]
    sizes = ["--depth", "1", "--dim", "16", "--device", "cpu"]
    assert load_script("evaluate").main([*words, *sizes]) == 0
    assert "no prompt stood in front of the texts of articles\n" in capsys.readouterr().err
    used = json.loads((tmp_path / "out" / "evaluation.json").read_text())["model"]["prompts_used"]
    assert used["others"]["query"] == "c: "
    assert used["articles"] == {"query": "", "document": ""}
