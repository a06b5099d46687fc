"""Suites of a replication: which tasks of mteb, in which languages, and what is known of both.

mteb is optional and slow to import, so it is imported where it is used.
"""

import contextlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_embed.errors import UserError
from ml_embed.evaluation.mteb import require_mteb
from ml_embed.files.digests import digests_of, value_digest
from ml_embed.model_folders.record import Origin
from ml_embed.prepare.beir import is_beir, read_collection

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask

NANO = (
    *("ArguAna", "ClimateFever", "DBPedia", "FEVER", "FiQA2018", "HotpotQA", "MSMARCO"),
    *("NFCorpus", "NQ", "Quora", "SCIDOCS", "SciFact", "Touche2020"),
)
SUITES = {
    "nano": tuple(f"MultilingualNano{name}Retrieval" for name in NANO),
    "miracl-hn": ("MIRACLRetrievalHardNegatives.v2",),
    "miracl": ("MIRACLRetrieval",),
    "belebele": ("BelebeleRetrieval",),
}
"""suite -> names of mteb's tasks"""
OWN = "own"
"""The suite of the user's own folders in BEIR's form, one per language."""
OWN_SPLIT = "test"
LANGUAGE = re.compile(r"[a-z]{3}-[A-Z][a-z]{3}")

RESOURCE_CLASSES = {
    5: "ara zho eng fra deu jpn spa",
    4: "fas fin hin ita kor por rus swe",
    3: "ben ind tha",
    2: "swa yor",
    1: "tel nor",
}
"""How much data there is of a language: classes of Joshi et al., The State and Fate of Linguistic
Diversity and Inclusion in the NLP World (2020), lang2tax.txt; of the languages of MIRACL and of the
nano tasks."""
SAME_SOURCE = {"miracl": ("mrtydi", "tydi", "tydiqa"), "belebele": ("flores", "flores200")}
"""task -> data that it was made from or of: MIRACL extends Mr. TyDi, which is TyDi QA's questions;
Belebele asks about passages of FLORES-200"""


@dataclass(frozen=True)
class Part:
    """A task in one language: what is loaded, searched and scored at once."""

    task: "AbsTask"
    """of this language alone"""
    language: str
    """with its script, as mteb writes it: swa-Latn"""
    subset: str
    source: dict[str, str]
    """where its data comes from: "path" and "revision"; of own folders a digest"""

    @property
    def name(self) -> str:
        return self.task.metadata.name

    @property
    def split(self) -> str:
        (split,) = self.task.eval_splits
        return split

    def described(self) -> dict[str, int | None]:
        """Queries and documents, where that is known before the data is loaded."""
        stats: Any = self.task.metadata.descriptive_stats or {}
        own = stats.get(self.split, {}).get("hf_subset_descriptive_stats", {}).get(self.subset, {})
        return {kind: own.get(f"num_{kind}") for kind in ("queries", "documents")}


def find_parts(
    suite: str, languages: Sequence[str] | None = None, data: Path | None = None
) -> list[Part]:
    """The tasks of a suite in each language, both queries and documents in it.

    Args:
        suite: a key of SUITES, or OWN.
        languages: ISO 639-3 codes, with or without script; None is all.
        data: of OWN, the folder with a folder in BEIR's form for each language.
    Raises:
        UserError: mteb is missing, no task has one of the languages, or `data` is no such folder.
    """
    require_mteb()
    parts = _own_parts(data) if suite == OWN else _parts_of_mteb(SUITES[suite])
    known = dict.fromkeys(part.language for part in parts)
    for language in languages or ():
        if not any(_is(code, language) for code in known):
            raise UserError(
                f"--languages {language}: the suite {suite} has no such language; it has "
                + ", ".join(known)
            )
    if languages is None:
        return parts
    return [part for part in parts if any(_is(part.language, each) for each in languages)]


def _is(code: str, language: str) -> bool:
    return language in (code, code.partition("-")[0])


def _parts_of_mteb(names: Iterable[str]) -> list[Part]:
    import mteb

    parts = []
    for name in names:
        metadata = mteb.get_task(name).metadata
        source = {key: metadata.dataset[key] for key in ("path", "revision")}
        for subset, codes in metadata.hf_subsets_to_langscripts.items():
            if len(set(codes)) == 1:  # else queries and documents are in different languages
                # A task of its own, so that no other language is loaded with it.
                task = mteb.get_task(name, hf_subsets=[subset])
                parts.append(Part(task, codes[0], subset, source))
    return parts


def _own_parts(data: Path | None) -> list[Part]:
    if data is None:
        raise UserError("--suite own needs --data, a folder with one in BEIR's form per language")
    folders = sorted(path for path in data.glob("*") if path.is_dir() and is_beir(path))
    if not folders:
        raise UserError(
            f"--data {data} holds no folder in BEIR's form (corpus.jsonl, queries.jsonl, qrels/); "
            "it must hold one for each language, such as swa-Latn"
        )
    return [_own_part(data.name, folder) for folder in folders]


def _own_part(name: str, folder: Path) -> Part:
    """A folder as a task of mteb."""
    from datasets import Dataset
    from mteb.abstasks import AbsTaskRetrieval
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
    from mteb.abstasks.task_metadata import TaskMetadata

    content = digests_of(path for path in sorted(folder.rglob("*")) if path.is_file())
    digest = value_digest({str(path.relative_to(folder)): of for path, of in content.items()})

    class OwnRetrieval(AbsTaskRetrieval):
        """Queries and documents of a folder."""

        metadata = TaskMetadata(
            name=re.sub(r"\W", "_", name),
            type="Retrieval",
            category="t2t",
            main_score="ndcg_at_10",
            dataset={"path": str(folder), "revision": digest},
            description="A folder in BEIR's form.",
            eval_splits=[OWN_SPLIT],
            eval_langs={folder.name: [_language_of(folder)]},
            modalities=["text"],
        )

        def load_data(self, *args: Any, **kwargs: Any) -> None:
            read = read_collection(folder, OWN_SPLIT)
            texts = {"queries": read.queries, "corpus": read.documents}
            made = {
                kind: Dataset.from_dict({"id": list(of), "text": list(of.values())})
                for kind, of in texts.items()
            }
            split = RetrievalSplitData(**made, relevant_docs=read.relevant, top_ranked=None)
            self.dataset = {folder.name: {OWN_SPLIT: split}}
            self.data_loaded = True

    source = {"path": folder.name, "digest": digest}
    return Part(OwnRetrieval(), folder.name, folder.name, source)


def _language_of(folder: Path) -> str:
    """The language that a folder is named by. Raises UserError."""
    from mteb.languages import ISO_TO_LANGUAGE, ISO_TO_SCRIPT

    language, _, script = folder.name.partition("-")
    if not LANGUAGE.fullmatch(folder.name) or not (
        language in ISO_TO_LANGUAGE and script in ISO_TO_SCRIPT
    ):
        raise UserError(
            f"{folder} must be named by its language, with an ISO 639-3 code and its script, such "
            "as swa-Latn"
        )
    return folder.name


def resource_class(language: str) -> int | None:
    """The class of a language in RESOURCE_CLASSES; None for one that is not there."""
    code = language.partition("-")[0]
    return next((n for n, codes in RESOURCE_CLASSES.items() if code in codes.split()), None)


def training_rows(part: Part, origin: Origin) -> str:
    """Whether a model trained on rows of a task: yes, same source, no, or unknown.

    It goes by names alone: of the task and of those it was adapted from, of the datasets trained
    on and of their sources. "no" is said only where the folder knows all of them.
    """
    names = [name for item in origin.trained_on for name in (item.dataset, item.source) if name]
    trained = [re.split(r"[^a-z0-9]+", name.lower()) for name in names]
    if not trained or "digest" in part.source:
        return "unknown"
    own = {_stem(name) for name in _with_sources(part.name)}
    same = {name for each in own for name in SAME_SOURCE.get(each, ())}
    for answer, wanted in (("yes", own), ("same source", same)):
        if any(_holds(words, wanted) for words in trained):
            return answer
    return "no" if origin.all_data_known else "unknown"


def _with_sources(name: str) -> set[str]:
    """A task of mteb, and those that it was adapted from."""
    import mteb

    found, todo = set(), [name]
    while todo:
        if (task := todo.pop()) not in found:  # some name themselves
            found.add(task)
            with contextlib.suppress(KeyError):  # a data set that is no task
                todo += mteb.get_task(task).metadata.adapted_from or ()
    return found


def _stem(name: str) -> str:
    """What a task's data is called: MultilingualNanoFiQA2018Retrieval -> fiqa."""
    parts = (
        r"Multilingual|Nano|Retrieval|Reranking|HardNegatives|\.v\d+|(?<=\D)20\d\d$|[^A-Za-z0-9]"
    )
    return re.sub(r"20\d\d$", "", re.sub(parts, "", name)).lower()


def _holds(words: Sequence[str], wanted: set[str]) -> bool:
    """Whether neighbours among a name's words make one of the wanted names."""
    runs = (
        "".join(words[start:end])
        for start in range(len(words))
        for end in range(start + 1, len(words) + 1)
    )
    return any(run in wanted or _stem(run) in wanted for run in runs)
