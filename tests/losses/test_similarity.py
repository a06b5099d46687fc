"""CoSENT over nested dims and exits, against loops over pairs and sentence-transformers' own."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers.tiny_models import make_tokenizer
from helpers.tiny_runs import write_backbone, write_tokenized
from oracles import cosent_loss as naive_cosent_loss
from oracles import dims_and_weights, naive_spearman, objective
from torch.nn.functional import normalize
from transformers import AutoModel

from ml_embed.config import parse_config
from ml_embed.data.batch_builder import BatchBuilder
from ml_embed.data.schedule import plan_dataset
from ml_embed.data.store import open_store
from ml_embed.evaluation.metrics import spearman
from ml_embed.losses.nested import MatryoshkaSpec, cosent_loss, pair_cosines
from ml_embed.losses.objective import Objective
from ml_embed.model import MatryoshkaEncoder, dim_weights

DIMS = (64, 32, 16, 8)
SPEC = MatryoshkaSpec(DIMS, dim_weights(DIMS), 0.05)
SCORES = {
    "distinct": [0.5, 0.1, 0.9, 0.3, 0.7, 0.0],
    "with ties": [1.0, 0.0, 1.0, 0.5, 0.0, 0.5],
    "of two kinds": [1.0, 0.0, 0.0, 0.0, 0.0, 1.0],
    "all equal": [2.0] * 6,
    "one pair": [3.0],
}


def vectors(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(count, DIMS[0], generator=generator, requires_grad=True) for _ in range(2)
    )


def loss_of(query, passage, scores, spec) -> torch.Tensor:
    """Of a model with one exit."""
    cosines = pair_cosines(query[None], passage[None], spec)
    return cosent_loss(cosines.transpose(0, 1), scores, spec)


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_values_and_gradients_are_the_naive_ones(scores):
    query, passage = vectors(len(scores))
    fast = loss_of(query, passage, torch.tensor(scores), SPEC)
    slow = naive_cosent_loss(list(query), list(passage), scores, dims_and_weights(64, True), 0.05)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)
    slow = slow + 0 * (query.sum() + passage.sum())  # it has no graph where all scores are equal
    found, wanted = (torch.autograd.grad(loss, (query, passage)) for loss in (fast, slow))
    assert (wanted[0].abs().max() > 1e-3) == (len(set(scores)) > 1)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_it_is_the_loss_of_sentence_transformers():
    losses = pytest.importorskip("sentence_transformers.losses")
    query, passage = vectors(6)
    scores = torch.tensor(SCORES["with ties"])
    whole = MatryoshkaSpec((64,), (1.0,), 0.05)
    theirs = losses.CoSENTLoss(torch.nn.Identity(), scale=20.0)
    expected = theirs.compute_loss_from_embeddings([query, passage], scores)
    ours = loss_of(query, passage, scores, whole)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_far_cosines_do_not_overflow():
    cosines = torch.tensor([[[1.0]], [[-1.0]]], requires_grad=True)
    spec = MatryoshkaSpec((64,), (1.0,), 0.001)
    loss = cosent_loss(cosines, torch.tensor([0.0, 1.0]), spec)
    loss.backward()
    assert loss.item() == pytest.approx(2000)
    torch.testing.assert_close(cosines.grad, torch.tensor([[[1000.0]], [[-1000.0]]]))


def test_the_objective_of_a_batch_is_the_naive_one(tmp_path):
    """All exits and dims, and every named gradient of the model."""
    backbone = write_backbone(tmp_path / "backbone")
    tokenizer = make_tokenizer()
    write_tokenized(tmp_path / "data", tokenizer, {"graded": ("similarity", 7, 5, (0, 0))})
    store = open_store(tmp_path / "data", tmp_path / "cache", progress=False)
    dataset, eos = store.datasets["graded"], tokenizer.eos_token_id
    paths = dict.fromkeys(
        ("model_path", "experiment_id", "output_dir", "tb_dir", "cache_dir", "train_data_path"), "x"
    )
    plan = plan_dataset(dataset, parse_config(paths | {"valid_fraction": 0}))
    assert plan.task == "similarity", "because all rows have a score"
    batch = BatchBuilder(0, 16, eos, True, 0, 1).build(dataset, plan, np.arange(7), epoch=0)
    rows = pq.read_table(tmp_path / "data" / "graded_query.parquet").to_pylist()
    corpus = pq.read_table(tmp_path / "data" / "graded_corpus.parquet").to_pylist()
    naive = AutoModel.from_pretrained(backbone)
    expected = objective(
        naive,
        [(row["query_input_ids"], row["passage_doc_id"], []) for row in rows],
        [row["input_ids"] for row in corpus],
        task="similarity",
        scores=[row["score"] for row in rows],
        exits=[1, 3],
        use_mrl=True,
        temperature=0.05,
        max_length=16,
        eos_id=eos,
    )
    expected.backward()
    student = MatryoshkaEncoder(AutoModel.from_pretrained(backbone), (1, 3))
    terms = Objective(SPEC)(student(batch.texts.input_ids, batch.texts.packed), batch)
    torch.testing.assert_close(terms.total, expected, rtol=1e-5, atol=1e-6)
    assert terms.total == terms.similarity > 0
    terms.total.backward()
    references = {key: parameter.grad for key, parameter in naive.named_parameters()}
    names = {"embedding.weight": "embed_tokens.weight", "norms.0.weight": "norm.weight"}
    for key, parameter in student.named_parameters():
        reference = references[names.get(key, key.removeprefix("backbone."))]
        assert reference.abs().max() > 1e-5, key
        torch.testing.assert_close(parameter.grad, reference, rtol=1e-3, atol=1e-5, msg=key)


def test_spearman_is_the_naive_one():
    generator = np.random.default_rng(0)
    for _ in range(20):
        left = generator.integers(0, 5, 12).astype(float)
        right = generator.normal(size=12)
        found = spearman(torch.from_numpy(left), torch.from_numpy(right))
        assert found == pytest.approx(naive_spearman(left.tolist(), right.tolist()), abs=1e-12)
    ordered = normalize(torch.arange(5.0), dim=0)
    assert spearman(ordered, ordered**3) == pytest.approx(1)
    assert np.isnan(spearman(ordered, torch.ones(5)))
    assert np.isnan(spearman(ordered[:1], ordered[:1]))
