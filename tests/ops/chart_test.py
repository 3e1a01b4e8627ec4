#!/usr/bin/python3
"""The Helm chart, rendered for many values: valid for several Kubernetes versions, consistent in
itself, and true to the programs (flags, policy). Bad values are refused.

usage: chart_test.py BIN_DIR WORK_DIR
Renders with helm where it is installed, otherwise with render_chart.go, and with both where both
are there, which must agree. Exits with 77 (skipped) without either.
"""
import copy
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "mobiserve"
BIN, WORK = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
VERSIONS = ["1.29.0", "1.31.0", "1.33.0", "1.35.0"]
IMAGE_VOLUMES_SINCE = "1.31.0"

ALL_ON = {
    "policy": {"enabled": True},
    "autoscaling": {"keda": {"enabled": True, "authenticationRef": "prometheus"}},
    "inferencePool": {"enabled": True, "endpointPicker": {"name": "picker"}},
    "networkPolicy": {"dataFrom": [{"namespaceSelector": {"matchLabels": {"team": "apps"}}}],
                      "metricsFrom": [{"podSelector": {}}],
                      "extraEgress": [{"ports": [{"port": 9090, "protocol": "TCP"}]}]},
    "metrics": {"serviceMonitor": {"enabled": True, "labels": {"release": "kps"}},
                "prometheusRule": {"enabled": True},
                "dashboards": {"enabled": True, "annotations": {"folder": "MoBiServe"}}},
    "prometheusUrl": "http://prometheus:9090",
    "commonLabels": {"team": "inference"}, "podLabels": {"a": "b"}, "podAnnotations": {"c": "d"},
    "imagePullSecrets": [{"name": "registry"}], "priorityClassName": "high",
    "runtimeClassName": "nvidia", "nodeSelector": {"disk": "ssd"},
    "env": [{"name": "TZ", "value": "UTC"}], "extraArgs": ["--threads=2"],
    "affinity": {"nodeAffinity": {}}, "service": {"annotations": {"x": "y"}},
    "serviceAccount": {"annotations": {"iam": "role"}},
}
TLS = {"secretName": "tls"}
NOTHING_ON = {
    "policy": {"enabled": False}, "headlessService": {"enabled": False},
    "serviceAccount": {"create": False}, "podDisruptionBudget": {"enabled": False},
    "networkPolicy": {"enabled": False}, "topologySpread": {"enabled": False},
    "service": {"appProtocol": ""},
}
MATRIX = {  # name: (values file or none, values)
    "default": (None, {}),
    "cpu": ("values-cpu.yaml", {}),
    "gpu": ("values-gpu.yaml", {"flags": {"max_waiting_tokens": 2000000, "target_bits": 4.5}}),
    "all-on": (None, ALL_ON),
    "nothing-on": (None, NOTHING_ON),
    "hpa": (None, {"autoscaling": {"hpa": {"enabled": True}}}),
    "image-volume": (None, {"checkpoint": {"source": "image", "path": "llama",
                                           "image": {"reference": "registry/llama:1"}}}),
    "init-container": (None, {"checkpoint": {"source": "init", "init": {
        "image": "amazon/aws-cli:2", "args": ["s3", "sync", "s3://models/llama", "/checkpoint"],
        "envFrom": [{"secretRef": {"name": "aws"}}], "resources": {"limits": {"memory": "1Gi"}}}}}),
    "tls": (None, {"tls": TLS}),
    "mtls": (None, {"tls": {**TLS, "clientCaKey": "ca.crt", "probe": {"serverName": "mobi"}},
                    "tokens": {"secretName": "tokens"}}),
    "tokens": (None, {"tokens": {"secretName": "tokens"}, "env": [{"name": "TZ", "value": "UTC"}],
                      "tls": TLS, "test": {"tokenSecretName": "token"}}),
    "front": (None, {"front": {"enabled": True}}),
    "front-tls": (None, {"front": {"enabled": True}, "tls": {**TLS, "clientCaKey": "ca.crt"},
                         "inferencePool": {"enabled": True, "endpointPicker": {"name": "p"}}}),
    "own-policy": (None, {"policy": {"existingConfigMap": "mine"},
                          "fullnameOverride": "x" * 70, "image": {"digest": "sha256:" + "0" * 64}}),
}
REFUSED = [  # values, and what the message must name
    ({"autoscaling": {"keda": {"enabled": True}, "hpa": {"enabled": True}}}, "exclude each other"),
    ({"replica": 2}, "replica"),
    ({"flags": {"model": "/x"}}, "model"),
    ({"flags": {"Max-Seqs": 1}}, "Max-Seqs"),
    ({"ports": {"data": 70000}}, "70000"),
    ({"checkpoint": {"source": "pvc"}}, "claimName"),
    ({"checkpoint": {"source": "s3"}}, "s3"),
    ({"checkpoint": {"path": "../etc"}}, "path"),
    ({"image": {"digest": "latest"}}, "digest"),
    ({"autoscaling": {"keda": {"bitsDeficit": 2}}}, "bitsDeficit"),
    ({"shutdown": {"graceSeconds": 30}}, "graceSeconds"),
    ({"autoscaling": {"minReplicas": 9}}, "minReplicas"),
    ({"strategy": {"maxSurge": 0}}, "maxSurge"),
    ({"inferencePool": {"enabled": True}}, "endpointPicker"),
    ({"policy": {"document": ""}}, "policy.document"),
]
# Of custom resources no schema is at hand: the fields that their definitions require.
CUSTOM = {
    "ScaledObject": ("keda.sh/v1alpha1", ["scaleTargetRef", "triggers"]),
    "ServiceMonitor": ("monitoring.coreos.com/v1", ["selector", "endpoints"]),
    "PrometheusRule": ("monitoring.coreos.com/v1", ["groups"]),
    "InferencePool": ("inference.networking.k8s.io/v1",
                      ["selector", "targetPorts", "endpointPickerRef"]),
}


def merged(base, over):
    result = copy.deepcopy(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            value = merged(result[key], value)
        result[key] = value
    return result


def values_of(values_file, over):
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    if values_file:
        values = merged(values, yaml.safe_load((CHART / values_file).read_text()))
    return merged(values, over)


class RenderError(Exception):
    pass


class GoRenderer:
    def __init__(self):
        self.program = WORK / "render_chart"
        environment = dict(os.environ, GO111MODULE="off", GOPATH="/usr/share/gocode", GOFLAGS="",
                           GOCACHE=str(WORK / "go-cache"))
        subprocess.run(["go", "build", "-o", self.program,
                        ROOT / "tests" / "ops" / "render_chart.go"], check=True, env=environment)

    def render(self, values):
        request = {"chart": str(CHART), "values": values, "kube_version": "v1.35.0",
                   "release": {"Name": "demo", "Namespace": "serving"}}
        done = subprocess.run([self.program], input=json.dumps(request), capture_output=True,
                              text=True)
        if done.returncode != 0:
            raise RenderError(done.stderr)
        return json.loads(done.stdout)


class Helm:
    def render(self, values):
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(values, file)
            file.flush()
            done = subprocess.run(
                ["helm", "template", "demo", CHART, "--namespace", "serving", "-f", file.name],
                capture_output=True, text=True)
        if done.returncode != 0:
            raise RenderError(done.stderr)
        return {"helm": done.stdout}


def renderers():
    found = []
    if shutil.which("helm"):
        found.append(Helm())
    packages = pathlib.Path("/usr/share/gocode/src")
    if shutil.which("go") and (packages / "github.com/Masterminds/sprig").exists() \
            and (packages / "sigs.k8s.io/yaml").exists():
        found.append(GoRenderer())
    return found


def documents(rendered):
    found = []
    for path, text in rendered.items():
        if path.endswith("NOTES.txt"):
            continue
        for document in yaml.safe_load_all(text):
            if document:
                found.append(document)
    return sorted(found, key=lambda d: (d["kind"], d["metadata"]["name"]))


class Validator:
    """kubernetes-validate and jsonschema, from PyPI into a virtual environment of the test's own."""

    SCRIPT = r'''
import json, sys
import jsonschema, kubernetes_validate
request = json.load(sys.stdin)
errors = []
for document, versions in request["documents"]:
    for version in versions:
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            errors.append(f"{document['kind']} {document['metadata']['name']} in {version}: {error}")
validator = jsonschema.Draft7Validator(request["schema"])
verdicts = [[f"{e.json_path}: {e.message}" for e in validator.iter_errors(v)]
            for v in request["values"]]
json.dump({"errors": errors, "verdicts": verdicts}, sys.stdout)
'''

    def __init__(self):
        self.python = WORK / "venv" / "bin" / "python"
        done = WORK / "venv" / "complete"
        if done.exists():
            return
        subprocess.run([sys.executable, "-m", "venv", WORK / "venv"], check=True)
        subprocess.run([self.python, "-m", "pip", "install", "-q", "kubernetes-validate==1.37.0",
                        "jsonschema"], check=True, timeout=120)
        done.touch()

    def validate(self, documents_and_versions, values):
        schema = json.loads((CHART / "values.schema.json").read_text())
        request = {"documents": documents_and_versions, "schema": schema, "values": values}
        done = subprocess.run([self.python, "-c", self.SCRIPT], input=json.dumps(request),
                              capture_output=True, text=True, check=True)
        return json.loads(done.stdout)


def make_validator():
    try:
        return Validator()
    except (subprocess.SubprocessError, OSError) as error:
        print(f"NOT VALIDATED against Kubernetes schemas: no virtual environment ({error})")
        return None


def flags_of(program):
    text = subprocess.run([BIN / program, "--help"], capture_output=True, text=True,
                          check=True).stdout
    return set(re.findall(r"^  --(\w+)", text, re.M))


def flags_in(arguments):
    return {re.match(r"--(\w+)", a).group(1) for a in arguments if a.startswith("--")}


def of_kind(found, kind):
    return [d for d in found if d["kind"] == kind]


def check_references(found):
    """Whatever one object says about another is so."""
    deployment, = of_kind(found, "Deployment")
    pod = deployment["spec"]["template"]
    labels = pod["metadata"]["labels"]
    containers = pod["spec"]["containers"] + pod["spec"].get("initContainers", [])
    ports = {p["name"] for c in containers for p in c.get("ports", [])}
    volumes = {v["name"]: v for v in pod["spec"]["volumes"]}
    for container in containers:
        for mount in container.get("volumeMounts", []):
            assert mount["name"] in volumes, f"{container['name']} mounts {mount['name']}"
            assert "subPath" not in mount, "a subPath does not follow its ConfigMap"
        security = container["securityContext"]
        assert security["runAsNonRoot"] and security["readOnlyRootFilesystem"]
        assert security["capabilities"] == {"drop": ["ALL"]}
    assert pod["spec"]["automountServiceAccountToken"] is False

    def selects(selector):
        return selector.items() <= labels.items()

    assert selects(deployment["spec"]["selector"]["matchLabels"])
    for service in of_kind(found, "Service"):
        assert selects(service["spec"]["selector"]), service["metadata"]["name"]
        for port in service["spec"]["ports"]:
            assert port["targetPort"] in ports, f"{service['metadata']['name']}: {port}"
    for kind, path in (("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector"),
                       ("InferencePool", "selector")):
        for document in of_kind(found, kind):
            assert selects(document["spec"][path]["matchLabels"]), kind
    for policy in of_kind(found, "NetworkPolicy"):
        for rule in policy["spec"]["ingress"]:
            assert {p["port"] for p in rule["ports"]} <= ports
    for test in of_kind(found, "Pod"):
        assert not selects({**labels, **test["metadata"]["labels"]}), "services select the test pod"
    maps = {d["metadata"]["name"] for d in of_kind(found, "ConfigMap")} | {"mine"}
    for volume in volumes.values():
        if "configMap" in volume:
            assert volume["configMap"]["name"] in maps, volume
    for monitor in of_kind(found, "ServiceMonitor"):
        wanted = monitor["spec"]["selector"]["matchLabels"]
        chosen = [s for s in of_kind(found, "Service")
                  if wanted.items() <= s["metadata"]["labels"].items()]
        assert len(chosen) == 1, "one service is scraped, so that no series comes twice"
        assert chosen[0]["spec"]["ports"][0]["name"] == monitor["spec"]["endpoints"][0]["port"]
        assert chosen[0]["metadata"]["labels"][monitor["spec"]["jobLabel"]] == "demo"
    scalers = of_kind(found, "ScaledObject") + of_kind(found, "HorizontalPodAutoscaler")
    assert len(scalers) == ("replicas" not in deployment["spec"]), "who sets the replicas?"
    for scaler in scalers:
        assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]


def check_names(found):
    names = [(d["kind"], d["metadata"]["name"]) for d in found]
    assert len(set(names)) == len(names), "two objects of one name"
    for kind, name in names:
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", name), f"{kind} {name}"
    for document in found:
        if document["kind"] in CUSTOM:
            version, fields = CUSTOM[document["kind"]]
            assert document["apiVersion"] == version
            assert set(fields) <= document["spec"].keys()


def check_programs(found, known):
    """What the pods run exists."""
    deployment, = of_kind(found, "Deployment")
    server = next(c for c in deployment["spec"]["template"]["spec"]["containers"]
                  if c["name"] == "server")
    unknown = flags_in(server["args"]) - known["mobi-server"]
    commands = [server[p]["exec"]["command"] for p in ("startupProbe", "readinessProbe",
                                                       "livenessProbe") if "exec" in server[p]]
    commands += [c["command"] + c["args"] for p in of_kind(found, "Pod")
                 for c in p["spec"]["containers"]]
    for command in commands:
        assert command[0] == "mobictl"
        unknown |= flags_in(command) - known["mobictl"]
    environment = [e["name"] for c in [server] + [c for p in of_kind(found, "Pod")
                                                  for c in p["spec"]["containers"]]
                   for e in c.get("env", [])]
    unknown |= {name.removeprefix("MOBICTL_").lower() for name in environment
                if name.startswith("MOBICTL_")} - known["mobictl"]
    assert not unknown, f"the programs have no flags {sorted(unknown)}"
    for config in of_kind(found, "ConfigMap"):
        if "policy.yaml" in config["data"]:
            path = WORK / "policy.yaml"
            path.write_text(config["data"]["policy.yaml"])
            subprocess.run([BIN / "mobictl", "policy", "check", path], check=True,
                           stdout=subprocess.DEVNULL)
        for name, text in config["data"].items():
            if name.endswith(".json"):
                json.loads(text)


def check_image_volume(found):
    deployment, = of_kind(found, "Deployment")
    return any("image" in v for v in deployment["spec"]["template"]["spec"]["volumes"])


def check_matrix(tools, known):
    """Renders everything; returns distinct documents and the versions that they are for."""
    distinct = {}
    for name, (values_file, over) in MATRIX.items():
        values = values_of(values_file, over)
        try:
            outputs = [documents(tool.render(values)) for tool in tools]
        except RenderError as error:
            raise AssertionError(f"{name}: {error}") from error
        for output in outputs[1:]:
            assert output == outputs[0], f"{name}: helm and render_chart.go differ"
        found = outputs[0]
        try:
            check_names(found)
            check_references(found)
            check_programs(found, known)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        recent = check_image_volume(found)
        for document in found:
            if document["kind"] in CUSTOM:
                continue
            versions = [v for v in VERSIONS
                        if not (recent and document["kind"] == "Deployment")
                        or v >= IMAGE_VOLUMES_SINCE]
            distinct[json.dumps(document, sort_keys=True)] = (document, versions)
        print(f"{name}: {len(found)} objects")
    return list(distinct.values())


def check_refused(tools, verdicts):
    """By the schema, which helm applies by itself, or by the templates."""
    for (over, word), verdict in zip(REFUSED, verdicts):
        message = "\n".join(verdict)
        if not verdict:
            try:
                tools[-1].render(values_of(None, over))
                raise AssertionError(f"{over} is not refused")
            except RenderError as error:
                message = str(error)
        assert word in message, f"{over}: {message!r} does not name {word}"


def main():
    WORK.mkdir(parents=True, exist_ok=True)
    tools = renderers()
    if not tools:
        print("SKIPPED: neither helm nor Go with sprig and yaml (golang-go, "
              "golang-github-masterminds-sprig-dev, golang-k8s-sigs-yaml-dev) is installed")
        sys.exit(77)
    print("rendering with", " and ".join(type(t).__name__ for t in tools))
    known = {program: flags_of(program) for program in ("mobi-server", "mobictl")}
    found = check_matrix(tools, known)
    validator = make_validator()
    if validator is None:
        return
    good = [values_of(*case) for case in MATRIX.values()]
    answer = validator.validate(found, good + [values_of(None, over) for over, _ in REFUSED])
    assert not answer["errors"], "\n".join(answer["errors"])
    for name, verdict in zip(MATRIX, answer["verdicts"]):
        assert not verdict, f"{name}: the schema refuses {verdict}"
    check_refused(tools, answer["verdicts"][len(good):])
    print(f"{len(found)} distinct objects are valid in Kubernetes {', '.join(VERSIONS)}; "
          f"{len(REFUSED)} bad values are refused")


main()
