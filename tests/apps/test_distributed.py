"""Several processes: two that gloo joins do what one does on the joined batches, and stop, fail and go on together."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from apps_standins import made_up_data, tiny_network
from torch import Tensor, nn

from spectriton import distributed, models
from spectriton import train as st
from spectriton.budget import BudgetController, packed_bytes
from spectriton.compare import CompareConfig, compare
from spectriton.images import Augmentation, ImageData
from spectriton.sweep import sweep
from spectriton.train import Checkpoint, TrainConfig, train

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")

VARIANTS = ("spatial", "spectral")
# Shares of 7 and 6 images, and in a last batch of 5 of 2 and 3.
CONFIG = TrainConfig(epochs=2, batch_size=13, device="cpu", seed=3)
COMPARE = CompareConfig(data="made-up", train=TrainConfig(epochs=1, batch_size=16, device="cpu"))


def images() -> ImageData:
    return dataclasses.replace(made_up_data(train=44, test=15, size=12), augmentation=Augmentation(2, True))


def lenet(variant: str) -> nn.Module:
    torch.manual_seed(0)
    return models.build("lenet", variant, in_channels=1, image_size=12)


def some_steps(variant: str) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """The gradients of each step of an epoch and the parameters after it, in double precision."""
    data, model = images(), lenet(variant).double()
    called, optimizer = distributed.parallel(model), st.make_optimizer(model, CONFIG)
    gradients = []
    for batch, labels, weight in st._training_batches(data, CONFIG, torch.device("cpu"), epoch=0, skip=0):
        st.training_step(called, optimizer, data.to_input(batch).double(), labels, weight=weight)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    return gradients, model.state_dict()


def a_run(variant: str) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    model = lenet(variant)
    return train(model, images(), CONFIG).history, model.state_dict()


def cut_short(path: Path) -> dict[str, Any]:
    """A run with every kind of state, and one that rank 1 asks to stop in the second epoch and that then goes on."""

    def run(checkpoint: Path | None, stop: threading.Event | None = None) -> tuple[Any, dict[str, Tensor]]:
        torch.manual_seed(0)
        model, forwards = tiny_network(threshold=0.3), itertools.count(1)
        if stop is not None and distributed.rank() == 1:
            # An epoch is four steps, and a test of two batches.
            model.register_forward_hook(lambda *_: stop.set() if next(forwards) == 8 else None)
        history = train(model, images(), CONFIG, checkpoint=checkpoint, stop=stop).history
        return history, model.state_dict()

    return {
        "whole": run(None),
        "stopped": said(lambda: run(path, threading.Event())),
        "resumed": run(path),
    }


def budgeted() -> list[Any]:
    """A few epochs under a budget; each process has images of its own, and reports what it saw and took."""
    model = lenet("spectral")
    controller = BudgetController(model, saved_ratio=0.2)
    train(model, images(), dataclasses.replace(CONFIG, epochs=6), controller=controller)
    model(images().to_input(images().train_images[distributed.share(44)]))
    return [controller.state_dict(), controller.thresholds(), packed_bytes(model)]


def said(call: Callable[[], object]) -> tuple[str, str]:
    """Kind and message of the error that a call ends in."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def full_disk() -> None:
    raise OSError("no space left")


def different_files(out: Path) -> None:
    """The main process finds the checkpoint of the first run; the other has a file of its own, which no one wrote."""
    for _ in range(2):
        train(lenet("spatial"), images(), CONFIG, checkpoint=out / f"apart-{distributed.rank()}.pt")


def everything(out: Path) -> None:
    """What each of the two processes does; the tests look at what it writes."""
    torch.set_num_threads(1)
    with distributed.joined():
        rank, data = distributed.rank(), images()
        found = {
            "steps": {variant: some_steps(variant) for variant in VARIANTS},
            "runs": {variant: a_run(variant) for variant in VARIANTS},
            "budget": budgeted(),
            "cut": cut_short(out / "cut.pt"),
            "compare": compare(COMPARE, out / "compare", data=data, plots=False, peers=["checkpoint"]),
            "sweep": [sweep(COMPARE, out / "sweep", thresholds=[0.5], data=data, plots=False) for _ in range(2)],
            "shares": [distributed.share(count) for count in (0, 1, 5, 6)],
            "flags": distributed.any_rank(rank == 1, False),
            "total": distributed.total([rank, 1 << 40]),
            "gathered": distributed.gather(rank),
            "on main": distributed.on_main(distributed.rank),
            "full disk": said(lambda: distributed.on_main(full_disk)),
            "diverged": said(lambda: train(lenet("spatial"), data, dataclasses.replace(CONFIG, lr=1e38))),
            "too small": said(lambda: train(lenet("spatial"), data, dataclasses.replace(CONFIG, batch_size=1))),
            "different files": said(lambda: different_files(out)),
        }
        torch.save(found, out / f"rank-{rank}.pt")


class Tell(st.Silent):
    def step(self, epoch: int, batch: int) -> None:
        print(epoch, batch, flush=True)


def go_on(out: Path) -> None:
    """The run of :func:`cut_short`, from wherever it is."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with distributed.joined():
        model, checkpoint = tiny_network(threshold=0.3), Checkpoint(out / "killed.pt", every_seconds=0)
        history = train(model, images(), CONFIG, checkpoint=checkpoint, progress=Tell()).history
        if distributed.is_main():
            torch.save((history, model.state_dict()), out / "finished.pt")


def start(function: str, out: Path) -> list[subprocess.Popen[str]]:
    """Two processes that join and call a function of this module."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from pathlib import Path; "
        f"import test_distributed; test_distributed.{function}(Path(sys.argv[1]))"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    shared["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, str(out)],
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    """The results of both processes, and the folder that they shared."""
    out = tmp_path_factory.mktemp("ranks")
    processes = start("everything", out)
    printed = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(printed)
    return [torch.load(out / f"rank-{rank}.pt", weights_only=False) for rank in range(2)], out


def close(found: Any, expected: Any, tolerance: float) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def timeless(value: Any) -> Any:
    """Without what differs from run to run."""
    if isinstance(value, dict):
        return {key: timeless(entry) for key, entry in value.items() if "seconds" not in key}
    return [timeless(entry) for entry in value] if isinstance(value, list) else value


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_and_parameters_are_those_of_one_process(ranks: Any, variant: str) -> None:
    expected = some_steps(variant)
    assert len(expected[0]) == 4 and all(step.keys() == expected[1].keys() for step in expected[0])
    for found in ranks[0]:
        close(found["steps"][variant], expected, 1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_is_that_of_one_process(ranks: Any, variant: str) -> None:
    history, state = a_run(variant)
    for found in ranks[0]:
        close(found["runs"][variant][1], state, 1e-6)
        close(timeless(found["runs"][variant][0]), timeless(history), 1e-6)


def test_all_stop_together_and_go_on_to_the_same_bytes(ranks: Any) -> None:
    for found in ranks[0]:
        cut = found["cut"]
        assert cut["stopped"] == ("Interrupted", "stopped in epoch 2 after 2 of 4 steps")
        assert timeless(cut["resumed"][0]) == timeless(cut["whole"][0])
    # Running statistics among them, which are means over the processes.
    states = [found["cut"][run][1] for found in ranks[0] for run in ("whole", "resumed")]
    assert all(torch.equal(state[name], states[0][name]) for state in states for name in states[0])


def test_the_main_process_writes_one_report(ranks: Any) -> None:
    found, out = ranks
    assert found[0]["compare"] == found[1]["compare"] == json.loads((out / "compare" / "report.json").read_text())
    assert found[0]["sweep"] == found[1]["sweep"] and timeless(found[0]["sweep"][0]) == timeless(found[0]["sweep"][1])
    assert not list(out.rglob("*.partial"))
    report = found[0]["compare"]
    assert report["config"]["processes"] == 2
    assert [(row["variant"], row["peer"]) for row in report["peers"]] == [
        ("spatial", "none"), ("spatial", "checkpoint"), ("spectral", "none"), ("spectral", "checkpoint"),
    ]  # fmt: skip
    assert all(row["gradient_difference"] == 0 for row in report["peers"])
    alone = compare(COMPARE, out / "alone", data=images(), plots=False)
    for variant in VARIANTS:
        assert report[variant]["test_accuracy"] == alone[variant]["test_accuracy"]
        assert report[variant]["saved_bytes"] < 0.7 * alone[variant]["saved_bytes"]  # of half a batch


def test_what_a_group_is_made_of(ranks: Any) -> None:
    first, second = ranks[0]
    assert first["shares"] == [slice(0, 0), slice(0, 0), slice(0, 2), slice(0, 3)]
    assert second["shares"] == [slice(0, 0), slice(0, 1), slice(2, 5), slice(3, 6)]
    assert first["flags"] == second["flags"] == (True, False)
    assert first["total"] == second["total"] == [1, 1 << 41]
    assert first["gathered"] == second["gathered"] == [0, 1]
    assert first["on main"] == second["on main"] == 0


def test_a_budget_moves_the_thresholds_of_all_processes_alike(ranks: Any) -> None:
    (state, levels, used), (other_state, other_levels, other_used) = (found["budget"] for found in ranks[0])
    assert state == other_state and levels == other_levels and state["change"] != 0
    assert used != other_used
    half = models.build("lenet", "spectral", in_channels=1, image_size=12)
    half(images().to_input(images().train_images[:22]))
    sizes = [getattr(layer, "last_packed", None) for layer in half.modules()]
    dense = sum(size.dense_nbytes for size in sizes if size is not None)
    assert (used + other_used) / 2 == pytest.approx(0.2 * dense, rel=0.1)


def test_no_process_is_left_waiting_for_one_that_failed(ranks: Any) -> None:
    first, second = ranks[0]
    assert first["full disk"] == ("OSError", "no space left") and second["full disk"][0] == "FailedOnMain"
    for found in ranks[0]:
        assert found["diverged"][0] == "Diverged"
        assert found["too small"][0] == "ValueError" and "one for each process" in found["too small"][1]
        assert found["different files"][0] == "ValueError" and "all machines share" in found["different files"][1]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_when_one_is_killed_the_other_ends_and_the_run_goes_on_to_the_same_bytes(ranks: Any, tmp_path: Path) -> None:
    first, second = start("go_on", tmp_path)
    assert first.stdout is not None
    with first, second:
        for printed in first.stdout:
            if printed.strip() == "1 1":
                second.send_signal(signal.SIGKILL)
                break
        assert first.wait(timeout=60) not in (0, None) and not (tmp_path / "finished.pt").exists()
    for process in start("go_on", tmp_path):
        printed = process.communicate(timeout=60)[0]
        assert process.returncode == 0, printed
        assert "0 3" not in printed
    history, state = torch.load(tmp_path / "finished.pt", weights_only=True)
    expected = ranks[0][0]["cut"]["whole"]
    assert timeless(history) == timeless(expected[0])
    assert all(torch.equal(state[name], expected[1][name]) for name in expected[1])


def test_one_process_is_a_world_of_one() -> None:
    with distributed.joined():
        assert (distributed.world_size(), distributed.rank(), distributed.is_main()) == (1, 0, True)
        assert distributed.share(5) == slice(0, 5)
        assert distributed.any_rank(True, False) == (True, False)
        assert distributed.total([3, 4]) == [3, 4]
        model = nn.Linear(1, 1)
        assert distributed.parallel(model) is model
        with pytest.raises(OSError, match="no space"):
            distributed.on_main(full_disk)


def test_a_checkpoint_of_another_number_of_processes_is_refused(ranks: Any) -> None:
    with pytest.raises(ValueError, match=r"processes=2.*processes=None"):
        train(tiny_network(threshold=0.3), images(), CONFIG, checkpoint=ranks[1] / "cut.pt")
