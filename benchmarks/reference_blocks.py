r"""Reconstruct one block with BRECQ's official PyTorch code: how long it took, how well it came out.

    python benchmarks/reference_blocks.py --reference=BRECQ --problem=block.npz --bits=2 --steps=500,2000 --regularizer=0.01,0.1

Needs torch, numpy and a checkout of https://github.com/yhhhli/BRECQ (written against e455d62); nothing of JAX. That code
is called as its main_imagenet.py calls it, and none of it is here. Each setting gives one JSON line:

  seconds            wall time of block_reconstruction, after a short one that is not counted; `scale_seconds`: of the
                     search for step sizes before
  ms_per_iteration   mean of its loop; with --time-only=N the median of N iterations, the device waited for at each
  error              on the held-out inputs, with rounded weights: the squared difference to the float block's output,
                     summed over channels, averaged over images and positions; `nearest_error`: with nearest rounding
  undecided          share of weights whose soft choice ended further than DECIDED from 0 and from 1
  float_difference   greatest difference of torch's float output to `held_out_output`, in parts of its greatest value

A problem (`benchmarks/blocks.py` writes them) holds, for convolution i in program order with batch norm folded in,
`weight{i}` (OIHW), `bias{i}`, `groups{i}`, `stride{i}` and `padding{i}` ((top, bottom), (left, right)), and

  kind               "basic": conv, ReLU, conv, + input, ReLU; "inverted": [1x1 conv, ReLU6,] depthwise conv, ReLU6, 1x1 conv
  shortcut           whether an inverted block adds its input to its output
  layout             "NHWC" or "NCHW", of the arrays below
  train, held_out    inputs of the block; `held_out_output` (may be missing): what the float block makes of `held_out`
"""

import argparse
import contextlib
import copy
import importlib
import io
import itertools
import json
import pathlib
import statistics
import sys
import time
import types

import numpy as np
import torch
from torch import nn

# What main_imagenet.py passes by default, and the images it shows the network to fit its step sizes.
WARMUP, BETA, SCALE_IMAGES = 0.2, (20, 2), 64
DECIDED = 0.05
DEAD = 1e-6  # given to the first weight of a channel of zeros: the official search finds no step size for one
TOLERANCE = 1e-4  # of float outputs, in parts of the greatest value: two frameworks' float32 of one block
MIN_STEPS = 2
WARM_UP = 5  # iterations, not counted: torch imports its optimizers' compiler, and chooses algorithms, on first use
BATCH = 32  # block_reconstruction's; examples that do not fill a batch are dropped by its cache


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    if args.device == "cpu":
        send_cuda_to_cpu()
    official = modules_of(args.reference)
    stops = watch_loop(official, wait=args.device == "cuda" and args.time_only)
    problem = dict(np.load(args.problem))
    train, held_out = images(problem, "train", args.device), images(problem, "held_out", args.device)
    if len(train) % BATCH:
        raise ValueError(f"train: {len(train)} examples, of which the official code would drop {len(train) % BATCH}. Give a multiple of {BATCH}.")
    rows = []
    for bits in args.bits:
        fitted, scale_seconds = wrap(problem, official, bits, train, args.device)
        targets = outputs(fitted, held_out, quantized=False)
        reconstruct(official, fitted, train, WARM_UP, args.regularizer[0], seed=0)
        common = {
            "bits": bits, "scale_seconds": scale_seconds, "nearest_error": error(fitted, held_out, targets),
            "float_difference": compare(problem, targets), "device": args.device, "threads": args.threads, "torch": torch.__version__,
        }  # fmt: skip
        steps = [args.time_only] if args.time_only else args.steps
        for count, regularizer, seed in itertools.product(steps, args.regularizer, args.seeds):
            stops.clear()
            model, seconds = reconstruct(official, fitted, train, count, regularizer, seed)
            gaps = [1e3 * (b - a) for a, b in itertools.pairwise(stops)]
            ms = statistics.median(gaps) if args.time_only else statistics.mean(gaps)
            row = {"steps": count, "regularizer": regularizer, "seed": seed, **common, "seconds": seconds, "ms_per_iteration": ms}
            if not args.time_only:
                row |= {"error": error(model, held_out, targets), "undecided": undecided(model, official)}
            print(json.dumps(row), flush=True)
            rows.append(row)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1))


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", required=True, type=pathlib.Path, help="a checkout of the official code")
    parser.add_argument("--problem", required=True, type=pathlib.Path)
    parser.add_argument("--bits", type=several(int), default=[4])
    parser.add_argument("--steps", type=several(int), default=[20_000], help="the official default is 20000")
    parser.add_argument("--regularizer", type=several(float), default=[0.01], help="λ of the rounding penalty; the official default is 0.01")
    parser.add_argument("--seeds", type=several(int), default=[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--time-only", type=int, default=0, metavar="N", help="N iterations, for ms_per_iteration")
    parser.add_argument("--out", type=pathlib.Path, help="write the rows here, too, as one JSON list")
    args = parser.parse_args()
    if min([args.time_only or MIN_STEPS, *args.steps]) < MIN_STEPS:
        parser.error(f"--steps and --time-only: write {MIN_STEPS} or more; milliseconds are those between two iterations.")
    return args


def several(kind):
    return lambda text: [kind(part) for part in text.split(",")]


def send_cuda_to_cpu():
    """The official loop says `.to('cuda')`: in this process that means the CPU."""
    own = torch.Tensor.to

    def to(self, *args, **kwargs):
        return own(self, *("cpu" if isinstance(a, str) and a == "cuda" else a for a in args), **kwargs)

    torch.Tensor.to = to


def modules_of(folder: pathlib.Path) -> types.SimpleNamespace:
    """The official modules that are used, imported from the checkout."""
    if not (folder / "quant" / "block_recon.py").is_file():
        raise FileNotFoundError(f"--reference: {folder} has no quant/block_recon.py. Give a checkout of https://github.com/yhhhli/BRECQ.")
    sys.path.insert(0, str(folder))
    names = ("quant.block_recon", "quant.quant_model", "quant.quant_layer", "quant.fold_bn", "models.resnet", "models.mobilenetv2")
    with contextlib.redirect_stdout(io.StringIO()):
        return types.SimpleNamespace(**{name.split(".")[1]: importlib.import_module(name) for name in names})


def watch_loop(official, wait: bool) -> list[float]:
    """A list that gets the time of each iteration: the official loop calls its loss once in each."""
    stops: list[float] = []

    class Watched(official.block_recon.LossFunction):
        def __call__(self, *args):
            if wait:
                torch.cuda.synchronize()
            stops.append(time.perf_counter())
            return super().__call__(*args)

    official.block_recon.LossFunction = Watched
    return stops


def images(problem, name: str, device: str) -> torch.Tensor:
    """An array of the problem as torch has it: NCHW."""
    array = problem[name].transpose(0, 3, 1, 2) if problem["layout"] == "NHWC" else problem[name]
    return torch.from_numpy(np.ascontiguousarray(array, np.float32)).to(device)


def convolution(problem, i: int) -> tuple[nn.Conv2d, nn.Module | None]:
    """Convolution i, and the padding that has to be done before it where the two sides differ, as torch's own cannot."""
    weight, groups = problem[f"weight{i}"], int(problem[f"groups{i}"])
    (top, bottom), (left, right) = problem[f"padding{i}"].tolist()
    even = top == bottom and left == right
    conv = nn.Conv2d(
        weight.shape[1] * groups, weight.shape[0], weight.shape[2:], tuple(problem[f"stride{i}"].tolist()),
        (top, left) if even else 0, groups=groups,
    )  # fmt: skip
    conv.weight.data, conv.bias.data = (torch.from_numpy(problem[f"{name}{i}"]) for name in ("weight", "bias"))
    dead = (conv.weight.data == 0).flatten(1).all(1)
    conv.weight.data[dead, 0, 0, 0] = DEAD
    return conv, None if even else nn.ZeroPad2d((left, right, top, bottom))


def wrap(problem, official, bits: int, train: torch.Tensor, device: str) -> tuple[nn.Module, float]:
    """The block inside the official QuantModel with step sizes fitted, and the seconds that the fit took."""
    count = sum(name.startswith("weight") for name in problem)
    convs, pads = zip(*(convolution(problem, i) for i in range(count)), strict=True)
    build = {"basic": basic, "inverted": inverted}[str(problem["kind"])]
    weights = {"n_bits": bits, "channel_wise": True, "scale_method": "mse"}
    model = official.quant_model.QuantModel(nn.Sequential(build(problem, official, convs)).to(device).eval(), weight_quant_params=weights).eval()
    for i, pad in enumerate(pads):
        if pad and (i == 0 or problem["kind"] == "basic"):
            raise ValueError(f"padding{i}: its sides may differ only where an inverted block's depthwise convolution follows another.")
        if pad:
            before = model.model[0].conv[i - 1]
            before.activation_function = nn.Sequential(before.activation_function, pad)
    start = now(device)
    model.set_quant_state(True, False)
    with torch.no_grad():
        model(train[:SCALE_IMAGES])
    return model, now(device) - start


def basic(problem, official, convs) -> nn.Module:
    block = official.resnet.BasicBlock(convs[0].in_channels, convs[0].out_channels, convs[0].stride[0], norm_layer=nn.BatchNorm2d)
    block.conv1, block.conv2 = convs
    block.bn1, block.bn2 = official.fold_bn.StraightThrough(), official.fold_bn.StraightThrough()
    return block


def inverted(problem, official, convs) -> nn.Module:
    """Convolutions stand at 0, 3 and 6 of the official sequence, each followed by its batch norm."""
    width, depthwise = convs[0].in_channels, convs[-2]
    ratio = 1 if len(convs) == 2 else depthwise.in_channels / width
    block = official.mobilenetv2.InvertedResidual(width, convs[-1].out_channels, depthwise.stride[0], ratio)
    for i, conv in enumerate(convs):
        block.conv[3 * i], block.conv[3 * i + 1] = conv, official.fold_bn.StraightThrough()
    block.use_res_connect = bool(problem["shortcut"])
    return block


def reconstruct(official, fitted: nn.Module, train: torch.Tensor, steps: int, regularizer: float, seed: int) -> tuple[nn.Module, float]:
    """What main_imagenet.py does with each block, and its wall seconds. `fitted` stays as it is."""
    model, device = copy.deepcopy(fitted), train.device.type
    torch.manual_seed(seed)
    start = now(device)
    with contextlib.redirect_stdout(io.StringIO()):
        official.block_recon.block_reconstruction(
            model, model.model[0], cali_data=train, iters=steps, weight=regularizer, asym=True, b_range=BETA, warmup=WARMUP,
            act_quant=False, opt_mode="mse",
        )  # fmt: skip
    return model, now(device) - start


def now(device: str) -> float:
    """Seconds, once the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def outputs(model: nn.Module, inputs: torch.Tensor, quantized: bool) -> torch.Tensor:
    """In full float32, whatever the loop before was run in."""
    model.set_quant_state(quantized, False)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return torch.cat([model(batch) for batch in inputs.split(BATCH)])


def error(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> float:
    return float((outputs(model, inputs, quantized=True) - targets).double().square().sum(1).mean())


def compare(problem, targets: torch.Tensor) -> float | None:
    """How far torch's float block is from the one that the problem was made of; an error beyond TOLERANCE."""
    if "held_out_output" not in problem:
        return None
    expected = images(problem, "held_out_output", targets.device.type)
    difference = float((expected - targets).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE:
        raise ValueError(f"held_out_output: torch's float block differs by {difference:.1e} of its greatest value. Is `kind` right?")
    return difference


@torch.no_grad()
def undecided(model: nn.Module, official) -> float:
    modules = [m for m in model.modules() if isinstance(m, official.quant_layer.QuantModule)]
    soft = torch.cat([m.weight_quantizer.get_soft_targets().flatten() for m in modules])
    return float(((soft > DECIDED) & (soft < 1 - DECIDED)).double().mean())


if __name__ == "__main__":
    main()
