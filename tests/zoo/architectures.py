"""Architectures whose channels are removed in tests: small, with random weights, from torchvision, timm, transformers
and written out. Libraries are imported when a model is built; where one is missing, its architectures are skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.decoders import DetrLike, Translator

CONV, LINEAR, HEADS = frozenset({"conv"}), frozenset({"linear"}), frozenset({"heads"})
NOTHING: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Architecture:
    """One architecture and what is expected of it.

    Attributes:
        build: gives the model. Its `__name__` is no part of the test.
        inputs: gives what forward is called with: a tuple of arguments, or a dictionary of keyword arguments.
        cut: the kinds of channel groups that are found; none: nothing can be removed.
        kept: the fraction of the parameters that stay when half of every channel group goes, +- 0.02.
        whole: {a weight that keeps its rows: part of the reason that is given}.
        library: what has to be importable.
        slow: real sizes, for `make test-all`.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...] | dict[str, Any]]
    cut: frozenset[str]
    kept: float
    whole: tuple[tuple[str, str], ...] = ()
    library: str | None = None
    slow: bool = False


def images(size: int = 64, channels: int = 3) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.randn(2, channels, size, size),)


def ids(length: int = 9, vocabulary: int = 50) -> Callable[[], dict[str, Any]]:
    """Token ids and a mask that hides the end of the second sequence."""

    def inputs() -> dict[str, Any]:
        mask = torch.ones(2, length, dtype=torch.int64)
        mask[1, length - 3 :] = 0
        return {"input_ids": torch.randint(3, vocabulary, (2, length)), "attention_mask": mask}

    return inputs


def pairs(length: int = 9, vocabulary: int = 50) -> Callable[[], dict[str, Any]]:
    """`ids`, and those that a decoder reads."""
    return lambda: {**ids(length, vocabulary)(), "decoder_input_ids": torch.randint(3, vocabulary, (2, 7))}


# -- written out ----------------------------------------------------------------------------------------------------


def conv_bn(channels_in: int, channels: int, kernel: int = 3, **more: Any) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels, kernel, padding=kernel // 2, bias=False, **more)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


def vgg(norm: bool) -> nn.Module:
    """VGG: every channel is four inputs of the first Linear."""
    layers: list[nn.Module] = []
    width = 3
    for channels in (16, 32, 64):
        layers.append(nn.Conv2d(width, channels, 3, padding=1))
        if norm:
            layers.append(nn.BatchNorm2d(channels))
        layers += [nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        width = channels
    head = [nn.Flatten(), nn.Linear(64 * 4, 128), nn.ReLU(), nn.Dropout(), nn.Linear(128, 128), nn.ReLU()]
    return nn.Sequential(*layers, *head, nn.Linear(128, 4))


class UNet(nn.Module):
    """Two levels, skips by concatenation, upsampling by ConvTranspose."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.middle = conv_bn(3, 16), conv_bn(16, 32), conv_bn(32, 64)
        self.up2 = nn.ConvTranspose2d(64, 32, 2, stride=2)
        self.join2 = conv_bn(64, 32)
        self.up1 = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.join1 = conv_bn(32, 16)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        second = self.second(F.max_pool2d(first, 2))
        middle = self.middle(F.max_pool2d(second, 2))
        second = self.join2(torch.cat([second, self.up2(middle)], 1))
        return self.head(self.join1(torch.cat([first, self.up1(second)], 1)))


class Inception(nn.Module):
    """Branches of different kernels, concatenated, twice; BatchNorm behind the concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                [
                    conv_bn(width, 12, 1),
                    nn.Sequential(conv_bn(width, 8, 1), conv_bn(8, 16)),
                    nn.Sequential(conv_bn(width, 8, 1), conv_bn(8, 8, 5)),
                    nn.Sequential(nn.AvgPool2d(3, 1, 1), conv_bn(width, 8, 1)),
                ]
            )
            for width in (16, 44)
        )
        self.norm = nn.BatchNorm2d(44)
        self.head = nn.Linear(44, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for branches in self.blocks:
            x = torch.cat([branch(x) for branch in branches], 1)
        return self.head(self.norm(x).mean((2, 3)))


class SqueezeExcite(nn.Module):
    """Gates by sigmoid, which are not 0 at 0: only whole deletion sets make such channels vanish."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 32)
        self.reduce, self.expand = nn.Linear(32, 8), nn.Linear(8, 32)
        self.after = nn.Conv2d(32, 16, 3)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        gate = torch.sigmoid(self.expand(F.silu(self.reduce(x.mean((2, 3))))))
        x = F.softplus(self.after(x * gate[:, :, None, None]) + 0.5)
        return self.head(x.amax((2, 3)))


class Norms(nn.Module):
    """GroupNorm (its groups are kept or go whole), InstanceNorm, BatchNorm without weights, PReLU, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 32, 3, padding=1), nn.GroupNorm(8, 32)
        self.conv2, self.norm2 = nn.Conv2d(32, 16, 3, padding=1), nn.InstanceNorm2d(16, affine=True)
        self.conv3, self.norm3 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16, affine=False)
        self.act = nn.PReLU(16)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))
        return self.head(x + torch.sigmoid(self.norm3(self.conv3(x)))).mean((2, 3))


class Audio(nn.Module):
    """Dilated Conv1d with gates in the manner of WaveNet, and weights under weight_norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, 16, 9, padding=4)
        self.filters = nn.ModuleList(nn.Conv1d(16, 24, 3, padding=d, dilation=d) for d in (1, 2, 4))
        self.gates = nn.ModuleList(nn.Conv1d(16, 24, 3, padding=d, dilation=d) for d in (1, 2, 4))
        self.mixes = nn.ModuleList(nn.Conv1d(24, 16, 1) for _ in range(3))
        self.head = nn.Conv1d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for filters, gates, mix in zip(self.filters, self.gates, self.mixes, strict=True):
            x = x + mix(torch.tanh(filters(x)) * torch.sigmoid(gates(x)))
        return self.head(F.relu(x)).mean(2)


class LstmTagger(nn.Module):
    """Nothing in it can be cut: an LSTM has its sizes in its code."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.lstm = nn.LSTM(16, 12, batch_first=True, bidirectional=True)
        self.head = nn.Linear(24, 5)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(input_ids))[0])


class PreNormAttention(nn.Module):
    """Pre-norm attention by hand, one projection for query, key and value, the size of a head by division."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        weights = (query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5).softmax(-1)
        x = x + self.out((weights @ value).transpose(1, 2).flatten(2))
        return self.head(x + self.down(F.gelu(self.up(self.norm2(x)))))


class TiedAutoencoder(nn.Module):
    """One weight, used forwards and transposed; its hidden units are rows here and columns there."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(20, 16)
        self.inner = nn.Linear(16, 16)
        self.bias = nn.Parameter(torch.zeros(20))

    def forward(self, x: Tensor) -> Tensor:
        code = torch.relu(self.inner(torch.tanh(self.encode(x))))
        return F.linear(code + torch.sigmoid(self.inner(code)), self.encode.weight.t(), self.bias)


class TiedEmbeddings(nn.Module):
    """A language model without norms, its head tied to its embedding: the hidden size can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        self.position = nn.Parameter(torch.zeros(1, 16, 24))
        self.up, self.down = nn.Linear(24, 48), nn.Linear(48, 24)
        self.head = nn.Linear(24, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) + self.position[:, : input_ids.shape[1]]
        return self.head(x + self.down(F.gelu(self.up(x))))


class TwoInputs(nn.Module):
    """An image and a vector in, a dictionary out; the vector scales and shifts the image's channels."""

    def __init__(self) -> None:
        super().__init__()
        self.image = conv_bn(3, 24)
        self.film = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 48))
        self.mix = conv_bn(24, 16)
        self.boxes, self.classes = nn.Linear(16, 4), nn.Linear(16, 7)

    def forward(self, image: Tensor, vector: Tensor) -> dict[str, Any]:
        scale, shift = self.film(vector).chunk(2, 1)
        x = self.image(image) * scale[:, :, None, None] + shift[:, :, None, None]
        x = self.mix(x).mean((2, 3))
        return {"boxes": self.boxes(x), "scores": {"classes": self.classes(x).softmax(-1)}}


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(32, 5))


# -- torchvision ----------------------------------------------------------------------------------------------------


def vision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision

        return getattr(torchvision.models, name)(weights=None, num_classes=10, **options)

    return build


def bottlenecks() -> nn.Module:
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [1, 2, 1, 1], num_classes=10, width_per_group=32)


def densenet() -> nn.Module:
    from torchvision.models import DenseNet

    return DenseNet(growth_rate=8, block_config=(2, 3, 2), num_init_features=16, num_classes=10)


def shufflenet() -> nn.Module:
    from torchvision.models import ShuffleNetV2

    return ShuffleNetV2([2, 2, 2], [24, 32, 64, 128, 256], num_classes=10)


def windows() -> nn.Module:
    from torchvision.models import SwinTransformer

    return SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=10)


# -- timm -----------------------------------------------------------------------------------------------------------


PATCHES = {"img_size": 32, "patch_size": 8, "embed_dim": 32}


def timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, num_classes=10, **options)

    return build


def mixer() -> nn.Module:
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(num_blocks=2, num_classes=10, **PATCHES)


def hrnet() -> nn.Module:
    from timm.models.hrnet import HighResolutionNet

    def stage(branches: int, kind: str) -> dict[str, Any]:
        widths = tuple(16 << level for level in range(branches))
        return {
            "num_modules": 1,
            "num_branches": branches,
            "block_type": kind,
            "num_blocks": (1,) * branches,
            "num_channels": widths,
            "fuse_method": "SUM",
        }

    stages = {f"stage{index}": stage(index, "BOTTLENECK" if index == 1 else "BASIC") for index in range(1, 5)}
    return HighResolutionNet({"stem_width": 16, **stages}, num_classes=10)


# -- transformers ---------------------------------------------------------------------------------------------------


def transformer(model: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        kind = getattr(transformers, model)
        return kind(kind.config_class(**options))

    return build


SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
BERT = {**SIZES, "max_position_embeddings": 32}

ARCHITECTURES: dict[str, Architecture] = {
    # Written out.
    "VGG": Architecture(lambda: vgg(False), images(16), CONV | LINEAR, 0.25),
    "VGG with BatchNorm": Architecture(lambda: vgg(True), images(16), CONV | LINEAR, 0.25),
    "U-Net": Architecture(UNet, images(16), CONV, 0.25),
    "Inception-like": Architecture(Inception, images(16), CONV, 0.28),
    "squeeze and excite": Architecture(SqueezeExcite, images(12), CONV | LINEAR, 0.29),
    "norms of all kinds": Architecture(Norms, images(12), CONV, 0.28),
    "WaveNet-like": Architecture(Audio, lambda: (torch.randn(2, 1, 64),), CONV, 0.26),
    "LSTM tagger": Architecture(
        LstmTagger, lambda: (torch.randint(0, 50, (2, 7)),), NOTHING, 1.0, (("lstm.weight_ih_l0", "lstm"),)
    ),
    "attention by hand": Architecture(PreNormAttention, lambda: (torch.randn(2, 7, 32),), LINEAR | HEADS, 0.51),
    "tied autoencoder": Architecture(TiedAutoencoder, lambda: (torch.randn(4, 20),), LINEAR, 0.41),
    "tied embeddings": Architecture(
        TiedEmbeddings, lambda: (torch.randint(0, 50, (2, 7)),), LINEAR | {"embedding"}, 0.35
    ),
    "two inputs": Architecture(
        TwoInputs, lambda: {"image": torch.randn(2, 3, 12, 12), "vector": torch.randn(2, 6)}, CONV | LINEAR, 0.3
    ),
    "nn.TransformerEncoder": Architecture(
        encoder,
        lambda: (torch.randn(2, 7, 32),),
        LINEAR,
        0.76,
        (("0.layers.0.self_attn.in_proj_weight", "MultiheadAttention"),),
    ),
    "nn.Transformer": Architecture(
        Translator,
        lambda: (torch.randint(1, 50, (2, 9)), torch.randint(1, 50, (2, 7))),
        LINEAR,
        0.83,
        (("transformer.decoder.layers.0.multihead_attn.in_proj_weight", "MultiheadAttention"),),
    ),
    "DETR-like": Architecture(
        DetrLike,
        images(32),
        CONV | LINEAR,
        0.74,
        (("encoder.0.attention.in_proj_weight", "MultiheadAttention"),),
    ),
    # torchvision.
    "ResNet-18": Architecture(vision("resnet18"), images(), CONV, 0.25, library="torchvision"),
    "ResNet-50, thin": Architecture(bottlenecks, images(), CONV, 0.25, library="torchvision"),
    "ResNet-50": Architecture(vision("resnet50"), images(), CONV, 0.25, library="torchvision", slow=True),
    "ResNeXt-50": Architecture(vision("resnext50_32x4d"), images(), CONV, 0.25, library="torchvision", slow=True),
    "MobileNetV2": Architecture(vision("mobilenet_v2", width_mult=0.5), images(), CONV, 0.26, library="torchvision"),
    "MobileNetV3": Architecture(vision("mobilenet_v3_small"), images(), CONV | LINEAR, 0.26, library="torchvision"),
    "EfficientNet": Architecture(vision("efficientnet_b0"), images(), CONV, 0.27, library="torchvision"),
    "DenseNet": Architecture(densenet, images(), CONV, 0.29, library="torchvision"),
    "SqueezeNet": Architecture(vision("squeezenet1_1"), images(), CONV, 0.25, library="torchvision"),
    "ShuffleNetV2": Architecture(shufflenet, images(), CONV, 0.28, library="torchvision"),
    "RegNetY": Architecture(vision("regnet_y_400mf"), images(), CONV, 0.27, library="torchvision"),
    "MNASNet": Architecture(vision("mnasnet0_5"), images(), CONV, 0.28, library="torchvision"),
    "GoogLeNet": Architecture(
        vision("googlenet", aux_logits=False, init_weights=False),
        images(),
        CONV,
        0.25,
        library="torchvision",
        slow=True,
    ),
    "Swin of torchvision": Architecture(windows, images(32), LINEAR, 0.69, library="torchvision"),
    # timm.
    "ViT": Architecture(
        timm("vit_tiny_patch16_224", depth=2, num_heads=4, **PATCHES), images(32), LINEAR | HEADS, 0.62, library="timm"
    ),
    "DeiT with distillation": Architecture(
        timm("deit_tiny_distilled_patch16_224", depth=2, num_heads=4, **PATCHES),
        images(32),
        LINEAR | HEADS,
        0.62,
        library="timm",
    ),
    "Swin": Architecture(
        timm(
            "swin_tiny_patch4_window7_224",
            img_size=32,
            patch_size=4,
            window_size=4,
            embed_dim=16,
            depths=(2, 2),
            num_heads=(2, 4),
        ),
        images(32),
        LINEAR | HEADS,
        0.56,
        library="timm",
    ),
    "ConvNeXt": Architecture(
        timm("convnext_tiny", depths=(1, 1, 2, 1), dims=(8, 16, 32, 64)), images(), LINEAR, 0.64, library="timm"
    ),
    "MLP-Mixer": Architecture(mixer, images(32), LINEAR, 0.64, library="timm"),
    "GhostNet": Architecture(timm("ghostnet_050"), images(), CONV, 0.26, library="timm"),
    "HRNet": Architecture(hrnet, images(), CONV, 0.25, library="timm"),
    "SE-ResNet": Architecture(
        timm("seresnet18", channels=(16, 32, 64, 128), stem_width=16), images(), CONV, 0.25, library="timm"
    ),
    # transformers.
    "BERT": Architecture(transformer("BertModel", **BERT), ids(), LINEAR | HEADS, 0.6, library="transformers"),
    "RoBERTa": Architecture(transformer("RobertaModel", **BERT), ids(), LINEAR | HEADS, 0.6, library="transformers"),
    "DistilBERT": Architecture(
        transformer(
            "DistilBertModel", vocab_size=50, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=32
        ),
        ids(),
        LINEAR | HEADS,
        0.58,
        library="transformers",
    ),
    "GPT-2": Architecture(
        transformer(
            "GPT2LMHeadModel",
            vocab_size=50,
            n_positions=32,
            n_embd=32,
            n_layer=2,
            n_head=4,
            use_cache=False,
            bos_token_id=1,
            eos_token_id=2,
        ),
        ids(),
        LINEAR | HEADS,
        0.56,
        library="transformers",
    ),
    "OPT": Architecture(
        transformer(
            "OPTForCausalLM",
            vocab_size=50,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=64,
            max_position_embeddings=32,
            word_embed_proj_dim=32,
            use_cache=False,
        ),
        ids(),
        LINEAR | HEADS,
        0.58,
        library="transformers",
    ),
    "MPNet": Architecture(transformer("MPNetModel", **BERT), ids(), LINEAR | HEADS, 0.60, library="transformers"),
    "ALBERT, one layer for all": Architecture(
        transformer("AlbertModel", embedding_size=16, **BERT), ids(), LINEAR | HEADS, 0.64, library="transformers"
    ),
    "Qwen3 with norms on its heads": Architecture(
        transformer("Qwen3Model", num_key_value_heads=2, head_dim=8, use_cache=False, **SIZES),
        ids(),
        LINEAR | HEADS,
        0.54,
        library="transformers",
    ),
    "SegFormer": Architecture(
        transformer(
            "SegformerForSemanticSegmentation",
            hidden_sizes=[8, 16, 24, 32],
            depths=[1, 1, 1, 1],
            num_attention_heads=[1, 2, 3, 4],
            decoder_hidden_size=16,
        ),
        images(),
        CONV | LINEAR | HEADS,
        0.73,
        library="transformers",
    ),
    "T5 encoder": Architecture(
        transformer("T5EncoderModel", vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4),
        ids(),
        LINEAR | HEADS,
        0.55,
        library="transformers",
    ),
    "T5": Architecture(
        transformer(
            "T5ForConditionalGeneration",
            vocab_size=50,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            use_cache=False,
            decoder_start_token_id=0,
        ),
        pairs(),
        LINEAR | HEADS,
        0.52,
        library="transformers",
    ),
    "BART": Architecture(
        transformer(
            "BartModel",
            vocab_size=50,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=32,
            use_cache=False,
        ),
        pairs(),
        LINEAR | HEADS,
        0.55,
        library="transformers",
    ),
    "Llama with grouped queries": Architecture(
        transformer("LlamaForCausalLM", num_key_value_heads=2, use_cache=False, **SIZES),
        ids(),
        LINEAR | HEADS,
        0.58,
        library="transformers",
    ),
}
