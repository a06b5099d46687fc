"""Tables of what large runs take, for each size of Qwen3: computed, not measured.

`ml_embed.training.cost` holds the model behind them and says what of it is a guess.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import Qwen3Config

from ml_embed.config import TrainConfig, parse_config
from ml_embed.model_folders.backbone import backbone_config
from ml_embed.training.cost import (
    ENGINES,
    GIB,
    GPUS,
    MACHINE,
    USABLE,
    EngineName,
    Flops,
    Gpu,
    Layout,
    Parameters,
    Step,
    Teacher,
    TokensPerStep,
    activation_bytes,
    estimate_memory,
    fixed_bytes,
)
from ml_embed.training.inputs import Inputs

SIZES = ("0.6B", "1.7B", "4B", "8B", "14B")
TEACHERS = {"0.6B": "1.7B", "1.7B": "4B"}
"""student -> the teacher beside it, as published"""
VOCABULARY = 151_936  # Qwen3's
GPU_COUNTS = (1, 8, 64)
LENGTHS = (512, 2_048, 8_192, 32_768)
RANK, LORA_RANK = 512, 16
LONGEST = 1_024
"""tokens; a chunk must hold a text"""
STEP_TOKENS = 65_536
"""of one GPU: about 32 samples of 9 texts"""
ENGINE_NAMES = {"copies": "DDP", "zero2": "ZeRO-2", "fsdp2": "FSDP2", "hsdp": "HSDP"}


@dataclass(frozen=True)
class Table:
    """One table of the page."""

    title: str
    header: tuple[str, ...]
    rows: list[list[str]]


@dataclass(frozen=True)
class Corpus:
    """The data of a large run."""

    documents: int
    samples: int
    document_tokens: int
    query_tokens: int = 40
    negatives: int = 24
    """of each sample"""
    used_negatives: int = 7
    """of them, in a step"""

    @property
    def training_tokens(self) -> int:
        """Of one pass over the samples."""
        passages = 1 + self.used_negatives
        return self.samples * (self.query_tokens + passages * self.document_tokens)


@dataclass(frozen=True)
class Model:
    """A size of Qwen3, and how it is trained."""

    size: str
    config: TrainConfig
    teacher_size: str | None = None

    @classmethod
    def of(cls, size: str, teacher: str | None = None, **changes: Any) -> "Model":
        paths = ("model_path", "experiment_id", "output_dir", "tb_dir", "cache_dir")
        given: dict[str, Any] = dict.fromkeys((*paths, "train_data_path"), size)
        config = parse_config(given | {"r": RANK, "max_seq_length": LONGEST} | changes)
        return cls(size, config, teacher)

    @property
    def name(self) -> str:
        return self.size if self.teacher_size is None else f"{self.size} beside {self.teacher_size}"

    @property
    def backbone(self) -> Qwen3Config:
        published = backbone_config(self.size, VOCABULARY, 0, None)
        published.dtype = torch.bfloat16
        return published

    @property
    def teacher(self) -> Teacher | None:
        if self.teacher_size is None:
            return None
        return Teacher(backbone_config(self.teacher_size, VOCABULARY, 0, None), RANK)

    @property
    def parameters(self) -> Parameters:
        return Parameters.of(self.config, self.backbone, exits=1, teacher=self.teacher)

    def always_gib(self, layout: Layout) -> float:
        """What one process holds whatever the batch."""
        return sum(fixed_bytes(self.config, self.parameters, layout, True).values()) / GIB

    def tokens_at_once(self, layout: Layout, gpu: Gpu, checkpointing: bool) -> int:
        """Tokens whose activations fit beside it; 0 if nothing does."""
        config = replace(self.config, gradient_checkpointing=checkpointing)
        free = (USABLE * gpu.memory_gib - self.always_gib(layout)) * GIB
        return max(0, int(free / activation_bytes(config, self.backbone, True)))


@dataclass(frozen=True)
class Way:
    """A way to train that fits into memory."""

    engine: EngineName
    seconds: float
    """for a step of `STEP_TOKENS` tokens of each GPU"""


def fastest_way(model: Model, gpus: int, gpu: Gpu, length: int, share_of_peak: float) -> Way | None:
    """The fastest way to train on so many GPUs; None if none fits."""
    ways = [
        Way(engine, seconds)
        for engine in engines_for(gpus)
        for checkpointing in (False, True)
        if (seconds := _seconds(model, engine, gpus, gpu, length, checkpointing, share_of_peak))
    ]
    return min(ways, key=lambda way: way.seconds, default=None)


def engines_for(gpus: int) -> tuple[EngineName, ...]:
    """Those that differ on so many GPUs."""
    return ENGINES[: 1 if gpus == 1 else 3 if gpus <= MACHINE else 4]


def _seconds(
    model: Model,
    engine: EngineName,
    gpus: int,
    gpu: Gpu,
    length: int,
    checkpointing: bool,
    share_of_peak: float,
) -> float | None:
    layout = Layout.of(engine, gpus)
    at_once = model.tokens_at_once(layout, gpu, checkpointing)
    if at_once < LONGEST:
        return None
    config = replace(
        model.config,
        gradient_checkpointing=checkpointing,
        max_tokens_per_forward=0 if at_once >= STEP_TOKENS else at_once,
    )
    flops = Flops.of(config, model.backbone, length, model.teacher)
    step = Step.of(config, flops, model.parameters, STEP_TOKENS, layout, True)
    return step.seconds(gpu, share_of_peak)


def tables(gpu_name: str, gpu: Gpu, corpus: Corpus, share_of_peak: float) -> Iterator[Table]:
    """All tables of the page, in its order."""
    yield sizes_table(corpus)
    yield memory_table(gpu_name, gpu)
    yield hours_table(gpu_name, gpu, corpus, share_of_peak)
    yield length_table(gpu_name, gpu)
    yield storage_table(corpus)


def needs_on_gpus(config: TrainConfig, inputs: Inputs) -> list[dict[str, Any]]:
    """What a run needs on H100s: a dict for each number of them and engine that it may have."""
    backbone, resolved, teacher = inputs.backbone_config, inputs.resolved, inputs.teacher_cost
    parameters = Parameters.of(config, backbone, len(resolved.exits), teacher)
    average = resolved.mean_tokens_per_step / resolved.world_size
    tokens = TokensPerStep(average, resolved.most_tokens_per_step)
    samples = config.samples_per_process(resolved.world_size)
    texts = samples * (2 + max(plan.num_negatives for plan in resolved.datasets))
    flops, gpu = Flops.of(config, backbone, average / texts, teacher), GPUS["H100"]
    needs = []
    for count in GPU_COUNTS:
        engines = engines_for(count)
        for engine in engines[:1] if config.optimizer == "adamw_8bit" else engines:
            layout = Layout.of(engine, count)
            memory = estimate_memory(config, backbone, parameters, tokens, True, layout)
            step = Step.of(config, flops, parameters, average, layout, True)
            steps = resolved.total_steps * resolved.world_size / count  # for as many tokens
            needs.append(
                {
                    "gpus": count,
                    "engine": ENGINE_NAMES[engine] if count > 1 else "one process",
                    "gib": memory["total"],
                    "gib_most": memory["total_most"],
                    "fits": gpu.fits(memory["total_most"]),
                    "hours": float(f"{steps * step.seconds(gpu) / 3600:.3g}"),
                }
            )
    return needs


def sizes_table(corpus: Corpus) -> Table:
    rows = []
    for size in SIZES:
        model = Model.of(size)
        counts, flops = model.parameters, Flops.of(model.config, model.backbone, 250)
        rows.append(
            [
                size,
                f"{(counts.saved - counts.embedding) / 1e9:.2f} B",
                f"{VOCABULARY * model.backbone.hidden_size / 1e6:,.0f} M",
                f"{counts.embedding / 1e6:,.0f} M",
                f"{flops.forward / 1e9:.1f}",
                f"{(flops.forward + flops.backward) / 1e9:.1f}",
                f"{4 * _plain_parameters(model) / 1e9:.1f} GB",
                f"{12 * counts.trained / 1e9:.1f} GB",
            ]
        )
    header = (
        "size",
        "layers",
        "token table",
        f"its factors, r {RANK}",
        "GFLOP per token, encoding",
        "training",
        "model folder",
        "resume state",
    )
    return Table("Sizes: parameters, work and what a checkpoint takes", header, rows)


def _plain_parameters(model: Model) -> int:
    """Of a saved folder, beside nested/: the table is multiplied out."""
    whole = replace(model.config, r=0)
    return Parameters.of(whole, model.backbone, exits=1).saved


def memory_table(gpu_name: str, gpu: Gpu) -> Table:
    lora, eight_bit = {"lora_r": LORA_RANK}, {"optimizer": "adamw_8bit"}
    columns: dict[str, tuple[dict[str, Any], EngineName, int]] = {
        "one GPU": ({}, "copies", 1),
        "one GPU, adamw_8bit": (eight_bit, "copies", 1),
        f"one GPU, LoRA {LORA_RANK}": (lora, "copies", 1),
        "ZeRO-2 on 8": ({}, "zero2", 8),
        "FSDP2 on 8, HSDP": ({}, "fsdp2", 8),
        "FSDP2 on 64": ({}, "fsdp2", 64),
        f"FSDP2 on 8, LoRA {LORA_RANK}": (lora, "fsdp2", 8),
    }
    rows = []
    for size, teacher in (*((size, None) for size in SIZES), *TEACHERS.items()):
        cells = [
            _memory_cell(Model.of(size, teacher, **changes), Layout.of(engine, gpus), gpu)
            for changes, engine, gpus in columns.values()
        ]
        rows.append([Model.of(size, teacher).name, *cells])
    title = (
        f"Memory of each {gpu_name} in bfloat16: GiB that are always there, and how many tokens "
        "fit beside them at once with gradient_checkpointing (a dash: not even one text)"
    )
    return Table(title, ("size", *columns), rows)


def _memory_cell(model: Model, layout: Layout, gpu: Gpu) -> str:
    tokens = model.tokens_at_once(layout, gpu, checkpointing=True)
    fits = f"{tokens // 1000:,}k" if tokens >= LONGEST else "-"
    return f"{model.always_gib(layout):.0f}, {fits}"


def hours_table(gpu_name: str, gpu: Gpu, corpus: Corpus, share_of_peak: float) -> Table:
    models = [
        *(Model.of(size) for size in SIZES),
        *(Model.of(size, teacher) for size, teacher in TEACHERS.items()),
        *(Model.of(size, lora_r=LORA_RANK) for size in SIZES),
    ]
    rows = []
    for model in models:
        cells = [_hours_cell(model, count, gpu, corpus, share_of_peak) for count in GPU_COUNTS]
        lora = f", LoRA {LORA_RANK}" if model.config.lora_r else ""
        rows.append([f"train {model.name}{lora}", *cells])
    tokens = corpus.documents * corpus.document_tokens
    for size in SIZES:
        model = Model.of(size)
        forward = Flops.of(model.config, model.backbone, corpus.document_tokens).forward
        seconds = tokens * forward / (share_of_peak * gpu.flops)
        rows.append([f"encode with {size}", *(_time(seconds / n) for n in GPU_COUNTS)])
    title = (
        f"Time on {gpu_name}s at {share_of_peak:.0%} of their peak: one pass of training over "
        f"{corpus.samples / 1e6:,.0f} million samples ({corpus.training_tokens / 1e9:,.0f} billion "
        f"tokens) by the fastest engine that fits, and encoding {corpus.documents / 1e6:,.0f} "
        f"million documents ({tokens / 1e9:,.0f} billion tokens)"
    )
    header = ("what", *(f"{n} GPU{'s' * (n > 1)}" for n in GPU_COUNTS))
    return Table(title, header, rows)


def _hours_cell(model: Model, gpus: int, gpu: Gpu, corpus: Corpus, share_of_peak: float) -> str:
    way = fastest_way(model, gpus, gpu, corpus.document_tokens, share_of_peak)
    if way is None:
        return "does not fit"
    steps = corpus.training_tokens / STEP_TOKENS / gpus
    engine = f" ({ENGINE_NAMES[way.engine]})" * (gpus > 1)
    return _time(steps * way.seconds) + engine


def _time(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 10 else f"{hours:,.0f} h" if hours < 72 else _days(hours)


def _days(hours: float) -> str:
    return f"{hours / 24:,.0f} days"


def length_table(gpu_name: str, gpu: Gpu) -> Table:
    rows = []
    for size in SIZES:
        model = Model.of(size)
        works = [Flops.of(model.config, model.backbone, length) for length in LENGTHS]
        per_token = [work.forward + work.backward for work in works]
        cells = [f"{work / per_token[0]:.2f}" for work in per_token]
        rows.append([size, *cells, _where_it_fits(model, LENGTHS[-1], gpu)])
    header = (
        "size",
        *(f"{length:,} tokens" for length in LENGTHS),
        f"a text of {LENGTHS[-1]:,} fits",
    )
    title = (
        f"Long texts: work per token against texts of {LENGTHS[0]} tokens, and where one fits "
        f"({gpu_name}, gradient_checkpointing)"
    )
    return Table(title, header, rows)


def _where_it_fits(model: Model, length: int, gpu: Gpu) -> str:
    for count in GPU_COUNTS:
        for engine in engines_for(count):
            if model.tokens_at_once(Layout.of(engine, count), gpu, True) >= length:
                return "one GPU" if count == 1 else f"{ENGINE_NAMES[engine]} on {count}"
    return "nowhere"


def storage_table(corpus: Corpus) -> Table:
    documents, samples = corpus.documents, corpus.samples
    kinds = {
        "document tokens": (documents, corpus.document_tokens * 4),
        "document offsets and lengths": (documents, 8 + 4),
        "query tokens": (samples, corpus.query_tokens * 4),
        "query offsets, lengths, passages, negative offsets": (samples, 8 + 4 + 8 + 8),
        f"{corpus.negatives} negatives of each sample": (samples, corpus.negatives * 8),
    }
    rows = [[f"tokenized: {what}", *_sizes(count, each)] for what, (count, each) in kinds.items()]
    total = sum(count * each for count, each in kinds.values())
    rows.append(["tokenized, all together", "", f"**{total / 1e9:,.0f} GB**"])
    both = documents + samples
    rows.append(["a teacher's vectors of 1,024 dims, float16, of both", *_sizes(both, 2_048)])
    for dims, precision, each in (
        (1024, "float32", 4096),
        (256, "float32", 1024),
        (256, "int8", 256),
        (64, "float32", 256),
        (256, "binary", 32),
    ):
        rows.append([f"vectors of {dims:,} dims, {precision}", *_sizes(documents, each)])
    counts = f"{documents / 1e6:,.0f} million documents, {samples / 1e6:,.0f} million samples"
    return Table(f"On disk: {counts}", ("what", "bytes each", "total"), rows)


def _sizes(count: int, each: int) -> list[str]:
    return [f"{each:,}", f"{count * each / 1e9:,.1f} GB"]
