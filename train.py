"""Trains LAPX by the paper's recipe, and scores it after every epoch.

    python train.py                                             # drawn people, minutes on a CPU
    python train.py --dataset mpii --data data/mpii             # the paper's 200 epochs
    python train.py --dataset coco --data data/coco
    python train.py --dataset mpii --resume auto                # goes on where a run was stopped
    torchrun --nproc_per_node=4 train.py --dataset mpii ...     # four GPUs, the same total batch

A run's folder gets recipe.json, log.csv, last.pt (everything, to resume), best.pt (the best epoch's
network), and at the end curve.png and predictions.png.

Every random choice is a function of the seed, the epoch and the person: so that the same command
gives the same network on one machine's CPU, whatever --workers is and however often the run was
killed and resumed, and there is no random state to lose.
"""

import argparse
import csv
import io
import json
import math
import os
import re
import signal
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

import data
import evaluate
from data import DATASETS, PoseDataset, gaussian_targets, normalise, target_sigma
from lapx import SKELETONS, VARIANTS, InputError, find_weights, lapx, load_file


# The defaults of the flags, and what else a recipe needs.
RECIPES = {
    #      the paper's: Adam (betas 0.9, 0.999; no weight decay, it names none), batch 32 in total
    "mpii": dict(epochs=200, batch_size=32, lr=3e-4,
                 factor=0.5, milestones=(105, 150, 175, 190),  # lr *= factor after these epochs
                 gamma_warmup=10, gamma_ramp=50),  # epochs with gamma = 0, epochs in which it rises
    "coco": dict(epochs=210, batch_size=32, lr=2e-4, factor=0.4, milestones=(120, 160, 190),
                 gamma_warmup=10, gamma_ramp=50),
    #      ours, some minutes on two CPU cores
    "synthetic": dict(epochs=4, batch_size=16, lr=1e-3, factor=0.3, milestones=(3,),
                      gamma_warmup=0.2, gamma_ramp=1),
}
# The paper does not say how long the warm-up is. Ten epochs are ours: the loss has then left its
# first steep fall, and the ramp ends long before the learning rate first drops.


def learning_rate(epoch, lr, factor, milestones):
    """The learning rate of an epoch (0-based, so milestone 105 is first felt by the 106th)."""
    return lr * factor ** sum(epoch >= milestone for milestone in milestones)


def gamma_at(epochs, warmup, ramp, target):
    """The gamma schedule (section 3.3) after some epochs, a fraction of one included.

    0 during warmup, then linear from 0 to target over ramp epochs, then None: the optimiser's.
    """
    if epochs > warmup + ramp:
        return None
    return target * (epochs - warmup) / ramp if epochs > warmup else 0.0


def set_gamma(gammas, optimiser, value, target):
    """Gives the gammas what gamma_at says a step of training starts with. -> True while frozen.

    Frozen, the optimiser knows nothing of them; so the first step that finds them free starts them
    from target, with a fresh state.
    """
    for gamma in gammas:
        if value is not None:
            gamma.data.fill_(value)
            optimiser.state.pop(gamma, None)
        elif gamma not in optimiser.state:
            gamma.data.fill_(target)
    return value is not None


def heatmap_loss(outputs, targets, weights):
    """The loss with intermediate supervision (eq. 4.1, 4.2), in float32: a scalar.

    outputs: S heatmaps (B,K,h,w); targets (B,K,h,w); weights (B,K), 0 for joints to leave out.
    A stage's loss is 1/(2K) of the squared distances of the K maps, summed over pixels; the mean
    over the batch and over the stages.
    """
    loss = 0
    for heatmaps in outputs:
        squared = ((heatmaps.float() - targets) ** 2).sum((2, 3))  # (B,K)
        loss = loss + (weights * squared).sum(1) / (2 * weights.shape[1])  # (B,)
    return loss.mean() / len(outputs)


class EpochBatches:
    """Batches of (epoch, row), shuffled by (seed, epoch): of each, this process's share.

    All batches have the same size: the few persons that are left over differ from epoch to epoch.
    """

    def __init__(self, persons, batch_size, seed, rank=0, world=1):
        self.persons, self.batch_size, self.seed = persons, batch_size, seed
        self.rank, self.world = rank, world
        self.steps = persons // batch_size
        self.epoch = self.first = 0  # first: the step to begin with, when a run is resumed

    def __len__(self):
        return self.steps - self.first

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.persons)
        for step in range(self.first, self.steps):
            batch = order[step * self.batch_size:(step + 1) * self.batch_size]
            yield [(self.epoch, row) for row in batch[self.rank::self.world].tolist()]


class SumOverProcesses(torch.autograd.Function):
    """A tensor summed over all processes; the gradient is summed likewise."""

    @staticmethod
    def forward(context, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(context, gradient):
        return SumOverProcesses.forward(context, gradient)


class SyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the batches of all processes, so that N processes train as one does.

    torch's own works on GPUs only. (B,C,h,w) -> same; every process has the same B.
    """

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        wide = x.float()
        moments = torch.cat([wide.mean((0, 2, 3)), (wide * wide).mean((0, 2, 3))])  # (2C,)
        mean, square = (SumOverProcesses.apply(moments) / dist.get_world_size()).chunk(2)
        variance = (square - mean * mean).clamp(min=0)  # not below, by rounding
        with torch.no_grad():
            n = x.numel() // x.shape[1] * dist.get_world_size()
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(variance + self.eps)
        shift = self.bias - mean * scale
        return (wide * scale[:, None, None] + shift[:, None, None]).to(x.dtype)


# ---------------------------------------------------------------------------- one epoch

class Stopped(Exception):
    """SIGTERM or Ctrl-C came: the state is to be saved and the run to end."""


class StopSignals:
    """Remembers SIGTERM and Ctrl-C until it suits us; a second one ends the process at once."""

    def __init__(self):
        self.number = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.catch)

    def catch(self, number, frame):
        self.number = number
        signal.signal(number, signal.SIG_DFL)

    def check(self, device=None):
        """Raises Stopped if a signal has come; given a device, if it has come to any process."""
        if device:
            number = torch.tensor(self.number, device=device)
            dist.all_reduce(number, dist.ReduceOp.MAX)
            self.number = int(number)
        if self.number:
            raise Stopped


def train_epoch(run, loader, epoch):
    """One epoch: load, forward, loss, backward, step. -> mean loss, images/s, share of waiting."""
    recipe, device, steps = run.recipe, run.device, run.batches.steps
    lr = learning_rate(epoch, recipe.lr, recipe.factor, recipe.milestones)
    for group in run.optimiser.param_groups:
        group["lr"] = lr
    # Reading a loss waits for the GPU, asking the others for signals waits for all of them.
    look_every = (1 if run.world == 1 and device.type == "cpu"
                  else 10 if device.type == "cpu" else 50)
    gammas = run.model.gammas()
    progress = evaluate.show_progress(steps, "steps") if run.rank == 0 else None
    run.net.train()
    start, waited, done = time.perf_counter(), 0.0, 0
    batches = iter(loader)
    for step in range(run.step, steps):
        asked = time.perf_counter()
        _, images, joints, visible = next(batches)
        waited += time.perf_counter() - asked

        images = normalise(images.to(device, non_blocking=True))  # (B,3,H,W)
        targets, weights = gaussian_targets(  # (B,K,h,w), (B,K)
            joints.to(device, non_blocking=True), visible.to(device, non_blocking=True),
            run.size, target_sigma(run.size))
        target = run.model.config.gamma_target
        frozen = set_gamma(gammas, run.optimiser, gamma_at(
            epoch + step / steps, recipe.gamma_warmup, recipe.gamma_ramp, target), target)

        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            outputs = run.net(images)  # S x (B,K,h,w)
        loss = heatmap_loss(outputs, targets, weights)
        run.optimiser.zero_grad()
        loss.backward()
        if frozen:  # Adam does not see them
            for gamma in gammas:
                gamma.grad = None
        run.optimiser.step()

        run.losses[step], run.step, done = loss.detach(), step + 1, done + len(images)
        if (step + 1) % look_every == 0 or step + 1 == steps:
            run.check_losses()
            run.stop.check(device if run.world > 1 else None)
        if progress:
            progress(step + 1)
    seconds = max(time.perf_counter() - start, 1e-9)
    run.average_losses()
    return run.losses.mean().item(), done * run.world / seconds, waited / seconds


@torch.no_grad()
def evaluate_epoch(run, flips):
    """Predicts the validation people, each by one process, and scores them.

    -> for each entry of flips (the flip test or not) the keypoints (N,K,3) and the metrics."""
    rows = np.arange(run.rank, len(run.valid), run.world)
    run.model.eval()

    def heatmaps_of(images):
        if run.world == 1:  # several must not leave each other in the middle of the gathering
            run.stop.check()
        return run.model(normalise(images.to(run.device)))[-1]

    parts = evaluate.predict(heatmaps_of, run.valid.rows(rows), run.size, run.skeleton, flips,
                             batch_size=run.recipe.batch_size // run.world, workers=run.workers,
                             pin_memory=run.device.type == "cuda",
                             progress=evaluate.show_progress(len(rows)) if run.rank == 0 else None)
    results = []
    for part in parts:
        keypoints = np.zeros((len(run.valid), *part.shape[1:]))
        gathered = [(rows, part)]
        if run.world > 1:
            gathered = [None] * run.world
            dist.all_gather_object(gathered, (rows, part))
        for some, values in gathered:
            keypoints[some] = values
        metrics = evaluate.score(keypoints, run.valid, run.truth, run.size, run.skeleton)
        results.append((keypoints, metrics))
    return results


def percent(metrics):
    """The metric that a network is judged by, in percent: COCO's AP, or the mean PCKh."""
    return 100 * metrics["AP"] if "AP" in metrics else metrics["Mean"]


# ---------------------------------------------------------------------------- a run

class Run:
    """A run and its state. What save() leaves out is made anew from the recipe on resuming."""

    def __init__(self, recipe, out, device, workers, saved=None):
        self.recipe, self.out, self.workers = recipe, out, workers
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device(device)
        if self.world > 1:
            if device == "cuda":
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if device == "cuda" else "gloo")
        self.make_data()
        self.make_network()
        self.epoch = self.step = 0  # of the next thing to do, 0-based
        self.losses = torch.zeros(self.batches.steps, device=self.device)  # of this epoch's steps
        self.history, self.best = [], -math.inf
        if saved:
            self.resume(saved)
        elif recipe.init:
            self.say(initialise(self.model, recipe.init))
        self.stop = StopSignals()

    def say(self, text):
        if self.rank == 0:
            print(text, flush=True)

    def make_data(self):
        recipe, info = self.recipe, DATASETS[self.recipe.dataset]
        self.skeleton, self.size = SKELETONS[recipe.skeleton], tuple(recipe.input)
        augmentation, root = info.augmentation, recipe.data

        def people_of(split):
            return data.load_people(recipe.dataset, root, split, self.size, self.skeleton,
                                    quiet=self.rank > 0)

        people = people_of(recipe.splits[0])
        if recipe.overfit:  # the same pictures to train and to score, exactly as they are
            _, first = np.unique(people.image_id, return_index=True)
            pictures = people.image_id[np.sort(first)[:recipe.overfit]]
            rows = np.flatnonzero(np.isin(people.image_id, pictures))
            self.truth = evaluate.read_truth(people, recipe.dataset, root, recipe.splits[0],
                                             rows)
            people = self.valid = people.rows(rows)
            augmentation = None
            self.say(f"overfitting {len(people)} persons in {len(pictures)} pictures, unaugmented")
        else:
            self.valid = people_of(recipe.splits[1])
            self.truth = evaluate.read_truth(self.valid, recipe.dataset, root, recipe.splits[1])
        batch = min(recipe.batch_size, len(people)) // self.world * self.world
        if not batch:
            raise InputError(f"--batch-size {recipe.batch_size} with {len(people)} persons leaves "
                             f"none for some of {self.world} processes")
        if batch != recipe.batch_size:
            self.say(f"batches of {batch}, not {recipe.batch_size}: there are {len(people)} "
                     f"persons and {self.world} processes")
        self.batches = EpochBatches(len(people), batch, recipe.seed, self.rank, self.world)
        dataset = PoseDataset(people, self.size, self.skeleton, augmentation, recipe.seed)
        self.loader = data.make_loader(dataset, self.batches, self.workers,
                                       self.device.type == "cuda")

    def make_network(self):
        recipe = self.recipe
        torch.manual_seed(recipe.seed)
        self.model = lapx(len(self.skeleton.joints), recipe.variant)
        self.model.to(self.device, memory_format=torch.channels_last)
        exact = recipe.precision == "float32"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not exact
        self.net = self.model
        if self.world > 1:
            for module in self.model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.__class__ = SyncBatchNorm  # the same tensors, another forward
            # gamma is set to the same value, or moved by the same gradient, in every process
            warnings.filterwarnings("ignore", "Grad strides do not match")  # those of 1x1 tensors
            self.net = nn.parallel.DistributedDataParallel(self.model)
        if recipe.compile:  # on a GPU the step becomes one CUDA graph
            self.net = torch.compile(
                self.net, mode="reduce-overhead" if self.device.type == "cuda" else None)
        self.optimiser = torch.optim.Adam(self.model.parameters(), recipe.lr,
                                          fused=self.device.type in ("cpu", "cuda"))

    def network(self):
        """What belongs to the network alone, as plain types and tensors."""
        return {"config": asdict(self.model.config), "model": self.model.state_dict(),
                "info": evaluate.model_info(self.model.config, self.recipe.dataset, self.skeleton,
                                            self.size)}

    def average_losses(self):
        """The losses of this process's shares of the batches -> those of the whole batches."""
        if self.world > 1:
            dist.all_reduce(self.losses)
            self.losses /= self.world

    def check_losses(self):
        """InputError at the epoch's first loss that is not finite, before anything is saved."""
        bad = (~self.losses[:self.step].isfinite()).nonzero().flatten().tolist()
        if bad:
            path = self.out / "last.pt"
            raise InputError(
                f"the loss is {self.losses[bad[0]].item()} in epoch {self.epoch + 1}, step "
                f"{bad[0] + 1}, with learning rate {self.optimiser.param_groups[0]['lr']:g}; "
                + (f"{path} is from before: --resume {path} with a lower --lr, or with --precision "
                   "float32" if path.exists() else "start again elsewhere with a lower --lr"))

    def save(self, name="last.pt", content=None):
        """Writes a checkpoint: the old one is replaced when the new one is whole on the disk."""
        if self.rank == 0:
            buffer = io.BytesIO()
            torch.save(content or {
                **self.network(), "recipe": vars(self.recipe), "epoch": self.epoch,
                "step": self.step, "losses": self.losses, "best": self.best,
                "history": self.history, "optimiser": self.optimiser.state_dict()}, buffer)
            data.write_file(self.out / name, buffer.getvalue())

    def resume(self, saved):
        """Goes back to the state in a checkpoint's content."""
        self.model.load_state_dict(saved["model"])
        self.optimiser.load_state_dict(saved["optimiser"])
        self.epoch, self.step, self.best = saved["epoch"], saved["step"], saved["best"]
        self.history = saved["history"]
        self.say(f"resumed after epoch {self.epoch}, step {self.step} of the next")
        if any(saved["recipe"][key] != vars(self.recipe)[key]
               for key in ("batch_size", "seed", "splits", "overfit", "data")) and self.step:
            self.step = 0
            self.say(f"its batches are others now: epoch {self.epoch + 1} starts again")
        self.losses[:self.step] = saved["losses"][:self.step]

    def train(self):
        """All epochs that are left, then the final scores and drawings."""
        recipe = self.recipe
        name = "AP" if recipe.dataset == "coco" else "PCKh@0.5"
        self.say(f"{'epoch':>9} {'lr':>9} {'gamma':>11} {'loss':>9} {name:>9} {'images/s':>9} "
                 f"{'waiting':>8} {'time left':>10}")
        while self.epoch < recipe.epochs:
            start = time.monotonic()
            self.batches.epoch, self.batches.first = self.epoch, self.step
            loss, speed, waiting = train_epoch(self, self.loader, self.epoch)
            (_, metrics), = evaluate_epoch(self, [False])
            lr, gammas = (self.optimiser.param_groups[0]["lr"],
                          [g.item() for g in self.model.gammas()])
            self.epoch, self.step = self.epoch + 1, 0
            self.history.append({
                "epoch": self.epoch, "loss": loss, "images_per_second": speed, "lr": lr,
                "gamma": gammas, "waiting": waiting, "metrics": metrics,
                "seconds": time.monotonic() - start})
            left = (recipe.epochs - self.epoch) * (time.monotonic() - start)
            score = percent(metrics)
            self.say(f"{self.epoch:4}/{recipe.epochs:<4} {lr:9.2e} "
                     f"{' '.join(f'{gamma:.3f}' for gamma in gammas) or '-':>11} {loss:9.5f} "
                     f"{score:9.2f} {speed:9.1f} {waiting:8.1%} "
                     f"{left // 3600:4.0f}:{left % 3600 // 60:02.0f}:{left % 60:02.0f}")
            if score > self.best or not self.best > -math.inf:
                self.best = score
                self.save("best.pt", {**self.network(), "epoch": self.epoch, "metrics": metrics})
            if self.rank == 0:
                data.write_file(self.out / "log.csv", log_table(self.history))
            self.save()
        results = evaluate_epoch(self, [False, True])
        if self.rank == 0:
            self.finish(results)

    def finish(self, results):
        """Prints the last epoch's scores, without and with the flip test, and draws."""
        for (_, metrics), flip in zip(results, ("no flip test", "flip test with shift")):
            evaluate.report(metrics, f"{self.recipe.dataset}, {len(self.valid)} persons, boxes gt, "
                            f"input {self.size[0]}x{self.size[1]}, last epoch, {flip}", self.truth)
        data.write_png(self.out / "curve.png", draw_curve(self.history))
        data.write_png(self.out / "predictions.png", draw_predictions(
            PoseDataset(self.valid, self.size, self.skeleton), results[-1][0], self.skeleton))
        print(f"wrote {self.out}/: best.pt, last.pt, log.csv, curve.png, predictions.png")


def initialise(model, path):
    """Weights from a file into every layer whose shape fits. -> which did not, in words."""
    tensors, own = find_weights(load_file(path), path), model.state_dict()
    fitting = {name: tensor for name, tensor in tensors.items()
               if name in own and own[name].shape == tensor.shape}
    model.load_state_dict(fitting, strict=False)
    fresh = [f"{name} {tuple(own[name].shape)}" for name in own if name not in fitting]
    return (f"{len(fitting)} of {len(own)} tensors from {path}; "
            + (f"{len(fresh)} start afresh: {', '.join(fresh[:12])}{', ...' * (len(fresh) > 12)}"
               if fresh else "all fit"))


def log_table(history):
    """The history as CSV text, a row for each epoch."""
    buffer = io.StringIO()
    rows = [{"epoch": row["epoch"], "lr": row["lr"], "loss": row["loss"],
             "gamma": " ".join(f"{gamma:.5f}" for gamma in row["gamma"]), **row["metrics"],
             "images_per_second": round(row["images_per_second"], 2),
             "waiting": round(row["waiting"], 4), "seconds": round(row["seconds"], 1)}
            for row in history]
    table = csv.DictWriter(buffer, rows[0], lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return buffer.getvalue()


def draw_curve(history):
    """Loss, score and gamma over the epochs: a Pillow picture with three panels."""
    epochs = [row["epoch"] for row in history]
    gammas = {f"module {number}": values for number, values
              in enumerate(zip(*(row["gamma"] for row in history)), start=1)}
    panels = [("loss", {"": [row["loss"] for row in history]}),
              ("AP" if "AP" in history[0]["metrics"] else "PCKh@0.5",
               {"": [percent(row["metrics"]) for row in history]}), ("gamma", gammas)]
    return data.line_charts(epochs, [panel for panel in panels if panel[1]], "epoch")


def draw_predictions(dataset, keypoints, skeleton, count=12):
    """A sheet of validation crops with the joints (N,K,3) that were predicted."""
    sheet = []
    for row in range(min(count, len(dataset))):
        picture, people = Image.fromarray(dataset[row][1].numpy()), dataset.people
        matrix = data.affine(people.center[row], people.scale[row], dataset.size)
        points = data.transform(keypoints[row, :, :2], matrix)
        enlarged = picture.resize((2 * picture.width, 2 * picture.height))
        data.draw_pose(enlarged, np.column_stack([2 * points + 0.5, keypoints[row, :, 2]]),
                       skeleton, threshold=0.2)
        sheet.append(enlarged)
    return data.grid(sheet, columns=min(6, len(sheet)))


# ---------------------------------------------------------------------------- command line

def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Recipes (the flags override them): " + json.dumps(RECIPES, indent=1))
    data.add_data_arguments(parser, "synthetic, drawn on the fly", data.SIZES)
    group = parser.add_argument_group("recipe (default: the data set's, below)")
    group.add_argument("--variant", choices=VARIANTS, help="default: lapx")
    group.add_argument("--splits", nargs=2, metavar=("TRAIN", "VALID"),
                       help="default: train valid, or train2017 val2017 for coco")
    group.add_argument("--epochs", type=data.number_from(1), help="another number than the "
                       "recipe's scales its milestones and gamma schedule in proportion")
    group.add_argument("--batch-size", type=data.number_from(1),
                       help="in total, over all processes")
    group.add_argument("--lr", type=float)
    group.add_argument("--gamma-warmup", type=float, metavar="EPOCHS", help="gamma stays 0")
    group.add_argument("--gamma-ramp", type=float, metavar="EPOCHS",
                       help="gamma rises to its target")
    group.add_argument("--precision", choices=["auto", "float32", "tf32", "bfloat16"],
                       help="float32 is the paper's; auto (default) is bfloat16 where the device "
                       "computes in it")
    group.add_argument("--compile", action="store_true", default=None, help="torch.compile: "
                       "minutes to start, then faster steps; CUDA graphs on a GPU")
    group.add_argument("--seed", type=data.number_from(0), help="default: 0")
    group.add_argument("--overfit", type=data.number_from(1), metavar="N",
                       help="train on N pictures and score on the same: a check of a setup")
    group.add_argument("--init", type=Path, metavar="FILE",
                       help="start from these weights, wherever the shapes fit")
    group = parser.add_argument_group("run")
    group.add_argument("--out", type=Path, metavar="DIR", help="default: runs/DATASET")
    group.add_argument("--resume", metavar="auto|FILE", help="go on from a last.pt; auto: from the "
                       "one in --out, if there is one")
    group.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    group.add_argument("--workers", type=data.number_from(0), help="loader processes (default: "
                       "what the CPU has to spare, at most 8 for each GPU)")
    return parser.parse_args()


RECIPE_FLAGS = ("data", "splits", "skeleton", "input", "variant", "batch_size", "lr",
                "gamma_warmup", "gamma_ramp", "precision", "compile", "seed", "overfit", "init")


def resolve(args):
    """The flags -> the recipe (a Namespace of plain types), the run's folder, and the content of
    the checkpoint to resume or None; what is not given comes from that checkpoint, else the
    defaults. And what differs from there: {flag: the old value}."""
    out, saved = args.out, None
    if args.resume:
        out = out or (Path("runs") / (args.dataset or "synthetic") if args.resume == "auto"
                      else Path(args.resume).parent)
        path = out / "last.pt" if args.resume == "auto" else Path(args.resume)
        if args.resume != "auto" or path.exists():
            saved = load_file(path)
            if args.init:
                raise InputError("--init starts a run, --resume goes on with one: give one of them")
            if not isinstance(saved, dict) or not {"recipe", "optimiser", "losses"} <= set(saved):
                raise InputError(f"{path} is not a checkpoint to resume (that is a run's last.pt); "
                                 "to start from its weights alone, give it as --init")
    if saved:
        recipe = argparse.Namespace(**saved["recipe"])
        if args.dataset not in (None, recipe.dataset):
            raise InputError(f"{path} was trained on {recipe.dataset}, not {args.dataset}; --init "
                             "takes its weights into a new run")
    else:
        dataset = args.dataset or "synthetic"
        info = DATASETS[dataset]
        recipe = argparse.Namespace(
            dataset=dataset, data=str(Path("data") / dataset), splits=[info.train, info.valid],
            skeleton=info.skeleton, input=info.size, variant="lapx", **RECIPES[dataset],
            precision="auto", compile=False, seed=0, overfit=0, init=None)
    out = out or Path("runs") / recipe.dataset
    if not args.resume and (out / "recipe.json").exists():
        raise InputError(f"{out} holds a run already: --resume auto goes on with it, --out DIR "
                         "starts another one elsewhere")
    old = dict(vars(recipe))
    if args.epochs is not None and args.epochs != recipe.epochs:
        ratio, recipe.epochs = args.epochs / recipe.epochs, args.epochs
        recipe.milestones = tuple(round(milestone * ratio, 3) for milestone in recipe.milestones)
        recipe.gamma_warmup = round(recipe.gamma_warmup * ratio, 3)
        recipe.gamma_ramp = round(recipe.gamma_ramp * ratio, 3)
    for flag in RECIPE_FLAGS:
        value = getattr(args, flag)
        if value is not None:
            setattr(recipe, flag, str(value) if isinstance(value, Path) else value)
    if not (recipe.lr > 0 and recipe.gamma_warmup >= 0 and recipe.gamma_ramp >= 0):
        raise InputError("--lr must be above 0, --gamma-warmup and --gamma-ramp not below")
    if recipe.precision == "auto":
        recipe.precision = fast_precision(args.device)
    if saved:
        fixed = [key for key in ("skeleton", "variant") if old[key] != getattr(recipe, key)]
        if fixed:
            raise InputError(f"a run can't change its {' and '.join(fixed)} when it is resumed; "
                             "--init takes the weights into a new run")
    return recipe, out, saved, {key: value for key, value in old.items()
                                if value != vars(recipe)[key]}


def fast_precision(device):
    """bfloat16 where the device computes in it (it trained to the same accuracy), else float32."""
    if device == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device == "cpu" and Path("/proc/cpuinfo").exists():
        fast = re.search(r"\b(amx_bf16|avx512_bf16|bf16)\b", Path("/proc/cpuinfo").read_text())
    else:
        fast = False
    return "bfloat16" if fast else "float32"


def main():
    args = parse()
    args.device = evaluate.choose_device(args.device)
    recipe, out, saved, changed = resolve(args)
    if args.workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        args.workers = min(8, max(0, cores // processes - 1)) if args.device == "cuda" else 1
    run = Run(recipe, out, args.device, args.workers, saved)
    if args.resume and not saved:
        run.say(f"{out} has no last.pt: a new run")
    if saved:
        for key, value in changed.items():
            run.say(f"the recipe changes: {key} was {value}, is now {vars(recipe)[key]}")
    elif changed.get("epochs"):
        run.say(f"{recipe.epochs} epochs, not {changed['epochs']}: milestones and gamma schedule "
                "are scaled in proportion")
    if run.epoch >= recipe.epochs and (out / "predictions.png").exists():
        run.say(f"all {recipe.epochs} epochs are done: nothing to do")
        return
    facts = {"parameters": sum(p.numel() for p in run.model.parameters()),
             "torch": torch.__version__,
             "device": (torch.cuda.get_device_name(run.device) if args.device == "cuda"
                        else args.device),
             "processes": run.world, "batch per process": run.batches.batch_size // run.world,
             "loader processes": args.workers}
    for key, value in {**vars(recipe), **facts, "out": str(out)}.items():
        run.say(f"  {key:18} {value}")
    if run.rank == 0:
        data.write_file(out / "recipe.json", json.dumps({**vars(recipe), **facts}, indent=1) + "\n")
    try:
        run.train()
    except Stopped:
        run.average_losses()
        run.check_losses()
        run.save()
        run.say(f"stopped in epoch {run.epoch + 1} after step {run.step} of {run.batches.steps}; "
                f"go on with: python train.py --resume {out / 'last.pt'}")
        sys.exit(128 + run.stop.number)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        if run.stop.number:  # whoever sent the signal sent it to the loader's processes as well
            sys.exit(f"stopped in epoch {run.epoch + 1}; go on with: python train.py --resume auto "
                     f"--out {out}")
        raise InputError(f"a loader process died ({str(error).splitlines()[0]}), often for want of "
                         f"memory; go on with --resume auto --out {out} and fewer --workers"
                         ) from None
    finally:
        if run.world > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    data.run(main)
