"""Every place of the project that names a metric: dashboards, rules, the chart's autoscaling, docs."""
import json
import pathlib
import re

import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILES = ROOT / "helm" / "mobiserve" / "files"
METRIC = re.compile(r"(?<![\w:.-])(vllm:[a-z0-9_]+|mobi_[a-z0-9_]+|mobi:[a-z0-9_:]+)(?![\w:(=-])")
# Underscored names in the documents that are no metrics.
NO_METRICS = {"mobi_server", "mobi_server_main"}
SAMPLE = re.compile(r"_(bucket|sum|count)$")
WINDOW = re.compile(r"(\w+)\($")
OF_COUNTERS = {"rate", "increase", "irate"}


def dashboards():
    return {path.name: json.loads(path.read_text())
            for path in sorted((FILES / "dashboards").glob("*.json"))}


def dashboard_queries():
    """(where, expression) of panels, annotations and variables."""
    for name, board in dashboards().items():
        for panel in board["panels"]:
            for target in panel.get("targets", []):
                yield f"{name}: {panel['title']}", target["expr"]
        for annotation in board["annotations"]["list"]:
            yield f"{name}: annotation {annotation['name']}", annotation["expr"]


def variable_queries():
    for name, board in dashboards().items():
        for variable in board["templating"]["list"]:
            if variable["type"] == "query":
                yield f"{name}: variable {variable['name']}", variable["query"]["query"]


def rules():
    for path in sorted(FILES.glob("*s.yml")):
        for group in yaml.safe_load(path.read_text())["groups"]:
            for rule in group["rules"]:
                yield rule


def rule_queries():
    for rule in rules():
        yield f"rule {rule.get('record') or rule['alert']}", rule["expr"]


def autoscaling_queries():
    """The ScaledObject's, with the series that they select by left out."""
    text = (ROOT / "helm/mobiserve/templates/autoscaling.yaml").read_text()
    for query in re.findall(r"query: '(.*)'", text):
        yield "ScaledObject", re.sub(r"\{ *\{\{- \$series -\}\} *\}", "{}", query)
    for metric in yaml.safe_load((ROOT / "helm/mobiserve/values.yaml").read_text())[
            "autoscaling"]["hpa"]["metrics"]:
        yield "HorizontalPodAutoscaler", metric["pods"]["metric"]["name"]


def document_names():
    """Metrics that documents name in `backquotes`."""
    for path in [ROOT / "README.md", *sorted((ROOT / "deploy").rglob("*.md")),
                 ROOT / "helm/mobiserve/README.md"]:
        for quoted in re.findall(r"`([^`\n]+)`", path.read_text()):
            for name in METRIC.findall(quoted):
                if name not in NO_METRICS:
                    yield str(path.relative_to(ROOT)), name


def uses():
    """(where, metric, type or None): the type that the expression needs."""
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    queries = [*dashboard_queries(), *variable_queries(), *rule_queries(), *autoscaling_queries()]
    for where, expression in queries:
        for match in METRIC.finditer(expression):
            name = match.group(1)
            if name in recorded:
                continue
            if SAMPLE.search(name) and not name.endswith("_sum_total"):
                yield where, SAMPLE.sub("", name), "histogram"
                continue
            function = WINDOW.search(expression[:match.start()])
            counted = function is not None and function.group(1) in OF_COUNTERS
            yield where, name, "counter" if counted else "gauge"
    for where, name in document_names():
        if name not in recorded:
            yield where, SAMPLE.sub("", name), None
