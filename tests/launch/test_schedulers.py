"""The files for Slurm and Kubernetes and the example hostfile, checked as far as can be without a cluster."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from stagdist.cluster.hosts.hostfile import Host, read_hostfile
from tests.launch.runs import ROOT

SBATCH = [ROOT / "launch" / "slurm" / f"{name}.sbatch" for name in ("pretrain", "supervised", "serve")]
MANIFESTS = ROOT / "launch" / "kubernetes"

# The package reads its schemas in a way that jsonschema will give up one day; its version is pinned.
schemas = pytest.mark.filterwarnings("ignore:jsonschema.RefResolver", "ignore:The metaschema")
OLDEST_KUBERNETES = "1.28"
# What the schemas leave to prose: by the path of a field, what it may say.
NAME = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
VALUES = {
    r"metadata\.name|.*\.(containers|volumes|volumeMounts)\.\d+\.name|.*\.subdomain": NAME,
    r".*\.(limits|requests)\..+|.*\.sizeLimit": r"[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?",
    r".*\.podManagementPolicy": "Parallel",  # ranks wait for each other
    r"spec\.completionMode": "Indexed|NonIndexed",
    r"spec\.podReplacementPolicy": "Failed|TerminatingOrFailed",
    r".*\.restartPolicy": "Never|OnFailure",  # a Job allows no other
    r".*\.imagePullPolicy": "Always|IfNotPresent|Never",
    r".*\.emptyDir\.medium": "|Memory",
    r".*\.protocol": "TCP|UDP|SCTP",
}
NEEDED = {
    "Service": {"spec.ports.0.port"},
    "Job": {"spec.template.spec.restartPolicy", "spec.completionMode"},
    "StatefulSet": {"spec.serviceName", "spec.podManagementPolicy", "spec.template.spec.terminationGracePeriodSeconds"},
}


def problems(manifest: Any) -> list[str]:
    """What in a manifest is against Kubernetes' own schema, or says what the field does not take."""
    try:
        kubernetes_validate.validate(manifest, OLDEST_KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}"]
    said = dict(leaves(manifest))
    found = [f"{path}: missing" for path in sorted(NEEDED[manifest["kind"]] - set(said))]
    for path, value in said.items():
        rules = [rule for pattern, rule in VALUES.items() if re.fullmatch(pattern, path)]
        found += [f"{path}: {value!r} is not {rule}" for rule in rules if not re.fullmatch(rule, str(value))]
    return found


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Path and value of everything in a manifest that holds nothing else."""
    if not isinstance(value, dict | list):
        yield path, value
        return
    for name, part in value.items() if isinstance(value, dict) else enumerate(value):
        yield from leaves(part, f"{path}.{name}" if path else str(name))


@pytest.fixture
def manifests() -> list[Any]:
    """Service and job."""
    return read_manifests("pretrain")


def read_manifests(name: str) -> list[Any]:
    """The documents of a file."""
    return list(yaml.safe_load_all((MANIFESTS / f"{name}.yaml").read_text()))


@schemas
@pytest.mark.parametrize(
    ("name", "kinds"), [("pretrain", ["Service", "Job"]), ("serve", ["Service", "Service", "StatefulSet"])]
)
def test_the_manifests_are_what_kubernetes_takes(name: str, kinds: list[str]) -> None:
    found = read_manifests(name)
    assert [manifest["kind"] for manifest in found] == kinds
    assert [problems(manifest) for manifest in found] == [[] for _ in kinds]


@schemas
@pytest.mark.parametrize(
    ("place", "value", "problem"),
    [
        ("spec.completionMod", "Indexed", "spec: Additional properties are not allowed ('completionMod' was"),
        ("spec.completions", "2", "spec.completions: '2' is not of type 'integer'"),
        ("spec.completionMode", "indexed", "spec.completionMode: 'indexed' is not Indexed|NonIndexed"),
        ("spec.template", {}, "spec.template.spec.restartPolicy: missing"),
        ("spec.template", [], "spec.template: [] is not of type 'object'"),
        ("spec.template.spec.containers", [{}], "spec.template.spec.containers.0: 'name' is a required property"),
        ("spec.template.spec.restartPolicy", "Always", "spec.template.spec.restartPolicy: 'Always' is not Never|OnF"),
        ("spec.template.spec.volumes.1.emptyDir.sizeLimit", "16GiB", "spec.template.spec.volumes.1.emptyDir.sizeLi"),
        ("spec.template.spec.containers.0.env.0.value", 2, "spec.template.spec.containers.0.env.0.value: 2 is not of"),
        ("metadata.name", "Stag_dist", "metadata.name: 'Stag_dist' is not "),
    ],
)
def test_a_wrong_field_is_noticed(manifests: list[Any], place: str, value: Any, problem: str) -> None:
    *folders, name = place.split(".")
    part = manifests[1]
    for folder in folders:
        part = part[int(folder) if folder.isdigit() else folder]
    part[name] = value
    (found,) = problems(manifests[1])
    assert found.startswith(problem)


def test_the_parts_of_the_manifest_fit_each_other(manifests: list[Any]) -> None:
    service, job = manifests
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    values = {one["name"]: one.get("value") for one in container["env"]}
    name = job["metadata"]["name"]
    assert spec["completions"] == spec["parallelism"] == int(values["NODES"])
    assert int(values["SLOTS"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert service["spec"]["clusterIP"] == "None"
    words = dict(word.split("=", 1) for word in container["command"] if "=" in word)
    assert words["--master-addr"] == f"{name}-0.{pod['subdomain']}"
    assert int(words["--master-port"]) == service["spec"]["ports"][0]["port"]
    used = set(re.findall(r"\$\((\w+)\)", " ".join(container["command"])))
    assert used == set(values) == {"NODES", "SLOTS", "INDEX", "CONFIG"}
    volumes = {one["name"] for one in pod["volumes"]}
    assert {one["name"] for one in container["volumeMounts"]} == volumes
    assert (ROOT / next(word for word in container["command"] if word.endswith(".py"))).is_file()


def test_the_parts_of_the_serving_manifest_fit_each_other() -> None:
    ranks, http, engine = read_manifests("serve")
    spec, pod = engine["spec"], engine["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    name = engine["metadata"]["name"]
    values = {one["name"]: one.get("value") for one in container["env"]}
    assert spec["replicas"] == int(values["NODES"])
    assert int(values["SLOTS"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert spec["serviceName"] == ranks["metadata"]["name"] and ranks["spec"]["clusterIP"] == "None"
    labels = engine["spec"]["template"]["metadata"]["labels"]
    assert labels == spec["selector"]["matchLabels"] == ranks["spec"]["selector"]
    # Only the pod of rank 0 listens.
    assert http["spec"]["selector"] == {"statefulset.kubernetes.io/pod-name": f"{name}-0"}
    words = dict(word.split("=", 1) for word in container["command"] if "=" in word)
    assert words["--master-addr"] == f"{name}-0.{spec['serviceName']}"
    assert int(words["--master-port"]) == ranks["spec"]["ports"][0]["port"]
    assert int(words["--port"]) == http["spec"]["ports"][0]["port"] == container["ports"][0]["containerPort"]
    used = set(re.findall(r"\$\((\w+)\)", " ".join(container["command"])))
    assert used == set(values) - {"STAGDIST_API_KEYS"}
    wait = int(container["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert wait + float(words["--drain-timeout-s"]) + 10 <= pod["terminationGracePeriodSeconds"]
    for probe, path in {"livenessProbe": "live", "readinessProbe": "health"}.items():
        program = container[probe]["exec"]["command"][-1]
        compile(program, probe, "exec")
        assert f":{words['--port']}/{path}" in program
    volumes = {one["name"] for one in pod["volumes"]}
    assert {one["name"] for one in container["volumeMounts"]} == volumes
    assert (ROOT / next(word for word in container["command"] if word.endswith(".py"))).is_file()


@pytest.mark.parametrize("script", SBATCH, ids=lambda path: path.stem)
def test_the_batch_scripts_are_good_bash(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True).stderr == ""
    if shutil.which("shellcheck") is None:
        pytest.skip("bash -n is content; shellcheck is not installed")
    checked = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True)
    assert (checked.returncode, checked.stdout) == (0, "")


@pytest.mark.parametrize("script", SBATCH, ids=lambda path: path.stem)
def test_the_batch_scripts_ask_slurm_for_what_fits(script: Path) -> None:
    lines = script.read_text().splitlines()
    wanted = [line.removeprefix("#SBATCH --").partition("=") for line in lines if line.startswith("#SBATCH ")]
    asked = {name: value for name, _, value in wanted}
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]
    assert {"nodes", "cpus-per-task", "time", "output"} <= set(asked)
    # To the ranks, which then save; B: means the script alone, which is the supervisor.
    signals = {"pretrain": "TERM@600", "supervised": "B:TERM@600", "serve": "B:TERM@60"}
    assert asked["signal"] == signals[script.stem]
    # Slurm reads no directive behind the first command.
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(number < first_command for number, line in enumerate(lines) if line.startswith("#SBATCH"))


def test_the_example_hostfile_is_read_by_us_and_by_deepspeed(tmp_path: Path) -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    path = ROOT / "hostfile.example"
    ours = read_hostfile(path)
    assert ours.hosts == (Host("node1", 8), Host("node2", 8)) and ours.spares == (Host("node3", 8),)
    assert dict(fetch_hostfile(str(path))) == {"node1": 8, "node2": 8}
