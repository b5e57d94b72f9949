"""The console command ``spectriton``. Everything it does can be called from Python as well: ``spectriton.compare``."""

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, TypeAlias

import torch

from spectriton import __version__, distributed, environment

#: Set to anything, an error shows its traceback instead of a panel.
TRACEBACK_VARIABLE = "SPECTRITON_TRACEBACK"
_USER_ERRORS = (ValueError, TypeError, ImportError, OSError, ArithmeticError)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; always ends in ``SystemExit``.

    Exit status: 0 when done, 1 when training diverged, 2 for what the user can put right (options, files, checkpoints,
    missing packages), 130 when interrupted.
    """
    try:
        app = build_app()
    except ImportError as error:
        print(f"spectriton: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    app(args=None if arguments is None else list(arguments), prog_name="spectriton")


@contextmanager
def _user_errors() -> Iterator[None]:
    """Show an error that the user can put right as a panel on standard error, and end with its status."""
    from spectriton.train import Diverged, Interrupted

    try:
        yield
    except Interrupted as error:
        if distributed.is_main():
            print(f"{error}; run the same command again to go on from there", file=sys.stderr)
        raise SystemExit(130) from None
    except distributed.FailedOnMain:
        raise SystemExit(2) from None  # rank 0 has said how
    except _USER_ERRORS as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        _show_error(str(error) if distributed.is_main() else f"rank {distributed.rank()}: {error}")
        raise SystemExit(1 if isinstance(error, Diverged) else 2) from None


def _show_error(message: str) -> None:
    try:
        console = environment.require("rich.console").Console(stderr=True)
        panel, text = environment.require("rich.panel"), environment.require("rich.text")
    except ImportError:
        print(f"Error: {message}", file=sys.stderr)
        return
    if console.is_terminal:
        console.print(panel.Panel(text.Text(message), title="Error", title_align="left", border_style="red"))
    else:
        # Unwrapped, so that logs can be searched.
        print(f"Error: {message}", file=sys.stderr)


@contextmanager
def _stop_on_signals() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; a second one ends the process at once."""
    event = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()
        if distributed.is_main():
            print("\nstopping after this step; once more to stop at once", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _parse_list(option: str, text: str | None, kind: type, example: str) -> list[Any] | None:
    if text is None:
        return None
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        numbers = "whole numbers" if kind is int else "numbers"
        raise ValueError(
            f"spectriton: {option} got {text!r}, expected {numbers} with commas between; give {option} {example}"
        ) from None


def _parse_seeds(text: str | None) -> list[int] | None:
    return _parse_list("--seeds", text, int, "0,1,2")


def _configuration(options: dict[str, Any]) -> Any:
    """The :class:`spectriton.compare.CompareConfig` of a command's options; other options are passed over."""
    from spectriton.compare import CompareConfig
    from spectriton.train import TrainConfig

    def of(kind: Any) -> dict[str, Any]:
        return {f.name: options[f.name] for f in fields(kind) if f.name in options}

    return CompareConfig(**of(CompareConfig), train=TrainConfig(**of(TrainConfig)))


def build_app() -> Any:
    """The typer application.

    Raises:
        ImportError: typer is not installed.
    """
    environment.require("typer")
    environment.require("rich")
    import typer

    from spectriton import data as data_sets
    from spectriton import models
    from spectriton.peers import PEERS

    app = typer.Typer(
        help="Train CNNs whose feature maps live as packed sparse spectra.",
        epilog=f"With {TRACEBACK_VARIABLE}=1 set, errors show where they come from.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    def show_version(asked: bool) -> None:
        if asked:
            print(f"spectriton {__version__}")
            raise typer.Exit

    @app.callback()
    def common(
        version: Annotated[
            bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")
        ] = False,
    ) -> None:
        pass

    data_panel, recipe_panel, run_panel = "Network and data", "Recipe (the defaults are the paper's)", "Run"
    Model: TypeAlias = Annotated[
        str, typer.Option(help=f"Network: {', '.join(models.NETWORKS)}.", rich_help_panel=data_panel)
    ]
    Data: TypeAlias = Annotated[
        str,
        typer.Option(
            help=f"Data set: {', '.join(data_sets.names())}; digits needs no files.", rich_help_panel=data_panel
        ),
    ]
    Threshold: TypeAlias = Annotated[
        float,
        typer.Option(help="Modulus below which a coefficient is dropped (beta).", rich_help_panel=data_panel),
    ]
    ValueDtype: TypeAlias = Annotated[
        str | None,
        typer.Option(
            help="How kept coefficients are stored: float32, float16, bfloat16, int8, int4; default: the model's.",
            rich_help_panel=data_panel,
        ),
    ]
    Activation: TypeAlias = Annotated[
        str | None,
        typer.Option(
            help=f"Of the spectral network: {', '.join(models.ACTIVATIONS)} (in space); default: the model's.",
            rich_help_panel=data_panel,
        ),
    ]
    Method: TypeAlias = Annotated[
        str,
        typer.Option(
            help="What the network is compared with: spectral (its spectral twin) or compress (itself, with maps "
            "compressed between forward and backward).",
            rich_help_panel=data_panel,
        ),
    ]
    Transform: TypeAlias = Annotated[
        str, typer.Option(help="compress: dct, fft, none or cast.", rich_help_panel=data_panel)
    ]
    Density: TypeAlias = Annotated[
        float | None, typer.Option(help="compress: fraction of values kept; default: 0.25.", rich_help_panel=data_panel)
    ]
    Bits: TypeAlias = Annotated[
        float | None, typer.Option(help="compress: bits of a kept value; default: 4.", rich_help_panel=data_panel)
    ]
    Paper: TypeAlias = Annotated[
        bool,
        typer.Option("--paper", help="Keep to the paper, not the best known settings.", rich_help_panel=data_panel),
    ]
    Budget: TypeAlias = Annotated[
        str | None,
        typer.Option(
            help="spectral: move the thresholds so that a training step holds this much for backward, over the "
            "spatial network's (0.2), or in bytes (64MiB).",
            rich_help_panel=data_panel,
        ),
    ]
    Width: TypeAlias = Annotated[
        float, typer.Option(help="Multiplies the network's numbers of channels.", rich_help_panel=data_panel)
    ]
    ImageSize: TypeAlias = Annotated[
        int | None,
        typer.Option(help="Edge in pixels that the network is given.", rich_help_panel=data_panel),
    ]
    DataDir: TypeAlias = Annotated[
        str | None,
        typer.Option(metavar="DIRECTORY", help="Directory with the data set's own files.", rich_help_panel=data_panel),
    ]
    TrainLimit: TypeAlias = Annotated[
        int | None, typer.Option(help="Use the first so many training images.", rich_help_panel=data_panel)
    ]
    TestLimit: TypeAlias = Annotated[
        int | None, typer.Option(help="Use the first so many test images.", rich_help_panel=data_panel)
    ]
    Epochs: TypeAlias = Annotated[
        int, typer.Option(help="Passes over the training images.", rich_help_panel=recipe_panel)
    ]
    BatchSize: TypeAlias = Annotated[
        int, typer.Option(help="Images a step, over all processes.", rich_help_panel=recipe_panel)
    ]
    Optimizer: TypeAlias = Annotated[str, typer.Option(help="sgd or adam.", rich_help_panel=recipe_panel)]
    Lr: TypeAlias = Annotated[
        float, typer.Option(help="Learning rate of the first epoch.", rich_help_panel=recipe_panel)
    ]
    LrHalveEvery: TypeAlias = Annotated[
        int, typer.Option(help="Halve the learning rate after so many epochs; 0: never.", rich_help_panel=recipe_panel)
    ]
    Momentum: TypeAlias = Annotated[float, typer.Option(help="Of SGD.", rich_help_panel=recipe_panel)]
    WeightDecay: TypeAlias = Annotated[float, typer.Option(help="L2 penalty.", rich_help_panel=recipe_panel)]
    Augment: TypeAlias = Annotated[
        bool,
        typer.Option(
            "--augment/--no-augment", help="Shift, crop and mirror training images.", rich_help_panel=recipe_panel
        ),
    ]
    Seed: TypeAlias = Annotated[
        int, typer.Option(help="Of weights, order of images and dropout.", rich_help_panel=recipe_panel)
    ]
    Seeds: TypeAlias = Annotated[
        str | None, typer.Option(help="Repeat for these seeds and report means: 0,1,2.", rich_help_panel=recipe_panel)
    ]
    Device: TypeAlias = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.", rich_help_panel=run_panel)]
    Amp: TypeAlias = Annotated[str, typer.Option(help="bf16 (autocast) or none.", rich_help_panel=run_panel)]
    Workers: TypeAlias = Annotated[
        int, typer.Option(help="Threads or processes that fetch batches ahead; 0: in line.", rich_help_panel=run_panel)
    ]
    Peers: TypeAlias = Annotated[
        str | None,
        typer.Option(
            help=f"Measure a step with each of these as well: {', '.join(PEERS)}, or all.",
            rich_help_panel=run_panel,
        ),
    ]
    Resume: TypeAlias = Annotated[
        bool,
        typer.Option(
            "--resume/--fresh", help="Go on from the checkpoint in --out, or start anew.", rich_help_panel=run_panel
        ),
    ]

    @app.command()
    def compare(
        *,
        model: Model = "lenet",
        data: Data = "digits",
        threshold: Threshold = 0.5,
        budget: Budget = None,
        value_dtype: ValueDtype = None,
        activation: Activation = None,
        paper: Paper = False,
        method: Method = "spectral",
        transform: Transform = "dct",
        density: Density = None,
        bits: Bits = None,
        width: Width = 1.0,
        image_size: ImageSize = None,
        data_dir: DataDir = None,
        train_limit: TrainLimit = None,
        test_limit: TestLimit = None,
        epochs: Epochs = 10,
        batch_size: BatchSize = 128,
        optimizer: Optimizer = "sgd",
        lr: Lr = 0.02,
        lr_halve_every: LrHalveEvery = 50,
        momentum: Momentum = 0.95,
        weight_decay: WeightDecay = 0.0,
        augment: Augment = True,
        seed: Seed = 0,
        seeds: Seeds = None,
        out: Annotated[Path, typer.Option(help="Directory for results and checkpoints.", rich_help_panel=run_panel)],
        device: Device = "auto",
        amp: Amp = "none",
        workers: Workers = 0,
        peers: Peers = None,
        resume: Resume = True,
    ) -> None:
        """Train a network and its spectral (or compressed) twin alike; write report.json, curves.png and memory.png."""
        options = dict(locals())
        with _user_errors(), _stop_on_signals() as stop, distributed.joined():
            from spectriton import report
            from spectriton.compare import compare as run

            result = run(
                _configuration(options),
                out,
                seeds=_parse_seeds(seeds),
                peers=peers.split(",") if peers else (),
                progress=report.progress_for_terminal(),
                fresh=not resume,
                stop=stop,
            )
            if distributed.is_main():
                report.print_report(result)
                print(f"written to {out}: report.json, curves.png, memory.png")

    @app.command()
    def train(
        *,
        variant: Annotated[str, typer.Option(help="spatial or spectral.", rich_help_panel=data_panel)] = "spectral",
        model: Model = "lenet",
        data: Data = "digits",
        threshold: Threshold = 0.5,
        budget: Budget = None,
        value_dtype: ValueDtype = None,
        activation: Activation = None,
        paper: Paper = False,
        width: Width = 1.0,
        image_size: ImageSize = None,
        data_dir: DataDir = None,
        train_limit: TrainLimit = None,
        test_limit: TestLimit = None,
        epochs: Epochs = 10,
        batch_size: BatchSize = 128,
        optimizer: Optimizer = "sgd",
        lr: Lr = 0.02,
        lr_halve_every: LrHalveEvery = 50,
        momentum: Momentum = 0.95,
        weight_decay: WeightDecay = 0.0,
        augment: Augment = True,
        seed: Seed = 0,
        out: Annotated[Path, typer.Option(help="Directory for results and checkpoints.", rich_help_panel=run_panel)],
        device: Device = "auto",
        amp: Amp = "none",
        workers: Workers = 0,
        resume: Resume = True,
    ) -> None:
        """Train one of the two networks; write its checkpoint, report.json and curves.png."""
        options = dict(locals())
        with _user_errors(), _stop_on_signals() as stop, distributed.joined():
            from spectriton import report
            from spectriton.compare import train_alone

            result = train_alone(
                _configuration(options),
                variant,
                out,
                progress=report.progress_for_terminal(),
                fresh=not resume,
                stop=stop,
            )
            if distributed.is_main():
                report.print_report(result)
                print(f"written to {out}: {variant}.pt, report.json, curves.png")

    shapes_panel = "Shapes"

    @app.command()
    def tune(
        *,
        shapes: Annotated[
            str | None,
            typer.Option(
                metavar="NETWORK",
                help=f"Those of a training step of this network's spectral twin ({', '.join(models.NETWORKS)}); "
                "default: a list of common ones.",
                rich_help_panel=shapes_panel,
            ),
        ] = None,
        batch_size: Annotated[
            int, typer.Option(help="Images of a step of --shapes.", rich_help_panel=shapes_panel)
        ] = 128,
        image_size: Annotated[
            int, typer.Option(help="Edge of the images of --shapes in pixels.", rich_help_panel=shapes_panel)
        ] = 32,
        in_channels: Annotated[
            int, typer.Option(help="Channels of the images of --shapes.", rich_help_panel=shapes_panel)
        ] = 3,
        kernel: Annotated[
            list[str] | None,
            typer.Option(help="Only this kernel; may be repeated.", rich_help_panel=shapes_panel),
        ] = None,
        dry_run: Annotated[
            bool, typer.Option("--dry-run", help="List what would be tuned.", rich_help_panel=run_panel)
        ] = False,
        device: Device = "auto",
    ) -> None:
        """Find the fastest configuration of each Triton kernel on this GPU, and keep it for later runs."""
        with _user_errors():
            from spectriton import tuner
            from spectriton.train import TrainConfig

            where = TrainConfig(device=device).resolve_device()
            if not dry_run:
                tuner.check_device(where)
            if shapes is None:
                cases = tuner.default_cases()
            else:
                cases = tuner.model_cases(shapes, batch_size, image_size, in_channels, where)
            cases = tuner.chosen_cases(cases, kernel or [])
            if dry_run:
                for case in cases:
                    print(case)
            elif path := tuner.run(cases, where, torch.cuda.get_device_name(where)):
                print(f"written to {path}")

    @app.command()
    def sweep(
        *,
        model: Annotated[
            list[str],
            typer.Option(
                help=f"Network, any number of times: {', '.join(models.NETWORKS)}.", rich_help_panel=data_panel
            ),
        ] = ["lenet"],  # noqa: B006
        data: Data = "digits",
        thresholds: Annotated[
            str,
            typer.Option(help="Moduli below which a coefficient is dropped (beta).", rich_help_panel=data_panel),
        ] = "0.5,0.75,1,1.25,1.5",
        value_dtype: ValueDtype = None,
        activation: Activation = None,
        paper: Paper = False,
        width: Width = 1.0,
        image_size: ImageSize = None,
        data_dir: DataDir = None,
        train_limit: TrainLimit = None,
        test_limit: TestLimit = None,
        epochs: Epochs = 10,
        batch_size: BatchSize = 128,
        optimizer: Optimizer = "sgd",
        lr: Lr = 0.02,
        lr_halve_every: LrHalveEvery = 50,
        momentum: Momentum = 0.95,
        weight_decay: WeightDecay = 0.0,
        augment: Augment = True,
        seeds: Seeds = "0",
        out: Annotated[Path, typer.Option(help="Directory for results and checkpoints.", rich_help_panel=run_panel)],
        device: Device = "auto",
        amp: Amp = "none",
        workers: Workers = 0,
        resume: Resume = True,
    ) -> None:
        """Train networks and, for each threshold, their twins; write sweep.csv, .json, .md, fig1.png and fig2.png."""
        options = {name: value for name, value in locals().items() if name != "model"}
        with _user_errors(), _stop_on_signals() as stop, distributed.joined():
            from spectriton import report
            from spectriton.sweep import sweep as run
            from spectriton.sweep import text_rows

            result = run(
                _configuration(options),
                out,
                models=model,
                thresholds=_parse_list("--thresholds", thresholds, float, "0.5,1,1.5") or [],
                seeds=_parse_seeds(seeds),
                progress=report.progress_for_terminal(),
                fresh=not resume,
                stop=stop,
            )
            if distributed.is_main():
                report.print_table(text_rows(result, brief=True), report.conditions(result))
                print(f"written to {out}: sweep.csv, sweep.json, sweep.md, fig1.png, fig2.png")

    @app.command()
    def env(
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ) -> None:
        """Show versions, GPU, backend and settings, for bug reports."""
        with _user_errors():
            found = environment.collect()
            if as_json:
                print(json.dumps(found, indent=2))
                return
            from rich.console import Console
            from rich.table import Table

            table = Table(show_header=False)
            tuned = found.pop("tuning")
            found |= {
                "tuned_shapes": f"{tuned['entries']} for this GPU{'' if tuned['enabled'] else ', switched off'}",
                "tuning_files": "\n".join(
                    f"{file['name']} ({file['origin']}): " + (file["problem"] or f"{file['entries']} shapes")
                    for file in tuned["files"]
                )
                or None,
            }
            for name, value in found.items():
                table.add_row(name.replace("_", " "), "none" if value is None else str(value))
            Console().print(table)

    return app


if __name__ == "__main__":
    main()
