"""Counts bytes, FLOPs and collectives from shapes, the traced program and the compiled program."""

import math
import re
from collections import Counter
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
ITEM_BITS = {"pred": 8, "s4": 4, "u4": 4, "token": 0}


def bytes_on_a_device(tree: Any, shardings: Any) -> int:
    """Counts the bytes of one device's shards of a tree of arrays or shapes."""
    sizes = jax.tree.map(
        lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize,
        tree,
        shardings,
    )
    return sum(jax.tree.leaves(sizes))


def flops(jaxpr: ClosedJaxpr | Jaxpr, while_trips: int = 1) -> int:
    """Counts the FLOPs of products and convolutions of a traced program, over all devices; integers count too.

    Args:
        jaxpr: a `ClosedJaxpr` or `Jaxpr`. Loops of static length count once per iteration.
        while_trips: iterations of a loop of traced length.
    """
    return flops_by_dtype(jaxpr, while_trips).total()


def flops_by_dtype(jaxpr: ClosedJaxpr | Jaxpr, while_trips: int = 1) -> Counter[str]:
    """Counts FLOPs by dtype name of the first operand."""
    return _sum(_flops_of(equation, while_trips) for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def _flops_of(equation, while_trips):
    """Counts the FLOPs of one equation."""
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        summed = math.prod(left[axis] for axis in contracted)
        return _counted(equation, 2 * math.prod(equation.outvars[0].aval.shape) * summed)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        taps = math.prod(kernel) // kernel[params["dimension_numbers"].rhs_spec[0]]
        count = 2 * math.prod(equation.outvars[0].aval.shape) * taps
        # with a dilated input (gradient of a strided convolution) only one in prod(dilation) taps is not zero
        return _counted(equation, count // math.prod(params["lhs_dilation"]))
    if name.startswith("dot_product_attention"):  # cuDNN's kernel: two products forward, five backward
        (batch, queries, heads, size), keys = equation.invars[0].aval.shape, equation.invars[1].aval.shape[1]
        return _counted(equation, 2 * batch * heads * queries * keys * size * (5 if "bwd" in name else 2))
    inner = [flops_by_dtype(sub, while_trips) for sub in _inner(params)]
    if name == "cond":
        return max(inner, key=Counter.total, default=Counter())
    times = 1
    if name == "scan":
        times = params["length"]
    if name == "while":
        times = while_trips
    if name == "shard_map":  # its program is that of one device
        times = params["mesh"].size
    if name == "pallas_call":
        times = math.prod(params["grid_mapping"].grid)
    return Counter({dtype: times * count for dtype, count in _sum(inner).items()})


def attention_kernels(jaxpr: ClosedJaxpr | Jaxpr) -> dict[str, int]:
    """Counts the fused attention kernels in a traced program, {"cudnn" or "pallas": calls}; one in a loop counts once.

    Attention that is none of these is products and a softmax, whole or by blocks.
    """
    found = Counter()
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name = equation.primitive.name
        if name.startswith("dot_product_attention"):
            found["cudnn"] += 1
        elif name == "pallas_call":
            found["pallas"] += 1
        else:
            found += _sum(Counter(attention_kernels(inner)) for inner in _inner(equation.params))
    return dict(found)


def _counted(equation, count):
    return Counter({equation.invars[0].aval.dtype.name: count})


def _sum(counters):
    return sum(counters, Counter())


def _inner(params):
    """Yields the inner programs of an equation."""
    for value in params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(part, "eqns") or hasattr(getattr(part, "jaxpr", None), "eqns"):
                yield part


def collective_bytes(text: str, while_trips: int = 1) -> dict[str, int]:
    """Counts the bytes that each kind of collective moves per device in one run of a compiled program.

    A collective counts with the larger of operand and result (an all-gather's result, a reduce-scatter's operand),
    times the iterations of the loops around it.

    Args:
        text: of the compiled module (`Compiled.as_text()`).
        while_trips: iterations of loops whose length is not in the text.

    Returns:
        {kind: bytes} for the kinds of `COLLECTIVES` that occur.
    """
    module = _Module(text)
    totals = module.totals(while_trips)
    return {kind: totals[kind] for kind in COLLECTIVES if totals.get(kind)}


class _Module:
    """Parsed computations of a module, as needed to count collectives."""

    header = re.compile(r"^\s*(ENTRY\s+)?%?([\w.\-]+)\s*\(.*\)\s*->.*\{\s*$")
    instruction = re.compile(r"^\s*(?:ROOT\s+)?%?([\w.\-]+)\s*=\s*(\([^=]*?\)|\S+)\s+([\w\-]+)\((.*)$")
    called = re.compile(r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
    branches = re.compile(r"(?:branch_computations|called_computations|calls)=\{([^}]*)\}")

    def __init__(self, text):
        self.lines, self.types, self.entry, current = {}, {}, None, None
        for line in re.sub(r"/\*.*?\*/", "", text).splitlines():  # long tuples hold comments with indices
            if header := self.header.match(line):
                current = header[2]
                self.lines[current] = []
                self.entry = current if header[1] else self.entry
            elif current and (found := self.instruction.match(line)):
                self.lines[current].append((found[1], found[2], found[3], found[4]))
                self.types[found[1]] = found[2]

    def totals(self, while_trips):
        """Counts {kind: bytes} of one run of the module.

        A collective of a TPU may overlap several fusions, even a loop, and then appears in each of them with the same
        chain_id. It counts once, with the fewest iterations of these.
        """
        found = {}
        for name, times in self._runs(while_trips).items():
            for instruction, result, operation, rest in self.lines.get(name, ()):
                kind = operation.removesuffix("-start")
                # on TPUs a reduce-scatter is a fusion of this name, of an all-reduce and slices
                kind = "reduce-scatter" if kind == "all-reduce" and name.startswith("all-reduce-scatter") else kind
                if kind in COLLECTIVES:
                    chain = re.search(r'chain_id="(\d+)"', rest)
                    key = (kind, "chain", chain[1]) if chain else (kind, name, instruction)
                    amount = times * self._payload(result, operation, rest)
                    found[key] = min(amount, found.get(key, amount))
        totals = Counter()
        for (kind, *_), amount in found.items():
            totals[kind] += amount
        return totals

    def _runs(self, while_trips):
        """Counts the runs of each computation, by the loops around it."""
        runs = Counter()

        def visit(name, times):
            runs[name] += times
            for _, _, operation, rest in self.lines.get(name, ()):
                if operation.endswith("-done") or operation == "async-update":
                    continue
                trips = self._trips(rest, while_trips) if operation == "while" else 1
                for callee in self._callees(rest):
                    visit(callee, times * trips)

        visit(self.entry, 1)
        return runs

    def _callees(self, rest):
        listed = [name.strip().lstrip("%") for group in self.branches.findall(rest) for name in group.split(",")]
        return [*self.called.findall(rest), *listed]

    def _payload(self, result, operation, rest):
        operands = sum(_bytes(self.types.get(name, "")) for name in re.findall(r"%([\w.\-]+)", rest.partition(")")[0]))
        if operation == "collective-permute-start":
            return operands
        # the start of an asynchronous all-gather returns its operands too
        results = _bytes(result) - (operands if operation == "all-gather-start" and result.startswith("(") else 0)
        return max(operands, results)

    def _trips(self, rest, unknown):
        if found := re.search(r'"known_trip_count":\s*\{"n":\s*"(\d+)"', rest):
            return int(found[1])
        condition = re.search(r"condition=%?([\w.\-]+)", rest)
        lines = self.lines.get(condition[1], ()) if condition else ()
        constants = {name: tail for name, _, operation, tail in lines if operation == "constant"}
        for _, _, operation, tail in lines:
            if operation == "compare" and "direction=LT" in tail:
                for name in re.findall(r"%([\w.\-]+)", tail.partition(")")[0]):
                    if name in constants:
                        return int(constants[name].partition(")")[0])
        return unknown


def _bytes(type_text):
    """Counts the bytes of an HLO type; tuples are summed."""
    total = 0
    for name, shape in re.findall(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]", type_text):
        bits = ITEM_BITS.get(name) or int((re.search(r"\d+", name) or ["8"])[0])
        total += math.prod(int(size) for size in shape.split(",") if size) * bits // 8
    return total


def used_at_overflow(message: str) -> int | None:
    """Reads the bytes that a program needs from the compiler's out-of-memory message; None if not stated."""
    found = re.search(r"[Uu]sed ([\d.]+)([KMGT]) of ([\d.]+)([KMGT])", message)
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return int(float(found[1]) * units[found[2]]) if found else None
