#!/usr/bin/env python3
"""Writes the tables of figures in README.md from the recorded results, so that no figure there has
been copied by hand. Each stands between a line `<!-- NAME -->` and a line `<!-- end -->`.

usage: readme_tables.py [--check]   --check: exit 1 if README.md says anything else
"""
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tests/bench/results"
README = ROOT / "README.md"


def fail(message):
    sys.exit(f"readme_tables: {message}")


def markdown_table(name, *headings):
    """The rows of the first Markdown table of a result whose header has the headings, as dicts."""
    cells = lambda line: [cell.strip() for cell in line.strip().strip("|").split("|")]
    lines = (RESULTS / name).read_text().splitlines()
    for at, line in enumerate(lines):
        header = cells(line) if line.startswith("|") else []
        if not set(headings) <= set(header):
            continue
        rows = []
        for row in lines[at + 2:]:
            if not row.startswith("|"):
                break
            rows.append(dict(zip(header, cells(row))))
        return rows
    fail(f"{name} has no table with {headings}")


def render(header, rows):
    line = lambda cells: "| " + " | ".join(cells) + " |"
    return [line(header), line(["---"] * len(header))] + [line(row) for row in rows]


def perplexity():
    rows = markdown_table("wiki-llama-perplexity.md", "target bits", "perplexity", "beside float")
    columns = {"MoBiServe, one checkpoint": "perplexity", "beside float": "beside float",
               "GPTQ with clip search, one checkpoint a width": "GPTQ",
               "round-to-nearest, one checkpoint a width": "RTN"}
    return render(["average bits"] + [r["target bits"] for r in rows],
                  [[title] + [r[column] for r in rows] for title, column in columns.items()])


def gpu_step():
    rows = markdown_table("decode-step_h200_2026-12-01_pinned.md", "bits", "after, ms", "floor, ms")
    return render(["bits", "sequences", "ms", "times the floor of its bytes",
                   "ms with `--whole_level_decodes`"],
                  [[r["bits"], r["sequences"], r["after, ms"], r["after / floor"],
                    r["at whole levels, ms"]] for r in rows
                   if r["sequences"] in ("1", "4", "16", "64")])


def gpu_prompt():
    rows = markdown_table("prompt-step_h200_2026-11-30.md", "tokens", "bits", "after, ms")
    return render(["tokens", "bits", "ms", "tokens a second"],
                  [[r["tokens"], r["bits"], r["after, ms"], r["tokens a second"]] for r in rows])


def cpu_step():
    rows = markdown_table("cpu-decode_2026-11-29.md", "round", "2 bits", "4 bits", "8 bits")
    kept = [["MoBiServe, round " + r["round"] if r[""] == "after" else r[""], r["2 bits"],
             r["4 bits"], r["8 bits"]] for r in rows if r[""] != "before"]
    return render(["ms", "2 bits", "4 bits", "8 bits"], kept)


TABLES = {"perplexity": perplexity, "gpu step": gpu_step, "gpu prompt": gpu_prompt,
          "cpu step": cpu_step}


def main():
    old = README.read_text()
    new = old
    for name, rows in TABLES.items():
        begin, end = f"<!-- {name} -->\n", "<!-- end -->"
        if new.count(begin) != 1:
            fail(f"README.md needs one line {begin.strip()}")
        head, rest = new.split(begin)
        if end not in rest:
            fail(f"README.md has no {end} after {begin.strip()}")
        new = head + begin + "\n".join(rows()) + "\n" + rest[rest.index(end):]
    if "--check" in sys.argv[1:]:
        if new != old:
            fail("README.md differs from the results; run tests/bench/readme_tables.py")
        return
    README.write_text(new)


main()
