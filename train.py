"""Trains LAPX by the paper's recipe, and scores it as it goes.

  python train.py                                        # synthetic people
  python train.py --dataset mpii --data data/mpii       # the paper's 200 epochs
  python train.py --dataset coco --data data/coco
  python train.py --dataset mpii --show samples.png      # what it would learn
  python train.py --dataset mpii --resume                # goes on with a run
  torchrun --nproc_per_node=4 train.py --dataset mpii    # 4 GPUs, same batch

A run's folder gets recipe.json, log.csv, last.pt (to resume), best.pt (the best
epoch's network), at the end curve.png, predictions.png and worst.png."""

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
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import data  # before torch: data.py sets OMP_WAIT_POLICY, which torch reads

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import nn

import evaluate
from data import DATASETS, PoseDataset, gaussian_targets, normalise, reading, writing
from lapx import SKELETONS, VARIANTS, InputError, create_model, load_file, load_fitting

# A recipe is all that decides a run's weights. Here is what differs by data set; default_recipe
# adds the rest. All are defaults of flags.
# PAPER §4.1: Adam, batches of 32, learning rates, milestones; after each of these the rate is
# multiplied by lr_decay.
RECIPES = {
    # PAPER SILENT: length of the warm-up. Ten epochs, ours, a guess: the loss should then have left
    # its first steep fall, and gamma's rise ends long before the learning rate first drops.
    "mpii": dict(epochs=200, batch_size=32, lr=3e-4, lr_decay=0.5, milestones=(105, 150, 175, 190),
                 gamma_warmup=10, gamma_ramp=50),
    "coco": dict(epochs=210, batch_size=32, lr=2e-4, lr_decay=0.4, milestones=(120, 160, 190),
                 gamma_warmup=10, gamma_ramp=50),
    # ours: small batches, and in data.py little augmentation, so that minutes on a CPU suffice
    "synthetic": dict(epochs=5, batch_size=4, lr=1e-3, lr_decay=0.3, milestones=(3.75,),
                      gamma_warmup=0.25, gamma_ramp=1.25),
}
GAMMA_TARGETS = {"row11": 0.1, "row13": 0.3, "row14": 0.4}  # PAPER Table 3; of all others 0.2


# ---------------------------------------------------------------------------- schedules and loss

def learning_rate(epoch, lr, lr_decay, milestones):
    """The learning rate of an epoch. PAPER §4.1.

    Epochs count from 0: milestone 105 acts from epoch 105 on."""
    return lr * lr_decay ** sum(epoch >= milestone for milestone in milestones)


def gamma_at(epochs, warmup, ramp, target):
    """The gamma that the schedule wants after so many epochs (10.5: amid the 11th). PAPER §3.3.

    0 during `warmup` epochs, then rising linearly to target over `ramp` epochs, then None: learnt.
    """
    if epochs > warmup + ramp:
        return None
    return target * (epochs - warmup) / ramp if epochs > warmup else 0.0


def set_gamma(non_locals, value):
    """Sets every gamma to value, gamma_at's answer for this step; None leaves gamma alone. -> the
    parameters that stay as they are in this step: train_epoch takes away their gradients."""
    # PAPER SILENT: what "frozen" means. The Non-Local modules get no gradient and have no state in
    # Adam, as if they were not there yet (the authors' code leaves them out). At gamma 0 query,
    # key, value and out have gradients of 0 anyway, but Adam would count the steps, and then start
    # with updates several times too large. From the first step in which gamma rises they learn;
    # gamma itself is set until the ramp ends.
    if value is None:
        return []
    gammas = [module.gamma for module in non_locals]
    for gamma in gammas:
        gamma.data.fill_(value)
    if value > 0:
        return gammas
    return [parameter for module in non_locals for parameter in module.parameters()]


def heatmap_loss(outputs, targets, mask):
    """The loss with intermediate supervision, in float32: a scalar. PAPER eq. 4.1, 4.2.

    outputs: S heatmaps (B,K,h,w); targets (B,K,h,w); mask (B,K), 0 for joints to leave out.

    PAPER eq. 4.1, of one stage and person: 1 / (2 K) * sum over joints k of mask_k * |output_k -
    target_k|^2, the squared L2 norm being a sum over the pixels. Eq. 4.2: the mean over the stages;
    then that over the batch. A network that says 0 everywhere loses pi sigma^2 / 2, 6.28 at sigma
    2, times the share of joints to learn: a loss of 1.0 is about a sixth of knowing nothing. (The
    sum over j = 1..2 that is printed in eq. 4.1 is probably a slip.)"""
    squared = ((torch.stack(outputs).float() - targets) ** 2).sum((3, 4))  # (S,B,K)
    return (mask * squared).mean() / 2


# ---------------------------------------------------------------------------- one epoch

class EpochBatches:
    """The batches of an epoch for a DataLoader: lists of (epoch, row), shuffled by (seed, epoch).
    Of several processes, `rank` of `world` gets its share of each; one process is 0 of 1."""

    def __init__(self, persons, batch_size, seed, rank=0, world=1):
        self.persons = persons
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.share = batch_size // world
        self.epoch = 0  # to be set before each epoch

    def __len__(self):
        # PAPER SILENT: the last, incomplete batch. Left out; who is left out changes every epoch.
        return self.persons // self.batch_size

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.persons)
        for batch in range(len(self)):
            first = batch * self.batch_size + self.rank * self.share
            yield [(self.epoch, row) for row in order[first:first + self.share].tolist()]


def train_epoch(model, non_locals, optimiser, loader, epoch, recipe, device):
    """One epoch: load, forward, loss, backward, step. -> the loss of each step, on the device; the
    seconds that one waited for batches.

    model: a LAPX, or what wraps one; non_locals: its Non-Local modules. loader: of batches of
    PoseDataset's samples. epoch: from 0. recipe: a Namespace, its input being (height, width).
    InputError at a loss that is not finite."""
    steps = len(loader)
    lr = learning_rate(epoch, recipe.lr, recipe.lr_decay, recipe.milestones)
    for group in optimiser.param_groups:
        group["lr"] = lr
    losses = torch.zeros(steps, device=device)
    model.train()
    waits = []
    for step, (_, crops, joints, annotated) in enumerate(timed(loader, waits)):
        gamma = gamma_at(epoch + step / steps, recipe.gamma_warmup, recipe.gamma_ramp,
                         recipe.gamma_target)
        frozen = set_gamma(non_locals, gamma)

        optimiser.zero_grad(set_to_none=True)
        batch = [tensor.to(device, non_blocking=True) for tensor in (crops, joints, annotated)]
        parts = [tensor.chunk(recipe.accumulate) for tensor in batch]
        for crops, joints, annotated in zip(*parts):  # one part, unless memory is short
            images = normalise(crops)  # (B,3,H,W)
            targets, mask = gaussian_targets(joints, annotated, recipe.input)  # (B,K,h,w), (B,K)
            with torch.autocast(device.type, torch.bfloat16,
                                enabled=recipe.precision == "bfloat16"):
                outputs = model(images)  # S x (B,K,h,w)
            loss = heatmap_loss(outputs, targets, mask) / recipe.accumulate
            loss.backward()  # the gradients of parts add up; BatchNorm sees a part alone
            losses[step] += loss.detach()
        for parameter in frozen:
            parameter.grad = None
        optimiser.step()

        if (step + 1) % 50 == 0 or step + 1 == steps:  # reading a loss makes a GPU wait
            check_losses(losses, epoch, lr)
    return losses, sum(waits)


# ========================================================= Behind the scenes: a run, start to end

def main():
    alone = os.environ.get("RANK", "0") == "0" and os.environ.get("WORLD_SIZE", "1") == "1"
    if not alone and not {"LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= {*os.environ}:
        raise InputError("RANK or WORLD_SIZE is set, but by no launcher: start with torchrun "
                         "--nproc_per_node=N train.py, or unset both")
    rank = int(os.environ.get("RANK", 0))
    stderr = sys.stderr
    if rank > 0:  # the first process talks for all
        sys.stdout = sys.stderr = open(os.devnull, "w")
    try:
        trained = train(parse(), rank, int(os.environ.get("WORLD_SIZE", 1)))
    except Exception:
        if rank > 0:  # a fault of all is told once: torchrun ends this process when the first fails
            time.sleep(10)
            sys.stderr = stderr
        raise
    finally:  # when DistributedDataParallel is gone: else torch 2.13 waits forever now and then
        if dist.is_initialized():
            dist.destroy_process_group()
    if trained:
        report(*trained)


def train(args, rank, world):
    """The run, but for its report: recipe, people, network, epochs. -> in the first process what
    report takes, if something was to be done."""
    device = join_processes(torch.device(evaluate.choose_device(args.device)), world)
    out, recipe, resumed = open_run(args, device.type, world)
    dataset, valid = load_data(recipe, scored=rank == 0)
    batch_size = whole_batches(recipe, len(dataset), world)
    if args.show:
        with writing(args.show) as part:
            data.show_samples(dataset).save(part)
        print(f"wrote {args.show}")
        return None
    predictor = make_predictor(recipe, dataset.skeleton, device, world)
    model = predictor.model
    # PAPER SILENT: Adam's other settings. PyTorch's: betas 0.9 and 0.999, no weight decay.
    optimiser = torch.optim.Adam(model.parameters(), recipe.lr, fused=True)
    history = start(model, optimiser, recipe, out, resumed)
    if len(history) >= recipe.epochs and (out / "predictions.png").exists():
        print(f"all {recipe.epochs} epochs are done: nothing to do")
        return None
    if world > 1:
        agree(vars(recipe) | {"data": "", "persons": len(dataset), "epochs done": len(history),
                              "last loss": history[-1]["loss"] if history else 0})
    fast_model = accelerated(model, recipe, device, batch_size, world)
    batches = EpochBatches(len(dataset), batch_size, recipe.seed, rank, world)
    loader = data.make_loader(dataset, batches, args.workers, device.type == "cuda")
    if rank == 0:
        crops = evaluate.crop_loader(predictor, valid, workers=args.workers)
        write_recipe(out, recipe, resumed, {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "torch": torch.__version__, "processes": world, "loader processes": args.workers,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type})

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, as SIGTERM does
    print(f"if it is stopped, go on with: python train.py --resume --out {out}")
    metric = "AP" if recipe.dataset == "coco" else "Mean"  # is highest in the best epoch
    print(HEAD.format(metric), flush=True)
    for epoch in range(len(history), recipe.epochs):
        begin = time.monotonic()
        batches.epoch = epoch
        losses, waited = train_epoch(fast_model, model.non_locals().values(), optimiser, loader,
                                     epoch, recipe, device)
        if world > 1:
            dist.all_reduce(losses)
        loss = losses.mean().item() / world
        seconds = time.monotonic() - begin
        if rank > 0:  # the first process's network is scored and saved
            continue
        row = {"epoch": epoch + 1, "lr": optimiser.param_groups[0]["lr"], "loss": loss}
        for stage, module in model.non_locals().items():
            row[f"gamma{stage}"] = module.gamma.item()
        row |= {"images_per_second": len(batches) * batch_size / seconds,
                "waiting": waited / seconds, "precision": recipe.precision,
                "accumulate": recipe.accumulate}
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == recipe.epochs:
            keypoints = evaluate.predict(predictor, crops, flip=False)[-1]
            row |= evaluate.score(evaluate.results_of(keypoints, valid, predictor), valid)
        history.append(row | {"seconds": time.monotonic() - begin})
        print_epoch(history, metric, recipe.epochs, args.eval_every)
        save(out, predictor, recipe, optimiser, history, metric)
    return (out, recipe, history, metric, predictor, crops) if rank == 0 else None


def timed(loader, waits):
    """A loader's batches; the seconds that each was waited for are appended to waits."""
    asked = time.monotonic()
    for batch in data.progress(loader, "steps"):
        waits.append(time.monotonic() - asked)
        yield batch
        asked = time.monotonic()


def check_losses(losses, epoch, lr):
    for step in (~losses.isfinite()).nonzero().flatten().tolist()[:1]:
        raise InputError(f"the loss is not finite in epoch {epoch + 1}, step {step + 1}, with lr "
                         f"{lr:g}; go on with --resume and a lower --lr or --precision float32")


# ---------------------------------------------------------------------------- recipe

# Of these a resumed run may change: the folder may move, the others cure a loss that diverges or a
# lack of memory.
CHANGEABLE = ("data", "lr", "precision", "accumulate")


def default_recipe(dataset, variant="lapx"):
    """All that decides a run's weights, as plain types."""
    known = DATASETS[dataset]
    return dict(dataset=dataset, data="", splits=known.splits, skeleton=known.skeleton,
                input=known.size, variant=variant, **RECIPES[dataset],
                gamma_target=GAMMA_TARGETS.get(variant, 0.2), scale_range=known.augmentation[0],
                rotation_range=known.augmentation[1], precision="auto", compile=False,
                accumulate=1, seed=0, overfit=0, init="")


def open_run(args, device, world):
    """What the flags ask for -> the run's folder; its recipe, a Namespace; whether it goes on."""
    out = args.out or Path("runs") / (args.dataset or "synthetic")
    given = {name: tuple(value) if isinstance(value, list) else value
             for name, value in vars(args).items()
             if name in default_recipe("mpii") and value is not None}
    resumed = args.resume and (out / "recipe.json").exists()
    if resumed:
        recipe = read_recipe(out / "recipe.json", given)
    elif args.data and not args.dataset:
        raise InputError(f"--data {args.data} needs a --dataset, which says what is in it")
    elif out.exists() and any(out.iterdir()) and not args.show:
        there = "has no recipe.json" if args.resume else "is not empty: --resume may go on"
        raise InputError(f"{out} {there}; --out DIR starts a run elsewhere")
    else:
        recipe = new_recipe(given)
        if args.resume:
            print(f"{out} has no run to resume: a new run")
    if recipe["precision"] == "auto":
        recipe["precision"] = fast_precision(device)
    recipe = argparse.Namespace(**recipe)
    if not (recipe.lr > 0 and recipe.gamma_warmup >= 0 and recipe.gamma_ramp > 0
            and 0 <= recipe.scale_range < 1 and 0 <= recipe.rotation_range <= 180):
        raise InputError("--lr and --gamma-ramp must be above 0, --gamma-warmup at least 0, "
                         "--scale-range from 0 to below 1, --rotation-range from 0 to 180")
    if recipe.compile and recipe.precision == "bfloat16" and device == "cpu":
        raise InputError("--compile needs --precision float32 on a CPU: torch 2.13 fails else")
    if recipe.compile and world > 1:
        raise InputError("--compile is for one process: with several it fails or is slower "
                         "(pytorch 107372, 139207)")
    return out, recipe, resumed


def new_recipe(given):
    """The recipe of a new run: the flags that were given over the data set's defaults."""
    recipe = default_recipe(given.get("dataset", "synthetic"), given.get("variant", "lapx"))
    ratio = given.get("epochs", recipe["epochs"]) / recipe["epochs"]
    if ratio != 1:
        print(f"--epochs {given['epochs']}, not {recipe['epochs']}: milestones and gamma schedule "
              "are scaled in proportion")
        recipe["milestones"] = tuple(round(ratio * epoch, 3) for epoch in recipe["milestones"])
        recipe["gamma_warmup"] = round(ratio * recipe["gamma_warmup"], 3)
        recipe["gamma_ramp"] = round(ratio * recipe["gamma_ramp"], 3)
    return recipe | given


def read_recipe(path, given):
    """The recipe of a run that goes on, with the flags given, none of which may contradict it."""
    with reading(path, "a recipe.json of this train.py"):
        recipe = {name: tuple(value) if isinstance(value, list) else value
                  for name, value in data.read_json(path)["recipe"].items()}
        if recipe.keys() != default_recipe(recipe["dataset"]).keys():
            raise ValueError("another version's: start another run, --init takes its weights")
    for name, value in given.items():
        if value != recipe[name] and name not in CHANGEABLE:
            raise InputError(f"{path} is a run with {name} {recipe[name]} and keeps it: leave the "
                             "flag out, or start another run (--init takes the weights)")
        if value != recipe[name]:
            print(f"the recipe changes: {name} {recipe[name]} -> {value}")
    return recipe | given


def write_recipe(out, recipe, resumed, facts):
    """Prints and writes what the run does. A new run's folder must still be nobody's."""
    for key, value in {**vars(recipe), **facts, "out": out}.items():
        print(f"  {key:18} {value}")
    path = out / "recipe.json"
    with writing(path) as part:
        part.write_text(json.dumps({"recipe": vars(recipe), "facts": facts}, indent=1) + "\n")
        if not resumed:
            path.touch(exist_ok=False)  # fails if another process was quicker
    for part in out.glob(".part*"):  # of a run that was killed while it wrote
        part.unlink()


def fast_precision(device):
    """What --precision auto is on a device."""
    # PAPER SILENT: arithmetic. tf32 is PyTorch's own default on a GPU (TF32 in convolutions), which
    # is likely what the authors had; float32 has it off; bfloat16 is torch's autocast, our default
    # on CPUs that compute in it. The loss is in float32 in all three.
    if device == "cuda":
        return "tf32"
    computes = re.search(r"\b(amx_bf16|avx512_bf16|bf16)\b", data.cpu_info())
    return "bfloat16" if computes else "float32"


# ---------------------------------------------------------------------------- people and network

def load_data(recipe, scored):
    """-> the PoseDataset to train on; the People to score on, None if nothing is to be scored."""
    skeleton = SKELETONS[recipe.skeleton]
    augmentation = (recipe.scale_range, recipe.rotation_range)
    people = data.load_people(recipe.dataset, recipe.data, recipe.splits[0], skeleton)
    valid = None
    if recipe.overfit:  # the same pictures to train and to score, exactly as they are
        pictures = list(dict.fromkeys(people.image_id.tolist()))[:recipe.overfit]
        people = people.rows(np.isin(people.image_id, pictures))
        if people.truth:
            listed = np.isin(people.truth.images["id"], pictures)
            images = {name: column[listed] for name, column in people.truth.images.items()}
            people.truth = replace(people.truth, images=images)
        augmentation = None
        valid = people
        print(f"overfitting {len(people)} persons, unaugmented")
    elif scored:
        valid = data.load_people(recipe.dataset, recipe.data, recipe.splits[1], skeleton)
    if valid:
        valid.unscored = evaluate.unscored(valid)
        if valid.unscored:
            print(f"epochs are not scored: {valid.unscored}")
    if not skeleton.flip_pairs:
        print("the skeleton has no flip pairs: nothing is mirrored, and there is no flip test")
    people.truth = people.truth if people is valid else None  # saves memory
    return PoseDataset(people, recipe.input, skeleton, augmentation, recipe.seed), valid


def whole_batches(recipe, persons, world):
    """The batch size: the recipe's, or what there are people for, in equal parts."""
    parts = world * recipe.accumulate
    batch_size = min(recipe.batch_size, persons) // parts * parts
    if batch_size != recipe.batch_size:
        told = (f"{persons} persons in batches of {recipe.batch_size} for {world} processes, "
                f"--accumulate {recipe.accumulate}")
        if batch_size == 0:
            raise InputError(f"{told}: they are too few")
        print(f"{told}: the batches are of {batch_size}")
    return batch_size


def make_predictor(recipe, skeleton, device, world):
    """A fresh network in a Predictor."""
    torch.manual_seed(recipe.seed)
    torch.backends.cudnn.benchmark = True  # tries kernels out in the first steps
    evaluate.set_precision(recipe.precision)
    model = create_model(len(skeleton.joints), recipe.variant)
    if world > 1 and device.type == "cuda":
        # PAPER SILENT: BatchNorm with several processes. On GPUs it normalises over the whole
        # batch. On CPUs, where torch cannot, each process normalises its share, and the running
        # statistics of the first process are the network's.
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(device, memory_format=data.memory_format(device))
    return evaluate.Predictor(model, evaluate.model_info(
        recipe.dataset, skeleton, recipe.input, recipe.precision, recipe.splits, recipe.variant),
        device)


def start(model, optimiser, recipe, out, resumed):
    """Puts last.pt, or the weights of --init, into the model -> the history, a row per epoch."""
    last = out / "last.pt"
    history = []
    if resumed and last.exists():  # else it was stopped in its first epoch
        with reading(last, "a last.pt of train.py (--init takes the weights alone of others)"):
            saved = load_file(last)
            model.load_state_dict(saved["model"])
            optimiser.load_state_dict(saved["optimiser"])
            history = saved["history"]
        print(f"resumed after epoch {len(history)}")
    elif recipe.init:
        with reading(recipe.init, "the weights of a LAPX network"):
            missing = load_fitting(model, recipe.init)
        print(f"weights from {recipe.init}; {len(missing)} tensors afresh: "
              f"{', '.join(missing[:12]) or 'none'}")
    return history


# ---------------------------------------------------------------------------- processes and speed

def join_processes(device, world):
    """Joins the group of the launcher's processes, if there are several -> this one's device."""
    if world == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # the others wait while the first one scores: COCO on a slow machine takes hours
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                            timeout=timedelta(hours=6))
    return device


def agree(mine):
    """InputError if the processes, which may have flags and folders of their own, are not about to
    do the same. mine: what this one is about to do, {name: value}."""
    told = [None] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    for rank, theirs in enumerate(told):
        for name, value in theirs.items():
            if value != told[0][name]:
                raise InputError(f"process {rank} has {name} {value}, process 0 has "
                                 f"{told[0][name]}: give all the same flags and run's folder")


def accelerated(model, recipe, device, batch_size, world):
    """The model as it is to be trained: in parallel, compiled, or with CUDA graphs."""
    if world > 1:
        warnings.filterwarnings("ignore", "Grad strides do not match")  # alpha's, 208 numbers
        return nn.parallel.DistributedDataParallel(model)
    # not with parts: a gradient is a graph's own memory, which the next part overwrites
    graphs = device.type == "cuda" and recipe.accumulate == 1
    if recipe.compile:
        return torch.compile(model, mode="reduce-overhead" if graphs else None)
    return with_cuda_graphs(model, batch_size, recipe.input, recipe.precision) if graphs else model


def with_cuda_graphs(model, batch_size, size, precision):
    """The model for training, whose forward and backward passes are one CUDA graph each.

    A step is 2500 small kernels: launched one by one they keep a fast GPU busy for three fifths of
    the time. In a graph no Python runs, and every batch must have this size (height, width)."""
    device = next(model.parameters()).device
    images = normalise(torch.zeros(batch_size, *size, 3, dtype=torch.uint8, device=device))
    state = copy.deepcopy(model.state_dict())  # trial runs move BatchNorm's running statistics
    # harmless: gradients' nodes were made on the stream of the trial runs
    warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")
    wrapper = nn.Sequential(model).train()  # model itself stays as it is
    with torch.autocast("cuda", torch.bfloat16, precision == "bfloat16", cache_enabled=False):
        wrapper = torch.cuda.make_graphed_callables(wrapper, (images,))
    model.load_state_dict(state)
    return wrapper


# ---------------------------------------------------------------------------- what a run leaves

HEAD = (f"{'epoch':>8} {'lr':>8} {'gamma':>11} {'loss':>9} {{:>8}} {'images/s':>8} "
        f"{'waiting':>7} {'time left':>10}")


def print_epoch(history, metric, epochs, eval_every):
    row = history[-1]
    value = row.get(metric, -1)
    shown = f"{100 * value if metric == 'AP' else value:.2f}" if value >= 0 else "-"
    gammas = " ".join(f"{row[name]:.3f}" for name in row if name.startswith("gamma")) or "-"
    seconds = np.mean([row["seconds"] for row in history[-eval_every:]])
    left = timedelta(seconds=round((epochs - row["epoch"]) * seconds))
    print(f"{row['epoch']:4}/{epochs:<3} {row['lr']:8.2e} {gammas:>11} {row['loss']:9.5f} "
          f"{shown:>8} {row['images_per_second']:8.1f} {row['waiting']:7.1%} {str(left):>10}",
          flush=True)


def save(out, predictor, recipe, optimiser, history, metric):
    """log.csv, last.pt and, of an epoch that scores as well as any before, best.pt."""
    scores = [row[metric] for row in history if not np.isnan(row.get(metric, np.nan))]
    content = {"config": asdict(predictor.model.config), "info": predictor.info,
               "recipe": vars(recipe), "history": history, "model": predictor.model.state_dict()}
    if scores and history[-1].get(metric) == max(scores):
        with writing(out / "best.pt") as part:
            torch.save(content, part)
    data.write_table(out / "log.csv", history)
    with writing(out / "last.pt") as part:
        torch.save(content | {"optimiser": optimiser.state_dict()}, part)


def report(out, recipe, history, metric, predictor, crops):
    """Scores the network of the last epoch without and with the flip test, and draws the run."""
    valid = crops.dataset.people
    # PAPER SILENT: which epoch is scored. The last one; the best one would be picked by the
    # very people that it is scored on.
    height, width = recipe.input
    for flip in (False, True) if predictor.skeleton.flip_pairs else (False,):
        stages = evaluate.predict(predictor, crops, flip)  # (S,N,K,3)
        if not valid.unscored:
            how = "flip test with shift" if flip else "no flip test"
            evaluate.report(
                [evaluate.score(evaluate.results_of(keypoints, valid, predictor), valid)
                 for keypoints in stages], f"{recipe.dataset}, {len(valid)} persons, boxes "
                f"annotated (gt),\ninput {height}x{width}, last epoch, {how}", valid.head_source)
    keypoints = stages[-1]
    if not valid.unscored:
        with writing(out / "worst.png") as part:
            evaluate.draw_worst(keypoints, valid, predictor).save(part)
    alphas = [tensor.detach().flatten() for name, tensor in predictor.model.named_parameters()
              if name.endswith(".alpha")]
    if alphas:
        low, middle, high = torch.cat(alphas).cpu().quantile(torch.tensor([0.0, 0.5, 1.0]))
        print(f"soft gates: alpha from {low:.2f} to {high:.2f}, median {middle:.2f}")
    with writing(out / "curve.png") as part:
        draw_curve(history, metric).save(part)
    found = replace(valid, joints=keypoints[..., :2], annotated=keypoints[..., 2] > 0.2)
    samples = PoseDataset(found, (2 * height, 2 * width), predictor.skeleton)
    with writing(out / "predictions.png") as part:
        data.show_samples(samples, targets=False, count=min(12, len(valid))).save(part)
    names = ("best.pt", "last.pt", "log.csv", "curve.png", "predictions.png", "worst.png")
    print(f"wrote {out}/: {', '.join(name for name in names if (out / name).exists())}")


def draw_curve(history, metric):
    """Loss, metric (a column of the history) and gamma over the epochs: a Pillow picture."""
    score = "AP" if metric == "AP" else "PCKh@0.5 in percent"
    panels = {"loss": ["loss"], f"{score}, validation people, no flip test": [metric],
              "gamma": [name for name in history[0] if name.startswith("gamma")]}
    picture = Image.new("RGB", (720, 720), "white")
    draw = ImageDraw.Draw(picture)
    epochs = [row["epoch"] for row in history]
    for number, (title, names) in enumerate(panels.items()):
        # not every epoch is scored
        curves = [[(row["epoch"], np.nan_to_num(row[name])) for row in history if name in row]
                  for name in names]
        values = [value for curve in curves for _, value in curve]
        position = data.draw_axes(draw, (70, 240 * number + 30, 700, 240 * number + 190), epochs,
                                  [*values, 0], "epoch", title)
        for index, (name, curve) in enumerate(zip(names, curves)):
            colour = (data.RIGHT, data.LEFT, data.MIDDLE)[index % 3]
            points = [position(x, y) for x, y in curve]
            draw.line(points, colour, 2)
            for point in points:
                draw.circle(point, 2, colour)
            name = name if len(names) > 1 else ""
            draw.text((700 - 80 * index, 240 * number + 24), name, colour, data.font(size=14), "rs")
    return picture


# ---------------------------------------------------------------------------- flags

def parse():
    defaults = "\n".join(textwrap.fill(
        f"{name}: {', '.join(f'{key} {value}' for key, value in recipe.items())}", 78)
        for name, recipe in RECIPES.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=defaults, formatter_class=argparse.RawDescriptionHelpFormatter)
    data.add_data_arguments(parser, "synthetic, drawn into that folder",
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
    add("--gamma-target", type=float, help="to which it rises (default: 0.2, or the row's)")
    add("--scale-range", type=float, help="the box's size varies by this share")
    add("--rotation-range", type=float, help="degrees at most, either way")
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
    add("--resume", action="store_true", help="go on with the run in --out, if there is one")
    add("--eval-every", type=data.number_from(1), default=1, metavar="N",
        help="score after every N epochs and after the last (default: 1)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    data.add_workers_argument(add)
    args = parser.parse_args()
    if args.show and args.show.suffix != ".png":
        parser.error(f"--show {args.show} must end in .png")
    return args


if __name__ == "__main__":
    data.run(main)
