"""Scores and draws predictions: PCKh on MPII, OKS average precision on COCO,
one's own pictures.

  python evaluate.py --weights FILE --dataset mpii
  python evaluate.py --weights FILE --dataset mpii --stages   # of every stage
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

from data import (DATASETS, People, PoseDataset, affine, expect, fitted_width, flip_order,
                  heatmap_size, normalise, padded, reading, transform, writing)
from lapx import (LAPX, MEAN, SKELETONS, STD, STRIDE, InputError, Skeleton, create_model, decode,
                  weights_path)


# ---------------------------------------------------------------------------- heatmaps to joints

def flip_back(heatmaps, order, shift=True):
    """The heatmaps (B,K,h,w) of mirrored crops -> as if of the crops themselves.

    Mirrored, left and right joints exchanged (order (K,)), and moved one pixel to the right (column
    0 stays, too). Why: a joint on heatmap pixel x lies on pixel 4x of the crop, so on W - 1 - 4x of
    the mirrored crop, on w - 1/4 - x of its heatmap; flipped back, which sends x to w - 1 - x, it
    is on x - 3/4. SimpleBaseline shifts by a whole pixel, to x + 1/4."""
    heatmaps = heatmaps.flip(3)[:, order]
    if shift:
        heatmaps = torch.cat([heatmaps[..., :1], heatmaps[..., :-1]], dim=3)
    return heatmaps


def predict(predictor, loader, flip=True, shift=True, quarter_offset=True):
    """Joints of the People in a crop_loader, a DataLoader of PoseDataset's samples, as every stage
    sees them: (S,N,K,3) as x, y in pixels of the pictures, counted from 0, and score. The last
    stage's are the prediction. predictor: a Predictor, which normalises crops and runs the network.

    flip: the flip test, which averages the heatmaps of a crop and of its mirror image, if the
    skeleton has flip pairs; shift, quarter_offset: see flip_back and lapx.decode. The protocol is
    the paper's and SimpleBaseline's."""
    if isinstance(predictor.model, torch.nn.Module):
        predictor.model.eval()
    people = loader.dataset.people
    order = flip_order(predictor.skeleton)
    batches = []
    for _, crops, _, _ in data.progress(loader, "batches"):
        crops = crops.to(predictor.device, non_blocking=True)
        heatmaps = torch.cat(predictor(crops))  # (S*B,K,h,w)
        if flip and predictor.skeleton.flip_pairs:
            of_mirrored = torch.cat(predictor(crops.flip(2)))  # crops are (B,H,W,3)
            heatmaps = (heatmaps + flip_back(of_mirrored, order, shift)) / 2
        points, scores = decode(heatmaps, quarter_offset)  # (S*B,K,2), (S*B,K)
        found = torch.cat([STRIDE * points, scores[..., None]], dim=2)
        batches.append(found.unflatten(0, (-1, len(crops))).cpu())  # (S,B,K,3)
    keypoints = torch.cat(batches, dim=1).double().numpy()  # (S,N,K,3)
    if not np.isfinite(keypoints).all():
        raise InputError("the network's heatmaps are not finite; take an earlier checkpoint")
    to_crop = [affine(box, predictor.size) for box in people.box]
    to_picture = np.linalg.inv(np.reshape(to_crop, (-1, 3, 3)))  # (N,3,3)
    keypoints[..., :2] = transform(keypoints[..., :2], to_picture)
    return keypoints


def results_of(keypoints, people, predictor):
    """Predictions (N,K,3) in pixels of the pictures -> what the data set's own tools take: of COCO
    people coco_results' list, of MPII's (N,16,2), pixels counted from 1."""
    if people.truth:  # COCO's
        return coco_results(keypoints, people, predictor)
    return keypoints[..., :2] + 1


def score(results, people):
    """What results_of gave for the People of a split -> {metric: value}; empty if they can't be
    scored."""
    if people.unscored:
        return {}
    if people.truth:
        return coco_ap(people.truth, results, "the predictions")
    # both count from 1
    return pckh(results, people.joints + 1, people.annotated, people.head_size)


# ---------------------------------------------------------------------------- PCKh (MPII)

MPII = SKELETONS["mpii"].joints
PCKH_COLUMNS = {"Head": ["head top"]} | {
    name: [f"right {name.lower()}", f"left {name.lower()}"]
    for name in ("Shoulder", "Elbow", "Wrist", "Hip", "Knee", "Ankle")}


def pckh(predictions, joints, annotated, head_sizes):
    """PCKh, the percentage of joints within half a head size of the truth: {column: percentage}.

    predictions, joints (N,16,2) in the same coordinates, annotated (N,16) bool, head_sizes (N,) in
    pixels. A distance of exactly half a head size is a hit. A column is the unweighted mean of left
    and right; Mean is over all annotated joints but pelvis and thorax. A column is NaN if one of
    its joints is never annotated."""
    distance = np.linalg.norm(predictions - joints, axis=2) / head_sizes[:, None]  # (N,16)

    def percentage(names, threshold):
        indices = [MPII.index(name) for name in names]
        counted = annotated[:, indices]
        hits = (distance[:, indices] <= threshold) & counted
        return float(100 * hits.sum() / counted.sum()) if counted.any() else np.nan

    percentages = {column: float(np.mean([percentage([name], 0.5) for name in names]))
                   for column, names in PCKH_COLUMNS.items()}
    others = [name for name in MPII if name not in ("pelvis", "thorax")]
    percentages["Mean"] = percentage(others, 0.5)
    # DIFFERS: Mean@0.1. Ours is at 0.10; what SimpleBaseline and HRNet print under that name is at
    # 0.11, which is element 11 of their thresholds 0, 0.01, ... The paper does not print it.
    percentages["Mean@0.1"] = percentage(others, 0.1)
    return percentages


# ---------------------------------------------------------------------------- OKS and AP (COCO)

# How average precision (AP) is found:
# 1. The object keypoint similarity (OKS), from 0 to 1, says how well a detection fits a person. A
#    detection is a hit if it finds a person by an OKS of at least t. In each picture detections
#    choose by score, the best first, and a person is found once.
# 2. Go down the detections of all pictures by score. After each of them precision is the share of
#    hits among the detections so far, recall the share of the persons found so far.
# 3. Make precision non-increasing: at each recall the best one that is reached there or later.
# 4. Read it at the recalls 0, 0.01, .., 1, as 0 where one is never reached: AP at t is the mean.
# 5. AP is the mean over t = 0.5, 0.55, .., 0.95; average recall (AR) the mean of the last recalls.
# Crowds, persons of another size than is asked for, and misses of another size are left out: they
# are neither right nor wrong.
# An example: two persons; the detections are a hit, a miss and a hit. Precision is 1, 1/2, 2/3 at
# the recalls 1/2, 1/2, 1; non-increasing it is 1, 2/3, 2/3. At 51 recalls (0 to 0.5) one reads 1,
# at 50 2/3: AP at that t is (51 * 1 + 50 * 2/3) / 101 = 0.835.
THRESHOLDS = np.linspace(0.5, 0.95, 10)  # (T,)
RECALLS = np.linspace(0, 1, 101)
AREAS = {"all": (0, 1e10), "medium": (32 ** 2, 96 ** 2), "large": (96 ** 2, 1e10)}  # ends included
MAX_DETECTIONS = 20  # per picture and category


def object_keypoint_similarity(found, truth, area, bbox, sigmas):
    """OKS of D detections with one person: found (D,K,2) and truth (K,3) in pixels, the person's
    area, a number or (D,1), and bbox (left, top, width, height), sigmas (K,) -> (D,).

    The mean over the labelled joints of exp(-d^2 / (2 (2 sigma)^2 area)), d being the distance.
    Annotators scatter by sigma times the square root of the area; COCO allows twice that."""
    labelled = truth[:, 2] > 0
    if labelled.any():
        difference = found[:, labelled] - truth[labelled, :2]  # (D,L,2), L labelled joints
        sigmas = sigmas[labelled]
    else:  # the distance of all joints to the box made 3 times as wide and high (pycocotools)
        difference = found - np.clip(found, bbox[:2] - bbox[2:], bbox[:2] + 2 * bbox[2:])
    squared = difference[..., 0] ** 2 + difference[..., 1] ** 2  # (D,L)
    exponent = squared / (2 * sigmas) ** 2 / (area + np.spacing(1)) / 2
    # contiguous: sums in pycocotools' order; the last bit can change a match
    return np.ascontiguousarray(np.exp(-exponent)).sum(1) / len(sigmas)


def match(similarity, ignored, crowd, threshold):
    """Which person each detection of a picture finds: similarity (D lists of G), the detections
    from the highest score down; ignored, crowd (G,) -> D indices, -1 for nobody.

    A detection takes the most similar person that is still free, of equals the later one. Ignored
    are crowds, persons of num_keypoints 0 or of another size: one of them is taken only if no other
    is similar enough. A crowd is never used up."""
    taken = set()
    matches = []
    for row in similarity:
        best = -1
        for person, value in enumerate(row):
            if value < threshold or (person in taken and not crowd[person]):
                continue
            if best < 0 or (ignored[best] and not ignored[person]):
                best = person
            elif ignored[best] == ignored[person] and value >= row[best]:
                best = person
        taken.add(best)
        matches.append(best)
    return matches


def precision_and_recall(scores, hit, left_out, to_find):
    """Detections of the whole data set -> precision at RECALLS (T,101), final recall (T,).

    scores (D,); hit, left_out (T,D) bool; to_find: how many persons there are to find; if it is 0,
    all are -1."""
    if to_find == 0:
        return np.full((len(THRESHOLDS), len(RECALLS)), -1.0), np.full(len(THRESHOLDS), -1.0)
    order = np.argsort(-scores, kind="stable")
    true_positives = np.cumsum((hit & ~left_out)[:, order], axis=1)  # (T,D)
    false_positives = np.cumsum((~hit & ~left_out)[:, order], axis=1)
    recall = true_positives / to_find
    precision = true_positives / (true_positives + false_positives + np.spacing(1))
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]  # non-increasing
    precision = np.column_stack([precision, np.zeros(len(THRESHOLDS))])  # for recalls not reached
    sampled = [row[np.searchsorted(reached, RECALLS)] for row, reached in zip(precision, recall)]
    return np.array(sampled), recall.max(1, initial=0)


def coco_ap(file, entries, path):
    """The ten numbers of COCO's keypoint task, equal to pycocotools: {AP, AP50, ..., ARL}.

    file: a data.CocoFile, the truth. entries: COCO results, parsed. path: their file, for errors. A
    number is from 0 to 1, or -1 where there is nobody to find; of several categories it is the mean
    over those with somebody to find, each on its own."""
    persons, results = as_pycocotools_has_them(file, entries, path)
    groups = []  # of one picture and category; only where a detection may be a hit, to save time
    persons_in = rows_by_group(persons)
    for group, detections in rows_by_group(results).items():  # rows of results (D,)
        candidates = persons_in.get(group, np.zeros(0, int))  # rows of persons (G,)
        by_person = [object_keypoint_similarity(
            results["keypoints"][detections, :, :2], persons["keypoints"][row],
            persons["area"][row], persons["bbox"][row], file.sigmas) for row in candidates]
        if np.max(by_person, initial=0) >= THRESHOLDS[0]:
            groups.append((detections, candidates, np.transpose(by_person).tolist()))  # (D,G)

    precision = {}
    recall = {}
    for size, (low, high) in AREAS.items():
        ignored = persons["crowd"] | (persons["num_keypoints"] == 0)
        ignored |= (persons["area"] < low) | (persons["area"] > high)
        hit = np.zeros((len(THRESHOLDS), len(results["score"])), bool)  # (T,D)
        left_out = hit.copy()
        for detections, candidates, similarity in groups:
            ignored_here = ignored[candidates].tolist()
            crowd_here = persons["crowd"][candidates].tolist()
            matches = np.array([match(similarity, ignored_here, crowd_here, threshold)
                                for threshold in THRESHOLDS])
            matched = matches >= 0  # (T,D)
            found = candidates[matches]  # -1 picks anybody: masked by matched
            hit[:, detections] = matched & persons["has_id"][found]
            left_out[:, detections] = matched & ignored[found]
        # misses of another size are left out, too
        left_out |= ~hit & ((results["area"] < low) | (results["area"] > high))
        curves = []
        for category in file.categories:
            rows = results["category_id"] == category
            to_find = np.count_nonzero(~ignored & (persons["category_id"] == category))
            curves.append(precision_and_recall(results["score"][rows], hit[:, rows],
                                               left_out[:, rows], to_find))
        precision[size] = np.hstack([curve for curve, _ in curves])  # (T, categories * 101)
        recall[size] = np.column_stack([last for _, last in curves])  # (T, categories)

    def mean(values):
        known = values[values > -1]
        return float(known.mean()) if len(known) else -1.0

    return {"AP": mean(precision["all"]),
            "AP50": mean(precision["all"][0]), "AP75": mean(precision["all"][5]),
            "APM": mean(precision["medium"]), "APL": mean(precision["large"]),
            "AR": mean(recall["all"]),
            "AR50": mean(recall["all"][0]), "AR75": mean(recall["all"][5]),
            "ARM": mean(recall["medium"]), "ARL": mean(recall["large"])}


# ---------------------------------------------------------------------------- results

def rescore(keypoints, people, predictor):
    """Predictions (N,K,3) -> the score of each person (N,), and the rows of those to keep.

    A score is the mean of the joint scores above 0.2, 0 if there is none, times the score of the
    box (SimpleBaseline). Of persons of one picture and category that are more alike than an OKS of
    0.9 the best is kept. Unlike in the metric all joints count, and the area is the mean of the two
    padded boxes', which have the shape of the network's input (HRNet)."""
    counted = keypoints[..., 2] > 0.2
    mean = (keypoints[..., 2] * counted).sum(1) / np.maximum(counted.sum(1), 1)
    person_scores = mean * people.box_score
    height, width = predictor.size
    widths = fitted_width(people.box, predictor.size)
    areas = widths * (widths * height / width)  # of the padded boxes, in pixels of the pictures
    labelled = keypoints.copy()
    labelled[..., 2] = 1  # the flag: all joints count
    sigmas = np.array(predictor.skeleton.sigmas or [0.07] * keypoints.shape[1])  # COCO's mean
    groups = people.image_id.tolist()
    if people.category_id is not None:
        groups = list(zip(groups, people.category_id.tolist()))
    kept = {group: [] for group in groups}  # the best ones first
    for row in np.argsort(-person_scores, kind="stable"):
        better = kept[groups[row]]
        area = (areas[better] + areas[row]) / 2
        similarity = object_keypoint_similarity(keypoints[better, :, :2], labelled[row],
                                                area[:, None], None, sigmas)
        if (similarity <= 0.9).all():
            better.append(row)
    return person_scores, [row for rows in kept.values() for row in rows]


def coco_results(keypoints, people, predictor):
    """Predictions (N,K,3), in pixels of the pictures -> what COCO's server takes: a list of
    {image_id, category_id, keypoints, score}."""
    person_scores, kept = rescore(keypoints, people, predictor)
    return [{"image_id": int(people.image_id[row]), "category_id": int(people.category_id[row]),
             "keypoints": keypoints[row].ravel().tolist(), "score": float(person_scores[row])}
            for row in kept]


# ====================================================== Behind the scenes: files, drawings, flags

def as_pycocotools_has_them(file, entries, path):
    """A CocoFile's persons and COCO results, parsed -> columns of both, {name: array (M or D,...)},
    as pycocotools uses them.

    Persons are those in listed pictures. Of annotations with one id the last replaces the others,
    and one of id 0 is found, but not noted: the detection is no hit, and the person is lost.
    Results are those of the file's categories, the best first, at most MAX_DETECTIONS in a picture.
    Their area is that of the box, if the first result has one, else of the joints' extent.
    InputError, naming path, if entries is not a list of results for these pictures."""
    last = {id: row for row, id in enumerate(file.persons["id"])}
    rows = np.array([last[id] for id in file.persons["id"]], int)
    rows = rows[np.isin(file.persons["image_id"][rows], file.images["id"])]
    persons = {name: column[rows] for name, column in file.persons.items()}
    persons |= {"has_id": persons["id"] != 0, "crowd": persons["iscrowd"] > 0}
    with reading(path, f"a list of results, some with the category_id {file.categories}"):
        boxed = bool(expect(entries, list)[0].get("bbox"))
        known = [entry for entry in entries if float(entry["category_id"]) in file.categories]
        if not known:
            raise ValueError(f"all {len(entries)} are of others")
    shapes = {"image_id": (), "category_id": (), "score": (), "keypoints": (3 * len(file.sigmas),)}
    results = data.read_columns(path, "result", known, shapes | ({"bbox": (4,)} if boxed else {}))
    data.check_columns(path, "result", results)
    unknown = np.setdiff1d(results["image_id"], file.images["id"])
    if len(unknown):
        raise InputError(f"{path} has results for {len(unknown)} pictures that {file.path} does "
                         f"not have (first: {unknown[0]:.0f}); are both of the same split?")
    results["keypoints"] = results["keypoints"].reshape(-1, len(file.sigmas), 3)
    extent = results["bbox"][:, 2:] if boxed else np.ptp(results["keypoints"][..., :2], axis=1)
    results["area"] = extent[:, 0] * extent[:, 1]
    best_first = np.argsort(-results["score"], kind="stable")
    results = {name: column[best_first] for name, column in results.items()}
    order = np.concatenate([rows[:MAX_DETECTIONS] for rows in rows_by_group(results).values()])
    return persons, {name: column[order] for name, column in results.items()}


def rows_by_group(columns):
    """{(image_id, category_id): its rows in their order}, in ascending order."""
    keys, picture = np.unique([columns["image_id"], columns["category_id"]], axis=1,
                              return_inverse=True)
    order = np.argsort(picture.ravel(), kind="stable")
    start = np.cumsum(np.bincount(picture.ravel()))[:-1]
    return dict(zip(map(tuple, keys.T.tolist()), np.split(order, start)))


def unscored(people):
    """Why People can't be scored; "" if they can. Prints what lowers AP."""
    if people.truth is None:
        return "" if people.annotated.any() else "nobody has an annotated joint"
    return unscored_file(people.truth)


def unscored_file(file):
    """Why a CocoFile's persons can't be scored; "" if they can. Prints what lowers AP."""
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


# ---------------------------------------------------------------------------- a network from a file

DEFAULT_INFO = {"dataset": None, "splits": None, "mean": MEAN, "std": STD, "colour": "RGB",
                "precision": "tf32", "variant": None}


def model_info(dataset, skeleton, size, precision="tf32", splits=None, variant=None):
    """All that belongs to a network's weights, as plain types: kept in checkpoints and ONNX files,
    so that no flag has to be repeated."""
    return DEFAULT_INFO | {"dataset": dataset, "skeleton": asdict(skeleton), "input": list(size),
                           "precision": precision, "splits": splits, "variant": variant}


class Predictor:
    """A network and all that belongs to it: predictor(crops) takes crops (B,H,W,3) uint8 RGB -> a
    list of the heatmaps (B,K,h,w) of its stages, float32; the last is the prediction. model: a LAPX
    or, of an ONNX file, a function of normalised images (B,3,H,W). info: model_info's."""

    def __init__(self, model, info, device="cpu"):
        self.model = model
        self.info = info
        self.device = torch.device(device)
        self.skeleton = Skeleton(**info["skeleton"])
        self.size = data.image_size("{}x{}".format(*info["input"]))
        self.splits = info["splits"] or DATASETS[info["dataset"] or "mpii"].splits
        mean = tuple(map(float, info["mean"]))
        std = tuple(map(float, info["std"]))
        if len(mean) != 3 or len(std) != 3 or info["colour"] not in ("RGB", "BGR"):
            raise ValueError(f"colour, mean and std are {info['colour']}, {mean} and {std}")
        self.normalisation = info["colour"] == "BGR", mean, std

    @torch.no_grad()
    def __call__(self, crops):
        images = normalise(crops.to(self.device, non_blocking=True), *self.normalisation)
        outputs = self.model(images)
        wanted = (len(self.skeleton.joints), *heatmap_size(*self.size))
        # an ONNX file may give keypoints, too: heatmaps are what has their shape
        heatmaps = [output.float() for output in outputs if output.shape[1:] == wanted]
        if not heatmaps:
            found = [tuple(output.shape[1:]) for output in outputs]
            raise InputError(f"the network gives {found}, not heatmaps {wanted} (joints, height, "
                             "width); choose --skeleton and --input accordingly")
        return heatmaps


def open_predictor(weights, device="auto", size=None, skeleton=None, bgr=False):
    """A Predictor from a file of weights, a name in lapx.WEIGHTS, or an ONNX file (on the CPU).

    size (height, width), skeleton (a name in SKELETONS), bgr: what the file does not tell, or is to
    be changed. InputError if the file is broken, or file and arguments leave something open."""
    in_onnx = str(weights).endswith(".onnx")
    if in_onnx and device not in ("auto", "cpu"):
        raise InputError(f"{weights}: ONNX files run on the CPU here; leave out --device")
    device = torch.device("cpu" if in_onnx else choose_device(device))
    with reading(weights, "a network that tells its joints, input, mean, std and colours; --input "
                 "HxW and --skeleton NAME are for one that does not"):
        if in_onnx:
            session = open_session(weights)
            model = partial(run_session, session, weights)
            info = json.loads(session.get_modelmeta().custom_metadata_map.get("lapx", "{}"))
        else:
            with reading(weights, "the weights of a LAPX network, the whole file"):
                model = create_model(weights=weights).eval()
            model.to(device, memory_format=data.memory_format(device))
            info = model.info or assumed_info(weights, model)
        info = DEFAULT_INFO | info
        if size:
            info["input"] = size
        if skeleton:
            info["skeleton"] = asdict(SKELETONS[skeleton])
        if bgr:
            info["colour"] = "BGR"
        predictor = Predictor(model, info, device)
    set_precision(info["precision"])
    predictor(torch.zeros(1, *predictor.size, 3, dtype=torch.uint8))
    return predictor


def assumed_info(weights, model):
    """What weights alone, such as the authors', are taken for, by their joints and their name."""
    dataset = {16: "mpii", 17: "coco"}.get(model.config.num_joints)
    if not dataset:
        return {}
    size = (384, 288) if "384_288" in weights_path(weights).stem else DATASETS[dataset].size
    print(f"{weights} does not tell its joints and input; taken for {dataset}'s and "
          f"{size[0]}x{size[1]}, unless --skeleton and --input say otherwise")
    return model_info(dataset, SKELETONS[dataset], size)


def set_precision(precision):
    """Sets torch's switch, of the whole process, to what training has used. bfloat16 is for
    training alone: evaluation is then as in tf32."""
    torch.backends.cudnn.allow_tf32 = precision != "float32"


def choose_device(name):
    """The device of that name. auto: cuda if it is there, else cpu, as nobody has measured yet
    whether a Mac's mps is right and fast. InputError if it is missing."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    missing = {"cpu": False, "cuda": not torch.cuda.is_available(),
               "mps": not torch.backends.mps.is_available()}
    if missing[name]:
        raise InputError(f"--device {name}: torch {torch.__version__} finds no such device here")
    return name


def open_session(path, threads=0, provider="CPU", **settings):
    """An ONNX Runtime session, with threads (0: one per core), an execution provider by name and
    other settings of its SessionOptions; InputError if the file is not one for it."""
    import onnxruntime

    wanted = f"{provider}ExecutionProvider"
    known = onnxruntime.get_available_providers()
    options = onnxruntime.SessionOptions()
    settings = {"intra_op_num_threads": threads, "log_severity_level": 4} | settings
    for name, value in settings.items():
        setattr(options, name, value)
    with reading(path, "an ONNX file that ONNX Runtime can run"):
        open(path).close()  # a missing file is told as such
        session = onnxruntime.InferenceSession(
            path, options, [wanted if wanted in known else "CPUExecutionProvider"])
    if wanted not in session.get_providers():  # one that fails to start is replaced by the CPU
        known = ", ".join(other.removesuffix("ExecutionProvider") for other in known)
        raise InputError(f"ONNX Runtime can't use --provider {provider} here; it has {known}")
    return session


def run_session(session, path, images):
    """An ONNX Runtime session's outputs for images (B,3,H,W), a list of tensors."""
    with reading(path, f"a network for images {tuple(images.shape)}, see --input"):
        return [torch.from_numpy(output) for output in data.run_onnx(session, images.numpy())]


# ---------------------------------------------------------------------------- scoring a split

def crop_loader(predictor, people, batch_size=32, workers=0):
    """A DataLoader of the crops of People in their order, for predict."""
    dataset = PoseDataset(people, predictor.size, predictor.skeleton)
    batches = torch.utils.data.BatchSampler(range(len(people)), batch_size, drop_last=False)
    return data.make_loader(dataset, batches, workers, predictor.device.type == "cuda")


def report(stages, what, heads, path=None):
    """Prints what was scored, how (heads: what PCKh's head sizes are, in words), and the numbers of
    the stages, a list of score's dictionaries. The last ones, which are the network's, also go to a
    file if path names one, those of all stages if there are several."""
    percent = 1
    if "AP" in stages[-1]:
        percent = 100
        what += (f"\nOKS average precision in percent, {MAX_DETECTIONS} detections a picture; -1: "
                 "there is nobody to find")
    else:
        what += (f"\nPCKh@0.5: distance <= half a head size, {heads};\nMean over 14 joints, "
                 "without pelvis and thorax")
    print(what)
    several = len(stages) > 1
    print("stage " * several + "  ".join(f"{name:>6}" for name in stages[-1]))
    for number, metrics in enumerate(stages, start=1):
        print(f"{number:5} " * several + "  ".join(
            f"{percent * value if value >= 0 else value:{max(6, len(name))}.2f}"
            for name, value in metrics.items()), flush=True)
    if path:
        known = [{name: None if np.isnan(value) else value for name, value in metrics.items()}
                 for metrics in stages]
        write_results(path, known[-1] | ({"stages": known} if several else {}))


def evaluate_dataset(args, predictor):
    """Predicts a split with a network and scores it, or only predicts if nothing is annotated."""
    dataset = args.dataset or predictor.info["dataset"]
    if not dataset:
        raise InputError(f"{args.weights} does not tell its data set; name a --dataset or --image")
    if dataset != "coco" and args.boxes != "gt":
        raise InputError(f"--boxes means nothing with {dataset}, whose boxes are annotated")
    if args.stages and len(predictor(torch.zeros(1, *predictor.size, 3, dtype=torch.uint8))) == 1:
        raise InputError(f"{args.weights} gives the heatmaps of one stage: leave out --stages, or "
                         "export the checkpoint with --all-stages")
    own = dataset == predictor.info["dataset"]
    split = args.split or (predictor.splits if own else DATASETS[dataset].splits)[1]
    people = data.load_people(dataset, args.data, split, predictor.skeleton, args.boxes)
    people.unscored = unscored(people)
    # DIFFERS: boxes of COCO's persons. The paper's numbers are with a detector's boxes, ours are
    # with annotated ones unless --boxes names a file: about 2 AP more. The result line says which.
    boxes = "annotated (gt)" if args.boxes == "gt" else f"of {args.boxes}"
    loader = crop_loader(predictor, people, args.batch_size, args.workers)
    flips = [len(predictor.skeleton.flip_pairs) > 0 and not args.no_flip]
    if args.both:
        flips = [False, True] if flips[0] else [False]
    for flip in flips:
        keypoints = predict(predictor, loader, flip, not args.no_shift, not args.no_offset)
        keypoints = keypoints if args.stages else keypoints[-1:]
        results = [results_of(found, people, predictor) for found in keypoints]
        path = args.out / ("results.json" if people.truth else "pred.mat")
        write_results(path, results[-1])
        how = "no flip test"
        if flip:
            how = f"flip test {'without' if args.no_shift else 'with'} shift"
        if args.no_offset:
            how += ", no quarter offset"
        if not people.unscored:
            name = "metrics.json" if flip or not args.both else "metrics_no_flip.json"
            report([score(found, people) for found in results], f"{dataset} {split}, "
                   f"{len(people)} persons, boxes {boxes},\ninput {predictor.size[0]}x"
                   f"{predictor.size[1]}, {how}", people.head_source, args.out / name)
    if people.unscored:
        print(f"{dataset} {split}: there is no score, as {people.unscored}")
    elif people.annotated.any():  # nobody is in a detector's boxes
        with writing(args.out / "worst.png") as part:
            draw_worst(keypoints[-1], people, predictor).save(part)
        print(f"wrote {args.out / 'worst.png'}")


def draw_worst(keypoints, people, predictor, count=12):
    """A sheet of the People with the lowest score of their own, PCKh, or OKS of COCO's: the joints
    of keypoints (N,K,3) that are annotated, and beside them the true ones."""
    if people.truth:
        what = "OKS"
        truth = np.concatenate([people.joints, people.annotated[..., None]], axis=2)
        own = [object_keypoint_similarity(found[None, :, :2], joints, area, None,
                                          people.truth.sigmas)[0]
               for found, joints, area in zip(keypoints, truth, people.area)]
    else:
        what = "PCKh"
        own = [pckh(keypoints[[row], :, :2], people.joints[[row]], people.annotated[[row]],
                    people.head_size[[row]])["Mean"] for row in range(len(people))]
    worst = np.argsort(own)[:count]  # NaN last
    pairs = people.rows(np.repeat(worst, 2))
    pairs.joints[::2] = keypoints[worst, :, :2]
    height, width = predictor.size
    captions = [caption for row in worst for caption in
                (f"{people.files[row]}\n{what} {own[row]:.3g}", "the truth")]
    return data.show_samples(PoseDataset(pairs, (2 * height, 2 * width), predictor.skeleton),
                             targets=False, count=len(pairs), captions=captions)


def write_results(path, results):
    with writing(path) as part:
        if path.suffix == ".mat":
            from scipy.io import savemat  # only where it is needed: it takes a second to import

            savemat(part, {"preds": results})
        else:
            part.write_text(json.dumps(results))
    print(f"wrote {path}")


def evaluate_results(args):
    """Scores predictions made elsewhere; needs neither network nor pictures."""
    if args.results.suffix == ".mat":
        dataset = args.dataset or "mpii"
        split = args.split or "valid"
        if dataset == "coco":
            raise InputError(f"{args.results}: a .mat file has MPII's joints, not COCO's")
        people = DATASETS[dataset].read(Path(args.data or f"data/{dataset}"), split)
        predictions = data.read_mat(args.results, {"preds": (len(people), 16, 2)})["preds"]
        report([score(predictions, people)], f"{args.results}: {dataset} {split}, {len(people)} "
               "persons", people.head_source, args.out / "metrics.json")
    else:
        truth = data.read_coco_file(args.annotations, SKELETONS[args.skeleton or "coco"])
        reason = unscored_file(truth)
        if reason:
            raise InputError(f"{args.annotations} can't be scored: {reason}")
        metrics = coco_ap(truth, data.read_json(args.results), args.results)
        report([metrics], f"{args.results}: {args.annotations}", "", args.out / "metrics.json")


# ---------------------------------------------------------------------------- own pictures

PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"}


def people_in_picture(picture, boxes, scores, skeleton):
    """Boxes (n,4) in a Pillow picture, and their scores (n,) -> People."""
    n = len(boxes)
    joints = np.zeros((n, len(skeleton.joints), 2))
    return People(Path(), np.zeros(n, str), np.zeros(n, int), padded(boxes), joints,
                  joints[..., 0] > 0, scores, loaded=picture.convert("RGB"))


def predict_picture(predictor, picture, boxes=None, scores=None, batch_size=32, **protocol):
    """The persons in a Pillow picture, best first, doubles left out; each is a dictionary of plain
    types {"box": [x, y, width, height], "score": s, "joints": {name: [x, y, score], ...}}.

    boxes (n,4) of persons, in pixels, default: the whole picture; scores (n,) of the boxes, default
    1; protocol: flip and so on, see predict. InputError for impossible boxes."""
    boxes = np.array([[0, 0, *picture.size]] if boxes is None else boxes, float).reshape(-1, 4)
    scores = np.ones(len(boxes)) if scores is None else np.asarray(scores, float)
    low = boxes[:, :2]
    high = low + boxes[:, 2:]
    if not ((high > low) & (high > 0) & (low < picture.size) & np.isfinite(high)).all():
        raise InputError("a box is X Y W H, W and H above 0, partly in the picture of "
                         f"{picture.width}x{picture.height}, unlike one of {boxes.tolist()[:5]}")
    if len(boxes) == 0:
        return []
    people = people_in_picture(picture, boxes, scores, predictor.skeleton)
    keypoints = predict(predictor, crop_loader(predictor, people, batch_size), **protocol)[-1]
    person_scores, kept = rescore(keypoints, people, predictor)
    return [{"box": boxes[row].tolist(), "score": float(person_scores[row]),
             "joints": dict(zip(predictor.skeleton.joints, keypoints[row].tolist()))}
            for row in kept]


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


def evaluate_pictures(args, predictor):
    """Predicts, draws and writes one's own pictures; a broken one is told and left out."""
    model = predictor.model
    joints = predictor.skeleton.joints if isinstance(model, LAPX) and model.non_locals() else ()
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
                predictor, picture, *detected[path], flip=not args.no_flip, shift=not args.no_shift,
                quarter_offset=not args.no_offset, batch_size=args.batch_size)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            failed += 1
            continue
        start = args.out / path.stem
        with writing(f"{start}_pose.json") as part:
            part.write_text(json.dumps({"picture": str(path), "persons": persons}, indent=1))
        shown = [person for person in persons if person["score"] > args.threshold]
        drawn = picture.copy()
        for person in reversed(shown):
            keypoints = np.array(list(person["joints"].values()))
            data.draw_pose(drawn, keypoints, predictor.skeleton, args.threshold)
        drawings = {f"{start}_pose.png": drawn}
        for number, person in enumerate(shown):
            if args.heatmaps:
                drawings[f"{start}_heatmaps{number or ''}.png"] = draw_heatmaps(
                    predictor, picture, person)
            if args.attention:
                drawings[f"{start}_attention{number or ''}.png"] = draw_attention(
                    predictor, picture, person, args.attention)
        for target, drawing in drawings.items():
            with writing(target) as part:
                drawing.save(part)
        print(f"{path}: persons: {len(persons)}, drawn: {len(shown)} (scores above "
              f"{args.threshold:g}) -> {start}_pose.png, .json", flush=True)
    if failed:
        sys.exit(f"error: {failed} of {len(paths)} pictures could not be done")


def crop_of(predictor, picture, box):
    """The crop of a box as the network sees it: (1,H,W,3) uint8, and its matrix."""
    people = people_in_picture(picture, np.array([box], float), np.ones(1), predictor.skeleton)
    _, crop, _, _ = PoseDataset(people, predictor.size, predictor.skeleton)[0]
    return crop[None], affine(people.box[0], predictor.size)


def draw_heatmaps(predictor, picture, person):
    """A sheet of all stages' heatmaps over the crop, eight joints a row, the peaks marked."""
    crops, _ = crop_of(predictor, picture, person["box"])
    zoom = 192 / predictor.size[1]
    seen = ImageOps.scale(Image.fromarray(crops[0].numpy()), zoom)
    blank = Image.new("RGB", seen.size, "white")
    tiles = []
    stages = predictor(crops)
    for number, heatmaps in enumerate(stages, start=1):
        stage = f"stage {number}" if len(stages) > 1 else "last stage"
        points, scores = decode(heatmaps.cpu())
        for k, name in enumerate(predictor.skeleton.joints):
            peak = scores[0, k].item()
            tile = data.heat(seen, heatmaps[0, k].cpu().numpy() / max(peak, 1e-6),
                             f"{stage}: {name}\npeak {peak:.2f}")
            ImageDraw.Draw(tile).circle((zoom * STRIDE * points[0, k]).tolist(), 5,
                                        outline=data.MIDDLE, width=2)
            tiles.append(tile)
        tiles += [blank] * (-len(predictor.skeleton.joints) % 8)  # a stage begins a row
    return data.grid(tiles, columns=8)


@torch.no_grad()
def draw_attention(predictor, picture, person, joint):
    """Where the Non-Local modules look from the cell that a joint lies in, one tile a stage."""
    crops, matrix = crop_of(predictor, picture, person["box"])
    zoom = max(1, round(384 / predictor.size[1]))
    seen = ImageOps.scale(Image.fromarray(crops[0].numpy()), zoom)
    point = zoom * transform(np.array([person["joints"][joint][:2]]), matrix)[0]  # x, y in `seen`
    modules = predictor.model.non_locals()
    features = []  # what each of them takes in, (1,C,h,w)
    hooks = [module.register_forward_pre_hook(lambda module, inputs: features.extend(inputs))
             for module in modules.values()]
    predictor(crops)
    for hook in hooks:
        hook.remove()
    tiles = []
    for (stage, module), x in zip(modules.items(), features):
        h, w = x.shape[2:]
        cell = np.divide(seen.size, (w, h))
        column, row = np.clip(point // cell, 0, (w - 1, h - 1)).astype(int)
        looks = module.attention_map(x)[0, row * w + column].reshape(h, w).float().cpu().numpy()
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
    add("--stages", action="store_true", help="score the heatmaps of every stage")
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
        used += " dataset data split both workers stages"
        data.refuse_unused(parser, args, "a data set, without --image", used)
    predictor = open_predictor(args.weights, args.device, args.input, args.skeleton, args.bgr)
    if args.image:
        evaluate_pictures(args, predictor)
    else:
        evaluate_dataset(args, predictor)


if __name__ == "__main__":
    data.run(main)
