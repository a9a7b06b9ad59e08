"""klray.check: the repository's cluster.yaml is well; broken ones get one line and exit status 2."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from klray.check import main

ROOT = Path(__file__).parents[2]
Content = dict[str, Any]


@pytest.fixture
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a user has it: what cluster.yaml carries to the machines is there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for file in (f"dist/klray-{version('klray')}-py3-none-any.whl", ".ray/auth_token", "tune_spaces/M.yaml"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    return tmp_path


def content() -> Content:
    loaded: Content = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return loaded


def check(made: Any, folder: Path) -> int:
    (folder / "c.yaml").write_text(made if isinstance(made, str) else yaml.safe_dump(made))
    return main([str(folder / "c.yaml")])


def test_the_repositorys_file(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check((ROOT / "cluster.yaml").read_text(), at_home) == 0
    out, err = capsys.readouterr()
    assert "cluster klray (aws)" in out and "8 CPU 1 GPU" in out and err == ""


def test_what_it_promises() -> None:
    """Spot machines from 0 up that go when idle, a token, nothing but SSH from outside."""
    made = content()
    worker = made["available_node_types"]["worker"]
    assert worker["min_workers"] == 0 and worker["resources"]["GPU"] == 1
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert made["idle_timeout_minutes"] > 0 and "IpPermissions" not in made["provider"]["security_group"]
    assert f"ray[default,train,tune]=={version('ray')}" in "\n".join(made["setup_commands"])


def local(made: Content) -> None:
    del made["available_node_types"], made["head_node_type"]
    made["provider"] = {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2", "10.0.0.3"]}


def test_the_same_file_for_machines_reached_by_ssh(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = content()
    local(made)
    assert check(made, at_home) == 0
    assert "(local)" in capsys.readouterr().out


def _in_commands(key: str, old: str, new: str) -> Callable[[Content], None]:
    def change(made: Content) -> None:
        assert any(old in command for command in made[key])
        made[key] = [command.replace(old, new) for command in made[key]]

    return change


def _set(path: str, value: Any) -> Callable[[Content], None]:
    *parents, last = path.split("|")

    def change(made: Content) -> None:
        for key in parents:
            made = made[key]
        made[last] = value

    return change


def _without(path: str) -> Callable[[Content], None]:
    *parents, last = path.split("|")

    def change(made: Content) -> None:
        for key in parents:
            made = made[key]
        del made[last]

    return change


def _door(made: Content) -> None:
    rule = {"FromPort": 8265, "ToPort": 8265, "IpProtocol": "tcp", "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}
    made["provider"]["security_group"]["IpPermissions"] = [rule]


def _local_without_head(made: Content) -> None:
    local(made)
    del made["provider"]["head_ip"]


def _local_with_types(made: Content) -> None:
    types = made["available_node_types"]
    local(made)
    made["available_node_types"] = types


HEAD, WORKER = "head_start_ray_commands", "worker_start_ray_commands"
BROKEN: dict[str, tuple[Callable[[Content], None], str]] = {
    "no name": (_without("cluster_name"), "must have cluster_name"),
    "no provider": (_without("provider"), "must have provider"),
    "provider without type": (_without("provider|type"), "provider must have a type"),
    "unknown provider": (_set("provider|type", "moon"), "moon"),
    "unknown key": (_set("max_worker", 3), "'max_worker' was unexpected"),
    "wrong type": (_set("max_workers", "many"), "max_workers: 'many' is not of type"),
    "unknown key of a type": (_set("available_node_types|worker|gpus", 1), "'gpus' was unexpected"),
    "head type missing": (_set("head_node_type", "boss"), "head_node_type"),
    "more at least than at most": (_set("available_node_types|worker|min_workers", 5), "max_workers"),
    "no workers": (_set("max_workers", 0), "max_workers must be >= 1, got 0"),
    "least over type's most": (_set("available_node_types|worker|max_workers", -1), "max_workers"),
    "resource of no preset": (_set("available_node_types|worker|resources|gpu", 1), "nothing would use gpu"),
    "head without CPUs": (_set("available_node_types|head|resources", {}), "must name CPUs"),
    "head without token": (_in_commands(HEAD, "RAY_AUTH_MODE=token ", ""), "RAY_AUTH_MODE=token"),
    "worker without token": (_in_commands(WORKER, "RAY_AUTH_MODE=token ", ""), "RAY_AUTH_MODE=token"),
    "token not carried": (_without("file_mounts|~/.ray/auth_token"), "must carry the token"),
    "token missing": (_set("file_mounts|~/.ray/auth_token", "nowhere/auth_token"), "ray get-auth-token --generate"),
    "head not started": (_set(HEAD, ["ray stop"]), "one command with ray start, got 0"),
    "head starts as a worker": (_in_commands(HEAD, "--head", "--block"), "--head"),
    "no autoscaler": (_in_commands(HEAD, "--autoscaling-config=", "--x="), "--autoscaling-config"),
    "worker of another head": (_in_commands(WORKER, "$RAY_HEAD_IP", "10.0.0.9"), "--address=$RAY_HEAD_IP"),
    "open dashboard": (_in_commands(HEAD, "dashboard-host=127.0.0.1", "dashboard-host=0.0.0.0"), "got 0.0.0.0"),
    "open MLflow": (_in_commands(HEAD, "--host 127.0.0.1", "--host 0.0.0.0"), "got 0.0.0.0"),
    "open door": (_door, "may open SSH only, port 22, got 8265 to 8265"),
    "another Ray": (_in_commands("setup_commands", "==2.60.0", "==2.59.0"), "ray must be 2.60.0"),
    "Ray not pinned": (_in_commands("setup_commands", "==2.60.0", ""), "nothing names its version"),
    "another klray": (_in_commands("setup_commands", "klray-0.2.0", "klray-0.0.9"), "klray must be 0.2.0"),
    "no wheel": (_set("file_mounts|~/wheels", "wheels"), "wheels must exist"),
    "SSH without a head": (_local_without_head, "head_ip"),
    "SSH with types": (_local_with_types, "available_node_types"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken(kind: str, at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = content()
    change, words = BROKEN[kind]
    change(made)
    assert check(made, at_home) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err, err
    assert err.startswith("klray.check: ") and err.count("\n") == 1, err


NO_CLUSTER_FILE = {
    "a: [": "is not YAML",
    "- a": "must hold keys",
    "": "must hold keys",
    "a: !!python/name:os.system": "is not YAML",
}


@pytest.mark.parametrize(("text", "words"), NO_CLUSTER_FILE.items())
def test_no_cluster_file(text: str, words: str, at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(text, at_home) == 2
    assert words in capsys.readouterr().err


def test_wheel_of_another_version(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (at_home / "dist" / f"klray-{version('klray')}-py3-none-any.whl").unlink()
    assert check(content(), at_home) == 2
    assert "make wheel" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "takes a cluster file, or --live"),
        (["c.yaml", "--nodes", "0"], "--nodes must be >= 1"),
        (["no.yaml"], "cannot be read"),
    ],
)
def test_command_line(arguments: list[str], words: str, at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert words in capsys.readouterr().err
