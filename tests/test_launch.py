"""The scripts of launch/ against stand-ins for gcloud and Slurm, and the JobSet against what our command accepts."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

for package in ("orbax.checkpoint", "grain", "ml_collections", "yaml"):
    pytest.importorskip(package)
import yaml

from imagereward_jax.recipes import validate
from imagereward_jax.train import parse_flags
from imagereward_jax.training.metric_writers import read_rows

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"

# Two hosts, each a folder of its own; what is sent to a host runs in a shell here, as over ssh.
GCLOUD = """
printf '%q ' "$@" >>"$STAND_IN/calls"; echo >>"$STAND_IN/calls"
for argument in "$@"; do
    case $argument in
    --command=*) command=${argument#--command=} ;;
    --worker=all) hosts="0 1" ;;
    --worker=*) hosts=${argument#--worker=} ;;
    esac
done
status=0
for host in $hosts; do
    if [ "$4" = ssh ]; then
        (export HOME=$STAND_IN/host$host; cd "$HOME"; bash -c "$command") || status=1
    else
        cp "$5" "$STAND_IN/host$host/"
    fi
done
exit $status
"""
# Two tasks on this machine, told of each other as by Slurm.
SRUN = """
echo "$@" >>"$STAND_IN/calls"
while [[ $1 == -* ]]; do shift; done
export SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
    echo $! >>"$STAND_IN/tasks"
done
status=0
for task in $(tail -n 2 "$STAND_IN/tasks"); do
    code=0; wait "$task" || code=$?
    [ "$code" -le "$status" ] || status=$code
done
exit $status
"""
SCANCEL = 'echo "scancel $*" >>"$STAND_IN/calls"; kill -TERM $(tail -n 2 "$STAND_IN/tasks")'
SCONTROL = 'echo "scontrol $*" >>"$STAND_IN/calls"'


@pytest.fixture
def stand_in(tmp_path):
    """A folder of programs that stand in for others, and an environment in which they come first."""
    folder = tmp_path / "stand_in"
    programs = {"gcloud": GCLOUD, "srun": SRUN, "scancel": SCANCEL, "scontrol": SCONTROL, "uv": "mkdir -p .venv/bin"}
    for name, text in {**programs, "python3": 'exec true "$@"'}.items():
        path = folder / "bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)
    for host in ("host0", "host1"):
        (folder / host).mkdir()
    (folder / "calls").touch()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "JAX_"))}
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return folder, {**kept, "PATH": path, "STAND_IN": str(folder), "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def run(env, script, *arguments):
    return subprocess.run([LAUNCH / script, *arguments], env=env, capture_output=True, text=True, timeout=120)


def until(true, what, seconds=240):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.1)


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.iterdir() if path.suffix != ".yaml"))
def test_scripts_are_programs_that_bash_can_read(script):
    assert os.access(LAUNCH / script, os.X_OK)
    subprocess.run(["bash", "-n", LAUNCH / script], check=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tpu", "us-west4-a"], "launch/tpu_pod.sh [OPTIONS] TPU ZONE run COMMAND"),
        (["tpu", "us-west4", "logs"], "ZONE us-west4: expected one such as us-west4-a"),
        (["tpu", "us-west4-a", "run"], "run needs a command"),
        (["tpu", "us-west4-a", "go"], "unknown action go: expected setup, run, logs, status or stop"),
        (["tpu", "us-west4-a", "stop", "now"], "stop takes no arguments: now"),
        (["--zone=us-west4-a", "tpu", "logs"], "unknown option --zone=us-west4-a"),
        (["--project", "", "tpu", "us-west4-a", "logs"], "--project needs a name"),
    ],
)
def test_tpu_pod_says_what_is_wrong_before_it_calls_anything(stand_in, arguments, said):
    folder, env = stand_in
    done = run(env, "tpu_pod.sh", *arguments)
    assert done.returncode == 2 and said in done.stderr
    assert (folder / "calls").read_text() == ""


def test_tpu_pod_dry_run_prints_and_does_nothing(stand_in):
    folder, env = stand_in
    done = run(env, "tpu_pod.sh", "--dry-run", "--project", "mine", "pod", "us-west4-a", "run", "python", "a b.py")
    assert done.returncode == 0 and done.stderr == ""
    start = done.stdout.splitlines()[-1]
    assert start.startswith("gcloud compute tpus tpu-vm ssh pod --zone=us-west4-a --project=mine --worker=all ")
    assert "--distributed" in start
    assert (folder / "calls").read_text() == ""


def test_tpu_pod_installs_starts_follows_and_stops_on_every_host(stand_in, tmp_path):
    """The whole life of a run on two stand-in hosts. What runs there notes its arguments and SIGTERM."""
    folder, env = stand_in
    program = tmp_path / "program"
    program.write_text(
        "#!/usr/bin/env bash\n"
        'printf "%s|" "$@" >arguments; echo "$JAX_COMPILATION_CACHE_DIR" >cache; echo started\n'
        'trap "echo saved; exit 143" TERM\nfor _ in {1..600}; do sleep 0.1; done\n'
    )
    program.chmod(0o755)
    env["JAX_COMPILATION_CACHE_DIR"] = "/mnt/shared/compiled programs"
    pod = ("tpu_pod.sh", "pod", "us-west4-a")
    refused = run(env, *pod, "run", program)
    assert refused.returncode == 1 and "not installed: run setup first" in refused.stderr
    assert run(env, *pod, "setup").returncode == 0
    for host in ("host0", "host1"):
        assert (folder / host / "imagereward-jax" / "imagereward_jax" / "train.py").is_file()
    try:
        started = run(env, *pod, "run", program, "--config.data.prompts=my prompts.json", "a'b")
        assert started.returncode == 0, started.stderr
        for host in ("host0", "host1"):
            home = folder / host / "imagereward-jax"
            until(lambda home=home: "started" in (home / "run.log").read_text(), "the program did not start")
            assert (home / "arguments").read_text() == "--config.data.prompts=my prompts.json|a'b|--distributed|"
            assert (home / "cache").read_text() == "/mnt/shared/compiled programs\n"
        again = run(env, *pod, "run", program)
        assert again.returncode == 1 and "a run is going on: stop it first" in again.stderr
        assert run(env, *pod, "status").stdout.count(": running\nstarted\n") == 2
        assert run(env, *pod, "stop").returncode == 0
        for host in ("host0", "host1"):
            log = folder / host / "imagereward-jax" / "run.log"
            until(lambda log=log: log.read_text() == "started\nsaved\n", "SIGTERM did not arrive")
        until(lambda: run(env, *pod, "status").stdout.count(": not running\nsaved\n") == 2, "it did not end")
    finally:
        run(env, *pod, "stop")


def test_tpu_pod_logs_are_those_of_host_0(stand_in):
    _, env = stand_in
    done = run(env, "tpu_pod.sh", "--dry-run", "pod", "us-west4-a", "logs")
    assert "--worker=0 " in done.stdout and "tail" in done.stdout


def batch_options():
    """{option: value} of the #SBATCH lines."""
    text = (LAUNCH / "slurm.sbatch").read_text()
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE))


def test_slurm_asks_for_a_task_a_gpu_and_for_time_to_save():
    options = batch_options()
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"] == "B:USR1@600" and "requeue" in options and options["open-mode"] == "append"
    assert "gpus-per-task" not in options  # jax takes the GPU by the task's number on its node


@pytest.mark.parametrize(
    ("arguments", "change", "said"),
    [
        ([], {}, "no command"),
        (["no-such-program"], {"SLURM_JOB_ID": "1"}, "no-such-program: no such command"),
        (["true"], {}, "this is no Slurm job"),
        (["true"], {"SLURM_JOB_ID": "1", "REQUEUES": "many"}, "REQUEUES=many: expected a number"),
    ],
)
def test_slurm_says_what_is_wrong(stand_in, arguments, change, said):
    folder, env = stand_in
    done = run({**env, **change}, "slurm.sbatch", *arguments)
    assert done.returncode == 2 and said in done.stderr
    assert (folder / "calls").read_text() == ""


def test_slurm_dry_run_prints_and_does_nothing(stand_in):
    folder, env = stand_in
    done = run({**env, "DRY_RUN": "1"}, "slurm.sbatch", "python", "-m", "imagereward_jax.train", "--workdir=a b")
    assert done.stdout.split() == [
        *("srun", "--kill-on-bad-exit=0", "--wait=600", "--label"),
        *("python", "-m", "imagereward_jax.train", "--workdir=a\\", "b", "--distributed"),
    ]
    assert (folder / "calls").read_text() == ""


def task(tmp_path, text):
    """A program for the tasks."""
    path = tmp_path / "task"
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("status", [0, 1, 2, 143])
def test_slurm_gives_the_status_and_queues_only_what_the_time_limit_stopped(stand_in, tmp_path, status):
    """143 alone is a cancelled or preempted job, with which Slurm does as it should."""
    folder, env = stand_in
    done = run({**env, "SLURM_JOB_ID": "7"}, "slurm.sbatch", task(tmp_path, f"exit {status}"))
    assert done.returncode == status
    assert "scontrol" not in (folder / "calls").read_text()


def test_slurm_does_not_queue_for_ever(stand_in, tmp_path):
    folder, env = stand_in
    program = task(tmp_path, f"trap 'exit 143' TERM\ntouch {tmp_path}/ready$SLURM_PROCID\nwhile :; do sleep 0.1; done")
    env |= {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "3", "REQUEUES": "3"}
    with subprocess.Popen([LAUNCH / "slurm.sbatch", program], env=env, stdout=subprocess.PIPE, text=True) as job:
        until(lambda: (tmp_path / "ready0").exists() and (tmp_path / "ready1").exists(), "the tasks did not start")
        job.send_signal(signal.SIGUSR1)
        said = job.communicate(timeout=30)[0]
    assert job.returncode == 143 and "queued 3 times (REQUEUES), so no more" in said
    assert "scontrol" not in (folder / "calls").read_text()


def test_slurm_run_near_its_time_limit_saves_is_queued_and_continues(stand_in, tmp_path):
    """Two real processes that find each other by Slurm's variables; the second start ends what the first began."""
    folder, env = stand_in
    with socket.socket() as free:  # jax derives the coordinator's port from the job's number
        free.bind(("127.0.0.1", 61440 + os.getpid() % 4000))
        env["SLURM_JOB_ID"] = str(free.getsockname()[1] - 61440)
    workdir = tmp_path / "run"
    toy = [sys.executable, ROOT / "tests" / "training" / "toy.py", workdir, "--log_every=1", "--checkpoint.every=10000"]
    command = [LAUNCH / "slurm.sbatch", *map(str, toy)]
    log = workdir / "metrics.jsonl"
    with subprocess.Popen([*command, "--steps=100000"], env=env, stdout=subprocess.PIPE, text=True) as job:
        until(lambda: log.exists() and log.read_text().count("refl/loss") >= 3, "no step was made")
        job.send_signal(signal.SIGUSR1)
        said = job.communicate(timeout=180)[0]
    assert job.returncode == 143, said
    stopped = int(re.search(r"stopped by SIGTERM at step (\d+); the same command continues", said)[1])
    calls = (folder / "calls").read_text().splitlines()
    assert calls[1:] == [f"scancel --signal=TERM {env['SLURM_JOB_ID']}", f"scontrol requeue {env['SLURM_JOB_ID']}"]
    env["SLURM_RESTART_COUNT"] = "1"
    done = subprocess.run([*command, f"--steps={stopped + 2}"], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"continuing from step {stopped}" in done.stderr and "start 2:" in done.stdout
    steps = [row["step"] for row in read_rows(log) if "refl/loss" in row]
    assert steps == list(range(1, stopped + 3))


def test_jobset_is_one_process_a_host_and_its_arguments_are_ours(monkeypatch):
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = 1
    for side in topology.split("x"):
        chips *= int(side)
    assert job["parallelism"] == job["completions"] == chips // container["resources"]["limits"]["google.com/tpu"]
    assert job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
    # What makes bad input final: the Job fails for its exit status, and for that reason the JobSet.
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2]
    assert rule["onExitCodes"]["containerName"] == container["name"] and pod["restartPolicy"] == "Never"
    assert jobset["spec"]["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    (mount,) = container["volumeMounts"]
    assert mount["name"] in volumes

    assert container["command"] == ["python", "-m", "imagereward_jax.train"]
    monkeypatch.chdir(ROOT)
    config, workdir, processes = parse_flags(["train", *container["args"]])
    validate(config)
    assert processes == (None, None, None)  # joins, by what the environment says
    assert workdir.is_relative_to(mount["mountPath"])
    assert chips % config.mesh.fsdp == 0
    assert config.batch_size % (config.accumulation * chips) == 0
