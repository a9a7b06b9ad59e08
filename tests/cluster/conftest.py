"""A cluster of two hosts, made by ``ray up`` from the repository's cluster.yaml."""

from __future__ import annotations

import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.hosts import LAPTOP, Hosts, missing

ROOT = Path(__file__).parents[2]
TINY = {"network.kind": "mlp", "network.width": 32, "optimizer.batch_size": 64}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
            item.add_marker("faults" if "test_faults" in item.path.name else "cluster")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Shows what the tests measured."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{report.nodeid.rpartition('::')[2]}: {name}: {value}")


def ssh_variant(hosts: Hosts, workers: list[str], token: Path) -> dict[str, Any]:
    """cluster.yaml as its last lines say for machines reached by SSH; nothing is installed, as the hosts see the
    virtual environment, and ~/klray is one folder for all already."""
    content: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    del content["head_node_type"], content["available_node_types"]
    addresses = [hosts.address(name) for name in workers]
    content["provider"] = {"type": "local", "head_ip": hosts.address("h0"), "worker_ips": addresses}
    content["auth"] = {"ssh_user": "root", "ssh_private_key": str(hosts.key)}
    content["file_mounts"] |= {"~/.ray/auth_token": str(token)}
    del content["file_mounts"]["~/wheels"]
    content["setup_commands"] = [
        command for command in content["setup_commands"] if "uv" not in command.split()[0] and "uv " not in command
    ]
    content["head_setup_commands"], content["worker_setup_commands"] = [], []
    return content


@dataclass
class Cluster:
    """What stands on the laptop, and the hosts."""

    hosts: Hosts
    file: Path
    token: Path
    tunnel: subprocess.Popen[bytes] | None = field(default=None)

    def ray(self, *arguments: str, timeout: float = 180) -> subprocess.CompletedProcess[str]:
        """A command of Ray on the laptop."""
        return self.laptop("ray", *arguments, timeout=timeout)

    def laptop(self, *command: str, timeout: float = 180) -> subprocess.CompletedProcess[str]:
        """A command on the laptop, in the repository."""
        return self.hosts.run(LAPTOP, *self.environment, *command, timeout=timeout)

    @property
    def environment(self) -> list[str]:
        return [
            *("env", "-C", str(ROOT), f"PYTHONPATH={ROOT}", "RAY_UP_enable_autoscaler_v2=0"),
            *("RAY_AUTH_MODE=token", f"RAY_AUTH_TOKEN_PATH={self.token}"),
        ]  # fmt: skip

    def submit(self, command: str, name: str | None = None) -> subprocess.Popen[str]:
        """``ray job submit`` from the laptop through the tunnel."""
        where = ["--address", "http://127.0.0.1:8265", *(["--submission-id", name] if name else [])]
        line = ["ray", "job", "submit", *where, "--", "bash", "-c", f"cd ~/klray && {command}"]
        return subprocess.Popen(
            self.hosts.command(LAPTOP, *self.environment, *line),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def open_tunnel(self) -> None:
        """What ``ray attach -p`` opens: the dashboard and MLflow on the laptop's own loopback."""
        options = [
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            "UserKnownHostsFile=/dev/null",
            "-o",
            "ExitOnForwardFailure=yes",
        ]
        ports = [part for port in (8265, 5000) for part in ("-L", f"{port}:127.0.0.1:{port}")]
        command = ["ssh", "-N", "-i", str(self.hosts.key), *options, *ports, f"root@{self.hosts.address('h0')}"]
        self.tunnel = subprocess.Popen(self.hosts.command(LAPTOP, *command), stdin=subprocess.DEVNULL)

    def close_tunnel(self) -> None:
        if self.tunnel is not None:
            self.tunnel.kill()
            self.tunnel.wait()
            self.tunnel = None


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("hosts")
    hosts = Hosts(folder, [Path(sys.prefix), Path(sys.base_prefix), ROOT])
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    made = Cluster(hosts, folder / "cluster.yaml", token)
    try:
        for name in ("h0", "h1"):
            hosts.boot(name)
        made.file.write_text(yaml.safe_dump(ssh_variant(hosts, ["h1"], token), sort_keys=False))
        up = made.ray("up", "-y", str(made.file), timeout=240)
        assert up.returncode == 0, up.stdout
        live = made.laptop("python", "-m", "klray.check", str(made.file), "--live")
        assert live.returncode == 0, live.stdout
        made.open_tunnel()
        yield made
        down = made.ray("down", "-y", str(made.file))
        assert down.returncode == 0, down.stdout
    finally:
        made.close_tunnel()
        hosts.close()
        shutil.rmtree(folder, ignore_errors=True)


def wait_until(holds: Any, seconds: float, complaint: str) -> None:
    give_up = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < give_up, complaint
        time.sleep(0.5)


def changes(settings: dict[str, Any]) -> str:
    """The command line's form of settings."""
    return " ".join(f"--set {key}={value}" for key, value in settings.items())
