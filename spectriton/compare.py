"""The main job: train a network and its spectral twin alike, and report what the spectrum costs and saves.

With ``method="compress"`` the second network is the first one over again, with compressed maps
(:mod:`spectriton.compression`).

Both twins are built from the same seed (so that weights that both have start out the same), see the same images in the
same order, and are measured one after the other: the first is gone from memory before the second is built.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from spectriton import _check, budget, compression, distributed, environment, models, report
from spectriton.codec import Codec, make_codec
from spectriton.data import load
from spectriton.images import Images
from spectriton.measure import measure_step, release_memory
from spectriton.packed import VALUE_DTYPES
from spectriton.peers import chosen as chosen_peers
from spectriton.peers import measure_peers
from spectriton.plots import draw_curves, draw_memory
from spectriton.report import VARIANTS
from spectriton.train import Checkpoint, Progress, TrainConfig, seed_everything, train

#: What the second network is called, by the way it saves memory.
METHODS = {"spectral": "spectral", "compress": "compressed"}


@dataclass(frozen=True)
class CompareConfig:
    """What to compare, on what, and how it is trained.

    Attributes:
        model: a name that :func:`spectriton.models.build` knows.
        data: a name that :func:`spectriton.data.load` knows.
        threshold: modulus below which a coefficient is dropped (the paper's beta).
        value_dtype: how kept coefficients are stored, a key of :data:`spectriton.packed.VALUE_DTYPES`; the model's own
            choice where ``None``.
        activation: of the spectral network, see :class:`spectriton.models.Options`: ``"relu"`` for ReLU in space; the
            model's own choice where ``None``.
        paper: keep to the paper instead of the best known settings.
        budget: what a training step of the spectral network may hold for backward, over what the spatial one holds
            (0.2), or in bytes for each process (``"64MiB"``, see :func:`spectriton.budget.parse_budget`): thresholds
            then start from ``threshold`` and move. They stay where they are where ``None``.
        width: multiplies the network's numbers of channels.
        image_size: edge in pixels that the network is given; the data's own where ``None``.
        method: ``"spectral"``, or ``"compress"`` for the original with compressed maps; then
        transform, density, bits: are as for :func:`spectriton.compress`, and threshold, value_dtype and paper play no
            part.
        train_limit, test_limit: use only the first so many images.
        data_dir: where the data's files are; it is not part of reports.
        train: the recipe.

    Raises:
        ValueError, TypeError: a setting is not usable, or paper and value_dtype contradict each other.
    """

    model: str = "lenet"
    data: str = "digits"
    threshold: float = 0.5
    value_dtype: str | None = None
    paper: bool = False
    budget: float | str | None = None
    width: float = 1.0
    image_size: int | None = None
    train_limit: int | None = None
    test_limit: int | None = None
    data_dir: str | None = None
    train: TrainConfig = field(default_factory=TrainConfig)
    method: str = "spectral"
    transform: str = "dct"
    density: float | None = None
    bits: float | None = None
    activation: str | None = None

    def __post_init__(self) -> None:
        _check.check_choice("CompareConfig", "method", self.method, METHODS)
        if self.method == "compress":
            self.codec()
        if math.isinf(_check.check_threshold("CompareConfig", self.threshold)):
            fix = "pass a large number, such as 1e9, to keep the zero frequency only"  # JSON has no infinity
            _check.fail("CompareConfig", "threshold", self.threshold, "a finite number", fix)
        if self.budget is not None:
            budget.parse_budget(self.budget)
            if self.method == "compress":
                fix = "leave out --budget, or lower --density or --bits"
                _check.fail("CompareConfig", "budget", repr(self.budget), "none with method='compress'", fix)
        if self.value_dtype is not None:
            _check.check_choice("CompareConfig", "value_dtype", self.value_dtype, VALUE_DTYPES)
        if self.activation is not None:
            _check.check_choice("CompareConfig", "activation", self.activation, models.ACTIVATIONS)
            if self.paper:
                fix = "leave out --paper or --activation"
                _check.fail("CompareConfig", "activation", repr(self.activation), "none together with paper", fix)
        if self.paper and self.value_dtype not in (None, "float32"):
            _check.fail(
                "CompareConfig",
                "value_dtype",
                repr(self.value_dtype),
                "'float32' together with paper, which stores float32",
                "leave out --paper or --value-dtype",
            )

    def load_data(self) -> Images:
        """The data; raises as :func:`spectriton.data.load` does."""
        return load(
            self.data,
            data_dir=self.data_dir,
            image_size=self.image_size,
            train_limit=self.train_limit,
            test_limit=self.test_limit,
        )

    def describe(self) -> dict[str, Any]:
        """The settings as JSON holds them, the recipe flattened in, without machine paths."""
        settings = asdict(self)
        del settings["data_dir"]
        recipe = settings.pop("train")
        settings["value_dtype"] = self.stored_dtype
        for name in ("transform", "density", "bits"):
            del settings[name]
        for name in ("budget", "activation"):
            if settings[name] is None:
                del settings[name]
        if self.method == "compress":
            settings["codec"] = repr(self.codec())
        device = self.train.resolve_device().type
        return {**settings, **recipe, "device": device, "processes": distributed.world_size()}

    @property
    def second(self) -> str:
        """Variant that is compared with the spatial network."""
        return METHODS[self.method]

    def codec(self) -> Codec:
        """What encodes the maps of the compressed network."""
        # The command line gives 4.0, and some codecs take whole numbers only.
        whole = self.bits is not None and float(self.bits).is_integer()
        return make_codec(self.transform, density=self.density, bits=int(self.bits or 0) if whole else self.bits)

    @property
    def stored_dtype(self) -> str:
        """The format that kept coefficients end up in: ``value_dtype``, or what the model chooses by itself."""
        chosen = self.value_dtype or models.Options.of("CompareConfig", paper=self.paper).value_dtype
        return str(chosen or "float32")


def build_network(config: CompareConfig, data: Images, variant: str) -> nn.Module:
    """Build one of the twins, on the CPU, from the seed of the recipe.

    Raises:
        ValueError: unknown model or variant, or a network that the images are too small for.
    """
    _check.check_choice("build_network", "variant", variant, VARIANTS)
    options: dict[str, Any] = {"threshold": config.threshold, "paper": config.paper, "width": config.width}
    for name in ("value_dtype", "activation"):
        if getattr(config, name) is not None:
            options[name] = getattr(config, name)
    seed_everything(config.train.seed)
    network: nn.Module = models.build(
        config.model,
        variant="spatial" if variant == "compressed" else variant,
        num_classes=data.num_classes,
        in_channels=data.channels,
        image_size=data.image_size,
        **options,
    )
    return compression.compress(network, codec=config.codec()) if variant == "compressed" else network


def train_variant(
    config: CompareConfig,
    variant: str,
    out_dir: str | os.PathLike[str],
    *,
    data: Images | None = None,
    title: str | None = None,
    progress: Progress | None = None,
    fresh: bool = False,
    stop: threading.Event | None = None,
    peers: Sequence[str] = (),
) -> dict[str, Any]:
    """Train and measure one of the twins, going on from ``out_dir/<variant>.pt`` where that exists.

    Args:
        config: what to train.
        variant: ``"spatial"``, ``"spectral"`` or ``"compressed"``.
        out_dir: directory for the checkpoint.
        data: images of your own instead of ``config.data``.
        title: name of the run for ``progress``; the variant where left out.
        progress, stop: as in :func:`spectriton.train.train`.
        fresh: start anew.
        peers: measure the trained network with each of these as well, see :mod:`spectriton.peers`.

    Returns:
        The network's part of ``report.json``; with ``peers``, their rows under that name.

    Raises:
        ValueError: bad settings, or a checkpoint that is damaged or of another configuration.
        spectriton.train.Interrupted: ``stop`` was set.
    """
    data = data if data is not None else config.load_data()
    model = build_network(config, data, variant)
    identity = {
        "model": config.model,
        "variant": variant,
        "data": data.name,
        "threshold": float(config.threshold),
        "value_dtype": config.stored_dtype,
        "paper": config.paper,
        "width": config.width,
    }
    if variant == "compressed":
        identity["codec"] = repr(config.codec())
    if config.activation is not None:
        identity["activation"] = config.activation
    controller = None
    if variant == "spectral" and config.budget is not None:
        identity["budget"] = str(budget.parse_budget(config.budget))
        controller = budget.BudgetController(model, saved_bytes=_packed_budget(config, data))
    checkpoint = Checkpoint(Path(out_dir) / f"{variant}.pt", identity, fresh=fresh)
    result = train(
        model,
        data,
        config.train,
        title=title or variant,
        progress=progress,
        checkpoint=checkpoint,
        stop=stop,
        controller=controller,
    )
    entry: dict[str, Any] = {
        "test_accuracy": result.test_accuracy,
        **measure_step(model, data, config.train),
        "seconds_per_epoch": result.seconds_per_epoch,
    }
    if result.density:
        entry["density"] = result.density
    if controller is not None:
        entry["thresholds"] = controller.thresholds()
    entry["history"] = result.history
    if peers:
        weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
        levels = budget.thresholds(model)
        del model  # what is measured next should have the device to itself
        release_memory()

        def restored() -> nn.Module:
            """The same network, on the CPU."""
            copy = build_network(config, data, variant)
            copy.load_state_dict(weights)
            budget.set_thresholds(copy, levels)
            return copy

        entry["peers"] = measure_peers(restored, data, config.train, peers)
    return entry


def _packed_budget(config: CompareConfig, data: Images) -> int:
    """Bytes that ``config.budget`` leaves for the packed maps of a training step, in each process.

    Whatever else is held for backward does not depend on the thresholds; it is measured on a copy of the network.

    Raises:
        ValueError: nothing is left.
    """
    twin = build_network(config, data, "spectral")
    saved = measure_step(twin, data, config.train)["saved_bytes"]
    (packed, *_) = distributed.gather(budget.packed_bytes(twin))
    del twin
    release_memory()
    allowed = budget.parse_budget(config.budget or 0)
    if isinstance(allowed, float):
        spatial = build_network(config, data, "spatial")
        allowed = round(allowed * measure_step(spatial, data, config.train)["saved_bytes"])
        del spatial
        release_memory()
    left = allowed - (saved - packed)
    if left <= 0:
        _check.fail(
            "compare",
            "budget",
            f"{config.budget} ({report.format_bytes(allowed)})",
            f"more than the {report.format_bytes(saved - packed)} that are held beside packed maps",
            "raise --budget",
        )
    return left


def train_alone(
    config: CompareConfig,
    variant: str,
    out_dir: str | os.PathLike[str],
    *,
    data: Images | None = None,
    progress: Progress | None = None,
    fresh: bool = False,
    stop: threading.Event | None = None,
    plots: bool = True,
) -> dict[str, Any]:
    """Train one of the twins and write ``report.json`` and ``curves.png`` to ``out_dir``.

    The checkpoint is the one :func:`compare` would write, so that a comparison in the same directory goes on from it.

    Args:
        config, variant, out_dir, data, progress, fresh, stop: as in :func:`train_variant`.
        plots: draw the figure, which needs matplotlib.

    Returns:
        What ``report.json`` holds: the network's part under the name of the variant, ``config``, ``environment``.

    Raises:
        As :func:`compare`.
    """
    if plots:
        environment.require("matplotlib.figure")
    out = Path(out_dir)
    entry = train_variant(config, variant, out, data=data, progress=progress, fresh=fresh, stop=stop)
    result = {
        variant: entry,
        "config": config.describe(),
        "environment": environment.collect(config.train.resolve_device()),
    }
    distributed.on_main(report.write_json, result, out / "report.json")
    if plots:
        distributed.on_main(draw_curves, result, out / "curves.png")
    return result


def compare(
    config: CompareConfig,
    out_dir: str | os.PathLike[str],
    *,
    seeds: Sequence[int] | None = None,
    peers: Sequence[str] = (),
    data: Images | None = None,
    progress: Progress | None = None,
    fresh: bool = False,
    stop: threading.Event | None = None,
    plots: bool = True,
) -> dict[str, Any]:
    """Train both twins and write ``report.json``, ``curves.png`` and ``memory.png`` to ``out_dir``.

    Started again with the same settings, it goes on where it was cut short; a finished twin is not trained again.

    Args:
        config: what to compare.
        out_dir: directory for checkpoints and results; made where missing.
        seeds: repeat everything for each of these seeds (in ``out_dir/seed-N``) and report means; the config's own seed
            where left out.
        peers: measure a training step of both trained networks (of the first seed) with each of these as well: names in
            :data:`spectriton.peers.PEERS`, or ``"all"``.
        data: images of your own instead of ``config.data``.
        progress, stop: as in :func:`spectriton.train.train`.
        fresh: start anew.
        plots: draw the figures, which needs matplotlib.

    Returns:
        What ``report.json`` holds: ``spatial``, ``spectral`` (or ``compressed``), ``ratio`` (to spatial), ``config``,
        ``environment``; with several seeds the means, and ``runs`` with every seed's own report. With ``peers``, rows
        of that name: ``variant``, what :func:`spectriton.peers.measure_peers` gives, and ``ratio``, to the spatial
        network alone.

    Raises:
        ValueError: bad settings, or a checkpoint that is damaged or of another configuration.
        ImportError: ``plots`` without matplotlib.
        spectriton.train.Interrupted: ``stop`` was set.
    """
    if plots:
        environment.require("matplotlib.figure")  # missing, it should say so now, not after hours of training
    chosen = [config.train.seed] if seeds is None else list(dict.fromkeys(seeds))
    names = chosen_peers(peers)
    if not chosen:
        _check.fail("compare", "seeds", "none", "at least one seed", "give --seeds 0,1,2, or leave it out")
    data = data if data is not None else config.load_data()
    configs = [replace(config, train=replace(config.train, seed=seed)) for seed in chosen]
    # Settings that the second twin refuses should not cost the first one's hours.
    build_network(configs[0], data, config.second)
    device = config.train.resolve_device()
    out = Path(out_dir)
    runs = []
    rows: list[dict[str, Any]] = []
    for run in configs:
        place = out if len(configs) == 1 else out / f"seed-{run.train.seed}"
        networks = {}
        for variant in ("spatial", config.second):
            networks[variant] = train_variant(
                run, variant, place, data=data, progress=progress, fresh=fresh, stop=stop,
                peers=names if run is configs[0] else (),
            )  # fmt: skip
            rows += [{"variant": variant, **row} for row in networks[variant].pop("peers", ())]
            release_memory()
        runs.append(report.assemble(networks, run.describe(), device))
    result = runs[0] if len(runs) == 1 else report.merge(runs)
    if rows:
        result["peers"] = report.peer_rows(rows)
    distributed.on_main(report.write_json, result, out / "report.json")
    if plots:
        distributed.on_main(draw_curves, result, out / "curves.png")
        distributed.on_main(draw_memory, result, out / "memory.png")
    return result
