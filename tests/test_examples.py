"""The templates for clusters run: as they stand, with what a cluster gives them in its place."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from kconvert import Recipe, convert, plan

EXAMPLES = Path(__file__).parents[1] / "examples"
KCONVERT = Path(sys.executable).with_name("kconvert")
SRUN = """#!/bin/sh
# All tasks of a step at once; the exit code of one that failed.
while [ "${1#--}" != "$1" ]; do shift; done
pids="" failed=0 i=0
while [ $i -lt "$SLURM_NTASKS" ]; do
    SLURM_PROCID=$i "$@" & pids="$pids $!"
    i=$((i + 1))
done
for pid in $pids; do wait "$pid" || failed=$?; done
exit $failed
"""
SHARDS = ("--shard-size", "100KB")
Tree = Callable[[Path], "dict[str, bytes]"]


def run_template(name: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    shell = "bash" if name.endswith(".sbatch") else "sh"
    return subprocess.run(
        [shell, EXAMPLES / name, *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "KCONVERT": str(KCONVERT), **environment},
    )


@pytest.fixture(scope="module")
def whole(int4: Path, tmp_path_factory: pytest.TempPathFactory, tree: Tree) -> dict[str, bytes]:
    root = tmp_path_factory.mktemp("whole") / "bf16"
    convert(plan(int4, Recipe("bf16", shard_size=100_000)), root)
    return tree(root)


@pytest.fixture
def srun(tmp_path: Path) -> dict[str, str]:
    """The environment of a batch job of two tasks, which is its first one's, with a stub of srun."""
    (tmp_path / "bin").mkdir()
    stub = tmp_path / "bin" / "srun"
    stub.write_text(SRUN)
    stub.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    return {"PATH": path, "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_CPUS_PER_TASK": "1"}


def test_the_template_for_slurm_writes_what_one_machine_writes(
    int4: Path, tmp_path: Path, whole: dict[str, bytes], tree: Tree, srun: dict[str, str]
) -> None:
    result = run_template("slurm.sbatch", int4, tmp_path / "bf16", *SHARDS, **srun)

    assert result.returncode == 0, result.stderr
    assert tree(tmp_path / "bf16") == whole


def test_the_template_for_slurm_ends_with_an_error_when_a_rank_does(
    int4: Path, tmp_path: Path, srun: dict[str, str]
) -> None:
    result = run_template("slurm.sbatch", int4, tmp_path / "bf16", *SHARDS, **srun, COMMAND="fp8-to-bf16")

    assert result.returncode == 2
    assert "error: " in result.stderr
    assert not (tmp_path / "bf16" / "config.json").exists()


def test_the_template_for_torchrun_writes_what_one_machine_writes(
    int4: Path, tmp_path: Path, whole: dict[str, bytes], tree: Tree
) -> None:
    torchrun = shutil.which("torchrun", path=str(KCONVERT.parent))
    if torchrun is None:
        pytest.skip("torch came without torchrun")

    result = run_template("torchrun.sh", int4, tmp_path / "bf16", *SHARDS, TORCHRUN=torchrun)

    assert result.returncode == 0, result.stderr
    assert tree(tmp_path / "bf16") == whole


@pytest.fixture
def manifest() -> Any:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((EXAMPLES / "kubernetes-job.yaml").read_text())


def table(required: str, **properties: Any) -> dict[str, Any]:
    """An object with these fields and no other."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def array(items: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


TEXT, COUNT = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 1}
QUANTITY = {"type": "string", "pattern": "^[0-9]+(m|[KMGT]i?)?$"}
AMOUNTS = table("", cpu=QUANTITY, memory=QUANTITY)
CONTAINER = table(
    "name image",
    name=TEXT,
    image=TEXT,
    command=array(TEXT),
    env=array(table("name value", name=TEXT, value=TEXT)),  # a number that is not quoted is refused by the server
    resources=table("", requests=AMOUNTS, limits=AMOUNTS),
    volumeMounts=array(table("name mountPath", name=TEXT, mountPath=TEXT)),
)
VOLUME = table("name", name=TEXT, persistentVolumeClaim=table("claimName", claimName=TEXT))
POD = table(
    "restartPolicy containers",
    restartPolicy={"enum": ["Never", "OnFailure"]},  # what a Job's pods may have
    containers=array(CONTAINER),
    volumes=array(VOLUME),
)
# The fields of batch/v1 Job, as of Kubernetes 1.33, that the template uses.
JOB = table(
    "apiVersion kind metadata spec",
    apiVersion={"const": "batch/v1"},
    kind={"const": "Job"},
    metadata=table("name", name={"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"}),
    spec=table(
        "template completions completionMode",
        completions=COUNT,
        parallelism=COUNT,
        completionMode={"enum": ["Indexed", "NonIndexed"]},
        backoffLimitPerIndex=COUNT,
        maxFailedIndexes=COUNT,
        template=table("spec", spec=POD),
    ),
)


def test_the_template_for_kubernetes_is_one_by_its_schema(manifest: Any) -> None:
    jsonschema.validate(manifest, JOB)

    assert manifest["spec"]["maxFailedIndexes"] <= manifest["spec"]["completions"]


def test_the_template_for_kubernetes_numbers_its_pods_as_the_command_expects(
    manifest: Any, int4: Path, tmp_path: Path, whole: dict[str, bytes], tree: Tree
) -> None:
    """Run as its pods would be, on a path of this machine in the place of the volume."""
    spec = manifest["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(environment["JOB_COMPLETION_COUNT"])
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        v["name"] for v in spec["template"]["spec"]["volumes"]
    }
    _, command, _, _, *options = container["command"]

    for index in range(spec["completions"]):
        result = subprocess.run(
            [KCONVERT, command, int4, tmp_path / "bf16", *options, *SHARDS],
            check=False,
            capture_output=True,
            text=True,
            env={**os.environ, **environment, "JOB_COMPLETION_INDEX": str(index)},
        )
        assert result.returncode == 0, result.stderr
    assert tree(tmp_path / "bf16") == whole


def test_the_template_for_ray_writes_what_one_machine_writes(
    int4: Path, tmp_path: Path, whole: dict[str, bytes], tree: Tree
) -> None:
    pytest.importorskip("ray")

    result = run_template("ray_job.sh", int4, tmp_path / "bf16", *SHARDS, RAY_ADDRESS="local")

    assert result.returncode == 0, result.stderr
    assert tree(tmp_path / "bf16") == whole


def test_the_template_for_skypilot_numbers_its_nodes_as_the_command_expects(
    int4: Path, tmp_path: Path, whole: dict[str, bytes], tree: Tree
) -> None:
    """Its `run` as on each node, on paths of this machine in the place of the volume."""
    yaml = pytest.importorskip("yaml")
    task = yaml.safe_load((EXAMPLES / "skypilot.yaml").read_text())
    assert task["envs"]["SRC"].startswith(tuple(task["volumes"]))
    assert task["envs"]["DST"].startswith(tuple(task["volumes"]))
    places = {"SRC": str(int4), "DST": str(tmp_path / "bf16"), "SKYPILOT_NUM_NODES": str(task["num_nodes"])}
    script = task["run"].replace("--worker", "--shard-size 100KB --worker")

    for node in range(task["num_nodes"]):
        own = {"SKYPILOT_NODE_RANK": str(node), "PATH": f"{KCONVERT.parent}:{os.environ['PATH']}"}
        environment = {**os.environ, **task["envs"], **places, **own}
        result = subprocess.run(
            ["bash", "-c", script], check=False, capture_output=True, text=True, env=environment, timeout=120
        )
        assert result.returncode == 0, result.stderr

    assert tree(tmp_path / "bf16") == whole
