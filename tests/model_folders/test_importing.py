"""Released models and plain ones become model folders; every other command names the way there."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from helpers.in_process import train
from helpers.scripts import load_script
from helpers.tiny_models import TEXTS, make_tokenizer, write_model
from safetensors.torch import load_file
from transformers import AutoModel, Qwen3Config, Qwen3Model

from ml_embed import Embedder
from ml_embed.commands import import_model, tokenize
from ml_embed.data.store import open_store
from ml_embed.model_folders.record import ModelRecord

LAYERS, HIDDEN, RANK = 3, 96, 80
TOKENIZER = make_tokenizer()


@pytest.fixture(scope="module")
def factors():
    torch.manual_seed(1)
    scale = torch.linspace(1, 0.1, RANK)
    return (torch.randn(448, RANK) * scale).bfloat16(), torch.randn(RANK, HIDDEN).bfloat16()


@pytest.fixture(scope="module")
def released(factors, tmp_path_factory):
    """A folder like those of ML-Embed's authors: bfloat16, the table multiplied out."""
    folder = tmp_path_factory.mktemp("released") / "model"
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=448,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    model = Qwen3Model(config).bfloat16()
    model.embed_tokens.weight.data = (factors[0].float() @ factors[1].float()).bfloat16()
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    for name, factor in zip(("U.pth", "V.pth"), factors, strict=True):
        torch.save(factor, folder / name)
    return folder


def run(capsys, *flags):
    code = import_model.main([*map(str, flags)])
    said = capsys.readouterr()
    return code, said.out, said.err


@torch.no_grad()
def naive(folder, table, depth, dim):
    """transformers' model of a folder with another token table, one text at a time."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    model.embed_tokens.weight.data = table.float()
    model.layers = model.layers[:depth]
    model.config.num_hidden_layers = depth
    rows = []
    for text in TEXTS:
        ids = torch.tensor([[*TOKENIZER(text).input_ids, TOKENIZER.eos_token_id]])
        row = model(ids).last_hidden_state[0, -1, :dim]
        rows.append(row / row.norm())
    return torch.stack(rows).numpy()


def test_a_released_model_has_all_its_cuts(released, factors, tmp_path, capsys):
    code, out, err = run(capsys, "--model", released, "--output", tmp_path / "new", "--verify")
    assert code == 0, err
    assert "has no digests to compare with" in err
    assert "another one" not in err
    printed = json.loads(out.splitlines()[-1])
    sizes = {"ranks": [64, 80], "depths": [1, 2, 3], "dims": [96, 64, 32, 16, 8]}
    assert {axis: printed[axis] for axis in sizes} == sizes
    U, V = (factor.float() for factor in factors)
    table = load_file(released / "model.safetensors")["embed_tokens.weight"].float()
    for rank in (64, 80):
        lost = (table - U[:, :rank] @ V[:rank]).square().sum() / table.square().sum()
        assert printed["lost"][str(rank)] == pytest.approx(float(lost), rel=1e-4)
    assert 0 < printed["lost"]["80"] < import_model.SAME_TABLE < printed["lost"]["64"]
    assert printed["largest_difference"] == pytest.approx(float((table - U @ V).abs().max()))
    for rank, depth, dim in ((80, 3, 96), (64, 3, 32), (80, 1, 96), (64, 2, 8)):
        model = Embedder.from_pretrained(tmp_path / "new", depth, dim, rank, "cpu")
        expected = naive(released, U[:, :rank] @ V[:rank], depth, dim)
        np.testing.assert_allclose(model.encode(TEXTS), expected, atol=2e-5)
    record = ModelRecord.load(tmp_path / "new")
    assert (record.max_seq_length, record.temperature) == (256, 0.05)
    assert not list((tmp_path / "new").rglob("*.pth"))


def tokenized(model, world, output):
    data = ["--tokenizer", model, "--input", world.raw, "--output", output, "--quiet"]
    assert tokenize.main([*map(str, data)]) == 0


def test_a_released_model_is_turned_for_data(released, factors, world, tmp_path, capsys):
    """The same whole table; a smaller rank is its best approximation for the data's tokens."""
    tokenized(released, world, tmp_path / "tokenized")
    capsys.readouterr()
    flags = ["--output", tmp_path / "new", "--refactor", tmp_path / "tokenized"]
    code, out, err = run(capsys, "--model", released, *flags)
    assert code == 0, err
    assert "another one" not in err
    lost = json.loads(out.splitlines()[-1])["lost"]
    U, V = (factor.double() for factor in factors)
    store = open_store(tmp_path / "tokenized", tmp_path / "cache")
    share = torch.from_numpy(store.token_share(448)).double().unsqueeze(1)
    left = torch.linalg.svdvals(share.sqrt() * (U @ V)).square()
    assert 0 < lost["80"] < import_model.SAME_TABLE, "bfloat16 rounds"
    expected = float(left[64:].sum() / left.sum())
    assert lost["64"] == pytest.approx(expected, abs=2 * lost["80"])
    as_released = (share * (U @ V - U[:, :64] @ V[:64]).square()).sum() / left.sum()
    assert lost["64"] < 0.9 * as_released


def test_a_table_that_is_another_one_is_told(released, tmp_path, capsys):
    other = shutil.copytree(released, tmp_path / "other")
    model = AutoModel.from_pretrained(other)
    model.embed_tokens.weight.data[7] += 9
    model.save_pretrained(other)
    code, out, err = run(capsys, "--model", other, "--output", tmp_path / "new")
    assert code == 0
    assert "the token table beside the factors is another one" in err
    assert json.loads(out.splitlines()[-1])["largest_difference"] == pytest.approx(9, abs=0.1)


class Trap:
    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (self.place,)


def spoil(folder, kind):
    """Put something else in the place of V.pth."""
    path = folder / "V.pth"
    if kind == "code":
        path.write_bytes(pickle.dumps(Trap(str(folder / "sprung")), protocol=2))
    elif kind == "zipped code":
        torch.save({"V": Trap(str(folder / "sprung"))}, path)
    elif kind == "other shape":
        torch.save(torch.zeros(RANK - 1, HIDDEN), path)
    elif kind == "vector":
        torch.save(torch.zeros(RANK), path)
    elif kind == "whole numbers":
        torch.save(torch.zeros(RANK, HIDDEN, dtype=torch.int64), path)
    elif kind == "two tensors":
        torch.save({"A": torch.zeros(2, 2), "B": torch.zeros(2, 2)}, path)
    elif kind == "nan":
        torch.save(torch.full((RANK, HIDDEN), float("nan")), path)
    elif kind == "torn":
        path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("code", "V.pth is no tensor as torch saves it"),
        ("zipped code", "V.pth is no tensor as torch saves it"),
        ("other shape", "are 448 x 80 and 79 x 96; their product must be the token table, 448 x"),
        ("vector", r"V.pth must hold one matrix of numbers, not torch.float32 (80,)"),
        ("whole numbers", "V.pth must hold one matrix of numbers, not torch.int64"),
        ("two tensors", "V.pth must hold one matrix of numbers, not <class 'dict'>"),
        ("nan", "has NaN or infinity"),
        ("torn", "V.pth is no tensor as torch saves it"),
    ],
)
def test_what_is_no_matrix_is_refused_and_never_run(released, tmp_path, capsys, kind, message):
    folder = shutil.copytree(released, tmp_path / "model")
    spoil(folder, kind)
    code, _, err = run(capsys, "--model", folder, "--output", tmp_path / "new")
    assert code == 2
    assert message in err
    assert not (folder / "sprung").exists()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("by_frequency", [False, True])
def test_a_plain_model_is_factorised(released, world, tmp_path, capsys, by_frequency):
    plain = shutil.copytree(released, tmp_path / "plain", ignore=shutil.ignore_patterns("*.pth"))
    flags, share = [], torch.ones(448) / 448
    if by_frequency:
        tokenized(plain, world, tmp_path / "tokenized")
        flags = ["--frequencies", tmp_path / "tokenized"]  # the former name of --refactor
        share = torch.from_numpy(
            open_store(tmp_path / "tokenized", tmp_path / "cache").token_share(448)
        )
        capsys.readouterr()
    output = ["--output", tmp_path / "new", "--factorize", 70]
    code, out, err = run(capsys, "--model", plain, *output, *flags)
    assert code == 0, err
    assert "another one" not in err
    lost = json.loads(out.splitlines()[-1])["lost"]
    table = load_file(plain / "model.safetensors")["embed_tokens.weight"].double()
    weighted = share.double().sqrt().unsqueeze(1) * table
    left = torch.linalg.svdvals(weighted).square()
    for rank in (64, 70):  # by Eckart and Young; the factors are stored in bfloat16
        assert lost[str(rank)] == pytest.approx(float(left[rank:].sum() / left.sum()), abs=1e-4)
    record = ModelRecord.load(tmp_path / "new")
    assert (record.ranks, record.exits, record.dims) == ((64, 70), (3,), (96,))
    model = Embedder.from_pretrained(tmp_path / "new", rank=64, device="cpu")
    nested = load_file(tmp_path / "new" / "nested" / "embedding_factors.safetensors")
    for rank in (64, 70):  # what is printed is of the factors that are written, not better ones
        written = nested["A"][:, :rank].float() @ nested["B"][:rank].float()
        away = (share.double().unsqueeze(1) * (table - written).square()).sum()
        whole = weighted.square().sum()
        assert lost[str(rank)] == pytest.approx(float(away / whole), rel=1e-6)
    cut = nested["A"][:, :64].float() @ nested["B"][:64].float()
    np.testing.assert_allclose(model.encode(TEXTS), naive(plain, cut, 3, 96), atol=2e-5)


def test_a_model_of_ours_keeps_its_exits_and_norms(tmp_path, capsys):
    whole = write_model(tmp_path / "whole", TOKENIZER, "per_layer", factorized=False)
    flags = ["--model", whole, "--output", tmp_path / "new", "--factorize", "64"]
    assert run(capsys, *flags)[0] == 0
    for depth in (1, 3):
        before, after = (
            Embedder.from_pretrained(folder, depth, 32, device="cpu").encode(TEXTS)
            for folder in (whole, tmp_path / "new")
        )
        np.testing.assert_allclose(before, after, atol=2e-5)


def test_mistakes(released, tmp_path, capsys):
    plain = shutil.copytree(released, tmp_path / "plain", ignore=shutil.ignore_patterns("*.pth"))
    nested = write_model(tmp_path / "nested", TOKENIZER)
    both = shutil.copytree(nested, tmp_path / "both")
    for name in ("U.pth", "V.pth"):
        shutil.copy(released / name, both)
    for flags, message in (
        (["--model", plain], "has no U.pth and V.pth as released models do; say with --factorize"),
        (["--model", plain, "--factorize", "97"], "--factorize 97 must be from 1 to 96"),
        (["--model", released, "--factorize", "64"], "has token factors of its own; leave"),
        (["--model", nested, "--factorize", "16"], "has token factors already"),
        (["--model", both], "so it is a model folder already; remove U.pth and V.pth"),
        (["--model", tmp_path / "no"], "does not exist"),
    ):
        code, _, err = run(capsys, *flags, "--output", tmp_path / "new")
        assert code == 2, flags
        assert message in err
    assert run(capsys, "--model", released, "--output", plain)[0] == 2, "it is not replaced"


COMMANDS = {
    "embed_teacher": "--model MODEL --data TOKENIZED --tokenizer BACKBONE --output OUT",
    "mine_hard_negatives": "--model MODEL --input RAW --output OUT",
    "evaluate": "--model MODEL --data RAW --output OUT",
    "export_model": "--model MODEL --output OUT",
    "prune_backbone": "--model MODEL --output OUT --layers 1",
    "encode": "--model MODEL --input RAW/facts.parquet --column query --output OUT.npy",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_other_command_names_the_way(released, world, tmp_path, capsys, command):
    arguments = COMMANDS[command].replace("MODEL", str(released)).replace("RAW", str(world.raw))
    arguments = arguments.replace("TOKENIZED", str(world.tokenized))
    arguments = arguments.replace("BACKBONE", str(world.backbone))
    arguments = arguments.replace("OUT", str(tmp_path / "o"))
    assert load_script(command).main(arguments.split()) == 2
    said = capsys.readouterr().err
    assert f"run it with --model {released} --output NEW, then give NEW" in said
    assert not list(tmp_path.iterdir())


def test_training_names_the_way(released, world, tmp_path, capsys):
    for key in ("model_path", "teacher_model_path"):
        assert train(world, tmp_path, **{key: str(released)})[0] == 2
        assert "which only scripts/import_model.py reads" in capsys.readouterr().err
