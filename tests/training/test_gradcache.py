"""GradCache over processes of which one has a single chunk: the gradients of the whole batch."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from helpers.tiny_runs import Launch
from torch import nn

from ml_embed.data.packing import PackedBatch, PackedSequences
from ml_embed.distributed.collectives import gather_rows, process_index, world_size
from ml_embed.distributed.engine import AccelerateEngine
from ml_embed.training.gradcache import forward_backward, split_texts

BUDGET = 6
# step -> process -> lengths of its four texts; a process's share fits the budget or does not
LENGTHS = [
    [[1, 1, 2, 2], [2, 2, 2, 3]],
    [[1, 1, 1, 3], [3, 3, 5, 9]],
    [[4, 5, 5, 6], [1, 1, 1, 1]],
    [[1, 1, 1, 1], [1, 1, 2, 2]],
]
CHUNKS = [[1, 2], [1, 3], [4, 1], [1, 1]]


class MeanEncoder(nn.Module):
    """(T,) ids -> (1, N, H), each text the mean of its tokens' rows of a table, twisted."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.out = nn.Embedding(50, 8), nn.Linear(8, 8)
        self.forwards = 0

    def forward(self, input_ids, packed, rank):
        self.forwards += 1
        means = [part.mean(0) for part in self.table(input_ids).split(packed.lengths)]
        return self.out(torch.stack(means)).tanh()[None]


def share(step: int, process: int) -> PackedBatch:
    lengths = LENGTHS[step][process]
    generator = torch.Generator().manual_seed(10 * step + process)
    return PackedBatch(
        torch.randint(50, (sum(lengths),), generator=generator),
        PackedSequences.from_lengths(lengths),
    )


def objective(vectors: torch.Tensor) -> SimpleNamespace:
    """Each own text must find itself among those of all processes, as in the in-batch loss."""
    own = vectors[0]
    scores = own @ gather_rows(own).T
    target = torch.arange(len(own)) + process_index() * len(own)
    return SimpleNamespace(total=nn.functional.cross_entropy(scores, target))


def main_of_steps(arguments: list[str]) -> int:
    """All steps in one process group; writes this process's gradients and number of forwards."""
    accelerator = Accelerator(
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)]
    )
    assert world_size() == 2
    encoder = MeanEncoder()
    engine = AccelerateEngine(accelerator, encoder, torch.optim.SGD(encoder.parameters()))
    steps = []
    for step in range(len(LENGTHS)):
        engine.model.zero_grad()
        encoder.forwards = 0
        forward_backward(engine, share(step, process_index()), None, objective, BUDGET)
        gradients = {
            name: parameter.grad.tolist() for name, parameter in encoder.named_parameters()
        }
        steps.append({"forwards": encoder.forwards, "gradients": gradients})
    Path(arguments[0], f"{process_index()}.json").write_text(json.dumps(steps))
    return 0


def whole_gradients(step: int) -> dict[str, torch.Tensor]:
    """Of the joined batch, by one plain backward."""
    encoder = MeanEncoder()
    vectors = torch.cat(
        [encoder(p.input_ids, p.packed, None)[0] for p in (share(step, 0), share(step, 1))]
    )
    nn.functional.cross_entropy(vectors @ vectors.T, torch.arange(len(vectors))).backward()
    return {name: parameter.grad for name, parameter in encoder.named_parameters()}


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """process -> its steps."""
    folder = tmp_path_factory.mktemp("gradcache")
    launch = Launch(folder / "printed", [folder], 2, main=main_of_steps)
    assert launch.wait(30) == [0, 0], launch.printed()
    return [json.loads((folder / f"{number}.json").read_text()) for number in range(2)]


def test_the_shares_are_as_they_should_be():
    assert [
        [len(split_texts(share(step, p), BUDGET)) for p in range(2)] for step in range(len(LENGTHS))
    ] == CHUNKS


@pytest.mark.parametrize("step", range(len(LENGTHS)))
def test_gradients_are_those_of_the_joined_batch(processes, step):
    expected = whole_gradients(step)
    for steps in processes:
        for name, gradient in steps[step]["gradients"].items():
            assert expected[name].abs().max() > 1e-4
            torch.testing.assert_close(torch.tensor(gradient), expected[name], rtol=1e-4, atol=1e-6)


def test_each_chunk_is_encoded_twice_and_nothing_else(processes):
    made = [[steps[step]["forwards"] for steps in processes] for step in range(len(LENGTHS))]
    assert made == [[2, 4], [2, 6], [8, 2], [1, 1]]
