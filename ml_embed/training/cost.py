"""What training costs, before any weight is loaded: memory, FLOPs, bytes sent and time.

One model for `run.py --dry-run` and `scripts/estimate_scale.py`. Bytes of weights, gradients and
moments, FLOPs, and the activations of a token are compared with what the CPU really holds and does
(`tests/training/test_cost.py`). What else it takes is a guess until it was measured on GPUs.

Letters: H hidden size, L decoder layers, S tokens of a text, W processes.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from transformers import Qwen3Config

from ml_embed.config import TrainConfig
from ml_embed.model_folders.sizes import (
    adapter_parameters,
    embedding_parameters,
    layer_parameters,
    matrix_shapes,
)

GIB = 1024**3
MACHINE = 8
"""GPUs of a machine, which are joined by fast links"""
USABLE = 0.92
"""guess: share of a GPU's memory for what is counted here; losses, NCCL and gaps take the rest"""
SHARE_OF_PEAK = 0.4
"""guess: share of the data sheet's FLOP/s that a step reaches"""
MOMENTS_BYTES = {"adamw": 8.0, "adamw_8bit": 2 * (1 + 4 / 256)}
"""of both moments of a parameter; 8 bits have a scale for each block of 256"""
ZERO2_BUCKET = 500_000_000  # numbers that DeepSpeed averages at once

EngineName = Literal["copies", "zero2", "fsdp2", "hsdp"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU, by its data sheet."""

    flops: float
    """bfloat16 FLOP/s of dense products"""
    memory_gib: float
    links: float
    """bytes per second to the GPUs of its machine, in one direction"""
    network: float
    """bytes per second to other machines, with an adapter for each GPU"""

    def fits(self, gib: float) -> bool:
        return gib <= USABLE * self.memory_gib


# By a part of the name that CUDA gives it; the first that fits.
GPUS = {
    "H100 PCIe": Gpu(756e12, 79, 64e9, 50e9),
    "H100": Gpu(989e12, 79, 450e9, 50e9),
    "H200": Gpu(989e12, 140, 450e9, 50e9),
    "A100-SXM4-40GB": Gpu(312e12, 39, 300e9, 25e9),
    "A100": Gpu(312e12, 79, 300e9, 25e9),
}


@dataclass(frozen=True)
class Layout:
    """So many processes hold one copy of each kind of tensor together; the others hold more."""

    processes: int
    weights: int = 1
    gradients: int = 1
    moments: int = 1

    @classmethod
    def of(cls, engine: EngineName, processes: int) -> "Layout":
        """The engines of configs/: "hsdp" shares within a machine and copies between machines."""
        if engine == "copies":
            return cls(processes)
        shared = min(processes, MACHINE) if engine == "hsdp" else processes
        return cls(processes, 1 if engine == "zero2" else shared, shared, shared)


@dataclass(frozen=True)
class Teacher:
    """A model beside the student: whole on each process, without gradients.

    On GPUs its weights have the type that it computes in; on CPUs they are float32, also where the
    estimate says bfloat16. It encodes each text of a step once, before the student does. Its
    activations, of one layer at a time, are not counted: those of the published teachers are fewer
    than the student's with gradient_checkpointing.
    """

    backbone: Qwen3Config
    rank: int = 0
    """r of its token factors; 0 = a whole table"""
    norms: int = 1
    """final norms: one, or one for each exit"""

    @property
    def parameters(self) -> int:
        return _parameters(self.backbone, self.rank, self.norms)

    def flops(self, length: float) -> float:
        """Of one token, in texts of `length` tokens."""
        return (
            _matrix_flops(self.backbone)
            + _attention_flops(self.backbone, length)
            + 2 * self.rank * self.backbone.hidden_size
        )


def _parameters(backbone: Qwen3Config, rank: int, norms: int) -> int:
    """Of an encoder without adapters."""
    layers = backbone.num_hidden_layers * layer_parameters(backbone)
    return embedding_parameters(backbone, rank) + layers + norms * backbone.hidden_size


@dataclass(frozen=True)
class Parameters:
    """How many parameters there are."""

    saved: int
    """in the model that is saved: adapters are merged in it"""
    trained: int
    """those that have a gradient and moments"""
    held: int
    """in memory while it trains, over all processes that share them"""
    narrow: int
    """of them, those that stand in bfloat16 where computation does: frozen matrices, if the model
    that training starts from is in bfloat16 (`lora.narrow_frozen`)"""
    embedding: int
    layer: int
    """of one decoder layer, with its adapters"""
    teacher: int
    """of the model beside the student; 0 = none"""

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        backbone: Qwen3Config,
        exits: int,
        teacher: Teacher | None = None,
    ) -> "Parameters":
        """Of a run whose model has so many exits."""
        depth = backbone.num_hidden_layers
        layers = depth * layer_parameters(backbone)
        matrices = depth * sum(map(math.prod, matrix_shapes(backbone).values()))
        adapters = adapter_parameters(backbone, config.lora_r)
        saved = _parameters(backbone, config.r, exits if config.mll_norm == "per_layer" else 1)
        return cls(
            saved=saved,
            trained=saved - layers + adapters if config.lora_r else saved,
            held=saved + adapters,
            narrow=matrices if config.lora_r and backbone.dtype == torch.bfloat16 else 0,
            embedding=embedding_parameters(backbone, config.r),
            layer=(layers + adapters) // depth,
            teacher=teacher.parameters if teacher else 0,
        )


@dataclass(frozen=True)
class TokensPerStep:
    """Real tokens that one process encodes in a step."""

    average: float
    most: int


def estimate_memory(
    config: TrainConfig,
    backbone: Qwen3Config,
    parameters: Parameters,
    tokens: TokensPerStep,
    half_precision: bool,
    layout: Layout | None = None,
) -> dict[str, float]:
    """Need of one process, in GiB: what is always there, and the activations of a step.

    "total" is with the average batch, "total_most" with the largest that there can be.

    Args:
        half_precision: it computes in bfloat16, over float32 weights, gradients and moments.
        layout: None = nothing is shared.
    """
    fixed = fixed_bytes(config, parameters, layout or Layout(1), half_precision)
    per_token = activation_bytes(config, backbone, half_precision)
    activations = {
        "activations": per_token * _at_once(tokens.average, config),
        "activations_most": per_token * _at_once(tokens.most, config),
    }
    always = sum(fixed.values())
    totals = {name.replace("activations", "total"): always + x for name, x in activations.items()}
    return {k: round(size / GIB, 3) for k, size in (fixed | activations | totals).items()}


def fixed_bytes(
    config: TrainConfig, parameters: Parameters, layout: Layout, half_precision: bool
) -> dict[str, float]:
    """Bytes of one process that do not depend on the batch.

    "passing" is what is there for a moment: layers that are gathered whole, gradients before they
    are shared out.
    """
    width = 2 if half_precision else 4
    zero2 = layout.moments > layout.weights
    narrow = parameters.narrow if half_precision and not zero2 else 0  # DeepSpeed: all in float32
    wide, trained = parameters.held - narrow, parameters.trained
    weights = (4 * wide + 2 * narrow) / layout.weights
    bytes_each = MOMENTS_BYTES[config.optimizer] + (4 if config.ema_decay else 0)
    moments = bytes_each * trained / layout.moments
    passing = 0.0
    if layout.weights > 1:  # two layers, since the next one is fetched early, and the table
        passing += width * (2 * parameters.layer + parameters.embedding)
        largest = max(parameters.embedding, 0 if config.lora_r else parameters.layer)
        passing += (width + 4) * largest  # gradients, as computed and as they are summed
    elif half_precision:  # autocast's copies
        weights += 2 * wide
    if zero2:  # a copy of the part of weights that it moves
        moments += 4 * trained / layout.moments
        passing += 4 * min(ZERO2_BUCKET, trained)
    return {
        "weights": weights,
        "gradients": 4 * trained / layout.gradients,
        "optimizer": moments,
        "passing": passing,
        "teacher": width * parameters.teacher,
    }


def _at_once(tokens: float, config: TrainConfig) -> float:
    """Tokens whose activations are in memory together; a longer text is a chunk of its own."""
    if not config.max_tokens_per_forward:
        return tokens
    return min(tokens, max(config.max_tokens_per_forward, config.max_seq_length))


def activation_bytes(config: TrainConfig, backbone: Qwen3Config, half_precision: bool) -> int:
    """Bytes kept for the backward pass of one token.

    In each layer about 8 H numbers for the norms and residuals, 4 for each query and 6 for each key
    and value component, 4 for each MLP component, and what stands between an adapter's two parts.
    """
    assert backbone.num_key_value_heads is not None  # Qwen3Config fills it in
    heads = 4 * backbone.num_attention_heads + 6 * backbone.num_key_value_heads
    per_layer = (
        8 * backbone.hidden_size
        + heads * backbone.head_dim
        + 4 * backbone.intermediate_size
        + config.lora_r * len(matrix_shapes(backbone))
    )
    layers = backbone.num_hidden_layers
    width = 2 if half_precision else 4
    if config.gradient_checkpointing:
        return width * (per_layer + backbone.hidden_size * layers)
    return width * per_layer * layers


@dataclass(frozen=True)
class Flops:
    """Of one token that is encoded."""

    forward: float
    backward: float
    """with what gradient_checkpointing computes again: all but the last product of each layer"""
    teacher: float = 0.0
    """forward, of the model beside the student"""

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        backbone: Qwen3Config,
        length: float,
        teacher: Teacher | None = None,
    ) -> "Flops":
        """In texts of `length` tokens. Losses are not counted."""
        whole, attention = _matrix_flops(backbone), _attention_flops(backbone, length)
        # the table's factors, and adapters
        beside = 2 * config.r * backbone.hidden_size + 2 * adapter_parameters(
            backbone, config.lora_r
        )
        # frozen matrices have no gradient of their own
        backward = (1 if config.lora_r else 2) * whole + 2 * (attention + beside)
        forward = whole + attention + beside
        if config.gradient_checkpointing:
            outputs, inputs = matrix_shapes(backbone)["down_proj"]
            backward += forward - (backbone.num_hidden_layers - 1) * 2 * outputs * inputs
        return cls(forward, backward, teacher.flops(length) if teacher else 0.0)


def _matrix_flops(backbone: Qwen3Config) -> float:
    """A token's products with the layers' matrices; of the last layer, keys and values only."""
    matrices = {name: 2 * math.prod(shape) for name, shape in matrix_shapes(backbone).items()}
    last = matrices["k_proj"] + matrices["v_proj"]
    return (backbone.num_hidden_layers - 1) * sum(matrices.values()) + last


def _attention_flops(backbone: Qwen3Config, length: float) -> float:
    """A token's scores and weighted sums in texts of S = `length` tokens: of S / 2 on average."""
    heads = backbone.num_attention_heads * backbone.head_dim
    return 2 * (backbone.num_hidden_layers - 1) * heads * length


@dataclass(frozen=True)
class Step:
    """What one process does in one optimizer step."""

    flops: float
    within: float
    """bytes that it sends to GPUs of its machine"""
    across: float
    """bytes that it sends to other machines"""

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        flops: Flops,
        parameters: Parameters,
        tokens: float,
        layout: Layout,
        half_precision: bool,
    ) -> "Step":
        """A step of so many tokens of the process, in chunks if the config says so."""
        chunks = math.ceil(tokens / _at_once(tokens, config))
        forward = flops.forward * (2 if chunks > 1 else 1)  # once without a graph
        work = tokens * (flops.teacher + forward + flops.backward)
        shared = _bytes_among(layout.processes, layout, parameters, chunks, half_precision)
        if layout.weights > 1 and layout.processes > layout.weights:  # hybrid: copies of shares
            own = _bytes_among(layout.weights, layout, parameters, chunks, half_precision)
            copies = layout.processes // layout.weights
            between = 2 * 4 * parameters.trained / layout.weights * (copies - 1) / copies
            return cls(work, own, between)
        if layout.processes > MACHINE:
            return cls(work, 0.0, shared)
        return cls(work, shared, 0.0)

    def seconds(self, gpu: Gpu, share_of_peak: float = SHARE_OF_PEAK) -> float:
        """If sending goes on beside computing and the slower of the two decides: a guess."""
        sending = self.within / gpu.links + self.across / gpu.network
        return max(self.flops / (share_of_peak * gpu.flops), sending)


def _bytes_among(
    processes: int, layout: Layout, parameters: Parameters, chunks: int, half_precision: bool
) -> float:
    """Bytes that each of so many processes sends, as rings do it, for weights and gradients."""
    gradients, others = 4 * parameters.trained, (processes - 1) / processes
    if layout.weights > 1:
        passes = 3 * chunks if chunks > 1 else 2  # forward (twice in chunks) and backward
        weights = passes * (2 if half_precision else 4) * parameters.held
        return others * (weights + chunks * gradients)
    # summed and handed out again: gradients, or with ZeRO-2 the moved weights
    return others * 2 * gradients
