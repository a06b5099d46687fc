"""Everything about the GPU path that a CPU cannot tell: one JSON object per section, within a
deadline.

    python scripts/check_gpu.py --out DIR [--deadline 420] [--only NAME ...]
    python scripts/check_gpu.py --out DIR --device cpu --small    (a rehearsal)

A section that fails says so and the next one runs. Most important first. Norm-wise errors
throughout: |a - b| / |b|.
"""

import argparse
import contextlib
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch
from torch import nn

DEV, BIG, OUT, SECTIONS, T0 = torch.device("cuda"), True, Path(), {}, time.perf_counter()


def section(f):
    SECTIONS[f.__name__] = f
    return f


def rel(a, b, least=1e-30):
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp_min(least))


def sync():
    if DEV.type == "cuda":
        torch.cuda.synchronize()


def timed(f, repeats=10, warm=3):
    """Median seconds, by events on CUDA."""
    for _ in range(warm):
        f()
    seconds = []
    for _ in range(repeats):
        sync()
        start = time.perf_counter()
        f()
        sync()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def clean():
    gc.collect()
    if DEV.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def accelerator(precision):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=DEV.type == "cpu", mixed_precision=precision)


def shapes(batch=4, small=False):
    from ml_embed.benchmarks import gpu

    if BIG and not small:
        return gpu.TrainingShape(batch, 7, 1024, 512, 28, 1024), dict(gpu.MODEL_06B)
    return gpu.TrainingShape(batch, 3, 128, 64, 4, 256), {
        "vocab_size": 8192,
        "head_dim": 128,
        "num_attention_heads": 4,
    }


def make_batch(shape, seed=0, vocab=8192):
    from ml_embed.benchmarks.gpu import random_dataset
    from ml_embed.benchmarks.training_setup import pick_batch

    return pick_batch(random_dataset(256, vocab, shape.max_length, seed), shape, 1, seed)


@section
def environment():
    info = {"python": sys.version.split()[0], "torch": torch.__version__}
    for name in (
        "transformers",
        "accelerate",
        "sentence_transformers",
        "peft",
        "datasets",
        "liger_kernel",
        "flash_attn",
        "triton",
        "numpy",
        "pyarrow",
        "tokenizers",
    ):
        with contextlib.suppress(Exception):
            info[name] = __import__(name).__version__
    if DEV.type == "cuda":
        p = torch.cuda.get_device_properties(0)
        info |= {
            "gpu": p.name,
            "sm": p.multi_processor_count,
            "GiB": p.total_memory / 2**30,
            "nccl": torch.cuda.nccl.version(),
        }
    with contextlib.suppress(Exception):
        import inspect

        from torch.nn.attention.varlen import varlen_attn

        info["varlen_attn"] = str(inspect.signature(varlen_attn))[:300]
    return info


@section
def peaks():
    dt = torch.bfloat16 if BIG else torch.float32
    result = {}
    n = 8192 if BIG else 256
    a, b = (torch.randn(n, n, device=DEV, dtype=dt) for _ in range(2))
    result["square_tflops"] = 2 * n**3 / timed(lambda: a @ b) / 1e12
    x = torch.empty(2**30 if BIG else 2**20, device=DEV, dtype=torch.uint8)
    y = torch.empty_like(x)
    result["copy_TBs"] = 2 * x.numel() / timed(lambda: y.copy_(x)) / 1e12
    tokens = 11450 if BIG else 64
    for name, k, m in (
        ("qkv_as_one", 1024, 4096),
        ("q", 1024, 2048),
        ("kv", 1024, 1024),
        ("o", 2048, 1024),
        ("gate", 1024, 3072),
        ("gate_up_as_one", 1024, 6144),
        ("down", 3072, 1024),
    ):
        w, z = torch.randn(m, k, device=DEV, dtype=dt), torch.randn(tokens, k, device=DEV, dtype=dt)
        g = torch.randn(tokens, m, device=DEV, dtype=dt)
        fwd, dgrad, wgrad = timed(lambda: z @ w.T), timed(lambda: g @ w), timed(lambda: g.T @ z)
        result[name] = [round(2 * tokens * k * m / t / 1e12) for t in (fwd, dgrad, wgrad)]
    return result


def attention_inputs(lengths, heads, groups, size, dtype, seed=0):
    generator = torch.Generator(DEV).manual_seed(seed)

    def make(n):
        values = torch.randn(
            1, sum(lengths), n, size, device=DEV, generator=generator, dtype=torch.float32
        )
        return values.to(dtype).transpose(1, 2)

    return [make(n).detach().requires_grad_() for n in (heads, groups, groups)]


def formula(q, k, v, lengths):
    """float64, one text at a time -> (1, T, A, D)"""
    out, start, scale, share = [], 0, q.shape[-1] ** -0.5, q.shape[1] // k.shape[1]
    q, k, v = (x[0].double() for x in (q, k, v))
    k, v = (x.repeat_interleave(share, 0) for x in (k, v))
    for n in lengths:
        a, b, c = (x[:, start : start + n] for x in (q, k, v))
        s = (a @ b.transpose(1, 2) * scale).masked_fill(
            torch.ones(n, n, device=DEV, dtype=torch.bool).triu(1), -torch.inf
        )
        out.append((s.softmax(-1) @ c).transpose(0, 1))
        start += n
    return torch.cat(out)[None]


@section
def kernels():
    """Values and all three gradients of each kernel against float64; with zero rows as the last
    layer has them."""
    from types import SimpleNamespace

    from ml_embed.data.packing import PackedSequences
    from ml_embed.kernels.attention import available_kernels, packed_attention

    result, ok = {}, True
    cases = {
        "ragged": [1, 2, 17, 63, 64, 65, 128, 129, 300, 777, 1024, 1500],
        "equal": [256] * 8,
        "single": [1, 1, 1],
        "reversed": [700, 5, 300, 1],
    }
    if not BIG:
        cases = {"ragged": [1, 3, 17, 33], "single": [1, 1]}
    for size in (128, 64):
        for groups in (8, 16, 1):
            for name, lengths in cases.items():
                inputs = attention_inputs(lengths, 16, groups, size, torch.bfloat16)
                expected = formula(*inputs, lengths)
                weights = torch.randn(expected.shape, device=DEV, dtype=torch.float64)
                wanted = torch.autograd.grad((expected * weights).sum(), inputs)
                for kernel in available_kernels(DEV, torch.bfloat16):
                    got = packed_attention(
                        SimpleNamespace(head_dim=size),
                        *inputs,
                        None,
                        packed=PackedSequences.from_lengths(lengths, DEV),
                        kernel=kernel,
                    )[0]
                    grads = torch.autograd.grad((got.double() * weights).sum(), inputs)
                    # queries and keys of one-token texts have no gradient: then the size of the
                    # values' is the measure
                    least = float(wanted[2].double().norm()) * 1e-3
                    errors = [
                        rel(got, expected),
                        *(rel(a, b, least) for a, b in zip(grads, wanted, strict=True)),
                    ]
                    ok &= all(e < 0.01 for e in errors)
                    key = f"{kernel}/D{size}/G{groups}/{name}"
                    result[key] = [float(f"{e:.2e}") for e in errors]
    worst = {
        k: max(max(v) for key, v in result.items() if key.startswith(k))
        for k in {key.split("/")[0] for key in result}
    }
    return {
        "ok": ok,
        "worst": worst,
        "over_1e-2": {k: v for k, v in result.items() if max(v) >= 0.01},
        "cases": len(result),
    }


@section
def grouped_heads():
    """Does this torch's varlen_attn take fewer key/value heads by itself, and what do the copies
    cost?"""
    from torch.nn.attention.varlen import varlen_attn

    from ml_embed.data.packing import PackedSequences
    from ml_embed.kernels.attention import _takes_grouped_heads

    lengths = sorted(
        np.random.default_rng(0).lognormal(np.log(250), 0.8, 32).clip(4, 1024).astype(int).tolist()
    )
    packed = PackedSequences.from_lengths(lengths, DEV)
    q, k, v = (
        x.detach()[0].transpose(0, 1).contiguous().requires_grad_()
        for x in attention_inputs(lengths, 16, 8, 128, torch.bfloat16)
    )
    cu, longest = packed.cu_seqlens, packed.max_length
    more = {"enable_gqa": True} if _takes_grouped_heads(varlen_attn) else {}

    def direct():
        return varlen_attn(q, k, v, cu, cu, longest, longest, window_size=(-1, 0), **more)

    def copied():
        return varlen_attn(
            q,
            *(x.repeat_interleave(2, 1) for x in (k, v)),
            cu,
            cu,
            longest,
            longest,
            window_size=(-1, 0),
        )

    def both(f):
        return torch.autograd.grad(f().float().square().sum(), (q, k, v))

    a, b = direct(), copied()
    result = {
        "forward": rel(a, b),
        "gradients": [rel(x, y) for x, y in zip(both(direct), both(copied), strict=True)],
    }
    flops = 4 * 16 * 128 * sum(n * n for n in lengths) / 2
    for name, f in (("direct", direct), ("copied", copied)):
        fwd, whole = timed(lambda: f()), timed(lambda: both(f))
        result[name] = {
            "forward_ms": fwd * 1e3,
            "both_ms": whole * 1e3,
            "forward_tflops": flops / fwd / 1e12,
        }
    return result


@section
def precision():
    """Losses and gradients of the production step (bf16) and of the naive bf16 step, against
    float32."""
    from ml_embed.benchmarks.training_setup import fast_contender, naive_contender

    shape, model = shapes(4, small=True)
    batch = make_batch(shape)

    def rename(g):
        return {n.replace("embedding.", "").replace("norms.0.", "norm."): x for n, x in g.items()}

    loss, true = naive_contender(batch, shape, accelerator("no"), model).gradients()
    result = {"loss_fp32": loss}
    for name, make, mode in (
        ("fast_fp32", fast_contender, "no"),
        ("naive_bf16", naive_contender, "bf16"),
        ("fast_bf16", fast_contender, "bf16"),
    ):
        value, found = make(batch, shape, accelerator(mode), model).gradients()
        errors = {n: rel(x, true[n]) for n, x in rename(found).items()}
        whole = rel(
            torch.cat([rename(found)[n].flatten() for n in true]),
            torch.cat([x.flatten() for x in true.values()]),
        )
        result[name] = {
            "loss": value,
            "gradient": whole,
            "worst": max(errors.items(), key=lambda e: e[1]),
        }
    result["ok"] = (
        result["fast_fp32"]["gradient"] < 1e-4
        and result["fast_bf16"]["gradient"] < 1.5 * result["naive_bf16"]["gradient"]
    )
    return result


@section
def variants():
    """Chunks, checkpointing, compiled layers: the same gradients, and no waiting for the device."""
    from ml_embed.benchmarks.samples import make_backbone
    from ml_embed.benchmarks.training_setup import matryoshka_spec
    from ml_embed.kernels.attention import choose_kernel
    from ml_embed.losses.objective import batch_objective
    from ml_embed.model import MatryoshkaEncoder, default_exits, factorize_table
    from ml_embed.training.gradcache import forward_backward

    shape, model = shapes(6, small=True)
    acc = accelerator("bf16" if BIG else "no")
    spec, result, reference = matryoshka_spec(shape.hidden), {}, None
    batches = [
        make_batch(gpu_shape(shape, rows), seed)
        for seed, rows in enumerate((6, 5, 7, 6, 4, 8, 3, 9, 10, 2))
    ]
    for name, options, budget in (
        ("whole", {}, 0),
        ("chunks", {}, 700),
        ("checkpointing", {"gradient_checkpointing": True}, 0),
        ("compiled", {"compile_layers": True}, 0),
        ("compiled_chunks", {"compile_layers": True}, 700),
    ):
        try:
            backbone = make_backbone(None, num_hidden_layers=12, hidden_size=shape.hidden, **model)
            factors = factorize_table(backbone.embed_tokens.weight.detach(), shape.rank)
            encoder = MatryoshkaEncoder(
                backbone,
                default_exits(12),
                factors,
                kernel=choose_kernel(
                    "auto", DEV, torch.bfloat16 if DEV.type == "cuda" else torch.float32
                ),
                **options,
            )
            prepared = acc.prepare(encoder)

            def run(batch):
                encoder.zero_grad()
                moved = batch.to(DEV)
                return forward_backward(
                    prepared,
                    acc,
                    moved.texts,
                    32,
                    lambda v: batch_objective(v, moved, spec, None, "vectors", 1.0, 0.05),
                    budget,
                ).total

            start = time.perf_counter()
            run(batches[0])
            sync()
            first = time.perf_counter() - start
            gradient = torch.cat([p.grad.flatten() for p in encoder.parameters()])
            reference = gradient if reference is None else reference
            entry = {"first_s": first, "gradient_from_whole": rel(gradient, reference)}
            run(batches[0])
            again = torch.cat([p.grad.flatten() for p in encoder.parameters()])
            entry["same_to_the_bit_again"] = bool(torch.equal(gradient, again))
            for batch in batches[1:4]:
                run(batch)
            recompiles = (
                torch._dynamo.config.patch(error_on_recompile=True)
                if options.get("compile_layers")
                else contextlib.nullcontext()
            )
            if DEV.type == "cuda":
                with recompiles, warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    torch.cuda.set_sync_debug_mode("warn")
                    try:
                        for batch in batches[4:]:
                            run(batch)
                    finally:
                        torch.cuda.set_sync_debug_mode("default")
                entry["waits"] = sorted(
                    {
                        f"{Path(w.filename).name}:{w.lineno}"
                        for w in caught
                        if "synchroniz" in str(w.message)
                    }
                )
            result[name] = entry
        except Exception as error:
            result[name] = f"{type(error).__name__}: {error}"[:600]
        acc._models.clear()
        clean()
    return result


def gpu_shape(shape, rows):
    import dataclasses

    return dataclasses.replace(shape, batch_size=rows)


@section
def optimizer():
    """Fused AdamW against torch's plain loop, from the same gradients, five steps."""

    def run(**kind):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 64)).to(DEV)
        opt = torch.optim.AdamW(net.parameters(), 1e-3, (0.9, 0.98), 1e-8, 1e-2, **kind)
        for step in range(5):
            opt.zero_grad()
            net(
                torch.randn(32, 256, generator=torch.Generator().manual_seed(step)).to(DEV)
            ).square().sum().backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            opt.step()
        return torch.cat([p.flatten() for p in net.parameters()])

    return {"fused_from_loop": rel(run(fused=True), run(foreach=False, fused=False))}


def contender(batch, shape, acc, model, **options):
    """fast_contender that can be freed: accelerate keeps what it prepared."""
    from ml_embed.benchmarks.training_setup import fast_contender

    made = fast_contender(batch, shape, acc, model, **options)
    acc._models.clear(), acc._optimizers.clear()
    return made


@contextlib.contextmanager
def half_norms():
    """Norms by torch's fused kernel, out in the type that came in: what a fix of rms_norm.py would
    do on CUDA."""
    from torch.nn.functional import rms_norm

    from ml_embed.kernels import rms_norm as module

    own = module._forward

    def forward(norm, x):
        if x.dtype != torch.bfloat16:
            return own(norm, x)
        with torch.autocast(x.device.type, enabled=False):
            return rms_norm(x, (x.shape[-1],), norm.weight.to(x.dtype), norm.variance_epsilon)

    module._forward = forward
    try:
        yield
    finally:
        module._forward = own


@section
def training():
    """Steps of Qwen3-0.6B's shape: naive, ours, compiled, with liger; seconds, MFU, memory, and
    where the time goes."""
    from ml_embed.benchmarks.gpu import liger_kernels
    from ml_embed.benchmarks.training_setup import layer_parameters, naive_contender

    result = {}
    plan = [
        ("fast", 4, {}),
        ("naive", 3, {}),
        ("fast", 3, {}),
        ("norms", 4, {}),
        ("norms", 8, {}),
        ("compiled", 4, {"compiled": True}),
        ("compiled", 8, {"compiled": True}),
        ("liger", 4, {}),
    ]
    vocab = 151_936 if BIG else 8192
    for name, rows, options in plan if BIG else plan[:4]:
        key = f"{name}_{rows}"
        try:
            shape, model = shapes(rows)
            batch, acc = make_batch(shape, vocab=vocab), accelerator("bf16" if BIG else "no")
            with {"liger": liger_kernels, "norms": half_norms}.get(name, contextlib.nullcontext)():
                made = (
                    naive_contender(batch, shape, acc, model)
                    if name == "naive"
                    else contender(batch, shape, acc, model, **options)
                )
                start = time.perf_counter()
                made.step()
                sync()
                first = time.perf_counter() - start
                clean()
                seconds = timed(made.step, 8, 2)
                peak = torch.cuda.max_memory_allocated() / 2**30 if DEV.type == "cuda" else 0
                flops = 6 * layer_parameters(made.model) * batch.num_tokens
                result[key] = {
                    "ms": seconds * 1e3,
                    "tokens_per_s": batch.num_tokens / seconds,
                    "mfu_of_989": flops / seconds / 989e12,
                    "tflops": flops / seconds / 1e12,
                    "peak_GiB": peak,
                    "first_s": first,
                    "tokens": batch.num_tokens,
                }
                if key in ("fast_4", "norms_4", "compiled_4") and DEV.type == "cuda":
                    result[key]["profile"] = profile(made.step, OUT / f"profile_{key}.txt")
        except torch.OutOfMemoryError:
            result[key] = "out of memory"
        except Exception as error:
            result[key] = f"{type(error).__name__}: {error}"[:500]
        made = None
        clean()
        print(f"  {key}: {result[key]}", flush=True)
    return result


def profile(step, path):
    """Kernel time, share of the wall in which the GPU worked, kernels a step; the table goes to a
    file."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as trace

    with trace(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as p:
        sync()
        start = time.perf_counter()
        for _ in range(2):
            step()
        sync()
        wall = time.perf_counter() - start
    table = p.key_averages()
    path.write_text(
        table.table(sort_by="self_device_time_total", row_limit=60)
        + table.table(sort_by="self_cpu_time_total", row_limit=30)
    )
    kernels = [e for e in p.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return {
        "kernels_a_step": len(kernels) / 2,
        "kernel_ms_a_step": sum(e.self_device_time_total for e in kernels) / 2e3,
        "wall_ms_profiled": wall / 2 * 1e3,
    }


@section
def losses():
    """The objective alone: all exits and dims; at the batch sizes of one GPU and of a large
    gathered batch."""
    from ml_embed.benchmarks.training_setup import matryoshka_spec
    from ml_embed.losses import nested as module
    from ml_embed.losses.nested import LOGITS_AT_ONCE, in_batch_loss
    from ml_embed.losses.objective import batch_objective

    shape, _ = shapes(8)
    batch = make_batch(shape, vocab=151_936 if BIG else 8192)
    moved, spec, result = batch.to(DEV), matryoshka_spec(shape.hidden), {}
    vectors = torch.randn(
        7, len(batch.texts.packed.lengths), shape.hidden, device=DEV, requires_grad=True
    )
    result["objective_8_rows_ms"] = (
        timed(lambda: torch.autograd.grad(batch_objective(vectors, moved, spec).total, vectors))
        * 1e3
    )
    rows, passages = (1024, 8192) if BIG else (16, 64)
    q, p = (torch.randn(n, shape.hidden, device=DEV, requires_grad=True) for n in (rows, passages))
    target, weights = torch.arange(rows, device=DEV), torch.full((rows,), 1 / rows, device=DEV)
    for limit in (LOGITS_AT_ONCE, 2**22, 2**24):
        module.LOGITS_AT_ONCE = limit
        clean()
        seconds = timed(
            lambda: torch.autograd.grad(in_batch_loss(q, p, target, None, weights, spec), (q, p)),
            3,
            1,
        )
        result[f"in_batch_{rows}x{passages}_limit_2^{limit.bit_length() - 1}"] = {
            "ms": seconds * 1e3,
            "GiB": torch.cuda.max_memory_allocated() / 2**30 if DEV.type == "cuda" else 0,
        }
    module.LOGITS_AT_ONCE = LOGITS_AT_ONCE
    return result


def model_folder():
    from ml_embed.benchmarks.encoding import mixed_texts, write_model
    from ml_embed.prepare.tokenizer_training import train_tokenizer

    folder = Path(tempfile.mkdtemp())
    texts, articles = mixed_texts(4000 if BIG else 40)
    if not (folder / "ml_embed.json").is_file():
        if BIG:
            shape = {
                "num_hidden_layers": 28,
                "hidden_size": 1024,
                "intermediate_size": 3072,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "vocab_size": 151_936,
            }
        else:
            shape = {"num_hidden_layers": 4, "vocab_size": 8192}
        write_model(folder, train_tokenizer(articles[:400], 4000), 64, **shape)
    return folder, texts


@section
def encoding():
    """Embedder.encode against sentence-transformers' on the GPU, both in bf16; vectors against
    float32."""
    from sentence_transformers import SentenceTransformer

    from ml_embed.inference.embedder import Embedder

    folder, texts = model_folder()
    half = torch.bfloat16 if DEV.type == "cuda" else torch.float32
    ours, theirs = (
        Embedder.from_pretrained(folder, device=DEV, dtype=half),
        SentenceTransformer(str(folder), device=str(DEV), model_kwargs={"dtype": half}),
    )
    few = texts[:200]
    exact = Embedder.from_pretrained(folder, device=DEV, dtype=torch.float32).encode(
        few, show_progress=False
    )
    result = {
        "1-cosine ours": float(1 - (ours.encode(few, show_progress=False) * exact).sum(1).min())
    }
    result["1-cosine theirs"] = float(
        1 - (theirs.encode(few, batch_size=64, show_progress_bar=False) * exact).sum(1).min()
    )
    runs = {"ours": lambda: ours.encode(texts, show_progress=False)} | {
        f"theirs_{n}": (lambda n=n: theirs.encode(texts, batch_size=n, show_progress_bar=False))
        for n in (32, 128)
    }
    tokens = sum(map(len, ours._text_tokenizer(texts)))
    for name, run in runs.items():
        seconds = timed(run, 2, 1)
        result[name] = {
            "s": seconds,
            "texts_per_s": len(texts) / seconds,
            "tokens_per_s": tokens / seconds,
        }
    result["ratio"] = min(result["theirs_32"]["s"], result["theirs_128"]["s"]) / result["ours"]["s"]
    return result


@section
def trainer():
    """sentence-transformers' trainer on texts of our batch's lengths.

    bf16, MatryoshkaLoss over MultipleNegativesRankingLoss, fused AdamW.
    """
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import (
        MatryoshkaLoss,
        MultipleNegativesRankingLoss,
    )
    from transformers import TrainerCallback

    from ml_embed.model import default_dims

    folder, texts = model_folder()
    model = SentenceTransformer(str(folder), device=str(DEV))
    model.max_seq_length = 1024 if BIG else 64
    rng, words = np.random.default_rng(0), " ".join(texts[:300]).split()
    steps, rows = (10, 4) if BIG else (3, 2)

    def text(median):
        count = int(np.clip(rng.lognormal(np.log(median), 0.8), 4, 1000) / 2.5)
        start = int(rng.integers(0, len(words) - 1000))
        return " ".join(words[start : start + max(1, count)])

    columns = {"anchor": [text(40) for _ in range(steps * rows)]} | {
        name: [text(250) for _ in range(steps * rows)]
        for name in ("positive", *(f"negative_{i}" for i in range(7)))
    }
    tokens = np.array(
        [
            [
                len(x)
                for x in model.tokenizer(
                    columns[c], truncation=True, max_length=model.max_seq_length
                )["input_ids"]
            ]
            for c in columns
        ]
    )
    marks = []

    class Clock(TrainerCallback):
        def on_step_end(self, *a, **k):
            sync()
            marks.append(time.perf_counter())

    arguments = SentenceTransformerTrainingArguments(
        tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=rows,
        bf16=DEV.type == "cuda",
        optim="adamw_torch_fused",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=DEV.type == "cpu",
    )
    loss = MatryoshkaLoss(
        model,
        MultipleNegativesRankingLoss(model),
        list(default_dims(model.get_embedding_dimension())),
    )
    clean()
    SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(columns),
        loss=loss,
        callbacks=[Clock()],
    ).train()
    seconds = float(np.median(np.diff(marks)))
    return {
        "ms_a_step": seconds * 1e3,
        "tokens_a_step": float(tokens.sum() / steps),
        "tokens_per_s": float(tokens.sum() / steps / seconds),
        "peak_GiB": torch.cuda.max_memory_allocated() / 2**30 if DEV.type == "cuda" else 0,
    }


@section
def collectives():
    """NCCL with one process: gather_rows' own autograd function, float64 sums, uneven gather,
    object broadcast."""
    import torch.distributed as dist

    from ml_embed.distributed import collectives as d

    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=os.environ.get("MASTER_PORT", "29555"),
        RANK=os.environ.get("RANK", "0"),
        WORLD_SIZE=os.environ.get("WORLD_SIZE", "1"),
    )
    backend = os.environ.get("CHECK_BACKEND", "nccl" if DEV.type == "cuda" else "gloo")
    dist.init_process_group(backend)
    world, rank = dist.get_world_size(), dist.get_rank()
    try:
        rows = (
            (torch.arange(24.0, device=DEV).view(2, 3, 4) + 100 * rank)
            .transpose(0, 1)
            .requires_grad_()
        )  # not contiguous, as in objective.py
        out = d._GatherRows.apply(rows)
        (out * torch.arange(len(out), device=DEV).view(-1, 1, 1)).sum().backward()
        expected = torch.cat(
            [
                torch.arange(24.0, device=DEV).view(2, 3, 4).transpose(0, 1) + 100 * r
                for r in range(world)
            ]
        )
        return {
            "backend": backend,
            "world": world,
            "gather": bool(torch.equal(out, expected)),
            "gradient": bool(
                torch.equal(rows.grad[:, 0, 0], world * (3 * rank + torch.arange(3.0, device=DEV)))
            ),
            "sum64": float(d.all_reduce_sum(torch.ones(2, dtype=torch.float64, device=DEV))[0]),
            "uneven": len(d.gather_uneven(torch.ones(rank + 1, 2, device=DEV))),
            "first": d.compute_on_main_process(lambda: "x"),
        }
    finally:
        dist.destroy_process_group()


def main():
    global DEV, BIG, OUT
    from ml_embed.files.paths import home_path

    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=home_path, default=Path())
    parser.add_argument(
        "--deadline", type=float, default=420, help="seconds after which no further section begins"
    )
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    DEV, BIG, OUT = torch.device(args.device), not args.small, args.out
    OUT.mkdir(parents=True, exist_ok=True)
    if DEV.type == "cuda" and not torch.cuda.is_available():
        print(json.dumps({"skipped": "no CUDA GPU"}))
        return
    for name, run in SECTIONS.items():
        if args.only and name not in args.only:
            continue
        start = time.perf_counter()
        if start - T0 > args.deadline:
            print(f"SKIPPED {name}: deadline")
            continue
        try:
            found = run()
        except BaseException as error:
            traceback.print_exc()
            found = {"FAILED": f"{type(error).__name__}: {error}"[:800]}
        line = json.dumps(
            {"section": name, "seconds": round(time.perf_counter() - start, 1), "result": found},
            default=str,
        )
        print(line, flush=True)
        with (OUT / "check_gpu.jsonl").open("a") as file:
            file.write(line + "\n")
        clean()


if __name__ == "__main__":
    main()
