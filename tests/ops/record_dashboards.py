#!/usr/bin/python3
"""Draws panels of the operator dashboard over a load test, for the documentation: the real server
under load that rises and falls, scraped by the real Prometheus, asked the dashboard's own queries.
Needs python3-matplotlib; run by hand.

usage: record_dashboards.py BIN_DIR WORK_DIR OUT.png
"""
import pathlib
import subprocess
import sys
import time

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))
import named_metrics  # noqa: E402
from prometheus_process import Prometheus  # noqa: E402
from server_process import Server, free_ports  # noqa: E402

WORK = pathlib.Path(sys.argv[2])
RATES = "1:20,8:35,1:40"  # requests a second : seconds
PANELS = ["Bits", "Pressure by signal", "Bits deficit by replica", "Time to first token", "Queue",
          "Engine busy"]
POLICY = """\
slo: {ttft_p95_ms: 500, itl_p95_ms: 50}
windows:
  - {name: always, floor_bits: 3.0, ceiling_bits: 8.0}
signals:
  - {kind: queue_depth, reference: 4}
  - {kind: kv_usage, reference: 0.85}
  - {kind: ttft_p95}
"""


def drive(server):
    subprocess.run([server.bin / "mobi-load", "--server", server.data, "--rate", RATES,
                    "--prompt_tokens", "32:200", "--new_tokens", "100:300"], check=True)


def panel_of(title):
    for board in named_metrics.dashboards().values():
        for panel in board["panels"]:
            if panel["title"] == title:
                return panel
    raise KeyError(title)


def legend(target, metric):
    text = target["legendFormat"]
    for label, value in metric.items():
        text = text.replace("{{" + label + "}}", value)
    return text.replace(metric.get("instance", "\0"), "a")


def draw(axes, panel, prometheus, start, end):
    for target in panel["targets"]:
        expression = target["expr"]
        for variable in ("$namespace", "$job", "$instance"):
            expression = expression.replace(variable, ".*")
        expression = expression.replace("$__rate_interval", "5s")
        data = prometheus.api("query_range", query=expression, start=start, end=end, step=0.5)
        for series in data["result"]:
            points = [(float(t) - start, float(v)) for t, v in series["values"] if v != "NaN"]
            axes.plot(*zip(*points), label=legend(target, series["metric"]), linewidth=1)
    axes.set_title(panel["title"], fontsize=9)
    axes.legend(fontsize=7, loc="upper right")
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)


def main():
    WORK.mkdir(parents=True, exist_ok=True)
    policy = WORK / "policy.yaml"
    policy.write_text(POLICY)
    with Server(sys.argv[1], "--threads", "1", "--policy", policy, "--max_num_seqs", "8") as server:
        prometheus = Prometheus(WORK, f"http://127.0.0.1:{free_ports(1)[0]}", server.metrics)
        try:
            start = time.time()
            drive(server)
            figure, axes = plt.subplots(3, 2, figsize=(11, 8), sharex=True)
            for panel, place in zip(PANELS, axes.flat):
                draw(place, panel_of(panel), prometheus, start, time.time())
            for place in axes[-1]:
                place.set_xlabel("seconds", fontsize=7)
            figure.tight_layout()
            figure.savefig(sys.argv[3], dpi=90)
        finally:
            prometheus.stop()


main()
