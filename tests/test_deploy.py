"""deploy/: manifests that Kubernetes takes, scripts that shellcheck does, and options that the command has."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmdistill.service.serve import check, parsed
from llmdistill.wire import protocol

DEPLOY = Path(__file__).parents[1] / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
CHECKERS = Path(sys.prefix) / "ray"  # where `make test` puts what only these tests need
KUBERNETES = "1.34"


def objects(file: Path) -> dict[str, dict[str, Any]]:
    return {one["kind"]: one for one in yaml.safe_load_all(file.read_text())}


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.stem)
def test_kubernetes_takes_the_manifests(file: Path) -> None:
    if importlib.util.find_spec("kubernetes_validate") is None and not (CHECKERS / "kubernetes_validate").is_dir():
        pytest.skip("no kubernetes-validate here: make test installs it")
    command = [sys.executable, "-m", "kubernetes_validate", "--strict", "-k", KUBERNETES, str(file)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(CHECKERS), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.stem)
def test_pods_run_the_command_as_it_is_and_are_asked_where_it_answers(file: Path, tmp_path: Path) -> None:
    found = objects(file)
    pod = found["Deployment"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    name, *words = container["args"]
    config = parsed(
        [str(tmp_path) if word == "/versions" else word.replace("=/versions", f"={tmp_path}") for word in words]
    )
    check(config, "token")
    assert name == "serve"
    port = container["ports"][0]["containerPort"]
    assert port == config.port == found["Service"]["spec"]["ports"][0]["port"]
    assert pod["metadata"]["annotations"]["prometheus.io/path"] == protocol.METRICS
    probes = {kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
    assert probes == {"startup": protocol.HEALTH, "readiness": protocol.READY, "liveness": protocol.HEALTH}
    assert pod["spec"]["terminationGracePeriodSeconds"] > config.drain_s
    labels = pod["metadata"]["labels"]
    assert found["Service"]["spec"]["selector"] == labels and found["Service"]["spec"]["clusterIP"] == "None"
    assert found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert found["PodDisruptionBudget"]["spec"]["minAvailable"] < found["Deployment"]["spec"]["replicas"]


def commands(text: str) -> Iterator[list[str]]:
    for line in re.findall(r"llmdistill serve (--[^\n#&\\]*)", text):
        yield [word.strip('"') for word in line.split()]


@pytest.mark.parametrize("file", ["README.md", "slurm/teacher.sbatch"])
def test_commands_have_options_that_there_are(file: str) -> None:
    found = list(commands((DEPLOY / file).read_text()))
    assert found
    for words in found:
        parsed(["8100" if word == "$port" else word for word in words if word != "$@"])


def test_shellcheck_has_nothing_to_say() -> None:
    program = shutil.which("shellcheck", path=os.pathsep.join([str(CHECKERS / "bin"), os.environ["PATH"]]))
    if program is None:
        pytest.skip("no shellcheck here: make test installs it")
    scripts = [str(file) for file in DEPLOY.rglob("*") if file.suffix in (".sh", ".sbatch")]
    done = subprocess.run([program, "--norc", *scripts], capture_output=True, text=True)
    assert scripts and done.returncode == 0, done.stdout


def test_the_image_has_what_it_copies_and_extras_that_there_are() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE):
        assert all((DEPLOY.parent / word).exists() for word in line.split()[:-1]), line
    project = (DEPLOY.parent / "pyproject.toml").read_text()
    for extras in re.findall(r"'\.\[([^]]*)\]'", text):
        assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras.split(","))
