"""Search strategies: each proposes the next candidates from the decided trials."""

from __future__ import annotations

from nas.search.strategies.contraction import Contraction
from nas.search.strategies.evolution import Evolution
from nas.search.strategies.optuna_samplers import Gp, Nsga2, Tpe
from nas.search.strategies.random_search import Random
from nas.search.strategies.strategy import SearchState, Strategy
from nas.search.strategies.uniform import Uniform
from space.errors import refuse

__all__ = ["SearchState", "Strategy", "get_strategy", "strategy_names"]

_STRATEGIES: tuple[Strategy, ...] = (Contraction(), Random(), Uniform(), Evolution(), Tpe(), Nsga2(), Gp())


def strategy_names() -> tuple[str, ...]:
    """Return the names of the strategies, the default one first."""
    return tuple(s.name for s in _STRATEGIES)


def get_strategy(name: str) -> Strategy:
    """Return the strategy called `name` (any case); an unknown one is refused."""
    for strategy in _STRATEGIES:
        if strategy.name == name.lower():
            return strategy
    raise refuse("--strategy", name, f"one of {', '.join(strategy_names())}")
