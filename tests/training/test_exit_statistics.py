"""The key `log_exit_gradients`, against loops over pairs and texts."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from helpers.comparing import CASES
from helpers.in_process import train
from helpers.tiny_runs import Inputs, metrics, run
from torch import nn
from torch.nn.functional import cosine_similarity

from ml_embed.data.packing import PackedBatch, PackedSequences
from ml_embed.training.exit_statistics import exit_statistics
from ml_embed.training.gradcache import forward_backward
from ml_embed.training.run import Run


def test_the_numbers_are_the_naive_ones():
    generator = torch.Generator().manual_seed(0)
    vectors, gradients = torch.randn(2, 3, 7, 16, generator=generator)
    vectors[1] = vectors[1, :1] + 0.1 * vectors[1]  # nearly collapsed
    batch = SimpleNamespace(query=torch.tensor([4, 0, 2, 6, 1]), gathered_rows=torch.arange(4))
    found = exit_statistics(vectors, gradients, batch, (1, 2, 4), (16, 4))
    assert len(found) == 3 * 2 + 3 * 2 * 2
    asked = []
    for vector, gradient in zip(vectors, gradients, strict=True):
        shared = torch.eye(16, requires_grad=True)
        (torch.stack([shared @ row for row in vector]) * gradient).sum().backward()
        asked.append(shared.grad.flatten())
    for place, exit in enumerate((1, 2, 4)):
        norm = asked[place].norm()
        assert found[f"gradient_norm_depth_{exit}"] == pytest.approx(float(norm), rel=1e-5)
        cosine = float(asked[place] @ asked[-1] / norm / asked[-1].norm())
        assert found[f"gradient_cosine_depth_{exit}"] == pytest.approx(cosine, rel=1e-4)
        for dim in (16, 4):
            rows = [vectors[place, text, :dim] for text in (4, 0, 2, 6)]
            cosines = [cosine_similarity(a, b, 0) for a, b in itertools.combinations(rows, 2)]
            mean = float(torch.stack(cosines).mean())
            assert found[f"mean_cosine_depth_{exit}_dim_{dim}"] == pytest.approx(mean, abs=1e-6)
            whole = torch.stack(rows).double()
            squared = torch.linalg.eigvalsh(whole @ whole.T)
            values = [math.sqrt(value) for value in squared.clamp_min(0).tolist()]
            entropy = -sum(v / sum(values) * math.log(v / sum(values)) for v in values if v)
            name = f"effective_rank_depth_{exit}_dim_{dim}"
            assert found[name] == pytest.approx(math.exp(entropy), rel=1e-4)
    assert found["mean_cosine_depth_2_dim_16"] > 0.9
    assert found["effective_rank_depth_2_dim_16"] < found["effective_rank_depth_1_dim_16"]


@pytest.mark.parametrize("max_tokens", [0, 4])
def test_the_gradients_are_those_at_the_vectors(max_tokens):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(2, 9, 3))

        def forward(self, ids, packed, rank):
            return self.table[:, ids.index_select(0, packed.last_tokens)]

    model, seen = Model(), []
    engine = SimpleNamespace(
        model=model,
        needs_equal_chunks=False,
        accumulating=lambda last: torch.enable_grad(),
        backward=lambda loss, last=True: loss.backward(),
    )
    texts = PackedBatch(torch.arange(9), PackedSequences.from_lengths([2, 3, 4], "cpu"))
    forward_backward(
        engine,
        texts,
        None,
        lambda vectors: SimpleNamespace(total=(vectors**3).sum()),
        max_tokens,
        lambda *shown: seen.append(shown),
    )
    ((vectors, gradients),) = seen
    assert torch.equal(vectors, model.table[:, [1, 4, 8]].detach())
    torch.testing.assert_close(gradients, 3 * vectors**2)


def test_a_run_logs_them_and_is_otherwise_the_same(world, tmp_path):
    lines = {}
    for name, changes in (
        ("off", {}),
        ("on", {"log_exit_gradients": 2}),
        ("chunks", {"log_exit_gradients": 2, "max_tokens_per_forward": 40}),
    ):
        code, logged = train(world, tmp_path, name, **changes)
        assert code == 0
        lines[name] = [line for line in logged if line["split"] == "train"]
    for off, on, chunks in zip(*lines.values(), strict=True):
        new = on.keys() - off.keys()
        assert on["loss"] == off["loss"]
        assert chunks.keys() == on.keys()
        if on["step"] % 2:
            assert not new
            continue
        assert len(new) >= 2 * 2 + 2 * 4
        assert on["gradient_cosine_depth_2"] == pytest.approx(1)
        assert on["gradient_norm_depth_1"] > 0
        assert 1 <= on["effective_rank_depth_1_dim_8"] <= 4
        for name in new:
            assert chunks[name] == pytest.approx(on[name], rel=1e-3, abs=1e-5), name


def test_a_step_that_is_not_finite_is_said_as_without_them(world, tmp_path, capsys, monkeypatch):
    """Singular values of NaN are an error of torch's, which must not come before the step's own."""
    monkeypatch.setattr(Run, "learning_rate", lambda run, step: 1e25)
    code, _ = train(world, tmp_path, log_exit_gradients=2, valid_fraction=0)
    assert code == 2
    assert "stopped before the update" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_log_what_one_does(tmp_path):
    """Texts that both encode, and last batches that leave fillers, are among them."""
    inputs, logged = Inputs.write(tmp_path / "inputs"), []
    for processes in (1, 2):
        settings = CASES["no_negatives"] | {"train_batch_size": 4 // processes}
        config = inputs.config(f"on-{processes}", log_exit_gradients=1, **settings)
        run(inputs, config, processes=processes)
        logged.append(metrics(inputs.run_dir(f"on-{processes}")))
    for one, two in zip(*logged, strict=True):
        names = [name for name in one if "_depth_" in name and "/" not in name]
        assert one.keys() == two.keys()
        assert names or one["split"] == "valid"
        for name in names:
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), (name, one["step"])
