#!/usr/bin/env python3
"""Replays one trace against servers that differ in their policy only, and compares them.

usage: trace_arms.py BIN_DIR MODEL_DIR TRACE_CSV [options]

Arms: static 8 bits, static 4 bits and elastic between floor and ceiling, all with every slice in
memory; elastic with slice residency; and elastic with the measured step-latency surface (when
--surface names a file, which `mobi-bench surface` writes first where there is none). Every arm gets
the same arrivals. The trace is cut into segments, and each segment is played to all arms, one after
another, before the next one, so that whatever else happens on the machine meets all of them. All
servers stay up meanwhile.

The load: the trace is compressed in time until its busiest minute asks for --peak-load times what
the server at 8 bits was just measured to serve of it.

--score N forces N recorded texts of every arm through the model again, at the bits of each request,
and adds perplexities.

Long replays in pieces: give --out a file and run again with another --begin-s (and --compression as
the first run printed it); requests add up in the file, and tables are of all of them. --segments 0
replays nothing, and tables are of what is there.
"""
import argparse
import collections
import csv
import json
import pathlib
import subprocess
import sys
import tempfile

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))
from server_process import Server  # noqa: E402

ALL_RESIDENT = "--noslice_residency"
CLASSES = "classes: {premium: {floor_bits: %g}, standard: {floor_bits: %g}}\n"


def static_policy(bits):
    return (CLASSES % (bits, bits) +
            f"windows: [{{name: static, floor_bits: {bits:g}, ceiling_bits: {bits:g}}}]\n")


def elastic_policy(args):
    signals = f"{{kind: queue_depth, reference: {args.queue_reference:g}}}"
    if args.wait_reference_ms:
        signals += f", {{kind: queue_wait, reference: {args.wait_reference_ms:g}}}"
    return (f"slo: {{ttft_p95_ms: {args.slo_ttft_ms:g}, itl_p95_ms: {args.slo_itl_ms:g}}}\n" +
            CLASSES % (args.floor, args.floor) +
            f"windows: [{{name: elastic, floor_bits: {args.floor:g}, ceiling_bits: 8}}]\n"
            f"signals: [{signals}]\n")


class Arm(Server):
    def __init__(self, args, folder, name, policy, *flags):
        self.name = name
        path = folder / f"{name.replace(' ', '-')}.yaml"
        path.write_text(policy)
        super().__init__(args.bin_dir, "--metrics_listen", "", "--policy", path, *flags,
                         *args.server_flag, model=args.model_dir)


def replay(args, server, begin, duration, compression, out=None):
    """One segment; its report, the CSV rows of its requests, and their recording."""
    command = [args.bin_dir / "mobi-load", "--server", server.data, "--admin", server.admin,
               "--json", "--trace", args.trace, "--trace_begin_s", f"{begin:.3f}",
               "--trace_duration_s", f"{duration:.3f}", "--time_compression", f"{compression:.4f}",
               "--token_scale", f"{args.token_scale:g}", "--slo_ttft_ms", f"{args.slo_ttft_ms:g}",
               "--slo_itl_ms", f"{args.slo_itl_ms:g}", "--seed", f"{int(begin) + 1}"]
    if args.prompts:
        command += ["--prompts", args.prompts]
    if args.shared_prefix_tokens:
        command += ["--shared_prefix_tokens", str(args.shared_prefix_tokens)]
    if out:
        recording = out.with_suffix(".jsonl")
        for path in (out, recording):
            path.unlink(missing_ok=True)
        command += ["--csv", out, "--record", recording]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode != 0:
        sys.exit(f"mobi-load: {done.stderr.strip()}")
    rows = list(csv.DictReader(out.open())) if out else []
    lines = recording.read_text() if out else ""
    return json.loads(done.stdout)["reports"][0], rows, lines


def busiest_minute(args):
    """Requests per second of trace time in the busiest minute of the part that is replayed."""
    counts = collections.Counter()
    with open(args.trace, newline="") as file:
        first = None
        for row in csv.DictReader(file):
            hour, minute, second = row["TIMESTAMP"].split()[-1].split(":")
            at = int(hour) * 3600 + int(minute) * 60 + float(second)
            first = at if first is None else first
            if args.begin_s <= at - first < args.begin_s + args.duration_s:
                counts[int((at - first) // 60)] += 1
    return max(counts.values()) / 60


def capacity(args, server):
    """Requests per second that the server completes of this trace when far too many come."""
    rates = []
    for i in range(3):
        report, _, _ = replay(args, server, args.begin_s + 60 * i, 6 * args.flood, args.flood)
        rates.append(report["completed_rps"])
    return sorted(rates)[1]


def percentile(values, q):
    values = sorted(values)
    return values[min(len(values) - 1, int(q * len(values)))] if values else 0.0


def summarise(name, arm):
    rows, loaded = arm["rows"], arm["loaded"]
    ok = [r for r in rows if r["status"] == "OK"]
    tokens = lambda r: int(r["prompt_tokens"]) - int(r["cached_tokens"]) + int(r["tokens"])
    total = sum(map(tokens, ok)) or 1
    return {
        "arm": name, "requests": len(rows), "refused": len(rows) - len(ok),
        "attainment": sum(r["met_slo"] == "1" for r in rows) / len(rows),
        "violations": sum(r["met_slo"] != "1" for r in rows),
        "mean_effective_bits": sum(float(r["effective_bits"]) * tokens(r) for r in ok) / total,
        "mean_loaded_bits": sum(loaded) / len(loaded) if loaded else None,
        "ttft_p50_ms": percentile([float(r["ttft_ms"]) for r in ok], 0.5),
        "ttft_p95_ms": percentile([float(r["ttft_ms"]) for r in ok], 0.95),
        "per_token_p95_ms": percentile([float(r["time_per_token_ms"]) for r in ok], 0.95),
        **{key: arm.get("score", {}).get(key) for key in ("text_perplexity", "served_perplexity")},
    }


def print_table(results):
    print("| arm | SLO attainment | violations | refused | effective bits | loaded bits | "
          "first token p50 / p95 ms | per token p95 ms | perplexity of the text | of what was "
          "served, at 8 bits |")
    print("| --- " * 10 + "|")
    for r in results:
        number = lambda key, form: "" if r.get(key) is None else format(r[key], form)
        print(f"| {r['arm']} | {100 * r['attainment']:.2f} % | {r['violations']} of "
              f"{r['requests']} | {r['refused']} | {r['mean_effective_bits']:.2f} | "
              f"{number('mean_loaded_bits', '.2f')} | "
              f"{r['ttft_p50_ms']:.0f} / {r['ttft_p95_ms']:.0f} | {r['per_token_p95_ms']:.1f} | "
              f"{number('text_perplexity', '.3f')} | {number('served_perplexity', '.3f')} |")


def print_comparison(results):
    by_name = {r["arm"]: r for r in results}
    eight, four = by_name["static 8"], by_name["static 4"]
    for r in results:
        if not r["arm"].startswith("elastic"):
            continue
        share = r["attainment"] / four["attainment"] if four["attainment"] else float("nan")
        removed = "static 8 had no violations"
        if eight["violations"]:
            part = lambda arm: f"{100 * (1 - arm['violations'] / eight['violations']):.0f} %"
            removed = f"{part(r)} of static 8's violations removed (static 4 removes {part(four)})"
        print(f"{r['arm']}: {share:.3f} of static 4's attainment at "
              f"{r['mean_effective_bits'] - four['mean_effective_bits']:+.2f} bits; {removed}")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bin_dir", type=pathlib.Path)
    parser.add_argument("model_dir")
    parser.add_argument("trace")
    parser.add_argument("--begin-s", type=float, default=0)
    parser.add_argument("--duration-s", type=float, default=3500, help="of the trace's time")
    parser.add_argument("--segments", type=int, default=5, help="0: replay nothing")
    parser.add_argument("--peak-load", type=float, default=1.1)
    parser.add_argument("--compression", type=float, default=0, help="instead of --peak-load")
    parser.add_argument("--flood", type=float, default=200, help="compression to find the capacity")
    parser.add_argument("--token-scale", type=float, default=0.06)
    parser.add_argument("--slo-ttft-ms", type=float, default=500)
    parser.add_argument("--slo-itl-ms", type=float, default=50)
    parser.add_argument("--floor", type=float, default=3)
    parser.add_argument("--queue-reference", type=float, default=8)
    parser.add_argument("--wait-reference-ms", type=float, default=0,
                        help="of queue_wait; 0: the server's own, a third of the first token's SLO")
    parser.add_argument("--surface", type=pathlib.Path, help="file of mobi-bench surface")
    parser.add_argument("--sequences", default="1,2,4,8", help="of a surface that is measured")
    parser.add_argument("--prompts", help="text file that prompts are cut from")
    parser.add_argument("--shared-prefix-tokens", type=int, default=0)
    parser.add_argument("--server-flag", action="append", default=[])
    parser.add_argument("--out", type=pathlib.Path,
                        help="file of requests and recordings; what is there is added to")
    parser.add_argument("--score", type=int, default=0, metavar="N",
                        help="then score N requests an arm")
    return parser.parse_args()


def elastic_flags(args):
    """The elastic arms by name: further flags of their servers."""
    arms = {"elastic": [ALL_RESIDENT], "elastic with residency": []}
    if args.surface:
        arms["elastic with surface"] = ["--surface", args.surface]
    return arms


def measure_surface(args):
    subprocess.run([args.bin_dir / "mobi-bench", "surface", "--model", args.model_dir, "--bits",
                    "2,3,4,6,8", "--sequences", args.sequences, "--context", "64", "--out",
                    args.surface], check=True, stdout=subprocess.DEVNULL)
    points = json.loads(args.surface.read_text())["points"]
    times = {(p["tokens"], p["bits"]): p["milliseconds"] for p in points}
    bits = sorted({b for _, b in times})
    print("| ms a step | " + " | ".join(f"{b:g} bits" for b in bits) + " |\n" +
          "| --- " * (1 + len(bits)) + "|")
    for tokens in sorted({t for t, _ in times}):
        print(f"| {tokens:g} sequences | " +
              " | ".join(f"{times[tokens, b]:.3f}" for b in bits) + " |", flush=True)


def find_compression(args, servers):
    rates = {s.name: capacity(args, s) for s in servers[:2]}
    print("capacity, requests/s:",
          ", ".join(f"{n} bits {r:.1f}" for n, r in rates.items()), flush=True)
    return args.peak_load * rates["static 8"] / busiest_minute(args)


def replay_segments(args, folder, results):
    servers = [Arm(args, folder, "static 8", static_policy(8), ALL_RESIDENT),
               Arm(args, folder, "static 4", static_policy(4), ALL_RESIDENT)]
    servers += [Arm(args, folder, name, elastic_policy(args), *flags)
                for name, flags in elastic_flags(args).items()]
    try:
        compression = args.compression or find_compression(args, servers)
        print(f"time compression {compression:.2f}: {args.duration_s / compression:.0f} s an arm, "
              f"in {args.segments} segments", flush=True)
        length = args.duration_s / args.segments
        for i in range(args.segments):
            for server in servers:
                report, rows, lines = replay(args, server, args.begin_s + i * length, length,
                                             compression, folder / "requests.csv")
                arm = results.setdefault(server.name, {"rows": [], "loaded": [], "recording": ""})
                arm["rows"] += rows
                arm["recording"] += lines
                if report["mean_loaded_bits"] is not None:
                    arm["loaded"].append(report["mean_loaded_bits"])
                print(f"segment {i + 1}, {server.name}: attainment "
                      f"{100 * report['slo_attainment']:.1f} %, effective bits "
                      f"{report['mean_effective_bits']:.2f}", file=sys.stderr, flush=True)
    finally:
        for server in servers:
            server.stop()


def score(args, folder, results):
    """Perplexities, by a server of its own: load plays no part in them."""
    with Server(args.bin_dir, "--metrics_listen", "", model=args.model_dir) as server:
        for name, arm in results.items():
            path = folder / "recording.jsonl"
            path.write_text(arm["recording"])
            done = subprocess.run(
                [args.bin_dir / "mobi-load", "--server", server.data, "--json", "--score", path,
                 "--score_requests", str(args.score)], capture_output=True, text=True,
                check=False)
            if done.returncode != 0:
                sys.exit(f"mobi-load: {done.stderr.strip()}")
            arm["score"] = json.loads(done.stdout)
            print(f"{name}: {arm['score']}", file=sys.stderr, flush=True)


def main():
    args = arguments()
    results = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    if args.surface and not args.surface.exists():
        measure_surface(args)
    with tempfile.TemporaryDirectory() as temporary:
        if args.segments:
            replay_segments(args, pathlib.Path(temporary), results)
        if args.out:  # before scoring, which may be stopped
            args.out.write_text(json.dumps(results))
        if args.score:
            score(args, pathlib.Path(temporary), results)
    if args.out:
        args.out.write_text(json.dumps(results))
    summaries = [summarise(name, arm) for name, arm in results.items()]
    print_table(summaries)
    print_comparison(summaries)


main()
