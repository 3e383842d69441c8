"""Finds the largest batch and the smallest slice that fit; each try compiles the training step."""

from collections.abc import Callable
from typing import Any

from jax.sharding import AbstractMesh

from imagereward_jax.assembly.run import assemble
from imagereward_jax.planning.report import bytes_per_device, gib, plan, verdict
from imagereward_jax.planning.topologies import Topology, sizes_of_kind
from imagereward_jax.training.program import TrainingProgram


def largest_batch(
    config: Any, topology: Topology, say: Callable[[str], None], known: dict[str, Any] | None = None
) -> tuple[int, int]:
    """Finds the largest number of samples per chip that fits, by extrapolating the memory of earlier tries.

    Exact up to 16 samples; above, to within a power of two of at most an eighth of the result.

    Args:
        config: its batch size is ignored. say: called with a line of text per try.
        known: figures of `plan` for this config and topology; saves a try.

    Returns:
        (samples per chip at a time, batch size); (0, 0) if one sample does not fit.
    """
    tries = {known["samples_per_chip"]: known} if known else {}

    def attempt(samples):
        if samples not in tries:
            tried = config.copy_and_resolve_references()
            tried.batch_size = samples * topology.chips * config.accumulation
            tries[samples] = plan(tried, topology)
        say(f"{samples} sample(s) a chip: {verdict(tries[samples])}")

    samples = max(tries, default=1)
    while samples:
        attempt(samples)
        samples = _next_try({samples: _room(figures) for samples, figures in tries.items()})
    best = max((samples for samples, figures in tries.items() if figures["fits"]), default=0)
    return best, best * topology.chips * config.accumulation


def _room(figures):
    """Returns (whether it fits, bytes left or missing); bytes are None if the compiler did not report them."""
    left = figures["usable_bytes"] - figures["bytes_per_chip"]["total"]
    return figures["fits"], None if figures["temp_bytes"] is None else left


def _next_try(tries):
    """Chooses the next number of samples after `tries` {samples: (fits, bytes left)}; None if the largest is known."""
    low = max((samples for samples, (fits, _) in tries.items() if fits), default=0)
    high = min((samples for samples, (fits, _) in tries.items() if not fits and samples > low), default=None)
    grain = 1 if low < 16 else 1 << ((low // 8).bit_length() - 1)
    if high is not None and high - low <= grain:
        return None
    guess = _where_room_ends(tries) or (2 * low if high is None else (low + high) // 2)
    last = 8 * max(low, 1) if high is None else high - grain
    return max(low + grain, min(guess // grain * grain, last))


def _where_room_ends(tries):
    """Extrapolates the two tries nearest to the limit to 0 bytes left: samples, or None with fewer tries."""
    points = sorted((abs(left), samples, left) for samples, (_, left) in tries.items() if left is not None)[:2]
    if len(points) < 2:
        return None
    (_, one, left), (_, other, left_there) = points
    slope = (left_there - left) / (other - one)
    return int(one - left / slope) if slope < 0 else None


def smallest_slice(
    config: Any, topology: Topology, say: Callable[[str], None], known: dict[str, Any] | None = None
) -> str | None:
    """Finds the name of the smallest topology of this kind of chip that fits; None if none does.

    Samples per chip and accumulation are those of the config; if it has fsdp > 1, all chips are along fsdp. known: as
    for `largest_batch`.
    """
    samples = max(1, config.batch_size // topology.chips // config.accumulation)
    for other in sizes_of_kind(topology.name):
        tried = config.copy_and_resolve_references()
        tried.batch_size = samples * other.chips * config.accumulation
        tried.mesh.data, tried.mesh.fsdp = (1, other.chips) if config.mesh.fsdp > 1 else (-1, 1)
        mesh = AbstractMesh((other.chips // tried.mesh.fsdp, tried.mesh.fsdp), ("data", "fsdp"))
        run = assemble(tried, mesh, abstract=True)
        arguments = sum(bytes_per_device(run, TrainingProgram(tried, run, mesh)).values())
        if arguments > other.usable_bytes:
            say(f"{other.name}: weights, moments and batch alone take {gib(arguments)} a chip")
            continue
        same = known and other.name == topology.name and known["mesh"] == dict(mesh.shape)
        figures = known if same else plan(tried, other)
        say(f"{other.name}: {verdict(figures)}")
        if figures["fits"]:
            return other.name
    return None
