#!/usr/bin/env python3
"""What the README's quick start promises, with the real programs over loopback.

usage: quickstart_test.py BIN_DIR MODEL_DIR
"""
import json
import pathlib
import re
import subprocess
import sys
import time

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))
from server_process import Server  # noqa: E402

BIN, MODEL = pathlib.Path(sys.argv[1]), sys.argv[2]


def check_greeting(server):
    for word in ("parameters", "context", "KV blocks", "mobictl"):
        assert word in server.greeting, f"the greeting lacks '{word}': {server.greeting}"


def check_generate(server):
    done = server.run("generate", "Once upon a time", "--max-new-tokens", "64")
    words = re.findall(r"[A-Za-z]+", done.stdout)
    assert len(words) > 20, f"not much text: {done.stdout!r}"
    common = {"the", "a", "to", "and", "was", "he", "she", "it", "in", "of", "his", "her", "they"}
    assert sum(w.lower() in common for w in words) >= 8, f"not English: {done.stdout!r}"
    for word in ("tokens", "effective bits", "prefill"):
        assert word in done.stderr, f"the closing lines lack '{word}': {done.stderr!r}"


def check_same_seed(server):
    arguments = ("generate", "One day", "--max-new-tokens", "40", "--seed", "7", "--bits", "4")
    assert server.run(*arguments).stdout == server.run(*arguments).stdout


def bits_while_streaming(server):
    """First and last effective bits of a stream during which the target fell to 3.5."""
    stream = subprocess.Popen(
        server.ctl("--json", "generate", "Once upon a time", "--max-new-tokens", "1000", "--n", "4",
                   "--ignore-eos"), stdout=subprocess.PIPE, text=True)
    bits = []
    for number, line in enumerate(stream.stdout):
        bits += [c["effective_bits"] for c in json.loads(line)["chunks"]]
        if number == 0:
            server.run("bits", "3.5")
    assert stream.wait(60) == 0
    server.run("bits", "8")
    return bits[0], bits[-1]


def check_bits_change_in_a_stream(server):
    # The stream may end before the command has even started; then it is tried again.
    for _ in range(10):
        first, last = bits_while_streaming(server)
        if last < 5.5:
            assert first > 7.5, f"the stream began at {first} bits"
            return
        time.sleep(0.2)
    raise AssertionError(f"the last tokens still used {last} bits")


def check_metrics(server):
    text = server.scrape()
    for name in ("vllm:generation_tokens_total", "vllm:time_to_first_token_seconds_count",
                 "mobi_effective_bits", "mobi_target_bits"):
        assert re.search(rf"^{name}\b.* [0-9.e+-]+$", text, re.M), f"/metrics lacks {name}"


def check_bad_model():
    done = subprocess.run([BIN / "mobi-server", "--model", "/nonexistent"], capture_output=True,
                          text=True, timeout=10)
    assert done.returncode == 2, done.returncode
    assert done.stderr.count("\n") == 1 and "/nonexistent" in done.stderr, done.stderr


def main():
    check_bad_model()
    server = Server(BIN, model=MODEL)
    try:
        check_greeting(server)
        check_generate(server)
        check_same_seed(server)
        check_bits_change_in_a_stream(server)
        check_metrics(server)
        server.stop()
    finally:
        server.process.kill()
    print("the quick start works")


main()
