"""Averages of an agent's weights: A2C or DDPG of stable-baselines3, with and without SWA, and SWAG.

An agent learns in an environment of gymnasium with a constant learning rate. From --swa_start on, iterates of the
network that acts are averaged (of A2C actor and critic, of DDPG the actor); learning itself never sees the average. The
last iterate, the average (SWA) and networks drawn from around it, a new one after every few episodes (SWAG), then act
in episodes that begin in the same states for all of them, as does a policy that draws its actions at random. The first
column is the mean return after training; the others are the mean and the lowest of the measurements since averaging
began, which tell how far one can rely on stopping at any time.

Examples:
  python -m experiments.reinforcement --algorithm A2C --env CartPole-v1 --dir runs/a2c-cartpole
  python -m experiments.reinforcement --algorithm DDPG --env Pendulum-v1 --dir runs/ddpg-pendulum

Writes to --dir: cells/seed-SEED.json (a killed run goes on from there), methods.png, curves.png, table.txt, log.jsonl,
results.json (last), settings.json, environment.json, command.sh

Source: Nikishin et al., "Improving Stability in Deep Reinforcement Learning with Weight Averaging" (UAI 2018 workshop).
"""

import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import numpy as np
from tqdm import tqdm

import lowrank_bdl as lb
from experiments import learning_curves, seed_study
from experiments.common import RunDir, SettingsError, parse_settings, resolve_device, run_script
from experiments.reinforcement_settings import Settings, check
from experiments.seed_study import Measure

PROG = "python -m experiments.reinforcement"
OUTPUTS = (*seed_study.OUTPUTS, "curves.png")
RANDOM = "random policy"
MEASURES = (
    Measure("return", "return after training", 1),
    Measure("mean", "mean while averaging", 1),
    Measure("lowest", "lowest while averaging", 1),
)


def while_averaging(curve: Sequence[Sequence[float]], average: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return mean and lowest of the measurements of a curve at the times at which there was an average."""
    times = {time for time, _ in average}
    levels = [level for time, level in curve if time in times]
    return {"mean": float(np.mean(levels)), "lowest": min(levels)}


def work(settings: Settings) -> str:
    """Check everything, then train and measure the seeds that are left; return what to print."""
    try:
        from experiments import reinforcement_agents as agents
    except ImportError as error:
        raise SettingsError(f'{error.name} is missing: pip install -e ".[applications]"') from None
    device = resolve_device(settings.device)
    run = RunDir(settings, OUTPUTS, device)
    agents.make_agent(settings, settings.first_seed, device)
    run.begin()

    def one_seed(seed: int) -> dict[str, Any]:
        agent = agents.make_agent(settings, seed, device)
        module = agents.acting_network(agent)
        swag = lb.SWAG(module, rank=settings.max_num_models)
        evaluator = agents.Evaluator(settings, seed)
        with tqdm(total=settings.timesteps, desc=f"seed {seed}", unit="step", leave=False) as bar:
            averaging = agents.Averaging(settings, swag, evaluator, bar)
            agents.learn(agent, settings, averaging)
        by_chance = float(np.mean(evaluator.random_policy()))
        last = evaluator.returns(agent)
        with agents.with_weights(module, swag.mean, swag.layout):
            average = evaluator.returns(agent)
        draws = evaluator.draws(agent, swag.posterior(), seed)
        return {
            "methods": {
                RANDOM: {"return": by_chance},
                settings.algorithm: {
                    "return": float(np.mean(last)),
                    **while_averaging(averaging.last, averaging.average),
                },
                "SWA": {"return": float(np.mean(average)), **while_averaging(averaging.average, averaging.average)},
                "SWAG": {"return": float(np.mean(draws))},
            },
            "curves": {
                settings.env: {
                    settings.algorithm: averaging.last,
                    "SWA": averaging.average,
                    RANDOM: [[time, by_chance] for time, _ in averaging.last],
                }
            },
            "collected": swag.n_averaged,
            "parameters": swag.layout.numel,
        }

    cells = seed_study.run_seeds(settings, run, one_seed)
    title = f"{settings.algorithm} on {settings.env}, {settings.timesteps:,} steps"
    learning_curves.draw_curves(
        run.path / "curves.png", cells, settings.begins, title, xlabel="step", ylabel="mean return of an episode"
    )
    acts = "actions are drawn" if settings.stochastic else "actions are the most likely ones"
    notes = [
        f"A return is the mean over {settings.eval_episodes} episodes of one seed; {acts}.",
        f"{cells[0]['collected']} iterates of {cells[0]['parameters']:,} weights are averaged.",
    ]
    versions = {name: metadata.version(name) for name in ("stable-baselines3", "gymnasium")}
    return seed_study.finish(
        settings, run, cells, MEASURES, baseline=RANDOM, title=title, notes=notes, versions=versions
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit status."""
    settings = parse_settings(Settings, argv, prog=PROG, description=__doc__, check=check)
    return run_script(PROG, lambda: work(settings), threads=settings.threads)


if __name__ == "__main__":
    sys.exit(main())
