"""The cost model says what runs on the CPU really hold and do."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from helpers.sharded import shard_on_cpu
from helpers.tiny_runs import Inputs, config_of, run, write_in_bfloat16
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3Model

from ml_embed.commands import estimate_scale
from ml_embed.commands import train as train_command
from ml_embed.config import TrainConfig, load_config
from ml_embed.data.packing import PackedSequences
from ml_embed.files.atomic import write_json
from ml_embed.files.json_file import parse_json
from ml_embed.model import MatryoshkaEncoder, factorize_table
from ml_embed.model_folders.read import ModelFolder
from ml_embed.model_folders.record import ModelRecord
from ml_embed.model_folders.write import save_model_folder
from ml_embed.training import loop
from ml_embed.training.build import build_teacher
from ml_embed.training.cost import (
    GPUS,
    SHARE_OF_PEAK,
    Flops,
    Layout,
    Parameters,
    Step,
    Teacher,
    activation_bytes,
    fixed_bytes,
)
from ml_embed.training.inputs import open_inputs
from ml_embed.training.lora import add_adapters

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
PATHS = dict.fromkeys(
    ("model_path", "experiment_id", "output_dir", "tb_dir", "cache_dir", "train_data_path"), "x"
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    return Inputs.write(tmp_path_factory.mktemp("cost") / "inputs")


def encoder_of(layers: int, config: TrainConfig) -> MatryoshkaEncoder:
    backbone = Qwen3Model(Qwen3Config(**SHAPE, num_hidden_layers=layers))
    factors = (torch.randn(64, config.r), torch.randn(config.r, 128)) if config.r else None
    encoder = MatryoshkaEncoder(
        backbone, (layers,), factors, gradient_checkpointing=config.gradient_checkpointing
    )
    if config.lora_r:
        add_adapters(encoder, config)
    return encoder


def vectors_of(encoder: MatryoshkaEncoder, lengths: list[int]) -> torch.Tensor:
    ids = torch.arange(sum(lengths)) % 64
    return encoder(ids, PackedSequences.from_lengths(lengths))


def test_memory_of_activations_is_about_what_is_kept():
    """float32; the estimate may be over it by a quarter, not under."""
    config = TrainConfig(**PATHS)
    kept = [bytes_kept(encoder_of(layers, config), [300] * 4) for layers in (2, 4)]
    estimate = [
        1200 * activation_bytes(config, Qwen3Config(**SHAPE, num_hidden_layers=layers), False)
        for layers in (2, 4)
    ]  # the difference is two layers that are not narrowed
    assert 0.75 < (kept[1] - kept[0]) / (estimate[1] - estimate[0]) <= 1


def bytes_kept(encoder, lengths: list[int]) -> int:
    """For the backward pass, beside the weights."""
    weights = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that its place is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        assert vectors_of(encoder, lengths).requires_grad
        return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(
    "changes", [{}, {"r": 32}, {"lora_r": 4, "r": 32}, {"gradient_checkpointing": True}]
)
def test_flops_are_those_of_the_matrix_products(changes):
    """Without attention, whose kernels on the CPU compute what the causal mask hides, too."""
    config = TrainConfig(**PATHS, **changes)
    encoder, lengths = encoder_of(4, config), [100] * 20
    with FlopCounterMode(display=False) as counter:
        vectors = vectors_of(encoder, lengths)
        forward = products(counter)
        vectors.sum().backward()
    flops = Flops.of(config, encoder.config, length=0)
    backward = products(counter) - forward
    assert flops.forward * 2000 == pytest.approx(forward, rel=0.03)
    assert flops.backward * 2000 == pytest.approx(backward, rel=0.03)
    if not config.lora_r:
        teacher = Teacher(encoder.config, config.r)
        assert teacher.parameters == sum(p.numel() for p in encoder.parameters())
        assert Flops.of(config, encoder.config, 0, teacher).teacher == flops.forward


def products(counter: FlopCounterMode) -> int:
    counts = counter.get_flop_counts()["Global"]
    return sum(count for name, count in counts.items() if str(name) in ("aten.mm", "aten.addmm"))


def test_attention_grows_with_the_length_of_texts():
    """Scores and weighted sums of S / 2 keys on average, in all layers but the last."""
    backbone = Qwen3Config(**SHAPE, num_hidden_layers=4)
    short, long = (Flops.of(TrainConfig(**PATHS), backbone, length) for length in (100, 300))
    attention = 3 * 2 * (2 * 4 * 32) * (300 - 100) / 2
    assert Teacher(backbone).flops(300) - Teacher(backbone).flops(100) == attention
    assert long.forward - short.forward == attention
    assert long.backward - short.backward == 2 * attention


def main_that_weighs(arguments: list[str]) -> int:
    """run.py's main; prints the bytes that this process holds after the last step."""
    train = loop.train

    def train_and_weigh(run, progress=False) -> int:
        code = train(run, progress)
        weights = list(run.engine.model.parameters())
        gradients = [weight.grad for weight in weights if weight.requires_grad]
        states = run.engine.optimizer.state.values()
        moments = [state[name] for state in states for name in state if name != "step"]
        teacher = list(run.teacher.parameters()) if run.teacher else []
        held = {
            "weights": weights,
            "gradients": gradients,
            "optimizer": moments,
            "teacher": teacher,
        }
        print("held", json.dumps({name: local_bytes(each) for name, each in held.items()}))
        return code

    loop.train = train_and_weigh
    return train_command.main(arguments)


def main_that_weighs_shares(arguments: list[str]) -> int:
    shard_on_cpu()
    return main_that_weighs(arguments)


def local_bytes(tensors) -> int:
    own = (x.to_local() if isinstance(x, DTensor) else x for x in tensors)
    return sum(x.numel() * x.element_size() for x in own)


@pytest.mark.parametrize(
    ("name", "layout", "changes"),
    [
        ("whole", Layout(1), {"mll_norm": "per_layer"}),
        ("adapters", Layout(1), {"lora_r": 4}),
        ("shared", Layout.of("fsdp2", 2), {"teacher_model_path": "teacher"}),
        ("narrow", Layout.of("fsdp2", 2), {"lora_r": 4, "model_path": "half"}),
        ("averaged", Layout.of("fsdp2", 2), {"ema_decay": 0.9}),
    ],
)
def test_weights_gradients_and_moments_are_counted_exactly(inputs, name, layout, changes):
    settings = {"train_steps": 1, "train_batch_size": 2, "checkpointing_steps": 0}
    write_in_bfloat16(inputs.folder / "half", inputs.folder / "backbone")
    paths = {key: str(inputs.folder / name) for key, name in changes.items() if "_path" in key}
    path = config_of(inputs, name, **settings | changes | paths)
    main = main_that_weighs_shares if layout.weights > 1 else main_that_weighs
    half, taught = "model_path" in changes, "teacher_model_path" in changes
    environment = {"ACCELERATE_MIXED_PRECISION": "bf16" if half else "no"}
    processes = layout.processes
    printed = run(inputs, path, processes=processes, main=main, environment=environment)
    held = [json.loads(line[5:]) for line in printed.splitlines() if line.startswith("held ")]
    config, _ = load_config(path)
    backbone = Qwen3Config.from_pretrained(config.model_path)
    teacher = Teacher(Qwen3Config.from_pretrained(inputs.folder / "teacher")) if taught else None
    exits = 3
    estimate = fixed_bytes(config, Parameters.of(config, backbone, exits, teacher), layout, half)
    assert len(held) == processes
    for kind in held[0]:
        assert sum(own[kind] for own in held) == processes * estimate[kind], kind


def test_engines_share_what_they_say():
    config = TrainConfig(**PATHS, r=32)
    parameters = Parameters.of(config, Qwen3Config(**SHAPE, num_hidden_layers=4), 1)

    def held(engine, processes):
        return fixed_bytes(config, parameters, Layout.of(engine, processes), True)

    assert held("copies", 64) == held("copies", 1)
    assert held("fsdp2", 64)["weights"] * 64 == 4 * parameters.held
    assert held("hsdp", 64) == held("fsdp2", 8)
    assert held("zero2", 8)["weights"] == held("copies", 1)["weights"]
    assert held("zero2", 8)["gradients"] * 8 == held("copies", 1)["gradients"]


def test_frozen_matrices_take_two_bytes_where_nothing_is_lost():
    """And no copies for autocast; DeepSpeed holds everything in float32."""
    config = TrainConfig(**PATHS, r=32, lora_r=4)

    def weights(dtype, engine="copies", half=True):
        backbone = Qwen3Config(**SHAPE, num_hidden_layers=4, dtype=dtype)
        parameters = Parameters.of(config, backbone, 1)
        return fixed_bytes(config, parameters, Layout.of(engine, 8), half)["weights"]

    matrices = 4 * (128 * (128 + 64 + 64 + 128) + 3 * 128 * 384)
    assert weights("float32") - weights("bfloat16") == 4 * matrices
    assert weights("float32", "fsdp2") - weights("bfloat16", "fsdp2") == 2 * matrices / 8
    assert weights("float32", "zero2") == weights("bfloat16", "zero2")
    assert weights("float32", half=False) == weights("bfloat16", half=False)


def test_a_step_computes_again_what_it_does_not_keep_and_sends_what_it_shares():
    plain = TrainConfig(**PATHS)
    backbone = Qwen3Config(**SHAPE, num_hidden_layers=4)
    flops, parameters = Flops(10.0, 20.0), Parameters.of(plain, backbone, 1)

    def step(engine, processes, tokens=100, **changes):
        layout = Layout.of(engine, processes)
        config = replace(plain, max_seq_length=10, **changes)
        return Step.of(config, flops, parameters, tokens, layout, True)

    assert step("copies", 1) == Step(3000, 0, 0)
    taught = Step.of(plain, replace(flops, teacher=5.0), parameters, 100, Layout(1), True)
    assert taught == Step(3500, 0, 0)
    assert step("copies", 1, max_tokens_per_forward=50).flops == 4000
    assert step("copies", 1, max_tokens_per_forward=100).flops == 3000
    everything = 4 * parameters.held
    assert step("copies", 8).within == 2 * everything * 7 / 8
    assert step("copies", 16) == Step(3000, 0, 2 * everything * 15 / 16)
    assert step("fsdp2", 8).within == (2 * everything / 2 + everything) * 7 / 8
    chunked = step("fsdp2", 8, max_tokens_per_forward=50)
    assert chunked.within == 2 * (3 * everything / 2 + everything) * 7 / 8
    hybrid = step("hsdp", 16)
    assert hybrid.within == step("fsdp2", 8).within
    assert hybrid.across == 2 * everything / 8 * 1 / 2
    gpu = GPUS["H100"]
    assert Step(gpu.flops, 0, 0).seconds(gpu, 0.5) == 2
    assert Step(0, gpu.links, 3 * gpu.network).seconds(gpu) == 4


def test_a_dry_run_says_what_gpus_need(inputs, capsys):
    """Each engine on 1, 8 and 64 of them, in bfloat16, although it runs on a CPU."""
    path = config_of(inputs, "dry", lora_r=4)
    assert train_command.main(["--config", str(path), "--dry-run"]) == 0
    resolved = json.loads(capsys.readouterr().out)
    needs = resolved["on_h100"]
    assert [(need["gpus"], need["engine"]) for need in needs] == [
        (1, "one process"),
        *((8, engine) for engine in ("DDP", "ZeRO-2", "FSDP2")),
        *((64, engine) for engine in ("DDP", "ZeRO-2", "FSDP2", "HSDP")),
    ]
    assert all(need["fits"] and 0 < need["gib"] <= need["gib_most"] for need in needs)
    assert needs[0]["hours"] > 0


def test_a_teacher_of_a_model_folder_is_counted_exactly(inputs, tmp_path):
    """With factors in place of a table, and a norm for each exit that is learned from."""
    start = ModelFolder.open(inputs.folder / "backbone")
    backbone = Qwen3Model(start.config)
    factors = factorize_table(backbone.embed_tokens.weight.detach(), 16)
    encoder = MatryoshkaEncoder(backbone, (1, 3), factors, "per_layer")
    record = ModelRecord((1, 3), (64,), (8, 16), 0.05, 16, norm_sharing="per_layer")
    folder = tmp_path / "teacher"
    save_model_folder(folder, encoder.state_dict(), start.config, start.tokenizer, record)
    for kd_loss, exits in (("vectors", 2), ("similarity", 1)):
        changes = {"teacher_model_path": str(folder), "kd_loss": kd_loss}
        config, _ = load_config(config_of(inputs, "taught", **changes))
        opened = open_inputs(config, 1, progress=False)
        teacher = build_teacher(config, opened.teacher, torch.device("cpu"), torch.float32)
        assert len(teacher.norms) == opened.teacher_cost.norms == exits
        assert opened.teacher_cost.parameters == sum(p.numel() for p in teacher.parameters())


def test_a_dry_run_counts_the_teacher(inputs, tmp_path, capsys):
    """Whole on each GPU, whatever the engine; its work is one more forward pass."""
    folder = shutil.copytree(inputs.folder / "backbone", tmp_path / "teacher")
    (folder / "model.safetensors").unlink()  # a dry run needs no weights
    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 3}
    write_json(folder / "config.json", parse_json((folder / "config.json").read_bytes()) | sizes)
    found = []
    for changes in ({}, {"teacher_model_path": str(folder)}):
        path = config_of(inputs, "taught", **changes)
        assert train_command.main(["--config", str(path), "--dry-run"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    alone, taught = found
    teacher = Teacher(Qwen3Config.from_pretrained(folder))
    gib = 4 * teacher.parameters / 1024**3
    assert taught["memory_gib"]["teacher"] == round(gib, 3) > 0.1
    for total in ("total", "total_most"):
        assert taught["memory_gib"][total] - alone["memory_gib"][total] == pytest.approx(
            gib, abs=0.001
        )
    for before, after in zip(alone["on_h100"], taught["on_h100"], strict=True):
        assert after["gib"] - before["gib"] == pytest.approx(gib / 2, abs=0.001), after["engine"]
    one, more = alone["on_h100"][0], taught["on_h100"][0]
    tokens = alone["mean_tokens_per_step"] * alone["total_steps"]
    seconds = tokens * teacher.flops(0) / (SHARE_OF_PEAK * GPUS["H100"].flops)
    assert more["hours"] - one["hours"] == pytest.approx(seconds / 3600, rel=0.05)


@pytest.mark.parametrize(
    "flags", [["--gpu", "B9"], ["--share-of-peak", "1.5"], ["--documents", "0"]]
)
def test_numbers_that_cannot_be_are_refused(flags, capsys):
    assert estimate_scale.main(flags) == 2
    assert capsys.readouterr().err.startswith(f"error: {flags[0]}")
