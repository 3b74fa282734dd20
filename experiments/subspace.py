"""Bayesian inference in a subspace of a trained network's weights, after Izmailov et al. (UAI 2019).

Weights are theta = origin + P z. The posterior of the few coordinates z, whose log-likelihood is divided by the
temperature and whose prior is N(0, prior_std^2), is sampled or fitted, and predictions are averaged over its draws.

subspaces  pca (of SWAG's deviations), covariance (the raw deviations), random, freq_dir (a sketch of all iterates),
           principal (of SWAG's whole covariance), hessian (top curvature), curve (through --curve's points)
methods    ess (elliptical slice), slice (coordinate by coordinate), nuts, sgld, sghmc, vi (mean-field), vi_full, flow,
           map, low_rank_gaussian (no data: z ~ N(0, scale I))

A finished run takes more draws, where R-hat asks for them, with --resume and a larger --num_samples.
SGD, SWA and SWAG are in the same table; every NLL difference comes with a 95 % interval, image by image.

Examples:
  python -m experiments.train --dir runs/digits --dataset digits --model SmallConvNet --epochs 60 --batch_size 32
      --lr_init 0.05 --swa --swa_start 30 --swa_lr 0.02 --cov_mat
  python -m experiments.subspace --run runs/digits --dir runs/digits-subspace --subspace random,pca --method ess,vi
      --rank 5 --num_samples 100 --temperature 1
  python -m experiments.subspace --run runs/lenet --data_path DATA_DIR --dir runs/lenet-subspace --subspace random,pca
      --method ess --rank 5 --num_samples 300 --burn_in 100 --train_limit 10000

Writes to --dir: subspace-NAME.safetensors; for every row of the table a folder with cell.json, ens.npz (seed, samples
(z), ens_predictions, targets, ens_acc, ens_nll, log_likelihood), and of methods in a subspace draws.safetensors,
chain.safetensors (what a killed chain goes on from) and trace.png; plane-NAME.npz and .png (density with the draws on
it), samples.png (NLL against samples), table.txt, log.jsonl, results.json (last), settings.json, environment.json,
command.sh
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

import lowrank_bdl as lb
from experiments import subspace_plots, subspace_report
from experiments.common import (
    RunDir,
    SettingsError,
    fixed,
    parse_settings,
    resolve_device,
    run_script,
    write_atomically,
)
from experiments.subspace_cells import (
    Cell,
    baseline_weights,
    diagnostics,
    measure,
    plan,
    predict,
    read_log_likelihood,
    save_predictions,
)
from experiments.subspace_constructions import construct, hessian
from experiments.subspace_methods import DRAWS, draw, log_joint
from experiments.subspace_plane import density
from experiments.subspace_settings import Settings, check, subspaces
from experiments.subspace_sources import Bench, open_bench
from experiments.uncertainty_settings import temperatures_of
from lowrank_bdl.subspaces.draws import Draws
from lowrank_bdl.subspaces.subspace import Subspace
from lowrank_bdl.subspaces.subspace_posterior import SubspacePosterior

PROG = "python -m experiments.subspace"
OF_CELL = ("cell.json", "ens.npz", "draws.safetensors", "chain.safetensors", "trace.png")
OUTPUTS = (
    "results.json", "log.jsonl", "table.txt", "samples.png", "plane-*.png", "plane-*.npz", "subspace-*.safetensors",
    "lanczos.safetensors", *(f"*/{name}" for name in OF_CELL),
)  # fmt: skip


class Work:
    """A run of the script: what is done, and what is left to do.

    Args:
        folder: Of the run.
        bench: Weights and images.
        spaces: Subspaces by name.
    """

    def __init__(self, folder: RunDir, bench: Bench, spaces: Mapping[str, Subspace]) -> None:
        self.folder, self.bench, self.settings = folder, bench, bench.settings
        self.spaces = dict(spaces)
        self.planned = plan(bench.settings, bench)
        self.recipe = {**fixed(bench.settings), "weights": bench.digest}
        self.cells: dict[str, dict[str, Any]] = {}
        self.log_likelihoods: dict[str, Tensor] = {}

    def read(self) -> None:
        """Take what an earlier part of the run has finished."""
        for cell in self.planned:
            found = self.folder.read_cell(f"{cell.name}/cell.json", self.recipe)
            if found is None or self._is_short(cell, found["num_draws"]):
                continue
            path = self.folder.path / cell.name / "ens.npz"
            try:
                self.log_likelihoods[cell.name] = read_log_likelihood(path)
            except (OSError, ValueError, KeyError) as error:
                raise SettingsError(f"--resume: cannot read {path}: {error}; delete its folder") from None
            self.cells[cell.name] = found

    def _is_short(self, cell: Cell, had: int) -> bool:
        """Say whether a finished row needs the further draws of each chain that are asked for now.

        Args:
            cell: The row.
            had: Draws of each chain when it was finished.

        Raises:
            SettingsError: If fewer are.
        """
        now = self.settings.num_samples
        if now < had:
            raise SettingsError(
                f"--num_samples must be at least the {had} of {cell.label} in {self.folder.path}; got {now}"
            )
        of_draws = cell.subspace is not None or (cell.method == "SWAG" and self.settings.predict_samples is None)
        return of_draws and now > had

    def make_subspaces(self) -> None:
        """Make what is costly, unless an earlier part of the run has, and write all."""
        for name in subspaces(self.settings):
            path = self.folder.path / f"subspace-{name}.safetensors"
            if name == "hessian":
                done = self.settings.resume and path.exists()
                self.spaces[name] = (
                    Subspace.load(path, self.bench.layout, device=self.bench.trained.posterior.mean.device)
                    if done
                    else hessian(self.settings, self.bench, self.folder.path / "lanczos.safetensors")
                )
            self.spaces[name].save(path)

    def run(self) -> None:
        """Do the rows that are left."""
        for number, cell in enumerate(self.planned, start=1):
            if cell.name in self.cells:
                continue
            print(f"[{number}/{len(self.planned)}] {cell.label}", file=sys.stderr)
            try:
                self._run_cell(cell)
            except (lb.LowRankBDLError, ImportError) as error:
                raise SettingsError(f"{cell.label}: {' '.join(str(error).split())}") from None

    def _run_cell(self, cell: Cell) -> None:
        began = time.perf_counter()
        path = self.folder.path / cell.name
        path.mkdir(exist_ok=True)
        record: dict[str, Any] = {"cell": {"method": cell.method, "subspace": cell.subspace}, "recipe": self.recipe}
        record["num_draws"] = self.settings.num_samples
        record["cell"]["temperature"] = cell.temperature
        samples = None
        if cell.subspace is None:
            weights, layout, number = baseline_weights(cell, self.bench)
        else:
            draws = draw(cell.method, self.log_joint(cell), self.settings, path)
            draws.save(path / DRAWS)
            record["chains"] = diagnostics(draws)
            weights, layout = SubspacePosterior(self.spaces[cell.subspace], draws), self.bench.layout
            samples = draws.flat
            number = min(self.settings.predict_samples or len(samples), len(samples))
        drawn = time.perf_counter()
        found = predict(self.bench, weights, layout, number)
        assert found.log_likelihood is not None
        self.log_likelihoods[cell.name] = found.log_likelihood.cpu()
        record |= measure(found, self.settings.seed)
        record["seconds"] = {"inference": drawn - began, "prediction": time.perf_counter() - drawn}
        save_predictions(path / "ens.npz", found, self.settings.seed, samples)
        self.folder.write_json(f"{cell.name}/cell.json", record)
        self.folder.log(cell=cell.name, seconds=record["seconds"])
        self.cells[cell.name] = json.loads(json.dumps(record))

    def log_joint(self, cell: Cell) -> Any:
        assert cell.subspace is not None
        temperature = temperatures_of(self.settings)[0] if cell.temperature is None else cell.temperature
        return log_joint(self.bench, self.spaces[cell.subspace], temperature)

    def draw_figures(self) -> None:
        """Write the figures."""
        title = subspace_report.title(self.bench)
        drawn: dict[tuple[str, float], dict[str, Draws]] = {}
        for cell in self.planned:
            if cell.subspace is None:
                continue
            path = self.folder.path / cell.name
            draws = Draws.load(path / DRAWS)
            subspace_plots.trace(path / "trace.png", draws, f"{cell.label}\n{title}")
            for temperature in temperatures_of(self.settings) if cell.temperature is None else (cell.temperature,):
                drawn.setdefault((cell.subspace, temperature), {})[cell.method] = draws
        for (name, temperature), by_method in drawn.items():
            if self.settings.grid and self.spaces[name].rank >= 2:
                self._draw_plane(name, temperature, by_method, title)
        of_many = [(cell, self.cells[cell.name]) for cell in self.planned]
        curves = [(cell, found["by_number"]) for cell, found in of_many if "by_number" in found]
        lines = {cell.label: found["metrics"]["nll"] for cell, found in of_many if "by_number" not in found}
        subspace_plots.against_samples(self.folder.path / "samples.png", curves, lines, title)

    def _draw_plane(self, name: str, temperature: float, by_method: Mapping[str, Draws], title: str) -> None:
        path = self.folder.path / f"plane-{name}-t{temperature:g}.npz"
        target = log_joint(self.bench, self.spaces[name], temperature)
        flat = {method: draws.flat.cpu() for method, draws in by_method.items()}
        found = density(path, target, flat, self.settings.grid, self.recipe)
        about = f"{title}\nposterior in the plane of the first two coordinates of {name}, T = {temperature:g}"
        if len(found.others):
            about += f"\n(the other {len(found.others)} at the mean of the first method's draws)"
        subspace_plots.plane(path.with_suffix(".png"), found, by_method, about)

    def report(self) -> str:
        """Write table and results; return the table."""
        compared = subspace_report.comparisons(self.planned, self.log_likelihoods)
        against = subspace_report.differences(self.planned, self.log_likelihoods)
        text = subspace_report.table(self.planned, self.cells, against, self.bench)
        if compared:
            text += f"\n\n{subspace_report.comparison_text(compared)}"
        write_atomically(self.folder.path / "table.txt", text + "\n")
        facts = {
            name: {"rank": space.rank, "lengths": space.lengths.tolist(), "provenance": space.provenance}
            for name, space in self.spaces.items()
        }
        self.folder.write_json(
            "results.json",
            subspace_report.results(self.settings, self.planned, self.cells, against, compared, facts, self.bench),
        )
        return text


def work(settings: Settings) -> str:
    """Check everything, then do what is left; return what to print."""
    device = resolve_device(settings.device)
    folder = RunDir(settings, OUTPUTS, device)
    bench = open_bench(settings, device)
    own = Work(folder, bench, construct(settings, bench))
    if settings.resume:
        own.read()
    folder.begin()
    own.make_subspaces()
    own.run()
    own.draw_figures()
    return f"{own.report()}\n\nwritten to {folder.path}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; return the exit status."""
    settings = parse_settings(Settings, argv, prog=PROG, description=__doc__, check=check)
    return run_script(PROG, lambda: work(settings), threads=settings.threads)


if __name__ == "__main__":
    sys.exit(main())
