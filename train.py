"""Trains LAPX by the paper's recipe, and scores it after every epoch.

  python train.py                                        # synthetic people
  python train.py --dataset mpii --data data/mpii       # the paper's 200 epochs
  python train.py --dataset coco --data data/coco
  python train.py --dataset mpii --show samples.png      # what it would learn
  python train.py --dataset mpii --resume auto           # goes on with a run
  torchrun --nproc_per_node=4 train.py --dataset mpii    # 4 GPUs, same batch

A run's folder gets recipe.json, log.csv, last.pt (to resume), best.pt (the best
epoch's network), at the end curve.png and predictions.png."""

import argparse
import copy
import json
import os
import re
import signal
import sys
import textwrap
import time
import warnings
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import data  # before torch: data.py sets OMP_WAIT_POLICY, which torch reads

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import nn

import evaluate
from data import DATASETS, PoseDataset, gaussian_targets, normalise, plural
from lapx import SKELETONS, VARIANTS, InputError, lapx, load_file, load_fitting, reading

# Four words: config, the network's shape; info, its joints, input size and the like, see
# evaluate.model_info; recipe, all that decides a run's weights; facts, the machine it runs on.
#
# The defaults of the flags. PAPER, training details: Adam, batches of 32, learning rates and their
# milestones.
RECIPES = {
    # lr is multiplied by `factor` after each of the epochs in `milestones`
    "mpii": dict(epochs=200, batch_size=32, lr=3e-4, factor=0.5, milestones=[105, 150, 175, 190],
                 gamma_warmup=10, gamma_ramp=50),
    "coco": dict(epochs=210, batch_size=32, lr=2e-4, factor=0.4, milestones=[120, 160, 190],
                 gamma_warmup=10, gamma_ramp=50),
    # ours, some minutes on two CPU cores
    "synthetic": dict(epochs=4, batch_size=16, lr=1e-3, factor=0.3, milestones=[3],
                      gamma_warmup=0.2, gamma_ramp=1),
}
# PAPER SILENT: length of the warm-up. Ten epochs, ours: the loss has then left its first steep
# fall, and gamma's rise ends long before the learning rate first drops.


# ---------------------------------------------------------------------------- schedules and loss

def learning_rate(epoch, lr, factor, milestones):
    """The learning rate of an epoch. PAPER, training details.

    Epochs count from 0: milestone 105 acts from epoch 105 on."""
    return lr * factor ** sum(epoch >= milestone for milestone in milestones)


def gamma_at(epochs, warmup, ramp, target):
    """The gamma that the schedule wants after so many epochs (10.5: amid the 11th). PAPER §3.3.

    0 during `warmup` epochs, then rising linearly to target over `ramp` epochs, then None: learnt.
    """
    if epochs > warmup + ramp:
        return None
    return target * (epochs - warmup) / ramp if epochs > warmup else 0.0


def schedule_gamma(model, optimiser, value):
    """Sets every gamma to value, what gamma_at says for this step; where that is None for the first
    time, to gamma_target. -> the parameters that stay as they are in this step."""
    # PAPER SILENT: what "frozen" means. The Non-Local modules get no gradient and have no state in
    # Adam, as if they were not there yet (the authors' code leaves them out). From the first step
    # in which gamma rises their weights learn; gamma itself is set until the ramp ends.
    modules = model.non_locals().values()
    gammas = [module.gamma for module in modules]
    for gamma in gammas:
        if value is not None or gamma not in optimiser.state:  # Adam has not moved it yet
            gamma.data.fill_(model.config.gamma_target if value is None else value)
    if value == 0:
        return [parameter for module in modules for parameter in module.parameters()]
    return gammas if value is not None else []


def heatmap_loss(outputs, targets, weights):
    """The loss with intermediate supervision, in float32: a scalar. PAPER eq. 4.1, 4.2.

    outputs: S heatmaps (B,K,h,w); targets (B,K,h,w); weights (B,K), 0 for joints to leave out."""
    # PAPER SILENT: norm in the loss. We sum squared differences over the pixels of a map.
    squared = ((torch.stack(outputs).float() - targets) ** 2).sum((3, 4))  # (S,B,K)
    return (weights * squared).mean() / 2


# ---------------------------------------------------------------------------- one epoch

def epoch_batches(persons, batch_size, seed, epoch, rank=0, world=1):
    """The batches of an epoch, lists of (epoch, row), shuffled by (seed, epoch): of each batch the
    share of the process `rank` of `world`."""
    # PAPER SILENT: the last, incomplete batch. Left out; who is left out changes every epoch.
    order = np.random.default_rng((seed, epoch)).permutation(persons)
    share = batch_size // world
    return [[(epoch, row) for row in order[start:start + share].tolist()]
            for start in range(rank * share, persons // batch_size * batch_size, batch_size)]


def train_epoch(wrapped, model, optimiser, loader, epoch, recipe, device):
    """One epoch: load, forward, loss, backward, step. -> mean loss, images/s, share of waiting.

    wrapped: the model, or what accelerated or DistributedDataParallel made of it. epoch: from 0.
    recipe: a Namespace of default_recipe's fields. InputError at a loss that is not finite.
    """
    steps = len(loader)
    lr = learning_rate(epoch, recipe.lr, recipe.factor, recipe.milestones)
    for group in optimiser.param_groups:
        group["lr"] = lr
    losses = torch.zeros(steps, device=device)
    model.train()
    start = time.perf_counter()
    requested = start
    waited = 0.0
    parts = recipe.accumulate  # of a batch, one after the other; BatchNorm sees a part alone
    for step, (_, crops, joints, visible) in enumerate(data.progress(loader, "steps")):
        waited += time.perf_counter() - requested
        gamma = gamma_at(epoch + step / steps, recipe.gamma_warmup, recipe.gamma_ramp,
                         model.config.gamma_target)
        frozen = schedule_gamma(model, optimiser, gamma)

        optimiser.zero_grad(set_to_none=True)
        for crops, joints, visible in zip(crops.chunk(parts), joints.chunk(parts),
                                          visible.chunk(parts)):
            images = normalise(crops.to(device, non_blocking=True))  # (B,3,H,W)
            joints = joints.to(device, non_blocking=True)  # (B,K,2)
            visible = visible.to(device, non_blocking=True)  # (B,K)
            targets, weights = gaussian_targets(joints, visible, recipe.input)
            with torch.autocast(device.type, torch.bfloat16, recipe.precision == "bfloat16"):
                outputs = wrapped(images)  # S x (B,K,h,w)
            loss = heatmap_loss(outputs, targets, weights) / parts
            loss.backward()  # gradients add up
            losses[step] += loss.detach()
        for parameter in frozen:
            parameter.grad = None
        optimiser.step()

        if (step + 1) % 50 == 0 or step + 1 == steps:  # reading a loss makes a GPU wait
            bad = (~losses.isfinite()).nonzero().flatten().tolist()
            if bad:
                raise InputError(
                    f"the loss is not finite in epoch {epoch + 1}, step {bad[0] + 1}, with learning"
                    f" rate {lr:g}; go on with --resume auto and a lower --lr, or with "
                    "--precision float32")
        requested = time.perf_counter()
    seconds = time.perf_counter() - start
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world > 1:
        dist.all_reduce(losses)
    speed = steps * parts * len(crops) * world / seconds
    return losses.mean().item() / world, speed, waited / seconds


def with_cuda_graphs(model, batch_size, size, precision):
    """The model for training, whose forward and backward passes are one CUDA graph each.

    A step is 2500 small kernels. Launched one by one by Python they keep a fast GPU busy for three
    fifths of the time. A graph holds kernels alone: Python code in forward runs only while it is
    made, and every batch must have this size (height, width)."""
    device = next(model.parameters()).device
    images = normalise(torch.zeros(batch_size, *size, 3, dtype=torch.uint8, device=device))
    state = copy.deepcopy(model.state_dict())  # trial runs move BatchNorm's running statistics
    # harmless: gradients' nodes were made on the stream of the trial runs
    warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")
    wrapped = nn.Sequential(model).train()  # model itself stays as it is
    with torch.autocast("cuda", torch.bfloat16, precision == "bfloat16", cache_enabled=False):
        wrapped = torch.cuda.make_graphed_callables(wrapped, (images,))
    model.load_state_dict(state)
    return wrapped


def accelerated(model, recipe, device, batch_size):
    """The model as train_epoch is to run it in one process: compiled, or with CUDA graphs."""
    # not with parts: a gradient is a graph's own memory, which the next part overwrites
    graphs = device.type == "cuda" and recipe.accumulate == 1
    if recipe.compile:
        return torch.compile(model, mode="reduce-overhead" if graphs else None)
    return with_cuda_graphs(model, batch_size, recipe.input, recipe.precision) if graphs else model


# ---------------------------------------------------------------------------- recipe and checkpoint

# What a resumed run may change: the folder may move, a lower lr and float32 cure a loss that
# diverges, and a larger accumulate a lack of memory.
CHANGEABLE = ("data", "lr", "precision", "accumulate")


def default_recipe(dataset):
    """All that decides a run's weights, as plain types."""
    known = DATASETS[dataset]
    return dict(dataset=dataset, data="", splits=list(known.splits), skeleton=known.skeleton,
                input=list(known.size), variant="lapx", **RECIPES[dataset],
                scale=known.augmentation[0], rotation=known.augmentation[1],
                precision="auto", compile=False, accumulate=1, seed=0, overfit=0, init="")


def fast_precision(device):
    """What --precision auto is on a device."""
    # PAPER SILENT: arithmetic. tf32 is PyTorch's own default on a GPU (TF32 in convolutions), which
    # is likely what the authors had; float32 has it off; bfloat16 is torch's autocast, our default
    # on CPUs that compute in it. The loss is in float32 in all three.
    if device == "cuda":
        return "tf32"
    cpu = Path("/proc/cpuinfo")
    known = device == "cpu" and cpu.exists()
    return "bfloat16" if known and re.search(r"\b(amx_bf16|avx512_bf16|bf16)\b",
                                             cpu.read_text("utf-8")) else "float32"


def new_recipe(given):
    """The recipe of a new run: the flags that were given over the data set's defaults."""
    recipe = default_recipe(given.get("dataset", "synthetic"))
    ratio = given.get("epochs", recipe["epochs"]) / recipe["epochs"]
    if ratio != 1:
        print(f"{plural(given['epochs'], 'epoch')}, not {recipe['epochs']}: milestones and gamma "
              "schedule are scaled in proportion")
        recipe["milestones"] = [round(ratio * epoch, 3) for epoch in recipe["milestones"]]
        for name in ("gamma_warmup", "gamma_ramp"):
            recipe[name] = round(ratio * recipe[name], 3)
    return recipe | given


def read_recipe(path, given):
    """The recipe of a run that is resumed, from its recipe.json, with the flags that were given.
    InputError where one of them contradicts it."""
    with reading(path, "a recipe.json of train.py"):
        recipe = data.read_json(path)["recipe"]
        for name, value in default_recipe(recipe["dataset"]).items():
            kind = (int, float) if isinstance(value, (int, float)) else type(value)
            if not isinstance(recipe[name], kind):
                raise TypeError(f"{name} is {recipe[name]!r}")
    for name, value in given.items():
        if value != recipe[name] and name not in CHANGEABLE:
            raise InputError(f"{path} is a run with {name} {recipe[name]} and keeps it: leave the"
                             " flag out, or start another run (--init takes the weights)")
        if value != recipe[name]:
            print(f"the recipe changes: {name} {recipe[name]} -> {value}")
    return recipe | given


def restore(path, model, optimiser):
    """Puts a last.pt into the model and the optimiser -> its history, a row for each epoch."""
    with reading(path, "a last.pt of train.py (--init takes the weights alone of others)") as where:
        saved = load_file(path)
        model.load_state_dict(saved["model"])
        where.entry = "optimiser"
        optimiser.load_state_dict(saved["optimiser"])
        for parameter, state in optimiser.state.items():  # frozen ones have none
            float(state["step"])
            if not state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape:
                raise ValueError("its shapes are not the parameters'")
        where.entry = "history"
        history = saved["history"]
        for row in history:
            for name in {"epoch", "lr", "loss", "seconds"}.union(row) - {"precision"}:
                float(row[name])  # fails if it is missing or no number
    return history


# ---------------------------------------------------------------------------- the run

def main():
    alone = os.environ.get("RANK", "0") == "0" and os.environ.get("WORLD_SIZE", "1") == "1"
    if not alone and not {"LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= {*os.environ}:
        raise InputError("RANK or WORLD_SIZE is set, but not by a launcher: start processes with "
                         "torchrun --nproc_per_node=N train.py, or unset both")
    rank = int(os.environ.get("RANK", 0))
    stderr = sys.stderr
    if rank > 0:  # the first process talks for all
        sys.stdout = sys.stderr = open(os.devnull, "w")
    try:
        trained = train(parse(), rank)
    except Exception:
        if rank > 0:  # a fault of all is told once: torchrun ends this process when the first fails
            time.sleep(10)
            sys.stderr = stderr
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if trained:
        report(*trained)


def agree(mine):
    """InputError if the processes are not about to do the same: on several machines each reads its
    own flags and its own folder. mine: what this one is about to do, {name: value}."""
    told = [None] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    for rank, theirs in enumerate(told):
        for name, value in theirs.items():
            if value != told[0][name]:
                raise InputError(
                    f"process {rank} has {name} {value}, process 0 has {told[0][name]}: give all "
                    "machines the same flags and, for --resume, the same copy of the run's folder")


def train(args, rank):
    """The run, but for its report -> in the first process what report takes, if there is something
    to report."""
    args.device = evaluate.choose_device(args.device)
    world = int(os.environ.get("WORLD_SIZE", 1))

    # recipe
    out = args.out or Path("runs") / (args.dataset or "synthetic")
    last = out / "last.pt"
    if args.resume not in (None, "auto"):
        last = Path(args.resume)
        out = last.parent
        if args.out not in (None, out):
            raise InputError(f"--resume {last} goes on in its own folder, not in --out {args.out}; "
                             "copy the folder to go on elsewhere")
    given = {name: value for name, value in vars(args).items()
             if name in default_recipe("mpii") and value is not None}
    given = json.loads(json.dumps(given, default=str))  # lists and strings, as in recipe.json
    resumed = args.resume and (args.resume != "auto" or (out / "recipe.json").exists())
    if resumed:
        recipe = read_recipe(out / "recipe.json", given)
    elif out.exists() and any(out.iterdir()) and not args.show:
        raise InputError(f"{out} is not empty: --resume auto goes on with the run in it, --out DIR "
                         "starts another one elsewhere")
    else:
        recipe = new_recipe(given)
    recipe = argparse.Namespace(**recipe)
    if recipe.precision == "auto":
        recipe.precision = fast_precision(args.device)
    if not (recipe.lr > 0 and recipe.gamma_warmup >= 0 and recipe.gamma_ramp >= 0
            and 0 <= recipe.scale < 1 and 0 <= recipe.rotation <= 180):
        raise InputError("--lr must be above 0, --gamma-warmup and --gamma-ramp at least 0, "
                         "--scale from 0 to below 1, --rotation from 0 to 180")
    if recipe.compile and recipe.precision == "bfloat16" and args.device == "cpu":
        raise InputError("--compile needs --precision float32 on a CPU: in bfloat16 the code that "
                         "torch 2.13 makes there fails")
    if recipe.compile and world > 1:
        raise InputError("--compile is for one process: with several, torch's compiler fails or is "
                         "slower than without (pytorch 107372, 139207)")

    # processes
    device = torch.device(args.device)
    if world > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        # the others wait while the first one scores: COCO on a slow machine takes hours
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(hours=6))

    # data
    skeleton = SKELETONS[recipe.skeleton]
    size = tuple(recipe.input)
    augmentation = (recipe.scale, recipe.rotation)
    people = data.load_people(recipe.dataset, recipe.data, recipe.splits[0], size, skeleton)
    if recipe.overfit:  # the same pictures to train and to score, exactly as they are
        people = people.in_first_pictures(recipe.overfit)
        valid = people
        augmentation = None
        print(f"overfitting {plural(len(people), 'person')}, unaugmented")
    else:
        people.truth = None  # not scored: saves memory
        valid = None
        if rank == 0:  # the first process scores for all
            valid = data.load_people(recipe.dataset, recipe.data, recipe.splits[1], size, skeleton)
    reason = evaluate.unscored(valid.truth) if valid and valid.truth else ""
    if reason:
        print(f"epochs are not scored: {reason}")
    if not skeleton.flip_pairs:
        print("the skeleton has no flip pairs: nothing is mirrored, and there is no flip test")
    parts = world * recipe.accumulate  # of a batch, of one size
    batch_size = min(recipe.batch_size, len(people)) // parts * parts
    if not batch_size:
        raise InputError(f"{plural(len(people), 'person')} in batches of {recipe.batch_size} are "
                         f"too few for {plural(world, 'process', 'es')} and --accumulate "
                         f"{recipe.accumulate}")
    if batch_size != recipe.batch_size:
        print(f"batches of {batch_size}, not {recipe.batch_size}: there are "
              f"{plural(len(people), 'person')}, {plural(world, 'process', 'es')} and --accumulate "
              f"{recipe.accumulate}")
    batches = []  # the loader's; refilled for each epoch
    samples = PoseDataset(people, size, skeleton, augmentation, recipe.seed)
    if args.show:
        if args.show.suffix != ".png":
            raise InputError(f"--show {args.show} must end in .png")
        data.write_file(args.show, data.show_samples(samples, skeleton))
        print(f"wrote {args.show}")
        return
    loader = data.make_loader(samples, batches, args.workers, device.type == "cuda")

    # network
    torch.manual_seed(recipe.seed)
    torch.backends.cudnn.benchmark = True
    model = lapx(len(skeleton.joints), recipe.variant)
    info = evaluate.model_info(recipe.dataset, skeleton, size, recipe.precision, recipe.splits)
    if world > 1 and device.type == "cuda":
        # PAPER SILENT: BatchNorm with several processes. On GPUs it normalises over the whole
        # batch. On CPUs, where torch cannot, each process normalises its share, and the running
        # statistics of the first process are the network's.
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(device, memory_format=data.memory_format(device))
    network = evaluate.Network(model, info, device)  # sets the precision, too
    if rank == 0:
        crops = evaluate.crop_loader(network, valid, batch_size, args.workers)
    # PAPER SILENT: Adam's other settings. PyTorch's: betas 0.9 and 0.999, no weight decay.
    optimiser = torch.optim.Adam(model.parameters(), recipe.lr, fused=True)
    history = []
    if resumed and (last.exists() or args.resume != "auto"):
        history = restore(last, model, optimiser)
        print(f"resumed after epoch {len(history)}")
    elif recipe.init:
        missing = load_fitting(model, recipe.init)
        print(f"weights from {recipe.init}; afresh: {', '.join(missing[:12]) or 'none'}"
              f"{', ...' * (len(missing) > 12)}")
    # wrapped trains, model is saved, network predicts
    if world > 1:
        agree(vars(recipe) | {"data": "", "persons": len(people), "epochs done": len(history),
                              "last loss": history[-1]["loss"] if history else 0})
        warnings.filterwarnings("ignore", "Grad strides do not match")  # alpha's, 208 numbers
        wrapped = nn.parallel.DistributedDataParallel(model)
    else:
        wrapped = accelerated(model, recipe, device, batch_size)

    # the folder
    if args.resume and not resumed:
        print(f"{out} has no run to resume: a new run")
    if len(history) >= recipe.epochs and (out / "predictions.png").exists():
        print(f"all {plural(recipe.epochs, 'epoch')} are done: nothing to do")
        return
    facts = {"parameters": sum(p.numel() for p in model.parameters()), "torch": torch.__version__,
             "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
             "processes": world, "batch per process": batch_size // world,
             "loader processes": args.workers}
    for key, value in {**vars(recipe), **facts, "out": out}.items():
        print(f"  {key:18} {value}")
    if rank == 0:
        data.write_file(out / "recipe.json", {"recipe": vars(recipe), "facts": facts}, not resumed)
        for part in out.glob(".*.part"):  # of a run that was killed while it wrote
            part.unlink()

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, as SIGTERM does
    print(f"if it is stopped, go on with: python train.py --resume auto --out {out}")
    best = "AP" if recipe.dataset == "coco" else "Mean"  # is highest in the best epoch
    print(f"{'epoch':>8} {'lr':>8} {'gamma':>11} {'loss':>9} {best:>8} {'images/s':>8} "
          f"{'waiting':>7} {'time left':>10}", flush=True)
    for epoch in range(len(history), recipe.epochs):
        start = time.monotonic()
        batches[:] = epoch_batches(len(people), batch_size, recipe.seed, epoch, rank, world)
        loss, speed, waiting = train_epoch(wrapped, model, optimiser, loader, epoch, recipe,
                                           device)
        if rank > 0:  # the first process's network is scored and saved
            continue
        metrics = {}
        if not reason and ((epoch + 1) % args.eval_every == 0 or epoch + 1 == recipe.epochs):
            model.eval()
            keypoints = evaluate.predict(network, crops, flip=False)
            metrics = evaluate.score(keypoints, valid, network)
        gammas = {f"gamma{stage}": module.gamma.item()
                  for stage, module in model.non_locals().items()}
        row = {"epoch": epoch + 1, "lr": optimiser.param_groups[0]["lr"], "loss": loss,
               **gammas, "images_per_second": speed, "waiting": waiting,
               "seconds": time.monotonic() - start, "precision": recipe.precision,
               "accumulate": recipe.accumulate, **metrics}
        history.append(row)
        percent = 100 if best == "AP" else 1
        shown = f"{percent * metrics[best]:.2f}" if metrics.get(best, -1) >= 0 else "-"
        seconds = np.mean([row["seconds"] for row in history[-args.eval_every:]])
        left = round((recipe.epochs - epoch - 1) * seconds)
        gammas = " ".join(f"{gamma:.3f}" for gamma in gammas.values()) or "-"
        print(f"{epoch + 1:4}/{recipe.epochs:<3} {row['lr']:8.2e} {gammas:>11} {loss:9.5f} "
              f"{shown:>8} {speed:8.1f} {waiting:7.1%} "
              f"{left // 3600:4}:{left // 60 % 60:02}:{left % 60:02}", flush=True)
        content = {"info": info, "model": model.state_dict()}
        if metrics and not any(row.get(best, -1) > metrics[best] for row in history):
            data.write_file(out / "best.pt", content | {"epoch": epoch + 1, "metrics": metrics})
        data.write_file(out / "log.csv", history)
        content |= {"history": history, "optimiser": optimiser.state_dict()}
        data.write_file(out / "last.pt", content)
    # the group of processes ends after this function, as DistributedDataParallel must go before it:
    # else torch 2.13 waits for itself now and then, forever
    return (out, history, best, network, crops, not reason) if rank == 0 else None


def report(out, history, best, network, crops, scored=True):
    """Scores the network of the last epoch without and with the flip test, and draws the run."""
    network.forward.eval()
    valid = crops.dataset.people
    # PAPER SILENT: which epoch is scored. The last one; the best one would be picked by the
    # very people that it is scored on.
    height, width = network.size
    for flip in (False, True) if network.skeleton.flip_pairs else (False,):
        keypoints = evaluate.predict(network, crops, flip)
        if not scored:
            continue
        evaluate.report(evaluate.score(keypoints, valid, network),
                        f"{network.info['dataset']}, {plural(len(valid), 'person')}, boxes "
                        f"annotated (gt),\ninput {height}x{width}, last epoch, "
                        f"{'flip test with shift' if flip else 'no flip test'}",
                        valid.head_source)
    data.write_file(out / "curve.png", draw_curve(history, best))
    found = replace(valid, joints=keypoints[..., :2], visible=keypoints[..., 2] > 0.2)
    samples = PoseDataset(found, (2 * height, 2 * width), network.skeleton)
    drawn = data.show_samples(samples, network.skeleton, targets=False, count=min(12, len(valid)))
    data.write_file(out / "predictions.png", drawn)
    print(f"wrote {out}/: {'best.pt, ' * scored}last.pt, log.csv, curve.png, predictions.png")


# ---------------------------------------------------------------------------- drawings

def draw_curve(history, score):
    """Loss, score (a column of the history) and gamma over the epochs: a Pillow picture."""
    panels = {"loss": ["loss"], f"{score} of the validation people": [score],
              "gamma": [name for name in history[0] if name.startswith("gamma")]}
    picture = Image.new("RGB", (720, 720), "white")
    draw = ImageDraw.Draw(picture)
    epochs = [row["epoch"] for row in history]
    for number, (title, names) in enumerate(panels.items()):
        # not every epoch is scored
        curves = [[(row["epoch"], np.nan_to_num(row[name])) for row in history if name in row]
                  for name in names]
        values = [value for curve in curves for _, value in curve]
        place = data.draw_axes(draw, (70, 240 * number + 30, 700, 240 * number + 190), epochs,
                               [*values, 0], "epoch", title)
        for index, (name, curve) in enumerate(zip(names, curves)):
            colour = (data.RIGHT, data.LEFT, data.MIDDLE)[index % 3]
            points = [place(x, y) for x, y in curve]
            draw.line(points, colour, 2)
            for point in points:
                draw.circle(point, 2, colour)
            draw.text((700 - 80 * index, 240 * number + 24), name, colour, data.font(size=14), "rs")
    return picture


# ---------------------------------------------------------------------------- flags

def parse():
    defaults = "\n".join(textwrap.fill(
        f"{name}: {', '.join(f'{key} {value}' for key, value in recipe.items())}", 78)
        for name, recipe in RECIPES.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=defaults, formatter_class=argparse.RawDescriptionHelpFormatter)
    data.add_data_arguments(parser, "synthetic, drawn on the fly",
                            "256x256 for mpii, 256x192 for coco, 128x128 for synthetic")
    add = parser.add_argument_group(
        "recipe (--resume keeps it, but for --lr, --precision, --accumulate)").add_argument
    add("--variant", help="a row of Table 3", choices=VARIANTS, metavar="NAME")
    add("--splits", nargs=2, metavar=("TRAIN", "VALID"))
    add("--epochs", type=data.number_from(1), metavar="N",
        help="scales the milestones of the learning rate and gamma's schedule")
    add("--batch-size", type=data.number_from(1), metavar="N", help="of all processes together")
    add("--lr", type=float, help="Adam's learning rate")
    add("--gamma-warmup", type=float, metavar="EPOCHS", help="with gamma 0")
    add("--gamma-ramp", type=float, metavar="EPOCHS", help="in which gamma rises")
    add("--scale", type=float, help="the box's size varies by this share")
    add("--rotation", type=float, help="degrees at most, either way")
    add("--precision", choices=["auto", "float32", "tf32", "bfloat16"],
        help="float32: TF32 is off; tf32: PyTorch's own setting; bfloat16: autocast; auto: tf32 on "
        "CUDA, bfloat16 on CPUs that compute in it")
    add("--compile", action="store_true", default=None, help="torch.compile: minutes to start, "
        "then faster steps, of fewer kernels")
    add("--accumulate", type=data.number_from(1), metavar="N",
        help="each batch in N parts, for want of memory; BatchNorm sees a part alone")
    add("--seed", type=data.number_from(0), help="of everything random")
    add("--overfit", type=data.number_from(1), metavar="N",
        help="train on N pictures and score on the same: a check of a setup")
    add("--init", metavar="FILE", help="start from these weights (a file, or mpii, coco, "
        "coco-384x288), wherever the shapes fit; gamma starts anew")
    add = parser.add_argument_group("run").add_argument
    add("--out", type=Path, metavar="DIR", help="default: runs/DATASET")
    add("--show", type=Path, metavar="PNG", help="only draw a sheet of samples with their targets")
    add("--resume", metavar="auto|FILE", help="go on from a last.pt; auto: from the one in --out, "
        "if there is one")
    add("--eval-every", type=data.number_from(1), default=1, metavar="N",
        help="score after every N epochs and after the last (default: 1)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    data.add_workers_argument(add)
    return parser.parse_args()


if __name__ == "__main__":
    data.run(main)
