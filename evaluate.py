"""Scores and draws predictions: PCKh on MPII, OKS average precision on COCO,
one's own pictures.

  python evaluate.py --weights FILE --dataset mpii
  python evaluate.py --weights FILE --dataset coco --boxes DETECTIONS.json
  python evaluate.py --results pred.mat --dataset mpii        # made elsewhere
  python evaluate.py --results results.json --annotations GROUND_TRUTH.json
  python evaluate.py --weights FILE --image photo.jpg --box 120 40 200 380

Both metrics are written here by hand, in numpy; COCO's equals pycocotools."""

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict
from functools import partial
from pathlib import Path

import data  # before torch: data.py sets OMP_WAIT_POLICY, which torch reads

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

from data import (DATASETS, PoseDataset, affine, expect, flip_order, normalise, people_in_boxes,
                  plural, read_columns, transform)
from lapx import (LAPX, MEAN, SKELETONS, STD, STRIDE, InputError, Skeleton, decode, from_checkpoint,
                  heatmap_size, load_file, reading, weights_path)


# ---------------------------------------------------------------------------- heatmaps to joints

def flip_back(heatmaps, order, shift=True):
    """The heatmaps (B,K,h,w) of mirrored crops -> as if of the crops themselves.

    Mirrored, left and right joints exchanged (order (K,)), and moved one pixel to the right (column
    0 stays, too): since heatmap pixel x lies on input pixel 4x, the mirrored map is 3/4 of a pixel
    too far left (SimpleBaseline shifts by a whole one, and 1/4 remains)."""
    heatmaps = heatmaps.flip(3)[:, order]
    if shift:
        heatmaps = torch.cat([heatmaps[..., :1], heatmaps[..., :-1]], dim=3)
    return heatmaps


def crop_loader(network, people, batch_size=32, workers=0):
    """The crops of People in their order, for predict: made once where they are predicted again."""
    samples = PoseDataset(people, network.size, network.skeleton)
    batches = torch.utils.data.BatchSampler(range(len(people)), batch_size, drop_last=False)
    return data.make_loader(samples, batches, workers, network.device.type == "cuda")


def predict(network, loader, flip=True, shift=True, quarter_offset=True):
    """Joints of the People in a crop_loader: (N,K,3) as x, y in pixels of the pictures, counted
    from 0, and score.

    flip: the flip test, which averages the heatmaps of a crop and of its mirror image, if the
    skeleton has flip pairs; shift, quarter_offset: see flip_back and lapx.decode. The protocol is
    the paper's and SimpleBaseline's."""
    people = loader.dataset.people
    keypoints = np.zeros((len(people), len(network.skeleton.joints), 3))
    order = flip_order(network.skeleton)
    for rows, crops, _, _ in data.progress(loader, "batches"):
        crops = crops.to(network.device, non_blocking=True)
        heatmaps = network(crops)[-1]  # (B,K,h,w)
        if flip and network.skeleton.flip_pairs:
            mirrored = network(crops.flip(2))[-1]  # crops are (B,H,W,3)
            heatmaps = (heatmaps + flip_back(mirrored, order, shift)) / 2
        points, scores = decode(heatmaps, quarter_offset)  # (B,K,2), (B,K)
        keypoints[rows] = torch.cat([STRIDE * points, scores[..., None]], dim=2).cpu()
    if not np.isfinite(keypoints).all():
        raise InputError("the network's heatmaps are not finite; take an earlier checkpoint")
    to_crop = [affine(*box, network.size) for box in zip(people.center, people.scale)]
    to_picture = np.linalg.inv(np.reshape(to_crop, (-1, 3, 3)))  # (N,3,3)
    keypoints[..., :2] = transform(keypoints[..., :2], to_picture)
    return keypoints


# ---------------------------------------------------------------------------- PCKh (MPII)

PCKH_COLUMNS = {"Head": [9], "Shoulder": [12, 13], "Elbow": [11, 14], "Wrist": [10, 15],
                "Hip": [2, 3], "Knee": [1, 4], "Ankle": [0, 5]}


def pckh(predictions, joints, visible, head_sizes):
    """PCKh, the percentage of joints within half a head size of the truth: {column: percentage}.

    predictions, joints (N,16,2) in one frame; visible (N,16) bool; head_sizes (N,) in pixels.
    A distance of exactly half a head size is a hit. A column is the unweighted mean of left and
    right; Mean is over all visible joints but pelvis and thorax. A column is NaN if one of its
    joints is never visible."""
    distance = np.linalg.norm(predictions - joints, axis=2) / head_sizes[:, None]  # (N,16)

    def percentage(indices, threshold):
        counted = visible[:, indices]
        hits = (distance[:, indices] <= threshold) & counted
        return 100 * hits.sum() / counted.sum() if counted.any() else np.nan

    scores = {name: float(np.mean([percentage([index], 0.5) for index in indices]))
              for name, indices in PCKH_COLUMNS.items()}
    others = [index for index in range(16) if index not in (6, 7)]  # pelvis and thorax
    scores["Mean"] = float(percentage(others, 0.5))
    # DIFFERS: Mean@0.1. Ours is at 0.10; what SimpleBaseline and HRNet print under that name is at
    # 0.11, the eleventh of their thresholds. The paper does not print it.
    scores["Mean@0.1"] = float(percentage(others, 0.1))
    return scores


# ---------------------------------------------------------------------------- OKS and AP (COCO)

COCO_METRICS = ("AP", "AP50", "AP75", "APM", "APL", "AR", "AR50", "AR75", "ARM", "ARL")
THRESHOLDS = np.linspace(0.5, 0.95, 10)  # T: the OKS from which on a detection is a hit
RECALLS = np.linspace(0, 1, 101)
AREAS = ((0, 1e10), (32 ** 2, 96 ** 2), (96 ** 2, 1e10))  # all, medium, large; both ends included
MAX_DETECTIONS = 20  # per picture


def object_keypoint_similarity(found, truth, area, box, sigmas):
    """OKS of D detections with one person: found (D,K,2) and truth (K,3) in pixels, the person's
    area, a number or (D,1), and box (x, y, width, height), sigmas (K,) -> (D,).

    The mean over the labelled joints of exp(-d^2 / (2 (2 sigma)^2 area)), d being the distance."""
    labelled = truth[:, 2] > 0
    if labelled.any():
        difference = found[:, labelled] - truth[labelled, :2]  # (D,L,2), L labelled joints
        sigmas = sigmas[labelled]
    else:  # the distance of all joints to the box made 3 times as wide and high (pycocotools)
        difference = found - np.clip(found, box[:2] - box[2:], box[:2] + 2 * box[2:])
    squared = difference[..., 0] ** 2 + difference[..., 1] ** 2  # (D,L)
    exponent = squared / (2 * sigmas) ** 2 / (area + np.spacing(1)) / 2
    # contiguous: sums in pycocotools' order; the last bit can change a match
    return np.ascontiguousarray(np.exp(-exponent)).sum(1) / len(sigmas)


def match(similarity, ignored, crowd, threshold):
    """Which person each detection of a picture finds, greedily: similarity (D lists of G), the
    detections from the highest score down; ignored, crowd (G,) -> D indices, -1 for nobody.

    ignored: a crowd, a person without labelled joints or of another size. A detection takes the
    most similar person that is still free (of equals the later one, as in pycocotools), an ignored
    one only if no other is similar enough. A crowd is never used up."""
    taken = set()
    matches = []
    for row in similarity:
        possible = [(not ignored[person], value, person) for person, value in enumerate(row)
                    if value >= threshold and (crowd[person] or person not in taken)]
        best = max(possible)[2] if possible else -1
        taken.add(best)
        matches.append(best)
    return matches


def precision_and_recall(scores, hit, left_out, total):
    """Detections of the whole data set -> precision at RECALLS (T,101), final recall (T,).

    scores (D,); hit, left_out (neither right nor wrong) (T,D) bool; total: how many persons there
    are to find; -1 if none."""
    if total == 0:
        return np.full((len(THRESHOLDS), len(RECALLS)), -1.0), np.full(len(THRESHOLDS), -1.0)
    order = np.argsort(-scores, kind="stable")
    true = np.cumsum((hit & ~left_out)[:, order], axis=1)  # (T,D)
    false = np.cumsum((~hit & ~left_out)[:, order], axis=1)
    precision = true / (true + false + np.spacing(1))
    # the best one at this recall or a higher one; 0 for recalls that are never reached
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    precision = np.column_stack([precision, np.zeros(len(THRESHOLDS))])
    recall = true / total
    sampled = [row[np.searchsorted(reached, RECALLS)] for row, reached in zip(precision, recall)]
    return np.array(sampled), recall.max(1, initial=0)


def results_columns(entries, path, num_joints, categories):
    """COCO results, a parsed file -> {image_id (D,), category_id (D,), keypoints (D,K,3), score
    (D,), area (D,)}, of some categories.

    The area is that of the box, if the first result has one, else of the joints' extent, as in
    pycocotools. InputError, naming path, if it is not a list of such results."""
    with reading(path, f"a list of results, some with the category_id {categories}"):
        boxed = bool(expect(entries, list)[0].get("bbox"))
        known = [entry for entry in entries if float(entry["category_id"]) in categories]
        if not known:
            raise ValueError(f"all {len(entries)} are of others")
    shapes = {"image_id": (), "category_id": (), "score": (), "keypoints": (3 * num_joints,)}
    columns = read_columns(path, "result", known, shapes | ({"bbox": (4,)} if boxed else {}))
    columns["keypoints"] = columns["keypoints"].reshape(-1, num_joints, 3)
    extent = columns["bbox"][:, 2:] if boxed else np.ptp(columns["keypoints"][..., :2], axis=1)
    columns["area"] = extent[:, 0] * extent[:, 1]
    return columns


def rows_by_picture(columns):
    """{(image_id, category_id): its rows in their order}, in ascending order."""
    keys, picture = np.unique([columns["image_id"], columns["category_id"]], axis=1,
                              return_inverse=True)
    order = np.argsort(picture.ravel(), kind="stable")
    start = np.cumsum(np.bincount(picture.ravel()))[:-1]
    return dict(zip(map(tuple, keys.T.tolist()), np.split(order, start)))


def coco_ap(file, entries, path, sigmas):
    """The ten numbers of COCO's keypoint task, equal to pycocotools: {AP, AP50, ..., ARL}.

    file: a data.CocoFile, the truth. entries: COCO results, parsed. path: their file, for errors.
    sigmas (K,). A number is from 0 to 1, or -1 where there is nobody to find; of several categories
    the mean over those with somebody to find, each on its own."""
    results = results_columns(entries, path, len(sigmas), file.categories)
    unknown = np.setdiff1d(results["image_id"], file.images["id"])
    if len(unknown):
        raise InputError(f"the results name {plural(len(unknown), 'picture')} that {file.path} "
                         f"does not have (first: {unknown[0]:.0f}); are both of the same split?")
    best_first = np.argsort(-results["score"], kind="stable")
    results = {name: column[best_first] for name, column in results.items()}
    order = np.concatenate([rows[:MAX_DETECTIONS] for rows in rows_by_picture(results).values()])
    results = {name: column[order] for name, column in results.items()}
    # of annotations with one id the last replaces the others (pycocotools)
    last = {id: row for row, id in enumerate(file.persons["id"])}
    rows = np.array([last[id] for id in file.persons["id"]], int)
    persons = {name: column[rows] for name, column in file.persons.items()}
    crowd = persons["iscrowd"] > 0

    pictures = []  # in which somebody may be found
    people_in = rows_by_picture(persons)
    for image, detections in rows_by_picture(results).items():  # detections (D,)
        people = people_in.get(image, [])  # (G,)
        similarity = [object_keypoint_similarity(
            results["keypoints"][detections, :, :2], persons["keypoints"][row],
            persons["area"][row], persons["bbox"][row], np.asarray(sigmas)) for row in people]
        if np.max(similarity, initial=0) >= THRESHOLDS[0]:
            pictures.append((detections, people, np.transpose(similarity).tolist()))  # (D,G)

    curves = []
    for low, high in AREAS:
        ignored = crowd | (persons["num_keypoints"] == 0)
        ignored |= (persons["area"] < low) | (persons["area"] > high)
        found = np.full((len(THRESHOLDS), len(order)), -1)  # rows of persons
        for detections, people, similarity in pictures:
            matches = [match(similarity, ignored[people].tolist(), crowd[people].tolist(), least)
                       for least in THRESHOLDS]
            found[:, detections] = np.append(people, -1)[matches]
        # -1 picks what is appended. pycocotools marks a match by the annotation's id, so that an
        # id of 0 is no match
        hit = np.append(persons["id"], 0)[found] != 0  # (T,D)
        outside = (results["area"] < low) | (results["area"] > high)
        left_out = np.append(ignored, False)[found] | (~hit & outside)
        # train.py --overfit leaves out images
        counted = ~ignored & np.isin(persons["image_id"], file.images["id"])
        of_category = []
        for category in file.categories:
            rows = results["category_id"] == category
            total = np.count_nonzero(counted & (persons["category_id"] == category))
            of_category.append(precision_and_recall(results["score"][rows], hit[:, rows],
                                                    left_out[:, rows], total))
        curves.append([np.column_stack(parts) for parts in zip(*of_category)])

    values = []
    for of_all, of_medium, of_large in zip(*curves):  # first the precisions, then the recalls
        values += [of_all, of_all[0], of_all[5], of_medium, of_large]  # [0]: OKS 0.5, [5]: 0.75
    return {name: float(np.mean(value[value > -1])) if (value > -1).any() else -1.0
            for name, value in zip(COCO_METRICS, values)}


def unscored(file):
    """Why a CocoFile's persons can't be scored; "" if they can. Prints what lowers their AP."""
    persons = file.persons
    labelled = persons["keypoints"].any((1, 2))
    counted = persons["num_keypoints"] > 0
    lost = len(labelled) - np.count_nonzero(np.unique(persons["id"]))
    for count, fault in ((lost, "have no id, 0 or another's id, and count as not found"),
                         (sum(counted != labelled), "go by num_keypoints, against their flags")):
        if count:
            print(f"{file.path}: {count} annotations {fault}; so it is in pycocotools")
    if not labelled.any():
        return "nobody has a labelled joint"
    unsized = sum((persons["area"] < 0) | (persons["bbox"][:, 2] < 0) & ~labelled)
    return f"{unsized} annotations have no area or box, which OKS needs" if unsized else ""


# ---------------------------------------------------------------------------- results

def rescore(keypoints, people, network):
    """Predictions (N,K,3) -> the score of each person (N,), and the rows of those to keep.

    A score is the mean of the joint scores above 0.2, 0 if there is none, times the score of the
    box (SimpleBaseline). Of persons on one picture that are more alike than an OKS of 0.9 the best
    is kept. Unlike in the metric all joints count, and the area is the mean of the two padded
    boxes', which have the shape of the network's input (HRNet)."""
    counted = keypoints[..., 2] > 0.2
    mean = (keypoints[..., 2] * counted).sum(1) / np.maximum(counted.sum(1), 1)
    scores = mean * people.score
    areas = (200 * people.scale) ** 2 * network.size[0] / network.size[1]  # pixels of the pictures
    labelled = keypoints.copy()
    labelled[..., 2] = 1
    sigmas = np.array(network.skeleton.sigmas or [0.07] * keypoints.shape[1])  # COCO's mean
    kept = {image_id: [] for image_id in people.image_id.tolist()}  # the best ones first
    for row in np.argsort(-scores, kind="stable"):
        better = kept[people.image_id[row]]
        area = (areas[better] + areas[row]) / 2
        similarity = object_keypoint_similarity(keypoints[better, :, :2], labelled[row],
                                                area[:, None], None, sigmas)
        if (similarity <= 0.9).all():
            better.append(row)
    return scores, [row for rows in kept.values() for row in rows]


def coco_results(keypoints, people, network):
    """Predictions (N,K,3), in pixels of the pictures -> what COCO's server takes: a list of
    {image_id, category_id, keypoints, score}."""
    scores, kept = rescore(keypoints, people, network)
    return [{"image_id": int(people.image_id[row]), "category_id": int(people.category_id[row]),
             "keypoints": keypoints[row].ravel().tolist(), "score": float(scores[row])}
            for row in kept]


# ---------------------------------------------------------------------------- a network from a file

DEFAULT_INFO = {"dataset": None, "splits": None, "mean": MEAN, "std": STD, "colour": "RGB",
                "precision": "tf32"}


def model_info(dataset, skeleton, size, precision="tf32", splits=None):
    """All that belongs to a network's weights, as plain types: kept in checkpoints and ONNX files,
    so that no flag has to be repeated."""
    return DEFAULT_INFO | {"dataset": dataset, "skeleton": asdict(skeleton), "input": list(size),
                           "precision": precision, "splits": splits}


class Network:
    """A network and all that belongs to it, made by open_network.

    network(crops): crops (B,H,W,3) uint8 RGB -> the heatmaps (B,K,h,w) of all stages that it gives,
    float32, a list; the last is the prediction. forward: the LAPX or, from an ONNX file, a function
    of normalised images (B,3,H,W). info: model_info's."""

    def __init__(self, forward, info, device="cpu"):
        self.forward = forward
        self.info = info
        self.device = torch.device(device)
        self.skeleton = Skeleton(**info["skeleton"])
        self.size = data.image_size("{}x{}".format(*info["input"]))
        self.splits = info["splits"] or DATASETS[info["dataset"] or "mpii"].splits
        self.normalisation = ({"RGB": False, "BGR": True}[info["colour"]],
                              tuple(map(float, info["mean"])), tuple(map(float, info["std"])))
        # Evaluation computes as training did, but for bfloat16, which is for training alone. The
        # switch is torch's for the whole process.
        torch.backends.cudnn.allow_tf32 = info["precision"] != "float32"

    @torch.no_grad()
    def __call__(self, crops):
        images = normalise(crops.to(self.device, non_blocking=True), *self.normalisation)
        outputs = self.forward(images)
        wanted = (len(self.skeleton.joints), *heatmap_size(*self.size))
        heatmaps = [output.float() for output in outputs if output.shape[1:] == wanted]
        if not heatmaps:
            found = [tuple(output.shape[1:]) for output in outputs]
            raise InputError(f"the network gives {found}, not heatmaps {wanted} (joints, height, "
                             "width); choose --skeleton and --input accordingly")
        return heatmaps


def open_network(path, device="auto", size=None, skeleton=None, bgr=False):
    """A Network from a file of weights, a name in lapx.WEIGHTS, or an ONNX file (on the CPU).

    size (height, width), skeleton (a name in SKELETONS), bgr: what the file does not tell, or is to
    be changed. InputError if the file is broken, or file and arguments leave something open."""
    path = weights_path(path)
    if path.suffix == ".onnx":
        if device not in ("auto", "cpu"):
            raise InputError(f"{path}: ONNX files run on the CPU here; leave out --device")
        device = "cpu"
        session = open_session(path)
        forward = partial(run_session, session, path)
        info = session.get_modelmeta().custom_metadata_map.get("lapx", "{}")  # JSON
    else:
        device = torch.device(choose_device(device))
        content = load_file(path)
        forward = from_checkpoint(content, path).eval()
        forward.to(device, memory_format=data.memory_format(device))
        info = content.get("info") if isinstance(content, dict) else None
        dataset = {16: "mpii", 17: "coco"}.get(forward.config.num_joints)
        if not info and dataset:  # weights alone, such as the authors'
            wanted = (384, 288) if "384_288" in path.stem else DATASETS[dataset].size
            info = model_info(dataset, SKELETONS[dataset], wanted)
            print(f"{path} does not tell its joints and input; taken for {dataset}'s and "
                  f"{wanted[0]}x{wanted[1]}, unless --skeleton and --input say otherwise")
    changes = {"input": size, "skeleton": skeleton and asdict(SKELETONS[skeleton]),
               "colour": bgr and "BGR"}
    with reading(path, "a network that tells its joints, input, mean, std and colours; --input HxW "
                 "and --skeleton NAME are for one that does not"):
        info = json.loads(info) if isinstance(info, str) else info
        info = DEFAULT_INFO | (info or {}) | {key: value for key, value in changes.items() if value}
        network = Network(forward, info, device)
        # what does not fit together fails here
        normalise(torch.zeros(1, 1, 1, 3), *network.normalisation)
    network(torch.zeros(1, *network.size, 3, dtype=torch.uint8))
    return network


def choose_device(name):
    """auto -> cuda if it is there, else cpu: nobody has measured yet whether a Mac's mps is right
    and fast. InputError if a named one is missing."""
    there = {"auto": True, "cpu": True, "cuda": torch.cuda.is_available(),
             "mps": torch.backends.mps.is_available()}
    if not there[name]:
        raise InputError(f"--device {name}: torch {torch.__version__} finds no such device here")
    if name != "auto":
        return name
    return "cuda" if there["cuda"] else "cpu"


def open_session(path, threads=0, **settings):
    """An ONNX Runtime session on the CPU, with threads (0: one per core) and other settings of its
    SessionOptions; InputError if the file is not one for it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    settings = {"intra_op_num_threads": threads, "log_severity_level": 4} | settings
    for name, value in settings.items():
        setattr(options, name, value)
    with reading(path, "an ONNX file that ONNX Runtime can run"):
        open(path).close()  # a missing file is told as such
        return onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])


def run_session(session, path, images):
    """An ONNX Runtime session's outputs for images (B,3,H,W), a list of tensors."""
    takes = session.get_inputs()[0]
    with reading(path, f"a network for images {tuple(images.shape)}, see --input"):
        batch = takes.shape[0] if isinstance(takes.shape[0], int) else len(images)
        # the last batch is filled with the first images
        rows = torch.arange(len(images) + -len(images) % batch) % len(images)
        runs = [session.run(None, {takes.name: images[part].numpy()}) for part in rows.split(batch)]
        return [torch.from_numpy(np.concatenate(parts)[:len(images)]) for parts in zip(*runs)]


# ---------------------------------------------------------------------------- scoring a split

def score(keypoints, people, network, results=None):
    """Predictions (N,K,3) of a whole split, in pixels of the pictures -> {metric: value}. results:
    of COCO people what coco_results made of them, if it did already."""
    if people.truth is None:
        return pckh(keypoints[..., :2], people.joints, people.visible, people.head_size)
    if results is None:
        results = coco_results(keypoints, people, network)
    return coco_ap(people.truth, results, "the predictions", network.skeleton.sigmas)


def report(metrics, what, heads, path=None):
    """Prints what was scored, how (heads: what PCKh's head sizes are, in words), and the numbers,
    which also go to a file if path names one."""
    print(what)
    if "AP" in metrics:
        print(f"OKS average precision in percent, {MAX_DETECTIONS} detections a picture; -1: there "
              "is nobody to find")
    else:
        print(f"PCKh@0.5: distance <= half a head size, {heads};\nMean over 14 joints, without "
              "pelvis and thorax")
    width = 7 if "AP" in metrics else 8
    print(" ".join(f"{name:>{width}}" for name in metrics))
    percent = [100 * value if "AP" in metrics and value >= 0 else value
               for value in metrics.values()]
    print(" ".join(f"{value:{width}.2f}" for value in percent), flush=True)
    if path:
        data.write_file(path, {name: None if np.isnan(value) else value
                               for name, value in metrics.items()})
        print(f"wrote {path}")


def evaluate_dataset(args, network):
    """Predicts a split with a network and scores it, or only predicts if nothing is annotated."""
    dataset = args.dataset or network.info["dataset"]
    if not dataset:
        raise InputError(f"{args.weights} does not tell its data set; name a --dataset or --image")
    if dataset != "coco" and args.boxes != "gt":
        raise InputError(f"--boxes means nothing with {dataset}, whose boxes are annotated")
    own = dataset == network.info["dataset"]
    split = args.split or (network.splits if own else DATASETS[dataset].splits)[1]
    people = data.load_people(dataset, args.data, split, network.size, network.skeleton,
                              args.boxes)
    reason = "" if people.visible.any() else "nobody has an annotated joint"
    reason = unscored(people.truth) if people.truth else reason
    # DIFFERS: boxes of COCO's persons. The paper's numbers are with a detector's boxes, ours are
    # with annotated ones unless --boxes names a file: about 2 AP more. The result line says which.
    boxes = "annotated (gt)" if args.boxes == "gt" else f"of {args.boxes}"
    loader = crop_loader(network, people, args.batch_size, args.workers)
    mirrored = len(network.skeleton.flip_pairs) > 0
    for flip in {False, mirrored} if args.both else {mirrored and not args.no_flip}:
        keypoints = predict(network, loader, flip, not args.no_shift, not args.no_offset)
        results = None
        if people.truth:
            results = coco_results(keypoints, people, network)
            path = args.out / "results.json"
            data.write_file(path, json.dumps(results))
        else:
            path = args.out / "pred.mat"
            data.write_file(path, {"preds": keypoints[..., :2] + 1})  # MPII counts from 1
        print(f"wrote {path}")
        if not reason:
            how = f"flip test {'without' if args.no_shift else 'with'} shift"
            how = (how if flip else "no flip test") + ", no quarter offset" * args.no_offset
            name = "metrics.json" if flip or not args.both else "metrics_no_flip.json"
            report(score(keypoints, people, network, results), f"{dataset} {split}, "
                   f"{plural(len(people), 'person')}, boxes {boxes},\ninput "
                   f"{network.size[0]}x{network.size[1]}, {how}", people.head_source,
                   args.out / name)
    if reason:
        print(f"{dataset} {split}: there is no score, as {reason}")


def evaluate_results(args):
    """Scores predictions made elsewhere; needs neither network nor pictures."""
    if args.results.suffix == ".mat":
        dataset = args.dataset or "mpii"
        split = args.split or "valid"
        if dataset == "coco":
            raise InputError(f"{args.results}: a .mat file has MPII's joints, not COCO's")
        people = DATASETS[dataset].read(data.data_folder(args.data, dataset), split)
        predictions = data.read_mat(args.results, {"preds": (len(people), 16, 2)})["preds"]
        metrics = pckh(predictions, people.joints + 1, people.visible, people.head_size)
        report(metrics, f"{args.results}: {dataset} {split}, {plural(len(people), 'person')}",
               people.head_source, args.out / "metrics.json")
    else:
        skeleton = SKELETONS[args.skeleton or "coco"]
        truth = data.read_coco_file(args.annotations, skeleton)
        reason = unscored(truth)
        if reason:
            raise InputError(f"{args.annotations} can't be scored: {reason}")
        metrics = coco_ap(truth, data.read_json(args.results), args.results, skeleton.sigmas)
        report(metrics, f"{args.results}: {args.annotations}", "", args.out / "metrics.json")


# ---------------------------------------------------------------------------- own pictures

PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"}


def people_in_picture(network, picture, boxes, scores):
    """Boxes (n,4) in a Pillow picture, and their scores (n,) -> People."""
    n = len(boxes)
    keypoints = np.zeros((n, len(network.skeleton.joints), 3))
    return people_in_boxes(boxes, scores, network.size, keypoints, source=picture.convert("RGB"),
                           files=np.zeros(n, str), image_id=np.zeros(n, int))


def predict_picture(network, picture, boxes=None, scores=None, batch_size=32, **protocol):
    """The persons in a Pillow picture, best first, doubles left out; each is a dictionary of plain
    types {"box": [x, y, width, height], "score": s, "joints": {name: [x, y, score], ...}}.

    boxes (n,4): x, y, width, height of each person in pixels; default: one that fills the picture.
    scores (n,): of the boxes, default 1. protocol: flip and so on, see predict. InputError for
    impossible boxes."""
    boxes = np.array([[0, 0, *picture.size]] if boxes is None else boxes, float).reshape(-1, 4)
    scores = np.ones(len(boxes)) if scores is None else np.asarray(scores, float)
    low = boxes[:, :2]
    high = low + boxes[:, 2:]
    if not ((high > low) & (high > 0) & (low < picture.size) & np.isfinite(high)).all():
        raise InputError("a box must be X Y W H, W and H above 0, and lie partly in the picture of "
                         f"{picture.width}x{picture.height}, not all of {boxes.tolist()[:5]} do")
    people = people_in_picture(network, picture, boxes, scores)
    keypoints = predict(network, crop_loader(network, people, batch_size), **protocol)
    persons, kept = rescore(keypoints, people, network)
    return [{"box": boxes[row].tolist(), "score": float(persons[row]),
             "joints": dict(zip(network.skeleton.joints, keypoints[row].tolist()))} for row in kept]


def pictures_in(places):
    """The pictures among files and in folders, as paths. What else the folders have is counted.
    InputError if there is no picture."""
    paths = []
    for place in places:
        inside = sorted(place.iterdir()) if place.is_dir() else []
        # a Mac puts ._1.jpg beside 1.jpg
        found = [path for path in inside if path.suffix.lower() in PICTURES and path.name[0] != "."]
        others = Counter("folder" if path.is_dir() else "hidden" if path.name[0] == "." else
                         path.suffix or path.name for path in {*inside} - {*found})
        if others:
            print(f"{place}: not taken for pictures: " + ", ".join(
                f"{count} {kind}" for kind, count in sorted(others.items())))
        paths += found if place.is_dir() else [place]
    if not paths:
        raise InputError(f"{places[0]} has no pictures ({', '.join(sorted(PICTURES))})")
    return paths


def evaluate_pictures(args, network):
    """Predicts, draws and writes one's own pictures; a broken one is told and left out."""
    model = network.forward
    joints = network.skeleton.joints if isinstance(model, LAPX) and model.non_locals() else ()
    if args.attention not in (None, *joints):
        raise InputError("--attention takes a joint of a checkpoint with Non-Local modules, here "
                         f"{', '.join(joints) or 'none'}, not {args.attention!r}")
    paths = pictures_in(args.image)
    folders = {path.resolve().parent for path in paths}
    if args.out.resolve() in folders or len({path.stem for path in paths}) < len(paths):
        raise InputError("results are written to --out by the picture's name: choose a folder "
                         "without the pictures, and give two of one name one by one")
    detected = {path: (args.box, None) for path in paths}
    if args.boxes != "gt":
        numbers = [int(path.stem) if path.stem.isdecimal() else None for path in paths]
        find = data.picture_finder(numbers, "", [str(path) for path in paths])
        found, _, boxes, scores = data.read_detections(args.boxes, find)
        for row, path in enumerate(paths):
            here = np.equal(found, row)
            detected[path] = (boxes[here], scores[here])
    failed = 0
    for path in paths:
        try:
            picture = data.open_picture(path, upright=True)
            persons = predict_picture(
                network, picture, *detected[path], flip=not args.no_flip, shift=not args.no_shift,
                quarter_offset=not args.no_offset, batch_size=args.batch_size)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            failed += 1
            continue
        start = args.out / path.stem
        data.write_file(f"{start}_pose.json", {"picture": str(path), "persons": persons})
        shown = [person for person in persons if person["score"] > args.threshold]
        drawn = picture.copy()
        for person in reversed(shown):
            keypoints = np.array(list(person["joints"].values()))
            data.draw_pose(drawn, keypoints, network.skeleton, args.threshold)
        data.write_file(f"{start}_pose.png", drawn)
        for number, person in enumerate(shown):
            if args.heatmaps:
                data.write_file(f"{start}_heatmaps{number or ''}.png",
                                draw_heatmaps(network, picture, person))
            if args.attention:
                data.write_file(f"{start}_attention{number or ''}.png",
                                draw_attention(network, picture, person, args.attention))
        print(f"{path}: {plural(len(persons), 'person')}, {len(shown)} drawn (scores above "
              f"{args.threshold:g}) -> {start}_pose.png, .json", flush=True)
    if failed:
        sys.exit(f"error: {failed} of {plural(len(paths), 'picture')} could not be done")


def crop_of(network, picture, box):
    """The crop of a box as the network sees it: (1,H,W,3) uint8, and its matrix."""
    people = people_in_picture(network, picture, np.array([box], float), np.ones(1))
    _, crop, _, _ = PoseDataset(people, network.size, network.skeleton)[0]
    return crop[None], affine(people.center[0], people.scale[0], network.size)


def draw_heatmaps(network, picture, person):
    """A sheet of all stages' heatmaps over the crop, eight joints a row, the peaks marked."""
    crops, _ = crop_of(network, picture, person["box"])
    zoom = 192 / network.size[1]
    seen = ImageOps.scale(Image.fromarray(crops[0].numpy()), zoom)
    blank = Image.new("RGB", seen.size, "white")
    tiles = []
    stages = network(crops)
    for number, heatmaps in enumerate(stages, start=1):
        stage = f"stage {number}" if len(stages) > 1 else "last stage"
        points, scores = decode(heatmaps.cpu())
        for k, name in enumerate(network.skeleton.joints):
            peak = scores[0, k].item()
            tile = data.heat(seen, heatmaps[0, k].cpu().numpy() / max(peak, 1e-6),
                             f"{stage}: {name}\npeak {peak:.2f}")
            ImageDraw.Draw(tile).circle((zoom * STRIDE * points[0, k]).tolist(), 5,
                                        outline=data.MIDDLE, width=2)
            tiles.append(tile)
        tiles += [blank] * (-len(network.skeleton.joints) % 8)  # a stage begins a row
    return data.grid(tiles, columns=8)


@torch.no_grad()
def draw_attention(network, picture, person, joint):
    """Where the Non-Local modules look from the cell that a joint lies in, one tile a stage."""
    crops, matrix = crop_of(network, picture, person["box"])
    zoom = max(1, round(384 / network.size[1]))
    seen = ImageOps.scale(Image.fromarray(crops[0].numpy()), zoom)
    place = zoom * transform(np.array([person["joints"][joint][:2]]), matrix)[0]  # x, y in `seen`
    modules = network.forward.non_locals()
    features = []  # what each of them takes in, (1,C,h,w)
    hooks = [module.register_forward_pre_hook(lambda module, inputs: features.extend(inputs))
             for module in modules.values()]
    network(crops)
    for hook in hooks:
        hook.remove()
    tiles = []
    for (stage, module), x in zip(modules.items(), features):
        h, w = x.shape[2:]
        cell = np.divide(seen.size, (w, h))
        column, row = np.clip(place // cell, 0, (w - 1, h - 1)).astype(int)
        looks = module.attention(x)[0, row * w + column].reshape(h, w).float().cpu().numpy()
        # at most 0.6, so that the picture shines through
        spread = 0.6 * (looks - looks.min()) / max(np.ptp(looks), 1e-9)
        spread = Image.fromarray(spread).resize(seen.size, Image.Resampling.NEAREST)
        tile = data.heat(seen, spread, f"stage {stage}, gamma {module.gamma.item():.2f}, from the "
                         f"{joint}'s cell\n{looks.min():.1%} (dark) to {looks.max():.1%} (bright) "
                         "of its attention a cell")
        corner = cell * (column, row)
        ImageDraw.Draw(tile).rectangle((*corner, *corner + cell), outline=data.MIDDLE, width=3)
        tiles.append(tile)
    return data.grid(tiles, columns=len(tiles))


# ---------------------------------------------------------------------------- flags

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--weights", metavar="FILE", help="mpii, coco, coco-384x288, a checkpoint, .tar or .onnx")
    add("--out", type=Path, metavar="DIR", default=Path("runs/evaluation"),
        help="default: %(default)s")
    data.add_data_arguments(parser, "what the network was trained on", "the network's own")
    add = parser.add_argument_group("a data set").add_argument
    add("--split", help="default: valid, or val2017 for coco")
    add("--boxes", default="gt", metavar="gt|FILE", help="persons to look at: the annotated ones, "
        "or a person-detection JSON (default: %(default)s)")
    data.add_workers_argument(add)
    add("--results", type=Path, metavar="FILE", help="score predictions made elsewhere: pred.mat "
        "(key preds, (N,16,2), 1-based) or COCO results.json")
    add("--annotations", metavar="JSON", help="COCO's, for --results")
    add = parser.add_argument_group("own pictures").add_argument
    add("--image", type=Path, nargs="+", metavar="PATH", help="pictures or folders")
    add("--box", type=float, nargs=4, action="append", metavar=("X", "Y", "W", "H"), help="a "
        "person, in pixels of the upright picture; may be repeated (default: the whole picture)")
    add("--threshold", type=float, default=0.2, help="of scores to draw (default: %(default)s)")
    add("--heatmaps", action="store_true", help="also draw every stage's heatmaps")
    add("--attention", metavar="JOINT", help="also draw where Non-Local modules look from there")
    group = parser.add_argument_group("how")
    add = group.add_mutually_exclusive_group().add_argument
    add("--both", action="store_true", help="score without and with the flip test")
    add("--no-flip", action="store_true", help="no flip test")
    add = group.add_argument
    add("--no-shift", action="store_true", help="no shift of the mirrored map")
    add("--no-offset", action="store_true", help="no quarter-pixel offset")
    add("--bgr", action="store_true", help="the network was trained on BGR pictures")
    add("--batch-size", type=data.number_from(1), default=32, help="default: %(default)s")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    args = parser.parse_args()
    if args.box and args.boxes != "gt":
        parser.error("--box and --boxes are two ways to say the same; give one of them")
    if args.results:
        of_file = "dataset data split" if args.results.suffix == ".mat" else "annotations skeleton"
        data.refuse_unused(parser, args, f"--results {args.results}", f"results out {of_file}")
        if not args.annotations and args.results.suffix != ".mat":
            parser.error("COCO results are scored against --annotations FILE")
        return evaluate_results(args)
    if not args.weights:
        parser.error("give --weights FILE, or --results FILE to score predictions made elsewhere")
    used = "weights skeleton input bgr no_flip no_shift no_offset batch_size device boxes out"
    if args.image:
        used += " image box threshold heatmaps attention"
        data.refuse_unused(parser, args, "--image", used)
    else:
        used += " dataset data split both workers"
        data.refuse_unused(parser, args, "a data set, without --image", used)
    network = open_network(args.weights, args.device, args.input, args.skeleton, args.bgr)
    if args.image:
        evaluate_pictures(args, network)
    else:
        evaluate_dataset(args, network)


if __name__ == "__main__":
    data.run(main)
