"""mteb's tasks on cuts of a tiny model, offline: a task of one's own over the embedded corpus."""

import dataclasses
import functools
import importlib.util
import json
import os
import shutil
import signal
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow.compute as pc
import pytest
from helpers.tiny_models import DIMS, LAYERS, PROMPTS, RANK, make_tokenizer, write_model
from helpers.tiny_runs import Launch, dying, victim

import ml_embed.evaluation.mteb
from ml_embed import Embedder
from ml_embed.commands import evaluate_mteb as script
from ml_embed.commands import import_prompts
from ml_embed.config import DatasetConfig, load_datasets
from ml_embed.distributed.shares import Rows
from ml_embed.errors import UserError
from ml_embed.evaluation import cube
from ml_embed.evaluation.benchmark_texts import texts_of_tasks
from ml_embed.evaluation.contamination import WHOLE_TEXT, BenchmarkIndex, search_dataset
from ml_embed.evaluation.cube import evaluate_cube
from ml_embed.evaluation.mteb import evaluate_mteb, find_tasks, require_mteb, text_tasks
from ml_embed.model_folders.record import ModelRecord, Origin, TrainedOn
from ml_embed.prepare.prompts import prompt_of_input
from ml_embed.prepare.raw import RawDataset
from ml_embed.prepare.raw_parquet import write_raw
from ml_embed.prepare.rows import RawRow
from ml_embed.prepare.tokenizer import TextTokenizer
from ml_embed.reports.tables import summary_table
from ml_embed.sample_data.corpus import load_articles

pytest.importorskip("mteb")
from datasets import Dataset
from mteb.abstasks import AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.aggregate_task_metadata import AggregateTaskMetadata
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata

CUTS = {"ranks": [16], "depths": [1, 3], "dims": [8, 64]}
DESCRIBED = {
    "description": "Which article of the Universal Declaration is the same in another language?",
    "reference": "https://www.un.org/en/universal-declaration-human-rights/",
    "category": "t2t",
    "eval_splits": ["test"],
    "eval_langs": ["eng-Latn", "fra-Latn"],
    "date": ("1948-12-10", "1948-12-10"),
    "dialect": [],
    "domains": ["Legal"],
    "task_subtypes": [],
    "license": "not specified",
    "annotations_creators": "derived",
    "modalities": ["text"],
    "sample_creation": "found",
    "bibtex_citation": "",
}


@functools.cache
def pairs() -> list[tuple[str, str]]:
    """(English, French) articles."""
    english, french = (
        {
            row["article"]: row["text"]
            for row in load_articles().filter(pc.field("code") == code).to_pylist()
        }
        for code in ("eng", "fra")
    )
    return [
        (english[number].strip(), french[number].strip())
        for number in sorted(english.keys() & french.keys())
    ]


class SampleRetrieval(AbsTaskRetrieval):
    """Each English article searches the French ones."""

    metadata = TaskMetadata(
        name="SampleRetrieval",
        type="Retrieval",
        main_score="ndcg_at_10",
        dataset={"path": "ml_embed/sample_data", "revision": "1"},
        **DESCRIBED,
    )

    def load_data(self, **kwargs) -> None:
        queries = [{"id": f"q{i}", "text": english} for i, (english, _) in enumerate(pairs())]
        corpus = [{"id": f"d{i}", "text": french} for i, (_, french) in enumerate(pairs())]
        relevant = {f"q{i}": {f"d{i}": 1} for i in range(len(queries))}
        data = RetrievalSplitData(
            queries=Dataset.from_list(queries),
            corpus=Dataset.from_list(corpus),
            relevant_docs=relevant,
            top_ranked=None,
        )
        self.dataset = {"default": {"test": data}}
        self.data_loaded = True


class SampleTitles(SampleRetrieval):
    """The same with the beginnings of the French articles."""

    metadata = SampleRetrieval.metadata.model_copy(update={"name": "SampleTitles"})

    def load_data(self, **kwargs) -> None:
        super().load_data()
        data = self.dataset["default"]["test"]
        data["corpus"] = data["corpus"].map(lambda row: {"text": row["text"][:20]})


class SampleSTS(AbsTaskSTS):
    """Texts without a role; more alike where the articles' numbers are close."""

    metadata = TaskMetadata(
        name="SampleSTS",
        type="STS",
        main_score="cosine_spearman",
        dataset={"path": "ml_embed/sample_data", "revision": "1"},
        **DESCRIBED,
    )
    min_score, max_score = 0, 30

    def load_data(self, **kwargs) -> None:
        texts = [english for english, _ in pairs()]
        rows = [
            {
                "sentence1": texts[i],
                "sentence2": texts[3 * i % 30],
                "score": 30 - abs(i - 3 * i % 30),
            }
            for i in range(30)
        ]
        self.dataset = {"test": Dataset.from_list(rows)}
        self.data_loaded = True


class SampleLanguages(SampleRetrieval):
    """Subsets of one language and of a pair, each another slice of the articles."""

    SUBSETS: ClassVar = {
        "en": ["eng-Latn"],
        "fr": ["fra-Latn"],
        "fr-en": ["fra-Latn", "eng-Latn"],
        "zh": ["zho-Hans"],
    }
    metadata = SampleRetrieval.metadata.model_copy(
        update={"name": "SampleLanguages", "eval_langs": SUBSETS}
    )

    def load_data(self, **kwargs) -> None:
        super().load_data()
        whole = self.dataset["default"]["test"]
        self.dataset = {
            name: {
                "test": whole
                | {
                    "queries": whole["queries"].select(range(3 * number, 3 * number + 8)),
                    "relevant_docs": {
                        f"q{i}": {f"d{i}": 1} for i in range(3 * number, 3 * number + 8)
                    },
                }
            }
            for number, name in enumerate(self.SUBSETS)
            if name in self.hf_subsets
        }


class SamplePictures(SampleRetrieval):
    """Not of text alone."""

    metadata = SampleRetrieval.metadata.model_copy(
        update={"name": "SamplePictures", "modalities": ["text", "image"]}
    )


class Unreachable(SampleRetrieval):
    """What a task of the hub does without a network."""

    metadata = SampleRetrieval.metadata.model_copy(update={"name": "Unreachable"})

    def load_data(self, **kwargs) -> None:
        raise ConnectionError("Couldn't reach 'ml_embed/sample_data' on the Hub\nlong trace")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("mteb") / "model", make_tokenizer())


@pytest.fixture(scope="module")
def evaluated(folder):
    """The summary of two tasks at four cuts, and where it lies."""
    output = folder.parent / "results"
    tasks = [SampleRetrieval(), SampleSTS()]
    return evaluate_mteb(folder, tasks, output, **CUTS, device="cpu", progress=False), output


def own_ndcg(folder: Path, tmp_path: Path, prompt: str) -> dict[tuple, float]:
    """Cut -> nDCG@10 by this project's own evaluation, of a copy that has this prompt alone."""
    folder = shutil.copytree(folder, tmp_path / "copy", dirs_exist_ok=True)
    prompts = {"prompts": {"query": prompt}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    rows = [{"query": query, "passage": passage, "negatives": []} for query, passage in pairs()]
    data = tmp_path / "articles.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = evaluate_cube(folder, data, *CUTS.values(), device="cpu", progress=False)
    return {(row["rank"], row["depth"], row["dim"]): row["ndcg@10"] for row in result["rows"]}


def scores(summary: dict, task: str) -> dict[tuple, float]:
    return {
        (row["rank"], row["depth"], row["dim"]): row["score"]
        for row in summary["rows"]
        if row["task"] == task
    }


def test_retrieval_scores_are_those_of_our_own_evaluation(evaluated, folder, tmp_path):
    """Behind the folder's prompt for queries, which matters."""
    expected = own_ndcg(folder, tmp_path, PROMPTS["query"])
    assert scores(evaluated[0], "SampleRetrieval") == pytest.approx(expected, abs=1e-4)
    assert len(set(expected.values())) == 4
    assert expected != pytest.approx(own_ndcg(folder, tmp_path, ""), abs=1e-3)


def test_flags_take_the_place_of_the_folders_prompts(folder, tmp_path):
    cuts = {"ranks": [16], "depths": [1], "dims": [8]}
    for number, prompt in enumerate(("", "find: ")):
        summary = evaluate_mteb(
            folder,
            [SampleRetrieval()],
            tmp_path,
            **cuts,
            query_prompt=prompt,
            device="cpu",
            progress=False,
        )
        own = own_ndcg(folder, tmp_path, prompt)[16, 1, 8]
        assert scores(summary, "SampleRetrieval") == {(16, 1, 8): pytest.approx(own, abs=1e-4)}
        assert summary["prompts"] == {"folder": PROMPTS, "given": {"query": prompt}}
        assert len(list((tmp_path / "results").glob("*/*/experiments"))) == number + 1, "kept apart"


def test_texts_without_a_role_have_no_query_prompt(evaluated, folder):
    from scipy.stats import spearmanr

    task = SampleSTS()
    task.load_data()
    rows = task.dataset["test"]
    model = Embedder.from_pretrained(folder, rank=16, depth=1, dim=8, device="cpu")
    cosines = (model.encode(list(rows["sentence1"])) * model.encode(list(rows["sentence2"]))).sum(1)
    expected = spearmanr(np.array(rows["score"]), cosines)[0]
    assert scores(evaluated[0], "SampleSTS")[16, 1, 8] == pytest.approx(expected, abs=1e-4)


def test_a_prompt_named_after_a_task_or_its_type_goes_before_one_for_queries(folder):
    from mteb.types import PromptType

    from ml_embed.evaluation.mteb import TaskPrompts

    retrieval, sts = SampleRetrieval.metadata, SampleSTS.metadata
    prompts = {"query": "q: ", "STS": "s: ", "SampleRetrieval": "t: "}
    assert TaskPrompts(prompts, {}).text(retrieval, PromptType.query) == "t: "
    assert TaskPrompts(prompts, {"query": "given: "}).text(retrieval, PromptType.query) == "given: "
    assert TaskPrompts(prompts, {"query": "given: "}).text(sts, None) == "s: "
    assert TaskPrompts({"query": "q: "}, {}).text(retrieval, PromptType.document) == ""


def test_a_configs_prompts_go_before_the_folders(folder, tmp_path, capsys, monkeypatch):
    """By the name of a task or a pattern; what the config leaves out is the folder's."""
    from mteb.types import PromptType

    from ml_embed.evaluation.mteb import TaskPrompts

    query, document = PromptType.query, PromptType.document
    half = DatasetConfig(prompt="c: ", passage_prompt="p: ", passage_prompt_share=0.5)
    datasets = {"SampleRet*": half, "SampleSTS": DatasetConfig(prompt="")}
    prompts = TaskPrompts({"query": "q: ", "document": "d: ", "STS": "s: "}, {}, datasets)
    assert prompts.of_task(SampleRetrieval()) == {"query": "c: ", "document": "d: "}
    assert prompts.of_task(SampleSTS()) == {"text": ""}
    assert prompts.of_task(SampleTitles()) == {"query": "q: ", "document": "d: "}
    given = dataclasses.replace(prompts, given={"query": "g: "})
    assert given.text(SampleRetrieval.metadata, query) == "g: "
    whole = dataclasses.replace(half, passage_prompt_share=1.0)
    named = dataclasses.replace(prompts, datasets={"SampleRetrieval": whole})
    assert named.text(SampleRetrieval.metadata, document) == "p: "

    tasks = [SampleRetrieval(), SampleSTS()]
    monkeypatch.setattr(ml_embed.evaluation.mteb, "find_tasks", lambda *_: tasks)
    config = tmp_path / "prompts.json"
    config.write_text(json.dumps({"datasets": {"SampleRet*": {"prompt": "find: "}}}))
    flags = ["--model", folder, "--output", tmp_path / "out", "--device", "cpu", "--tasks", "x"]
    sizes = ["--rank", 16, "--depth", 1, "--dim", 8]
    assert script.main([str(f) for f in (*flags, *sizes, "--config", config)]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    own = own_ndcg(folder, tmp_path, "find: ")[16, 1, 8]
    assert scores(summary, "SampleRetrieval") == {(16, 1, 8): pytest.approx(own, abs=1e-4)}
    assert summary["prompts"]["config"] == {"SampleRet*": {"query": "find: "}}
    assert summary["prompts_used"]["SampleRetrieval"]["query"] == "find: "
    assert "no prompt stood in front of the texts of SampleSTS" in capsys.readouterr().err
    config.write_text(json.dumps({"datasets": {"a": {"promt": "x"}}}))
    assert script.main([str(f) for f in (*flags, *sizes, "--config", config)]) == 2
    assert "datasets.a.promt: unknown key; did you mean 'prompt'?" in capsys.readouterr().err
    config.write_text("{}")
    assert script.main([str(f) for f in (*flags, *sizes, "--config", config)]) == 2
    assert "has no key datasets" in capsys.readouterr().err


class Recorded:
    """Stands in for sentence-transformers: keeps the prompts that mteb's own wrapper passes on."""

    def __init__(self, *args, **kwargs):
        self.prompts = []

    def encode(self, texts, prompt=None, **kwargs):
        self.prompts.append(prompt)
        return np.zeros((len(texts), 2))


def test_mtebs_table_of_prompts_becomes_datasets(tmp_path, capsys, monkeypatch):
    """As mteb's own wrapper of that model puts them in front."""
    import mteb
    import sentence_transformers
    from mteb.types import PromptType
    from torch.utils.data import DataLoader

    name, output = "codefuse-ai/F2LLM-v2-0.6B", tmp_path / "prompts.json"
    tasks = ["SciFact", "STS22.v2", "Banking77Classification", "ArXivHierarchicalClusteringP2P"]
    assert import_prompts.main(["--model", name, "--tasks", *tasks, "--output", str(output)]) == 0
    datasets = load_datasets(output)
    assert datasets.keys() == set(tasks)
    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", Recorded)
    meta = mteb.get_model_meta(name, fetch_from_hf=False)
    wrapper = meta.loader(name, "main", **meta.loader_kwargs)
    for task, roles in zip(
        tasks, ([PromptType.query, PromptType.document], [None], [None], [None]), strict=True
    ):
        for role in roles:
            wrapper.encode(
                DataLoader(Dataset.from_list([{"text": "x"}])),
                task_metadata=mteb.get_task(task).metadata,
                hf_split="test",
                hf_subset="default",
                prompt_type=role,
            )
            kind = "document" if role == PromptType.document else "query"
            own = prompt_of_input(task, kind, datasets)
            assert own == (wrapper.model.prompts[-1] or "")
    assert datasets["SciFact"].prompt.startswith("Instruct: ")
    assert datasets["SciFact"].passage_prompt == ""
    assert len({settings.prompt for settings in datasets.values()}) > 2
    for model, message in (
        ("nobody/nothing", "mteb has no such model"),
        ("BAAI/bge-m3", "holds no table of prompts"),
    ):
        flags = ["--model", model, "--tasks", "SciFact", "--output", str(output)]
        assert import_prompts.main(flags) == 2
        assert message in capsys.readouterr().err


def test_mteb_reads_its_own_result_files(evaluated):
    from mteb import ResultCache

    summary, output = evaluated
    files = sorted((output / "results").rglob("Sample*.json"))
    assert len(files) == len(summary["rows"]) == 8
    found = ResultCache(output).load_results(
        tasks=[SampleRetrieval(), SampleSTS()], include_remote=False, load_experiments="match_name"
    )
    assert {result.model_name for result in found.model_results} == {f"{output.parent.name}/model"}
    kept = {
        file.parent.name: json.loads(file.read_text())
        for file in files
        if file.stem == "SampleRetrieval"
    }
    for (rank, depth, dim), score in scores(summary, "SampleRetrieval").items():
        result = kept[f"depth_{depth}__dim_{dim}__rank_{rank}"]
        assert result["scores"]["test"][0]["main_score"] == pytest.approx(score)
    assert json.loads((output / "summary.json").read_text()) == summary
    assert not list(output.glob(".vectors-*"))


def test_an_aggregate_is_put_together_from_its_parts(evaluated, folder):
    """Its score is the mean of theirs, and they are computed like any other task."""
    described = {
        key: value
        for key, value in DESCRIBED.items()
        if key in ("description", "reference", "bibtex_citation")
    }
    metadata = AggregateTaskMetadata(
        name="SampleAggregate",
        type="Retrieval",
        main_score="ndcg_at_10",
        tasks=[SampleRetrieval(), SampleTitles()],
        eval_splits=["test"],
        **described,
    )
    task = type("SampleAggregate", (AbsTaskAggregate,), {"metadata": metadata})()
    output = folder.parent / "aggregated"
    cuts = {"ranks": [16], "depths": [1], "dims": [8, 64]}
    summary = evaluate_mteb(
        folder, [task, *metadata.tasks], output, **cuts, device="cpu", progress=False
    )
    whole, one, other = (
        scores(summary, name) for name in ("SampleAggregate", "SampleRetrieval", "SampleTitles")
    )
    assert one != other
    assert whole == pytest.approx({cut: (one[cut] + other[cut]) / 2 for cut in one})
    assert one == pytest.approx({cut: scores(evaluated[0], "SampleRetrieval")[cut] for cut in one})


def test_a_row_says_what_its_cut_costs(evaluated, folder):
    row = next(
        row for row in evaluated[0]["rows"] if (row["rank"], row["depth"], row["dim"]) == (16, 1, 8)
    )
    model = Embedder.from_pretrained(folder, rank=16, depth=1, dim=8, device="cpu")
    held = sum(parameter.numel() for parameter in model._encoder.parameters())
    assert (row["parameters"], row["bytes_per_vector"], row["trained"]) == (held, 32, True)
    table = summary_table(evaluated[0]).splitlines()
    assert len(table) == 1 + 4
    assert table[0].split() == ["cut", "parameters", "SampleRetrieval", "SampleSTS", "mean"]
    assert f"{row['parameters']:,}" in table[1]


def test_texts_are_encoded_once_per_rank_and_nothing_is_computed_twice(
    folder, tmp_path, monkeypatch
):
    calls = []
    encode = ml_embed.evaluation.mteb.encode_all_exits
    monkeypatch.setattr(
        ml_embed.evaluation.mteb,
        "encode_all_exits",
        lambda *given: calls.append(given[3]) or encode(*given),
    )
    options = {"device": "cpu", "progress": False}
    cuts = {"ranks": [16, 32], "depths": [1], "dims": [8, 64]}
    first = evaluate_mteb(folder, [SampleRetrieval()], tmp_path, **cuts, **options)
    assert calls == [16, 16, 32, 32], "queries and documents"
    assert evaluate_mteb(folder, [SampleRetrieval()], tmp_path, **cuts, **options) == first
    assert len(calls) == 4
    more = evaluate_mteb(
        folder, [SampleRetrieval()], tmp_path, ranks=[16], depths=[1], dims=[8, 16], **options
    )
    assert calls[4:] == [16, 16], "only the cut that was not there"
    assert scores(more, "SampleRetrieval")[16, 1, 8] == scores(first, "SampleRetrieval")[16, 1, 8]
    evaluate_mteb(
        folder,
        [SampleRetrieval()],
        tmp_path,
        ranks=[16],
        depths=[1],
        dims=[8],
        overwrite=True,
        **options,
    )
    assert calls[6:] == [16, 16]


def main_of_a_sample(arguments: list[str]) -> int:
    """The command on a task of our own, in blocks of a few texts; the victim dies."""
    ml_embed.evaluation.mteb.find_tasks = lambda *_: [SampleRetrieval()]
    cube.BLOCK = 4
    if "VICTIM" in os.environ:
        Rows._write = dying(Rows._write)
    return script.main(arguments)


@pytest.mark.slow
def test_the_processes_of_a_launch_encode_together(folder, evaluated, tmp_path):
    """Also what a launch left that lost a process. The tasks run on the first one."""
    cuts = ["--rank", "16", "--depth", "1", "3", "--dim", "8", "64"]
    flags = ["--model", folder, "--output", tmp_path / "out", "--tasks", "SampleRetrieval", *cuts]
    broken = Launch(tmp_path / "1", flags, 2, main=main_of_a_sample, environment=victim(tmp_path))
    assert broken.wait() == [2, -signal.SIGKILL], broken.printed()
    kept = list((tmp_path / "out" / ".vectors").glob("*.vectors"))
    assert len(kept) == 1
    again = Launch(tmp_path / "3", flags, 3, main=main_of_a_sample)
    assert again.wait() == [0, 0, 0], again.printed()
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert scores(summary, "SampleRetrieval") == pytest.approx(
        scores(evaluated[0], "SampleRetrieval"), abs=1e-6
    )
    assert not (tmp_path / "out" / ".vectors").exists()
    assert again.outputs[0].read_text().splitlines()[-1].startswith("all numbers: ")


def test_the_script_prints_a_table_of_the_whole_model(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        ml_embed.evaluation.mteb, "find_tasks", lambda names, *_: [SampleRetrieval()]
    )
    flags = ["--model", str(folder), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert script.main([*flags, "--tasks", "SampleRetrieval"]) == 0
    assert f"depth {LAYERS}, dim {DIMS[0]}, rank {RANK}" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "out" / "summary.json").read_text())["rows"]
    assert (row["rank"], row["depth"], row["dim"]) == (RANK, LAYERS, DIMS[0])


def test_mistakes_at_the_command_line(folder, tmp_path, capsys, monkeypatch):
    flags = ["--model", str(folder), "--output", str(tmp_path / "out")]
    assert script.main(flags) == 2
    assert "give --tasks or --benchmark" in capsys.readouterr().err
    assert (
        script.main([*flags, "--tasks", "SciFcat", "NFCorpu", "--benchmark", "MTEB(nothing)"]) == 2
    )
    printed = capsys.readouterr().err
    assert all(
        name in printed for name in ("'SciFcat'", "'SciFact'", "'NFCorpus'", "'MTEB(nothing)'")
    ), printed
    assert script.main([*flags, "--tasks", "SciFact", "--languages", "fra"]) == 2
    assert "no task is in the languages fra" in capsys.readouterr().err
    assert script.main([*flags, "--tasks", "SciFact", "--dim", "65"]) == 2
    assert "dim 65 is not possible" in capsys.readouterr().err
    monkeypatch.setattr(ml_embed.evaluation.mteb, "find_tasks", lambda *_: [Unreachable()])
    assert script.main([*flags, "--tasks", "Unreachable"]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert (
        "task Unreachable: its data 'ml_embed/sample_data' could not be loaded (ConnectionError"
        in message
    )
    assert not list((tmp_path / "out").rglob("*.json"))


def of_subsets(file: Path) -> dict[str, float]:
    """Subset -> score, as mteb's result file has them."""
    (splits,) = json.loads(file.read_text())["scores"].values()
    return {scores["hf_subset"]: scores["main_score"] for scores in splits}


def test_each_language_has_a_score_of_its_own(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        ml_embed.evaluation.mteb,
        "find_tasks",
        lambda *_: [SampleLanguages(), SampleRetrieval(), SamplePictures()],
    )
    flags = ["--model", str(folder), "--output", str(tmp_path), "--device", "cpu", "--tasks", "x"]
    flags += ["--dim", "8", str(DIMS[0]), "--only-text", "--name", "ada/nested"]
    assert script.main(flags) == 0
    printed = capsys.readouterr()
    assert "left out, since they are not of text alone: SamplePictures" in printed.err
    rows = json.loads((tmp_path / "summary.json").read_text())["rows"]
    assert [row["task"] for row in rows] == ["SampleLanguages"] * 2 + ["SampleRetrieval"] * 2
    for row, place in zip(rows[:2], ("*/experiments/*dim_8_*", "*"), strict=True):
        (file,) = (tmp_path / "results" / "ada__nested").glob(f"{place}/SampleLanguages.json")
        of = of_subsets(file)
        assert len(set(of.values())) >= 3
        expected = {
            "eng-Latn": {"score": (of["en"] + of["fr-en"]) / 2, "subsets": 2},
            "fra-Latn": {"score": (of["fr"] + of["fr-en"]) / 2, "subsets": 2},
            "zho-Hans": {"score": of["zh"], "subsets": 1},
        }
        for code, found in row["languages"].items():
            assert found == pytest.approx(expected.pop(code)), code
        assert not expected
        assert row["score"] == pytest.approx(np.mean(list(of.values())))
    lines = printed.out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("SampleLanguages "))
    assert [line.split()[0] for line in lines[start + 1 : start + 5]] == [
        "eng-Latn",
        "fra-Latn",
        "zho-Hans",
        "task",
    ]
    scores = [row["languages"]["zho-Hans"]["score"] for row in rows[:2]]
    assert lines[start + 3].split()[1:] == ["1", *(f"{score:.4f}" for score in scores)]


def test_only_the_languages_that_are_asked_for_are_told(folder, tmp_path):
    task = SampleLanguages().filter_languages(["fra", "zho-Hans"])
    options = {"device": "cpu", "progress": False, "languages": ["fra", "zho-Hans"]}
    (row,) = evaluate_mteb(folder, [task], tmp_path, **options)["rows"]
    assert row["languages"].keys() == {"fra-Latn", "zho-Hans"}, "the pair holds English too"
    assert row["languages"]["fra-Latn"]["subsets"] == 2


def test_a_leaderboard_finds_the_whole_model_and_its_training_data(folder, tmp_path):
    trained = shutil.copytree(folder, tmp_path / "trained")
    record = ModelRecord.load(trained)
    known = TrainedOn("MIRACL"), TrainedOn("faq")
    origin = Origin("Qwen/Qwen3-0.6B", "mit", trained_on=known, all_data_known=True)
    dataclasses.replace(record, origin=origin).save(trained)
    evaluate_mteb(trained, [SampleRetrieval()], tmp_path, device="cpu", progress=False, name="a/b")
    (place,) = (tmp_path / "results" / "a__b").iterdir()
    assert (place / "SampleRetrieval.json").is_file()
    meta = json.loads((place / "model_meta.json").read_text())
    assert sorted(meta["training_datasets"]) == ["MIRACL", "faq"]
    assert (meta["name"], meta["license"], meta["adapted_from"]) == (
        "a/b",
        "mit",
        origin.base_model,
    )
    assert (meta["embed_dim"], meta["max_tokens"]) == (DIMS[0], record.max_seq_length)
    assert meta["n_embedding_parameters"] == RANK * (448 + DIMS[0])
    assert meta["use_instructions"]


def test_benchmarks_that_mtebs_register_lacks_are_found():
    tasks, others = text_tasks(find_tasks([], "MTEB(Africa, v1)", ["swa", "yor"]))
    assert "SIB200Classification" in {task.metadata.name for task in tasks}
    assert not {task.metadata.name for task in tasks} & set(others)


def test_languages_choose_among_a_tasks_subsets():
    (task,) = find_tasks(["STS22.v2"], languages=["fra"])
    assert set(task.hf_subsets) == {"fr", "de-fr", "fr-pl"}
    (same,) = find_tasks(["STS22.v2", "STS22.v2"])
    assert len(same.hf_subsets) > 3


def test_pictures_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"not of text alone.*Flickr30kT2IRetrieval"):
        evaluate_mteb(folder, find_tasks(["Flickr30kT2IRetrieval"]), tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_texts_of_tasks_are_found_in_training_data(tmp_path):
    tokenizer = TextTokenizer(make_tokenizer(), WHOLE_TEXT)
    english, french = pairs()[4]
    write_raw(tmp_path / "leak.parquet", [RawRow("mine", "too", []), RawRow(english, french, [])])
    tasks = [SampleRetrieval(), SampleSTS(), SampleLanguages()]
    index = BenchmarkIndex(texts_of_tasks(tasks), tokenizer)
    found = search_dataset(RawDataset("leak", tmp_path / "leak.parquet"), index)
    assert found.matching == [1]
    exact = {
        (match.place.task, match.place.language, match.role): len(numbers)
        for match, numbers in found.texts.items()
        if found.counts[match, "exact"]
    }
    assert exact["SampleRetrieval", "eng-Latn+fra-Latn", "query"] >= 1
    assert exact["SampleRetrieval", "eng-Latn+fra-Latn", "pair"] >= 1
    assert exact["SampleSTS", "eng-Latn+fra-Latn", "query"] >= 1
    assert exact["SampleLanguages", "fra-Latn", "pair"] >= 1, "queries 3 to 10"
    assert ("SampleLanguages", "zho-Hans", "query") not in exact, "queries 9 to 16"
    sizes = {(m.place.task, m.place.language, m.role): n for m, n in index.sizes.items()}
    assert sizes["SampleRetrieval", "eng-Latn+fra-Latn", "pair"] == len(pairs())
    assert sizes["SampleLanguages", "zho-Hans", "pair"] == 8


def test_without_mteb_there_is_a_line_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'ml-embed\[mteb\]'"):
        require_mteb()


def test_a_cut_is_a_model_for_mteb(evaluated, folder):
    import mteb

    cut = ml_embed.evaluation.mteb.model(folder, rank=16, depth=1, dim=8, device="cpu")
    found = mteb.evaluate(cut, SampleRetrieval(), cache=None, co2_tracker=False)
    expected = scores(evaluated[0], "SampleRetrieval")[16, 1, 8]
    assert found.task_results[0].get_score() == pytest.approx(expected, abs=1e-6)
    meta = cut.mteb_model_meta
    assert (meta.embed_dim, meta.max_tokens) == (8, 48)
    assert meta.revision == evaluated[0]["revision"]
    with pytest.raises(UserError, match="dim 9 was not trained"):
        ml_embed.evaluation.mteb.model(folder, dim=9)
