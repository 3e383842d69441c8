"""Programs that need a Python of their own, such as those on eight devices."""

import json
import os
import subprocess
import sys


def run(program, *arguments, devices=1):
    """What a Python `program`, on so many virtual CPU devices, printed last, which is JSON."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
