#!/usr/bin/env python3
"""How closely a real mobi-server holds the bits it is asked for, second by second.

usage: bits_tracking.py BIN_DIR MODEL_DIR --text FILE [--coherent] [--targets 2.2,3,...]
Starts the server, keeps it busy with completions of prompts from FILE, overrides the target and
watches the status: averages over one second, ten times a second. Prints a Markdown table.
"""
import argparse
import json
import pathlib
import random
import statistics
import subprocess
import sys
import threading
import time

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))
from server_process import Server  # noqa: E402

SCALE_BITS = 0.25  # what the scales of a level add to loaded bits


class Load:
    """Clients that ask for one completion after another."""

    def __init__(self, server, prompts, clients, new_tokens):
        self.running = True
        self.threads = [threading.Thread(target=self.ask, args=(server, prompts, new_tokens, i))
                        for i in range(clients)]
        for thread in self.threads:
            thread.start()

    def ask(self, server, prompts, new_tokens, seed):
        rng = random.Random(seed)
        while self.running:
            subprocess.run(
                server.ctl("generate", rng.choice(prompts), "--max_new_tokens", str(new_tokens),
                           "--ignore_eos", "--json"),
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)

    def stop(self):
        self.running = False
        for thread in self.threads:
            thread.join()


def watch(server, seconds):
    done = subprocess.run(
        server.ctl("watch", "--json", "--interval_s", "0.1", "--timeout_s", str(seconds)),
        capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def measure(server, target, settle, seconds):
    subprocess.run(server.ctl("bits", str(target), "--ttl_s", "600"), check=True,
                   stdout=subprocess.DEVNULL)
    time.sleep(settle)
    rows = watch(server, seconds)
    errors = [row["effective_bits"] - target for row in rows]
    shared = [row.get("decode_loaded_bits", 0) - SCALE_BITS - target for row in rows]
    return {
        "target": target,
        "mean": statistics.mean(errors),
        "worst": max(errors, key=abs),
        "inside": sum(abs(error) <= 0.05 for error in errors) / len(errors),
        "loaded": statistics.mean(row["loaded_bits"] for row in rows) - SCALE_BITS,
        "shared_worst": max(shared, key=abs),
        "speed": statistics.mean(row["load"].get("tokens_per_second", 0) for row in rows),
        "saturated": any(row.get("saturated") for row in rows),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bin_dir")
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--coherent", action="store_true")
    parser.add_argument("--targets", default="2.2,2.6,3,3.5,4,5,6,7,7.4,7.8")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--new_tokens", type=int, default=400)
    parser.add_argument("--settle", type=float, default=2)
    parser.add_argument("--seconds", type=float, default=5)
    options = parser.parse_args()
    text = pathlib.Path(options.text).read_text(encoding="utf-8")[:1_000_000]
    words = text.split()
    prompts = [" ".join(words[i:i + 60]) for i in range(0, min(len(words) - 60, 60_000), 60)]
    flags = ["--coherent_decode"] if options.coherent else []
    server = Server(options.bin_dir, *flags, model=options.model)
    load = Load(server, prompts, options.clients, options.new_tokens)
    try:
        time.sleep(5)
        shared = "| worst second of loaded by decodes " if options.coherent else ""
        print("| target | mean error | worst second | seconds within 0.05 | loaded less scales "
              f"{shared}| tokens/s |\n" + "| --- " * (7 if shared else 6) + "|")
        for target in (float(t) for t in options.targets.split(",")):
            row = measure(server, target, options.settle, options.seconds)
            print(f"| {target:g}{' (saturated)' if row['saturated'] else ''} | {row['mean']:+.3f} "
                  f"| {row['worst']:+.3f} | {row['inside']:.0%} | {row['loaded']:.2f} " +
                  (f"| {row['shared_worst']:+.3f} " if shared else "") +
                  f"| {row['speed']:.0f} |", flush=True)
    finally:
        load.stop()
        server.stop()


if __name__ == "__main__":
    main()
