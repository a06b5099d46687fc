"""LoRA: adapters against a naive version, what moves and what does not, merged folders, resumption,
many processes."""

import importlib.metadata
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from helpers.comparing import assert_same_metrics, assert_same_tensors
from helpers.sharded import run_each_sharded
from helpers.tiny_models import SPOKEN, assert_equal_vectors, naive
from helpers.tiny_runs import (
    Inputs,
    Launch,
    final_bytes,
    final_state,
    metrics,
    run,
    run_each,
    write_in_bfloat16,
)
from helpers.zero2_runs import CPU, run_zero2
from oracles import exit_vectors
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel

import run as run_script
from ml_embed.config import load_config
from ml_embed.data.packing import PackedSequences
from ml_embed.files.paths import numbered_folders
from ml_embed.inference.embedder import Embedder
from ml_embed.model import MatryoshkaEncoder
from ml_embed.model_folders.read import ModelFolder, load_encoder
from ml_embed.training import lora
from ml_embed.training.build import build_encoder
from ml_embed.training.inputs import open_inputs

pytest.importorskip("peft", reason="peft is not installed")

RANK, ALPHA = 4, 6.0
SETTINGS = {
    "lora_r": RANK,
    "lora_alpha": ALPHA,
    "train_batch_size": 4,
    "train_steps": 6,
    "learning_rate": 1e-3,
}
EVERYTHING = {
    "mll_norm": "per_layer",
    "gradient_checkpointing": True,
    "kd_weight": 0.5,
    "valid_fraction": 0.3,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    return Inputs.write(tmp_path_factory.mktemp("lora") / "inputs")


def train(inputs: Inputs, name: str, *arguments: str, **changes) -> Path:
    """One run in this process; its folder."""
    config = inputs.config(name, **SETTINGS | changes)
    assert run_script.main(["--config", str(config), *arguments]) == 0
    return inputs.run_dir(name)


@pytest.fixture(scope="module")
def trained(inputs) -> Path:
    return train(inputs, "trained", checkpointing_steps=3, mll_norm="per_layer")


def start_of(inputs: Inputs, name: str = "start", **changes):
    """The encoder as a run builds it, and the run's derived numbers."""
    config, _ = load_config(inputs.config(name, **SETTINGS | changes))
    opened = open_inputs(config, 1, progress=False)
    return build_encoder(config, opened, torch.device("cpu"), torch.float32), opened.resolved


def texts(count: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 300, (3 + 2 * i,), generator=generator) for i in range(count)]


def encode(encoder, ids: list[torch.Tensor]) -> torch.Tensor:
    return encoder(torch.cat(ids), PackedSequences.from_lengths([len(text) for text in ids]))


def adapted_matrices(state) -> list[str]:
    return [
        name.removesuffix(".lora_A.default.weight")
        for name in state
        if name.endswith(".lora_A.default.weight")
    ]


class NaiveAdapter(nn.Module):
    """y = W x + s B (A x), one factor after the other."""

    def __init__(self, W, A, B, scale):
        super().__init__()
        self.W, self.A, self.B, self.scale = (
            nn.Parameter(W),
            nn.Parameter(A),
            nn.Parameter(B),
            scale,
        )

    def forward(self, x):
        return x @ self.W.T + self.scale * (x @ self.A.T) @ self.B.T


class NaiveTable(nn.Module):
    def __init__(self, A, B):
        super().__init__()
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)

    def forward(self, ids):
        return F.embedding(ids, self.A @ self.B)


def naive_model(inputs: Inputs, state) -> nn.Module:
    """transformers' model with the adapters of an encoder's state written out."""
    model = AutoModel.from_pretrained(inputs.folder / "backbone", dtype=torch.float32)
    model.embed_tokens = NaiveTable(state["embedding.A"].clone(), state["embedding.B"].clone())
    for name in adapted_matrices(state):
        parts = [state[f"{name}.lora_{part}.default.weight"].clone() for part in "AB"]
        name = name.removeprefix("backbone.")
        model.set_submodule(
            name, NaiveAdapter(model.get_submodule(name).weight.data, *parts, ALPHA / RANK)
        )
    return model


def test_vectors_and_all_gradients_equal_the_naive_ones(inputs):
    encoder, _ = start_of(inputs)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in encoder.named_parameters():
        if "lora_B" in name:  # it starts as 0
            parameter.data.normal_(0, 0.1, generator=generator)
    model, ids = naive_model(inputs, encoder.state_dict()), texts()
    vectors = encode(encoder, ids)
    each = [exit_vectors(model, text.tolist(), encoder.exits) for text in ids]
    expected = torch.stack(
        [torch.stack([vector[layer] for vector in each]) for layer in encoder.exits]
    )
    torch.testing.assert_close(vectors, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(vectors.shape, generator=generator)
    (vectors * weights).sum().backward()
    (expected * weights).sum().backward()
    own = dict(model.named_parameters())
    compared = 0
    for name, parameter in encoder.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
            continue
        plain = (
            name.replace("embedding.", "embed_tokens.")
            .replace("norms.0.", "norm.")
            .removeprefix("backbone.")
        )
        plain = re.sub(r"\.lora_([AB])\.default\.weight", r".\1", plain)
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, own[plain].grad, rtol=1e-4, atol=1e-4, msg=name)
        compared += 1
    assert compared == 3 * 7 * 2 + 2 + 1, (
        "adapters of seven matrices in three layers, the factors, the final norm"
    )


def test_adapters_start_from_the_seed_alone_and_change_nothing(inputs):
    encoder, _ = start_of(inputs)
    torch.rand(7)  # moves the generator whose history must not matter
    again, other = start_of(inputs)[0].state_dict(), start_of(inputs, seed=1)[0].state_dict()
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, again[name])
        assert torch.equal(tensor, other[name]) != ("lora_A" in name), name
    plain, _ = start_of(inputs, lora_r=0, lora_alpha=None)
    assert torch.equal(encode(encoder, texts()), encode(plain, texts()))


def test_adapters_factors_and_exit_norms_move_and_nothing_else(inputs, trained):
    state = final_state(trained)
    start, resolved = start_of(inputs, mll_norm="per_layer")
    parameters = dict(start.named_parameters())
    assert state.keys() == {
        name for name, parameter in parameters.items() if parameter.requires_grad
    }
    assert {"embedding.A", "embedding.B", "norms.0.weight", "norms.2.weight"} < state.keys()
    for name, tensor in state.items():
        assert not torch.equal(tensor, parameters[name]), name
    assert {
        name.split("|")[0] for name in final_state(trained, "optimizer.safetensors")
    } == state.keys()
    assert resolved.trained_parameters == sum(tensor.numel() for tensor in state.values())


def test_a_saved_folder_is_merged(inputs, trained):
    """Plain Qwen3: base + (alpha / r) B A, all other weights of the layers to the bit those of the
    backbone."""
    base = load_file(inputs.folder / "backbone" / "model.safetensors")
    saved, state = load_file(trained / "step_6" / "model.safetensors"), final_state(trained)
    assert saved.keys() == base.keys()
    matrices = adapted_matrices(state)
    for name in matrices:
        down, up = (state[f"{name}.lora_{part}.default.weight"].double() for part in "AB")
        product = base[f"{name.removeprefix('backbone.')}.weight"].double() + ALPHA / RANK * (
            up @ down
        )
        torch.testing.assert_close(
            saved.pop(f"{name.removeprefix('backbone.')}.weight").double(),
            product,
            rtol=0,
            atol=1e-7,
        )
    frozen = [name for name in saved if name.startswith("layers.")]
    assert len(matrices) == 3 * 7
    assert len(frozen) == 3 * 4
    assert all(torch.equal(saved[name], base[name]) for name in frozen)


def test_the_merged_model_gives_the_vectors_of_the_unmerged(inputs, trained):
    unmerged, resolved = start_of(inputs, mll_norm="per_layer")
    unmerged.load_state_dict(final_state(trained), strict=False)
    with torch.no_grad():
        expected = encode(unmerged, texts())
        merged = encode(
            load_encoder(ModelFolder.open(trained / "step_6"), exits=resolved.exits), texts()
        )
        start = encode(start_of(inputs)[0], texts())
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)
    assert (start - expected).abs().max() > 0.01, "training moved them"
    assert_equal_vectors(
        Embedder.from_pretrained(trained / "step_6").encode(SPOKEN),
        naive(trained / "step_6", SPOKEN),
    )


def test_saving_does_not_disturb_training(inputs, trained):
    unsaved = train(inputs, "unsaved", checkpointing_steps=0, mll_norm="per_layer")
    assert not (unsaved / "step_3").exists()
    state = "resume/step_6/model.safetensors"
    assert (unsaved / state).read_bytes() == (trained / state).read_bytes()


@pytest.fixture
def broken(inputs, trained):
    """A copy of the run as if it had been killed after its checkpoint of step 3."""
    folder = shutil.copytree(trained, inputs.run_dir("broken"))
    for path in (folder, folder / "resume"):
        shutil.rmtree(path / "step_6")
    yield folder
    shutil.rmtree(folder)


def test_a_killed_run_continues_to_the_bit(inputs, trained, broken):
    """From a copy of the backbone: the frozen weights may lie anywhere."""
    copy = shutil.copytree(inputs.folder / "backbone", broken.parent / "copy")
    train(
        inputs,
        "broken",
        "--resume",
        "auto",
        checkpointing_steps=3,
        mll_norm="per_layer",
        model_path=str(copy),
    )
    saved = final_bytes(trained, 6)
    assert len(saved) == 5, "model, factors, exits' norms, and of the state weights and moments"
    assert final_bytes(broken, 6) == saved
    assert metrics(broken) == metrics(trained)


def test_other_frozen_weights_are_refused(inputs, broken, capsys):
    copy = shutil.copytree(inputs.folder / "backbone", broken.parent / "changed")
    weights = load_file(copy / "model.safetensors")
    weights["layers.1.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    before = {path: path.read_bytes() for path in broken.rglob("*") if path.is_file()}
    config = inputs.config(
        "broken", **SETTINGS | {"mll_norm": "per_layer", "model_path": str(copy)}
    )
    assert run_script.main(["--config", str(config), "--resume", "auto"]) == 2
    assert "  - model_path: " in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in broken.rglob("*") if path.is_file()}


def test_adapters_train_on_from_a_trained_folder(inputs, trained):
    """Stage 2: what was merged is the base of new adapters."""
    second = train(
        inputs, "second", model_path=str(trained / "step_6"), mll_norm="per_layer", train_steps=2
    )
    name = "layers.2.self_attn.q_norm.weight"
    first, then = (
        load_file(folder / "model.safetensors")
        for folder in (trained / "step_6", second / "step_2")
    )
    assert torch.equal(first[name], then[name])
    assert (
        0
        < (first["layers.2.mlp.up_proj.weight"] - then["layers.2.mlp.up_proj.weight"]).abs().max()
        < 0.05
    )


@pytest.mark.parametrize(
    "changes",
    [{"max_tokens_per_forward": 40}, {"gradient_checkpointing": True}],
    ids=["in_chunks", "recomputed"],
)
def test_less_memory_means_the_same_run(inputs, trained, changes):
    other = train(inputs, "_".join(changes), mll_norm="per_layer", **changes)
    assert_same_metrics(metrics(trained), metrics(other))
    assert_same_tensors(final_state(trained), final_state(other))


@pytest.mark.slow
def test_compiled_layers_give_the_same(inputs, compiled_graphs):
    config, _ = load_config(inputs.config("compiled", **SETTINGS))
    encoders = []
    for compiled in (False, True):
        backbone = AutoModel.from_pretrained(inputs.folder / "backbone", num_hidden_layers=2)
        encoders.append(MatryoshkaEncoder(backbone, (2,), compile_layers=compiled))
        lora.add_adapters(encoders[-1], config)
    plain, compiled = encoders
    left, right = encode(plain, texts()), encode(compiled, texts())
    assert compiled_graphs
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
    for vectors in (left, right):
        vectors.square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4, msg=name)


def main_with_float32(arguments: list[str]) -> int:
    """run.py's main, with frozen matrices in float32 whatever they hold."""
    lora.narrow_frozen = lambda encoder: None
    return run_script.main(arguments)


def test_frozen_matrices_in_bfloat16_change_no_bit(inputs):
    """A run that computes in bfloat16 from a model in bfloat16, in chunks, with validation."""
    half = write_in_bfloat16(inputs.folder / "half", inputs.folder / "backbone")
    changes = {"model_path": str(half), "valid_fraction": 0.3, "max_tokens_per_forward": 40}
    runs = []
    for name, main in (("narrow", None), ("wide", main_with_float32)):
        config = inputs.config(name, **SETTINGS | changes | {"train_steps": 3})
        run(inputs, config, main=main, environment={"ACCELERATE_MIXED_PRECISION": "bf16"})
        runs.append(inputs.run_dir(name))
    narrow, wide = runs
    assert metrics(narrow) == metrics(wide)
    saved = final_bytes(narrow, 3)
    assert saved == final_bytes(wide, 3)
    merged = load_file(narrow / "step_3" / "model.safetensors")["layers.0.mlp.up_proj.weight"]
    assert merged.dtype == torch.float32
    assert not torch.equal(merged, merged.bfloat16().float()), "adapters are added in float32"


def test_only_what_bfloat16_holds_exactly_is_held_in_it(inputs):
    half = write_in_bfloat16(inputs.folder / "exactly", inputs.folder / "backbone")
    weights = load_file(half / "model.safetensors")
    weights = {name: weight.float() for name, weight in weights.items()}
    weights["layers.1.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(weights, half / "model.safetensors", metadata={"format": "pt"})
    config, _ = load_config(inputs.config("exactly", **SETTINGS | {"model_path": str(half)}))
    opened = open_inputs(config, 1, progress=False)
    for dtype, expected in ((torch.bfloat16, 3 * 7 - 1), (torch.float32, 0)):
        encoder = build_encoder(config, opened, torch.device("cpu"), dtype)
        narrow = {n: p for n, p in encoder.named_parameters() if p.dtype == torch.bfloat16}
        assert len(narrow) == expected
        for name, parameter in narrow.items():
            stored = weights[name.removeprefix("backbone.").replace(".base_layer", "")]
            assert torch.equal(parameter.float(), stored), name


@pytest.fixture(scope="module")
def one_process(inputs) -> Path:
    return train(inputs, "one", **EVERYTHING, teacher_model_path=str(inputs.folder / "teacher"))


def two_processes(inputs: Inputs, name: str, main, **options) -> Path:
    """Everything at once, in chunks, in two processes."""
    changes = EVERYTHING | {
        "teacher_model_path": str(inputs.folder / "teacher"),
        "max_tokens_per_forward": 40,
    }
    config = inputs.config(name, **SETTINGS | changes | {"train_batch_size": 2})
    launch = Launch(inputs.folder / "printed" / name, [config], 2, main=main, **options)
    assert launch.wait() == [0, 0], launch.printed()
    assert "Warning" not in launch.printed()
    return inputs.run_dir(name)


@pytest.mark.parametrize(("name", "main"), [("copied", run_each), ("sharded", run_each_sharded)])
def test_two_processes_are_one(inputs, one_process, name, main):
    """Under DDP, and with frozen and trained parameters sharded together under FSDP2."""
    two = two_processes(inputs, name, main)
    assert_same_metrics(metrics(one_process), metrics(two))
    assert_same_tensors(final_state(one_process), final_state(two))
    moments = [final_state(folder, "optimizer.safetensors") for folder in (one_process, two)]
    assert_same_tensors(*moments)
    saved = [load_file(folder / "step_6" / "model.safetensors") for folder in (one_process, two)]
    assert_same_tensors(*saved)


def test_two_processes_under_zero2_are_one_and_continue_it(inputs, one_process):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

    changes = EVERYTHING | {
        "teacher_model_path": str(inputs.folder / "teacher"),
        "train_batch_size": 2,
    }
    config = inputs.config("zero2", **SETTINGS | changes | {"checkpointing_steps": 3})
    for _ in range(2):
        run(inputs, config, "--resume", "auto", processes=2, main=run_zero2, environment=CPU)
        folder = inputs.run_dir("zero2")
        assert_same_metrics(metrics(one_process), metrics(folder))
        assert_same_tensors(final_state(one_process), final_state(folder))
        for path in (folder, folder / "resume"):
            shutil.rmtree(path / "step_6")  # and once more from step 3
    assert [number for number, _ in numbered_folders(folder / "resume")] == [3]


@pytest.mark.parametrize(
    "changes", [{}, {"mll_norm": "per_layer"}, {"r": 0, "use_mel": False, "mel_ranks": None}]
)
def test_parameters_and_memory_are_counted_right(inputs, changes):
    encoder, resolved = start_of(inputs, **changes)
    parameters = {
        name: parameter for name, parameter in encoder.named_parameters() if "lora_" not in name
    }
    held = list(encoder.parameters())
    trained = sum(parameter.numel() for parameter in held if parameter.requires_grad)
    assert resolved.parameters == sum(parameter.numel() for parameter in parameters.values())
    assert resolved.trained_parameters == trained
    gib = 4 / 1024**3
    assert resolved.memory_gib["weights"] == round(
        gib * sum(parameter.numel() for parameter in held), 3
    )
    assert resolved.memory_gib["optimizer"] == round(2 * gib * trained, 3)


def test_a_dry_run_tells_how_many_parameters_train(inputs, capsys):
    arguments = ["--config", str(inputs.config("dry", **SETTINGS)), "--dry-run"]
    assert run_script.main(arguments) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert 0 < numbers["trained_parameters"] < 0.5 * numbers["parameters"]
    assert run_script.main([*arguments, "--set", "lora_r=0", "lora_alpha=null"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["trained_parameters"] == numbers["parameters"]


def test_a_rank_that_no_matrix_has_is_refused(inputs, capsys):
    arguments = ["--config", str(inputs.config("large", **SETTINGS)), "--dry-run", "--set"]
    assert run_script.main([*arguments, "lora_r=33"]) == 2
    assert (
        "lora_r: 33 is more than the 32 of the layers' smallest matrix" in capsys.readouterr().err
    )
    assert run_script.main([*arguments, "lora_r=32"]) == 0


@pytest.mark.parametrize("found", [None, "0.17.1"])
def test_without_peft_the_message_says_how_to_get_it(inputs, monkeypatch, capsys, found):
    version = importlib.metadata.version

    def pretended(name: str) -> str:
        if name != "peft":
            return version(name)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", pretended)
    assert run_script.main(["--config", str(inputs.config("missing", **SETTINGS))]) == 2
    assert "pip install 'peft>=0.18'" in capsys.readouterr().err
    assert not inputs.run_dir("missing").exists()


def test_the_oldest_peft_is_the_one_that_the_package_asks_for():
    assert f'lora = ["peft>={lora.OLDEST_PEFT}"]' in (ROOT / "pyproject.toml").read_text()
