"""Work that is stopped at chosen moments."""

from __future__ import annotations

from mi_hops.sweep.keep import Keeper
from mi_hops.worlds import train
from mi_hops.worlds.texts import Sampler


def stop_making(monkeypatch, error, *at):
    """From here on the makings of these numbers, counted from 1, raise `error`, each once.

    Returns:
        The names of what is made, and the numbers still to come; both change as work goes on.
    """
    made, stops, real = [], list(at), Keeper.make

    def make(keeper, name, work):
        made.append(name)
        if stops and len(made) == stops[0]:
            stops.pop(0)
            raise error
        return real(keeper, name, work)

    monkeypatch.setattr(Keeper, "make", make)
    return made, stops


def stop_training(monkeypatch, n):
    """Training stops before its nth batch, once, with the state of every update kept.

    Returns:
        One entry for each batch asked for; it grows as training goes on.
    """
    drawn, real = [], Sampler.draw

    def draw(sampler):
        drawn.append(len(drawn) + 1)
        if drawn[-1] == n:
            raise KeyboardInterrupt
        return real(sampler)

    monkeypatch.setattr(Sampler, "draw", draw)
    monkeypatch.setattr(train, "KEPT_EVERY", 0.0)
    return drawn
