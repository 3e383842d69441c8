"""Loads a score server with many clients, twice: undisturbed, and while it is abused, killed and started again.

    python benchmarks/serve_load.py [--clients 64] [--requests 10000] [--reward jpeg-compressibility]

Every request holds two small images, whose scores are known from scoring them here. In the second round a client sends
garbage all the time (bytes that are no HTTP, cut bodies, JSON that is no request, files that are no images), another
one bodies of 200 MB, and the server is killed (kill -9) after two fifths of the requests and started again at once.
Clients retry with `rewards.remote`'s default patience. Clients and server share the machine.

Prints a line of JSON per round: requests/s, latency (median, 99th percentile, longest) in ms with all retries, rows in
the wrong order, rows lost, largest resident memory of the servers in MiB, and versions.
"""

import argparse
import concurrent.futures
import itertools
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time

import numpy as np
from common import versions
from PIL import Image

from imagereward_jax.bulk_scoring.scorers import open_scorer
from imagereward_jax.rewards.http_client import ScoreClient, encode_png

IMAGES, SIDE, PROMPT = 64, 32, "a large red circle at the top left"
BIG = 200_000_000  # bytes


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--reward", default="jpeg-compressibility")
    return parser.parse_args()


class Server:
    """`imagereward_jax.serve` in a process of its own, which may be killed and started again."""

    def __init__(self, reward):
        with socket.create_server(("127.0.0.1", 0)) as unused:
            self.port = unused.getsockname()[1]
        self.url, self.memory = f"http://127.0.0.1:{self.port}", 0
        self._command = [sys.executable, "-m", "imagereward_jax.serve", "--reward", reward, "--port", str(self.port)]
        self.start()

    def start(self):
        self.process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        self.process.stdout.readline()  # listens

    def end(self, number):
        """Sends a signal; returns the exit status and the last line."""
        with open(f"/proc/{self.process.pid}/status") as status:
            peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
        self.memory = max(self.memory, peak // 1024)
        self.process.send_signal(number)
        said = self.process.stdout.read().strip()
        return self.process.wait(), said


def make_images():
    """Images of growing detail, so that no two have the same score."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (SIDE, SIDE, 3))
    steps = (128 + (noise - 128) * (number + 1) / IMAGES for number in range(IMAGES))
    return [Image.fromarray(pixels.astype(np.uint8)) for pixels in steps]


def garbage(port, stop):
    """Sends what is no request until `stop`; returns how often."""
    rng, sent = random.Random(0), 0
    head = b"POST /score HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    kinds = (
        lambda: rng.randbytes(500) + b"\r\n\r\n",
        lambda: head % 100_000 + b'{"images": [',
        lambda: head % 18 + b'{"images": [[[[[[]',
        lambda: head % 41 + b'{"images": ["AAAA", "%%"], "prompts": [1]}'[:41],
        lambda: head % 40 + b'{"images": ["AAAA"], "prompts": ["a cat"]}'[:40],
        lambda: b"GET /" + b"a" * 5000,
    )
    while not stop.is_set():
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
                connection.sendall(rng.choice(kinds)())
                connection.shutdown(socket.SHUT_WR)
                connection.recv(4096)
            sent += 1
        except OSError:  # the server is away, or hangs up
            time.sleep(0.05)
    return sent


def large_bodies(port, stop):
    """Sends bodies of 200 MB until `stop`; returns how often, and the statuses of answers that arrived."""
    sent, statuses, piece = 0, [], b"0" * 1_000_000
    head = f"POST /score HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {BIG}\r\n\r\n"
    while not stop.is_set():
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                connection.sendall(head.encode())
                sent += 1
                for _ in range(BIG // len(piece)):
                    connection.sendall(piece)
                statuses.append(int(connection.recv(64).split()[1]))
        except (OSError, IndexError):
            pass
        stop.wait(1)
    return sent, statuses


def load(args, server, files, expected, on_request=lambda number: None):
    """All requests by all clients: (seconds, latencies, rows out of order, rows lost)."""
    numbers, times, wrong, lost = itertools.count(), [], [], []

    def client(_):
        client = ScoreClient(server.url, patience=300.0)
        while (number := next(numbers)) < args.requests:
            on_request(number)
            rows = (number % IMAGES, number * 7 % IMAGES)
            started = time.perf_counter()
            scored = client.score([files[row] for row in rows], [PROMPT] * 2)
            times.append(time.perf_counter() - started)
            for row, score in zip(rows, scored.scores):
                if score is None:
                    lost.append(number)
                elif abs(score - expected[row]) > 1e-4:
                    wrong.append(number)

    started = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(args.clients) as pool:
        list(pool.map(client, range(args.clients)))
    return time.perf_counter() - started, times, wrong, lost


def disturbed(args, server, files, expected):
    """`load` with garbage, large bodies, and a server that is killed and started again."""
    stop, killed = threading.Event(), threading.Event()

    def restart():
        killed.wait()
        server.end(signal.SIGKILL)
        server.start()

    def on_request(number):
        if number == args.requests * 2 // 5:
            killed.set()

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        others = [pool.submit(one, server.port, stop) for one in (garbage, large_bodies)]
        restarting = pool.submit(restart)
        measured = load(args, server, files, expected, on_request)
        restarting.result()
        stop.set()
        sent, (bodies, statuses) = (other.result() for other in others)
    answers = {status: statuses.count(status) for status in statuses}
    return measured, {"garbage": sent, "bodies_of_200_MB": bodies, "answers_to_them": answers}


def report(args, kind, server, measured, more):
    seconds, times, wrong, lost = measured
    status, said = server.end(signal.SIGTERM)
    times = sorted(1000 * time for time in times)
    line = {
        "round": kind,
        "reward": args.reward,
        "clients": args.clients,
        "requests": len(times),
        "requests_per_second": round(len(times) / seconds, 1),
        "images_per_second": round(2 * len(times) / seconds, 1),
        "median_ms": round(statistics.median(times), 1),
        "p99_ms": round(times[int(0.99 * len(times))], 1),
        "longest_ms": round(times[-1], 1),
        "rows_out_of_order": len(wrong),
        "rows_lost": len(lost),
        "server_memory_MiB": server.memory,
        **more,
        "end": f"{status}: {said}",
    }
    print(json.dumps(line), flush=True)


def main():
    args = parse_args()
    images = make_images()
    files, expected = [encode_png(image) for image in images], open_scorer(args.reward).score(PROMPT, images)
    print(json.dumps({"cores": os.cpu_count(), **versions("jax", "numpy", "pillow")}))
    server = Server(args.reward)
    report(args, "undisturbed", server, load(args, server, files, expected), {})
    server = Server(args.reward)
    report(args, "disturbed", server, *disturbed(args, server, files, expected))


if __name__ == "__main__":
    main()
