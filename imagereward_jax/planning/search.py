"""The largest batch and the smallest slice that a run fits into; each try compiles its step."""

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
    """The most samples a chip that fit, found by following the memory that the tries before it took.

    Exact up to 16 samples; above, to a power of two that is at most an eighth of the result.

    Args:
        config: its batch size is not looked at. say: takes a line of text about each try.
        known: the figures that `plan` gave for this config and topology already, which saves a try.

    Returns:
        (samples a chip at a time, batch size); (0, 0) if one sample does not fit.
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
    """(whether it fits, bytes left over or missing); None for bytes where the compiler did not tell."""
    left = figures["usable_bytes"] - figures["bytes_per_chip"]["total"]
    return figures["fits"], None if figures["temp_bytes"] is None else left


def _next_try(tries):
    """The number of samples to try after `tries` {samples: (fits, bytes left)}; None when the largest is known."""
    low = max((samples for samples, (fits, _) in tries.items() if fits), default=0)
    high = min((samples for samples, (fits, _) in tries.items() if not fits and samples > low), default=None)
    grain = 1 if low < 16 else 1 << ((low // 8).bit_length() - 1)
    if high is not None and high - low <= grain:
        return None
    guess = _where_room_ends(tries) or (2 * low if high is None else (low + high) // 2)
    last = 8 * max(low, 1) if high is None else high - grain
    return max(low + grain, min(guess // grain * grain, last))


def _where_room_ends(tries):
    """Samples at which the line through the two tries nearest to the limit has no bytes left; None without a line."""
    points = sorted((abs(left), samples, left) for samples, (_, left) in tries.items() if left is not None)[:2]
    if len(points) < 2:
        return None
    (_, one, left), (_, other, left_there) = points
    slope = (left_there - left) / (other - one)
    return int(one - left / slope) if slope < 0 else None


def smallest_slice(
    config: Any, topology: Topology, say: Callable[[str], None], known: dict[str, Any] | None = None
) -> str | None:
    """Name of the smallest topology of this kind of chip that fits, with the samples a chip and the accumulation of the
    config and, where it has fsdp > 1, every chip along fsdp; None if none does. known: as for `largest_batch`."""
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
