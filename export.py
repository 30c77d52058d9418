"""Exports a network to ONNX, in 32 or 8 bits, and times ONNX files.

    python export.py --weights runs/mpii/best.pt --out lapx.onnx
    python export.py --weights runs/mpii/best.pt --out lapx-int8.onnx --int8
    python export.py --time lapx.onnx lapx-int8.onnx peer.onnx --out runs/timing
    python export.py --profile lapx.onnx
    python export.py --pose pose.py

Without a further flag a file is the same function, written so that ONNX Runtime
is quick with it; --plain writes layer by layer, BatchNorms folded. A file is
only written if ONNX Runtime computes with it what PyTorch does. All that its
user needs (joints, flip pairs, limbs, input size, mean, std, order of colours)
is in the file, as JSON under the key "lapx" of its metadata."""

import argparse
import copy
import inspect
import json
import logging
import math
import platform
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path

import data  # before torch: data.py sets OMP_WAIT_POLICY, which torch reads

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from onnxruntime.quantization import QuantType, quantize_static
from PIL import Image, ImageDraw
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import evaluate
from data import normalise, reading, writing
from lapx import (ECA, LAPX, SKELETONS, STRIDE, VARIANTS, Block, ChannelMLP, InputError,
                  SpatialAttention, Stage, Stem, decode)

OPSET = 18


# ---------------------------------------------------------------------------- fast float32 form

@torch.no_grad()
def fast(model):
    """A trained LAPX -> a copy that is the same function in a form that ONNX Runtime is quick with.
    """
    model = folded(model)
    set_forms(model, {SpatialAttention: fast_spatial_attention, nn.ELU: fast_elu})
    return model


@torch.no_grad()
def folded(model):
    """A trained LAPX -> a copy for inference without BatchNorms.

    Each goes into the convolution before it. The first one of a block has none before it, and
    becomes a channelwise convolution."""
    model = copy.deepcopy(model).eval()
    for module in list(model.modules()):
        if isinstance(module, Block):
            norm = module.bn1
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            # no BatchNorm any more, but under its name, so that Block.forward stays as it is
            module.bn1 = channelwise(scale, norm.bias - norm.running_mean * scale)
            fold(module, "pointwise1", "bn2")
            fold(module, "depthwise", "bn3")
        elif isinstance(module, (Stem, Stage)):
            fold(module, "conv", "bn")
    return model


def fold(module, conv, norm):
    """Moves a module's BatchNorm into the convolution before it. conv, norm: their names."""
    fused = torch.nn.utils.fusion.fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm))
    setattr(module, conv, fused)
    setattr(module, norm, nn.Identity())


def channelwise(scale, bias=None):
    """A 1x1 convolution (B,C,h,w) -> same that scales each channel, by scale (C,), and adds bias.

    As a convolution it stays in the blocked memory layout of ONNX Runtime's other convolutions."""
    C = len(scale)
    conv = nn.Conv2d(C, C, 1, groups=C, bias=bias is not None)
    conv.weight = nn.Parameter(scale.reshape(C, 1, 1, 1))
    if bias is not None:
        conv.bias = nn.Parameter(bias)
    return conv


def set_forms(model, forms):
    """Replaces, in place, the forward of modules; their tensors stay as they are. forms: {class of
    modules: function of (module, x)}."""
    for module in model.modules():
        if type(module) in forms:
            module.forward = partial(forms[type(module)], module)


def fast_spatial_attention(module, x):
    """SpatialAttention, (B,C,h,w) -> same, whose maximum and mean ONNX Runtime computes quickly.

    Over all channels at once either takes 1 ms and more, at 208x64x48. The maximum is taken in
    two steps, within groups of channels and over the groups; the mean is a matrix product."""
    C, h, w = x.shape[1:]
    group = math.gcd(C, 16)
    # amax, as there are no gradients here
    maximum = x.unflatten(1, (C // group, group)).amax(2).amax(1, keepdim=True)  # (B,1,h,w)
    share = torch.full((1, C), 1 / C, dtype=x.dtype)
    mean = (share @ x.flatten(2)).unflatten(2, (h, w))  # (1,C) (B,C,h*w) -> (B,1,h,w)
    return x * module.conv(torch.cat([maximum, mean], dim=1)).sigmoid()


def fast_elu(module, x):
    """ELU as max(x, exp(min(x, 0)) - 1). Any shape -> same.

    Four passes over memory, but each is vectorised; ONNX Runtime's own Elu goes number by number.
    """
    return torch.maximum(x, x.clamp(max=0).exp() - 1)


# ---------------------------------------------------------------------------- to ONNX

def to_onnx(module, size, outputs, batch=None):
    """A module of images (B,3,H,W) -> an ONNX model. outputs: the names of what the module gives.
    batch: None leaves it open."""
    shapes = None if batch else ({0: torch.export.Dim("batch", max=2**20)},)  # any large number
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            module, (torch.zeros(batch or 2, 3, *size),),  # an example of 1 would be fixed
            dynamo=True, opset_version=OPSET, input_names=["images"], output_names=outputs,
            dynamic_shapes=shapes, verbose=False, external_data=False)
    model = program.model_proto
    for node in model.graph.node:  # drops the exporter's notes, paths of source files among them
        del node.metadata_props[:]
        node.doc_string = ""
    del model.graph.metadata_props[:]
    del model.graph.value_info[:]
    return model


class Outputs(nn.Module):
    """What an ONNX file gives for images (B,3,H,W): a tuple of the last stage's heatmaps (B,K,h,w),
    or those of all stages; behind them the keypoints that the last ones decode to."""

    def __init__(self, model, all_stages=False, keypoints=False):
        super().__init__()
        self.model = model
        self.all_stages = all_stages
        self.keypoints = keypoints

    def forward(self, images):
        outputs = self.model(images)
        if not self.all_stages:
            outputs = outputs[-1:]
        return (*outputs, keypoints_of(outputs[-1])) if self.keypoints else tuple(outputs)


def keypoints_of(heatmaps):
    """Heatmaps (B,K,h,w) -> keypoints (B,K,3): x, y in pixels of the input, score."""
    points, scores = decode(heatmaps)
    return torch.cat([STRIDE * points, scores[..., None]], dim=2)


# =============================================== Behind the scenes: checks, costs, timing, 8 bits

# By the bits of a file: the norm of its difference to float64, its order, and how large it may be
# relative to that of the heatmaps; or three times what PyTorch's own float32 loses. In 32 bits 1e-5
# is usual. What is allowed for 8 bits finds a broken file, not a lost point of accuracy.
ALLOWED = {32: ("largest", math.inf, 1e-4), 8: ("root mean square", 2, 0.2)}


def errors_of(session, path, model, images, order):
    """How far an ONNX Runtime session of a file to be, and PyTorch itself, are from PyTorch in
    float64 on images (B,3,H,W): each the norm of the difference of all heatmaps that the file
    gives, of that order, relative to that of float64's heatmaps.

    InputError if the file's keypoints are not its heatmaps decoded."""
    names = [output.name for output in session.get_outputs()]
    outputs = dict(zip(names, evaluate.run_session(session, path, images)))
    keypoints = outputs.pop("keypoints", None)
    if keypoints is not None and not torch.allclose(keypoints, keypoints_of(outputs["heatmaps"])):
        raise InputError("the keypoints in the file differ from those decoded by PyTorch")
    found = torch.stack(list(outputs.values()))  # (stages,B,K,h,w)
    with torch.no_grad():
        own = torch.stack(model(images)[-len(found):])
        exact = torch.stack(copy.deepcopy(model).double()(images.double())[-len(found):])
    norm = partial(torch.linalg.vector_norm, ord=order)
    return [(norm(heatmaps - exact) / norm(exact)).item() for heatmaps in (found, own)]


def export(args):
    """--weights: writes the ONNX file, if ONNX Runtime computes with it what PyTorch does."""
    predictor = evaluate.open_predictor(args.weights, "cpu", args.input, args.skeleton, args.bgr)
    if not isinstance(predictor.model, LAPX):
        raise InputError(f"{args.weights} is an ONNX file already; export needs a checkpoint")
    model = predictor.model.to(memory_format=torch.contiguous_format)
    if args.int8:
        images = calibration_images(predictor, args)
        form = quantisable(model)
    else:
        images = torch.randn(3, 3, *predictor.size, generator=torch.Generator().manual_seed(0))
        form = folded(model) if args.plain else fast(model)
    names = ["heatmaps", "keypoints"] if args.keypoints else ["heatmaps"]
    if args.all_stages:
        names = [f"heatmaps{number}" for number in range(1, model.config.stages)] + names
    outputs = Outputs(form, args.all_stages, args.keypoints)
    proto = to_onnx(outputs, predictor.size, names, args.batch)
    if args.int8:
        proto = quantised(proto, images, args.batch or 1)
    info = predictor.info | {"bits": 8 if args.int8 else 32}
    onnx.helper.set_model_props(proto, {"lapx": json.dumps(info)})
    onnx.checker.check_model(proto, full_check=True)
    content = proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    print(f"{info['variant'] or model.config}, opset {OPSET}, {len(content) / 1e6:.1f} MB")
    for item in [*session.get_inputs(), *session.get_outputs()]:
        print(f"  {item.name} {item.shape}")
    which, order, allowed = ALLOWED[info["bits"]]
    error, own = np.max([errors_of(session, args.out, model, images[:B], order)
                         for B in (1, 2, 3)], axis=0)
    allowed = max(allowed, 3 * own)
    print(f"ONNX Runtime {onnxruntime.__version__} against PyTorch {torch.__version__} in float64:"
          f"\n{which} difference {error:.1e} of the {which} value\n"
          f"(PyTorch's own in float32: {own:.1e})")
    if not error <= allowed:  # NaN, too
        raise InputError(f"that is more than {allowed:g}: no file is written")
    with writing(args.out) as part:
        part.write_bytes(content)
    print(f"wrote {args.out}")
    if args.int8:
        print("score it with evaluate.py before you use it")


def write_pose(path):
    """--pose: writes data.Pose and what it uses to a module of its own."""
    if path.suffix != ".py":
        raise InputError(f"--pose {path} must end in .py")
    parts = [data.affine, data.fitted_width, data.transform, data.crop, data.padded, data.run_onnx,
             data.Pose]
    start = f'''"""Joints of persons by ONNX files of LAPX's export.py."""

import json
import math

import numpy as np
from PIL import Image, ImageOps

PADDING = {data.PADDING}  # persons' boxes are enlarged by this
STRIDE = {STRIDE}  # heatmap pixel (x, y) lies on pixel (4x, 4y) of the crop


'''
    with writing(path) as part:
        part.write_text(start + "\n\n".join(map(inspect.getsource, parts)), "utf-8")
    print(f"wrote {path}")


# ---------------------------------------------------------------------------- what a network costs

def count(config, height, width):
    """What a network costs for one picture of height x width: parameters, parameters by thop,
    multiply-adds, FLOPs by thop, which is the paper's way."""
    # PAPER SILENT: counting of parameters and FLOPs. The figures of PAPER Tables 1 to 3 are those
    # of the tool thop. It leaves out bare parameters (alpha and gamma). Its FLOPs are the
    # multiply-adds, plus 4 per element that a BatchNorm puts out, plus 1 per element that an
    # adaptive average pooling (one in each channel attention) takes in.
    extra = []

    def add(module, inputs, output):  # a forward hook
        if isinstance(module, nn.BatchNorm2d):
            extra.append(4 * output.numel())
        elif isinstance(module, (ECA, ChannelMLP)):
            extra.append(output.numel())

    counter = FlopCounterMode(display=False)
    with torch.device("meta"), torch.no_grad(), counter:  # shapes alone, no numbers
        model = LAPX(config).eval()
        for module in model.modules():
            module.register_forward_hook(add)
        model(torch.zeros(1, 3, height, width))
    multiply_adds = counter.get_total_flops() // 2  # torch counts multiplications and additions
    parameters = {name: parameter.numel() for name, parameter in model.named_parameters()}
    bare = sum(n for name, n in parameters.items() if name.endswith((".alpha", ".gamma")))
    total = sum(parameters.values())
    return total, total - bare, multiply_adds, multiply_adds + sum(extra)


# What PAPER Tables 1 to 3 print: variant, input (H, W), joints, 10^6 parameters, 10^9 FLOPs.
PRINTED = [("lapx", 256, 256, 16, "2.30", "3.45"), ("lapx", 256, 192, 17, "2.30", "2.59"),
           ("lapx", 384, 288, 17, "2.30", "5.82"), ("lap", 256, 256, 16, "2.34", "3.70"),
           ("lap", 256, 192, 17, "2.34", "2.78"), ("lap", 384, 288, 17, "2.34", "6.24")]
PRINTED += [(f"row{row}", 256, 256, 16, millions, "") for row, millions in enumerate(
    "2.30 2.26 2.25 2.23 2.28 2.26 2.26 2.26 2.26 2.26 2.30 2.30 2.30 2.30".split(), start=1)]


def print_costs():
    """--costs: parameters and cost of every variant beside the paper's figures."""
    print(f"{'variant, input, joints':22}|  S   C |{'parameters':^23}|{'10^9':^26}\n"
          f"{'':22}|        |    true    thop paper | multiply-adds  thop paper")
    for name, height, width, joints, millions, gigaflops in PRINTED:
        config = replace(VARIANTS[name], num_joints=joints)
        parameters, by_thop, multiply_adds, flops = count(config, height, width)
        print(f"{name:7}{height:5}x{width}{joints:5}  |{config.stages:3}{config.channels:4} |"
              f"{parameters:8}{by_thop:8}{millions:>6} |{multiply_adds / 1e9:14.4f}"
              f"{flops / 1e9:6.2f}{gigaflops:>6}")


# ---------------------------------------------------------------------------- timing

WARM_UP = 5  # runs


def random_inputs(path, size=None):
    """Values for the inputs of any ONNX file, {name: array}; open batches are 1.

    size: (height, width) where these are open. InputError if the file can't be run on that."""
    session = evaluate.open_session(path)
    feed = {}
    rng = np.random.default_rng(0)
    with reading(path, "a graph that runs on made up inputs (--input HxW gives open heights and "
                 "widths; leave out --input, or this file, if it has others)") as where:
        for item in session.get_inputs():
            where.entry = f"input {item.name} {item.shape}"
            shape = [side if isinstance(side, int) else None for side in item.shape]
            shape[:1] = [side or 1 for side in shape[:1]]
            if len(shape) == 4 and size:  # B,3,H,W or B,H,W,3
                shape[slice(1, 3) if shape[3] == 3 else slice(2, 4)] = size
            kind = item.type.removeprefix("tensor(").removesuffix(")")
            kind = {"float": "float32"}.get(kind, kind)  # the others are called as in numpy
            values = rng.integers(0, 255, shape) if "int" in kind else rng.standard_normal(shape)
            feed[item.name] = values.astype(kind)
        session.run(None, feed)
    return feed


def node_calls(path, feed, threads=1, runs=1, **settings):
    """The calls of a file's nodes, in order, from ONNX Runtime's profile; settings: open_session's.

    -> a list of {"op_name", "dur" (microseconds), "input_type_shape", "output_type_shape", ..}."""
    with tempfile.TemporaryDirectory() as folder:
        prefix = str(Path(folder) / "profile")
        session = evaluate.open_session(path, threads, enable_profiling=True,
                                        profile_file_prefix=prefix, **settings)
        for _ in range(runs):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    return [event["args"] | {"dur": event["dur"]} for event in events
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]


def count_onnx(path, feed):
    """-> an ONNX file's parameters, and the multiply-adds of its convolutions and matrix products
    for these inputs; from the shapes in a run without ONNX Runtime's own optimisations."""
    graph = onnx.load(path).graph
    constants = [attribute.t for node in graph.node if node.op_type == "Constant"
                 for attribute in node.attribute if attribute.name == "value"]
    parameters = sum(math.prod(tensor.dims) for tensor in [*graph.initializer, *constants]
                     if tensor.data_type not in (onnx.TensorProto.INT64, onnx.TensorProto.BOOL))
    multiply_adds = 0
    as_written = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    for call in node_calls(path, feed, graph_optimization_level=as_written):
        inputs = [next(iter(item.values())) for item in call["input_type_shape"]]
        output = next(iter(call["output_type_shape"][0].values()))
        name = call["op_name"]
        if name in ("Conv", "ConvInteger", "QLinearConv"):
            weight = inputs[3 if name == "QLinearConv" else 1]
            multiply_adds += math.prod(output) * math.prod(weight[1:])
        elif name == "ConvTranspose":
            multiply_adds += math.prod(inputs[0]) * math.prod(inputs[1][1:])
        elif name in ("MatMul", "MatMulInteger", "QLinearMatMul", "Gemm"):
            multiply_adds += math.prod(output) * inputs[0][-1]
    return parameters, multiply_adds


MEMORY_PROBE = """
import re, sys
import numpy, onnxruntime

def peak():  # megabytes, as Linux tells them
    status = open("/proc/self/status").read()
    return int(re.search(r"VmHWM:\\s*(\\d+)", status)[1]) / 2**10

before = peak()
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(sys.argv[3])
session = onnxruntime.InferenceSession(sys.argv[1], options, [sys.argv[4]])
for _ in range(3):
    session.run(None, dict(numpy.load(sys.argv[2])))
print(peak() - before)
"""


def measure_memory(path, feed, threads, provider):
    """Megabytes that making a session and running it add to a fresh process at its peak, without
    the interpreter and the libraries; NaN where the system does not tell (not Linux)."""
    with tempfile.TemporaryDirectory() as folder:
        values = Path(folder) / "feed.npz"
        np.savez(values, **feed)
        done = subprocess.run([sys.executable, "-c", MEMORY_PROBE, path, values, str(threads),
                               f"{provider}ExecutionProvider"], capture_output=True, text=True)
    return float(done.stdout or "nan")


def cpu_name():
    """The processor's name, as the system tells it."""
    told = data.cpu_info()
    if sys.platform == "darwin":
        told = subprocess.run(["sysctl", "machdep.cpu.brand_string"], text=True,
                              capture_output=True).stdout
    match = re.search(r"(?:model name\s*|brand_string): (.*)", told)
    return match[1] if match else platform.processor() or platform.machine()


def run_times(paths, feeds, threads, runs, provider="CPU"):
    """Milliseconds (runs, files): the files take turns, so that noise hurts all alike."""
    sessions = [evaluate.open_session(path, threads, provider) for path in paths]
    seconds = np.zeros((WARM_UP + runs, len(sessions)))
    for run in range(len(seconds)):
        for number, (session, feed) in enumerate(zip(sessions, feeds)):
            start = time.perf_counter()
            session.run(None, feed)
            seconds[run, number] = time.perf_counter() - start
    return 1e3 * seconds[WARM_UP:]


def time_files(args):
    """--time: times files side by side, and writes what was found to the folder --out."""
    feeds = [random_inputs(path, args.input) for path in args.time]
    counts = [count_onnx(path, feed) for path, feed in zip(args.time, feeds)]
    images = [next(iter(feed.values())).shape for feed in feeds]
    shapes = ["x".join(map(str, shape)) for shape in images]
    cpu = cpu_name()
    print(f"{cpu}, ONNX Runtime {onnxruntime.__version__} on {args.provider}\n"
          f"{args.runs} runs in turn after {WARM_UP} to warm up; inputs {', '.join(set(shapes))}\n"
          f"{'file':17} thr {'ms':>7} {'10..90 %':>15} {'FPS':>7} ratio {'MB':>5} {'params':>7} "
          f"{'GMAC':>6}")
    rows = []
    for threads in args.threads:
        milliseconds = run_times(args.time, feeds, threads, args.runs, args.provider)
        low, median, high = np.quantile(milliseconds, (0.1, 0.5, 0.9), axis=0)
        for number, path in enumerate(args.time):
            parameters, multiply_adds = counts[number]
            row = {"file": str(path), "input": shapes[number], "threads": threads,
                   "ms": median[number], "ms_10": low[number], "ms_90": high[number],
                   "fps": images[number][0] * 1e3 / median[number],
                   "ratio": median[0] / median[number],
                   "ram_mb": measure_memory(path, feeds[number], threads, args.provider),
                   "parameters": parameters, "multiply_adds": multiply_adds}
            rows.append(row)
            print(f"{path.name[-17:]:17} {threads:3} {row['ms']:7.2f} {row['ms_10']:7.2f}"
                  f"{row['ms_90']:8.2f} {row['fps']:7.1f} {row['ratio']:5.2f} "
                  f"{row['ram_mb']:5.0f} {parameters / 1e6:5.2f} M {multiply_adds / 1e9:6.2f}",
                  flush=True)
    if args.out:
        found = {"cpu": cpu, "onnxruntime": onnxruntime.__version__, "provider": args.provider,
                 "runs": args.runs, "results": rows}
        with writing(args.out / "timing.json") as part:
            part.write_text(json.dumps(found, indent=1))
        data.write_table(args.out / "timing.csv", rows)
        with writing(args.out / "timing.png") as part:
            draw_timing(rows, cpu).save(part)
        print(f"wrote {args.out}/: timing.json, timing.csv, timing.png")


def draw_timing(rows, cpu):
    """A figure like PAPER Figure 3: multiply-adds against frames per second, a Pillow picture.

    A bubble's area is the file's parameters; a line leads to its label."""
    rows = sorted(rows, key=lambda row: -row["fps"])
    bottom = max(450, 40 * len(rows))
    picture = Image.new("RGB", (840, bottom + 50), "white")
    draw = ImageDraw.Draw(picture)
    position = data.draw_axes(draw, (60, 30, 580, bottom),
                              [0, 1.2 * max(row["multiply_adds"] / 1e9 for row in rows)],
                              [0, 1.15 * rows[0]["fps"]], "multiply-adds (10^9)",
                              f"frames per second, {cpu}; area: parameters")
    largest = max(row["parameters"] for row in rows) or 1
    for number, row in enumerate(rows):
        x, y = position(row["multiply_adds"] / 1e9, row["fps"])
        line = 50 + 40 * number
        draw.line([(x, y), (560, line), (600, line)], (170, 170, 170))
        draw.circle((x, y), 18 * math.sqrt(row["parameters"] / largest), data.RIGHT, "black")
        draw.text((605, line), f"{Path(row['file']).stem[:28]}, "
                  f"threads: {row['threads']}\n{row['fps']:.1f} FPS, "
                  f"{row['parameters'] / 1e6:.2f} M", "black", data.font(size=13), "lm")
    return picture


def profile(args, threads):
    """--profile: where the time goes in one file, operator by operator."""
    spent = defaultdict(list)  # milliseconds of each call
    for call in node_calls(args.profile, random_inputs(args.profile, args.input), threads,
                           args.runs):
        spent[call["op_name"]].append(call["dur"] / 1e3)
    total = sum(map(sum, spent.values()))
    print(f"{args.profile}, {cpu_name()}, threads: {threads},\n"
          f"runs: {args.runs}; the mean, the measuring included\n"
          f"{'operator':24} {'ms':>8} {'share':>7} {'nodes':>6}")
    for name, calls in sorted(spent.items(), key=lambda item: -sum(item[1])):
        print(f"{name:24} {sum(calls) / args.runs:8.2f} {sum(calls) / total:7.1%} "
              f"{len(calls) // args.runs:6}")
    print(f"{'total':24} {total / args.runs:8.2f}")


# ---------------------------------------------------------------------------- 8 bits (optional)

# Float32 files need nothing of what follows. ONNX Runtime's quantiser lets a graph compute with
# bytes: each is round(value / scale) + zero, within 0..255, with a scale and a zero for each value
# of the graph, from the range seen there. Heads and Non-Local modules compute in float32. Weights
# take 7 bits, from -64 to 64: x86 CPUs without VNNI add two products in 16 bits, where 2 * 255 * 64
# just fits; with 8 bits the sums saturated on them.

def pooled_eca(module, x):
    """ECA, (B,C,h,w) -> same, whose average and maximum come from poolings, which ONNX Runtime
    computes in 8 bits."""
    size = x.shape[2:]
    descriptor = (F.avg_pool2d(x, size) + F.max_pool2d(x, size)).flatten(1)  # (B,C)
    gate = module.conv(descriptor[:, None]).sigmoid()  # (B,1,C)
    return x * gate.transpose(1, 2)[..., None]


def last_axis_spatial_attention(module, x):
    """SpatialAttention, (B,C,h,w) -> same, that pools over the last axis, where the channels lie in
    memory behind 8-bit convolutions anyway."""
    last = x.permute(0, 2, 3, 1)  # (B,h,w,C)
    pooled = torch.stack([last.amax(3), last.mean(3)], dim=1)  # (B,2,h,w)
    return x * module.conv(pooled).sigmoid()


@torch.no_grad()
def quantisable(model):
    """A trained LAPX -> a copy that is the same function, of modules that can be quantised."""
    model = folded(model)
    set_forms(model, {SpatialAttention: last_axis_spatial_attention, ECA: pooled_eca})
    for module in model.modules():
        if isinstance(module, Block) and module.alpha is not None:
            module.shortcut = channelwise(module.alpha.flatten())  # was the identity
            module.alpha = None
    return model


def calibration_images(predictor, args, count=64):
    """Images (N,3,H,W) for the ranges of an 8-bit file: of one's own pictures, or of the training
    people of the network's data set."""
    dataset = predictor.info["dataset"]
    if args.image:
        pictures = [data.open_picture(path, upright=True)
                    for path in evaluate.pictures_in(args.image)[:count]]
        crops = [evaluate.crop_of(predictor, picture, [0, 0, *picture.size])[0][0]
                 for picture in pictures]
    elif dataset:
        people = data.load_people(dataset, args.data, predictor.splits[0], predictor.skeleton)
        dataset = data.PoseDataset(people, predictor.size, predictor.skeleton)
        spread = np.linspace(0, len(people) - 1, min(count, len(people))).astype(int)
        crops = [dataset[row][1] for row in spread.tolist()]
    else:
        raise InputError("--int8 needs pictures for its ranges; give --image with some")
    print(f"ranges from {len(crops)} pictures")
    return normalise(torch.stack(crops), *predictor.normalisation).contiguous()


def quantised(proto, images, batch):
    """quantisable's graph, an ONNX model -> the same in 8 bits. images (N,3,H,W), which it takes in
    batches: those on which the ranges of its values are seen."""
    feeds = iter([{"images": images[torch.arange(start, start + batch) % len(images)].numpy()}
                  for start in range(0, len(images), batch)])
    in_float = [node.name for node in proto.graph.node
                if re.search("non_local|head", " ".join(node.input))]  # in a weight's name
    logging.disable(logging.WARNING)  # the advice to prepare the graph, which is prepared
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bytes.onnx"
        quantize_static(
            proto, path, argparse.Namespace(get_next=lambda: next(feeds, None)), per_channel=True,
            reduce_range=True, activation_type=QuantType.QUInt8, nodes_to_exclude=in_float,
            op_types_to_quantize=["Conv", "Add", "Mul", "MaxPool", "AveragePool", "Resize", "Elu"])
        proto = onnx.load(path)
    logging.disable(logging.NOTSET)
    elus_of_bytes(proto.graph)
    return proto


REACH = 4.5  # how far above 0 the range of an ELU's input goes at least


def elus_of_bytes(graph):
    """Rewrites the ELUs in an ONNX graph of bytes, which ONNX Runtime would compute in float32.

    ELU(z) = max(z, 0) + (e^min(z,0) - 1). The maximum is one of bytes. For the other term,
    sigmoid(z - b) / sigmoid(-b) is e^z to within e^-b / 4 where z < 0, which is below 1 / 255 for
    b = REACH; where z > 0 it saturates, as 255 stands for 1. So one sigmoid, which is a table of
    256 bytes, gives it whole. Its input is z with another zero."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    elus = {node.input[0]: node.output[0] for node in graph.node if node.op_type == "Elu"}
    nodes = list(graph.node)
    del graph.node[:]

    def emit(kind, *inputs, output=None):
        """A new node -> its output's name. inputs: names, or numbers, which become constants."""
        names = list(inputs)
        for number, value in enumerate(inputs):
            if not isinstance(value, str):
                names[number] = f"constant_{len(graph.initializer)}"
                tensor = onnx.numpy_helper.from_array(np.asarray(value), names[number])
                graph.initializer.append(tensor)
        output = output or f"{kind}_{len(graph.node)}"
        graph.node.append(onnx.helper.make_node(kind, names, [output]))
        return output

    for node in nodes:
        if node.op_type == "Elu" and node.input[0] not in elus:
            continue
        if node.op_type != "DequantizeLinear" or node.output[0] not in elus:
            graph.node.append(node)
            continue
        z, *place = node.input
        scale, zero = [onnx.numpy_helper.to_array(constants[name]).item() for name in place]
        low = -zero * scale
        scale = max(scale, (REACH - low) / 255)
        zero = round(-low / scale)
        for name, value in zip(place, (np.float32(scale), np.uint8(zero))):
            constants[name].CopyFrom(onnx.numpy_helper.from_array(np.asarray(value), name))
        steps = min(round(REACH / scale), 255 - zero)  # b is so many steps of z
        top = 1 / (1 + math.exp(steps * scale))  # sigmoid(-b)
        positive = emit("DequantizeLinear", emit("Max", z, place[1]), *place)
        power = emit("Sigmoid", emit("DequantizeLinear", z, place[0], np.uint8(zero + steps)))
        power = emit("QuantizeLinear", power, np.float32(top / 255), np.uint8(0))
        power = emit("DequantizeLinear", power, np.float32(1 / 255), np.uint8(255))
        emit("Add", positive, power, output=elus.pop(node.output[0]))


# ---------------------------------------------------------------------------- flags

def main():
    parser = argparse.ArgumentParser(
        usage="%(prog)s --weights FILE | --time ONNX .. | --profile ONNX | --costs |\n"
        "                 --pose PY",
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--weights", metavar="FILE", help="export mpii, coco, coco-384x288, a checkpoint or .tar")
    add("--time", type=Path, nargs="+", metavar="ONNX",
        help="time files side by side; the ratio is to the first one")
    add("--profile", type=Path, metavar="ONNX", help="time per operator")
    add("--costs", action="store_true", help="parameters and cost of every variant beside the "
        "paper's figures (thop: counted as the paper's tool counts)")
    add("--pose", type=Path, metavar="PY", help="write a module with the class Pose, which runs "
        "exported files with numpy, Pillow and onnxruntime alone")
    add = parser.add_argument_group("export").add_argument
    add("--skeleton", choices=SKELETONS, help="the joints, if the file does not say")
    add("--bgr", action="store_true", help="the network was trained on BGR pictures")
    add("--batch", type=data.number_from(1), metavar="B", help="fixes the batch (default: open)")
    add("--all-stages", action="store_true", help="heatmaps of all stages as outputs")
    add("--keypoints", action="store_true",
        help="decoded keypoints (B,K,3), in pixels of the input, as an output")
    add("--plain", action="store_true", help="the layers of training one by one, BatchNorms folded")
    add("--int8", action="store_true", help="computes in 8 bits; ranges from 64 crops of the data "
        "set's training people, or from --image")
    add("--data", type=Path, metavar="DIR",
        help="for --int8: the data set's folder (default: data/DATASET)")
    add("--image", type=Path, nargs="+", metavar="PATH",
        help="for --int8: pictures or folders instead, each with one person")
    add = parser.add_argument_group("time").add_argument
    add("--threads", type=data.number_from(1), nargs="+", default=[1], metavar="T",
        help="one or several numbers of threads (default: 1)")
    add("--runs", type=data.number_from(1), default=50, help="default: %(default)s")
    add("--provider", default="CPU", metavar="NAME", help="ONNX Runtime's execution provider, such "
        "as CoreML or CUDA (default: %(default)s)")
    add = parser.add_argument_group("both").add_argument
    add("--input", type=data.image_size, metavar="HxW", help="default: what the checkpoint says; "
        "with --time and --profile for open heights and widths")
    add("--out", type=Path, metavar="PATH", help="the .onnx file to write (default: lapx.onnx); "
        "with --time the folder for JSON, CSV and the figure")
    args = parser.parse_args()
    if args.time:
        data.refuse_unused(parser, args, "--time", "time threads runs provider input out")
        time_files(args)
    elif args.costs:
        data.refuse_unused(parser, args, "--costs", "costs")
        print_costs()
    elif args.pose:
        data.refuse_unused(parser, args, "--pose", "pose")
        write_pose(args.pose)
    elif args.profile:
        data.refuse_unused(parser, args, "--profile", "profile threads runs input")
        for threads in args.threads:
            profile(args, threads)
    else:
        used = "weights skeleton bgr batch all_stages keypoints plain int8 input out"
        if args.int8:
            data.refuse_unused(parser, args, "--int8", used + " data image")
        else:
            data.refuse_unused(parser, args, "--weights without --int8", used)
        if args.plain and args.int8:
            parser.error("--plain is the float32 network as it was trained, --int8 another one")
        if args.data and args.image:
            parser.error("--data and --image are two places for pictures; give one of them")
        args.out = args.out or Path("lapx.onnx")
        if args.out.suffix != ".onnx":
            parser.error(f"--out {args.out} must end in .onnx")
        export(args)


if __name__ == "__main__":
    data.run(main)
