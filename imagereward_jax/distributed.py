"""Several processes as one program: how a process joins the others."""


class DistributedError(ValueError):
    """The processes could not find each other, or were not described completely; the message says what is missing."""


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat: int | None = None,
) -> None:
    """Joins the other processes of this program; afterwards `jax.devices()` are those of all of them.

    Args:
        coordinator: HOST:PORT of process 0. Without it TPU pods, Slurm and Open MPI tell who is there.
        num_processes, process_id: how many there are and which this is, from 0; both go with `coordinator`.
        heartbeat: seconds of silence after which a process counts as gone; by default jax's.

    Raises:
        DistributedError: see there.
    """
    import jax

    given = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise DistributedError(f"{', '.join(missing)} missing: {', '.join(given)} go together")
    if num_processes is not None and not 0 <= process_id < num_processes:
        raise DistributedError(f"--process-id {process_id}: expected a number from 0 to {num_processes - 1}")
    options = {} if heartbeat is None else {"heartbeat_timeout_seconds": heartbeat}
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, **options)
    except Exception as error:  # of every kind, by what is wrong with the address
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DistributedError(f"--distributed: {reason}") from error
