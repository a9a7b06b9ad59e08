"""Hosts on one machine, made of Linux namespaces: each has its address, name, processes, /tmp, home and SSH server.

A bridge without an uplink joins them, so nothing leaves the machine. They share its kernel, clock and cores, and one
folder, which every host sees as ~/klray. All of them die with the process that made them.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LAPTOP = "laptop"
_NAMESPACES = ["--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
_NEEDED = ("sshd", "rsync", "ip", "unshare", "nsenter", "setpriv", "ssh-keygen")

# $1 name, $2 address, $3 the host's folder, $4 the folder that all share; the rest: paths to be seen as they are.
_INIT = """
set -eu
name=$1 address=$2 own=$3 share=$4; shift 4
mount --make-rprivate /
mkdir -p "$own/home/klray" "$own/tmp"
mount --bind "$share" "$own/home/klray"
for path in "$@"; do
  case $path in
    /tmp/*) mkdir -p "$own$path"; mount --bind "$path" "$own$path" ;;
    "$HOME"/*) mkdir -p "$own/home${path#"$HOME"}"; mount --bind "$path" "$own/home${path#"$HOME"}" ;;
  esac
done
mount --rbind "$own/home" "$HOME"
mount --rbind "$own/tmp" /tmp; chmod 1777 /tmp
mount -t tmpfs -o size=16m,mode=755 tmpfs /run; mkdir -p /run/sshd
mount -t tmpfs -o size=9g,mode=1777 tmpfs /dev/shm
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts /dev/pts
mount --bind /dev/pts/ptmx /dev/ptmx
hostname "$name"
for file in hosts resolv.conf nsswitch.conf; do mount --bind "$own/../$file" "/etc/$file"; done
ip link set lo up
touch "$own/ready"
if [ "$name" = laptop ]; then
  ip link add bridge type bridge; ip addr add "$address/24" dev bridge; ip link set bridge up
else
  until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
  ip addr add "$address/24" dev eth0; ip link set eth0 up
  ip route add default via 10.77.0.254  # it leads nowhere, but lets a host find its own address
  /usr/sbin/sshd -e -f /dev/null -h "$own/../host_key" -o UsePAM=no -o PasswordAuthentication=no -o StrictModes=no \
    -o PermitRootLogin=prohibit-password -o ListenAddress="$address" -o PidFile=/run/sshd.pid -o MaxStartups=100
fi
touch "$own/up"
while :; do sleep 3600 & wait $! || true; done
"""


def missing() -> str | None:
    """Why hosts cannot be made here, if so."""
    if os.geteuid() != 0:
        return "hosts made of namespaces need root"
    absent = [tool for tool in _NEEDED if shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    return f"hosts need {', '.join(absent)} (Debian: openssh-server rsync iproute2 util-linux)" if absent else None


class Hosts:
    """A laptop, 10.77.0.254, and hosts h0, h1, ... at 10.77.0.1, 10.77.0.2, ..."""

    def __init__(self, folder: Path, seen: Sequence[Path]) -> None:
        """``seen``: folders that every host sees where they are, though its /tmp and home are its own."""
        self.folder = folder
        self.share = folder / "share"
        self.key = folder / "key"
        self._seen = [str(path) for path in [folder, *seen]]
        self._outer: dict[str, subprocess.Popen[bytes]] = {}
        self.share.mkdir(parents=True)
        names = "".join(f"10.77.0.{index + 1} h{index}\n" for index in range(5))
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n10.77.0.254 {LAPTOP}\n{names}")
        (folder / "resolv.conf").touch()  # a server that cannot be reached would cost 10 s a name
        (folder / "nsswitch.conf").write_text("hosts: files\n")
        for name in ("key", "host_key"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "throwaway", "-f", str(folder / name)]
            subprocess.run(command, check=True)
        self.boot(LAPTOP)

    @staticmethod
    def address(name: str) -> str:
        return "10.77.0.254" if name == LAPTOP else f"10.77.0.{int(name[1:]) + 1}"

    def boot(self, name: str) -> None:
        """Starts a host, again after it was killed: its disk is what it was, its /run and /dev/shm are empty."""
        own = self.folder / name
        home = own / "home"
        (home / ".ssh").mkdir(parents=True, exist_ok=True, mode=0o700)
        (home / ".ray").mkdir(exist_ok=True)
        shutil.copy(f"{self.key}.pub", home / ".ssh" / "authorized_keys")
        if not (home / "venv").exists():
            (home / "venv").symlink_to(sys.prefix)
        # Beside what the cluster file's own commands write there: nothing here may use all cores, or ask outside.
        if not (home / ".bashrc").exists():
            (home / ".bashrc").write_text("export PATH=$HOME/venv/bin:$PATH OMP_NUM_THREADS=1\n")
        (home / ".profile").write_text(". ~/.bashrc\n")
        for mark in ("ready", "up"):
            (own / mark).unlink(missing_ok=True)
        log = (own / "log").open("ab")
        arguments = ["bash", "-c", _INIT, "host", name, self.address(name), own, self.share, *self._seen]
        self._outer[name] = subprocess.Popen(
            [str(part) for part in ["setpriv", "--pdeathsig", "KILL", "unshare", *_NAMESPACES, *arguments]],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={"HOME": os.environ["HOME"], "PATH": self._path()},
            start_new_session=True,
        )
        _until((own / "ready").exists, 10, f"{name} does not start; see {own / 'log'}")
        if name != LAPTOP:
            # A rebooted machine keeps its hardware address; with a new one its neighbours would not reach it at first.
            card = f"02:00:0a:4d:00:{int(name[1:]) + 1:02x}"
            link = f"ip link add v-{name} type veth peer name eth0 address {card} netns {self._init(name)}"
            self._bridge(f"ip link del v-{name} 2>/dev/null; {link} && ip link set v-{name} master bridge up")
        _until((own / "up").exists, 10, f"{name} does not come up; see {own / 'log'}")

    def kill(self, name: str) -> None:
        """Its power is cut."""
        os.kill(self._init(name), signal.SIGKILL)
        self._outer.pop(name).wait()

    def cut(self, name: str) -> None:
        """Its cable is pulled."""
        self._bridge(f"ip link set v-{name} down")

    def heal(self, name: str) -> None:
        """And put back."""
        self._bridge(f"ip link set v-{name} up")

    def command(self, name: str, *command: str) -> list[str]:
        """A command line that runs ``command`` on a host, in a login's environment."""
        variables = [f"HOME={os.environ['HOME']}", f"PATH={self._path()}", "LANG=C.UTF-8", "TERM=dumb"]
        enter = ["nsenter", "-t", str(self._init(name)), "-n", "-m", "-u", "-i", "-p"]
        return [*enter, "env", "-i", *variables, "OMP_NUM_THREADS=1", "RAY_USAGE_STATS_ENABLED=0", *command]

    def run(self, name: str, *command: str, timeout: float = 120, **options: Any) -> subprocess.CompletedProcess[str]:
        """Runs a command there to its end."""
        return subprocess.run(
            self.command(name, *command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            **options,
        )

    def close(self) -> None:
        """Ends every process of every host. Their mounts go with them."""
        for name in list(self._outer):
            self.kill(name)

    def _init(self, name: str) -> int:
        """The process id, here, of a host's first process."""
        outer = self._outer[name].pid
        return int(Path(f"/proc/{outer}/task/{outer}/children").read_text().split()[0])

    def _bridge(self, script: str) -> None:
        # Only the laptop's network, so that process ids are those of here.
        enter = ["nsenter", "-t", str(self._init(LAPTOP)), "-n", "bash", "-c", script]
        subprocess.run(enter, check=True, env={"PATH": self._path()})

    @staticmethod
    def _path() -> str:
        return f"{sys.prefix}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def _until(holds: Any, seconds: float, complaint: str) -> None:
    give_up = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > give_up:
            raise TimeoutError(complaint)
        time.sleep(0.02)
