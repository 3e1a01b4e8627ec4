#!/usr/bin/python3
"""Dockerfile and docker-compose, as far as they can be checked without a container engine: what they
copy and mount is there, what they run exists, and the packages of the image are those of the build.

usage: image_test.py BIN_DIR WORK_DIR
"""
import pathlib
import re
import subprocess
import sys

import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
BIN = pathlib.Path(sys.argv[1])


def flags_of(program):
    text = subprocess.run([BIN / program, "--help"], capture_output=True, text=True,
                          check=True).stdout
    return set(re.findall(r"^  --(\w+)", text, re.M))


def flags_in(arguments):
    return {m.group(1) for a in arguments for m in [re.match(r"--(\w+)", a)] if m}


def stages(dockerfile):
    """{name: instructions}, with continued lines joined."""
    found, name = {}, None
    for line in re.sub(r"\\\n", " ", dockerfile).splitlines():
        if match := re.match(r"FROM \S+ AS (\S+)", line):
            name = match.group(1)
            found[name] = []
        elif name and line and not line.startswith("#"):
            found[name].append(line)
    return found


def check_dockerfile(found):
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines()
               if line.startswith("!")]
    for name, lines in found.items():
        for source in (m.group(1) for line in lines if (m := re.match(r"COPY (?!--from)(\S+)", line))):
            assert (ROOT / source).exists(), f"{name} copies {source}"
            assert any(source.rstrip("/") == a or source.startswith(a + "/") for a in allowed), \
                f".dockerignore leaves out {source}, which {name} copies"
        for other in re.findall(r"from=([\w-]+)", "\n".join(lines)):
            assert other in found, f"{name} copies from {other}"
    for name in ("cpu", "cuda", "front"):
        text = "\n".join(found[name])
        assert re.search(r"^USER 65532:65532$", text, re.M), f"{name} runs as root"
        assert "ENTRYPOINT" in text and "STOPSIGNAL" in text, name
    for name in ("cpu", "cuda"):
        text = "\n".join(found[name])
        for label in ("title", "description", "version", "revision", "base.name"):
            assert f"org.opencontainers.image.{label}=" in text, f"{name}: {label}"
        command = yaml.safe_load(re.search(r"^HEALTHCHECK .*CMD (\[.*\])$", text, re.M).group(1))
        assert command[:3] == ["mobictl", "health", "mobi.v1.Inference"]
        assert flags_in(command) <= flags_of("mobictl"), command
        assert all((BIN / p).exists() for p in ("mobi-server", "mobictl"))


def check_packages():
    """The image builds with packages that the project is built and tested with."""
    stage = re.sub(r"\\\n", " ", (ROOT / "deploy/image/stage.sh").read_text())
    image = set(re.search(r"build_packages\(\) \{\s+apt_install ([^\n]+)", stage).group(1).split())
    setup = (ROOT / "deploy/setup-debian.sh").read_text()
    known = set(re.search(r"packages=\((.*?)\)", setup, re.S).group(1).split())
    assert len(image) > 15 and image <= known, f"not in setup-debian.sh: {sorted(image - known)}"


def check_compose():
    deploy = ROOT / "deploy"
    services = yaml.safe_load((deploy / "docker-compose.yml").read_text())["services"]
    volumes = {"prometheus", "grafana"}
    mounted = 0
    for name, service in services.items():
        for volume in service["volumes"]:
            source = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", volume).split(":")[0]
            assert source in volumes or (deploy / source).exists(), f"{name} mounts {source}"
            mounted += 1
        target = service.get("build", {}).get("target")
        assert target is None or target in stages((ROOT / "Dockerfile").read_text())
    command = [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", c) for c in services["server"]["command"]]
    assert flags_in(command) <= flags_of("mobi-server"), command
    policy, = (c for c in command if c.startswith("--policy="))
    assert (deploy / "policies" / pathlib.Path(policy).name).exists()
    return mounted


def main():
    found = stages((ROOT / "Dockerfile").read_text())
    check_dockerfile(found)
    check_packages()
    subprocess.run(["bash", "-n", ROOT / "deploy/image/stage.sh"], check=True)
    print(f"{len(found)} stages and {check_compose()} mounts are consistent")


main()
