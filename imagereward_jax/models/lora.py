"""Low-rank adaptation, LoRA (arXiv 2106.09685): a frozen layer plus `scale * B(A(x))`; only A and B train.

`Linear` and `Conv` have a slot for A and B that is empty until `add_lora` fills it. Low-rank parameters have their own
variable type, so base and adapter checkpoints are read and written separately.
"""

import math
import re
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from imagereward_jax.models import scanned_layers
from imagereward_jax.models.dropout import drop, noise

INITS = ("gaussian", "kaiming")
ATTENTION = r"to_q|to_k|to_v|to_out\.0"  # the projections of the UNet's attention, PEFT's usual targets
CLIP_ATTENTION = r"q_proj|k_proj|v_proj|out_proj"  # those of CLIP's


class LoRAParam(nnx.Variable):
    """A low-rank parameter."""


def dropout_key(key: jax.Array) -> AbstractContextManager[None]:
    """Enables the dropout of low-rank layers in code traced inside; each layer draws its own mask from `key`."""
    return noise(key, lora=1.0)


class LoRASlot:
    """Low-rank parameters of a layer with a `kernel` [..., in, out].

    lora_A: [..., in, rank], with the kernel's spatial size. lora_B: [rank, out], with leading axes of 1 for a Conv.
    """

    lora_A = None
    lora_B = None

    def add_lora(self, rank: int, *, scale: float, dropout: float = 0.0, stacked: bool = False) -> None:
        """Fills the slot of an abstract layer with the shapes of A and B; stacked: it is a `scanned_layers.stack`."""
        layers, shape = (self.kernel.shape[:1], self.kernel.shape[1:]) if stacked else ((), self.kernel.shape)
        *space, features, out = shape
        if rank > min(math.prod(space) * features, out):
            raise ValueError(f"rank {rank} is more than a layer of {features} -> {out} features has")
        self.lora_scale, self.lora_dropout = scale, dropout
        self.lora_A = nnx.data(LoRAParam(jax.ShapeDtypeStruct((*layers, *space, features, rank), jnp.float32)))
        self.lora_B = nnx.data(LoRAParam(jax.ShapeDtypeStruct((*layers, *[1] * len(space), rank, out), jnp.float32)))

    def _low_rank(self, x, product, precision):
        """`scale * B(A(dropout(x)))`; product(x, kernel) is the layer's own, without its bias."""
        down = product(drop(x, "lora", scale=self.lora_dropout), self.lora_A[...].astype(self.dtype))
        up = self.lora_B[...].astype(self.dtype).reshape(self.lora_B.shape[-2:])
        return jnp.matmul(down, up, precision=precision) * self.lora_scale


def slots(network: nnx.Module) -> dict[str, tuple[nnx.Module, int | None]]:
    """Lists the layers of a network that can be adapted: {name: (module, index in its stack or None)}.

    Names are PyTorch's ("down_blocks.0.attentions.0. ... .to_q"); each layer of a stack has its own.
    """
    stacks, found = scanned_layers.stacks_of(network), {}
    for path, module in nnx.iter_modules(network):
        if isinstance(module, LoRASlot):
            found |= {".".join(map(str, key)): (module, index) for key, index in scanned_layers.numbered(path, stacks)}
    return found


def attach(network: nnx.Module, targets: str, *, rank: int, alpha: float, dropout: float = 0.0) -> list[str]:
    """Fills the slots of the layers whose names end in `targets`, in place.

    Args:
        network: an abstract network. targets: regular expression that matches whole name parts.
        rank, alpha: the update is scaled by alpha / rank. dropout: rate on A's input, active inside
            `dropout_key`.

    Returns:
        The names of the adapted layers.

    Raises:
        ValueError: no layer matches, a layer has fewer features than `rank`, or only some layers of a stack match.
    """
    layers = slots(network)
    names = [name for name in layers if re.search(rf"(?:^|\.)(?:{targets})$", name)]
    if not names:
        # An index belongs to the name before it: "to_out.0", "net.2".
        endings = sorted({re.search(r"[^.]*?[^.\d][^.]*(?:\.\d+)?$", name).group() for name in layers})
        raise ValueError(f"{targets!r} matches no layer; names of layers end in {', '.join(endings)}")
    chosen = {id(layers[name][0]) for name in names}
    if partly := [name for name, (module, _) in layers.items() if id(module) in chosen and name not in names]:
        raise ValueError(
            f"{targets!r} leaves out {partly[0]}, but matches other layers of its stack; layers of a stack "
            "(transformer_blocks.0, .1, ...) can only be adapted together"
        )
    for name in names:
        module, index = layers[name]
        try:
            if not index:  # not in a stack, or the first layer of one
                module.add_lora(rank, scale=alpha / rank, dropout=dropout, stacked=index is not None)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return names


def init(network: nnx.Module, key: jax.Array, kind: str = "gaussian") -> dict[str, Any]:
    """Draws initial low-rank parameters, float32; B = 0, so the adapted network equals its base.

    Args:
        kind: distribution of A: "gaussian" with standard deviation 1 / rank (diffusers' trainers), or "kaiming",
            uniform in +-1 / sqrt(features) (PEFT's default).
    """
    params = nnx.to_pure_dict(nnx.state(network, LoRAParam))
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    stacks, values = scanned_layers.stacks_of(network), []
    for index, (path, leaf) in enumerate(leaves):
        own = jax.random.fold_in(key, index)
        stacked = scanned_layers.numbered([part.key for part in path], stacks)[0][1] is not None
        if path[-1].key == "lora_B":
            values.append(jnp.zeros(leaf.shape))
        elif kind == "gaussian":
            values.append(jax.random.normal(own, leaf.shape) / leaf.shape[-1])
        else:
            bound = 1 / math.sqrt(math.prod(leaf.shape[stacked:-1]))
            values.append(jax.random.uniform(own, leaf.shape, jnp.float32, -bound, bound))
    return tree.unflatten(values)
