"""What bad input gets: one line with the rule, the value and the way out, exit 2, before Ray starts."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from klray import sample, train
from klray.config import load_config, override, preset_names

MLP = ["network.kind=mlp", "network.width=16"]
TINY = [
    "budget.unit=steps",
    "budget.amount=4",
    "optimizer.batch_size=8",
    "sampling.images=4",
    "sampling.batch_size=4",
    "sampling.num_steps=2",
    "validation.images=8",
    "tracking.uri=off",
]


def run(*argv: str, command: object = train) -> int:
    try:
        return command.main(list(argv))  # type: ignore[attr-defined]
    except SystemExit as stop:
        return int(stop.code or 0)


def ray_runs() -> bool:
    """Whether this process is connected to Ray (other tests of the session may have connected it)."""
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def tiny(*changes: str, name: str = "run", more: Sequence[str] = ()) -> int:
    network = [] if any(change.startswith(("network.kind", "network.channels")) for change in changes) else MLP
    settings = [part for change in (*network, *TINY, *changes) for part in ("--set", change)]
    return run("--config", "digits", "--runner", "local", "--name", name, *settings, *more)


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("KLRAY_DATA", str(tmp_path / "no-data"))


BAD_SETTINGS = {
    "process.num_term=3": "unknown key process.num_term; did you mean process.num_terms?",
    "proces.num_terms=3": "unknown key proces; did you mean process?",
    "process.num_terms=-1": "process.num_terms must be greater than or equal to 0, got -1",
    "process.num_terms=2.5": "process.num_terms must be a valid integer, got 2.5",
    "process.num_terms=many": "process.num_terms must be a valid integer, got 'many'",
    "loss.partial_terms=9": "loss.partial_terms must be <= process.num_terms = 4, got 9; try 4",
    "loss.partial_terms=0": "loss.partial_terms must be greater than 0, got 0",
    "process.marginal=full": "process.marginal must be 'matched', 'truncated' or 'paper', got 'full'",
    "data.name=minst": "data.name must be one of digits, mnist, cifar10, celeba, folder, zip, or module:attribute",
    "optimizer.lr=0": "optimizer.lr must be greater than 0, got 0",
    "optimizer.lr=fast": "optimizer.lr must be a valid number, got 'fast'",
    "budget.unit=epochs": "budget.unit must be 'images', 'network_evals', 'seconds' or 'steps', got 'epochs'",
    "network.channels=[8, 8, 8, 8, 8]": "network.attention needs one value for each of the 5 network.channels",
    "network.term_input=time_offset": "time_offset needs process.time_grid to be a number N, got continuous",
    "precision.compile=1": "precision.compile must be a valid boolean, got 1",
    "data.name=zip": "data.path must be given; set data.path=...",
    "sampling.solver=dddim": "got 'dddim'; the nearest is ddim",
    "sampling.timesteps=uniform": "sampling.timesteps must be one of time_uniform",
    "mesh.basis=3": "mesh.basis must divide the number of workers, 1, got 3; choose 1",
    "mesh.data=2": "mesh.data x mesh.basis must be the number of workers, 1, got 2 x 1; use --workers 2",
    "process.beta_max=0.01": "process.beta_max must be >= beta_min = 0.1 > 0, got 0.01",
    "optimizer.lr": "--set takes key=value, got 'optimizer.lr'; for example optimizer.lr=2e-4",
    "optimizer.lr=[": "the value of --set optimizer.lr is not valid YAML: '['",
    "network.init_from=nowhere": "nowhere; give a run's folder or a checkpoint's",
    "process.num_terms=20000": "process.num_terms must be less than or equal to 1024, got 20000",
    "sampling.images=99999999999": "sampling.images must be less than or equal to 10000, got 99999999999",
    "sampling.num_steps=100000000": "sampling.num_steps must be less than or equal to 10000, got 100000000",
    "data.channels=3": "data.channels must be 1 for these images, got 3",
}


@pytest.mark.parametrize("setting", BAD_SETTINGS)
def test_a_bad_setting_is_one_line_and_exit_2(setting: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = ray_runs()
    assert tiny(setting) == 2
    error = capsys.readouterr().err.strip()
    assert BAD_SETTINGS[setting] in error
    assert error.startswith("klray.train: ")
    assert "\n" not in error
    assert ray_runs() == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config", "digit"], "unknown preset 'digit'; did you mean digits?"),
        (["--config", "missing.yaml"], "cannot read the configuration missing.yaml: No such file or directory"),
        (["--config", "digits", "--workers", "0"], "--workers must be >= 1, got 0"),
        (["--config", "digits", "--runner", "local", "--workers", "2"], "--runner local trains in one process"),
        (["--config", "digits", "--runner", "torchrun"], "--runner torchrun is started by torchrun"),
        (["--config", "digits", "--workers", "3"], "optimizer.batch_size must be a multiple of mesh.data = 3, got 64"),
        (["--config", "digits", "--runner", "cloud"], "invalid choice: 'cloud'"),
        (["--config", "digits", "--runner", "local", "--name", "../up"], "--name must be letters, digits"),
        (["--config", "mnist_small", "--runner", "local"], "set KLRAY_DATA"),
        (["--config", "image_folder"], "data.path must be given; set data.path=..."),
        (
            ["--config", "digits", "--set", "network.init_from=nowhere"],
            "nowhere; give a run's folder or a checkpoint's",
        ),
        (["--config", "digits", "--wide"], "unrecognized arguments: --wide"),
    ],
)
def test_a_bad_command_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*argv) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["network.architecture=wide", "mesh.basis=2"], "mesh.basis must be 1 for network.architecture wide, got 2"),
        (["network.architecture=wide", "loss.term_chunk=1"], "loss.term_chunk must be null"),
        (["network.kind=unet", "network.channels=[3, 5]"], "must be multiples of norm_groups = 8, got [3, 5]"),
        (["network.kind=unet", "data.image_size=9"], "data.image_size must be a multiple of 2 for 2 network.channels"),
        (["process.num_terms=0", "loss.partial_terms=1"], "loss.partial_terms needs process.num_terms > 0"),
        (["process.kind=vp_ensemble", "loss.coupling=separable"], "loss.coupling must be joint"),
        (["process.kind=vp_truncated", "process.num_terms=0"], "needs process.num_terms >= 1, got 0"),
        (["precision.fused=on"], "precision.fused on is for network.kind unet, got mlp; set it to auto"),
        (["network.kind=unet", "precision.fused=on", "precision.compile=true"], "exclude each other"),
    ],
)
def test_settings_that_do_not_go_together(changes: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny(*changes) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2", "process: {num_terms: {x: 1}}", "\x00"])
def test_a_malformed_file(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    assert run("--config", "bad.yaml") == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("20:10", "--profile must be A:B with A < B, got '20:10'; for example 10:20"),
        ("5:5", "--profile must be A:B with A < B, got '5:5'"),
        ("a:b", "--profile must be A:B with A < B, got 'a:b'"),
        ("10", "--profile must be A:B with A < B, got '10'"),
        ("0:1001", "--profile must hold at most 1,000 steps, got 1,001; for example 10:20"),
    ],
)
def test_bad_ranges_to_profile(text: str, complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny(more=["--profile", text]) == 2
    assert complaint in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_profile_is_no_part_of_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny() == 0
    assert tiny("budget.amount=8", more=["--profile", "1:3"]) == 0
    where = Path("runs/run/profile").resolve()
    assert (
        f"the profile of steps 1 to 3 on the CPU is in {where}: kernels.txt, trace.json.gz" in capsys.readouterr().out
    )
    assert {file.name for file in where.iterdir()} == {"kernels.txt", "trace.json.gz"}


def test_every_preset_is_valid_and_dry_runs_describe_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert {"digits", "mnist", "mnist_small", "cifar10", "cifar10_small", "celebahq64", "celebahq128"} <= set(
        preset_names()
    )
    for name in preset_names():
        extra = ["--set", "data.path=x"] if name == "image_folder" else []
        status = run("--config", name, "--dry-run", *extra)
        printed = capsys.readouterr()
        assert status == (0 if name == "digits" else 2), name
        if status:  # its data are not here: said as the run would, after what it would cost
            assert "KLRAY_DATA" in printed.err or "data.path" in printed.err, name
        assert "GFLOP a training image" in printed.out, name
        assert "of training, validation and start-up not counted" in printed.out, name
        if name == "cifar10":
            assert "parameters  35,750,403" in printed.out


def test_a_dry_run_refuses_a_name_that_the_run_would(capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny() == 0
    assert tiny("seed=1", more=["--dry-run"]) == 2
    assert "run exists with another configuration (seed: 0 -> 1)" in capsys.readouterr().err
    assert tiny("budget.amount=8", more=["--dry-run"]) == 0


def test_a_run_says_where_it_goes_on_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny() == 0
    capsys.readouterr()
    assert tiny("budget.amount=8") == 0
    assert "goes on from 32 images (50%)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("every", "how"),
    [(10**9, "There is no checkpoint yet: the same command starts anew."), (8, "goes on from the last")],
)
def test_what_is_said_after_ctrl_c(every: int, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    awaited = "runs/run/run.json" if every > 8 else "runs/run/checkpoints/checkpoint_*"

    def stop(*_: object) -> None:
        if any(Path().glob(awaited)):
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.5, 0.5)
    try:
        assert tiny("budget.amount=1000000", f"checkpoint.every_images={every}") == 130
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert how in capsys.readouterr().err


def test_values_from_the_command_line() -> None:
    config = load_config("digits", ["optimizer.lr=2e-4", "optimizer.betas=[0.9, 0.95]", "process.time_grid=25"])
    assert (config.optimizer.lr, config.optimizer.betas, config.process.time_grid) == (2e-4, (0.9, 0.95), 25)
    assert override(config.model_dump(mode="json"), ()) == config
    assert json.loads(json.dumps(config.flat()))["optimizer.lr"] == 2e-4


def test_the_name_is_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    base = load_config("digits")
    same = load_config("digits", ["budget.amount=5", "mesh.basis=2", "tracking.uri=off", "checkpoint.keep=7"])
    assert same.default_name() == base.default_name()
    assert load_config("digits", ["seed=1"]).default_name() != base.default_name()


def test_one_name_is_one_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny() == 0
    assert "finished run:" in capsys.readouterr().out
    assert tiny() == 0
    assert "has finished" in capsys.readouterr().out
    assert tiny("optimizer.lr=1e-4") == 2
    message = capsys.readouterr().err
    assert "run run exists with another configuration (optimizer.lr: 0.002 -> 0.0001); choose another --name" in message
    assert tiny("budget.amount=2") == 2
    assert "larger budget (4 -> 2 steps)" in capsys.readouterr().err
    assert tiny("budget.amount=7") == 0
    assert "56 images" in capsys.readouterr().out  # the larger budget went on to 7 steps of 8


def altered(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:40])


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (altered, "training.safetensors"),
        (truncated, "network/diffusion_pytorch_model.safetensors"),
        (Path.unlink, "state.json"),
        (Path.unlink, "manifest.json"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(
    damage: Callable[[Path], None], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run goes on from the one before, to the same weights bit for bit."""
    assert tiny("checkpoint.every_images=16") == 0
    last = max(Path("runs/run/checkpoints").glob("checkpoint_*"))
    weights = last / "network" / "diffusion_pytorch_model.safetensors"
    expected = weights.read_bytes()
    damage(last / name)
    assert tiny("checkpoint.every_images=16") == 0
    printed = capsys.readouterr().out
    assert str(last) in printed and "; trying the checkpoint before it" in printed
    assert "finished run" in printed
    assert weights.read_bytes() == expected


def test_a_deleted_checkpoint_is_made_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny("checkpoint.every_images=16") == 0
    last = max(Path("runs/run/checkpoints").glob("checkpoint_*"))
    weights = last / "network" / "diffusion_pytorch_model.safetensors"
    expected = weights.read_bytes()
    shutil.rmtree(last)
    assert tiny("checkpoint.every_images=16") == 0
    assert weights.read_bytes() == expected


def test_a_run_with_only_damaged_checkpoints_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny("checkpoint.every_images=16") == 0
    both = sorted(Path("runs/run/checkpoints").glob("checkpoint_*"))
    assert len(both) == 2
    for checkpoint in both:
        truncated(checkpoint / "state.json")
    assert tiny("checkpoint.every_images=16") == 2
    assert "is whole; remove them to start anew" in capsys.readouterr().err
    assert all(checkpoint.exists() for checkpoint in both)


def test_sampling(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert tiny() == 0
    how = ["--checkpoint", "runs/run", "--nfe", "3", "--batch-size", "4"]
    assert run(*how, "--seeds", "0-7", "--out", "a.png", command=sample) == 0
    assert run(*how, "--seeds", "0-7", "--out", "sub/b.png", command=sample) == 0
    assert Path("a.png").read_bytes() == Path("sub/b.png").read_bytes()
    assert run(*how, "--seeds", "8-15", "--out", "c.png", command=sample) == 0
    assert Path("a.png").read_bytes() != Path("c.png").read_bytes()
    assert "ddim, logsnr, 3 NFE, 12 network evaluations an image" in capsys.readouterr().out
    for wrong, message in (
        (["--checkpoint", "nowhere"], "no checkpoint at nowhere"),
        (["--checkpoint", str(tmp_path)], "torn or no checkpoint"),
        ([*how, "--seeds", "9-3"], "--seeds must be A-B with A <= B"),
        ([*how, "--solver", "euler"], "sampling.solver must be one of ddim"),
        (["--checkpoint", "runs/run", "--nfe", "0"], "sampling.nfe must be greater than 0, got 0"),
        ([*how, "--export", "pipe"], "only a wide model with prediction term folds"),
    ):
        assert run(*wrong, command=sample) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.strip().splitlines()) == 1


def test_names_of_solvers_and_grids_may_be_written_in_capitals() -> None:
    settings = load_config("digits", ["sampling.solver=DDIM", "sampling.timesteps=LogSNR"]).sampling
    assert (settings.solver, settings.timesteps) == ("ddim", "logsnr")
    own = load_config("digits", ["sampling.timesteps=Grids/My.json"]).sampling
    assert own.timesteps == "Grids/My.json"
