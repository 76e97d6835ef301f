"""What does a training step cost? Every method and derivative beside plain flow matching.

    python benchmarks/step.py                                     # CPU, the small networks
    python benchmarks/step.py --device cuda --bf16 --compile --nets LightningDiT-XL DiT-XL  # a GPU

A step is the targets, losses, backward pass, clip, AdamW and EMA, on random data; the teacher's two
passes of guidance are in it. The steps of a network take turns in one process, so that what else
the machine does falls on all of them; time is the median of their rounds, and a ratio the median of
the rounds' ratios. Memory is measured in processes of their own: the peak while two steps run, less
what network, EMA and teacher took before: activations, gradients and AdamW's moments.

"reference" is FACM's step as its released code arranges it, in our words: torch.func.jvp gives F
and dF/dt with gradient, attention is written out, the passes of the teacher, of the shortcut and of
the anchor are separate ones; with --compile the teacher's and the anchor's are compiled.

"bound": the step's matrix products at the measured speed of one large product, as a share of its
time. Counted: forward passes of the network (backward: two), by torch's FlopCounterMode.
"""

import copy
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import quickstart

import decm
import facm
import gcm
import models
from common import flags, folders, processes
from common.messages import fail
from common.run import ema_update
from jvp import forward_mode, select

LDIT = dict(name="LightningDiT-B/1", in_channels=16, num_classes=1000, input_size=16, qknorm=True)
UNET = dict(name="DDPM++", in_channels=3, num_classes=10, input_size=32, sigma_data=0.5)
NETWORKS = {                               # options and the batch
    "LightningDiT-small": (LDIT | dict(width=384, depth=6, heads=6, input_size=8), 32),
    "LightningDiT-B": (LDIT, 16),
    "LightningDiT-XL": (LDIT | dict(name="LightningDiT-XL/1"), 32),
    "DDPM++-small": (UNET | dict(width=64, mult=(1, 2, 2), blocks=1), 8),
    "DDPM++-medium": (UNET | dict(blocks=2), 16),
    "DDPM++-CIFAR10": (UNET, 64),
    "DiT-XL": (dict(name="DiT-XL/2", in_channels=4, num_classes=1000, input_size=32), 32),
}
# A method's step in forward passes: those with backward count three, F with its tangent two.
PASSES = {
    "fm": 3, "reference": 9, "facm fused": 9, "facm exact": 10, "facm fd": 10, "decm fused": 9,
    "decm exact": 10, "decm fd": 10, "gcm fused": 4, "gcm exact": 5, "gcm fd": 4}


class Steps:
    """A network with all that its training steps need; call with a case of PASSES."""

    def __init__(self, name, args):
        options, batch = NETWORKS[name]
        self.args, self.device, batch = args, torch.device(args.device), args.batch or batch
        processes.set_globals(self.device, args.compile)                     # as the scripts do
        if args.compile:                   # beyond a limit of 8 further cases are not compiled
            torch._dynamo.config.recompile_limit = 64
        torch.manual_seed(0)
        shape = (batch, options["in_channels"], *[options["input_size"]] * 2)
        self.nets, self.batch, self.shape = {}, batch, shape
        compiled = torch.compile if args.compile else lambda network: network
        for second_time in (False, True):
            net = models.create(**options, second_time=second_time).to(self.device)
            with torch.no_grad():          # nothing is zero, or products with it might be faster
                for p in net.parameters():
                    p.add_(0.02 * torch.randn_like(p))
            ema = copy.deepcopy(net).eval().requires_grad_(False)
            optimizer = torch.optim.AdamW(net.parameters(), 1e-6, fused=True)
            self.nets[second_time] = net, compiled(net), ema, optimizer
        self.teacher = copy.deepcopy(self.nets[False][2])
        self.guide = compiled(self.teacher)
        self.ways = {name: select(name, args.compile) for name in ("fused", "exact", "fd")}

    def loss(self, case, net, trained, x1, x0, t, y):
        """The loss of a case, before backward; trained: net, perhaps compiled."""
        (method, _, mode), one = case.partition(" "), torch.ones_like(t)
        jvp, guidance = self.ways.get(mode), dict(y_null=net.num_classes, w=1.75)
        alpha, beta = (partial(facm.WEIGHTS[name], p=0.5) for name in ("1-t^p", "cos"))
        if method == "fm":
            return (trained(facm.interpolate(x1, x0, t), t, None, y) - (x1 - x0)).square().mean()
        if method == "facm":
            return sum(facm.facm_loss(
                trained, jvp, x1, x0, t, y, alpha=alpha, beta=beta, teacher=self.guide, **guidance))
        if method == "decm":
            return sum(decm.decm_loss(trained, jvp, x1, x0, t, y, w1=decm.WEIGHTS["1"],
                                      teacher=self.guide, **guidance)[:2])
        if method == "gcm":
            f = gcm.precondition(trained, ct="exp", mu=3.5, sigma_d=0.5, second_time=False)
            return gcm.gcm_loss(f, jvp, x1, 0.5 * x0, t, gcm.T_MIN * one, one, y)
        xt, (_, c_fm) = facm.interpolate(x1, x0, t), facm.conditions(t, "expanded")
        with torch.no_grad():
            v_cond = self.guide(xt, t, None, y)
            v_uncond = self.guide(xt, t, None, torch.full_like(y, net.num_classes))
            v = v_uncond + 1.75 * (v_cond - v_uncond)
        L_fm = facm.fm_loss(trained(xt, *c_fm, y), v)
        with sdpa_kernel(SDPBackend.MATH):
            F_cm, dF_dt = torch.func.jvp(lambda x, t: net(x, t, None, y), (xt, t), (v, one))
        v_tar = facm.cm_target(F_cm.detach(), v, dF_dt.detach(), t, alpha(t))
        return L_fm.mean() + (beta(t) * facm.norm_l2(F_cm, v_tar, 1e-3)).mean()

    def __call__(self, case):
        """One step; its seconds."""
        net, trained, ema, optimizer = self.nets[case.startswith("decm")]
        x1, x0 = torch.randn((2, *self.shape), device=self.device)
        t = torch.rand(self.batch, device=self.device) * 0.9 + 0.05
        y = torch.arange(self.batch, device=self.device) % net.num_classes
        self.wait()
        start = time.perf_counter()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
            loss = self.loss(case, net, trained, x1, x0, t, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema_update(ema, net, 9, 6.94)
        self.wait()
        return time.perf_counter() - start

    def wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def memory(self, cases):
        """By how many bytes memory rises while steps run: of tensors on a GPU, or of the process."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            pathlib.Path("/proc/self/clear_refs").write_text("5")      # resets the peak (Linux)
            before = self.resident("VmRSS")
        for case in cases:
            self(case)
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() - before
        return self.resident("VmHWM") - before

    def resident(self, name):
        """VmRSS or VmHWM of this process: its memory now, or at most, in bytes."""
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))

    def flops(self):
        """Floating-point operations of one forward pass."""
        net, x = self.nets[False][0], torch.randn(self.shape, device=self.device)
        t = torch.full((self.batch,), 0.5, device=self.device)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(x, t, None, torch.zeros_like(t, dtype=torch.int64))
        return counter.get_total_flops()


def forward_ratio(steps, rounds):
    """Time of F with its tangent, in units of F, without gradient: (fused, torch.func.jvp)."""
    net, x = steps.nets[False][2], torch.randn(steps.shape, device=steps.device)
    t = torch.full_like(x[:, 0, 0, 0], 0.5)
    y = torch.zeros_like(t, dtype=torch.int64)
    tangent = torch.randn_like(x), torch.ones_like(t), None

    def timed(function):
        start = time.perf_counter()
        function()
        steps.wait()
        return time.perf_counter() - start

    ratios = []
    with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=steps.args.bf16):
        for _ in range(rounds + 1):
            plain = timed(lambda: net(x, t, None, y))
            fused = timed(lambda: net(x, t, None, y, tangent=tangent))
            exact = timed(lambda: forward_mode(net, x, t, None, y, tangent[0], 1, 0))
            ratios.append((fused / plain, exact / plain))
    return [statistics.median(column) for column in zip(*ratios[1:])]


def matrix_rate(device, bf16):
    """Floating-point operations a second of one large matrix product."""
    size, dtype = 8192 if device.type == "cuda" else 2048, torch.bfloat16 if bf16 else torch.float32
    a, seconds = torch.randn(size, size, device=device, dtype=dtype), []
    for _ in range(6):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * size ** 3 / min(seconds)


def parse_args():
    p = flags.Parser(description="Time and memory of training steps, beside flow matching's.")
    p.add_argument("--nets", nargs="+", choices=list(NETWORKS), help="networks",
                   default=["LightningDiT-small", "DDPM++-small"])
    p.add_argument("--cases", nargs="+", choices=list(PASSES), default=list(PASSES), help="steps")
    p.add_argument("--batch", type=int, help="images a step (default: the network's)")
    p.add_argument("--rounds", type=int, default=7, help="rounds that are timed, after one more")
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    p.add_argument("--compile", action="store_true", help="torch.compile networks")
    p.add_argument("--json", type=pathlib.Path, help="write the figures to this file, too")
    p.add_argument("--memory-of", nargs=2, help="one network and case, in this process")
    args = p.parse_args()
    folders.check_output(args.json)
    if min(args.batch or 1, args.rounds) < 1:
        fail("--batch and --rounds: at least 1")
    return args


def measure(name, args):
    """{case: its figures} of a network."""
    steps = Steps(name, args)
    peak, rows = steps.flops() * matrix_rate(steps.device, args.bf16) ** -1, {}
    rounds = [{case: steps(case) for case in args.cases} for _ in range(args.rounds + 1)][1:]
    for case in args.cases:
        command = [sys.executable, *sys.argv, "--memory-of", name, case]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            fail(f"{name}, {case}: {done.stderr.strip().splitlines()[-1]}")
        seconds = statistics.median(times[case] for times in rounds)
        ratio = {base: statistics.median(times[case] / times[base] for times in rounds)
                 for base in ("fm", "reference") if base in args.cases}
        rows[case] = dict(seconds=seconds, images_per_s=steps.batch / seconds, ratio=ratio,
                          bytes=json.loads(done.stdout.splitlines()[-1]),
                          bound=PASSES[case] * peak / seconds)
    fused, exact = forward_ratio(steps, args.rounds)
    return rows, dict(fused=fused, exact=exact), sum(p.numel() for p in steps.teacher.parameters())


def main():
    args = parse_args()
    if args.memory_of:
        name, case = args.memory_of
        print(json.dumps(Steps(name, args).memory([case] * 2)))
        return
    figures = {}
    for name in args.nets:
        rows, forward, parameters = measure(name, args)
        figures[name] = dict(rows=rows, forward=forward, parameters=parameters)
        print(f"\n{name}, {parameters / 1e6:.1f} M parameters, batch "
              f"{args.batch or NETWORKS[name][1]}; F with its tangent, no gradient: fused "
              f"{forward['fused']:.2f}, torch.func.jvp {forward['exact']:.2f} forward passes\n\n"
              "| step | ms | images/s | / fm | / reference | MiB | / reference | bound |\n"
              "|---|---|---|---|---|---|---|---|")
        whole = rows.get("reference", {}).get("bytes")
        for case, row in rows.items():
            cells = [f"{row['seconds'] * 1e3:.0f}", f"{row['images_per_s']:.0f}",
                     *(f"{row['ratio'][base]:.2f}" if base in row["ratio"] else ""
                       for base in ("fm", "reference")), f"{row['bytes'] / 2 ** 20:.0f}",
                     f"{row['bytes'] / whole:.2f}" if whole else "", f"{row['bound']:.0%}"]
            print(f"| {case} | " + " | ".join(cells) + " |", flush=True)
    if args.json:
        hardware = (torch.cuda.get_device_name() if args.device.startswith("cuda")
                    else f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads")
        args.json.write_text(json.dumps(dict(
            networks=figures, hardware=hardware, **quickstart.provenance()), indent=2) + "\n")


if __name__ == "__main__":
    main()
