#!/usr/bin/env python3
"""mobi-calibrate as a process: bad input is one line and exit 2, and whatever ends a run, a killed
process or a full disk, leaves no half checkpoint and is made good by the same command.

usage: calibrate_test.py BIN_DIR MODEL_DIR
"""
import pathlib
import re
import resource
import signal
import subprocess
import sys
import tempfile

BIN, MODEL = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
RECIPE = """
statistics: {sequences: 4}
refine: {rounds: 1, passes: 1}
tuning: {steps: 2}
routing: {sequences: 2, price_tokens: 16, epochs: 1}
"""
SENTENCES = "Once upon a time there was a little dog named {}. It liked to run in the park.\n"


class Workshop:
    """A folder with a text, a recipe and whatever runs leave there."""

    def __init__(self, path):
        self.path = pathlib.Path(path)
        self.text = self.path / "text.txt"
        self.text.write_text("".join(SENTENCES.format(n) for n in range(400)))
        self.recipe = self.path / "recipe.yaml"
        self.recipe.write_text(RECIPE)

    def command(self, name, **flags):
        merged = {"model": MODEL, "data": self.text, "out": self.path / name, "samples": 6,
                  "seq_len": 64, "threads": 2, "recipe": self.recipe, **flags}
        return [BIN / "mobi-calibrate"] + [f"--{k}={v}" for k, v in merged.items()]

    def run(self, name, preexec=None, **flags):
        return subprocess.run(self.command(name, **flags), stderr=subprocess.PIPE, text=True,
                              preexec_fn=preexec, check=False)

    def stop_at(self, out, line_part, sent):
        """Sends a signal as soon as a line of progress says so; the exit code and all lines."""
        process = subprocess.Popen(self.command(out), stderr=subprocess.PIPE, text=True)
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line_part in line:
                process.send_signal(sent)
                line_part = "\0"
        return process.wait(), lines

    def weights(self, out):
        return (self.path / out / "model.safetensors").read_bytes()

    def left_of(self, out):
        return sorted(p.name for p in self.path.iterdir() if p.name.startswith(out))


def check_bad_input(shop):
    latin1, short = shop.path / "latin1.txt", shop.path / "short.txt"
    latin1.write_bytes(b"caf\xe9 au lait\n" * 1000)
    short.write_text("Too short.")
    recipe = shop.path / "bad.yaml"
    recipe.write_text("refine: {rounds: many}\n")
    for flags, expected in (
            ({"data": latin1}, "latin1.txt: not UTF-8 text (byte at offset 3)"),
            ({"data": short}, "calibration text is too short"),
            ({"data": shop.path / "absent.txt"}, "absent.txt"),
            ({"recipe": recipe}, "bad.yaml:1: refine.rounds must be a whole number"),
            ({"model": shop.path}, "config.json"),
            ({"seq_len": 100000}, "seq-len 100000 is not within"),
            ({"samples": 0}, "--samples must be at least 1"),
            ({"out": shop.path / "absent" / "out"}, "absent"),
            ({"device": "abacus"}, 'device "abacus" is not cpu or cuda')):
        done = shop.run("bad", **flags)
        assert done.returncode == 2, f"{flags}: exit {done.returncode}: {done.stderr}"
        assert done.stderr.count("\n") == 1 and expected in done.stderr, f"{flags}: {done.stderr}"
        assert shop.left_of("bad") == ["bad.yaml"], shop.left_of("bad")


def check_interruptions(shop):
    whole = shop.run("whole")
    assert whole.returncode == 0, whole.stderr
    assert shop.left_of("whole") == ["whole"], shop.left_of("whole")
    lines = whole.stderr.splitlines()
    assert all(re.fullmatch(r" *\d+ %  .+, \d+\S*, \d+\S* left", line) for line in lines), lines
    shares = [int(line.split()[0]) for line in lines]
    assert shares == sorted(shares) and shares[-1] == 100, shares
    # Block 2's first group is reported, so block 1 is in the journal.
    code, lines = shop.stop_at("cut", "block 2/", signal.SIGKILL)
    assert code == -signal.SIGKILL, (code, lines)
    assert shop.left_of("cut") == ["cut.progress"], shop.left_of("cut")
    code, lines = shop.stop_at("cut", "block 4/", signal.SIGINT)
    assert code == 2 and "interrupted; the same command goes on" in lines[-1], (code, lines)
    assert any("block 1/6 was fitted before" in line for line in lines), lines
    assert shop.left_of("cut") == ["cut.progress"], shop.left_of("cut")
    code, lines = shop.stop_at("cut", "routers of block", signal.SIGKILL)
    assert code == -signal.SIGKILL, (code, lines)
    done = shop.run("cut")
    assert done.returncode == 0, done.stderr
    assert "fitted and tuned before" in done.stderr, done.stderr
    assert shop.left_of("cut") == ["cut"], shop.left_of("cut")
    assert shop.weights("cut") == shop.weights("whole")


def check_full_disk(shop):
    """A limit on what a file may hold ends writing as a full disk does."""
    size = len(shop.weights("whole"))

    def limit(bytes_left):
        def apply():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, bytes_left))
        return apply

    for bytes_left in (100_000, size - 1000):  # in the journal, and in the checkpoint itself
        done = shop.run("full", preexec=limit(bytes_left))
        assert done.returncode == 2, done.stderr
        assert "cannot be written: File too large" in done.stderr.splitlines()[-1], done.stderr
        assert "full" not in shop.left_of("full"), shop.left_of("full")
    done = shop.run("full")
    assert done.returncode == 0, done.stderr
    assert shop.left_of("full") == ["full"], shop.left_of("full")
    assert shop.weights("full") == shop.weights("whole")


def main():
    with tempfile.TemporaryDirectory() as path:
        shop = Workshop(path)
        for check in (check_bad_input, check_interruptions, check_full_disk):
            check(shop)
            print(check.__name__, "ok", flush=True)


main()
