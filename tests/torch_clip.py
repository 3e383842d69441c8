"""CLIP as OpenAI and OpenCLIP publish it, in PyTorch: the names of their checkpoints and their arithmetic."""

import torch
from torch import nn


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    def __init__(self, width, heads, activation):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", activation())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x, mask):
        """x: [tokens, batch, width]."""
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, heads, depth, activation):
        super().__init__()
        self.resblocks = nn.ModuleList([Block(width, heads, activation) for _ in range(depth)])

    def forward(self, x, mask=None):
        x = x.permute(1, 0, 2)
        for block in self.resblocks:
            x = block(x, mask)
        return x.permute(1, 0, 2)


class Visual(nn.Module):
    def __init__(self, size, patch, width, heads, depth, dim, activation):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((size // patch) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, heads, depth, activation)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, dim))

    def forward(self, pixels):
        x = self.conv1(pixels).flatten(2).permute(0, 2, 1)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj


class CLIP(nn.Module):
    """vision: (size, patch, width, heads, depth); text: (vocabulary, length, width, heads, depth)."""

    def __init__(self, vision, text, dim, activation=QuickGELU):
        super().__init__()
        vocabulary, length, width, heads, depth = text
        self.positional_embedding = nn.Parameter(0.3 * torch.randn(length, width))
        self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, dim))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.visual = Visual(*vision, dim, activation)
        self.transformer = Transformer(width, heads, depth, activation)
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.ln_final = nn.LayerNorm(width)

    def encode_text(self, ids):
        mask = torch.full((ids.shape[1], ids.shape[1]), float("-inf")).triu(1)
        x = self.transformer(self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]], mask)
        return self.ln_final(x)[torch.arange(len(x)), ids.argmax(-1)] @ self.text_projection

    def forward(self, pixels, ids):
        """Cosines [B]. pixels: [B, 3, S, S]; ids: [B, L], padded with anything below the end-of-text id."""
        normalize = nn.functional.normalize
        return (normalize(self.visual(pixels)) * normalize(self.encode_text(ids))).sum(-1)
