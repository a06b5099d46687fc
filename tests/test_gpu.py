"""What only a GPU can show: `pytest -m gpu`. With GPU_TESTS_ON=cpu they are rehearsed on a CPU."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from helpers.in_process import train
from safetensors.torch import load_file

from ml_embed import Embedder
from ml_embed.benchmarks import gpu_training
from ml_embed.benchmarks.gpu_common import Setting
from ml_embed.benchmarks.gpu_kernels import kernels
from ml_embed.recipe.search import nearest
from ml_embed.training.accelerator import set_deterministic

pytestmark = pytest.mark.gpu
DEVICE = torch.device(os.environ.get("GPU_TESTS_ON", "cuda"))
HALF_PRECISION = 0.02
"""relative error of gradients of other order of sums in bfloat16, which has 8 bits; a guess"""


@pytest.fixture(scope="module", autouse=True)
def gpu():
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")


@pytest.fixture
def setting(tmp_path) -> Setting:
    return Setting(DEVICE, small=DEVICE.type == "cpu", output=tmp_path)


def train_on(device: str, world, folder: Path, monkeypatch, name: str, **changes) -> list[dict]:
    """The training lines of a run in float32."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_USE_CPU", str(device == "cpu"))
    arguments = changes.pop("arguments", ())
    code, lines = train(world, folder, name, arguments, **changes)
    assert code == 0
    return lines


def test_attention_kernels_are_the_formula_in_values_and_three_gradients(setting):
    """Heads of 64 and 128; 1, 8 and 16 key/value heads."""
    found = kernels(setting)
    assert found["ok"], found
    assert DEVICE.type == "cpu" or "varlen" in found["worst"]


def test_gradients_in_bfloat16_are_as_near_as_the_naive_steps(setting):
    """At most 1.5 times as far from float32."""
    found = gpu_training.precision(setting)
    assert found["ok"], found


def test_chunks_checkpointing_and_compilation_give_the_same_and_wait_for_nothing(
    setting, monkeypatch
):
    if DEVICE.type == "cpu":  # inductor's C++ takes minutes
        plain = {n: v for n, v in gpu_training.VARIANTS.items() if not v.compile_layers}
        monkeypatch.setattr(gpu_training, "VARIANTS", plain)
        monkeypatch.setattr(gpu_training, "VARIANT_LAYERS", 2)
    found = gpu_training.variants(setting)
    for name, variant in found.items():
        assert isinstance(variant, dict), (name, variant)
        assert variant["gradient_from_whole"] < HALF_PRECISION, (name, variant)
        assert not variant.get("waits"), (name, variant)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mll_norm": "per_layer", "r": 0, "use_mel": False, "mel_ranks": None},
        {"lora_r": 4},
        {"max_tokens_per_forward": 60, "gradient_checkpointing": True},
        {"teacher": True},
    ],
    ids=["plain", "table", "lora", "chunks", "live teacher"],
)
def test_a_run_is_the_cpus_run(world, tmp_path, monkeypatch, changes):
    """Losses, gradient norms and every number of validation, in float32."""
    if changes.get("lora_r"):
        pytest.importorskip("peft")
    if changes.get("teacher"):
        changes = {"teacher_model_path": str(world.backbone)}
    runs = [
        train_on(device, world, tmp_path, monkeypatch, name, validation_steps=2, **changes)
        for name, device in (("expected", "cpu"), ("found", DEVICE.type))
    ]
    assert len(runs[0]) == len(runs[1]) > 4
    for ours, expected in zip(runs[1], runs[0], strict=True):
        assert ours.keys() == expected.keys()
        for key in expected.keys() - {"time", "seconds", "tokens_per_second", "split"}:
            assert ours[key] == pytest.approx(expected[key], rel=2e-3, abs=2e-4), key


def test_deterministic_runs_repeat_and_resume_to_the_bit(world, tmp_path, monkeypatch):
    keys = {"deterministic": True, "checkpointing_steps": 2}
    try:
        for name in ("one", "again", "resumed"):
            train_on(DEVICE.type, world, tmp_path, monkeypatch, name, **keys)
        (state,) = (tmp_path / "resumed" / "resume").glob("step_2*")
        arguments = ("--resume", str(state))
        train_on(DEVICE.type, world, tmp_path, monkeypatch, "resumed", arguments=arguments, **keys)
    finally:
        set_deterministic(False)
    expected = load_file(tmp_path / "one" / "step_4" / "model.safetensors")
    for name in ("again", "resumed"):
        found = load_file(tmp_path / name / "step_4" / "model.safetensors")
        assert all(torch.equal(found[key], expected[key]) for key in expected), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_embedder_gives_the_cpus_vectors(world, dtype):
    texts = [f"{'long ' * length}text" for length in (1, 2, 50, 300)] * 9
    expected = Embedder.from_pretrained(world.backbone, device="cpu").encode(texts)
    found = Embedder.from_pretrained(world.backbone, device=DEVICE, dtype=dtype).encode(texts)
    cosines = (expected * found).sum(axis=1)
    assert cosines.min() > (1 - 1e-5 if dtype == torch.float32 else 0.99)


def test_search_finds_what_the_cpu_finds():
    rng = np.random.default_rng(0)
    queries, documents = (rng.standard_normal((n, 64)).astype(np.float32) for n in (50, 3000))
    excluded = torch.tensor([[0, 5], [7, 9]])
    found = [
        nearest(torch.from_numpy(queries).to(device), documents, 10, excluded, block_size=700)
        for device in ("cpu", DEVICE)
    ]
    torch.testing.assert_close(found[1][0].cpu(), found[0][0], rtol=1e-4, atol=1e-4)
    assert torch.equal(found[1][1].cpu(), found[0][1])
