"""Agents of stable-baselines3: training with averages of their weights, and the returns of given weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium
import numpy as np
import torch
from stable_baselines3 import A2C, DDPG
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn
from tqdm import tqdm

import lowrank_bdl as lb
from experiments.common import SettingsError
from experiments.reinforcement_settings import Settings

_EVALUATION_SEED = 1_000_003  # episodes that are measured begin unlike those trained on


def make_environments(settings: Settings, seed: int, count: int) -> VecEnv:
    """Make environments side by side whose start states and noise depend on the seed alone.

    Raises:
        SettingsError: If there is no such environment, or something that it needs is missing.
    """
    try:
        return make_vec_env(settings.env, n_envs=count, seed=seed)
    except (gymnasium.error.Error, ImportError) as error:
        raise SettingsError(f"--env {settings.env}: {error}") from None


def make_agent(settings: Settings, seed: int, device: torch.device) -> BaseAlgorithm:
    """Make an agent with its environments.

    Raises:
        SettingsError: If the algorithm does not fit the environment.
    """
    environments = make_environments(settings, seed, settings.n_envs)
    common: dict[str, Any] = dict(
        learning_rate=settings.lr,
        gamma=settings.gamma,
        seed=seed,
        device=device,
        policy_kwargs={"net_arch": [settings.width, settings.width]},
    )
    try:
        if settings.algorithm == "A2C":
            return A2C("MlpPolicy", environments, **common)
        if not isinstance(environments.action_space, gymnasium.spaces.Box):
            raise SettingsError(f"DDPG needs continuous actions; {settings.env} has {environments.action_space}")
        size = environments.action_space.shape
        noise = NormalActionNoise(np.zeros(size), np.full(size, settings.action_noise))
        return DDPG("MlpPolicy", environments, action_noise=noise, buffer_size=settings.timesteps, **common)
    except (AssertionError, ValueError) as error:  # of what stable-baselines3 does not support
        raise SettingsError(f"--env {settings.env}: {' '.join(str(error).split())}") from None


def acting_network(agent: BaseAlgorithm) -> nn.Module:
    """Return what decides on actions: of A2C actor and critic in one, of DDPG the actor."""
    return agent.actor if isinstance(agent, DDPG) else agent.policy


@contextmanager
def with_weights(module: nn.Module, theta: Tensor, layout: lb.ParameterLayout) -> Iterator[None]:
    """Put weights (D,) into a module for a while."""
    own = layout.flatten(module).clone()
    layout.assign_(module, theta)
    try:
        yield
    finally:
        layout.assign_(module, own)


class RandomPolicy:
    """Actions drawn uniformly from the action space."""

    def __init__(self, environments: VecEnv, seed: int) -> None:
        self.space = environments.action_space
        self.space.seed(seed)

    def predict(self, observation: np.ndarray, **_: Any) -> tuple[np.ndarray, None]:
        return np.stack([self.space.sample() for _ in observation]), None


class Evaluator:
    """Returns of episodes that begin in the same states, whoever acts.

    Args:
        settings: Of the script.
        seed: Of the episodes.
    """

    def __init__(self, settings: Settings, seed: int) -> None:
        self.settings, self.seed = settings, _EVALUATION_SEED + seed
        self.environments = make_environments(settings, self.seed, min(settings.eval_episodes, 20))

    def returns(self, agent: Any, episodes: int | None = None, *, first: int = 0) -> list[float]:
        """Return the undiscounted sums of rewards of so many episodes; ``first`` chooses other start states."""
        self.environments.seed(self.seed + 1000 * first)
        self.environments.action_space.seed(self.seed)
        count = self.settings.eval_episodes if episodes is None else episodes
        found, _ = evaluate_policy(
            agent,
            self.environments,
            count,
            deterministic=not self.settings.stochastic,
            return_episode_rewards=True,
        )
        return [float(value) for value in found]

    def random_policy(self) -> list[float]:
        return self.returns(RandomPolicy(self.environments, self.seed))

    def draws(self, agent: BaseAlgorithm, posterior: lb.GaussianPosterior, seed: int) -> list[float]:
        """Return the returns of networks drawn from a posterior, each for its share of the episodes."""
        count, share = self.settings.num_samples, -(-self.settings.eval_episodes // self.settings.num_samples)
        module = acting_network(agent)
        generator = torch.Generator(posterior.mean.device).manual_seed(seed)
        found = []
        for number, theta in enumerate(posterior.sample(count, generator=generator)):
            with with_weights(module, theta, posterior.layout):
                found += self.returns(agent, share, first=number)
        return found


class Averaging(BaseCallback):
    """Show the weights to a collector, and measure the last iterate and the average, while an agent learns.

    Args:
        settings: Of the script.
        swag: The collector, of the acting network.
        evaluator: Gives returns.
        bar: Moves with the steps.
    """

    def __init__(self, settings: Settings, swag: lb.SWAG, evaluator: Evaluator, bar: "tqdm[Any]") -> None:
        super().__init__()
        self.swag, self.evaluator, self.bar = swag, evaluator, bar
        self.collect, self.measure = settings.collects_at(), settings.measures_at()
        self.begins = settings.begins
        self.last: list[list[float]] = []
        self.average: list[list[float]] = []

    def _on_step(self) -> bool:
        """Collect and measure what is due; go on."""
        self.bar.update(self.num_timesteps - self.bar.n)
        module = acting_network(self.model)
        if self.collect and self.num_timesteps >= self.collect[0]:
            del self.collect[0]
            self.swag.update_parameters(module)
        if self.measure and self.num_timesteps >= self.measure[0]:
            time = self.measure.pop(0)
            level = float(np.mean(self.evaluator.returns(self.model)))
            self.last.append([time, level])
            self.bar.set_postfix_str(f"return {level:.1f}", refresh=False)
            if self.swag.n_averaged:
                with with_weights(module, self.swag.mean, self.swag.layout):
                    self.average.append([time, float(np.mean(self.evaluator.returns(self.model)))])
        return True


def learn(agent: BaseAlgorithm, settings: Settings, averaging: Averaging) -> None:
    """Train the agent.

    Raises:
        NonFiniteError: If its weights are no longer finite.
    """
    try:
        agent.learn(settings.timesteps, callback=averaging)
    except (ValueError, RuntimeError) as error:  # distributions refuse logits that are not numbers, validated or not
        finite = all(bool(parameter.isfinite().all()) for parameter in agent.policy.parameters())
        if finite and not isinstance(error, lb.NonFiniteError):
            raise
        raise lb.NonFiniteError("training diverged: weights are not finite; lower --lr") from error
