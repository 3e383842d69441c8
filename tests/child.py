"""Programs that need a Python of their own, such as those on eight devices."""

import json
import os
import subprocess
import sys


def environment(devices=1):
    """This process's environment, with `devices` virtual CPU devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}


def run(program, *arguments, devices=1):
    """Runs a Python `program` on `devices` virtual CPU devices; returns the JSON of its last line."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, env=environment(devices), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
