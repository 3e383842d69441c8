"""BLIP and ImageReward as their authors train them, in PyTorch: checkpoint names, dropout, freezing, pair loss.

Written after the published description (BLIP: arXiv 2201.12086; ImageReward's training code). Parameters are made in
the published order, which decides what `fix_rate` freezes. Dropout and drop path take their masks from `Masks` where
one is given, so that another implementation's draws can be replayed.
"""

import numpy as np
import torch
from torch import nn


class Masks:
    """Keep-masks in the order in which a forward pass asks for them."""

    def __init__(self, masks):
        self.masks = iter(masks)

    def __call__(self, x, rate, shape):
        mask = torch.from_numpy(next(self.masks).copy())
        assert tuple(mask.shape) == tuple(shape), (mask.shape, shape)
        return x * mask / (1 - rate)


class Noise(nn.Module):
    """Dropout (`per_sample` False) or drop path."""

    masks = None

    def __init__(self, rate, per_sample=False):
        super().__init__()
        self.rate, self.per_sample = rate, per_sample

    def forward(self, x):
        if not self.training or self.rate == 0:
            return x
        shape = (len(x), *[1] * (x.ndim - 1)) if self.per_sample else x.shape
        return Noise.masks(x, self.rate, shape)


class VisionAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, width))


class VisionBlock(nn.Module):
    def __init__(self, width, heads, ratio, eps, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps)
        self.attn = VisionAttention(width, heads)
        self.drop_path = Noise(drop_path, per_sample=True)
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, ratio * width), "fc2": nn.Linear(ratio * width, width)})

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](self.norm2(x)))))


class VisionTransformer(nn.Module):
    def __init__(self, config, drop_path):
        super().__init__()
        width, eps = config.width, config.layer_norm_eps
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.tokens, width))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, config.patch_size, config.patch_size)
        rates = np.linspace(0, drop_path, config.depth).tolist()
        self.blocks = nn.ModuleList([VisionBlock(width, config.heads, config.mlp_ratio, eps, r) for r in rates])
        self.norm = nn.LayerNorm(width, eps)

    def forward(self, pixels):
        x = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Embeddings(nn.Module):
    def __init__(self, config, dropout):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = Noise(dropout)

    def forward(self, ids):
        return self.dropout(self.LayerNorm(self.word_embeddings(ids) + self.position_embeddings.weight[: ids.shape[1]]))


class Attend(nn.Module):
    def __init__(self, config, source_width, dropout):
        super().__init__()
        self.heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(source_width, config.hidden_size)
        self.value = nn.Linear(source_width, config.hidden_size)
        self.dropout = Noise(dropout)

    def forward(self, x, source, bias):
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y in (self.query(x), self.key(source), self.value(source))
        )
        weights = self.dropout((q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5 + bias).softmax(-1))
        return (weights @ v).transpose(1, 2).flatten(2)


class Output(nn.Module):
    def __init__(self, config, features, dropout):
        super().__init__()
        self.dense = nn.Linear(features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = Noise(dropout)

    def forward(self, x, residual):
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class Attention(nn.Module):
    def __init__(self, config, source_width, dropout):
        super().__init__()
        self.self = Attend(config, source_width, dropout)
        self.output = Output(config, config.hidden_size, dropout)

    def forward(self, x, source, bias):
        return self.output(self.self(x, source, bias), x)


class Layer(nn.Module):
    def __init__(self, config, vision_width, dropout):
        super().__init__()
        self.attention = Attention(config, config.hidden_size, dropout)
        self.crossattention = Attention(config, vision_width, dropout)
        self.intermediate = nn.Module()
        self.intermediate.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.output = Output(config, config.intermediate_size, dropout)

    def forward(self, x, bias, embeds):
        x = self.attention(x, x, bias)
        if embeds is not None:
            x = self.crossattention(x, embeds, 0.0)
        return self.output(nn.functional.gelu(self.intermediate.dense(x)), x)


class TextEncoder(nn.Module):
    def __init__(self, config, vision_width, dropout):
        super().__init__()
        self.embeddings = Embeddings(config, dropout)
        self.encoder = nn.Module()
        layers = [Layer(config, vision_width, dropout) for _ in range(config.num_hidden_layers)]
        self.encoder.layer = nn.ModuleList(layers)

    def forward(self, ids, mask, embeds=None):
        """embeds None: text only."""
        bias = (1.0 - mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
        x = self.embeddings(ids)
        for layer in self.encoder.layer:
            x = layer(x, bias, embeds)
        return x


class Blip(nn.Module):
    def __init__(self, config, *, dropout=0.0, drop_path=0.0):
        super().__init__()
        vision, text = config.vision, config.text
        self.visual_encoder = VisionTransformer(vision, drop_path)
        self.text_encoder = TextEncoder(text, vision.width, dropout)
        self.vision_proj = nn.Linear(vision.width, config.projection_dim)
        self.text_proj = nn.Linear(text.hidden_size, config.projection_dim)

    def score(self, pixels, ids, mask):
        """BLIP score: cosine of the projected class tokens."""
        normalize = nn.functional.normalize
        image = normalize(self.vision_proj(self.visual_encoder(pixels)[:, 0]))
        return (image * normalize(self.text_proj(self.text_encoder(ids, mask)[:, 0]))).sum(-1)


class Head(nn.Module):
    def __init__(self, features, sizes, dropouts=(0.0, 0.0, 0.0)):
        super().__init__()
        pairs = list(zip((features, *sizes), (*sizes, 1)))
        parts = [nn.Linear(*pair) for pair in pairs]
        noise = [Noise(rate) for rate in dropouts]
        self.layers = nn.Sequential(parts[0], noise[0], parts[1], noise[1], parts[2], noise[2], parts[3], parts[4])

    def forward(self, x):
        return self.layers(x)


class ImageReward(nn.Module):
    """The network with its head, not standardised, as it trains."""

    def __init__(self, config, *, dropout=0.0, drop_path=0.0, head_dropouts=(0.0, 0.0, 0.0)):
        super().__init__()
        self.blip = Blip(config, dropout=dropout, drop_path=drop_path)
        self.mlp = Head(config.text.hidden_size, config.head_sizes, head_dropouts)

    def forward(self, pixels, ids, mask):
        return self.mlp(self.blip.text_encoder(ids, mask, self.blip.visual_encoder(pixels))[:, 0])[:, 0]

    def freeze(self, rate):
        """As the original: up to and including the first parameter of the layer where `rate` falls."""
        for name, parameter in self.blip.named_parameters():
            if "_proj" in name:
                parameter.requires_grad_(False)
        if rate <= 0:
            return
        blip = self.blip
        last_text = f"layer.{int(len(blip.text_encoder.encoder.layer) * rate)}"
        last_image = f"blocks.{int(len(blip.visual_encoder.blocks) * rate)}"
        for part, last in ((blip.text_encoder, last_text), (blip.visual_encoder, last_image)):
            for name, parameter in part.named_parameters():
                parameter.requires_grad_(False)
                if last in name:
                    break


def pair_loss(better, worse):
    """(loss, accuracy) of scores [N]: cross entropy of which of the two is better."""
    logits = torch.stack([better, worse], 1)
    loss = nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))
    return loss, (better > worse).float().mean()
