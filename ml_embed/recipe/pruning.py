"""A smaller backbone out of a larger one: its first layers, its most active dimensions.

As F2LLM-v2 (arXiv 2603.19223) makes its 80M, 160M and 330M models: the importance of a dimension is
the norm of its activations on calibration text. The attention heads stay as they are. The result is
a plain Qwen3 folder to train on.

Letters: L layers, H hidden size, I MLP (intermediate) size, T tokens.
"""

import copy
import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import Qwen3Config, Qwen3Model

from ml_embed.errors import UserError
from ml_embed.files.atomic import atomic_folder
from ml_embed.files.model_source import find_model_folder
from ml_embed.files.paths import check_model_output, home_path
from ml_embed.inference.encoding import choose_device, default_dtype, longest_first, pooled_vectors
from ml_embed.kernels.attention import choose_kernel
from ml_embed.model import MatryoshkaEncoder
from ml_embed.model_folders.card import origin_of
from ml_embed.model_folders.export import stored_dtype
from ml_embed.model_folders.read import ModelFolder, load_backbone
from ml_embed.model_folders.write import save_backbone
from ml_embed.prepare.tokenizer import TextTokenizer
from ml_embed.prepare.tokenizer_training import read_texts, text_files

WINDOW = 256
"""Texts tokenized and sorted by length at a time."""


@dataclass(frozen=True)
class Sizes:
    """The shape to prune to."""

    layers: int
    hidden: int
    intermediate: int


@dataclass
class Moments:
    """Sums over calibration tokens: squares of each activation, float64."""

    count: int = 0
    total: Tensor | None = None

    def add(self, activations: Tensor) -> None:
        """`activations`: (..., dims)."""
        rows = activations.detach().flatten(0, -2).double()
        squares = rows.square().sum(0)
        self.total = squares if self.total is None else self.total + squares
        self.count += len(rows)

    @property
    def mean(self) -> Tensor:
        """(dims,) mean square."""
        assert self.total is not None, "nothing was added"
        return self.total / self.count


@dataclass
class Activations:
    """What calibration text does to a backbone."""

    norm_inputs: dict[str, Moments] = field(default_factory=dict)
    """name of each RMSNorm over the hidden size -> (H,) of what enters it"""
    norm_outputs: dict[str, Moments] = field(default_factory=dict)
    """the same -> (H,) of what leaves it"""
    mlp: dict[int, Moments] = field(default_factory=dict)
    """layer (from 0) -> (I,) of what enters the MLP's last projection"""

    def hidden_importance(self) -> Tensor:
        """(H,) norm of each dimension, averaged over tokens, summed over all RMSNorms."""
        return torch.stack([moments.mean.sqrt() for moments in self.norm_outputs.values()]).sum(0)


def prune_backbone(
    folder: str | Path,
    output: str | Path,
    layers: int | None = None,
    hidden: int | None = None,
    intermediate: int | None = None,
    texts: Iterable[str] = (),
    max_seq_length: int = 512,
    device: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, int]:
    """Write a backbone with the first `layers` layers and the most active dimensions of `folder`'s.

    Which dimensions are kept is measured on the layers that are kept. Every norm's gain is scaled
    by how much the mean square of its input changes, so that its output keeps its size. At the full
    shape nothing changes.

    Args:
        folder: any Qwen3 backbone, or a model folder (its factors are multiplied out and not kept).
        output: the new folder; it appears whole or not at all.
        layers, hidden, intermediate: sizes to keep; None is all.
        texts: calibration text, in the languages and kinds that will be trained on; read only if a
            width is cut.
        max_seq_length: tokens read of a text.
        device: None is the first GPU if there is one, else the CPU.
        overwrite: replace a model folder at `output`.
        progress: a bar on stderr.
    Returns:
        sizes, calibration tokens, and parameters before and after.
    Raises:
        UserError: a size is not possible, there is no calibration text, or `output` must not be
            written.
    """
    output = home_path(output)
    check_model_output(output, overwrite, home_path(folder))
    folder = find_model_folder(folder)
    opened = ModelFolder.open(folder)
    config, tokenizer = opened.config, opened.tokenizer
    sizes = choose_sizes(config, layers, hidden, intermediate)
    whole = Sizes(config.num_hidden_layers, config.hidden_size, config.intermediate_size)
    backbone = load_backbone(folder, config)
    before = sum(parameter.numel() for parameter in backbone.parameters())
    backbone.layers = backbone.layers[: sizes.layers]
    config = cut_config(config, sizes)
    state, tokens = backbone.state_dict(), 0
    if (sizes.hidden, sizes.intermediate) != (whole.hidden, whole.intermediate):
        activations, tokens = measure(
            backbone, TextTokenizer(tokenizer, max_seq_length), texts, device, progress
        )
        state = cut_width(state, activations, sizes)
    with torch.device("meta"):
        pruned = Qwen3Model(config)
    pruned.load_state_dict(
        {name: tensor.to(stored_dtype(config)) for name, tensor in state.items()}, assign=True
    )
    with atomic_folder(output) as new:
        save_backbone(new, pruned, tokenizer)
        origin_of(folder, opened.record, (), ()).save(new)
    after = sum(parameter.numel() for parameter in pruned.parameters())
    return {
        **vars(sizes),
        "calibration_tokens": tokens,
        "parameters_before": before,
        "parameters": after,
    }


def choose_sizes(
    config: Qwen3Config, layers: int | None, hidden: int | None, intermediate: int | None
) -> Sizes:
    """The wanted shape; None is all of it.

    Raises:
        UserError: sizes are not possible; all problems at once.
    """
    asked = {
        "layers": (layers, config.num_hidden_layers),
        "hidden size": (hidden, config.hidden_size),
        "intermediate size": (intermediate, config.intermediate_size),
    }
    problems = [
        f"{name} {size} is not possible: the backbone has {most}, so it must be from 1 to {most}"
        for name, (size, most) in asked.items()
        if size is not None and not 1 <= size <= most
    ]
    if problems:
        raise UserError("; ".join(problems))
    return Sizes(*(most if size is None else size for size, most in asked.values()))


def cut_config(config: Qwen3Config, sizes: Sizes) -> Qwen3Config:
    """A copy of the config with the smaller shape."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = sizes.layers
    assert config.layer_types is not None  # Qwen3Config fills it in
    config.layer_types = config.layer_types[: sizes.layers]
    config.max_window_layers = min(config.max_window_layers, sizes.layers)
    config.hidden_size, config.intermediate_size = sizes.hidden, sizes.intermediate
    return config


def measure(
    backbone: Qwen3Model,
    text_tokenizer: TextTokenizer,
    texts: Iterable[str],
    device: str | None,
    progress: bool,
) -> tuple[Activations, int]:
    """Run calibration text through a backbone and record what its norms and MLPs see.

    Args:
        backbone: is moved to the device, and not to be used afterwards.
    Returns:
        the activations, and the number of tokens.
    Raises:
        UserError: there is no text.
    """
    chosen = choose_device(device)
    layers = len(backbone.layers)
    backbone.config.num_hidden_layers = layers
    dtype = default_dtype(chosen)
    kernel = choose_kernel("auto", chosen, dtype, backbone.config.head_dim)
    model = MatryoshkaEncoder(backbone, (layers,), kernel=kernel)
    model = model.to(chosen, dtype).eval()
    tokens = 0
    iterator = iter(texts)
    with (
        recorded(model) as activations,
        tqdm(desc="calibrating", unit=" texts", disable=not progress) as bar,
    ):
        while window := list(itertools.islice(iterator, WINDOW)):
            ids = text_tokenizer(window)
            for _ in pooled_vectors(model, [ids[i] for i in longest_first(ids)]):
                pass  # the hooks have seen it
            tokens += sum(map(len, ids))
            bar.update(len(window))
    if not tokens:
        raise UserError("there is no calibration text to choose dimensions by; give files of texts")
    return activations, tokens


@contextmanager
def recorded(model: MatryoshkaEncoder) -> Iterator[Activations]:
    """Add up what passes through a model's norms and MLPs while the block runs."""
    activations = Activations()
    handles = []

    def record_norm(name: str, norm: nn.Module) -> None:
        entering = activations.norm_inputs.setdefault(name, Moments())
        leaving = activations.norm_outputs.setdefault(name, Moments())

        def add(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            entering.add(inputs[0])
            leaving.add(output)

        handles.append(norm.register_forward_hook(add))

    for number, layer in enumerate(model.backbone.layers):
        record_norm(f"layers.{number}.input_layernorm", layer.get_submodule("input_layernorm"))
        record_norm(
            f"layers.{number}.post_attention_layernorm",
            layer.get_submodule("post_attention_layernorm"),
        )
        moments = activations.mlp.setdefault(number, Moments())
        down = layer.get_submodule("mlp.down_proj")
        handles.append(
            down.register_forward_pre_hook(lambda _, inputs, m=moments: m.add(inputs[0]))
        )
    record_norm("norm", model.norms[0])
    try:
        yield activations
    finally:
        for handle in handles:
            handle.remove()


def most_important(importance: Tensor, count: int) -> Tensor:
    """(count,) the largest, in their old order; of equal ones the first."""
    return torch.sort(torch.argsort(importance, descending=True, stable=True)[:count]).values.cpu()


def cut_width(
    state: dict[str, Tensor], activations: Activations, sizes: Sizes
) -> dict[str, Tensor]:
    """The state dict of a backbone with only its most active hidden and MLP dimensions."""
    kept = most_important(activations.hidden_importance(), sizes.hidden)
    kept_mlp = {
        layer: most_important(moments.mean, sizes.intermediate)
        for layer, moments in activations.mlp.items()
    }
    cut = {}
    for name, tensor in state.items():
        tensor = tensor.cpu().float()
        path = name.removesuffix(".weight").removesuffix(".bias")
        part = path.rpartition(".")[2]
        if path in activations.norm_inputs:
            tensor = tensor[kept] * _gain(activations.norm_inputs[path], kept)
        elif part == "embed_tokens" or (
            part in ("q_proj", "k_proj", "v_proj") and tensor.dim() == 2
        ):
            tensor = tensor[:, kept]
        elif part == "o_proj":
            tensor = tensor[kept]
        elif part in ("gate_proj", "up_proj"):
            tensor = tensor[kept_mlp[int(name.split(".")[1])]][:, kept]
        elif part == "down_proj":
            tensor = tensor[kept][:, kept_mlp[int(name.split(".")[1])]]
        cut[name] = tensor.contiguous()
    return cut


def _gain(entering: Moments, kept: Tensor) -> float:
    """The root mean square of a norm's `kept` input dimensions, relative to that of all."""
    mean = entering.mean.cpu()
    return (mean[kept].mean() / mean.mean()).sqrt().item()


def calibration_texts(paths: Iterable[str | Path], count: int) -> list[str]:
    """Up to `count` texts, taken from all files in turn.

    Raises:
        UserError: a file cannot be read.
    """
    files = [file for path in paths for file in text_files(Path(path))]
    readers = [read_texts([file]) for file in files]
    in_turn = (
        text for texts in itertools.zip_longest(*readers) for text in texts if text is not None
    )
    return list(itertools.islice(in_turn, count))
