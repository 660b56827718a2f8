"""Models in which the raw result of a Linear or convolution is quantized for one reader and floats for another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.small import written


def residual_mlp() -> nn.Module:
    """A stream that starts at a Linear; each block reads it quantized and adds to it in float."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + F.relu(block(x))
        return self.head(x)  # type: ignore[no-any-return]

    blocks = nn.ModuleList(nn.Linear(24, 24) for _ in range(2))
    return written(forward, stem=nn.Linear(16, 24), blocks=blocks, head=nn.Linear(24, 4))  # type: ignore[no-any-return]


def variational_autoencoder() -> nn.Module:
    """The mean and the log variance are outputs, and the decoder reads the mean."""

    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = F.relu(self.encoder(x))
        mean = self.mean(hidden)
        return self.out(F.relu(self.decoder(mean))), mean, self.log_variance(hidden)

    sizes = {"encoder": (16, 12), "mean": (12, 4), "log_variance": (12, 4), "decoder": (4, 12), "out": (12, 16)}
    return written(forward, **{name: nn.Linear(*size) for name, size in sizes.items()})  # type: ignore[no-any-return]


def post_norm_encoder() -> nn.Module:
    """Linear, then encoder layers whose norms stand behind the sums: the first sum reads the Linear."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.project(x)).mean(1))  # type: ignore[no-any-return]

    return written(forward, project=nn.Linear(16, 16), encoder=encoder, head=nn.Linear(16, 3))  # type: ignore[no-any-return]


def rectified_before_norms() -> nn.Module:
    """Linear, a ReLU or ReLU6, then something in float."""
    layers = (nn.Linear(16, 12), nn.ReLU(), nn.LayerNorm(12), nn.Linear(12, 12), nn.ReLU6(), nn.Softmax(-1))
    return nn.Sequential(*layers, nn.Linear(12, 12), nn.ReLU(), nn.LayerNorm(12))


def raw_and_rectified() -> nn.Module:
    """A Linear that is read raw, and through a ReLU by a Linear; the same layer once more on its own result."""

    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        raw = self.first(x)
        again = self.first(raw)
        return self.second(F.relu(raw)) + again, raw.softmax(-1)

    return written(forward, first=nn.Linear(16, 16), second=nn.Linear(16, 16))  # type: ignore[no-any-return]


def pooled_and_tokens() -> nn.Module:
    """One head on tokens and on a pooled vector, of ranks 3 and 2; the tokens are an output too."""

    def forward(self: Any, x: Tensor) -> tuple[Tensor, ...]:
        tokens = self.project(x)
        return self.head(tokens.mean(1)), self.head(tokens), self.head(tokens[:, 0]), tokens

    return written(forward, project=nn.Linear(16, 16), head=nn.Linear(16, 3))  # type: ignore[no-any-return]


def convolutions() -> nn.Module:
    """Convolutions whose results are outputs, are normed, are added to and are convolved."""

    def forward(self: Any, x: Tensor) -> tuple[Tensor, ...]:
        first = self.first(x)
        second = first + F.gelu(self.second(first))
        return first, self.norm(second), self.third(second)

    convolution = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 2, 1)]
    return written(  # type: ignore[no-any-return]
        forward, first=convolution[0], second=convolution[1], third=convolution[2], norm=nn.GroupNorm(2, 8)
    )


RAW_RESULTS: dict[str, tuple[Callable[[], nn.Module], Sequence[int]]] = {
    "residual MLP": (residual_mlp, (16, 16)),
    "VAE": (variational_autoencoder, (16, 16)),
    "post-norm encoder behind a Linear": (post_norm_encoder, (8, 5, 16)),
    "ReLU before norms": (rectified_before_norms, (16, 16)),
    "raw and rectified": (raw_and_rectified, (8, 3, 16)),
    "pooled and tokens": (pooled_and_tokens, (8, 5, 16)),
    "convolutions": (convolutions, (8, 3, 8, 8)),
}
"""{model: (how it is built, the shape of a batch)}."""


def raw_results(name: str) -> tuple[nn.Module, Tensor]:
    """A model and a batch; the same each time."""
    torch.manual_seed(0)
    build, shape = RAW_RESULTS[name]
    return build(), torch.randn(*shape)
