"""deploy/ beyond its files' own schemas: pods under «restricted», the values, the dashboard, SLURM's time limit.

kubectl, where it is installed, renders the overlay; nothing here talks to a cluster.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from scalecryo.runs.exported import GAUGES, LOST_WORKERS
from scalecryo.train.stopping import WORD
from tests.unit.test_deploy import DEPLOY, IMAGE, MANIFESTS, README, SBATCH, cluster, groups, kuberay, load, one_of


def _pod_specs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod of deploy/kubernetes, with what makes it."""
    for name in MANIFESTS:
        for group in groups(name):
            yield f"{name} {group.get('groupName', 'head')}", group["template"]["spec"]
    yield "submitter", one_of("kubernetes/rayjob.yaml", "RayJob")["spec"]["submitterPodTemplate"]["spec"]
    yield "convert", one_of("kubernetes/convert.yaml", "Job")["spec"]["template"]["spec"]
    yield "tensorboard", one_of("kubernetes/tensorboard.yaml", "Deployment")["spec"]["template"]["spec"]


@pytest.mark.parametrize(("name", "pod"), list(_pod_specs()), ids=[name for name, _ in _pod_specs()])
def test_pods_pass_the_standard_restricted(name: str, pod: dict[str, Any]) -> None:
    """Its controls: https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted."""
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    allowed = {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
    assert all(set(volume) - {"name"} <= allowed for volume in pod.get("volumes", []))
    security = pod["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["runAsUser"] != 0
    assert security["seccompProfile"]["type"] in ("RuntimeDefault", "Localhost")
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        own = container["securityContext"]
        assert own["allowPrivilegeEscalation"] is False
        assert own["capabilities"]["drop"] == ["ALL"]
        assert set(own["capabilities"].get("add", [])) <= {"NET_BIND_SERVICE"}
        assert not own.get("privileged")
        assert not [port for port in container.get("ports", []) if port.get("hostPort")]


def test_the_autoscaler_beside_the_head_passes_it_too() -> None:
    for name in MANIFESTS:
        own = cluster(name)["autoscalerOptions"]["securityContext"]
        assert own == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    namespace = one_of("kubernetes/namespace.yaml", "Namespace")["metadata"]["labels"]
    assert namespace["pod-security.kubernetes.io/enforce"] == "restricted"


def _at(node: Any, path: str) -> Any:
    for key in path.split("."):
        node = node[int(key)] if isinstance(node, list) else node[key]
    return node


def test_the_values_are_what_the_manifests_hold() -> None:
    """Every value goes where the same value stands: an overlay with the values as they are changes nothing."""
    overlay = load("kubernetes/kustomization.yaml")[0]
    lines = (DEPLOY / "kubernetes" / "values.env").read_text().splitlines()
    values = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    used = set()
    made = {(one["kind"], one["metadata"]["name"]): one for name in overlay["resources"]
            for one in load(f"kubernetes/{name}")}  # fmt: skip
    for replacement in overlay["replacements"]:
        key = replacement["source"]["fieldPath"].removeprefix("data.")
        used.add(key)
        for target in replacement["targets"]:
            select, options = target["select"], target.get("options", {})
            for path in target["fieldPaths"]:
                found = _at(made[select["kind"], select["name"]], path)
                if options:
                    found = found.split(options["delimiter"])[options["index"]]
                assert found == values[key], path
    assert used == set(values)
    steps = {one["metadata"]["labels"]["scalecryo/step"] for one in made.values()}
    assert steps == {"prepare", "convert", "train", "watch"}
    assert all(f"scalecryo/step={step}" in README for step in steps)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl here")
def test_kustomize_puts_the_values_in(tmp_path: Path) -> None:
    folder = tmp_path / "kubernetes"
    shutil.copytree(DEPLOY / "kubernetes", folder)
    values = folder / "values.env"
    text = values.read_text().replace("s3://BUCKET/particles", "gs://mine/set").replace("2:8", "1:3")
    values.write_text(text.replace(f"CPU_IMAGE={IMAGE}", "CPU_IMAGE=mine:cpu"))
    result = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    made = {one["kind"]: one for one in yaml.safe_load_all(result.stdout)}
    job = made["RayJob"]["spec"]
    assert "--data gs://mine/set.zarr " in job["entrypoint"]
    assert "--workers 1:3 " in job["entrypoint"]
    assert not [error.message for error in kuberay("RayJob").iter_errors(job)]
    assert made["Job"]["spec"]["template"]["spec"]["containers"][0]["args"][1] == "gs://mine/set.zarr"
    ray = job["rayClusterSpec"]
    with_gpu = [group["template"]["spec"]["containers"][0]["image"] for group in ray["workerGroupSpecs"]]
    assert with_gpu == [IMAGE, IMAGE]
    pods = [ray["headGroupSpec"]["template"], job["submitterPodTemplate"],
            *(made[kind]["spec"]["template"] for kind in ("Job", "Deployment"))]  # fmt: skip
    assert {pod["spec"]["containers"][0]["image"] for pod in pods} == {"mine:cpu"}


def test_the_dashboard_shows_what_runs_export() -> None:
    """Grafana's own fields, and no query for a metric that nobody exports."""
    board = json.loads((DEPLOY / "grafana" / "scalecryo.json").read_text())
    assert {"title", "uid", "schemaVersion", "panels", "templating", "time"} <= set(board)
    variables = {one["name"] for one in board["templating"]["list"]}
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    shown = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24
        assert panel["targets"]
        for target in panel["targets"]:
            assert set(re.findall(r"\$\{?(\w+)", json.dumps(target))) <= variables
            names = re.findall(r"scalecryo_(\w+)", target["expr"])
            assert names or "ray_node_gpus_utilization" in target["expr"]
            assert all(target["expr"].count(left) == target["expr"].count(right) for left, right in ("()", "{}", "[]"))
            shown |= set(names)
    assert shown == {*GAUGES, LOST_WORKERS}


def test_the_apptainer_recipe_is_made_of_the_image() -> None:
    recipe = (DEPLOY / "apptainer" / "scalecryo.def").read_text()
    header = dict(re.findall(r"^(\w+): (\S+)$", recipe, flags=re.MULTILINE))
    assert header == {"Bootstrap": "docker", "From": IMAGE}
    assert re.findall(r"^%(\w+)$", recipe, flags=re.MULTILINE) == ["environment", "runscript", "test"]


def test_the_batch_script_requeues_itself_before_the_time_limit(tmp_path: Path) -> None:
    """With stand-ins for SLURM's commands and the environment: USR1 tells the run to end, and then requeues the job."""
    assert re.search(r"^#SBATCH --signal=B:USR1@\d+$", SBATCH.read_text(), flags=re.MULTILINE)
    tools, word = tmp_path / "bin", tmp_path / "run" / WORD
    tools.mkdir()
    works = f'touch "$0.started"; while [ ! -e {word} ]; do sleep 0.1; done; echo ended >> "$0.log"; exit 1'
    scripts = {
        "srun": f'if [ "$1" = --nodes=1 ]; then echo 127.0.0.1; else {works}; fi',
        "scontrol": 'if [ "$1" = show ]; then echo here; else echo "$@" >> "$0.log"; fi',
        "activate": "true",
    }
    for name, body in scripts.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "SCALECRYO_ENV": str(tmp_path),
                   "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "here", "SLURM_JOB_NUM_NODES": "1"}  # fmt: skip
    with subprocess.Popen(["bash", str(SBATCH), "store", str(tmp_path / "run")], env=environment) as job:
        deadline = time.monotonic() + 60
        while not (tools / "srun.started").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.2)  # from the step's start to the trap
        job.send_signal(signal.SIGUSR1)
        assert job.wait(timeout=300) != 0
    assert (tools / "srun.log").read_text() == "ended\n"
    assert (tools / "scontrol.log").read_text() == "requeue 7\n"
