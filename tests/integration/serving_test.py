#!/usr/bin/env python3
"""The real programs from outside: flags, policy reload, TLS and tokens, SIGTERM, the Python client.

usage: serving_test.py BIN_DIR MODEL_DIR SOURCE_DIR
"""
import hashlib
import json
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))
from server_process import Server, free_address, wait_until  # noqa: E402

BIN, MODEL, SOURCE = pathlib.Path(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
ROUNDS = 5  # of SIGTERM under load


def start(*flags, client=()):
    """Without the metrics port, whose library takes two seconds to stop."""
    return Server(BIN, "--metrics_listen", "", *flags, model=MODEL, client=client)


def target_bits(server):
    return json.loads(server.call("status", "--json").stdout)["target_bits"]


def check_bad_flags():
    for flags, word in [(["--target_bits", "9"], "--target_bits"), (["--threads", "x"], "--threads"),
                        (["--no-such-flag"], "--no-such-flag"), (["stray"], "stray"),
                        (["--tls_cert", "x"], "--tls_key"), (["--tls_client_ca", "x"], "--tls_cert"),
                        (["--tls_cert", "/none", "--tls_key", "/none"], "/none"),
                        (["--token_file", "/none"], "/none"),
                        (["--device", "tpu"], "device"), (["--policy", "/nonexistent"], "/nonexistent")]:
        done = subprocess.run([BIN / "mobi-server", "--model", MODEL, "--listen", free_address(),
                               "--admin_listen", free_address(), "--metrics_listen", "", *flags],
                              capture_output=True, text=True, timeout=30)
        assert done.returncode == 2, f"{flags}: {done.returncode} {done.stderr}"
        assert done.stderr.count("\n") == 1 and word in done.stderr, f"{flags}: {done.stderr!r}"
    for arguments, code in [(["bits", "much"], 2), (["frobnicate"], 2), (["generate"], 2),
                            (["status", "--tls_cert", BIN / "mobictl"], 2),
                            (["status", "--token", "a", "--token_file", "b"], 2),
                            (["generate", "x", "--server", free_address()], 1)]:
        done = subprocess.run([BIN / "mobictl", *arguments], capture_output=True, text=True)
        assert done.returncode == code, f"{arguments}: {done.returncode} {done.stderr}"
        assert done.stderr.count("\n") == 1, done.stderr
    for arguments, code, word in [(["--tls_cert", BIN / "mobictl"], 2, "--tls_key"),
                                  (["--token_file", "/none"], 2, "/none"),
                                  (["--server", free_address()], 1, "no server")]:
        done = subprocess.run([BIN / "mobi-load", *arguments], capture_output=True, text=True)
        assert done.returncode == code, f"{arguments}: {done.returncode} {done.stderr}"
        assert done.stderr.count("\n") == 1 and word in done.stderr, done.stderr


def check_policy_reload():
    window = "windows: [{{name: always, floor_bits: {0}, ceiling_bits: {0}}}]\n"
    with tempfile.TemporaryDirectory() as folder:
        policy = pathlib.Path(folder) / "policy.yaml"
        policy.write_text(window.format(6))
        server = start("--policy", policy)
        try:
            assert target_bits(server) == 6
            policy.write_text(window.format(4))
            server.process.send_signal(signal.SIGHUP)
            wait_until(lambda: target_bits(server) == 4, "SIGHUP must reload the policy", seconds=20)
            policy.write_text("windows: 3\n")
            server.process.send_signal(signal.SIGHUP)
            time.sleep(0.5)
            assert target_bits(server) == 4, "a bad policy changes nothing"
            server.stop()
        finally:
            server.process.kill()


def check_sigterm_under_load():
    """Every call ends well or is told to come back; the server ends with 0."""
    for round_number in range(ROUNDS):
        server = start()
        stop, good, bad = threading.Event(), [0], []

        def client():
            while not stop.is_set():
                done = server.call("generate", "Once", "--max-new-tokens", "200", "--ignore-eos")
                if done.returncode == 0:
                    good[0] += 1
                elif "UNAVAILABLE" not in done.stderr and "no server" not in done.stderr:
                    bad.append(done.stderr)

        clients = [threading.Thread(target=client) for _ in range(3)]
        try:
            for thread in clients:
                thread.start()
            wait_until(lambda: good[0] >= 1 + round_number % 3, "requests must succeed", seconds=20)
            server.stop()
        finally:
            stop.set()
            for thread in clients:
                thread.join()
            server.process.kill()
        assert not bad, bad


def python_with_grpc():
    """This interpreter, or the distribution's, whichever has the packages; None without."""
    for python in (sys.executable, "/usr/bin/python3"):
        done = subprocess.run([python, "-c", "import grpc, google.protobuf"], capture_output=True)
        if done.returncode == 0:
            return python
    return None


PYTHON = python_with_grpc()


def run_python_client(server, *flags):
    return subprocess.run(
        [PYTHON, SOURCE / "deploy/examples/client.py", "Once upon a time", "--server",
         server.data, "--max-new-tokens", "20", "--min-bits", "4", *flags],
        capture_output=True, text=True, timeout=120)


def check_python_client():
    if PYTHON is None:
        print("skipped: the Python client needs python3-grpcio and python3-protobuf")
        return
    server = start()
    try:
        done = run_python_client(server)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.split()) > 5 and " + " in done.stderr, (done.stdout, done.stderr)
        server.stop()
    finally:
        server.process.kill()


def make_certificate(folder):
    """A certificate for 127.0.0.1 that is its own authority."""
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
         "-days", "1", "-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", folder / "key.pem", "-out", folder / "cert.pem"],
        check=True, capture_output=True)


def load(server, *flags):
    return subprocess.run(
        [BIN / "mobi-load", "--server", server.data, *server.client, "--rate", "5", "--duration_s",
         "1", "--prompt_tokens", "4", "--new_tokens", "2", "--json", *flags],
        capture_output=True, text=True, timeout=120)


def check_access():
    """mTLS and tokens with the real programs, the Python client included."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        make_certificate(folder)
        (folder / "token").write_text("apple\n")
        hashed = hashlib.sha256(b"apple").hexdigest()
        (folder / "tokens").write_text(f"# name scopes sha256\napp generate {hashed}\n")
        cert, key = ("--tls_cert", folder / "cert.pem"), ("--tls_key", folder / "key.pem")
        ca, token = ("--tls_ca", folder / "cert.pem"), ("--token_file", folder / "token")
        server = start(*cert, *key, "--tls_client_ca", folder / "cert.pem", "--token_file",
                       folder / "tokens", client=(*ca, *cert, *key))
        try:
            hello = ("generate", "Once", "--max-new-tokens", "3")
            for flags, code, word in [((), 1, "UNAUTHENTICATED"), (("--token", "pear"), 1, "not known"),
                                      (token, 0, "")]:
                done = server.call(*hello, *flags)
                assert done.returncode == code and word in done.stderr, (flags, done.stderr)
            done = server.call("status", *token)
            assert done.returncode == 1 and "lacks the scope admin" in done.stderr, done.stderr
            assert server.call("health").returncode == 0, "health needs a certificate, no token"
            done = load(server)
            assert done.returncode == 1 and "UNAUTHENTICATED" in done.stderr, done.stderr
            done = load(server, *token)
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout)["reports"][0]["requests"] > 0, done.stdout
            server.client = ca
            assert "no server" in load(server, *token).stderr, "mobi-load needs one too"
            assert "no server" in server.call("health").stderr, "mTLS needs a client certificate"
            server.stop()
        finally:
            server.process.kill()
        server = start(*cert, *key, "--token_file", folder / "tokens", client=(*ca, *token))
        try:
            assert server.call(*hello).returncode == 0
            if PYTHON is not None:
                tls = ("--tls-ca", folder / "cert.pem")
                done = run_python_client(server, *tls, "--token-file", folder / "token")
                assert done.returncode == 0, done.stderr
                done = run_python_client(server, *tls)
                assert done.returncode == 1 and "UNAUTHENTICATED" in done.stderr, done.stderr
            server.stop()
        finally:
            server.process.kill()


check_bad_flags()
check_policy_reload()
check_python_client()
check_access()
check_sigterm_under_load()
print("serving works")
