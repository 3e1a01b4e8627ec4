#!/usr/bin/python3
"""Draws panels of both dashboards over a load test, for the documentation: the real server under load
that rises and falls, with little KV memory, scraped by the real Prometheus, asked the dashboards' own
queries. Needs python3-matplotlib; run by hand.

usage: record_dashboards.py BIN_DIR WORK_DIR OUT_DIR     writes operator.png and service.png
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
RATES = "1:20,25:35,1:40"  # requests a second : seconds
FLAGS = ["--threads", "1", "--max_num_seqs", "8", "--kv_memory_mib", "8"]
PANELS = {
    "operator": ["Bits", "Decoded tokens by level", "Pressure by signal", "Bits deficit by replica",
                 "Time to first token", "Queue", "Slices in memory", "KV blocks"],
    "service": ["Requests by status", "Tokens", "Running and waiting", "Time to first token",
                "Inter-token latency", "In the queue", "Step time", "KV cache"],
}
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


def panel_of(board, title):
    panel, = (p for p in named_metrics.dashboards()[f"{board}.json"]["panels"]
              if p["title"] == title)
    return panel


def legend(target, metric):
    text = target["legendFormat"]
    for label, value in metric.items():
        text = text.replace("{{" + label + "}}", value)
    return text.replace(metric.get("instance", "\0"), "a")


def series_of(panel, prometheus, start, end):
    """{legend: {second: value}}"""
    found = {}
    for target in panel["targets"]:
        expression = target["expr"]
        for variable in ("$namespace", "$job", "$instance"):
            expression = expression.replace(variable, ".*")
        expression = expression.replace("$__rate_interval", "5s")
        data = prometheus.api("query_range", query=expression, start=start, end=end, step=0.5)
        for series in data["result"]:
            found[legend(target, series["metric"])] = {
                float(t) - start: float(v) for t, v in series["values"] if v != "NaN"}
    return found


def draw(axes, panel, found):
    field = panel["fieldConfig"]["defaults"]
    if field["custom"]["stacking"]["mode"] == "normal":
        times = sorted({t for values in found.values() for t in values})
        axes.stackplot(times, [[values.get(t, 0) for t in times] for values in found.values()],
                       labels=list(found))
    else:
        for label, values in found.items():
            axes.plot(list(values), list(values.values()), label=label, linewidth=1)
    unit = {"s": ", seconds", "percentunit": ", 1 is all"}.get(field["unit"], "")
    axes.set_title(panel["title"] + unit, fontsize=9)
    axes.legend(fontsize=7, loc="best", framealpha=0.6)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)


def picture(board, prometheus, start, end, path):
    figure, axes = plt.subplots(4, 2, figsize=(11, 10), sharex=True)
    for title, place in zip(PANELS[board], axes.flat):
        panel = panel_of(board, title)
        draw(place, panel, series_of(panel, prometheus, start, end))
    for place in axes[-1]:
        place.set_xlabel("seconds", fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main():
    WORK.mkdir(parents=True, exist_ok=True)
    policy = WORK / "policy.yaml"
    policy.write_text(POLICY)
    with Server(sys.argv[1], "--policy", policy, *FLAGS) as server:
        prometheus = Prometheus(WORK, f"http://127.0.0.1:{free_ports(1)[0]}", server.metrics)
        try:
            start = time.time()
            drive(server)
            for board in PANELS:
                picture(board, prometheus, start, time.time(),
                        pathlib.Path(sys.argv[3]) / f"{board}.png")
        finally:
            prometheus.stop()


main()
