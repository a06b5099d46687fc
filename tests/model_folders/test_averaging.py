"""The mean of models: tensor by tensor, the tables' mean, the record, and what is refused."""

import dataclasses
import json
import shutil

import pytest
import torch
from helpers.in_process import train
from helpers.scripts import load_script
from helpers.tiny_models import (
    RANK,
    TEXTS,
    assert_equal_vectors,
    make_tokenizer,
    naive,
    random_backbone,
    reseal,
    write_model,
)
from safetensors.torch import load, load_file, save_file

from ml_embed import Embedder
from ml_embed.data.store import open_store
from ml_embed.errors import UserError
from ml_embed.files.digests import value_digest
from ml_embed.files.model_identity import model_identity
from ml_embed.model import MatryoshkaEncoder, factorize_table
from ml_embed.model_folders.averaging import Average, mean_factors
from ml_embed.model_folders.record import ModelRecord
from ml_embed.model_folders.write import save_model_folder

FILES = ("model.safetensors", "nested/embedding_factors.safetensors")


def average(capsys, *checkpoints, output, flags=()):
    arguments = ["--checkpoints", *checkpoints, "--output", output, *flags]
    code = load_script("average_checkpoints").main(list(map(str, arguments)))
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture(scope="module")
def run_folder(world, tmp_path_factory):
    """A run with norms per exit, and three of its checkpoints."""
    folder = tmp_path_factory.mktemp("averaged")
    settings = {"checkpointing_steps": 2, "train_steps": 6, "learning_rate": 1e-2}
    assert train(world, folder, "run", mll_norm="per_layer", **settings)[0] == 0
    return folder / "run"


@pytest.fixture(scope="module")
def checkpoints(run_folder):
    return [run_folder / f"step_{step}" for step in (2, 4, 6)]


def test_checkpoints_of_a_run_are_averaged_as_they_are(checkpoints, world, tmp_path, capsys):
    output, weights = tmp_path / "mean", (1, 2, 5)
    flags = ["--weights", *weights, "--data", world.raw / "facts.parquet"]
    code, out, err = average(capsys, *checkpoints, output=output, flags=flags)
    assert code == 0, err
    assert "averaged as they are" in err
    for file in (*FILES, "nested/exit_norms.safetensors"):
        parts, mean = [load_file(folder / file) for folder in checkpoints], load_file(output / file)
        assert mean.keys() == parts[0].keys()
        for name, tensor in mean.items():
            if name == "embed_tokens.weight":
                factors = load_file(output / FILES[1])
                expected = factors["A"] @ factors["B"]
            else:
                expected = sum(
                    part[name] * weight / 8 for part, weight in zip(parts, weights, strict=True)
                )
                assert not torch.equal(parts[0][name], parts[2][name]), name
            torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)
    record, first = ModelRecord.load(output), ModelRecord.load(checkpoints[0])
    assert dataclasses.replace(record, averaged=()) == first
    assert [(part.model, part.weight, part.digest) for part in record.averaged] == [
        (str(folder), weight / 8, value_digest(model_identity(folder)))
        for folder, weight in zip(checkpoints, weights, strict=True)
    ]
    assert_printed_metrics(out, [*checkpoints, output], world, tmp_path)
    assert_equal_vectors(  # nested still, and what transformers reads is the same model
        Embedder.from_pretrained(output, device="cpu").encode(TEXTS),
        naive(output, TEXTS, depth=2),
    )


def assert_printed_metrics(out, models, world, tmp_path):
    """A line per model, and the numbers of scripts/evaluate.py at its whole cut."""
    lines = out.splitlines()
    numbers = json.loads(lines[-1])["metrics"]
    assert list(numbers) == list(map(str, models))
    for model, line in zip(models, lines[-1 - len(models) : -1], strict=True):
        flags = ["--model", model, "--data", world.raw / "facts.parquet", "--rank", 32]
        flags += ["--output", tmp_path / "evaluated", "--depth", 2, "--dim", 64]
        assert load_script("evaluate").main(list(map(str, flags))) == 0
        (row,) = json.loads((tmp_path / "evaluated/evaluation.json").read_text())["model"]["rows"]
        assert numbers[str(model)] == {metric: row[metric] for metric in numbers[str(model)]}
        assert str(model) in line
        assert f"{row['ndcg@10']:.4f}" in line


def test_factors_of_other_bases_go_through_their_product(tmp_path, capsys):
    """The mean of the tables at its best factors, and never their means, which mean nothing."""
    folders = [write_model(tmp_path / "0", make_tokenizer())]
    folders.append(write_random_model(tmp_path / "1"))
    code, _, err = average(capsys, *folders, output=tmp_path / "mean")
    assert code == 0, err
    assert "factorised anew" in err
    tables = [load_file(folder / FILES[0])["embed_tokens.weight"] for folder in folders]
    best = factorize_table(sum(tables) / 2, RANK)
    factors = load_file(tmp_path / "mean" / FILES[1])
    for rank in (16, RANK):
        expected = best[0][:, :rank] @ best[1][:rank]
        found = factors["A"][:, :rank] @ factors["B"][:rank]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    means = [sum(load_file(f / FILES[1])[name] for f in folders) / 2 for name in ("A", "B")]
    mean = sum(tables) / 2
    assert (mean - best[0] @ best[1]).norm() < 0.7 * (mean - means[0] @ means[1]).norm()


def write_random_model(folder):
    """As `write_model`'s, but of another start."""
    shutil.copytree(folder.parent / "0", folder)
    record, tokenizer = ModelRecord.load(folder), make_tokenizer()
    backbone = random_backbone(tokenizer)
    torch.manual_seed(7)
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, 0.5, 0.2)
    factors = factorize_table(torch.randn_like(backbone.embed_tokens.weight), RANK)
    encoder = MatryoshkaEncoder(backbone, record.exits, factors)
    shutil.rmtree(folder)
    save_model_folder(folder, encoder.state_dict(), backbone.config, tokenizer, record)
    return folder


def test_one_table_in_two_bases_is_itself():
    """As after a turn in between; their means would be nearly zero here."""
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(*shape, generator=generator) for shape in ((50, 4), (4, 12)))
    turn = torch.linalg.qr(torch.randn(4, 4, generator=generator))[0]
    mean = mean_factors([(A, B), (A @ turn, turn.T @ B)], (0.3, 0.7))
    assert not mean.as_they_are
    assert mean.lost < 1e-9
    torch.testing.assert_close(mean.factors[0] @ mean.factors[1], A @ B)
    same = mean_factors([(A, B), (A, B)], (0.3, 0.7))
    assert same.as_they_are
    torch.testing.assert_close(same.factors, (A, B))


@pytest.mark.parametrize("count", [2, 4])
def test_what_is_lost_is_what_is_said(count):
    """Also where the ranks together exceed the hidden size."""
    generator = torch.Generator().manual_seed(count)
    pairs = [
        tuple(torch.randn(*shape, generator=generator) for shape in ((60, 5), (5, 16)))
        for _ in range(count)
    ]
    weights = [(i + 1) / sum(range(count + 1)) for i in range(count)]
    table = sum(w * (A @ B) for w, (A, B) in zip(weights, pairs, strict=True))
    mean = mean_factors(pairs, weights)
    values = torch.linalg.svdvals(table.double()).square()
    assert mean.lost == pytest.approx(float(values[5:].sum() / values.sum()), rel=1e-5)
    share = torch.rand(60, generator=generator)
    wanted = factorize_table(table, 5, share)
    found = mean_factors(pairs, weights, share).factors
    torch.testing.assert_close(found[0] @ found[1], wanted[0] @ wanted[1], rtol=1e-3, atol=1e-4)


def test_factors_are_turned_for_data(checkpoints, world, tmp_path, capsys):
    code, _, err = average(
        capsys, *checkpoints, output=tmp_path / "mean", flags=["--refactor", world.tokenized]
    )
    assert code == 0, err
    parts = [load_file(folder / FILES[1]) for folder in checkpoints]
    A, B = (sum(part[name] for part in parts) / 3 for name in "AB")
    store = open_store(world.tokenized, tmp_path / "cache", progress=False)
    best = factorize_table(A @ B, 16, torch.from_numpy(store.token_share(len(A))))
    found = load_file(tmp_path / "mean" / FILES[1])
    torch.testing.assert_close(found["A"] @ found["B"], A @ B, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        found["A"][:, :16] @ found["B"][:16], best[0] @ best[1], rtol=1e-3, atol=1e-4
    )


def test_whole_tables_are_averaged(tmp_path, capsys):
    folders = [
        write_model(tmp_path / name, make_tokenizer(), factorized=False) for name in ("0", "1")
    ]
    path = folders[1] / FILES[0]
    weights = load(path.read_bytes())  # not a map of the file, which is written anew
    save_file({name: 3 * tensor for name, tensor in weights.items()}, path)
    reseal(folders[1])
    assert average(capsys, *folders, output=tmp_path / "mean")[0] == 0
    for name, tensor in load_file(tmp_path / "mean" / FILES[0]).items():
        torch.testing.assert_close(tensor, 2 * weights[name])
    code, _, err = average(
        capsys, *folders, output=tmp_path / "turned", flags=["--refactor", tmp_path]
    )
    assert code == 2
    assert "no factors to turn" in err


def edit(folder, file, **values):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    reseal(folder)


def test_models_of_other_kinds_are_refused_by_name(tmp_path, capsys):
    """All differences at once, nothing written."""
    one, other = (write_model(tmp_path / name, make_tokenizer()) for name in ("one", "other"))
    edit(other, "config_sentence_transformers.json", prompts={"query": "find: "})
    edit(other, "config.json", rms_norm_eps=1e-3)
    record = ModelRecord.load(other)
    dataclasses.replace(record, exits=(2, 3)).save(other)
    whole = write_model(tmp_path / "whole", make_tokenizer(), factorized=False)
    for folder, named in (
        (other, ["prompts of", "find: ", "rms_norm_eps of", "0.001", "exits of", "(2, 3)"]),
        (whole, ["rank of the token factors of", "is 32", "whole table", "ranks of"]),
    ):
        code, _, err = average(capsys, one, folder, output=tmp_path / "mean")
        assert code == 2
        for part in named:
            assert part in err, part
        assert "hidden_size" not in err
        assert "tokenizer" not in err
    assert not (tmp_path / "mean").exists()


def test_other_vocabularies_and_tokenizers_are_refused(checkpoints, tmp_path, capsys):
    other = write_model(tmp_path / "other", make_tokenizer())
    code, _, err = average(capsys, checkpoints[0], other, output=tmp_path / "mean")
    assert code == 2
    for part in ("tokenizer of", "vocab_size of", "num_hidden_layers of", "is 2, of", "448"):
        assert part in err, part


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--weights", "1", "2", "3"], "has 3 numbers for 2 models"),
        (["--weights", "1", "0"], "each must be a number above 0"),
        (["--weights", "1", "nan"], "each must be a number above 0"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_messages_and_nothing_is_written(
    checkpoints, tmp_path, capsys, flags, message
):
    code, _, err = average(capsys, *checkpoints[:2], output=tmp_path / "mean", flags=flags)
    assert code == 2
    assert message in err
    assert not (tmp_path / "mean").exists()


def test_the_models_that_are_read_are_not_replaced(checkpoints, tmp_path, capsys):
    code, _, err = average(
        capsys, *checkpoints, output=checkpoints[1], flags=["--overwrite", "--weights", 1, 1, 1]
    )
    assert code == 2
    assert "the model that is read" in err
    code, _, err = average(capsys, checkpoints[0], output=tmp_path / "mean")
    assert code == 2
    assert "at least two" in err


def test_one_checkpoint_named_twice_is_refused(nested):
    with pytest.raises(UserError, match="named twice"):
        Average.of([str(nested), str(nested)])
