"""The flags of `experiments.reinforcement`; what is not given depends on the algorithm."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from experiments.common import SettingsError, require_at_least, setting
from experiments.seed_study import check_seeds

DEFAULTS: dict[str, dict[str, Any]] = {
    "A2C": dict(env="CartPole-v1", timesteps=100_000, n_envs=8, lr=7e-4, width=64),
    "DDPG": dict(env="Pendulum-v1", timesteps=15_000, n_envs=1, lr=1e-3, width=128),
}


def _by_algorithm(what: str, name: str, kind: Any) -> Any:
    each = ", ".join(f"{algorithm} {values[name]}" for algorithm, values in DEFAULTS.items())
    return setting(None, f"{what} (default: {each})", kind=kind)


@dataclass(frozen=True)
class Settings:
    """Everything that decides what is trained and measured."""

    dir: str = setting(dataclasses.MISSING, "folder to write to", kind=str, free=True)
    algorithm: str = setting("A2C", "of stable-baselines3", choices=tuple(DEFAULTS))
    env: str = _by_algorithm("environment of gymnasium", "env", str)
    timesteps: int = _by_algorithm("steps of the environments in all", "timesteps", int)
    n_envs: int = _by_algorithm("environments side by side", "n_envs", int)
    lr: float = _by_algorithm("learning rate, constant", "lr", float)
    width: int = _by_algorithm("units of each of two hidden layers", "width", int)
    gamma: float = setting(0.99, "discount of a step")
    action_noise: float = setting(0.1, "standard deviation of DDPG's exploration, of actions scaled to [-1, 1]")
    swa_start: float = setting(0.5, "fraction of the steps after which averaging begins")
    collections: int = setting(50, "how many iterates are averaged, evenly spread over the rest")
    max_num_models: int = setting(20, "rank of SWAG")
    num_samples: int = setting(10, "weight samples of SWAG, each for its share of the episodes")
    evaluations: int = setting(20, "measurements while training, evenly spread over the steps")
    eval_episodes: int = setting(20, "episodes of a measurement, which begin the same way for every method")
    stochastic: bool = setting(False, "draw actions when measuring; without, the most likely one (A2C)")
    seeds: int = setting(5, "seeds: of weights, environments and exploration", free=True)
    first_seed: int = setting(0, "the first of them", free=True)
    device: str = setting("cpu", "cpu, cuda, cuda:1, ...; networks this small are fastest on a processor", free=True)
    threads: int = setting(1, "CPU threads, 0 for torch's choice", free=True)
    resume: bool = setting(False, "go on with the run in --dir, whose finished seeds are kept", free=True)

    @property
    def begins(self) -> float:
        """Steps after which averaging begins."""
        return self.swa_start * self.timesteps

    def collects_at(self) -> list[int]:
        """Return the steps after which an iterate is averaged, the last one at the end."""
        return _spread(self.begins, self.timesteps, self.collections)

    def measures_at(self) -> list[int]:
        """Return the steps after which the last iterate and the average are measured."""
        return _spread(0, self.timesteps, self.evaluations)


def _spread(begin: float, end: float, count: int) -> list[int]:
    return [math.ceil(begin + (end - begin) * (i + 1) / count) for i in range(count)]


def check(settings: Settings) -> Settings:
    """Fill in what the algorithm decides, and refuse what cannot run."""
    missing = {name: value for name, value in DEFAULTS[settings.algorithm].items() if getattr(settings, name) is None}
    settings = dataclasses.replace(settings, **missing)
    check_seeds(settings)
    least: dict[str, Any] = dict(
        timesteps=100, n_envs=1, lr=0, width=1, gamma=0, action_noise=0, swa_start=0, collections=2, max_num_models=1,
        num_samples=1, evaluations=1, eval_episodes=1, threads=0,
    )  # fmt: skip
    require_at_least(settings, least)
    if settings.swa_start >= 1:
        raise SettingsError(f"--swa_start must be less than 1; got {settings.swa_start}")
    if settings.gamma > 1:
        raise SettingsError(f"--gamma must be at most 1; got {settings.gamma}")
    if settings.timesteps < settings.n_envs * max(settings.collections, settings.evaluations) / (
        1 - settings.swa_start
    ):
        raise SettingsError(
            f"--timesteps {settings.timesteps} is too few for --collections {settings.collections} and --evaluations "
            f"{settings.evaluations}: {settings.n_envs} pass at once"
        )
    return settings
