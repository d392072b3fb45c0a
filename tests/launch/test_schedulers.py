"""The files for Slurm and Kubernetes and the example hostfile, checked as far as can be without a cluster."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from stagdist.cluster.hostfile import Host, read_hostfile
from tests.launch.runs import ROOT

SBATCH = ROOT / "launch" / "slurm" / "pretrain.sbatch"
MANIFEST = ROOT / "launch" / "kubernetes" / "pretrain.yaml"

# What the reference of Kubernetes' API (v1.28 and later) allows, as far as a training job may want it: a type, a
# tuple of values, a list of one kind, or named fields. A `!` marks what must be there.
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?")
METADATA = {"name": NAME, "namespace": NAME, "labels": dict, "annotations": dict}
ENVIRONMENT = {
    "name!": str,
    "value": str,
    "valueFrom": {
        "fieldRef": {"fieldPath!": str, "apiVersion": str},
        "secretKeyRef": {"name!": str, "key!": str, "optional": bool},
        "configMapKeyRef": {"name!": str, "key!": str, "optional": bool},
    },
}
CONTAINER = {
    "name!": NAME,
    "image!": str,
    "imagePullPolicy": ("Always", "IfNotPresent", "Never"),
    "workingDir": str,
    "command": [str],
    "args": [str],
    "env": [ENVIRONMENT],
    "resources": {"limits": dict, "requests": dict},
    "volumeMounts": [{"name!": NAME, "mountPath!": str, "subPath": str, "readOnly": bool}],
}
VOLUME = {
    "name!": NAME,
    "persistentVolumeClaim": {"claimName!": str, "readOnly": bool},
    "emptyDir": {"medium": ("", "Memory"), "sizeLimit": QUANTITY},
    "hostPath": {"path!": str, "type": str},
}
POD = {
    "containers!": [CONTAINER],
    "initContainers": [CONTAINER],
    "volumes": [VOLUME],
    "restartPolicy!": ("Never", "OnFailure"),  # a Job allows no other
    "subdomain": NAME,
    "hostNetwork": bool,
    "dnsPolicy": str,
    "nodeSelector": dict,
    "tolerations": list,
    "affinity": dict,
    "terminationGracePeriodSeconds": int,
    "serviceAccountName": str,
}
JOB = {
    "apiVersion!": ("batch/v1",),
    "kind!": ("Job",),
    "metadata!": METADATA,
    "spec!": {
        "template!": {"metadata": METADATA, "spec!": POD},
        "completionMode": ("Indexed", "NonIndexed"),
        "completions": int,
        "parallelism": int,
        "backoffLimit": int,
        "activeDeadlineSeconds": int,
        "ttlSecondsAfterFinished": int,
        "podReplacementPolicy": ("Failed", "TerminatingOrFailed"),
        "suspend": bool,
    },
}
PORT = {"name": NAME, "port!": int, "targetPort": int, "protocol": ("TCP", "UDP", "SCTP")}
SERVICE = {
    "apiVersion!": ("v1",),
    "kind!": ("Service",),
    "metadata!": METADATA,
    "spec!": {"clusterIP": str, "selector": dict, "ports": [PORT], "publishNotReadyAddresses": bool},
}


def problems(value: Any, rule: Any, path: str = "") -> list[str]:
    """What in a manifest is against a rule, with its path."""
    if isinstance(rule, dict):
        if not isinstance(value, dict):
            return [f"{path}: {value!r} is no mapping"]
        names = {name.rstrip("!"): part for name, part in rule.items()}
        found = [f"{path}.{name}: unknown" for name in value if name not in names]
        found += [f"{path}.{name[:-1]}: missing" for name in rule if name[-1] == "!" and name[:-1] not in value]
        known = [name for name in names if name in value]
        return found + [p for name in known for p in problems(value[name], names[name], f"{path}.{name}")]
    if isinstance(rule, list):
        if not isinstance(value, list):
            return [f"{path}: {value!r} is no list"]
        return [p for number, item in enumerate(value) for p in problems(item, rule[0], f"{path}[{number}]")]
    if isinstance(rule, re.Pattern):
        good = isinstance(value, str) and rule.fullmatch(value) is not None
    elif isinstance(rule, tuple):
        good = value in rule
    else:
        good = type(value) is rule
    return [] if good else [f"{path}: {value!r} does not fit {getattr(rule, '__name__', rule)}"]


@pytest.fixture
def manifests() -> list[Any]:
    """Service and job."""
    return list(yaml.safe_load_all(MANIFEST.read_text()))


def test_the_manifest_has_only_fields_that_kubernetes_knows(manifests: list[Any]) -> None:
    service, job = manifests
    assert problems(service, SERVICE) == [] and problems(job, JOB) == []


@pytest.mark.parametrize(
    ("place", "value", "problem"),
    [
        ("completionMod", "Indexed", ".spec.completionMod: unknown"),
        ("completions", "2", ".spec.completions: '2' does not fit int"),
        ("completionMode", "indexed", ".spec.completionMode: 'indexed' does not fit ('Indexed', 'NonIndexed')"),
        ("template", {}, ".spec.template.spec: missing"),
        ("template", [], ".spec.template: [] is no mapping"),
    ],
)
def test_a_wrong_field_is_noticed(manifests: list[Any], place: str, value: Any, problem: str) -> None:
    manifests[1]["spec"][place] = value
    assert problems(manifests[1], JOB) == [problem]


def test_a_wrong_environment_is_noticed(manifests: list[Any]) -> None:
    manifests[1]["spec"]["template"]["spec"]["containers"][0]["env"][0] = {"name": "NODES", "value": 2}
    assert problems(manifests[1], JOB) == [".spec.template.spec.containers[0].env[0].value: 2 does not fit str"]


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


def test_the_batch_script_is_good_bash() -> None:
    assert subprocess.run(["bash", "-n", str(SBATCH)], capture_output=True, text=True).stderr == ""
    if shutil.which("shellcheck") is None:
        pytest.skip("bash -n is content; shellcheck is not installed")
    checked = subprocess.run(["shellcheck", str(SBATCH)], capture_output=True, text=True)
    assert (checked.returncode, checked.stdout) == (0, "")


def test_the_batch_script_asks_slurm_for_what_fits() -> None:
    lines = SBATCH.read_text().splitlines()
    asked = dict(line.removeprefix("#SBATCH --").split("=", 1) for line in lines if line.startswith("#SBATCH "))
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]
    assert {"nodes", "cpus-per-task", "time", "output"} <= set(asked)
    assert asked["signal"].startswith("TERM@")  # to the ranks, which then save; B: would mean the script alone
    # Slurm reads no directive behind the first command.
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(number < first_command for number, line in enumerate(lines) if line.startswith("#SBATCH"))


def test_the_example_hostfile_is_read_by_us_and_by_deepspeed(tmp_path: Path) -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    path = ROOT / "hostfile.example"
    ours = read_hostfile(path)
    assert ours.hosts == (Host("node1", 8), Host("node2", 8)) and ours.spares == (Host("node3", 8),)
    assert dict(fetch_hostfile(str(path))) == {"node1": 8, "node2": 8}
