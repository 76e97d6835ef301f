"""Reads weights from public checkpoints and from those of this repository. Nothing in a file is
executed.

    load(path)            the network of a checkpoint, with its weights
    read(path)            its tensors, {name: tensor}, and its options, if the file has them
    options_from_shapes   the options of models.create that follow from names and shapes
    read_start            the tensors and options with which a run begins

Files: .pt, .pth, .ckpt, .bin, .safetensors, and the .pkl of NVlabs/edm and edm2. Layouts:
facebookresearch's DiT, SiT, LightningDiT, FACM's release, NVlabs/edm and edm2, CompVis' and
diffusers' AutoencoderKL.
"""

import argparse
import collections
import inspect
import io
import pickle
import re

import numpy as np
import torch

import models
from common import checkpoints
from common.messages import say_once

# --------------------------------------------------------------------------------------------------
# Reading.

# Options that do not follow from the shapes of public weights
NOT_IN_SHAPES = "heads head_channels prediction sigma_data edm_time time_scale pixelnorm".split()

# Heads of the published DiTs and LightningDiTs, by width
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 1536: 24, 1792: 28}

# Usual names of averaged weights: DiT, SiT, LightningDiT; k-diffusion, CompVis; lucidrains; FACM's
# training, by ema_pytorch; timm, OpenTAD; diffusers. They are preferred to the weights themselves.
AVERAGES = ("ema", "model_ema", "ema_model", "emas", "state_dict_ema", "ema_state_dict")

# ema_pytorch also saves the network itself; of two averages FACM's authors use the second one
AVERAGE = re.compile(r"^(ema_model|ema|model_ema|ema_models\.1\.ema_model)\.(?!decay$|num_)")

# Prefixes that wrappers add to the names
PREFIX = re.compile(r"^(module\.|_orig_mod\.|first_stage_model\.|model\.(?=map_|enc\.|dec\.)|"
                    r"unet\.)+")

# Parameters that a student may have and that may be missing in the file with which it begins
MAY_BEGIN_ANEW = ("map_second", "r_embed", "map_augment")


# Files may contain NumPy numbers. weights_only needs the function that rebuilds them, whose name
# differs between NumPy 1 and NumPy 2
NUMBERS = [(np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar")
           for core in ("core", "_core")]
NUMBERS += [np.dtype, *{type(np.dtype(letter)) for letter in "?bBhHiIlLqQefdg"}]


class _Plain(dict):
    """Replaces an object in a pickle that is only a container, whose state becomes the items, or a
    NumPy number, which is dropped."""

    def __init__(self, *args):
        super().__init__()

    def __setstate__(self, state):
        self.update(state if isinstance(state, dict) else {})


class _Unpickler(pickle.Unpickler):
    """Rebuilds tensors and plain containers, executes nothing, and raises UnpicklingError for any
    other name.

    NVlabs' pickles contain the source code of the network. Here a network becomes a dict of its
    state.
    """

    ALLOWED = {
        "collections.OrderedDict": collections.OrderedDict, "builtins.set": set,
        "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
        "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
        "torch.storage._load_from_bytes":
            lambda data: torch.load(io.BytesIO(data), map_location="cpu", weights_only=True),
        "torch_utils.persistence._reconstruct_persistent_obj":
            lambda meta: _Plain() | meta["state"],
        **dict.fromkeys(["torch.nn.modules.container.ModuleDict", "dnnlib.util.EasyDict",
                         "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
                         "numpy.dtype"], _Plain),
    }

    def find_class(self, module, name):
        if f"{module}.{name}" not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it needs {module}.{name}, which is neither a tensor "
                                         "nor a plain container")
        return self.ALLOWED[f"{module}.{name}"]


def _flatten(state, prefix=""):
    """The state_dict of an unpickled network: {"enc.32x32_conv.weight": tensor, ...}."""
    tensors = {**state.get("_parameters", {}), **state.get("_buffers", {})}
    weights = {prefix + k: v.detach() for k, v in tensors.items() if v is not None}
    for name, child in state.get("_modules", {}).items():
        weights |= _flatten(child or {}, f"{prefix}{name}.")
    return weights


def find_weights(held, place=()):
    """[(place, weights), ...]: every dict of tensors in a checkpoint, at any depth. place: the keys
    that lead to it."""
    found = []
    if any(torch.is_tensor(value) for value in held.values()):
        found.append((place, held))
    for key, value in held.items():
        if isinstance(value, dict):
            found += find_weights(value, (*place, str(key)))
        elif isinstance(value, (list, tuple)):
            for number, entry in enumerate(value):
                if isinstance(entry, dict):
                    found += find_weights(entry, (*place, str(key), str(number)))
    return found


def layout(weights):
    """The names and shapes of a dict of tensors, without the prefixes of wrappers."""
    return {(PREFIX.sub("", str(name)), tuple(w.shape)) for name, w in weights.items()
            if torch.is_tensor(w)}


def has_tensors(value):
    """Whether a value of a checkpoint is a dict or list that holds tensors, at any depth."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, (list, tuple)):
        return False
    return any(torch.is_tensor(entry) or has_tensors(entry) for entry in value)


def choose(held, path, key=None):
    """The dict in a checkpoint that holds its weights: that of `key`, or else the only average of
    the weights, or else the model.

    Raises ValueError, which lists the candidates, if the choice would be a guess. This is so if
    several dicts have the names and shapes of the weights, and not exactly one of them is known as
    an average, or if another entry with tensors has "ema" in its name.
    """
    found = {".".join(place): weights for place, weights in find_weights(held)}
    if key:
        if key not in found:
            raise ValueError(f"{path} has the keys {', '.join(found)}; --weights {key} names no "
                             "weights in it")
        return found[key]
    names = [name for name in (*AVERAGES, "model", "state_dict", *found) if name in found]
    if not names:
        return {}
    chosen = names[0]
    alike = [name for name in found if layout(found[name]) == layout(found[chosen])]
    averages = [str(name) for name, value in held.items()
                if "ema" in str(name).lower() and has_tensors(value)]
    if averages not in ([], [chosen]) or (len(alike) > 1 and averages != [chosen]):
        places = ", ".join(dict.fromkeys([*found, *averages]))
        raise ValueError(f"{path} has the keys {places}; choose one by --weights KEY")
    return found[chosen]


def read(path, velocity=False, key=None):
    """The tensors of a .safetensors, .pkl (NVlabs/edm) or PyTorch file, {name: tensor}, and the
    options of models.create, or None for a public file. key: see choose.

    Nothing in the file is executed. Raises ValueError for a file that is missing, damaged, or
    holds anything but tensors and plain values, and with `velocity` for a consistency model of
    this repository.
    """
    try:
        if str(path).endswith(".safetensors"):
            held = checkpoints.read_safetensors(path)
        elif str(path).endswith(".pkl"):
            with open(path, "rb") as f:
                held = _flatten(_Unpickler(f).load()["ema"])
        else:
            with torch.serialization.safe_globals([argparse.Namespace, *NUMBERS]):
                held = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint") from None
    except Exception as e:
        asks = re.search(r"nsupported (?:global: )?GLOBAL (\S+)", str(e))
        reason = f"it needs {asks[1]}" if asks else " ".join(str(e).split())[:120]
        raise ValueError(f"{path} is not a readable checkpoint: it is truncated or of another kind "
                         f"({type(e).__name__}: {reason})") from None
    args = held.get("args") if isinstance(held, dict) else None
    options = args.get("net") if isinstance(args, dict) else None
    if velocity and options and not is_velocity(held):
        raise ValueError(f"{path} is a consistency model and not a velocity network; use its "
                         "teacher, such as runs/flow-DATA/ckpt.pt")
    if isinstance(held, dict) and not str(path).endswith(".pkl"):
        held = choose(held, path, key)
        averaged = {AVERAGE.sub("", k): v for k, v in held.items() if AVERAGE.match(str(k))}
        held = averaged or held
    if not isinstance(held, dict) or not any(torch.is_tensor(v) for v in held.values()):
        raise ValueError(f"{path} contains no weights, neither at its top level nor in an entry "
                         "such as ema or model")
    weights = {PREFIX.sub("", k): v for k, v in held.items() if torch.is_tensor(v)}
    if any(k.startswith("projectors.") for k in weights):
        say_once(f"{path}: its projectors.*, which only the training of REPA needs, are ignored")
        weights = {k: v for k, v in weights.items() if not k.startswith("projectors.")}
    if "emb_noise.weight" in weights:              # EDM2: here gains are [1], without uncertainty
        weights = {k: v.reshape(1) if k.endswith("_gain") else v for k, v in weights.items()
                   if not k.startswith("logvar_")}
    if any(k.startswith("encoder.down_blocks") for k in weights):
        weights = _from_diffusers(weights)
    if "quant_conv.weight" in weights:             # without what only its training needs
        weights = {k: v for k, v in weights.items()
                   if k.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))}
    return weights, options


DIFFUSERS = [
    (r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d+)\.resnets\.(\d+)", r"up.\1.block.\2"),
    (r"up_blocks\.(\d+)\.upsamplers\.0", r"up.\1.upsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"), (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.(group_norm|norm)\.", "mid.attn_1.norm."),
    (r"mid_block\.attentions\.0\.(to_|query|key|value|proj_attn)", r"mid.attn_1.\1"),
    (r"attn_1\.(to_q|query)\.", "attn_1.q."), (r"attn_1\.(to_k|key)\.", "attn_1.k."),
    (r"attn_1\.(to_v|value)\.", "attn_1.v."),
    (r"attn_1\.(to_out\.0|proj_attn)\.", "attn_1.proj_out."),
    (r"conv_shortcut", "nin_shortcut"), (r"conv_norm_out", "norm_out"),
]


def _from_diffusers(weights):
    """The weights of diffusers' AutoencoderKL under CompVis' names. diffusers numbers the levels of
    the decoder in the opposite order."""
    levels = 1 + max(int(k.split(".")[2]) for k in weights if k.startswith("decoder.up_blocks."))
    renamed = {}
    for name, w in weights.items():
        for pattern, new in DIFFUSERS:
            name = re.sub(pattern, new, name)
        name = re.sub(r"\.up\.(\d+)", lambda m: f".up.{levels - 1 - int(m[1])}", name)
        linear = ".attn_1." in name and w.dim() == 2
        renamed[name] = w[:, :, None, None] if linear else w
    return renamed


def options_from_shapes(weights):
    """The options of models.create that follow from the names and shapes of public weights.

    Raises ValueError for weights of an unknown network.
    """
    shape = {k: tuple(w.shape) for k, w in weights.items()}
    count = lambda pattern: len({m[1] for k in shape if (m := re.match(pattern, k))})  # noqa: E731
    if "x_embedder.proj.weight" in shape:
        width, channels, patch, _ = shape["x_embedder.proj.weight"]
        heads = HEADS.get(width, max(width // 64, 1))
        if "feat_rope.freqs_cos" in shape:
            heads = width // shape["feat_rope.freqs_cos"][1]
        mlp, gated = "blocks.0.mlp.fc1.weight", "blocks.0.mlp.w12.weight"
        return dict(
            name="DiT", input_size=round(shape["pos_embed"][1] ** 0.5) * patch, patch=patch,
            in_channels=channels, width=width, depth=count(r"blocks\.(\d+)\."), heads=heads,
            num_classes=shape.get("y_embedder.embedding_table.weight", (1,))[0] - 1,
            mlp_ratio=4.0 if gated in shape else shape[mlp][0] / width,
            qknorm="blocks.0.attn.q_norm.weight" in shape, swiglu=gated in shape,
            rope="feat_rope.freqs_cos" in shape, rmsnorm="blocks.0.norm1.weight" in shape,
            wo_shift=shape["blocks.0.adaLN_modulation.1.weight"][0] == 4 * width,
            learn_sigma=shape["final_layer.linear.weight"][0] == 2 * channels * patch ** 2,
            second_time="r_embedder.mlp.0.weight" in shape)
    # U-Nets: the resolutions, from the top
    sizes = sorted({int(m[1]) for k in shape if (m := re.match(r"enc\.(\d+)x", k))})[::-1]
    top = f"enc.{sizes[0]}x{sizes[0]}" if sizes else ""
    if "map_layer0.weight" in shape:
        width, channels = shape[f"{top}_conv.weight"][:2]
        conv = [shape[f"enc.{n}x{n}_block0.conv1.weight"][0] for n in sizes]
        block = f"{top}_block0."
        return dict(
            name="NCSN++" if "map_noise.freqs" in shape else "DDPM++", input_size=sizes[0],
            in_channels=channels, width=width, mult=tuple(c // width for c in conv),
            blocks=count(rf"{re.escape(top)}_block(\d+)\."),
            attention=tuple(n for n in sizes if f"enc.{n}x{n}_block0.qkv.weight" in shape),
            num_classes=shape.get("map_label.weight", (0, 0))[1],
            augment_dim=shape.get("map_augment.weight", (0, 0))[1],
            adaptive_scale=shape[block + "affine.weight"][0] == 2 * conv[0],
            second_time="map_second.0.weight" in shape, sigma_data=0.5, edm_time=True)
    if "emb_noise.weight" in shape:
        width, channels = shape[f"{top}_conv.weight"][:2]
        return dict(
            name="EDM2", input_size=sizes[0], in_channels=channels - 1, width=width,
            mult=tuple(shape[f"enc.{n}x{n}_block0.conv_res1.weight"][0] // width for n in sizes),
            blocks=count(rf"{re.escape(top)}_block(\d+)\."),
            attention=tuple(n for n in sizes if f"enc.{n}x{n}_block0.attn_qkv.weight" in shape),
            num_classes=shape.get("emb_label.weight", (0, 0))[1],
            second_time="map_second.0.weight" in shape)
    if "post_quant_conv.weight" in shape:
        levels = count(r"encoder\.down\.(\d+)\.")
        conv = [shape[f"encoder.down.{i}.block.0.conv2.weight"][0] for i in range(levels)]
        width, z = shape["encoder.conv_in.weight"][0], shape["post_quant_conv.weight"][1]
        name = "AutoencoderKL-f8d4" if (levels, z) == (4, 4) else "AutoencoderKL"
        return dict(
            name=name, width=width, blocks=count(r"encoder\.down\.0\.block\.(\d+)\."),
            attention=tuple(
                i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in shape),
            z_channels=z, mult=tuple(c // width for c in conv))
    raise ValueError(f"weights of an unknown network; the first name is {next(iter(shape))}")


def say_guesses(path, options, given):
    """Prints, once for a file, the options of a public network that follow neither from the shapes
    nor from --net and are therefore assumed."""
    if "z_channels" in options:            # an autoencoder
        return
    defaults = inspect.signature(models.NETWORKS[options["name"]]).parameters
    guesses = []
    for key in ("heads", "head_channels", "prediction", "sigma_data"):
        known = key in given or (key == "heads" and options.get("width") in HEADS)
        if key in defaults and not known:
            guesses.append(f"{key}={options.get(key, defaults[key].default)}")
    if guesses:
        say_once(f"{path}: {' '.join(guesses)} is assumed, because the file does not contain it; "
                 "--net changes it")


def load(path, velocity=False, key=None, **options):
    """The network of a checkpoint of this repository or a public one, with its weights, in eval
    mode on the CPU.

    options: those that do not follow from the shapes of public weights (NOT_IN_SHAPES), such as
    prediction="noise" for the networks of facebookresearch/DiT, or sigma_data=None for a SongUNet
    that is not an EDM denoiser. velocity, key, and the ValueErrors: see read and
    checkpoints.load_weights.
    """
    weights, own = read(path, velocity, key)
    try:
        known = own or options_from_shapes(weights) | options
        net = models.create(**known)
    except (KeyError, ValueError) as e:
        raise ValueError(f"{path}: no network of models.py fits these weights: {e}") from None
    checkpoints.load_weights(net, weights, path)
    if own is None:
        say_guesses(path, known, options)
    return net.eval()


def is_velocity(checkpoint):
    """Whether a checkpoint of this repository is a flow-matching network: one of flow.py, or of an
    earlier version, whose runs began with flow matching, if the run had not gone beyond it."""
    steps_of_flow = checkpoint["args"].get("pretrain", 0)
    return checkpoint.get("method") == "flow" or checkpoint.get("step", 0) <= steps_of_flow


def read_start(path, args):
    """The tensors of the velocity network with which a run begins, and the options of the run's
    network.

    The options are those of the file. From args.net come only dropout and, for a public file, the
    options that do not follow from shapes. args: the flags of a training script. Raises ValueError
    as read does, and if --net contradicts the file.
    """
    tensors, own = read(path, velocity=True, key=args.weights)
    options = own or options_from_shapes(tensors)
    held = models.expand(options)
    wanted = args.net
    if models.expand(args.net)["name"] != held["name"]:
        wanted = args.net_given            # the preset has the options of another network
    names = ("dropout", "dropout_res") if own else ("dropout", "dropout_res", *NOT_IN_SHAPES)
    options = options | {k: v for k, v in wanted.items() if k in names}
    held = models.expand(options)
    given = models.expand(dict(name=held["name"]) | args.net_given)
    for key in ("input_size", "in_channels", "num_classes"):
        if key not in args.net_given:      # a name implies it, but the data determine it
            given.pop(key, None)
    different = first_difference(held, held | given)
    if different:
        key, has, wants = different
        raise ValueError(f"--net {key}={wants}: {path} has a network with {key}={has}, which the "
                         "run uses; leave the option out, or name another file")
    if own is None:
        say_guesses(path, held, wanted)
    return tensors, options


def first_difference(a, b):
    """(option, its value in a, its value in b) of the first option in which two networks differ, or
    None. Options that are not given have their defaults. Dropout, a second time and augmentation
    labels are not compared, because a run adds them to the network with which it begins."""
    a, b = models.expand(a), models.expand(b)
    defaults = inspect.signature(models.NETWORKS[b["name"]]).parameters
    for key in dict.fromkeys([*b, *a]):
        if key in ("dropout", "dropout_res", "second_time", "augment_dim"):
            continue
        default = defaults[key].default if key in defaults else None
        one, other = a.get(key, default), b.get(key, default)
        if one != other:
            return key, one, other
    return None
