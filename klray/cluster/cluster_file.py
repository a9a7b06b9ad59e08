"""What must hold of a file for ``ray up``, checked without a cloud."""

from __future__ import annotations

import logging
import re
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import yaml

from klray.errors import UserError

HEAD_STARTS, WORKER_STARTS = "head_start_ray_commands", "worker_start_ray_commands"
_RESOURCES = ("CPU", "GPU", "memory", "object_store_memory")  # what klray's presets ask for, and Ray's own
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_SSH = 22


class ClusterFileError(UserError):
    """The file would not make a cluster on which klray works, or would open a door."""


def check_cluster_file(path: Path) -> dict[str, Any]:
    """Returns the file as Ray completes it.

    Ray's own schema code looks first; then what that lets pass: the token, doors, versions, files, resources.

    Raises:
        ClusterFileError: for the first rule that does not hold.
    """
    content = _read(path)
    config = _by_ray(content, path)
    for commands in (HEAD_STARTS, WORKER_STARTS):
        _check_start(config[commands], commands)
    _check_doors(config)
    _check_versions(config)
    _check_mounts(config["file_mounts"], config["head_setup_commands"])
    _check_resources(config)
    return config


def nodes_at_start(config: dict[str, Any]) -> int:
    """The machines that a cluster has without being asked for more: the head and each type's least number."""
    return 1 + sum(kind.get("min_workers", 0) for kind in config["available_node_types"].values())


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ClusterFileError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ClusterFileError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ClusterFileError(f"{path} must hold keys with values, got {type(content).__name__}")
    for key in ("cluster_name", "provider"):  # ray up takes a file without a name, and names the cluster "default"
        if not content.get(key):
            raise ClusterFileError(f"{path} must have {key}; every cluster of a user needs a name of its own")
    if not isinstance(content["provider"], dict) or "type" not in content["provider"]:
        raise ClusterFileError(f"{path}: provider must have a type: aws, or local for machines reached by SSH")
    return content


def _by_ray(content: dict[str, Any], path: Path) -> dict[str, Any]:
    import click
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()) as said:  # its warnings are not of use to users
            logging.getLogger("ray.autoscaler").setLevel(logging.ERROR)
            config: dict[str, Any] = prepare_config(content)
            validate_config(config)
    except jsonschema.ValidationError as error:
        where = ".".join(str(part) for part in error.absolute_path) or "the file"
        raise ClusterFileError(f"{path}: {where}: {error.message}") from error
    except click.ClickException as error:
        lines = said.getvalue().strip().splitlines()
        raise ClusterFileError(f"{path}: {lines[-1] if lines else error}") from error
    except (KeyError, TypeError, AttributeError, ValueError, AssertionError, NotImplementedError) as error:
        raise ClusterFileError(f"{path}: {' '.join(str(error).split())} ({type(error).__name__})") from error
    return config


def _check_start(commands: list[str], key: str) -> None:
    starts = [command for command in commands if "ray start" in command]
    if len(starts) != 1:
        raise ClusterFileError(f"{key} must hold one command with ray start, got {len(starts)}")
    start = starts[0]
    # The launcher carries no mode: without it a head answers anybody, and a worker is turned away.
    if "RAY_AUTH_MODE=token" not in start:
        raise ClusterFileError(f"{key} must start Ray with RAY_AUTH_MODE=token, got {start!r}")
    needed = ("--head", "--autoscaling-config=") if key == HEAD_STARTS else ("--address=$RAY_HEAD_IP",)
    for flag in needed:
        if flag not in start.replace(f"{flag.rstrip('=')} ", flag):
            raise ClusterFileError(f"{key} must start Ray with {flag}, got {start!r}")


def _check_doors(config: dict[str, Any]) -> None:
    for command in config[HEAD_STARTS] + config[WORKER_STARTS]:
        for flag in re.findall(r"--(?:dashboard-)?host[= ]([^\s'\"]+)", command):
            if flag not in _LOOPBACK:
                raise ClusterFileError(
                    f"the dashboard and MLflow must listen on 127.0.0.1, got {flag}; reach them by ray attach -p"
                )
    head = next(command for command in config[HEAD_STARTS] if "ray start" in command)
    if "--include-dashboard=false" in head.lower():
        raise ClusterFileError("the head must have its dashboard: without it stopped trials never free their workers")
    for rule in config["provider"].get("security_group", {}).get("IpPermissions") or []:
        if rule.get("IpRanges") or rule.get("Ipv6Ranges"):
            ports = rule.get("FromPort"), rule.get("ToPort")
            if ports != (_SSH, _SSH):
                raise ClusterFileError(
                    f"provider.security_group may open SSH only, port 22, got {ports[0]} to {ports[1]}"
                )


def _check_versions(config: dict[str, Any]) -> None:
    commands = "\n".join([*config["head_setup_commands"], *config["worker_setup_commands"]])
    pins = {"ray": set(re.findall(r"ray(?:\[[\w,]*\])?==([\w.]+)", commands))}
    files = [*config["file_mounts"], *(str(local) for local in config["file_mounts"].values())]
    pins["klray"] = set(re.findall(r"klray-([\w.]+?)-py3", "\n".join([commands, *files])))
    for package, found in pins.items():
        here = version(package)
        if found - {here}:
            raise ClusterFileError(
                f"{package} must be {here} as on this machine, got {', '.join(sorted(found - {here}))}"
            )
        if not found and "pip install" in commands:
            raise ClusterFileError(f"setup_commands must install {package} {here}, pinned; nothing names its version")


def _check_mounts(mounts: dict[str, str], commands: list[str]) -> None:
    if not any(Path(remote).name == "auth_token" for remote in mounts):
        raise ClusterFileError("file_mounts must carry the token: ~/.ray/auth_token: ~/.ray/auth_token")
    for remote, local in mounts.items():
        if not Path(local).expanduser().exists():
            way = "make wheel" if "wheel" in remote else "put it there, or run this where it is"
            if Path(remote).name == "auth_token":
                way = "ray get-auth-token --generate"
            raise ClusterFileError(f"file_mounts: {local} must exist; {way}")
    for remote, name in re.findall(r"(\S+)/(klray-[\w.]+-py3-none-any\.whl)", "\n".join(commands)):
        wheel = Path(mounts.get(remote, remote)).expanduser() / name
        if not wheel.exists():
            raise ClusterFileError(f"file_mounts: {wheel} must exist; make wheel")


def _check_resources(config: dict[str, Any]) -> None:
    types = config["available_node_types"]
    for name, kind in types.items():
        unknown = [resource for resource in kind["resources"] if resource not in _RESOURCES]
        if unknown:
            raise ClusterFileError(
                f"available_node_types.{name}.resources: klray asks for CPU and GPU, nothing would use {unknown[0]}"
            )
        if kind.get("min_workers", 0) > kind["max_workers"]:
            raise ClusterFileError(
                f"available_node_types.{name}.min_workers must be at most max_workers, {kind['max_workers']}, "
                f"got {kind['min_workers']}"
            )
    if config["provider"]["type"] == "local":  # its machines are asked what they have
        return
    if not types[config["head_node_type"]]["resources"].get("CPU"):
        raise ClusterFileError("the head's resources must name CPUs: drivers and their controllers run there")
    room = sum(kind["max_workers"] for name, kind in types.items() if name != config["head_node_type"])
    if room < 1 or config["max_workers"] < 1:
        raise ClusterFileError(f"max_workers must be >= 1, got {min(room, config['max_workers'])}")
