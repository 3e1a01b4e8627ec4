"""The real programs on loopback, for the tests and benchmarks in the folders beside this file."""
import os
import pathlib
import signal
import socket
import subprocess
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEMO = ROOT / "deploy" / "demo" / "checkpoint"


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def free_address():
    return f"127.0.0.1:{free_ports(1)[0]}"


def fetch(url, timeout=10):
    with urllib.request.urlopen(url, timeout=timeout) as reply:
        return reply.read().decode()


def wait_until(condition, what, seconds=60):
    """The condition's first true value. Errors of the network count as not yet."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            value = condition()
            if value:
                return value
        except OSError:
            pass
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.05)


def write_policy(path):
    """The example policy for peaks, with a signal that is asked of Prometheus."""
    example = (ROOT / "deploy" / "policies" / "peak-off-peak.yaml").read_text()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(example + "  - {kind: promql, name: cache, reference: 0.9, "
                    "query: 'max(vllm:kv_cache_usage_perc)'}\n")
    return path


class Server:
    """mobi-server, by default with the demo model. Ready when the constructor returns; a flag given
    here stands after the addresses and so may change them."""

    def __init__(self, bin_dir, *flags, model=DEMO, ports=None, client=()):
        self.bin = pathlib.Path(bin_dir)
        self.client = client  # flags of its clients
        self.data, self.admin, self.metrics = (f"127.0.0.1:{p}" for p in ports or free_ports(3))
        start = time.monotonic()
        self.process = subprocess.Popen(
            [self.bin / "mobi-server", "--model", model, "--listen", self.data, "--admin_listen",
             self.admin, "--metrics_listen", self.metrics, *flags],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.greeting = ""
        while "mobictl" not in self.greeting:  # in its last line
            line = self.process.stdout.readline()
            assert line, f"the server ended before it was ready: {self.greeting}"
            self.greeting += line
        self.seconds_to_ready = time.monotonic() - start

    def ctl(self, *arguments):
        return [str(a) for a in (self.bin / "mobictl", "--server", self.data, "--admin",
                                 self.admin, *self.client, *arguments)]

    def call(self, *arguments):
        return subprocess.run(self.ctl(*arguments), capture_output=True, text=True, timeout=120)

    def run(self, *arguments):
        done = self.call(*arguments)
        assert done.returncode == 0, f"{arguments}: {done.returncode} {done.stderr}"
        return done

    def scrape(self):
        return fetch(f"http://{self.metrics}/metrics")

    def cpu_seconds(self):
        fields = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")")[-1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def terminate(self):
        self.process.send_signal(signal.SIGTERM)

    def wait(self, seconds=90):
        self.process.communicate(timeout=seconds)
        return self.process.returncode

    def stop(self):
        self.terminate()
        code = self.wait(60)
        assert code == 0, f"SIGTERM must end the server with 0, not {code}"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
