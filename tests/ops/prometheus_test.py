#!/usr/bin/python3
"""The real Prometheus over the real server under load: it evaluates every dashboard query, every
recording rule and alert, and the autoscaler's queries, through its API.

usage: prometheus_test.py BIN_DIR WORK_DIR
"""
import pathlib
import re
import shutil
import subprocess
import sys
import time

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))
import named_metrics  # noqa: E402
from prometheus_process import Prometheus  # noqa: E402
from server_process import Server, free_ports, wait_until, write_policy  # noqa: E402

WORK = pathlib.Path(sys.argv[2])
LOAD_SECONDS = 10
SUBSTITUTES = {"$namespace": ".*", "$job": ".*", "$instance": ".*", "$__rate_interval": "8s",
               "[1m]": "[8s]", "[5m]": "[8s]", "offset 1m": "offset 8s"}


def substituted(expression):
    for text, value in SUBSTITUTES.items():
        expression = expression.replace(text, value)
    return expression


def drive_load(server, seconds):
    """Streams one after another on two lanes, so that there is work in every second."""
    deadline = time.monotonic() + seconds
    lanes = []
    while time.monotonic() < deadline:
        lanes = [lane for lane in lanes if lane.poll() is None]
        while len(lanes) < 2:
            lanes.append(subprocess.Popen(
                server.ctl("generate", "Once upon a time", "--max_new_tokens", "300",
                           "--ignore_eos"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        time.sleep(0.05)
    return lanes


def is_annotation(query):
    return ": annotation " in query[0]


def check_queries(prometheus):
    empty, broken, count = [], [], 0
    queries = [*named_metrics.dashboard_queries(), *named_metrics.autoscaling_queries()]
    for where, expression in (q for q in queries if not is_annotation(q)):
        count += 1
        try:
            if not prometheus.samples(substituted(expression)):
                empty.append(f"{where}: {expression}")
        except (AssertionError, OSError) as error:
            broken.append(f"{where}: {expression}: {error}")
    assert not broken, "refused by Prometheus:\n" + "\n".join(broken)
    assert not empty, "no samples for:\n" + "\n".join(empty)
    for where, expression in named_metrics.variable_queries():
        metric, label = re.fullmatch(r"label_values\((.*), (\w+)\)", expression).groups()
        values = {s["metric"].get(label) for s in prometheus.samples(substituted(metric))}
        assert values != {None} or label == "namespace", f"{where}: no values"
    print(f"{count} queries of dashboards and autoscaling have samples")


def check_annotations(policy, prometheus):
    """What they mark happens: another window opens, since the policy file is replaced by one."""
    annotations = [q for q in named_metrics.dashboard_queries() if is_annotation(q)]
    for where, expression in annotations:
        wait_until(lambda: not prometheus.samples(substituted(expression)), f"{where}: nothing yet")
    policy.write_text("windows: [{name: another, floor_bits: 3.0, ceiling_bits: 8.0}]\n")
    for where, expression in annotations:
        wait_until(lambda: prometheus.samples(substituted(expression)), where)
    print(f"{len(annotations)} annotations mark a window that opens")


def check_rules(prometheus):
    rules = [r for g in prometheus.api("rules")["groups"] for r in g["rules"]]
    assert len(rules) == len(list(named_metrics.rules()))
    for rule in rules:
        assert rule["health"] == "ok", f"{rule['name']}: {rule['health']} {rule.get('lastError')}"
        if rule["type"] == "alerting":
            assert rule["state"] == "inactive", f"{rule['name']} is {rule['state']} when healthy"
        else:
            assert prometheus.samples(rule["name"]), f"{rule['name']} records nothing"
    print(f"{len(rules)} rules are evaluated; no alert fires on a healthy server")


def check_an_alert_sees_a_failure(server, prometheus):
    server.process.kill()
    pending = wait_until(
        lambda: [a for a in prometheus.api("alerts")["alerts"]
                 if a["labels"]["alertname"] == "MobiServerDown"],
        "MobiServerDown after the server was killed", 30)
    assert pending[0]["labels"]["instance"] == server.metrics


def main():
    if not shutil.which("prometheus"):
        print("SKIPPED: prometheus is not installed")
        sys.exit(77)
    policy, url = write_policy(WORK / "policy.yaml"), f"http://127.0.0.1:{free_ports(1)[0]}"
    with Server(sys.argv[1], "--threads", "1", "--policy", policy, "--prometheus_url", url) as server:
        prometheus = Prometheus(WORK, url, server.metrics)
        try:
            lanes = drive_load(server, LOAD_SECONDS)
            check_queries(prometheus)
            check_rules(prometheus)
            check_annotations(policy, prometheus)
            for lane in lanes:
                lane.wait(60)
            check_an_alert_sees_a_failure(server, prometheus)
        finally:
            prometheus.stop()


main()
