"""False negatives by document and by margin against loops over samples."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers.in_process import dataset_rows, train, with_shared_queries
from oracles import objective, right_documents
from transformers import AutoModel, AutoTokenizer

from ml_embed.config import parse_config
from ml_embed.data.batch_builder import BatchBuilder
from ml_embed.data.schedule import plan_dataset
from ml_embed.data.store import open_store
from ml_embed.losses import false_negatives
from ml_embed.losses import nested as losses
from ml_embed.losses.objective import Objective
from ml_embed.model import MatryoshkaEncoder, dim_weights
from ml_embed.training.metrics_log import Window

MAX_LENGTH, ROWS = 16, 8
DIMS = (64, 32, 16, 8)
SPEC = losses.MatryoshkaSpec(DIMS, dim_weights(DIMS), 0.05)


@pytest.fixture(scope="module")
def store(world, tmp_path_factory):
    return open_store(world.tokenized, tmp_path_factory.mktemp("cache"), progress=False)


def batch_of(
    world,
    store,
    name: str,
    mask: bool,
    rows: int = ROWS,
    all_negatives: bool = False,
    all_pairs: bool = False,
):
    """The first rows with all their negatives, so that nothing is drawn."""
    config = parse_config(world.config(datasets={"*": {"num_hard_neg": 10}}, valid_fraction=0))
    dataset, eos = store.datasets[name], AutoTokenizer.from_pretrained(world.backbone).eos_token_id
    builder = BatchBuilder(0, MAX_LENGTH, eos, mask, 0, 1, all_negatives, all_pairs)
    plan = plan_dataset(dataset, config, task="clustering" if name == "topics" else "retrieval")
    return builder.build(dataset, plan, np.arange(rows), epoch=0), eos


@pytest.mark.parametrize(
    ("name", "mask", "margin"),
    [("facts", True, 0.0), ("facts", False, 0.05), ("facts", True, None), ("topics", True, 0.02)],
)
def test_losses_gradients_and_counts_are_the_naive_ones(
    world, store, monkeypatch, name, mask, margin
):
    """All rows at once and some at a time; what the deepest exit masks is masked everywhere."""
    batch, eos = batch_of(world, store, name, mask)
    counts = assert_like_naive(world, monkeypatch, name, batch, eos, mask, margin)
    assert (counts["masked_by_document"] > 0) == mask
    assert (counts["masked_by_margin"] > 0) == (margin is not None)


SHARED_IDS = [None if row % 6 == 1 else f"question {row % 5}" for row in range(21)]


@pytest.mark.parametrize("ids", [None, SHARED_IDS], ids=["by text", "by id"])
@pytest.mark.parametrize("mask", [True, False])
def test_no_right_answer_of_a_query_is_its_negative(world, tmp_path, monkeypatch, ids, mask):
    """Rows with the same query_id, or without one the same text, also those of other batches."""
    shared = with_shared_queries(world, tmp_path / "shared", ids)
    store = open_store(shared.tokenized, tmp_path / "cache", progress=False)
    batch, eos = batch_of(shared, store, "facts", mask)
    samples, _ = dataset_rows(shared, "facts")
    right = right_documents(samples, ids)
    counts = assert_like_naive(shared, monkeypatch, "facts", batch, eos, mask, None, right[:ROWS])
    if mask:
        alone = [{passage} for _, passage, _ in samples]
        own = sum(passage in negatives for _, passage, negatives in samples[:ROWS])
        assert counts["masked_by_document"] > own, "more than each row's own passage"
        negatives = [
            n in right[i] - alone[i] for i, (_, _, own) in enumerate(samples[:ROWS]) for n in own
        ]
        assert any(negatives), "an own negative is the passage of another row"


@pytest.mark.parametrize("exit_weights", [None, (0.25, 0.75)])
@pytest.mark.parametrize(
    ("name", "mask", "margin", "weight"),
    [
        ("facts", True, None, 0.7),
        ("facts", False, 0.05, 0.7),
        ("topics", True, 0.02, 0.7),
        ("facts", True, None, 0.0),
    ],
)
def test_exits_learn_from_the_deepest(
    world, tmp_path, monkeypatch, name, mask, margin, weight, exit_weights
):
    """Self-distillation, where documents occur several times in the batch, and weighted exits."""
    data = world if name == "topics" else with_shared_queries(world, tmp_path / "shared", None)
    store = open_store(data.tokenized, tmp_path / "cache", progress=False)
    batch, eos = batch_of(data, store, name, mask)
    right = right_documents(dataset_rows(data, name)[0])[:ROWS]
    assert_like_naive(
        data, monkeypatch, name, batch, eos, mask, margin, right, exit_weights, weight
    )


@pytest.mark.parametrize(("margin", "weight"), [(None, 0.0), (0.05, 0.7)])
@pytest.mark.parametrize("mask", [True, False])
def test_negatives_of_all_samples_are_in_the_batch(
    world, tmp_path, monkeypatch, mask, margin, weight
):
    """Each document once, where it occurs several times, is somebody's negative and a right answer
    of another, or is a sample's own passage."""
    data = with_shared_queries(world, tmp_path / "shared", None)
    store = open_store(data.tokenized, tmp_path / "cache", progress=False)
    batch, eos = batch_of(data, store, "facts", mask, all_negatives=True)
    samples, _ = dataset_rows(data, "facts")
    used = [document for _, own, others in samples[:ROWS] for document in (own, *others)]
    assert len(set(used)) < len(used)
    assert len(batch.in_batch_documents) == len(set(used)) > ROWS
    right = right_documents(samples)[:ROWS]
    own = {(i, d) for i, (_, _, others) in enumerate(samples[:ROWS]) for d in others}
    assert any((i, d) not in own for i in range(ROWS) for d in right[i] & {d for _, d in own})
    counts = assert_like_naive(
        data, monkeypatch, "facts", batch, eos, mask, margin, right, None, weight, True
    )
    assert (counts["masked_by_document"] > 0) == mask


@pytest.mark.parametrize(
    ("mask", "margin", "weight"), [(True, None, 0.0), (True, 0.05, 0.7), (False, 0.05, 0.7)]
)
@pytest.mark.parametrize("all_negatives", [False, True])
def test_all_pairs_are_compared(world, tmp_path, monkeypatch, mask, margin, weight, all_negatives):
    """Where rows ask the same, have the same passage, or are each other's right answer."""
    data = with_shared_queries(world, tmp_path / "shared", None)
    store = open_store(data.tokenized, tmp_path / "cache", progress=False)
    batch, eos = batch_of(data, store, "facts", mask, ROWS, all_negatives, all_pairs=True)
    assert batch.uncompared.shape == (ROWS, len(batch.global_documents) + ROWS)
    of_queries = batch.uncompared[:, -ROWS:]
    assert of_queries.diagonal().all()
    assert (of_queries.sum() > ROWS) == mask
    assert not of_queries.all(dim=1).any()
    right = right_documents(dataset_rows(data, "facts")[0])[:ROWS]
    assert_like_naive(
        data,
        monkeypatch,
        "facts",
        batch,
        eos,
        mask,
        margin,
        right,
        None,
        weight,
        all_negatives,
        all_pairs=True,
    )


@pytest.mark.parametrize("mask", [True, False])
def test_a_document_of_one_related_row_is_not_compared(world, tmp_path, mask):
    """Also where another row, that is not related, has it as its passage."""
    data = with_shared_queries(world, tmp_path / "shared", None)
    store = open_store(data.tokenized, tmp_path / "cache", progress=False)
    batch, _ = batch_of(data, store, "facts", mask, 21, all_negatives=True, all_pairs=True)
    samples, _ = dataset_rows(data, "facts")
    right, documents = right_documents(samples), batch.global_documents.tolist()
    passages = [passage for _, passage, _ in samples[:21]]
    mixed = 0
    for i, own in enumerate(passages):
        related = [
            j == i or (mask and (other in right[i] or own in right[j]))
            for j, other in enumerate(passages)
        ]
        assert batch.uncompared[i, len(documents) :].tolist() == related
        for place, document in enumerate(documents):
            of_rows = {related[j] for j, other in enumerate(passages) if other == document}
            assert bool(batch.uncompared[i, place]) == (of_rows != {False})
            mixed += len(of_rows) == 2
    assert mask or mixed


def assert_like_naive(
    world,
    monkeypatch,
    name,
    batch,
    eos,
    mask,
    margin,
    right=None,
    exit_weights=None,
    from_itself=0.0,
    all_negatives=False,
    all_pairs=False,
):
    """Values and every gradient of the objective; returns what the naive version leaves out."""
    samples, documents = dataset_rows(world, name)
    naive, counts = AutoModel.from_pretrained(world.backbone), {}
    expected = objective(
        naive,
        samples[:ROWS],
        documents,
        task=batch.task,
        exits=[1, 2],
        use_mrl=True,
        temperature=0.05,
        max_length=MAX_LENGTH,
        eos_id=eos,
        mask=mask,
        right=right,
        margin=margin,
        counts=counts,
        exit_weights=exit_weights,
        from_itself=from_itself,
        all_negatives=all_negatives,
        all_pairs=all_pairs,
    )
    expected.backward()
    references = {key: parameter.grad for key, parameter in naive.named_parameters()}
    names = {"embedding.weight": "embed_tokens.weight", "norms.0.weight": "norm.weight"}
    for at_once in (2**21, 30):
        monkeypatch.setattr(losses, "LOGITS_AT_ONCE", {"cpu": at_once})
        student = MatryoshkaEncoder(AutoModel.from_pretrained(world.backbone), (1, 2))
        vectors = student(batch.texts.input_ids, batch.texts.packed)
        terms = Objective(
            dataclasses.replace(SPEC, exit_weights=exit_weights),
            self_distillation=from_itself,
            false_negative_margin=margin,
        )(vectors, batch)
        torch.testing.assert_close(terms.total, expected, rtol=1e-5, atol=1e-6)
        assert terms.masked.by_document == counts["masked_by_document"]
        assert float(terms.masked.by_margin) == pytest.approx(counts["masked_by_margin"], abs=1e-3)
        terms.total.backward()
        for key, parameter in student.named_parameters():
            reference = references[names.get(key, key.removeprefix("backbone."))]
            assert reference.abs().max() > 1e-5, key
            torch.testing.assert_close(
                parameter.grad, reference, rtol=1e-3, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
            )
    return counts


def test_the_margin_decides_how_many(world, store):
    """None at 2, which no cosine exceeds; at 0 all above the positive, but not copies of it."""
    batch, _ = batch_of(world, store, "facts", mask=False, rows=21)
    documents = batch.passage_documents
    copies = (documents[:, None] == documents) & ~torch.eye(21, dtype=torch.bool)
    assert copies.any()
    encoder = MatryoshkaEncoder(AutoModel.from_pretrained(world.backbone), (1, 2))
    with torch.no_grad():
        vectors = encoder(batch.texts.input_ids, batch.texts.packed)
    terms = {
        margin: Objective(SPEC, false_negative_margin=margin)(vectors, batch)
        for margin in (0.0, 0.1, 2.0)
    }
    masked = {margin: float(term.masked.by_margin) for margin, term in terms.items()}
    assert masked[0.0] > masked[0.1] > masked[2.0] == 0
    assert (terms[0.0].masked.passages[copies] == 0).all()
    assert terms[0.0].hard < terms[2.0].hard
    assert terms[0.0].in_batch < terms[2.0].in_batch
    torch.testing.assert_close(
        terms[2.0].total, Objective(SPEC)(vectors, batch).total, rtol=0, atol=0
    )


def test_last_digits_do_not_decide_at_the_margin(world, store):
    """As they differ between numbers of processes: for each pair in turn the margin is set where it
    decides about that pair, and vectors are moved by what rounding moves them."""
    batch, _ = batch_of(world, store, "facts", mask=True)
    encoder = MatryoshkaEncoder(AutoModel.from_pretrained(world.backbone), (2,))
    with torch.no_grad():
        vectors = encoder(batch.texts.input_ids, batch.texts.packed)
        query, passages = (
            torch.nn.functional.normalize(vectors[0, texts], dim=-1)
            for texts in (batch.query, batch.passage)
        )
        above = query @ passages.T - (query * passages).sum(-1, keepdim=True)
        generator = torch.Generator().manual_seed(0)
        noise = 1 + 1e-7 * torch.randn(vectors.shape, generator=generator)
        for difference in above[above > 0.02].tolist():
            for part in (0.0, 0.5, 1.0):  # of the edge
                margin = (difference - false_negatives.ROUNDING) / (1 + part * false_negatives.EDGE)
                decided = Objective(SPEC, false_negative_margin=margin)
                one, other = decided(vectors, batch), decided(vectors * noise, batch)
                torch.testing.assert_close(one.total, other.total, rtol=1e-5, atol=0)
    assert (above > 0.02).sum() > 10


@pytest.mark.parametrize("margin", [0.02, None])
def test_a_run_logs_what_the_loops_count(world, tmp_path, margin):
    """One line over two epochs, each step a whole dataset, at weights that do not move."""
    settings = {
        "max_seq_length": MAX_LENGTH,
        "use_mel": False,
        "mel_ranks": None,
        "r": 0,
        "valid_fraction": 0,
    }
    steps = {"train_batch_size": 30, "train_steps": 6, "log_interval": 6}
    still = {"learning_rate": 1e-12, "min_lr": 0.0, "weight_decay": 0.0}
    tasks = {"facts": "retrieval", "topics": "clustering", "sentiment": "classification"}
    given = {name: {"task": task, "num_hard_neg": 10} for name, task in tasks.items()}
    code, lines = train(
        world, tmp_path, datasets=given, false_negative_margin=margin, **settings, **steps, **still
    )
    assert code == 0
    model, eos = (
        AutoModel.from_pretrained(world.backbone),
        AutoTokenizer.from_pretrained(world.backbone).eos_token_id,
    )
    expected = {"masked_by_document": 0, "masked_by_margin": 0}
    for name, task in tasks.items():
        counts: dict[str, int] = {}
        with torch.no_grad():
            rows = {
                "use_mrl": False,
                "temperature": 0.05,
                "max_length": MAX_LENGTH,
                "eos_id": eos,
                "exits": [2],
            }
            objective(
                model, *dataset_rows(world, name), task=task, margin=margin, counts=counts, **rows
            )
        expected = {key: expected[key] + 2 * counts[key] for key in expected}  # two epochs
    assert expected["masked_by_document"] > 0
    assert lines[0]["masked_by_document"] == expected["masked_by_document"]
    if margin is None:
        assert "masked_by_margin" not in lines[0]
    else:
        assert lines[0]["masked_by_margin"] == round(expected["masked_by_margin"]) > 0


def test_a_saved_window_may_lack_what_came_later():
    saved = Window(steps=3, loss=1.5).to_json()
    for key in ("seconds", "masked_by_document", "masked_by_margin"):
        del saved[key]
    assert Window(**saved) == Window(steps=3, loss=1.5)
