#!/usr/bin/python3
"""Draws what fleet-simulation --csv PREFIX wrote: plot.py PREFIX OUT.png (python3-matplotlib)."""
import csv
import sys

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

figure, axes = plt.subplots(3, 1, figsize=(9, 7), sharex=True)
for run in ("replicas", "precision", "both"):
    with open(f"{sys.argv[1]}-{run}.csv") as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    seconds = [row["seconds"] for row in rows]
    axes[0].plot(seconds, [row["replicas"] for row in rows], label=run, linewidth=1)
    axes[1].plot(seconds, [row["bits"] for row in rows], label=run, linewidth=1)
    axes[2].plot(seconds, [row["waiting"] for row in rows], label=run, linewidth=1)
for place, title in zip(axes, ("replicas, starting ones too", "target bits, mean over replicas",
                               "requests waiting (log)")):
    place.set_title(title, fontsize=9)
    place.legend(fontsize=8)
    place.grid(alpha=0.3)
axes[2].set_yscale("symlog")
axes[2].set_xlabel("seconds")
figure.tight_layout()
figure.savefig(sys.argv[2], dpi=80)
