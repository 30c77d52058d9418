"""Trains LAPX by the paper's recipe, and scores it after every epoch.

  python train.py                                 # synthetic people, on a CPU
  python train.py --dataset mpii --data data/mpii       # the paper's 200 epochs
  python train.py --dataset coco --data data/coco
  python train.py --dataset mpii --resume auto           # goes on with a run
  torchrun --nproc_per_node=4 train.py --dataset mpii    # 4 GPUs, same batch

A run's folder gets recipe.json, log.csv, last.pt (to resume), best.pt (the best
epoch's network), at the end curve.png and predictions.png.

Every random choice is a function of the seed, the epoch and the person. So on
one machine's CPU the same command gives the same weights, whatever --workers is
and however often the run was killed and resumed."""

import argparse
import io
import json
import os
import re
import signal
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import nn

import data
import evaluate
from data import DATASETS, PoseDataset, gaussian_targets, normalise, plural
from lapx import SKELETONS, VARIANTS, InputError, lapx, load_file, load_fitting, reading

# Four words: config, the network's shape; info, what belongs to its weights (evaluate.model_info);
# recipe, all that decides a run's weights; facts, the machine that it runs on.
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
    """The learning rate of an epoch, counted from 0: milestone 105 is first felt by the 106th."""
    return lr * factor ** sum(epoch >= milestone for milestone in milestones)


def gamma_at(epochs, warmup, ramp, target):
    """The gamma that the schedule wants after some epochs, a fraction included. PAPER §3.3.

    0 during `warmup` epochs, then rising linearly to target over `ramp` epochs, then None: learnt.
    """
    if epochs > warmup + ramp:
        return None
    return target * (epochs - warmup) / ramp if epochs > warmup else 0.0


def schedule_gamma(model, optimiser, value):
    """Sets every gamma to value, what gamma_at says for this step. -> the parameters that stay as
    they are in this step.

    These are all parameters of the Non-Local modules while gamma is 0, the gammas alone while it
    rises, and none afterwards. The first step with a free gamma starts at gamma_target."""
    # PAPER SILENT: what "frozen" means. The Non-Local modules get no gradient and have no state in
    # Adam, as if they were not there yet (the authors' code leaves them out). From the first step
    # in which gamma rises their weights learn; gamma itself is set until the ramp ends.
    modules = model.non_locals()
    gammas = [module.gamma for module in modules]
    for gamma in gammas:
        if value is not None:
            gamma.data.fill_(value)
        elif gamma not in optimiser.state:  # Adam has not moved it yet
            gamma.data.fill_(model.config.gamma_target)
    if value == 0:
        return [parameter for module in modules for parameter in module.parameters()]
    return gammas if value is not None else []


def heatmap_loss(outputs, targets, weights):
    """The loss with intermediate supervision, in float32: a scalar. PAPER eq. 4.1, 4.2.

    outputs: S heatmaps (B,K,h,w); targets (B,K,h,w); weights (B,K), 0 for joints to leave out."""
    # PAPER SILENT: norm in the loss. We sum squared differences over the pixels of a map.
    loss = 0
    for heatmaps in outputs:
        squared = ((heatmaps.float() - targets) ** 2).sum((2, 3))  # (B,K)
        loss = loss + (weights * squared).sum(1) / (2 * weights.shape[1])  # (B,)
    return loss.mean() / len(outputs)


# ---------------------------------------------------------------------------- one epoch

def epoch_batches(persons, batch_size, seed, epoch, rank=0, world=1):
    """The batches of an epoch, lists of (epoch, row), shuffled by (seed, epoch): of each batch the
    share of the process `rank` of `world`."""
    # PAPER SILENT: the last, incomplete batch. Left out; who is left out changes every epoch.
    order = np.random.default_rng((seed, epoch)).permutation(persons)
    return [[(epoch, row) for row in order[start + rank:start + batch_size:world].tolist()]
            for start in range(0, persons - batch_size + 1, batch_size)]


def train_epoch(wrapped, model, optimiser, loader, epoch, recipe, device):
    """One epoch: load, forward, loss, backward, step. -> mean loss, images/s, share of waiting.

    wrapped: what torch.compile and DistributedDataParallel made of the model, or the model. epoch:
    from 0. recipe: a Namespace of default_recipe's fields. InputError at a loss that is not finite.
    """
    steps = len(loader)
    lr = learning_rate(epoch, recipe.lr, recipe.factor, recipe.milestones)
    for group in optimiser.param_groups:
        group["lr"] = lr
    losses = torch.zeros(steps, device=device)
    look_every = 50 if device.type == "cuda" else 1  # reading a loss makes a GPU wait
    model.train()
    start = requested = time.perf_counter()
    waited = 0.0
    for step, (_, crops, joints, visible) in enumerate(data.progress(loader, "steps")):
        waited += time.perf_counter() - requested
        images = normalise(crops.to(device, non_blocking=True))  # (B,3,H,W)
        joints = joints.to(device, non_blocking=True)  # (B,K,2)
        visible = visible.to(device, non_blocking=True)  # (B,K)
        targets, weights = gaussian_targets(joints, visible, recipe.input)
        gamma = gamma_at(epoch + step / steps, recipe.gamma_warmup, recipe.gamma_ramp,
                         model.config.gamma_target)
        frozen = schedule_gamma(model, optimiser, gamma)

        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            outputs = wrapped(images)  # S x (B,K,h,w)
        loss = heatmap_loss(outputs, targets, weights)
        loss.backward()
        for parameter in frozen:
            parameter.grad = None
        optimiser.step()

        losses[step] = loss.detach()
        if (step + 1) % look_every == 0 or step + 1 == steps:
            bad = (~losses.isfinite()).nonzero().flatten().tolist()
            if bad:
                raise InputError(
                    f"the loss is {losses[bad[0]].item()} in epoch {epoch + 1}, step {bad[0] + 1}, "
                    f"with learning rate {lr:g}; last.pt, if there is one, is from before: "
                    "--resume auto with a lower --lr, or with --precision float32")
        requested = time.perf_counter()
    seconds = time.perf_counter() - start
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world > 1:
        dist.all_reduce(losses)
    return losses.mean().item() / world, steps * len(images) * world / seconds, waited / seconds


# ---------------------------------------------------------------------------- recipe and checkpoint

CHANGEABLE = ("lr", "precision")  # of a run that is resumed: the cures for a loss that diverges


def default_recipe(dataset):
    """All that decides a run's weights, as plain types."""
    known = DATASETS[dataset]
    return dict(dataset=dataset, splits=list(known.splits), skeleton=known.skeleton,
                input=list(known.size), variant="lapx", **RECIPES[dataset],
                scale=known.augmentation[0], rotation=known.augmentation[1],
                precision="auto", compile=False, seed=0, overfit=0, init="")


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
                                             cpu.read_text()) else "float32"


def new_recipe(dataset, given):
    """The recipe of a new run: the flags that were given over the data set's defaults."""
    recipe = default_recipe(dataset)
    ratio = given.get("epochs", recipe["epochs"]) / recipe["epochs"]
    if ratio != 1:
        print(f"{plural(given['epochs'], 'epoch')}, not {recipe['epochs']}: milestones and gamma "
              "schedule are scaled in proportion")
        recipe["milestones"] = [round(ratio * epoch, 3) for epoch in recipe["milestones"]]
        for name in ("gamma_warmup", "gamma_ramp"):
            recipe[name] = round(ratio * recipe[name], 3)
    return recipe | given


def read_recipe(path, given):
    """The recipe.json of a run that is resumed, with the flags that were given -> recipe, folder of
    the data set. InputError where a flag contradicts the recipe."""
    with reading(path, "a recipe.json of train.py") as where:
        content = data.read_json(path)
        where.entry = "data"
        root = os.fspath(content["data"])
        where.entry = "recipe"
        recipe = dict(content["recipe"])
        for name, value in default_recipe(recipe["dataset"]).items():
            number = isinstance(value, (int, float)) and isinstance(recipe[name], (int, float))
            if not number and type(recipe[name]) is not type(value):
                raise TypeError(f"{name} is {recipe[name]!r}")
    for name, value in given.items():
        if value != recipe[name]:
            if name not in CHANGEABLE:
                raise InputError(
                    f"{path} is a run with {name.replace('_', '-')} {recipe[name]}; a run that is "
                    "resumed keeps its recipe, but for --lr and --precision: leave the flag out, "
                    "or start another run (--init takes the weights)")
            print(f"the recipe changes: {name} {recipe[name]} -> {value}")
    return recipe | given, root


def restore(path, model, optimiser):
    """Puts a last.pt into the model and the optimiser -> its history, a row for each epoch."""
    with reading(path, "a last.pt of train.py (--init takes the weights alone of others)") as where:
        saved = load_file(path)
        where.entry = "model"
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
            if set(row) != set(history[0]):
                raise ValueError("its rows differ")
            [float(value) for name, value in row.items() if name != "precision"]
            percent(row)
    return history


def save(path, content):
    """Writes a checkpoint: the old one is replaced when the new one is whole on the disk."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data.write_file(path, buffer.getvalue())


def percent(metrics):
    """The metric that a network is judged by, in percent: COCO's AP, or MPII's mean PCKh."""
    return 100 * metrics["AP"] if "AP" in metrics else metrics["Mean"]


# ---------------------------------------------------------------------------- the run

def main():
    args = parse()
    args.device = evaluate.choose_device(args.device)
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # the first process talks for all

    # recipe
    out = args.out or Path("runs") / (args.dataset or "synthetic")
    last = out / "last.pt"
    if args.resume not in (None, "auto"):
        last = Path(args.resume)
        out = last.parent
        if args.out and args.out.resolve() != out.resolve():
            raise InputError(f"--resume {last} goes on in {out}, not in --out {args.out}; copy the "
                             "folder to go on elsewhere")
    given = {name: list(value) if name == "input" else value for name, value in vars(args).items()
             if name in default_recipe("mpii") and value is not None}
    if given.get("precision") == "auto":
        given["precision"] = fast_precision(args.device)
    begun = (out / "recipe.json").exists()
    fresh = not args.resume or args.resume == "auto" and not begun
    if fresh:
        if out.exists() and any(out.iterdir()):
            raise InputError(f"{out} is not empty: --resume auto goes on with the run in it, --out "
                             "DIR starts another one elsewhere")
        dataset = args.dataset or "synthetic"
        recipe = new_recipe(dataset, {"precision": fast_precision(args.device)} | given)
        root = str(data.data_folder(args.data, dataset))
    else:
        recipe, root = read_recipe(out / "recipe.json", given)
        root = str(args.data or root)
    recipe = argparse.Namespace(**recipe)
    if not (recipe.lr > 0 and recipe.gamma_warmup >= 0 and recipe.gamma_ramp >= 0
            and 0 <= recipe.scale < 1 and 0 <= recipe.rotation <= 180):
        raise InputError("--lr must be above 0, --gamma-warmup and --gamma-ramp at least 0, "
                         "--scale from 0 to below 1, --rotation from 0 to 180")

    # processes
    device = torch.device(args.device)
    if world > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    # data
    skeleton = SKELETONS[recipe.skeleton]
    size = tuple(recipe.input)
    augmentation = (recipe.scale, recipe.rotation)
    people = data.load_people(recipe.dataset, root, recipe.splits[0], size, skeleton)
    if recipe.overfit:  # the same pictures to train and to score, exactly as they are
        people = valid = people.in_first_pictures(recipe.overfit)
        augmentation = None
        print(f"overfitting {plural(len(people), 'person')} in at most "
              f"{plural(recipe.overfit, 'picture')}, unaugmented")
    else:
        people.truth = None  # only the others are scored
        valid = data.load_people(recipe.dataset, root, recipe.splits[1], size, skeleton)
    batch_size = min(recipe.batch_size, len(people)) // world * world
    if not batch_size:
        raise InputError(f"--batch-size {recipe.batch_size} with {plural(len(people), 'person')} "
                         f"leaves none for some of {world} processes")
    if batch_size != recipe.batch_size:
        print(f"batches of {batch_size}, not {recipe.batch_size}: there are "
              f"{plural(len(people), 'person')} and {plural(world, 'process', 'es')}")
    batches = []  # of the epoch under way
    samples = PoseDataset(people, size, skeleton, augmentation, recipe.seed)
    loader = data.make_loader(samples, batches, args.workers, device.type == "cuda")

    # network
    torch.manual_seed(recipe.seed)
    torch.backends.cudnn.benchmark = True
    model = lapx(len(skeleton.joints), recipe.variant)
    info = evaluate.model_info(model.config, recipe.dataset, skeleton, size, recipe.precision)
    if world > 1 and device.type == "cuda":
        # PAPER SILENT: BatchNorm with several processes. On GPUs it normalises over the whole
        # batch. On CPUs, where torch cannot, each process normalises its share, and the running
        # statistics of the first process are the network's.
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(device, memory_format=torch.channels_last)
    network = evaluate.Network(model, info, device, model)  # sets the precision, too
    # PAPER SILENT: Adam's other settings. PyTorch's: betas 0.9 and 0.999, no weight decay.
    optimiser = torch.optim.Adam(model.parameters(), recipe.lr,
                                 fused=device.type in ("cpu", "cuda"))
    history = []
    if not fresh and (last.exists() or args.resume != "auto"):
        history = restore(last, model, optimiser)
        print(f"resumed after epoch {len(history)}")
    elif recipe.init:
        missing = load_fitting(model, recipe.init)
        total = len(model.state_dict())
        print(f"{total - len(missing)} of {total} tensors from {recipe.init}; afresh: "
              f"{', '.join(missing[:12]) or 'none'}{', ...' * (len(missing) > 12)}")
    wrapped = model  # trains; model is saved; network, which has its info, predicts
    if world > 1:
        wrapped = nn.parallel.DistributedDataParallel(wrapped, broadcast_buffers=False)
    if recipe.compile:  # on a GPU the step becomes one CUDA graph
        wrapped = torch.compile(wrapped,
                                mode="reduce-overhead" if device.type == "cuda" else None)

    # the folder
    if fresh and args.resume:
        print(f"{out} has no run to resume: a new run")
    if len(history) >= recipe.epochs and (out / "predictions.png").exists():
        print(f"all {plural(recipe.epochs, 'epoch')} are done: nothing to do")
        return
    facts = {"parameters": sum(p.numel() for p in model.parameters()), "torch": torch.__version__,
             "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
             "processes": world, "batch per process": batch_size // world,
             "loader processes": args.workers}
    for key, value in {**vars(recipe), **facts, "data": root, "out": out}.items():
        print(f"  {key:18} {value}")
    if rank == 0:
        take_folder(out, {"recipe": vars(recipe), "data": root, "facts": facts}, fresh)

    def evaluate_people(flip):
        """-> the joints (N,K,3) of the validation people, and the metrics."""
        model.eval()
        keypoints = evaluate.predict(network, valid, flip, batch_size=batch_size,
                                     workers=args.workers)
        return keypoints, evaluate.score(keypoints, valid, network)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C
    try:
        name = "AP" if recipe.dataset == "coco" else "PCKh@0.5"
        print(f"{'epoch':>8} {'lr':>8} {'gamma':>11} {'loss':>9} {name:>8} {'images/s':>8} "
              f"{'waiting':>7} {'time left':>10}", flush=True)
        for epoch in range(len(history), recipe.epochs):
            start = time.monotonic()
            batches[:] = epoch_batches(len(people), batch_size, recipe.seed, epoch, rank, world)
            loss, speed, waiting = train_epoch(wrapped, model, optimiser, loader, epoch, recipe,
                                               device)
            if rank > 0:  # the first process's network is scored and saved
                history.append(None)
                continue
            _, metrics = evaluate_people(flip=False)
            gammas = {f"gamma{number}": stage.hourglass.neck.non_local.gamma.item()
                      for number, stage in enumerate(model.stages, start=1)
                      if hasattr(stage.hourglass.neck, "non_local")}
            row = {"epoch": epoch + 1, "lr": optimiser.param_groups[0]["lr"], "loss": loss,
                   **gammas, **metrics, "images_per_second": speed, "waiting": waiting,
                   "seconds": time.monotonic() - start, "precision": recipe.precision}
            history.append(row)
            left = round((recipe.epochs - epoch - 1) * row["seconds"])
            gammas = " ".join(f"{gamma:.3f}" for gamma in gammas.values()) or "-"
            print(f"{epoch + 1:4}/{recipe.epochs:<3} {row['lr']:8.2e} {gammas:>11} {loss:9.5f} "
                  f"{percent(metrics):8.2f} {speed:8.1f} {waiting:7.1%} "
                  f"{left // 3600:4}:{left // 60 % 60:02}:{left % 60:02}", flush=True)
            content = {"info": info, "model": model.state_dict()}
            if not any(percent(row) > percent(metrics) for row in history):
                save(out / "best.pt", content | {"epoch": epoch + 1, "metrics": metrics})
            data.write_csv(out / "log.csv", history)
            save(out / "last.pt", content | {"history": history,
                                             "optimiser": optimiser.state_dict()})
        if rank > 0:
            return

        # PAPER SILENT: which epoch is scored. The last one; the best one would be picked by the
        # very people that it is scored on.
        for flip in (False, True):
            keypoints, metrics = evaluate_people(flip)
            evaluate.report(metrics, f"{recipe.dataset}, {plural(len(valid), 'person')}, boxes "
                            f"annotated (gt),\ninput {size[0]}x{size[1]}, last epoch, "
                            f"{'flip test with shift' if flip else 'no flip test'}",
                            valid.head_source)
        data.write_file(out / "curve.png", draw_curve(history))
        data.write_file(out / "predictions.png", draw_predictions(
            PoseDataset(valid, size, skeleton), keypoints, skeleton))
        print(f"wrote {out}/: best.pt, last.pt, log.csv, curve.png, predictions.png")
    except KeyboardInterrupt:
        print(f"stopped after epoch {len(history)} of {recipe.epochs}; go on with: python train.py "
              f"--resume auto --out {out}", flush=True)
        os._exit(130)  # at once: loader processes and other GPUs end with us
    finally:
        if world > 1:
            dist.destroy_process_group()


def take_folder(out, content, fresh):
    """Makes a new run's folder its own, or cleans that of a resumed one of halves of files."""
    if not fresh:
        for part in out.glob(".*.part"):  # of writes that were killed
            part.unlink()
        return data.write_file(out / "recipe.json", content)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with open(out / "recipe.json", "x") as file:  # fails if another run was quicker
            json.dump(content, file, indent=1)
    except OSError as error:
        raise InputError(f"{out / 'recipe.json'} can't be made ({error.strerror}); if another run "
                         "has just started there, choose another --out") from error


# ---------------------------------------------------------------------------- drawings

def draw_curve(history):
    """Loss, score and gamma over the epochs: a Pillow picture with a panel for each."""
    score = "AP" if "AP" in history[0] else "Mean"
    panels = {"loss": ["loss"], f"{score} of the validation people": [score],
              "gamma": [name for name in history[0] if name.startswith("gamma")]}
    picture = Image.new("RGB", (720, 720), "white")
    draw = ImageDraw.Draw(picture)
    epochs = [row["epoch"] for row in history]
    for number, (title, names) in enumerate(panels.items()):
        curves = np.nan_to_num([[row[name] for row in history] for name in names])
        place = data.draw_axes(draw, (70, 240 * number + 30, 700, 240 * number + 190), epochs,
                               [*curves.flat, 0], "epoch", title)
        for name, curve, colour in zip(names, curves, (data.RIGHT, data.LEFT)):
            points = [place(x, y) for x, y in zip(epochs, curve)]
            draw.line(points, colour, 2)
            for point in points:
                draw.circle(point, 2, colour)
            draw.text(points[-1], name, colour, data.font(size=14), "rs")
    return picture


def draw_predictions(samples, keypoints, skeleton, count=12):
    """A sheet of validation crops with the joints (N,K,3) that were predicted."""
    sheet = []
    people = samples.people
    for row in range(min(count, len(samples))):
        picture = Image.fromarray(samples[row][1].numpy())
        picture = picture.resize((2 * picture.width, 2 * picture.height))
        matrix = data.affine(people.center[row], people.scale[row], samples.size)
        points = data.transform(keypoints[row, :, :2], matrix)
        data.draw_pose(picture, np.column_stack([2 * points + 0.5, keypoints[row, :, 2]]),
                       skeleton, threshold=0.2)
        sheet.append(picture)
    return data.grid(sheet, columns=6)


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
        "recipe (a resumed run keeps it, but for --lr and --precision; defaults: below)"
    ).add_argument
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
        "then faster steps; CUDA graphs on a GPU")
    add("--seed", type=data.number_from(0), help="of everything random")
    add("--overfit", type=data.number_from(1), metavar="N",
        help="train on N pictures and score on the same: a check of a setup")
    add("--init", metavar="FILE", help="start from these weights (a file, or mpii, coco, "
        "coco-384x288), wherever the shapes fit; gamma starts anew")
    add = parser.add_argument_group("run").add_argument
    add("--out", type=Path, metavar="DIR", help="default: runs/DATASET")
    add("--resume", metavar="auto|FILE", help="go on from a last.pt; auto: from the one in --out, "
        "if there is one")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    add("--workers", type=data.number_from(0, data.cpu_count()),
        help="loader processes (default: all CPUs but one for GPUs, else 1)")
    args = parser.parse_args()
    if args.workers is None:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        gpu = args.device in ("auto", "cuda") and torch.cuda.is_available()
        args.workers = max(0, data.cpu_count() // processes - 1) if gpu else 1
    return args


if __name__ == "__main__":
    data.run(main)
