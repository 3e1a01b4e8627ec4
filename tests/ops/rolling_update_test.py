#!/usr/bin/python3
"""A rolling update of two servers behind the front proxy, under load: no request fails, and no client
tries again. The proxy runs with the configuration that deploy/ ships, its addresses replaced.

Each server is replaced as Kubernetes does it: first it leaves the proxy's backends (its endpoint goes
while preStop sleeps), then it gets SIGTERM and drains, then a new one takes its place.

usage: rolling_update_test.py BIN_DIR WORK_DIR
"""
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))
from named_metrics import FILES  # noqa: E402
from server_process import ROOT, Server, free_ports, wait_until  # noqa: E402

BIN, WORK = sys.argv[1], pathlib.Path(sys.argv[2])
CLIENTS = 4
PRE_STOP_S = 1.5


class Proxy:
    def __init__(self):
        WORK.mkdir(parents=True, exist_ok=True)
        self.port, self.api_port = free_ports(2)
        self.config = WORK / "nghttpx.conf"
        self.log = open(WORK / "nghttpx.log", "w")

    def backends(self, servers):
        return [f"backend={s.data.replace(':', ',')};;proto=h2;dns" for s in servers]

    def start(self, servers):
        text = (ROOT / "deploy" / "nghttpx.conf").read_text()
        for shipped, here in (
                ("include=/etc/nghttpx/nghttpx-limits.conf", f"include={FILES / 'nghttpx-limits.conf'}"),
                ("frontend=*,8443;no-tls", f"frontend=127.0.0.1,{self.port};no-tls"),
                ("backend=server,50051;;proto=h2;dns", "\n".join(self.backends(servers)))):
            assert f"\n{shipped}\n" in text, f"deploy/nghttpx.conf has no line {shipped}"
            text = text.replace(f"\n{shipped}\n", f"\n{here}\n")
        self.config.write_text(text + f"errorlog-file={WORK / 'errors'}\n"
                               f"frontend=127.0.0.1,{self.api_port};no-tls;api\n")
        self.process = subprocess.Popen(["nghttpx", f"--conf={self.config}"], stdout=self.log,
                                        stderr=self.log)
        wait_until(lambda: socket.create_connection(("127.0.0.1", self.port), 1),
                   "the proxy listens")

    def use(self, servers):
        """Through the proxy's API, which leaves the clients' connections alone."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.api_port}/api/v1beta1/backendconfig", method="PUT",
            data="".join(line + "\n" for line in self.backends(servers)).encode())
        with urllib.request.urlopen(request, timeout=10) as reply:
            assert reply.status == 200

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)
        self.log.close()


class Load:
    """Streams through the proxy, one after another in each thread, until told to stop."""

    def __init__(self, port):
        self.address, self.stopping, self.ends = f"127.0.0.1:{port}", threading.Event(), []
        self.threads = [threading.Thread(target=self.run) for _ in range(CLIENTS)]
        for thread in self.threads:
            thread.start()

    def run(self):
        while not self.stopping.is_set():
            done = subprocess.run(
                [f"{BIN}/mobictl", "generate", "Once upon a time", "--server", self.address,
                 "--max_new_tokens", "60", "--ignore_eos", "--timeout_s", "60"],
                capture_output=True, text=True)
            self.ends.append((done.returncode, done.stderr.strip()))

    def wait_for_more(self, count):
        goal = len(self.ends) + count
        wait_until(lambda: len(self.ends) >= goal, f"{count} more requests", 90)

    def stop(self):
        self.stopping.set()
        for thread in self.threads:
            thread.join(90)


def ports_of(server):
    return [int(address.rsplit(":")[-1]) for address in (server.data, server.admin, server.metrics)]


def roll(proxy, load, servers):
    """Replaces each of the servers; returns how many requests each old one served."""
    served = []
    for index, old in enumerate(list(servers)):
        proxy.use([s for s in servers if s is not old])
        time.sleep(PRE_STOP_S)
        served.append(ok_requests(old))
        old.terminate()
        load.wait_for_more(2 * CLIENTS)
        assert old.wait(60) == 0, "the drained server must exit with 0"
        servers[index] = Server(BIN, "--threads", "1", ports=ports_of(old))
        proxy.use(servers)
        load.wait_for_more(2 * CLIENTS)
    return served


def ok_requests(server):
    line, = (line for line in server.scrape().splitlines()
             if line.startswith('mobi_requests_total{method="Generate",code="OK"}'))
    return int(float(line.rsplit(" ")[-1]))


def main():
    if not shutil.which("nghttpx"):
        print("SKIPPED: nghttpx (package nghttp2-proxy) is not installed")
        sys.exit(77)
    servers, proxy, load = [Server(BIN, "--threads", "1") for _ in range(2)], Proxy(), None
    try:
        proxy.start(servers)
        load = Load(proxy.port)
        load.wait_for_more(4 * CLIENTS)
        served = roll(proxy, load, servers)
        load.stop()
        served += [ok_requests(s) for s in servers]
        failed = [end for end in load.ends if end[0] != 0]
        assert not failed, f"{len(failed)} of {len(load.ends)} failed: {failed[:3]}"
        assert all(count > 0 for count in served), f"some server served nothing: {served}"
        print(f"{len(load.ends)} requests through two rolling replacements, none failed; "
              f"served by old and new servers: {served}")
    finally:
        if load is not None:
            load.stop()
        for server in servers:
            server.process.kill()
        proxy.stop()


main()
