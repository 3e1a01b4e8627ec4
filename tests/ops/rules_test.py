#!/usr/bin/python3
"""Rules, alerts and example policies: promtool accepts them, every alert fires in rules_test.yml and
stays silent in its healthy case, and the runbook says what to do about it.

usage: rules_test.py BIN_DIR WORK_DIR
"""
import pathlib
import re
import shutil
import subprocess
import sys

import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILES = ROOT / "helm" / "mobiserve" / "files"
BIN = pathlib.Path(sys.argv[1])


def check_policies():
    policies = sorted((ROOT / "deploy" / "policies").glob("*.yaml"))
    assert len(policies) >= 3
    for policy in policies:
        subprocess.run([BIN / "mobictl", "policy", "check", policy], check=True,
                       stdout=subprocess.DEVNULL)
    bad = subprocess.run([BIN / "mobictl", "policy", "check", "/dev/null"], capture_output=True)
    assert bad.returncode == 2, "an empty policy must be refused"
    print(f"{len(policies)} example policies are valid")


def check_alerts_are_tested_and_documented():
    rules = yaml.safe_load((FILES / "alerts.yml").read_text())
    alerts = [r for group in rules["groups"] for r in group["rules"]]
    tests = yaml.safe_load((ROOT / "tests" / "ops" / "rules_test.yml").read_text())["tests"]
    fired, silent = set(), set()
    for test in tests:
        for case in test.get("alert_rule_test", []):
            (fired if case["exp_alerts"] else silent).add(case["alertname"])
    runbook = (ROOT / "deploy" / "runbook.md").read_text()
    sections = set(re.findall(r"^## (\w+)$", runbook, re.M))
    names = {a["alert"] for a in alerts}
    assert len(names) == len(alerts), "an alert has two definitions"
    assert names == sections, f"alerts and runbook differ: {sorted(names ^ sections)}"
    assert names <= fired, f"never fire in a test: {sorted(names - fired)}"
    assert names <= silent, f"never silent in a test: {sorted(names - silent)}"
    for alert in alerts:
        anchor = f"deploy/runbook.md#{alert['alert'].lower()}"
        assert alert["annotations"]["runbook"] == anchor, alert["alert"]
        assert alert["labels"]["severity"] in {"critical", "warning", "info"}
    print(f"{len(names)} alerts fire, are silent and are documented")


def main():
    check_policies()
    check_alerts_are_tested_and_documented()
    if not shutil.which("promtool"):
        print("SKIPPED: promtool (package prometheus) is not installed")
        sys.exit(77)
    subprocess.run(["promtool", "check", "rules", *sorted(FILES.glob("*.yml"))], check=True)
    subprocess.run(["promtool", "check", "config", "--syntax-only",
                    ROOT / "deploy" / "prometheus" / "prometheus.yml"], check=True)
    subprocess.run(["promtool", "test", "rules", ROOT / "tests" / "ops" / "rules_test.yml"],
                   check=True)


main()
