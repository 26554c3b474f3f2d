"""Tests of examples/quadratic: dynamics, the paper's guarantees, and the command."""

import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("tyro")

from examples.quadratic.__main__ import Config, Run, main, rises, run, table
from examples.quadratic.dynamics import hamiltonian, trajectory

ROOT = Path(__file__).parents[2]


def test_gradient_descent_matches_its_closed_form() -> None:
    """Check w_t = (1 - lr a)^t w_0, and that there is no kinetic energy."""
    actual = run(Config(30.0, 0.02, steps=40, start=(1.0, -2.0)))["gradient descent"]
    t = np.arange(41)[:, None]
    expected = (1 - 0.02 * np.array([1.0, 30.0])) ** t * np.array([1.0, -2.0])
    np.testing.assert_allclose(actual.points, expected, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(actual.losses, expected**2 @ [0.5, 15.0], rtol=1e-4)
    np.testing.assert_array_equal(actual.hamiltonians, actual.losses)


def test_hamiltonian_adds_the_kinetic_energy_of_the_momentum() -> None:
    """Check one step by hand: f = (1 + 10 * 4) / 2, m = (1, 20), then w = (0.9, 0)."""
    path = trajectory(optax.sgd(0.1, 0.9), jnp.array([1.0, 2.0]), 10.0, 1)
    np.testing.assert_allclose(path.momenta, [[0, 0], [1, 20]])
    energy = hamiltonian(path, 10.0, 0.1)
    np.testing.assert_allclose(energy, [20.5, 0.81 / 2 + 0.1 * 401 / 2], rtol=1e-6)


def test_cautious_momentum_matches_the_rule_of_the_paper() -> None:
    """Check the updates against the rule in NumPy, including frozen coordinates."""
    config = Config(steps=60)
    rate, curvature = config.learning_rate, np.array([1.0, config.condition])
    w, m, points, frozen = np.ones(2), np.zeros(2), [np.ones(2)], 0
    for _ in range(config.steps):
        gradient = curvature * w
        m = config.momentum * m + gradient
        mask = m * gradient > 0
        w = w - rate * m * mask / mask.mean()
        points.append(w)
        frozen += int(np.sum(~mask))
    assert 10 < frozen < 60
    actual = run(config)["cautious momentum"].points
    np.testing.assert_allclose(actual, points, rtol=1e-3, atol=1e-5)


@pytest.fixture(
    scope="module", params=[(1.0, 1.0), (-0.7, 1.3), (1.5, -0.5), (0.6, 0.6)]
)
def runs(request: pytest.FixtureRequest) -> dict[str, Run]:
    """Run at the default learning rate and momentum, from several starting points."""
    return run(Config(start=request.param))


def test_only_plain_momentum_raises_the_loss(runs: dict[str, Run]) -> None:
    """Check the guarantee on the loss."""
    assert rises(runs["momentum"].losses) > 10
    assert rises(runs["cautious momentum"].losses) == 0
    assert rises(runs["gradient descent"].losses) == 0


def test_no_method_raises_the_hamiltonian(runs: dict[str, Run]) -> None:
    """Check the guarantee on the Hamiltonian, and that its kinetic part is nonzero."""
    for name, r in runs.items():
        assert rises(r.hamiltonians) == 0, name
    cautious = runs["cautious momentum"]
    assert np.all(cautious.hamiltonians[1:] > cautious.losses[1:])


def test_cautious_momentum_reaches_the_lowest_loss(runs: dict[str, Run]) -> None:
    """Check that freezing the steep coordinate speeds up the flat one."""
    final = {name: r.losses[-1] for name, r in runs.items()}
    assert final["cautious momentum"] < 1e-2 * final["momentum"]
    assert final["momentum"] < 1e-2 * final["gradient descent"]


def test_a_large_learning_rate_breaks_both_guarantees() -> None:
    """Check that the guarantees, which hold for small steps, can fail."""
    cautious = run(Config(learning_rate=0.02))["cautious momentum"]
    assert rises(cautious.losses) > 0
    assert rises(cautious.hamiltonians) > 0


def test_rises_counts_increases_and_steps_to_nan() -> None:
    """Check that a diverged run counts as increasing."""
    assert rises(np.array([3.0, 2.0, 2.0, 2.5, 1.0, 4.0])) == 2
    assert rises(np.array([1.0, np.nan, np.nan])) == 2


def test_table_counts_steps_from_the_start() -> None:
    """Check that losses[t] is the loss after t steps, and "-" means never."""
    points = np.zeros((4, 2))
    fast = Run(points, np.array([4.0, 5.0, 4e-6, 1e-6]), np.array([4.0, 5.0, 6.0, 1.0]))
    slow = Run(points, np.array([4.0, 3.0, 2.0, 1.0]), np.array([4.0, 3.0, 2.0, 1.0]))
    _, *rows = table({"fast": fast, "slow": slow}).splitlines()
    assert rows[0].split() == ["fast", "1.00e-06", "2", "1", "2"]
    assert rows[1].split() == ["slow", "1.00e+00", "-", "0", "0"]


def test_one_command_prints_the_table_and_writes_the_figure(tmp_path: Path) -> None:
    """Check the output, and that the directory of the figure is created."""
    output = tmp_path / "new" / "folder" / "figure.png"
    process = subprocess.run(
        [sys.executable, "-m", "examples.quadratic", "--output", str(output)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert output.read_bytes().startswith(b"\x89PNG")
    _, *rows, last = process.stdout.splitlines()
    name_and_rises = [(row[:17].strip(), *row.split()[-2:]) for row in rows]
    assert name_and_rises == [
        ("gradient descent", "0", "0"),
        ("momentum", "25", "0"),
        ("cautious momentum", "0", "0"),
    ]
    assert last == f"figure: {output}"


def test_the_command_line_reaches_the_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check that every option reaches `run`."""
    options = (
        "--condition 20 --learning-rate 0.004 --momentum 0.8 --steps 70 --start 2 -3"
    )
    output = tmp_path / "figure.png"
    main([*options.split(), "--output", str(output)])
    config = Config(20.0, 0.004, 0.8, 70, (2.0, -3.0))
    assert capsys.readouterr().out.startswith(table(run(config)) + "\n")
    assert output.exists()


def test_a_diverged_run_is_plotted(tmp_path: Path) -> None:
    """Check that a far too large learning rate still produces a figure."""
    output = tmp_path / "figure.png"
    main(["--learning-rate", "1", "--output", str(output)])
    assert output.exists()


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("condition", ["0.5"]),
        ("condition", ["inf"]),
        ("learning-rate", ["0"]),
        ("learning-rate", ["-0.1"]),
        ("learning-rate", ["nan"]),
        ("momentum", ["1"]),
        ("momentum", ["-0.1"]),
        ("momentum", ["nan"]),
        ("steps", ["0"]),
        ("start", ["0", "0"]),
        ("start", ["1", "nan"]),
    ],
)
def test_an_invalid_argument_is_reported(
    option: str,
    values: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Check that the command names the argument and exits before it writes."""
    output = tmp_path / "figure.png"
    with pytest.raises(SystemExit) as stop:
        main([f"--{option}", *values, "--output", str(output)])
    assert stop.value.code == 2
    assert f"{option.replace('-', '_')} must be" in capsys.readouterr().err
    assert not output.exists()
