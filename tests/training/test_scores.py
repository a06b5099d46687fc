"""Scores of a teacher that stand in the data: what is learned from them, and where they must be."""

import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.in_process import dataset_rows, train
from helpers.tiny_world import write_manifest
from oracles import by_scores
from transformers import AutoModel, AutoTokenizer

from ml_embed.config import parse_config
from ml_embed.data.batch_builder import BatchBuilder
from ml_embed.data.schedule import plan_dataset
from ml_embed.data.store import open_store
from ml_embed.errors import UserError
from ml_embed.losses.nested import MatryoshkaSpec
from ml_embed.losses.objective import Objective
from ml_embed.model import MatryoshkaEncoder, dim_weights
from ml_embed.prepare.tokenization import TokenizeOptions, tokenize_folder

MAX_LENGTH, ROWS = 16, 8
DIMS = (64, 32, 16, 8)
SPEC = MatryoshkaSpec(DIMS, dim_weights(DIMS), 0.05)


def write_scored(world, folder, without=()):
    """The world's facts, tokenized with scores; those of some rows are left out."""
    rng = random.Random(3)
    rows = pq.read_table(world.raw / "facts.parquet").to_pylist()
    for number, row in enumerate(rows):
        if number not in without:
            row["pos_score"] = rng.uniform(0, 5)
            row["neg_scores"] = [rng.uniform(-5, 3) for _ in row["negatives"]]
    (folder / "raw").mkdir(parents=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "raw/facts.jsonl").write_text(text)
    options = TokenizeOptions(str(world.backbone), folder / "raw", folder / "tokenized")
    tokenize_folder(options, progress=False)
    return folder / "tokenized"


@pytest.fixture(scope="module")
def scored(world, tmp_path_factory):
    return write_scored(world, tmp_path_factory.mktemp("scored"))


def stored_scores(data) -> list[list[float]]:
    rows = pq.read_table(data / "facts_query.parquet").to_pylist()
    return [[row["pos_score"], *row["neg_scores"]] for row in rows]


def batch_of(
    world, scored, tmp_path, negatives, rows=ROWS, task="retrieval", share=(0, 1), **options
):
    given = {"*": {"num_hard_neg": negatives, "task": task}}
    config = parse_config(world.config(datasets=given, valid_fraction=0))
    dataset = open_store(scored, tmp_path / "cache", progress=False).datasets["facts"]
    eos = AutoTokenizer.from_pretrained(world.backbone).eos_token_id
    plan = plan_dataset(dataset, config, task=task)
    builder = BatchBuilder(0, MAX_LENGTH, eos, True, *share, scored=True, **options)
    return builder.build(dataset, plan, np.arange(rows), epoch=0), eos


@pytest.mark.parametrize("kind", ["kl", "margin_mse"])
def test_the_term_and_all_its_gradients_are_the_naive_ones(world, scored, tmp_path, kind):
    """Ragged negatives, one of which is the sample's own positive and takes part."""
    batch, eos = batch_of(world, scored, tmp_path, 10)
    samples, documents = dataset_rows(world, "facts")
    student = MatryoshkaEncoder(AutoModel.from_pretrained(world.backbone), (1, 2))
    terms = Objective(SPEC, kind, kd_weight=0.25)(
        student(batch.texts.input_ids, batch.texts.packed), batch
    )
    torch.testing.assert_close(terms.total, terms.hard + terms.in_batch + 0.25 * terms.distillation)
    naive = AutoModel.from_pretrained(world.backbone)
    sizes = {"exits": [1, 2], "use_mrl": True, "temperature": 0.05}
    expected = by_scores(
        naive,
        samples[:ROWS],
        stored_scores(scored)[:ROWS],
        documents,
        kind=kind,
        max_length=MAX_LENGTH,
        eos_id=eos,
        **sizes,
    )
    assert expected > 0.1
    torch.testing.assert_close(terms.distillation, expected, rtol=1e-4, atol=1e-5)
    terms.distillation.backward()
    expected.backward()
    references = {key: parameter.grad for key, parameter in naive.named_parameters()}
    names = {"embedding.weight": "embed_tokens.weight", "norms.0.weight": "norm.weight"}
    for key, parameter in student.named_parameters():
        reference = references[names.get(key, key.removeprefix("backbone."))]
        assert reference.abs().max() > 1e-5, key
        scale = float(reference.abs().max())
        torch.testing.assert_close(parameter.grad, reference, rtol=1e-3, atol=1e-5 * max(1, scale))


@pytest.mark.parametrize("kind", ["kl", "margin_mse"])
@pytest.mark.parametrize("processes", [2, 4])
def test_shares_of_processes_add_up_to_the_loss_of_one(world, scored, tmp_path, kind, processes):
    """Seven rows, which leave fillers, with other numbers of negatives in each share."""
    student = MatryoshkaEncoder(AutoModel.from_pretrained(world.backbone), (1, 2))
    shares = [(0, 1), *((process, processes) for process in range(processes))]
    losses, counts = [], []
    for share in shares:  # a task whose loss gathers nothing
        batch, _ = batch_of(world, scored, tmp_path, 10, 7, "clustering", share)
        vectors = student(batch.texts.input_ids, batch.texts.packed)
        losses.append(Objective(SPEC, kind)(vectors, batch).distillation)
        counts.append(batch.negatives.shape[1])
    assert len(set(counts)) > 1
    whole, mean = losses[0], sum(losses[1:]) / processes
    torch.testing.assert_close(mean, whole, rtol=1e-5, atol=1e-5)
    parameters = list(student.parameters())
    for one, many in zip(
        torch.autograd.grad(whole, parameters, retain_graph=True),
        torch.autograd.grad(mean, parameters),
        strict=True,
    ):
        assert one.abs().max() > 0
        torch.testing.assert_close(many, one, rtol=1e-3, atol=1e-5 * max(1, float(one.abs().max())))


@pytest.mark.parametrize("all_negatives", [False, True])
def test_each_drawn_negative_has_its_own_score(world, scored, tmp_path, all_negatives):
    """Fewer are drawn than there are."""
    batch, _ = batch_of(world, scored, tmp_path, 2, all_negatives=all_negatives)
    samples, _ = dataset_rows(world, "facts")
    wanted = stored_scores(scored)
    drawn = 0
    for row, (_, _, own) in enumerate(samples[:ROWS]):
        assert batch.teacher_scores[row, 0] == pytest.approx(wanted[row][0])
        by_document = dict(zip(own, wanted[row][1:], strict=True))
        for place, document in enumerate(batch.negative_documents[row].tolist()):
            if document >= 0:
                drawn += 1
                assert batch.teacher_scores[row, 1 + place] == pytest.approx(by_document[document])
    assert drawn > ROWS


@pytest.mark.parametrize("kind", ["kl", "margin_mse"])
def test_a_run_learns_from_scores(world, scored, tmp_path, kind):
    """All rows with all their negatives in each step, so that lines compare."""
    settings = {"train_data_path": str(scored), "datasets": {}, "train_steps": 12}
    settings |= {"train_batch_size": 32, "num_hard_neg": 10, "kd_weight": 5.0, "r": 0}
    code, lines = train(world, tmp_path, kd_loss=kind, use_mel=False, mel_ranks=None, **settings)
    assert code == 0
    losses = [line["distillation_loss"] for line in lines if line["split"] == "train"]
    assert losses[-1] < 0.9 * losses[0]


def test_datasets_without_scores_are_named(world, tmp_path, capsys):
    for name, without, said in (("some", (3, 4, 5), " of 21 rows"), ("none", range(21), "facts: ")):
        data = write_scored(world, tmp_path / name, without)
        settings = {"train_data_path": str(data), "datasets": {}, "kd_loss": "kl"}
        code, _ = train(world, tmp_path, f"run-{name}", **settings)
        error = capsys.readouterr().err
        assert code == 2
        assert "- facts: " in error
        assert said in error
        assert "Traceback" not in error
        settings["datasets"] = {"facts": {"num_hard_neg": 0}}  # then there is nothing to be taught
        assert train(world, tmp_path, f"run-{name}-0", train_steps=1, **settings)[0] == 0


def test_scores_of_no_weight_are_not_asked_for(world, tmp_path):
    """The run is the one without them."""
    data = write_scored(world, tmp_path / "some", (3, 4, 5))
    settings = {"train_data_path": str(data), "datasets": {}, "train_steps": 2}
    runs = [
        train(world, tmp_path, f"run-{kind}", kd_loss=kind, kd_weight=0, **settings)
        for kind in ("kl", "vectors")
    ]
    assert [code for code, _ in runs] == [0, 0]
    clock = ("time", "tokens_per_second", "seconds")
    learned, plain = (
        [{key: value for key, value in line.items() if key not in clock} for line in lines]
        for _, lines in runs
    )
    assert learned == plain != []


def test_a_teacher_beside_scores_is_a_mistake(world):
    with pytest.raises(UserError, match="learns from scores in the data, but a teacher is given"):
        parse_config(world.config(kd_loss="kl", teacher_model_path="somewhere"))


def test_scores_that_do_not_fit_are_refused_with_their_row(world, scored, tmp_path):
    """As other programs may write them: the released layout and ours are read alike."""
    folder = tmp_path / "data"
    folder.mkdir()
    table = pq.read_table(scored / "facts_query.parquet")
    rows = table.column("neg_scores").to_pylist()
    at = next(number for number, row in enumerate(rows) if len(row) > 1)
    rows[at] = rows[at][1:]
    place = table.schema.get_field_index("neg_scores")
    broken = table.set_column(place, "neg_scores", pa.array(rows, pa.list_(pa.float32())))
    pq.write_table(broken, folder / "facts_query.parquet")
    pq.write_table(pq.read_table(scored / "facts_corpus.parquet"), folder / "facts_corpus.parquet")
    manifest = json.loads((scored / "manifest.json").read_text())
    write_manifest(folder, manifest)
    with pytest.raises(UserError, match=f"'neg_scores' has .* numbers in row {at}, which has"):
        open_store(folder, tmp_path / "cache", progress=False)
