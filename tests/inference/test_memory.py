"""What a cut of the token table leaves in memory, measured."""

import json
import subprocess
import sys

import pytest
import torch
from helpers import ROOT
from helpers.tiny_models import make_tokenizer
from transformers import Qwen3Config, Qwen3Model

from ml_embed.model import MatryoshkaEncoder
from ml_embed.model_folders.record import ModelRecord
from ml_embed.model_folders.write import save_model_folder

VOCABULARY, HIDDEN, RANKS = 80_000, 256, (16, 64, 256)
MIB = 2**20
SLACK = 20  # MiB for what any encoding takes
CHILD = """
import gc, json, sys
from pathlib import Path
import sentence_transformers, torch
from ml_embed import Embedder
from ml_embed.sentence_transformers import load

def mib(kind):
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[kind].split()[0]) / 1024

def measured(open_model):
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    before = mib("VmRSS")
    model = open_model()
    model.encode(["a text"] * 3)
    found = mib("VmRSS") - before, mib("VmHWM") - before
    del model
    return found

folder, ranks = sys.argv[1], json.loads(sys.argv[2])
Embedder.from_pretrained(folder, rank=ranks[0]).encode("a")  # what is loaded once
found = {}
for rank in ranks:
    found[f"Embedder {rank}"] = measured(lambda: Embedder.from_pretrained(folder, rank=rank))
    found[f"load {rank}"] = measured(lambda: load(folder, rank=rank))

def plain():
    # transformers maps the table: a row comes into memory when it is used first
    model = sentence_transformers.SentenceTransformer(folder)
    table = model[0].auto_model.embed_tokens
    for ids in torch.arange(len(table.weight)).split(1024):
        table(ids)
    return model

found["plain"] = measured(plain)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A model whose token table is nearly all of it."""
    tokenizer = make_tokenizer()
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    factors = torch.randn(VOCABULARY, RANKS[-1]), torch.randn(RANKS[-1], HIDDEN)
    encoder = MatryoshkaEncoder(Qwen3Model(config), (1,), factors)
    record = ModelRecord((1,), (HIDDEN,), RANKS, 0.05, 64)
    folder = tmp_path_factory.mktemp("large") / "model"
    save_model_folder(folder, encoder.state_dict(), config, tokenizer, record)
    return folder


@pytest.mark.alone
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_only_the_rank_that_is_used_is_held(large):
    """At each rank, by the Embedder and as a SentenceTransformer; also while it is loaded."""
    pytest.importorskip("sentence_transformers")
    arguments = [sys.executable, "-c", CHILD, str(large), json.dumps(RANKS[:2])]
    run = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=ROOT)
    found = json.loads(run.stdout.splitlines()[-1])
    table = VOCABULARY * HIDDEN * 4 / MIB  # 78 MiB
    for rank in RANKS[:2]:
        factors = rank * (VOCABULARY + HIDDEN) * 4 / MIB
        for reader in ("Embedder", "load"):
            resident, peak = found[f"{reader} {rank}"]
            assert resident < factors + SLACK, found
            assert peak < factors + SLACK, found
    assert found["plain"][0] > table, "the measurement sees a table"
