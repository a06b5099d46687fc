"""A naive training step, to compare with: the same mathematics, written the simplest way.

Queries and documents are padded, the token table is multiplied out in each step, the final norm
runs over whole sequences at each exit, and the loss is a loop over exits and dims. transformers'
own attention and torch's default AdamW.

Letters: R rows, K negatives, S longest text, N texts, H hidden size, V vocabulary, r rank, E exits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3Model

from ml_embed.losses.nested import MatryoshkaSpec


@dataclass(frozen=True)
class NaiveBatch:
    """A retrieval batch as lists: R queries, R passages, R x K negatives."""

    queries: list[list[int]]
    passages: list[list[int]]
    negatives: list[list[list[int]]]
    documents: list[int]
    """the document number of each passage"""
    negative_documents: list[list[int]]


class NaiveEncoder(nn.Module):
    """Qwen3 with token factors A (V, r), B (r, H) and a shared final norm."""

    def __init__(self, backbone: Qwen3Model, A: Tensor, B: Tensor, exits: Sequence[int]):
        super().__init__()
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.norm = backbone.norm
        backbone.register_module("norm", nn.Identity())
        backbone.register_module("embed_tokens", None)
        self.backbone = backbone
        self.exits = tuple(exits)

    def forward(self, texts: Sequence[list[int]], table: Tensor) -> Tensor:
        """(E, N, H) vectors of N texts in one padded batch; `table` is A B, (V, H)."""
        device = table.device
        longest = max(map(len, texts))
        padded = [text + [0] * (longest - len(text)) for text in texts]
        real = [[1] * len(text) + [0] * (longest - len(text)) for text in texts]
        ids, mask = (torch.tensor(rows, device=device) for rows in (padded, real))  # (N, S)
        output = self.backbone(
            inputs_embeds=F.embedding(ids, table),
            attention_mask=mask,
            output_hidden_states=True,
            use_cache=False,
        )
        last = mask.sum(1) - 1
        rows = torch.arange(len(texts), device=device)
        return torch.stack(
            [self.norm(output.hidden_states[layer])[rows, last].float() for layer in self.exits]
        )


def naive_loss(encoder: NaiveEncoder, batch: NaiveBatch, spec: MatryoshkaSpec) -> Tensor:
    """The retrieval objective: mean over exits of hard + in-batch loss, each summed over dims."""
    table = encoder.A @ encoder.B
    rows, count = len(batch.queries), len(batch.negatives[0])
    query = encoder(batch.queries, table)  # (E, R, H)
    texts = [*batch.passages, *(text for own in batch.negatives for text in own)]
    documents = encoder(texts, table)
    passage, negatives = documents[:, :rows], documents[:, rows:].unflatten(1, (rows, count))
    same = torch.tensor(batch.documents, device=table.device)
    mask = (same[:, None] == same[None, :]) & ~torch.eye(
        rows, dtype=torch.bool, device=table.device
    )
    own = torch.tensor(batch.negative_documents, device=table.device) == same[:, None]
    own = torch.cat([torch.zeros_like(own[:, :1]), own], dim=1)
    total = query.new_zeros(())
    for e in range(len(encoder.exits)):
        for dim, weight in zip(spec.dims, spec.weights, strict=True):
            q, p, n = (F.normalize(x[e, ..., :dim], dim=-1) for x in (query, passage, negatives))
            candidates = torch.cat([p.unsqueeze(1), n], dim=1)  # (R, 1 + K, dim)
            hard = (q.unsqueeze(1) * candidates).sum(-1) / spec.temperature
            hard = hard.masked_fill(own, -torch.inf)
            in_batch = (q @ p.T / spec.temperature).masked_fill(mask, -torch.inf)
            total = total + weight * F.cross_entropy(
                hard, torch.zeros(rows, dtype=torch.long, device=hard.device)
            )
            total = total + weight * F.cross_entropy(
                in_batch, torch.arange(rows, device=hard.device)
            )
    return total / len(encoder.exits)
