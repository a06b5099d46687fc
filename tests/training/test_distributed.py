"""W processes are one process: the same loss curve, validation and weights, with everything
switched on.

One launch for each number of processes trains all the cases one after another. The global batch is
four rows.
"""

import inspect
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from helpers import ROOT
from helpers.comparing import CASES, GLOBAL_BATCH, LAST, assert_same_metrics, assert_same_tensors
from helpers.sharded import run_each_hybrid, run_each_sharded, run_sharded
from helpers.teachers import LetterModel
from helpers.tiny_runs import DATASETS, Inputs, final_state, launch_each, metrics, run
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

import run as run_script
from ml_embed.config import load_config
from ml_embed.distributed.collectives import gather_rows
from ml_embed.distributed.engine import AccelerateEngine
from ml_embed.errors import UserError
from ml_embed.model_folders.record import RECORD_FILE, ModelRecord
from ml_embed.recipe.teacher import TeacherOptions, embed_teacher
from ml_embed.training import accelerator as run_accelerator
from ml_embed.training import loop

LAUNCHES = {1: CASES, 2: CASES, 4: ["everything", "in_chunks", "all_documents"]}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    return Inputs.write(tmp_path_factory.mktemp("distributed") / "inputs")


@pytest.fixture(scope="module")
def run_dirs(inputs):
    """(case, processes) -> the run's folder."""
    taught = TeacherOptions(
        inputs.folder / "tokenized",
        str(inputs.folder / "backbone"),
        inputs.folder / "teacher_vectors",
    )
    embed_teacher(LetterModel(), taught, progress=False)
    for processes, cases in LAUNCHES.items():
        configs = []
        for case in cases:
            changes = dict(CASES[case])
            if changes.pop("teacher", False):
                changes["teacher_model_path"] = str(inputs.folder / "teacher")
            if changes.pop("teacher_vectors", False):
                changes["teacher_vectors_path"] = str(inputs.folder / "teacher_vectors")
            name = f"{case}-{processes}"
            configs.append(
                inputs.config(name, train_batch_size=GLOBAL_BATCH // processes, **changes)
            )
        launch = launch_each(inputs.folder / "printed" / str(processes), configs, processes)
        assert launch.wait() == [0] * processes, launch.printed()
        assert "Warning" not in launch.printed()
    return lambda case, processes: inputs.run_dir(f"{case}-{processes}")


def run_each_and_look(main: Callable, mesh: tuple[int, ...], configs: list[str]) -> int:
    """`main`, which shards over such a mesh of processes.

    Gradients are shared out after each chunk, not kept whole until the last, where copies are
    summed.
    """
    backward, looked = AccelerateEngine.backward, []

    def backward_and_look(engine, loss, last=True) -> None:
        backward(engine, loss, last)
        looked.append(last)
        for parameter in engine.model.parameters():
            assert parameter.device_mesh.shape == mesh
            assert isinstance(parameter.grad, DTensor) or (not last and len(mesh) == 2)

    AccelerateEngine.backward = backward_and_look
    code = main(configs)
    assert set(looked) == {True, False}
    return code


KEPT = ("exp_avg_sq", "average")
"""what lies beside a weight, among others"""
SHARDED = {
    "sharded": (2, partial(run_each_and_look, run_each_sharded, (2,))),
    "hybrid": (4, partial(run_each_and_look, run_each_hybrid, (2, 2))),
}
"""how weights are shared -> processes, main"""


@pytest.fixture(scope="module")
def sharded_run_dirs(inputs, run_dirs):
    """(case, how weights are shared) -> the run's folder."""
    for how, (processes, main) in SHARDED.items():
        batch = GLOBAL_BATCH // processes
        configs = [
            inputs.config(
                f"{case}-{how}",
                train_batch_size=batch,
                gradient_checkpointing=case == "in_chunks",  # which changes nothing, here neither
                **CASES[case],
            )
            for case in ("everything", "in_chunks")
        ]
        launch = launch_each(inputs.folder / "printed" / how, configs, processes, main)
        assert launch.wait() == [0] * processes, launch.printed()
    return lambda case, how: inputs.run_dir(f"{case}-{how}")


@pytest.mark.parametrize(
    ("processes", "case"),
    [(processes, case) for processes, cases in LAUNCHES.items() for case in cases][len(CASES) :],
)
def test_many_processes_are_one(run_dirs, processes, case):
    one, many = run_dirs(case, 1), run_dirs(case, processes)
    assert "mel_refactor" not in CASES[case] or metrics(one)[-1]["step"] == LAST
    assert_same_metrics(metrics(one), metrics(many))
    assert_same_tensors(final_state(one), final_state(many))


def main_with_inverses_of_its_own(arguments: list[str]) -> int:
    """run.py's main where one process's libraries give another pseudo-inverse.

    At the end both have the same weights.
    """
    inverse, train = torch.linalg.pinv, loop.train
    factor = 1 + int(os.environ["RANK"])

    def train_and_compare(run, progress=False) -> int:
        code = train(run, progress)
        for weight in run.engine.model.parameters():
            others = gather_rows(weight.detach()[None])
            assert torch.equal(others[0], others[1])
        return code

    torch.linalg.pinv = lambda matrix: factor * inverse(matrix)
    loop.train = train_and_compare
    return run_script.main(arguments)


def test_all_processes_turn_factors_alike(inputs):
    changes = {"mel_refactor": 2, "train_steps": 3, "checkpointing_steps": 0}
    config = inputs.config("turned", train_batch_size=2, **changes)
    run(inputs, config, processes=2, main=main_with_inverses_of_its_own)


def test_chunks_are_the_whole(run_dirs):
    for processes in (1, 2, 4):
        whole, chunks = run_dirs("everything", processes), run_dirs("in_chunks", processes)
        assert_same_metrics(metrics(whole), metrics(chunks))
        assert_same_tensors(final_state(whole), final_state(chunks))


def test_the_cases_hold_what_they_should(run_dirs, inputs):
    """Uneven last batches, datasets smaller than a batch, losses and weights that really moved."""
    lines = metrics(run_dirs("teacher", 1))
    seen = {key.split("/")[0] for line in lines for key in line if "/" in key}
    assert seen == {*DATASETS, "Avg"}
    rows = [spec[1] for spec in DATASETS.values()]
    assert any(count % GLOBAL_BATCH for count in rows)
    assert min(rows) < 2
    assert sum(line["loss"] > 0.01 for line in lines) > len(lines) / 2
    assert all("distillation_loss" in line for line in lines)
    assert all(line["distillation_loss"] > 1e-3 for line in metrics(run_dirs("similar", 2)))
    assert any("topics/training_loss_hard" in line for line in lines)
    assert not any("topics/training_loss_in_batch" in line for line in lines)
    first, last = final_state(run_dirs("teacher", 1)), final_state(run_dirs("everything", 1))
    moved = sum(not torch.equal(first[name], last[name]) for name in first.keys() & last.keys())
    assert moved > 30
    valid = [line for line in metrics(run_dirs("everything", 4)) if line["split"] == "valid"]
    assert any("answers/ndcg@10/rank_8_depth_1_dim_8" in line for line in valid)
    counted = [line for line in metrics(run_dirs("everything", 4)) if line["split"] == "train"]
    assert any(line["masked_by_document"] for line in counted)
    assert any(line["masked_by_margin"] for line in counted)
    assert any(line.get("graded/training_loss_similarity", 0) > 0.1 for line in counted)
    assert not any("graded/training_loss_hard" in line for line in counted)
    assert all(-1 <= line["graded/spearman/rank_8_depth_1_dim_8"] <= 1 for line in valid)


@pytest.mark.parametrize("how", SHARDED)
@pytest.mark.parametrize("case", ["everything", "in_chunks"])
def test_sharded_processes_are_one(run_dirs, sharded_run_dirs, case, how):
    one, sharded = run_dirs(case, 1), sharded_run_dirs(case, how)
    assert_same_metrics(metrics(one), metrics(sharded))
    assert_same_tensors(final_state(one), final_state(sharded))
    for moments in (
        final_state(one, "optimizer.safetensors"),
        final_state(sharded, "optimizer.safetensors"),
    ):
        assert all(any(name.endswith(f"|{kind}") for name in moments) for kind in KEPT)
    assert_same_tensors(
        final_state(one, "optimizer.safetensors"), final_state(sharded, "optimizer.safetensors")
    )


@pytest.mark.parametrize("how", SHARDED)
def test_the_model_folder_of_sharded_processes_is_whole(run_dirs, sharded_run_dirs, how):
    (one,) = run_dirs("everything", 1).glob("epoch_1")
    sharded = sharded_run_dirs("everything", how) / "epoch_1"
    names = sorted(str(path.relative_to(one)) for path in one.rglob("*"))
    assert names == sorted(str(path.relative_to(sharded)) for path in sharded.rglob("*"))
    assert "model.safetensors" in names
    for name in names:
        if name.endswith(".safetensors"):
            assert_same_tensors(load_file(one / name), load_file(sharded / name))
        elif name == RECORD_FILE:  # its digests are of weights that are equal but for rounding
            left, right = ModelRecord.load(one), ModelRecord.load(sharded)
            assert left == right
            assert left.digests.keys() == right.digests.keys()
        elif (one / name).is_file():
            assert (one / name).read_bytes() == (sharded / name).read_bytes(), name


def test_a_sharded_run_continues_a_copied_one_and_the_reverse(inputs):
    settings = {"train_steps": 6, "checkpointing_steps": 3, "train_batch_size": 2}
    run(inputs, inputs.config("whole", **settings), processes=2)
    for name, first, then in (
        ("to_sharded", None, run_sharded),
        ("from_sharded", run_sharded, None),
    ):
        run(inputs, inputs.config(name, **settings), processes=2, main=first)
        for path in inputs.run_dir(name).glob("**/step_6"):
            path.rename(inputs.folder / f"{name}-{path.parent.name}-set-aside")
        printed = run(
            inputs, inputs.config(name, **settings), "--resume", "auto", processes=2, main=then
        )
        assert "continuing after step 3" in printed
        assert_same_metrics(metrics(inputs.run_dir("whole")), metrics(inputs.run_dir(name)))
        assert_same_tensors(final_state(inputs.run_dir("whole")), final_state(inputs.run_dir(name)))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("accelerate_*.yaml")), ids=lambda path: path.stem
)
def test_accelerate_reads_every_config(path):
    config = load_config_from_file(str(path))
    given = yaml.safe_load(path.read_text())
    assert str(config.distributed_type.value) == given["distributed_type"]
    assert config.num_processes == given["num_processes"]
    if given["distributed_type"] == "FSDP":
        plugin_names = {
            f"fsdp_{name}" for name in inspect.signature(FullyShardedDataParallelPlugin).parameters
        }
        renamed = {"fsdp_version", "fsdp_transformer_layer_cls_to_wrap", "fsdp_offload_params"}
        assert given["fsdp_config"].keys() <= plugin_names | renamed


def test_the_launcher_hands_on_the_sizes_of_hsdp():
    """Those of the file, unless flags say otherwise."""
    flags = ["--config_file", str(ROOT / "configs" / "accelerate_hsdp.yaml")]
    flags += ["--num_machines", "3", "--num_processes", "24", "--machine_rank", "1"]
    flags += ["--main_process_ip", "10.0.0.1", "--main_process_port", "29500"]
    flags += ["--parallelism_config_dp_replicate_size", "3", "run.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(flags))
    environment = prepare_multi_gpu_env(arguments)
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    assert environment["FSDP_VERSION"] == "2"
    assert environment["ACCELERATE_USE_PARALLELISM_CONFIG"] == "true"
    assert environment["PARALLELISM_CONFIG_DP_REPLICATE_SIZE"] == "3"
    assert environment["PARALLELISM_CONFIG_DP_SHARD_SIZE"] == "8"


def main_that_is_late(arguments: list[str]) -> int:
    """run.py's main; process 1 comes late to the check, and process 0 must not end before.

    gloo's own forming of the group fails in a process that another one leaves as soon as its part
    of that is done.
    """
    came = Path(arguments[1]).with_suffix(".came")
    if os.environ["RANK"] == "1":
        check = run_accelerator._check

        def late(*given) -> None:
            time.sleep(0.5)
            came.touch()
            check(*given)

        run_accelerator._check = late
    code = run_script.main(arguments)
    return code if came.exists() else 1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"DP_SHARD_SIZE": "2", "TP_SIZE": "2"}, "tp_size is 2, but training here"),
        ({"DP_REPLICATE_SIZE": "2", "DP_SHARD_SIZE": "8"}, "2 x 8 processes, but there are 4"),
        ({"DP_REPLICATE_SIZE": "4"}, "dp_shard_size is 1"),
    ],
)
def test_parallelism_that_cannot_work_is_refused(inputs, monkeypatch, sizes, message):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("WORLD_SIZE", "4")
    for name, size in sizes.items():
        monkeypatch.setenv(f"PARALLELISM_CONFIG_{name}", size)
    config, _ = load_config(inputs.config("parallel"))
    with pytest.raises(UserError, match=f"parallelism_config.*{message}"):
        run_accelerator.make_accelerator(config)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "only on GPUs and would silently"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        (
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"},
            "gradient_accumulation_steps is 2; it must be 1",
        ),
    ],
    ids=["fsdp", "deepspeed", "accumulation"],
)
def test_launcher_settings_that_cannot_work_here_are_refused(inputs, environment, message):
    config = inputs.config("refused", train_batch_size=2)
    options = {"main": main_that_is_late, "environment": environment}
    printed = run(inputs, config, processes=2, expected=2, **options)
    assert printed.count("error: ") == 2, "one for each process"
    assert printed.count(message) == 2
    assert "Traceback" not in printed
