"""Measures the cost of a training step of each method and derivative, compared with flow matching.

    python benchmarks/step.py                                     # CPU, the small networks
    python benchmarks/step.py --device cuda --bf16 --compile --nets LightningDiT-XL DiT-XL  # a GPU

A step has the targets, the losses, the backward pass, clipping, AdamW and the EMA, on random data,
with the two passes of the teacher for guidance. Each round runs a step of every case in one
process, so that other programs slow all cases. The time is the median of the rounds, and a ratio is
the median of the ratios in the rounds. The memory of each case is measured in a separate process:
the peak during two steps, minus the memory of network, EMA and teacher. It consists of activations,
gradients and AdamW's moments.

"reference" is FACM's step in the way of its released code, written anew: torch.func.jvp computes F
and dF/dt with gradient, attention is the plain one, and the teacher, the shortcut and the anchor
have separate passes. With --compile those of the teacher and the anchor are compiled.

"bound" is the time that the matrix products of the step would need at the measured speed of one
large product, relative to the time of the step. The number of operations is the number of forward
passes (a backward pass counts as two) times the count of torch's FlopCounterMode for one pass.
"""

import copy
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import quickstart

import decm
import facm
import flow
import gcm
import models
from common import flags, folders, processes
from common.ema import gamma_of
from common.messages import fail
from jvp import forward_mode, select

LDIT = dict(name="LightningDiT-B/1", in_channels=16, num_classes=1000, input_size=16, qknorm=True)
UNET = dict(name="DDPM++", in_channels=3, num_classes=10, input_size=32, sigma_data=0.5)
NETWORKS = {                               # {name: (options, batch)}
    "LightningDiT-small": (LDIT | dict(width=384, depth=6, heads=6, input_size=8), 32),
    "LightningDiT-B": (LDIT, 16),
    "LightningDiT-XL": (LDIT | dict(name="LightningDiT-XL/1"), 32),
    "DDPM++-small": (UNET | dict(width=64, mult=(1, 2, 2), blocks=1), 8),
    "DDPM++-medium": (UNET | dict(blocks=2), 16),
    "DDPM++-CIFAR10": (UNET, 64),
    "DiT-XL": (dict(name="DiT-XL/2", in_channels=4, num_classes=1000, input_size=32), 32),
}
# {case: forward passes in a step}; a pass with backward counts as 3, and the tangent of F adds 2
PASSES = {
    "fm": 3,
    "reference": 9,
    "facm fused": 9,
    "facm exact": 10,
    "facm fd": 10,
    "decm fused": 9,
    "decm exact": 10,
    "decm fd": 10,
    "gcm fused": 4,
    "gcm exact": 5,
    "gcm fd": 4,
}
W = 1.75                                   # the scale of the guidance


class Steps:
    """A network with everything that its training steps need."""

    def __init__(self, name, args):
        options, batch = NETWORKS[name]
        self.args, self.device = args, torch.device(args.device)
        self.batch = args.batch or batch
        self.shape = (self.batch, options["in_channels"], options["input_size"],
                      options["input_size"])
        processes.set_globals(self.device, args.compile)   # as the scripts do
        if args.compile:                   # otherwise only the first eight cases are compiled
            torch._dynamo.config.recompile_limit = 64
        torch.manual_seed(0)
        self.nets = {}                     # {second_time: (net, its compiled form, ema, optimizer)}
        for second_time in (False, True):
            net = models.create(**options, second_time=second_time, device=self.device)
            with torch.no_grad():          # no zeros, because products with them may be faster
                for p in net.parameters():
                    p.add_(0.02 * torch.randn_like(p))
            ema = copy.deepcopy(net).eval().requires_grad_(False)
            optimizer = torch.optim.AdamW(net.parameters(), 1e-6, fused=True)
            self.nets[second_time] = net, self.compiled(net), ema, optimizer
        self.teacher = copy.deepcopy(self.nets[False][2])
        self.guide = self.compiled(self.teacher)
        self.ways = {way: select(way, args.compile) for way in ("fused", "exact", "fd")}

    def compiled(self, net):
        """The network that the losses call."""
        return torch.compile(net) if self.args.compile else net

    def loss(self, case, net, model, x1, x0, t, y):
        """The loss of a case, before the backward pass; model: net, perhaps compiled."""
        if case == "fm":
            return flow.flow_loss(model, x1, x0, t, y)
        if case == "reference":
            return self.reference_loss(net, model, x1, x0, t, y)
        method, way = case.split()
        jvp = self.ways[way]
        guidance = dict(teacher=self.guide, y_null=net.num_classes, w=W)
        if method == "facm":
            L_fm, L_cm = facm.facm_loss(model, jvp, x1, x0, t, y, **guidance)
            return L_fm + L_cm
        if method == "decm":
            L_fm, L_cm, _ = decm.decm_loss(model, jvp, x1, x0, t, y, **guidance)
            return L_fm + L_cm
        s, density = torch.full_like(t, gcm.T_MIN), torch.ones_like(t)
        return gcm.gcm_loss(gcm.precondition(model), jvp, x1, 0.5 * x0, t, s, density, y,
                            difference=way == "fd")

    def reference_loss(self, net, model, x1, x0, t, y):
        """FACM's loss in separate passes, with torch.func.jvp for F and dF/dt."""
        xt = facm.interpolate(x1, x0, t)
        _, c_fm = facm.conditions(t, "expanded")
        with torch.no_grad():
            v_cond = self.guide(xt, t, None, y)
            v_uncond = self.guide(xt, t, None, torch.full_like(y, net.num_classes))
            v = v_uncond + W * (v_cond - v_uncond)
        L_fm = facm.fm_loss(model(xt, *c_fm, y), v)

        def F(x, t):
            return net(x, t, None, y)

        with sdpa_kernel(SDPBackend.MATH):
            F_cm, dF_dt = torch.func.jvp(F, (xt, t), (v, torch.ones_like(t)))
        alpha = facm.WEIGHTS["1-t^p"](t, 0.5)
        v_tar = facm.cm_target(F_cm.detach(), v, dF_dt.detach(), t, alpha)
        L_cm = facm.WEIGHTS["cos"](t, 0.5) * facm.norm_l2(F_cm, v_tar, 1e-3)
        return L_fm.mean() + L_cm.mean()

    def step(self, case):
        """Makes one step of a case, and returns its seconds."""
        net, model, ema, optimizer = self.nets[case.startswith("decm")]
        x1 = torch.randn(self.shape, device=self.device)
        x0 = torch.randn(self.shape, device=self.device)
        t = torch.rand(self.batch, device=self.device) * 0.9 + 0.05
        y = torch.arange(self.batch, device=self.device) % net.num_classes
        self.wait()
        start = time.perf_counter()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
            loss = self.loss(case, net, model, x1, x0, t, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        beta = (1 - 1 / 10) ** (gamma_of(0.1) + 1)
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - beta)
        self.wait()
        return time.perf_counter() - start

    def wait(self):
        """Waits for a GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def memory(self, case):
        """The bytes by which memory grows during two steps: of tensors on a GPU, or else of the
        process."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            pathlib.Path("/proc/self/clear_refs").write_text("5")      # resets the peak (Linux)
            before = resident("VmRSS")
        self.step(case)
        self.step(case)
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() - before
        return resident("VmHWM") - before

    def flops(self):
        """The number of floating-point operations of a forward pass."""
        x = torch.randn(self.shape, device=self.device)
        t = torch.full((self.batch,), 0.5, device=self.device)
        y = torch.zeros(self.batch, dtype=torch.int64, device=self.device)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self.teacher(x, t, None, y)
        return counter.get_total_flops()


def resident(name):
    """The memory of this process in bytes: "VmRSS" is the current one, "VmHWM" the maximum."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])


def forward_ratio(steps, rounds):
    """The times of F with its tangent, without gradient, divided by that of F: for fused and for
    torch.func.jvp."""
    net = steps.teacher
    x = torch.randn(steps.shape, device=steps.device)
    dx = torch.randn_like(x)
    t = torch.full((steps.batch,), 0.5, device=steps.device)
    y = torch.zeros(steps.batch, dtype=torch.int64, device=steps.device)

    def timed(function):
        start = time.perf_counter()
        function()
        steps.wait()
        return time.perf_counter() - start

    fused_ratios, exact_ratios = [], []
    with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=steps.args.bf16):
        for _ in range(rounds + 1):
            plain = timed(lambda: net(x, t, None, y))
            fused = timed(lambda: net(x, t, None, y, tangent=(dx, torch.ones_like(t), None)))
            exact = timed(lambda: forward_mode(net, at=(x, t, None, y), along=(dx, 1, 0)))
            fused_ratios.append(fused / plain)
            exact_ratios.append(exact / plain)
    return statistics.median(fused_ratios[1:]), statistics.median(exact_ratios[1:])


def matrix_rate(device, bf16):
    """The floating-point operations per second of one large matrix product."""
    size = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if bf16 else torch.float32
    a = torch.randn(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * size ** 3 / min(seconds)


def memory_of(name, case):
    """Steps.memory of a case, in a separate process."""
    command = [sys.executable, *sys.argv, "--memory-of", name, case]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        fail(f"{name}, {case}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(name, args):
    """The figures of a network: its cases, the ratios of a forward pass, and its parameters."""
    steps = Steps(name, args)
    pass_seconds = steps.flops() / matrix_rate(steps.device, args.bf16)
    rounds = []
    for _ in range(args.rounds + 1):
        rounds.append({case: steps.step(case) for case in args.cases})
    rounds = rounds[1:]                    # the first round includes what PyTorch does only once
    rows = {}
    for case in args.cases:
        seconds = statistics.median(times[case] for times in rounds)
        ratio = {}
        for base in ("fm", "reference"):
            if base in args.cases:
                ratio[base] = statistics.median(times[case] / times[base] for times in rounds)
        rows[case] = dict(
            seconds=seconds, images_per_s=steps.batch / seconds, ratio=ratio,
            bytes=memory_of(name, case), bound=PASSES[case] * pass_seconds / seconds)
    fused, exact = forward_ratio(steps, args.rounds)
    parameters = sum(p.numel() for p in steps.teacher.parameters())
    return dict(rows=rows, forward=dict(fused=fused, exact=exact), parameters=parameters)


def print_table(name, batch, figures):
    """Prints the figures of a network."""
    rows, forward = figures["rows"], figures["forward"]
    print(f"\n{name}, {figures['parameters'] / 1e6:.1f} M parameters, batch {batch}; F with its "
          f"tangent, no gradient: fused {forward['fused']:.2f}, torch.func.jvp "
          f"{forward['exact']:.2f} forward passes\n")
    print("| step | ms | images/s | / fm | / reference | MiB | / reference | bound |")
    print("|---|---|---|---|---|---|---|---|")
    for case, row in rows.items():
        cells = [case, f"{row['seconds'] * 1e3:.0f}", f"{row['images_per_s']:.0f}"]
        for base in ("fm", "reference"):
            cells.append(f"{row['ratio'][base]:.2f}" if base in row["ratio"] else "")
        cells.append(f"{row['bytes'] / 2 ** 20:.0f}")
        if "reference" in rows:
            cells.append(f"{row['bytes'] / rows['reference']['bytes']:.2f}")
        else:
            cells.append("")
        cells.append(f"{row['bound']:.0%}")
        print("| " + " | ".join(cells) + " |", flush=True)


def parse_args():
    p = flags.Parser(description="Time and memory of training steps, relative to flow matching.")
    p.add_argument("--nets", nargs="+", choices=list(NETWORKS), help="networks",
                   default=["LightningDiT-small", "DDPM++-small"])
    p.add_argument("--cases", nargs="+", choices=list(PASSES), default=list(PASSES), help="steps")
    p.add_argument("--batch", type=int, help="images in a step (default: the network's)")
    p.add_argument("--rounds", type=int, default=7, help="rounds that are timed, after one more")
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    p.add_argument("--compile", action="store_true", help="torch.compile networks")
    p.add_argument("--json", type=pathlib.Path, help="write the figures to this file as well")
    p.add_argument("--memory-of", nargs=2, help="one network and case, in this process")
    args = p.parse_args()
    if args.rounds < 1 or (args.batch is not None and args.batch < 1):
        fail("--batch and --rounds must be at least 1")
    return args


def main():
    args = parse_args()
    if args.memory_of:
        name, case = args.memory_of
        print(json.dumps(Steps(name, args).memory(case)))
        return
    folders.check_output(args.json)
    figures = {}
    for name in args.nets:
        figures[name] = measure(name, args)
        print_table(name, args.batch or NETWORKS[name][1], figures[name])
    if args.json:
        hardware = f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"
        if args.device.startswith("cuda"):
            hardware = torch.cuda.get_device_name()
        text = json.dumps(dict(networks=figures, hardware=hardware, **quickstart.provenance()),
                          indent=2)
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
