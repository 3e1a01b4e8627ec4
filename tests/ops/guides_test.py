#!/usr/bin/python3
"""The guides are true to what they speak of: links lead somewhere, the flags of commands are the
programs' own, and values of the chart exist.

usage: guides_test.py BIN_DIR WORK_DIR
"""
import pathlib
import re
import subprocess
import sys

import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
BIN = pathlib.Path(sys.argv[1])
GUIDES = [ROOT / "README.md", *sorted((ROOT / "deploy").rglob("*.md")),
          ROOT / "helm/mobiserve/README.md"]
# Their commands are those of the commit that was measured.
RECORDS = sorted((ROOT / "tests/bench/results").glob("*.md"))
PROGRAM = r"mobi-[a-z]+|mobictl|fleet-simulation"
# Flags in the guides' text that are those of other programs.
OTHERS = {"build-arg", "help", "isolation", "set", "set-file", "strict", "target"}
FILE_ENDINGS = {"crt", "json", "key", "yaml", "yml"}


def flags_by_program():
    found = {}
    for program in (p for p in BIN.iterdir() if re.fullmatch(PROGRAM, p.name)):
        text = subprocess.run([program, "--help"], capture_output=True, text=True).stdout
        found[program.name] = set(re.findall(r"^  --(\w+)", text, re.M))
        assert found[program.name], f"{program.name} --help names no flag"
    return found


def anchors_of(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        file, _, anchor = link.partition("#")
        if re.match(r"\w+:", link):
            continue
        target = (path.parent / file).resolve() if file else path
        if not target.exists():
            yield f"leads nowhere: {link}"
        elif anchor and anchor not in anchors_of(target):
            yield f"has no such section: {link}"


def commands_of(text):
    """(program, its arguments) in shell blocks; what `docker run` gives an image is the server's."""
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S):
        for line in re.sub(r"\\\n", " ", block).splitlines():
            line = re.sub(r"^docker run .* mobiserve:\w+ ", "mobi-server ", line)
            if match := re.match(rf"(?:[\w./]*/)?({PROGRAM})\s(.*)", line):
                yield match.groups()


def flags_in(text):
    return re.findall(r"(?:^|\s)--([a-z][\w-]*)", text)


def is_known(flag, known):
    name = flag.replace("-", "_")
    return bool({flag, name, name.removeprefix("no")} & known)


def unknown_flags(path, programs):
    text = path.read_text()
    for program, arguments in commands_of(text):
        yield from (f"{program} has no --{flag}" for flag in flags_in(arguments)
                    if not is_known(flag, programs[program]))
    every = set().union(*programs.values()) | OTHERS
    for quoted in re.findall(r"`([^`\n]+)`", text):
        yield from (f"nothing has --{flag}" for flag in flags_in(quoted) if not is_known(flag, every))


def has_value(values, path):
    for key in path.split("."):
        if not isinstance(values, dict) or key not in values:
            return False
        values = values[key]
    return True


def unknown_values(path):
    """Dotted names that begin with a value of the chart, and what --set sets."""
    values = yaml.safe_load((ROOT / "helm/mobiserve/values.yaml").read_text())
    for quoted in re.findall(r"`([^`\n]+)`", path.read_text()):
        for name in re.findall(r"^([a-z]\w*(?:\.\w+)+)$", quoted):
            first, *_, last = name.split(".")
            if first in values and last not in FILE_ENDINGS and not has_value(values, name):
                yield f"the chart has no {name}"
    for name in re.findall(r"--set(?:-file)? ([\w.]+)=", path.read_text()):
        if not has_value(values, name):
            yield f"the chart has no {name}"


def main():
    programs = flags_by_program()
    failures = {f"{path.relative_to(ROOT)}: {what}" for path in GUIDES
                for check in (unknown_flags(path, programs), unknown_values(path))
                for what in check}
    failures |= {f"{path.relative_to(ROOT)}: {what}" for path in GUIDES + RECORDS
                 for what in broken_links(path)}
    for failure in sorted(failures):
        print(failure)
    commands = sum(len(list(commands_of(path.read_text()))) for path in GUIDES)
    assert commands > 10 and len(programs) > 5, "the search for commands finds too little"
    print(f"{len(GUIDES)} guides with {commands} commands of {len(programs)} programs: "
          f"{len(failures)} faults")
    sys.exit(1 if failures else 0)


main()
