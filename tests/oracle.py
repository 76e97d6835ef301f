"""Gaussian data N(mu, sd^2) with the linear interpolant, t=0 noise and t=1 data: everything is closed-form."""

import types

import torch


def mutant(source, old, new):
    """The module that the source is with the one place `old` replaced by `new`."""
    assert source.count(old) == 1, "the mutated line has changed; adapt the test"
    module = types.ModuleType("mutant")
    exec(compile(source.replace(old, new), "mutant", "exec"), module.__dict__)
    return module


def fused(net):
    """net that takes tangent=(dx, dt, ds), too, and then gives its value and the derivative, as models.py's do."""
    def call(x, t, s=None, y=None, tangent=None):
        if tangent is None:
            return net(x, t, s, y)
        *two, ds = tangent
        if s is None:
            return torch.func.jvp(lambda x, t: net(x, t, None, y), (x, t), tuple(two))
        return torch.func.jvp(lambda x, t, s: net(x, t, s, y), (x, t, s), (*two, ds))
    return call


class Gaussian:
    """x_t has mean m(t) = t mu and standard deviation S(t); all maps act on each pixel alone."""

    def __init__(self, mu=0.7, sd=0.4):
        self.mu, self.sd = mu, sd

    def m(self, t):
        return t * self.mu

    def S(self, t):
        t = torch.as_tensor(t, dtype=torch.float64)
        return torch.sqrt((1 - t) ** 2 + (t * self.sd) ** 2)

    def flow_map(self, x, t, s):
        """X(x, t -> s): the point at time s of the trajectory through x at time t."""
        t, s = self.expand(t), self.expand(s)
        return self.m(s) + self.S(s) / self.S(t) * (x - self.m(t))

    def velocity(self, x, t):
        t = self.expand(t)
        dS = (t * self.sd ** 2 - (1 - t)) / self.S(t)
        return self.mu + dS / self.S(t) * (x - self.m(t))

    def average_velocity(self, x, t, s):
        return (self.flow_map(x, t, s) - x) / self.expand(s - t)

    def posterior_mean(self, x, t):
        """E[x_1 | x_t = x]."""
        t = self.expand(t)
        return self.mu + t * self.sd ** 2 / self.S(t) ** 2 * (x - self.m(t))

    @staticmethod
    def expand(t):
        return t[:, None, None, None] if torch.is_tensor(t) and t.ndim == 1 else t

    def draw(self, batch, seed=0):
        """x1, x0 [B, 2, 3, 3] and t [B], float64."""
        g = torch.Generator().manual_seed(seed)
        x1, x0 = torch.randn((2, batch, 2, 3, 3), generator=g, dtype=torch.float64)
        t = 0.02 + 0.96 * torch.rand(batch, generator=g, dtype=torch.float64)
        return self.mu + self.sd * x1, x0, t
