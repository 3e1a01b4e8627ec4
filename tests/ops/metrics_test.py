#!/usr/bin/python3
"""Every metric that a dashboard, rule, autoscaler or document names is emitted by the real server
under load, with the type that the expression needs; and every metric that is emitted is asked for by a
dashboard or rule.

usage: metrics_test.py BIN_DIR WORK_DIR
"""
import collections
import pathlib
import re
import subprocess
import sys

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))
import named_metrics  # noqa: E402
from server_process import Server, free_ports, write_policy  # noqa: E402


def types_of(exposition):
    return dict(re.findall(r"^# TYPE (\S+) (\S+)$", exposition, re.M))


def names_of(exposition):
    return set(re.findall(r"^([a-z][\w:]*)(?:\{| )", exposition, re.M))


def drive_load(server):
    """A few streams at once, one of each end."""
    streams = [subprocess.Popen(server.ctl("generate", f"Once upon {i}", "--max_new_tokens", "40",
                                           *flags), stdout=subprocess.DEVNULL,
                                stderr=subprocess.DEVNULL)
               for i, flags in enumerate([(), ("--ignore_eos",), ("--n", "3"), ("--stop", "the")])]
    for stream in streams:
        assert stream.wait(60) == 0


def failures_of(uses, types, names):
    """{what is wrong: the places that it is wrong in}"""
    failures = collections.defaultdict(set)
    for where, name, kind in uses:
        if name not in types:
            failures[f"{name} is not emitted"].add(where)
        elif kind is not None and types[name] != kind:
            failures[f"{name} is a {types[name]}, used as a {kind}"].add(where)
        elif types[name] == "counter" and not name.endswith("_total"):
            failures[f"{name} is a counter without _total"].add(where)
        elif types[name] != "histogram" and name not in names:
            failures[f"{name} has no series"].add(where)
    asked = {name for _, name, kind in uses if kind is not None}
    for name in types.keys() - asked:
        if name.startswith(("mobi_", "vllm:")):
            failures[f"{name} is asked for by no dashboard or rule"].add("server/metrics.cc")
    return failures


def main():
    policy = write_policy(pathlib.Path(sys.argv[2]) / "policy.yaml")
    nobody, = free_ports(1)  # the signal asked of Prometheus stays without an answer
    with Server(sys.argv[1], "--threads", "1", "--policy", policy, "--prometheus_url",
                f"http://127.0.0.1:{nobody}") as server:
        drive_load(server)
        exposition = server.scrape()
    uses = list(named_metrics.uses())
    assert len(uses) > 100, "the search for names finds too little"
    types = types_of(exposition)
    failures = failures_of(uses, types, names_of(exposition))
    for failure, places in sorted(failures.items()):
        print(f"{failure}: {'; '.join(sorted(places))}")
    print(f"{len({name for _, name, _ in uses})} metrics named in {len(uses)} places, "
          f"{len(types)} emitted")
    sys.exit(1 if failures else 0)


main()
