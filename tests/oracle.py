"""Gaussian data N(mu, sd^2) with the linear interpolant, t=0 noise and t=1 data: everything is closed-form."""

import types

import torch


def mutant(source, old, new):
    """The module of the source in which the only occurrence of `old` is replaced by `new`."""
    assert source.count(old) == 1, "the mutated line has changed; adapt the test"
    module = types.ModuleType("mutant")
    exec(compile(source.replace(old, new), "mutant", "exec"), module.__dict__)
    return module


# Shapes of a batch: features, sequences, images, videos, images of one channel.
SHAPES = [(16, 6), (16, 3, 4), (16, 2, 3, 3), (16, 2, 2, 2, 2), (16, 1, 4, 4)]


def fused(net):
    """Wraps net so that a call with tangent=(dx, dt, ds) returns value and derivative, as in models.py."""
    def call(x, t, s=None, y=None, tangent=None):
        if tangent is None:
            return net(x, t, s, y)
        *two, ds = tangent
        if s is None:
            value, derivative = torch.func.jvp(lambda x, t: net(x, t, None, y), (x, t), tuple(two))
        else:
            value, derivative = torch.func.jvp(lambda x, t, s: net(x, t, s, y), (x, t, s), (*two, ds))
        return value, derivative.detach()
    return call


class Beside:
    """A network whose output is that of an exact network plus theta cos(2 x), where theta is a trained number. It has
    none of the attributes of models.py's networks."""

    def __init__(self, exact, theta=0.0):
        self.exact = exact
        self.theta = torch.tensor(theta, dtype=torch.float64, requires_grad=True)

    def __call__(self, x, t, s=None, y=None):
        return self.exact(x, t, s, y) + self.theta * torch.cos(2 * x)


def loss_and_gradient(loss_of, exact, theta=0.0):
    """The value of loss_of(net) and its derivative with respect to theta, where net is Beside(exact, theta)."""
    net = Beside(exact, theta)
    loss = loss_of(fused(net))
    gradient, = torch.autograd.grad(loss, net.theta)
    return loss.item(), gradient.item()


class Gaussian:
    """x_t has mean m(t) = t mu and standard deviation S(t). All maps are elementwise and accept any shape."""

    def __init__(self, mu=0.7, sd=0.4):
        self.mu, self.sd = mu, sd

    def m(self, t):
        return t * self.mu

    def S(self, t):
        t = torch.as_tensor(t, dtype=torch.float64)
        return torch.sqrt((1 - t) ** 2 + (t * self.sd) ** 2)

    def flow_map(self, x, t, s):
        """X(x, t -> s): the point at time s of the trajectory through x at time t."""
        t, s = self.expand(t, x), self.expand(s, x)
        return self.m(s) + self.S(s) / self.S(t) * (x - self.m(t))

    def velocity(self, x, t):
        t = self.expand(t, x)
        dS = (t * self.sd ** 2 - (1 - t)) / self.S(t)
        return self.mu + dS / self.S(t) * (x - self.m(t))

    def average_velocity(self, x, t, s):
        return (self.flow_map(x, t, s) - x) / self.expand(s - t, x)

    def posterior_mean(self, x, t):
        """E[x_1 | x_t = x]."""
        t = self.expand(t, x)
        return self.mu + t * self.sd ** 2 / self.S(t) ** 2 * (x - self.m(t))

    def posterior_sd(self, t):
        """The standard deviation of x_1 for a given x_t."""
        return self.sd * (1 - t) / self.S(t)

    @staticmethod
    def expand(t, x=None):
        """Times [B] with as many dimensions as x, or 4 without x. A number is returned unchanged."""
        if not torch.is_tensor(t) or t.ndim != 1:
            return t
        return t.reshape(-1, *[1] * ((4 if x is None else x.ndim) - 1))

    def draw(self, batch, seed=0, shape=(2, 3, 3)):
        """Draws x1, x0 [B, *shape] and t [B] in float64."""
        g = torch.Generator().manual_seed(seed)
        x1, x0 = torch.randn((2, batch, *shape), generator=g, dtype=torch.float64)
        t = 0.02 + 0.96 * torch.rand(batch, generator=g, dtype=torch.float64)
        return self.mu + self.sd * x1, x0, t
