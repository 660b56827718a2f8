"""Models with a decoder that reads what an encoder gives: translation with torch's own Transformer, detection."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Translator(nn.Module):
    """nn.Transformer between token embeddings; the decoder sees no later token, and nobody sees padding (0)."""

    def __init__(self, vocabulary: int = 50, width: int = 32) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(vocabulary, width), nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(16, width) * 0.1)
        self.transformer = nn.Transformer(width, 4, 2, 2, 64, batch_first=True)
        # Nested tensors are a prototype that warns.
        self.transformer.encoder.use_nested_tensor = False
        self.head = nn.Linear(width, vocabulary)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        later = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        padding = torch.zeros_like(source, dtype=self.position.dtype).masked_fill(source == 0, float("-inf"))
        x = self.transformer(
            self.source(source) + self.position[: source.shape[1]],
            self.target(target) + self.position[: target.shape[1]],
            tgt_mask=later.to(self.position.dtype),
            tgt_is_causal=True,
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
        )
        y: Tensor = self.head(x)
        return y


class _Feedforward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x + self.down(torch.relu(self.up(x))))
        return y


class _Encoder(nn.Module):
    """Positions are added to query and key, not to the value."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(width, heads), nn.LayerNorm(width)
        self.feedforward = _Feedforward(width)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        query = x + position
        x = self.norm(x + self.attention(query, query, value=x)[0])
        y: Tensor = self.feedforward(x)
        return y


class _Decoder(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.own, self.norm1 = nn.MultiheadAttention(width, heads), nn.LayerNorm(width)
        self.cross, self.norm2 = nn.MultiheadAttention(width, heads), nn.LayerNorm(width)
        self.feedforward = _Feedforward(width)

    def forward(self, x: Tensor, queries: Tensor, memory: Tensor, position: Tensor) -> Tensor:
        query = x + queries
        x = self.norm1(x + self.own(query, query, value=x)[0])
        x = self.norm2(x + self.cross(query=x + queries, key=memory + position, value=memory)[0])
        y: Tensor = self.feedforward(x)
        return y


class DetrLike(nn.Module):
    """In the manner of DETR: a convolutional backbone, an encoder, a decoder on learned queries, classes and boxes."""

    def __init__(self, width: int = 32, heads: int = 4, queries: int = 6, classes: int = 5) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            *self._block(3, 16),
            *self._block(16, 32),
            nn.Conv2d(32, width, 1),
        )
        self.rows, self.columns = (nn.Parameter(torch.randn(16, width // 2) * 0.3) for _ in range(2))
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.encoder = nn.ModuleList(_Encoder(width, heads) for _ in range(2))
        self.decoder = nn.ModuleList(_Decoder(width, heads) for _ in range(2))
        self.classes = nn.Linear(width, classes + 1)
        self.boxes = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))

    @staticmethod
    def _block(inner: int, outer: int) -> list[nn.Module]:
        return [nn.Conv2d(inner, outer, 3, 2, 1, bias=False), nn.BatchNorm2d(outer), nn.ReLU()]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = self.backbone(images)
        batch, _, height, width = x.shape
        position = torch.cat(
            [
                self.columns[:width].unsqueeze(0).repeat(height, 1, 1),
                self.rows[:height].unsqueeze(1).repeat(1, width, 1),
            ],
            -1,
        )
        position = position.flatten(0, 1).unsqueeze(1)
        x = x.flatten(2).permute(2, 0, 1)
        for layer in self.encoder:
            x = layer(x, position)
        queries = self.queries.unsqueeze(1).repeat(1, batch, 1)
        y = torch.zeros_like(queries)
        for layer in self.decoder:
            y = layer(y, queries, x, position)
        y = y.transpose(0, 1)
        return {"classes": self.classes(y), "boxes": self.boxes(y).sigmoid()}
