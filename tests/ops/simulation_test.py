#!/usr/bin/python3
"""fleet-simulation, with the surface and the policy that the guide names, on a load that grows beyond
what one replica carries and falls again: what the guide says of the three ways holds.

usage: simulation_test.py BIN_DIR WORK_DIR
"""
import datetime
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
WORK = pathlib.Path(sys.argv[2])
FOLDER = ROOT / "deploy" / "simulation"


def write_trace(path):
    """2.5 s between requests, from the 900th to the 1500th second 0.045, prompts of 1,000 tokens."""
    lines, second = ["TIMESTAMP,ContextTokens,GeneratedTokens"], 0.0
    while second < 2400:
        time = datetime.datetime(2026, 1, 1) + datetime.timedelta(seconds=second)
        lines.append(f"{time:%Y-%m-%d %H:%M:%S.%f}0,1000,200")
        second += 0.045 if 900 <= second < 1500 else 2.5
    path.write_text("\n".join(lines) + "\n")


def runs(trace):
    """{run: (replica-seconds, most replicas, first tokens in time %, later ones %, refused, bits)}"""
    surface, = FOLDER.glob("*.json")
    done = subprocess.run([sys.argv[1] + "/fleet-simulation", "--trace", trace, "--surface", surface,
                           "--policy", FOLDER / "policy.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    rows = (line.split() for line in done.stdout.splitlines()[2:])
    return {name: tuple(map(float, figures)) for name, *figures in rows}


def main():
    WORK.mkdir(parents=True, exist_ok=True)
    write_trace(WORK / "trace.csv")
    found = runs(WORK / "trace.csv")
    fixed, replicas, precision, both = (found[n] for n in ("fixed", "replicas", "precision", "both"))
    assert fixed[1] == precision[1] == 1 and replicas[1] > 1 and both[1] > 1, "who scales?"
    assert fixed[5] == replicas[5] == 8 and 4 <= precision[5] < both[5] < 8, "whose bits move?"
    assert fixed[2] < precision[2] < both[2], "precision bridges, and no more"
    assert both[2] >= replicas[2] and both[0] < replicas[0], "both is in time more often, for less"
    assert fixed[4] > 0 and both[4] <= replicas[4], "one replica at 8 bits cannot carry this"


main()
