"""The check of a replication: some of its rows are computed again, from texts to intervals."""

import contextlib
import math
import random
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_embed.distributed.collectives import compute_on_main_process
from ml_embed.errors import UserError
from ml_embed.evaluation.comparing import (
    ALL,
    BASELINE,
    adjust_over_languages,
    rows_of_language,
)
from ml_embed.evaluation.query_scores import METRICS, ScoreStore
from ml_embed.evaluation.replication import (
    Asked,
    Replication,
    Systems,
    about,
    scored_languages,
    versions,
    with_systems,
    without_nan,
)
from ml_embed.files.atomic import disk_errors_are_user_errors
from ml_embed.files.digests import seal_is_broken
from ml_embed.files.json_file import read_json
from ml_embed.model_folders.cut import Cut, single_axes
from ml_embed.notices import notice

SHARE, LEAST = 20, 3
"""One of so many rows is computed again, but at least so many."""
TOLERANCE = 1e-4
"""Largest difference of a score that is computed again, and of what is made of such scores."""
ROUNDING = 1e-9
"""Largest difference of what is made again of a file's own numbers."""
P_TOLERANCE = 0.02
MEASURED = ("texts_per_second", "p_holm", "verdict")
"""What is not compared row by row: speeds, and what hangs on all languages."""
PARTS = {"asked", "model", "versions", "tasks", "baselines", "rows", "macro", "seed"}
"""Keys of a result that are looked at."""
REMEDY = "give the replication.json that scripts/replicate.py wrote"


def read_replication(path: Path) -> dict[str, Any]:
    """What `replicate` wrote. Raises UserError for a file that it did not write so."""
    result = read_json(path, REMEDY)
    if seal_is_broken(result):
        raise UserError(f"{path} has changed since it was written: its digest is another one")
    if not result.keys() >= PARTS:
        raise UserError(f"{path} is no result of a replication; {REMEDY}")
    return result


def asked_in(result: Mapping[str, Any], places: Mapping[str, str | None]) -> Asked:
    """What was asked for, with model, data and config where they lie here."""
    here = {name: place for name, place in places.items() if place is not None}
    try:
        return Asked.of_json(result["asked"] | here)
    except TypeError as error:
        raise UserError(f'what the file says under "asked" is not so ({error}); {REMEDY}') from None


def verify(result: Mapping[str, Any], replication: Replication, seed: int) -> list[str]:
    """Compute a random twentieth of the rows of cuts again, at least three. A collective.

    It works in a temporary folder, which the machines of a launch have to share.

    Args:
        result: of `read_replication`.
        replication: the same, opened here.
        seed: of the choice of rows.
    Returns:
        what differs, a line each; empty if nothing does.
    """
    rows = [row for row in result["rows"] if BASELINE not in row]
    chosen = random.Random(seed).sample(rows, min(len(rows), max(LEAST, -(-len(rows) // SHARE))))

    for name, here in versions().items():
        if here != result["versions"].get(name):
            notice(f"{name}: {result['versions'].get(name)} in the file, {here} here")

    def finish(systems: Systems) -> dict[str, Any]:
        differences = list(_identities(result, replication, systems))
        for row in chosen if not differences else ():
            differences += _check_row(row, result, replication, systems, work)
        return {"differences": differences + list(_made_of_rows(result))}

    remedy = "Set TMPDIR to another folder."
    with (
        disk_errors_are_user_errors(Path(tempfile.gettempdir()), remedy),
        contextlib.ExitStack() as held,
    ):

        def make() -> Path:
            name = held.enter_context(tempfile.TemporaryDirectory(prefix="verifying-"))
            return Path(name)

        work = compute_on_main_process(make)
        return with_systems(replication, work, finish)["differences"]


def _identities(
    result: Mapping[str, Any], replication: Replication, systems: Systems
) -> Iterator[str]:
    """What is another model than it was."""
    told = {"the model or its prompts": result["model"]["revision"]} | result["baselines"]
    here = {"the model or its prompts": replication.revision}
    for name, revision in (here | systems.revisions(replication.asked)).items():
        if told.get(name) != revision:
            yield f"{name}: the file is about {told.get(name)}, here is {revision}"


def _check_row(
    row: Mapping[str, Any],
    result: Mapping[str, Any],
    replication: Replication,
    systems: Systems,
    work: Path,
) -> Iterator[str]:
    """The row made again from nothing, with the uncut model, single axes and baselines."""
    language, cut, whole = row["language"], Cut.of_row(row), replication.whole
    name = f"{language}, {cut}"
    notice(f"computing again: {name}")
    parts = replication.languages.get(language, [])
    cuts = sorted({cut, *single_axes(cut, whole), whole})
    if not parts or not set(cuts) <= systems.cuts.keys():
        yield f"{name}: no such row belongs to what was asked"
        return
    store = ScoreStore(work / "scores")
    systems.score(parts, store, cuts)
    told = {(task["task"], task["language"]): task for task in result["tasks"]}
    for task in about(replication, store, parts)["tasks"]:
        before = told.get((task["task"], task["language"]), {})
        for key in ("source", "digest", "queries", "documents"):
            if before.get(key) != task[key]:
                yield f"{task['task']}, {language}: {key} was {before.get(key)}, is {task[key]}"
    (scored,) = scored_languages(
        replication, [*(systems.cuts[each] for each in cuts), *systems.baselines], store, {}, parts
    )
    again = rows_of_language(scored, result["seed"])
    made = next(r for r in again if BASELINE not in r and Cut.of_row(r) == cut)
    yield from (f"{name}: {line}" for line in differing(row, without_nan(made)))
    for baseline in (r for r in again if BASELINE in r):
        kept = [
            r
            for r in result["rows"]
            if r["language"] == language and r.get(BASELINE) == baseline[BASELINE]
        ]
        for line in differing(kept[0] if kept else {}, without_nan(baseline)):
            yield f"{language}, {baseline[BASELINE]}: {line}"


def differing(
    before: Any, now: Any, where: str = "", tolerance: float = TOLERANCE
) -> Iterator[str]:
    """What is not the same in two JSON values, but for the rounding of numbers."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before | now:
            if key not in MEASURED:
                place = f"{where}.{key}" if where else key
                yield from differing(before.get(key), now.get(key), place, tolerance)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for number, pair in enumerate(zip(before, now, strict=True)):
            yield from differing(*pair, f"{where}[{number}]", tolerance)
    elif isinstance(before, float) and isinstance(now, float):
        if not abs(before - now) <= (P_TOLERANCE if where.endswith(".p") else tolerance):
            yield f"{where} was {before:.6g}, is {now:.6g}"
    elif before != now:
        yield f"{where} was {before}, is {now}"


def _made_of_rows(result: Mapping[str, Any]) -> Iterator[str]:
    """What the file says of all languages together, made again of its rows."""
    rows = [{**row, "against": _copied(row)} for row in result["rows"]]
    adjust_over_languages([row for row in rows if BASELINE not in row])
    for before, now in zip(result["rows"], rows, strict=True):
        for name, comparison in now["against"].items():
            for key in ("p_holm", "verdict"):
                place = f"{before['language']}, {Cut.of_row(before)}: against.{name}.{key}"
                now_is = without_nan(comparison[key])
                yield from differing(before["against"][name].get(key), now_is, place, ROUNDING)
    for macro in result["macro"]:
        members = [
            row
            for row in result["rows"]
            if row["language"] in macro["languages"] and _system(row) == _system(macro)
        ]
        for metric in METRICS:
            mean = math.fsum(row[metric] for row in members) / max(1, len(members))
            place = f"macro, {macro['group']}, {_system(macro)}: {metric}"
            yield from differing(macro[metric], mean, place, ROUNDING)
    languages = {row["language"] for row in result["rows"]}
    everything = [macro for macro in result["macro"] if macro["group"] == ALL]
    if any(set(macro["languages"]) != languages for macro in everything):
        yield f"macro, {ALL}: not the languages of the rows"


def _copied(row: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The comparisons of a row, with NaN where JSON has null."""
    return {
        name: comparison | {"p": math.nan if comparison["p"] is None else comparison["p"]}
        for name, comparison in row.get("against", {}).items()
    }


def _system(row: Mapping[str, Any]) -> str:
    return row[BASELINE] if BASELINE in row else str(Cut.of_row(row))
