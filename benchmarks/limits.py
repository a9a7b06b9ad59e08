"""What a study's single places can take: Optuna's file, an MLflow server on sqlite, the object store of one machine.

python benchmarks/limits.py --out result.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
import optuna

SIZES = (10, 100, 1000)
METRICS = 12  # that a run records at a time


def optuna_seconds(folder: Path) -> dict[str, float]:
    """Of one ask and tell by TPE over three parameters, as so many trials are finished."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(storage=f"sqlite:///{folder}/optuna.db", sampler=optuna.samplers.TPESampler(seed=0))
    found, seconds = {}, []
    for number in range(max(SIZES) + 10):
        began = time.perf_counter()
        trial = study.ask()
        value = trial.suggest_float("lr", 1e-4, 1e-2, log=True) + trial.suggest_int("k", 1, 8)
        trial.suggest_categorical("m", [0, 1, 2, 4, 8])
        study.tell(trial, value)
        seconds.append(time.perf_counter() - began)
        if number + 1 - 10 in SIZES:
            found[f"{number + 1 - 10} trials"] = median(seconds[-10:])
    return found


def mlflow_rates(folder: Path) -> dict[str, float]:
    """Metrics a second that a server on sqlite takes from one client, in batches of a run's records."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "2"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "art")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            _wait_for(f"http://127.0.0.1:{port}/health")
            client = MlflowClient(f"http://127.0.0.1:{port}")
            run = client.create_run(client.create_experiment("limits")).info.run_id
            found = {}
            for size in (METRICS, 1000):
                count, began = 0, time.perf_counter()
                while time.perf_counter() - began < 5:
                    now = int(time.time() * 1000)
                    client.log_batch(run, [Metric(f"m{i % METRICS}", 1.0, now, count + i) for i in range(size)])
                    count += size
                found[f"{size} at a time"] = count / (time.perf_counter() - began)
        finally:
            server.terminate()
    return found


def store_rates() -> dict[str, float]:
    """Bytes a second into Ray's object store, and seconds until a worker of the same machine has them."""
    from klray.cluster.connect import connect

    connect()
    import ray

    @ray.remote
    def last(array: np.ndarray) -> int:
        return int(array[-1])

    images = np.zeros(150 * 2**20, np.uint8)  # CIFAR10's size
    ray.get(last.remote(images[:1]))
    began = time.perf_counter()
    reference = ray.put(images)
    put = time.perf_counter() - began
    began = time.perf_counter()
    ray.get(last.remote(reference))
    got = time.perf_counter() - began
    ray.shutdown()
    return {"put, bytes/s": images.nbytes / put, "seen by a worker after, s": got}


def _wait_for(url: str) -> None:
    for _ in range(600):
        try:
            urllib.request.urlopen(url, timeout=1)
            return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(f"{url} does not answer")


def main(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        result = {
            "date": date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": {package: version(package) for package in ("ray", "optuna", "mlflow")},
            "optuna, seconds of an ask and tell after": optuna_seconds(Path(name)),
            "mlflow, metrics/s": mlflow_rates(Path(name)),
            "object store": store_rates(),
        }
    print(json.dumps(result, indent=1))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    main(parser.parse_args())
