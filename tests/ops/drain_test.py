#!/usr/bin/python3
"""SIGTERM under load: no accepted request is lost, late ones get a retryable UNAVAILABLE, the server
exits with 0 within its grace time. And a cold start is fast.

usage: drain_test.py BIN_DIR WORK_DIR [ROUNDS]
"""
import json
import pathlib
import random
import re
import statistics
import subprocess
import sys
import threading
import time

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))
from server_process import Server  # noqa: E402

ROUNDS = int(sys.argv[3]) if len(sys.argv) > 3 else 5
CLIENTS = 8
GRACE_S = 45
TOKENS = 200
# The goal is 2 s from start to ready; processor time is what a busy test machine does not stretch.
COLD_START_CPU_S = 2


class Client(threading.Thread):
    """Sends streams one after another until told to stop; keeps how each ended."""

    def __init__(self, server, seed):
        super().__init__()
        self.server, self.random = server, random.Random(seed)
        self.stopping = threading.Event()
        self.ends = []  # (when, tokens received, exit code, message)

    def run(self):
        while not self.stopping.is_set():
            done = subprocess.run(
                self.server.ctl("--json", "generate", "Once upon a time", "--ignore_eos",
                                "--max_new_tokens", self.random.randint(1, TOKENS),
                                "--timeout_s", "60"), capture_output=True, text=True)
            tokens = sum(len(c.get("token_ids", [])) for line in done.stdout.splitlines()
                         for c in json.loads(line).get("chunks", []))
            self.ends.append((time.monotonic(), tokens, done.returncode, done.stderr.strip()))
            if done.returncode != 0:
                return


def is_late(end, terminated):
    """Refused before it began, in a way that tells the client to try again: either by the server, or
    by a connection that nobody took any more. What the grace time's end stops was accepted."""
    when, tokens, _, message = end
    refused = re.search(r"UNAVAILABLE: the server is stopping \(try again|^mobictl: no server at",
                        message)
    return tokens == 0 and refused is not None and terminated < when < terminated + GRACE_S


def one_round(bin_dir, seed):
    with Server(bin_dir, "--threads", "1", "--drain_grace_s", str(GRACE_S), "--max_num_seqs",
                "8") as server:
        assert server.cpu_seconds() < COLD_START_CPU_S, f"{server.cpu_seconds()} s of CPU to start"
        clients = [Client(server, seed * CLIENTS + i) for i in range(CLIENTS)]
        for client in clients:
            client.start()
        while sum(len(c.ends) for c in clients) < CLIENTS:
            time.sleep(0.01)
        time.sleep(random.Random(seed).uniform(0, 0.2))
        terminated = time.monotonic()
        server.terminate()
        code = server.wait(GRACE_S + 15)
        seconds = time.monotonic() - terminated
        for client in clients:
            client.stopping.set()
        for client in clients:
            client.join(90)
        assert code == 0, f"round {seed}: exit code {code}"
        assert seconds < GRACE_S + 5, f"round {seed}: {seconds:.1f} s to exit"
        ends = [end for client in clients for end in client.ends]
        completed = sum(exit_code == 0 for _, _, exit_code, _ in ends)
        lost = [end for end in ends if end[2] != 0 and not is_late(end, terminated)]
        assert not lost, f"round {seed}: lost {lost}"
        assert completed >= CLIENTS, "the load was not load"
        return completed, len(ends) - completed, seconds, server.seconds_to_ready


def main():
    rounds = [one_round(sys.argv[1], seed) for seed in range(ROUNDS)]
    completed, late, seconds, ready = zip(*rounds)
    print(f"{ROUNDS} times SIGTERM under load: {sum(completed)} requests completed, {sum(late)} late "
          f"ones told to retry, none lost")
    print(f"exit after {statistics.median(seconds):.2f} s (median), {max(seconds):.2f} s (most), "
          f"grace {GRACE_S} s")
    print(f"start to ready: {min(ready):.2f} s (least), {statistics.median(ready):.2f} s (median)")


main()
