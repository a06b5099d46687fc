"""Wrong input of every kind: it is taken or refused with one message, never a traceback or a hang.

A case spoils one file, or two, of a sound input of its kind, and runs a command that reads it.
"""

import bz2
import contextlib
import functools
import gzip
import io
import json
import lzma
import shutil
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
from faults.mutations import copy_of, spoil
from helpers import ROOT
from helpers.scripts import load_script
from helpers.tiny_runs import Launch
from helpers.tiny_world import TinyWorld, make_world

import run as run_script
import tokenize_data_qwen
from ml_embed.errors import exit_on_user_error

SECONDS = 60  # for what takes one or two
SILENT = {"report_to": []}


@functools.cache
def base(folder: Path) -> TinyWorld:
    """Sound input of every kind, made once."""
    folder.mkdir(parents=True)
    world = make_world(folder)
    settings = {"train_steps": 2, "checkpointing_steps": 1, "valid_fraction": 0, "datasets": {}}
    assert train(world, folder, **settings) == 0
    write_released(world)
    write_forms(folder / "forms")
    vectors = ["--model", world.backbone, "--tokenizer", world.backbone, "--device", "cpu"]
    vectors += ["--data", world.tokenized, "--output", folder / "vectors"]
    assert load_script("embed_teacher").main(list(map(str, vectors))) == 0
    return world


def train(world: TinyWorld, folder: Path, *flags: str, **settings) -> int:
    """One run in `folder`, of the data and start model there if there are any."""
    places = {"output_dir": folder / "runs", "tb_dir": folder / "tb", "cache_dir": folder / "cache"}
    spoilt = {"model_path": "backbone", "train_data_path": "tokenized"}
    places |= {key: folder / name for key, name in spoilt.items() if (folder / name).exists()}
    settings = {key: str(place) for key, place in places.items()} | settings
    path = world.write_config(folder / "config.json", "run", **settings)
    return run_script.main(["--config", str(path), *flags])


def write_released(world: TinyWorld) -> None:
    """The tokenized data in the layout of the original release."""
    folder = world.folder / "released"
    folder.mkdir()
    for path in sorted(world.tokenized.glob("*_query.parquet")):
        name = path.name.removesuffix("_query.parquet")
        corpus = pq.read_table(world.tokenized / f"{name}_corpus.parquet")
        ids = pa.array([f"{name}-{row}" for row in range(len(corpus))])
        pq.write_table(corpus.add_column(0, "doc_id", ids), folder / f"{name}_corpus.parquet")
        rows = pq.read_table(path).to_pylist()
        columns = {
            "query_input_ids": [row["query_input_ids"] for row in rows],
            "passage_input_ids": [f"{name}-{row['passage_doc_id']}" for row in rows],
        }
        for k in range(3):
            columns[f"negative_{k + 1}_input_ids"] = [
                f"{name}-{row['negative_doc_ids'][k]}" if k < len(row["negative_doc_ids"]) else None
                for row in rows
            ]
        pq.write_table(pa.table(columns), folder / path.name)


def write_forms(folder: Path) -> None:
    """The same few rows in every kind of file that is read, packed ones too."""
    folder.mkdir()
    rows = [
        {"query": f"river {n}", "passage": f"stone {n}", "negatives": [f"moon {n}", "light"]}
        for n in range(6)
    ]
    scored = [{**row, "query_id": f"q{n}", "score": n / 5} for n, row in enumerate(rows)]
    mined = [{**row, "pos_score": 0.9, "neg_scores": [0.5, 0.1]} for row in scored]
    flat = [[row["query"], row["passage"], row["negatives"][0]] for row in rows]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    for name, delimiter in (("commas.csv", ","), ("tabs.tsv", "\t")):
        table = [["query", "passage", "negative_1"], *flat]
        (folder / name).write_text("".join(delimiter.join(row) + "\n" for row in table))
    (folder / "lines.jsonl").write_bytes(lines)
    (folder / "list.json").write_text(json.dumps(rows))
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "packed.jsonl.xz").write_bytes(lzma.compress(lines))
    (folder / "packed.jsonl.bz2").write_bytes(bz2.compress(lines))
    with pa.OSFile(str(folder / "stream.arrow"), "wb") as file:
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    pq.write_table(pa.Table.from_pylist(scored), folder / "scored.parquet")
    pq.write_table(pa.Table.from_pylist(mined), folder / "mined.parquet")
    saved = folder / "saved"
    saved.mkdir()
    shutil.copy(folder / "stream.arrow", saved / "data-00000-of-00001.arrow")
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": "train"}
    (saved / "state.json").write_text(json.dumps(state))
    (saved / "dataset_info.json").write_text("{}")


# Kinds of input: each spoils something in the empty folder and gives a command that reads it.

Case = tuple[str, Callable[[], int]]


def spoil_some(random: Random, folder: Path) -> str:
    """One or two files of a folder, at any depth."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    chosen = random.sample(files, min(len(files), random.choice((1, 1, 1, 2))))
    return "; ".join(spoil(random, path) for path in chosen)


def config(random: Random, world: TinyWorld, folder: Path) -> Case:
    settings = world.config(
        output_dir=str(folder / "runs"), tb_dir=str(folder / "tb"), train_steps=1, **SILENT
    )
    path = folder / "config.json"
    path.write_text(json.dumps(settings, indent=1))
    what = "; ".join(spoil(random, path) for _ in range(random.choice((1, 1, 2))) if path.is_file())
    command = random.choice((run_script, tokenize_data_qwen))
    if command is tokenize_data_qwen:
        arguments = ["--config", str(path), "--tokenizer", str(world.backbone)]
        arguments += ["--input", str(world.raw), "--output", str(folder / "tokens")]
        return what, lambda: tokenize_data_qwen.main(arguments)
    flags = random.choice((["--dry-run"], ["--set", "train_steps=1", "--set", "train_epochs=1"]))
    return what, lambda: run_script.main(["--config", str(path), *flags])


def tokenized(random: Random, world: TinyWorld, folder: Path) -> Case:
    what = spoil_some(random, copy_of(world.tokenized, folder / "tokenized"))
    return what, lambda: train(world, folder, train_steps=1, datasets={})


def released(random: Random, world: TinyWorld, folder: Path) -> Case:
    what = spoil_some(random, copy_of(world.folder / "released", folder / "tokenized"))
    return what, lambda: train(world, folder, train_steps=1, datasets={})


def raw(random: Random, world: TinyWorld, folder: Path) -> Case:
    """A folder of this project's own layout, or a file of any form that is read."""
    forms = [*(world.folder / "forms").iterdir(), *(ROOT / "tests" / "cases" / "rows").iterdir()]
    source = random.choice([world.raw, *sorted(forms)])
    place = copy_of(source, folder / "input" / source.name)
    what = spoil(random, place) if place.is_file() else spoil_some(random, place)
    arguments = ["--tokenizer", str(world.backbone), "--output", str(folder / "tokens")]
    arguments += ["--input", str(random.choice((place, folder / "input")))]
    arguments += random.choice(([], [], ["--skip-bad-rows"], ["--columns", "query=a,passage=b"]))
    return f"{source.name}: {what}", lambda: tokenize_data_qwen.main(arguments)


def model(random: Random, world: TinyWorld, folder: Path) -> Case:
    """A trained model folder or a backbone, before each command that reads one."""
    source = random.choice((world.folder / "runs" / "run" / "step_2", world.backbone))
    place = copy_of(source, folder / "backbone")
    what = spoil_some(random, place)
    command = random.choice(("train", "encode", "export_model", "evaluate", "embed_teacher"))
    given = ["--model", str(place), "--output", str(folder / "output")]
    if command == "train":
        return what, lambda: train(world, folder, train_steps=1)
    if command == "encode":
        return what, lambda: encode(place)
    if command == "evaluate":
        given += ["--data", str(world.raw / "facts.parquet"), "--device", "cpu"]
    if command == "embed_teacher":
        given += ["--data", str(world.tokenized), "--tokenizer", str(world.backbone)]
        given += ["--device", "cpu"]
    return f"{command}: {what}", lambda: load_script(command).main(given)


@exit_on_user_error
def encode(folder: Path) -> None:
    from ml_embed import Embedder

    Embedder.from_pretrained(folder, device="cpu").encode(["a text", "river7 stone"])


def run_folder(random: Random, world: TinyWorld, folder: Path) -> Case:
    """What a run wrote, before the run that continues it and before its report."""
    copy_of(world.folder / "cache", folder / "cache")
    place = copy_of(world.folder / "runs", folder / "runs") / "run"
    what = spoil_some(random, random.choice((place, place / "resume", place / "resume" / "step_2")))
    if random.choice((True, False)):
        return what, lambda: load_script("report").main([str(place)])
    settings = {"train_steps": 3, "checkpointing_steps": 1, "valid_fraction": 0, "datasets": {}}
    flags = ("--resume", "auto", "--allow-changes")
    return what, lambda: train(world, folder, *flags, **settings)


def cache(random: Random, world: TinyWorld, folder: Path) -> Case:
    what = spoil_some(random, copy_of(world.folder / "cache", folder / "cache"))
    return what, lambda: train(world, folder, train_steps=1, datasets={})


def vectors(random: Random, world: TinyWorld, folder: Path) -> Case:
    """A teacher's vectors, before the run that distils them and before they are completed."""
    place = copy_of(world.folder / "vectors", folder / "vectors")
    what = spoil_some(random, place)
    if random.choice((True, False)):
        arguments = ["--model", str(world.backbone), "--tokenizer", str(world.backbone)]
        arguments += ["--data", str(world.tokenized), "--output", str(place), "--device", "cpu"]
        return what, lambda: load_script("embed_teacher").main(arguments)
    settings = {"train_steps": 1, "teacher_vectors_path": str(place), "datasets": {}}
    return what, lambda: train(world, folder, **settings)


def prepared(random: Random, world: TinyWorld, folder: Path) -> Case:
    """A tokenized folder, before the command that made it goes on there."""
    place = copy_of(world.tokenized, folder / "tokens")
    what = spoil_some(random, place)
    arguments = ["--tokenizer", str(world.backbone), "--input", str(world.raw)]
    arguments += ["--output", str(place), *random.choice(([], ["--overwrite"]))]
    return what, lambda: tokenize_data_qwen.main(arguments)


KINDS = (config, tokenized, released, raw, model, run_folder, cache, vectors, prepared)


def case(kind: Callable[..., Case], random: Random, world: TinyWorld, folder: Path) -> dict:
    """Spoil something, run what reads it in this process, and say what came of it."""
    what, command = kind(random, world, folder)
    outcome, detail = "traceback", ""
    said = io.StringIO()
    before = signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = command()
        errors = sum(line.startswith("error: ") for line in said.getvalue().splitlines())
        outcome = {(0, 0): "equal", (2, 1): "error"}.get((code, errors), "lost")
        detail = said.getvalue()[-2000:] if outcome == "lost" else ""
    except TimeoutError:
        outcome = "hang"
    except SystemExit as error:  # of argparse
        outcome = "error" if error.code == 2 else "lost"
    except BaseException:
        detail = traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    if outcome in ("equal", "error") and (left := [str(p) for p in folder.rglob("*.partial")]):
        outcome, detail = "lost", f"half files are left: {left}"
    return {
        "kind": "fuzz",
        "what": f"{kind.__name__}: {what}",
        "outcome": outcome,
        "detail": detail,
    }


def _too_long(number, frame):
    raise TimeoutError


def child(arguments: list[str]) -> int:
    """A case in a process of its own, which damage may crash; the result stands in its folder."""
    seed, folder = int(arguments[0]), Path(arguments[1])
    world = folder.parent / "base"
    known = TinyWorld(world / "raw", world / "backbone", world / "tokenized", world)
    kind = KINDS[seed % len(KINDS)]
    (folder / "case").mkdir()
    result = case(kind, Random(seed), known, folder / "case")
    (folder / "result.json").write_text(json.dumps(result))
    return 0


def try_one(seed: int, folder: Path) -> dict:
    base(folder.parent / "base")
    launch = Launch(folder / "printed", [seed, folder], main=child)
    try:
        codes = launch.wait(2 * SECONDS)
    except AssertionError as error:
        return {"kind": "fuzz", "what": "", "outcome": "hang", "detail": str(error)[-2000:]}
    if codes != [0]:
        detail = f"exit code {codes[0]}: {launch.printed()[-2000:]}"
        return {"kind": "fuzz", "what": "", "outcome": "traceback", "detail": detail}
    return json.loads((folder / "result.json").read_text())
