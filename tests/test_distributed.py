"""W processes are one process: the same loss curve, validation and weights, with everything switched on.

One launch for each number of processes trains all the cases one after another. The global batch is four rows.
"""

import pytest
import torch
from tiny_runs import DATASETS, Inputs, Launch, final_state, metrics, run_each

CASES = {
    "everything": {"valid_fraction": 0.3},
    "in_chunks": {"valid_fraction": 0.3, "max_tokens_per_forward": 40},
    "teacher": {"teacher": True, "kd_weight": 0.5, "mll_norm": "per_layer", "mask_false_negatives": False},
    "no_negatives": {"num_hard_neg": 0, "num_hard_neg_clustering": 0, "use_mel": False, "mel_ranks": None, "r": 0},
}
LAUNCHES = {1: CASES, 2: CASES, 4: ["everything", "in_chunks"]}
GLOBAL_BATCH = 4


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    return Inputs.write(tmp_path_factory.mktemp("distributed") / "inputs")


@pytest.fixture(scope="module")
def run_dirs(inputs):
    """(case, processes) -> the run's folder."""
    for processes, cases in LAUNCHES.items():
        configs = []
        for case in cases:
            changes = dict(CASES[case])
            if changes.pop("teacher", False):
                changes["teacher_model_path"] = str(inputs.folder / "teacher")
            name = f"{case}-{processes}"
            configs.append(inputs.config(name, train_batch_size=GLOBAL_BATCH // processes, **changes))
        launch = Launch(inputs.folder / "printed" / str(processes), configs, processes, main=run_each)
        assert launch.wait() == [0] * processes, launch.printed()
        assert "Warning" not in launch.printed()
    return lambda case, processes: inputs.run_dir(f"{case}-{processes}")


def assert_same_metrics(left: list[dict], right: list[dict], relative: float = 1e-5) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() - {"split", "encoded_tokens"}:
            assert one[key] == pytest.approx(other[key], rel=relative, abs=1e-7), (key, one["step"])


def assert_same_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], atol: float = 1e-5) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], atol=atol, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    ("processes", "case"), [(processes, case) for processes, cases in LAUNCHES.items() for case in cases][len(CASES) :]
)
def test_many_processes_are_one(run_dirs, processes, case):
    one, many = run_dirs(case, 1), run_dirs(case, processes)
    assert_same_metrics(metrics(one), metrics(many))
    assert_same_tensors(final_state(one), final_state(many))


def test_chunks_are_the_whole(run_dirs):
    for processes in (1, 2, 4):
        whole, chunks = run_dirs("everything", processes), run_dirs("in_chunks", processes)
        assert_same_metrics(metrics(whole), metrics(chunks))
        assert_same_tensors(final_state(whole), final_state(chunks))


def test_the_cases_hold_what_they_should(run_dirs, inputs):
    """Uneven last batches, fewer rows than processes, every dataset, losses and weights that really moved."""
    lines = metrics(run_dirs("teacher", 1))
    seen = {key.split("/")[0] for line in lines for key in line if "/" in key}
    assert seen == set(DATASETS)
    rows = [spec[1] for spec in DATASETS.values()]
    assert any(count % GLOBAL_BATCH for count in rows)
    assert min(rows) < 2
    assert sum(line["loss"] > 0.01 for line in lines) > len(lines) / 2
    assert all("distillation_loss" in line for line in lines)
    assert any("topics/training_loss_hard" in line for line in lines)
    assert not any("topics/training_loss_in_batch" in line for line in lines)
    first, last = final_state(run_dirs("teacher", 1)), final_state(run_dirs("everything", 1))
    moved = sum(not torch.equal(first[name], last[name]) for name in first.keys() & last.keys())
    assert moved > 30
    assert any(line["split"] == "valid" for line in metrics(run_dirs("everything", 4)))
