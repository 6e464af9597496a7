"""Evaluations and runs for the report's tests, in the files that diva_jax.evaluate and diva_jax.main write."""

import base64
import io
import json
import math

import numpy as np
from PIL import Image

from diva_jax import config as configs
from diva_jax.evals import matching
from diva_jax.evals.results import summaries
from diva_jax.evals.tasks import mmvp

BEFORE, AFTER = "openai", "runs/vitl14:4600"
HOSTILE = 'a photo of <script>alert("1")</script> & \'two\' "mugs"'


def score(value, spread, **more):
    return {"score": value, "interval": [value - spread, value + spread], **more}


def write_images(folder, count):
    rng = np.random.default_rng(0)
    paths = []
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
        paths.append(folder / f"{i + 1}.jpg")
        small.resize((400 + 40 * (i % 3), 400), Image.Resampling.BICUBIC).save(paths[-1])
    return [str(p) for p in paths]


def patterns(pooled):
    """Nine patterns, the pooled score of k of 15 pairs."""
    return [
        {
            "name": name,
            "count": 15,
            "scores": {
                "pooled": {"score": 100 * k / 15, "interval": [100 * max(0, k - 3) / 15, 100 * (k + 3) / 15]},
                "published": score(pooled - 2 + k, 9.0),
            },
        }
        for name, k in zip(mmvp.PATTERNS, (2, 3, 1, 5, 0, 7, 4, 2, 6), strict=True)
    ]


def flips(images):
    """A flipped pair for every two images; every fifth is the published readout's, every fourth lost."""
    out = []
    for n in range(len(images) // 2):
        won = n % 4 != 3
        was, now = [0.61, 0.55], [0.71, 0.45 - 0.1 * (n % 3)]
        out.append(
            {
                "metric": "pooled" if n % 5 else "published",
                "item": 7 * n,
                "group": mmvp.PATTERNS[n % 9],
                "won": won,
                "images": images[2 * n : 2 * n + 2],
                "texts": [HOSTILE, f"a photo of {n} butterflies whose wings are closed, seen from the side"],
                "before": was if won else now,
                "after": now if won else was,
            }
        )
    return out


def task(title, titles, weights, compared=None, count=256, items="images", unit="%", **metric):
    """A task with a score per title; `compared` are the scores of the comparison, if there is one."""
    return {
        "title": title,
        "data": f"/data/{title}",
        "count": count,
        "items": items,
        "metrics": {m: {"title": t, "unit": unit, **metric} for m, t in titles.items()},
        "weights": weights,
        "comparisons": [{"before": BEFORE, "after": AFTER, "scores": compared}] if compared else [],
    }


def pairs_task(pairs, matches):
    """Four numbers of a readout, whose differences are those of pairs and matches, with these intervals."""
    metrics = matching.metrics("pooled", readout="pooled embedding")
    weights = {w: {"scores": {m: score(40.0, 5.0) for m in metrics}} for w in (BEFORE, AFTER)}
    compared = {}
    for metric in metrics:
        ends = matches if metric == "pooled_match" else pairs
        compared[metric] = {"difference": sum(ends) / 2, "interval": ends, "mcnemar": {"won": 6, "lost": 4, "p": 0.7}}
    return task("MMVP-VLM", {}, weights, compared, 135, "pairs") | {"metrics": metrics}


def mmvp_task(images):
    """Both readouts, nine patterns, pairs that flipped both ways; the pooled gain is beyond its interval."""
    weights = {}
    for w, pooled, published in ((BEFORE, 19.259, 19.7), (AFTER, 25.926, 21.1)):
        seeds = [published - 0.4, published + 0.4]
        scores = {"pooled": score(pooled, 6.5), "published": score(published, 6, seeds=seeds, seeds_std=0.57)}
        weights[w] = {"scores": scores, "patterns": patterns(pooled)}
    pooled = {"difference": 6.667, "interval": [1.481, 11.852], "mcnemar": {"won": 12, "lost": 3, "p": 0.0352}}
    published = {"difference": 1.4, "interval": [-2.2, 5.0], "mcnemar": {"won": 7, "lost": 5, "p": 0.774}}
    scores = {"pooled": pooled, "published": published}
    titles = {"pooled": "pooled embedding", "published": "published readout, cls + mean(random 76), l2"}
    out = task("MMVP-VLM", titles, weights, scores, 135, "pairs")
    for metric, title in titles.items():
        out["metrics"][metric]["readout"] = title
    out["comparisons"][0]["flipped"] = flips(images)
    return out


def zeroshot_task():
    """The task writes the number of classes beside the scores."""
    weights = {w: {"scores": {"acc1": score(s, 0.4)}, "classes": 3} for w, s in ((BEFORE, 75.5), (AFTER, 75.4))}
    difference = {"difference": -0.1, "interval": [-0.2, 0.0], "mcnemar": {"won": 900, "lost": 950, "p": 0.25}}
    return task("Zero-shot classification", {"acc1": "accuracy @1"}, weights, {"acc1": difference}, 50000)


def retrieval_task():
    names = [f"{way}_retrieval_recall@{k}" for way in ("image", "text") for k in (1, 5, 10)]
    weights = {
        w: {"scores": {m: score(36.5 + 8.7 * i + shift, 0.4) for i, m in enumerate(names)}}
        for w, shift in ((BEFORE, 0.0), (AFTER, -0.31))
    }
    differences = {m: {"difference": -0.31, "interval": [-0.55, -0.07], "mcnemar": None} for m in names}
    return task("Retrieval", {m: m.replace("_", " ") for m in names}, weights, differences, 5000)


def feedback_task():
    """The gap to another image's condition is zero within its interval before tuning and not after."""
    titles = {
        "loss_own": "diffusion loss, own condition",
        "gap_other": "condition gap to another image",
        "gap_text": "condition gap to the text alone",
    }
    weights = {}
    for w, gap in ((BEFORE, 0.0002), (AFTER, 0.0031)):
        bins = []
        for low in range(0, 1000, 100):
            t = (low + 50) / 1000
            loss = 0.9 * math.exp(-4.5 * t) + 0.004
            scores = {
                "loss_own": score(loss * (0.95 if w == AFTER else 1), 0.03 * loss),
                "gap_other": score(gap * (1 + math.sin(3 * t)), 0.0006),
                "gap_text": score(2 * gap * (1 + t), 0.0008),
            }
            bins.append({"low": low, "high": low + 100, "scores": scores})
        scores = {"loss_own": score(0.2043, 0.004), "gap_other": score(gap, 0.0005), "gap_text": score(2 * gap, 0.0002)}
        weights[w] = {"scores": scores, "timesteps": bins}
    out = task("Diffusion feedback", titles, weights, unit="", better="higher")
    out["metrics"]["loss_own"]["better"] = "lower"
    return out


def drift_task(ranks=(231.4, 198.2), cosine=0.9731):
    weights = {
        w: {"scores": {"effective_rank": {"score": r, "interval": None}}}
        for w, r in zip((BEFORE, AFTER), ranks, strict=True)
    }
    titles = {"effective_rank": "effective rank", "cosine": "cosine similarity of tuned and original"}
    out = task("Drift", titles, weights, {"cosine": score(cosine, 0.002)}, unit="", better="higher")
    out["metrics"]["cosine"]["better"] = ""
    return out


def encoded_map(numbers):
    """A map of classes as the task writes it: a PNG in base64."""
    Image.fromarray(np.asarray(numbers, np.uint8), "L").save(buffer := io.BytesIO(), "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def segmentation_task(images):
    """Two images: the truth has classes 0 and 1 and pixels without a label, the predictions all four."""
    truth = np.array([[0, 0, 1, 1, 255], [0, 1, 1, 1, 255], [0, 0, 0, 1, 1]]).repeat(20, 0).repeat(24, 1)
    shift = {BEFORE: truth % 4, AFTER: np.where(truth == 255, 3, truth)}
    weights = {}
    for w, spread in ((BEFORE, 33.1), (AFTER, 35.0)):
        pictures = [
            {"image": i, "truth": encoded_map(truth), "predicted": encoded_map(np.roll(shift[w], n))}
            for n, i in enumerate(images[:2])
        ]
        names = ("background", "cat", "dog <b>", "potted plant")
        classes = [{"name": n, "iou": 20.0} for n in names]
        weights[w] = {"scores": {"miou": score(spread, 2.0)}, "classes": classes, "pictures": pictures}
    difference = {"difference": 1.9, "interval": [1.1, 2.7], "mcnemar": None}
    titles = {"miou": "PASCAL VOC, mIoU"}
    return task("Open-vocabulary segmentation", titles, weights, {"miou": difference}, 1449, better="higher")


def write_evaluation(folder, images, source="runs/vitl14", **tasks):
    """results.json and predictions.csv as diva_jax.evals documents them."""
    results = {
        "schema": 1,
        "created": "2026-01-31T12:00:00+00:00",
        "seconds": 4800.2,
        "versions": {"diva_jax": "0.1.0", "python": "3.11.9", "jax": "0.10.2"},
        "devices": "8 x cpu",
        "config": {"backbone": {"name": "ViT-L-14-quickgelu", "image_size": 224}},
        "options": {"batch_size": 64, "seeds": 10, "bootstrap": 10000, "seed": 0, "dtype": "float32"},
        "weights": [
            {"label": BEFORE, "source": "weights/vitl14", "step": None},
            {"label": AFTER, "source": str(source), "step": 4600},
        ],
        "tasks": tasks or {"mmvp": mmvp_task(images)},
    }
    results["summary"] = summaries(results["tasks"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "predictions.csv").write_text("task,weights,metric,seed,item,file,text,truth,predicted,score,correct\n")
    return results


def write_run(folder, rows=460, total=4600, collapses=False):
    """A workdir's config.json and metrics.jsonl: noisy curves, a warm-up stage, feedback on the way."""
    rng = np.random.default_rng(1)
    folder.mkdir(parents=True, exist_ok=True)
    config = configs.default()
    config.steps, config.condition.warmup_steps, config.optim.momentum = total - 500, 500, 0.8
    (folder / "config.json").write_text(config.to_json())
    machine = {"versions": {"diva_jax": "0.1.0", "jax": "0.10.2"}, "devices": "16 x TPU v5e"}
    sessions = [{"step": s, "started": f"2026-01-3{d}T09:30:00+00:00", **machine} for s, d in ((0, 0), (total // 2, 1))]
    (folder / "sessions.json").write_text(json.dumps(sessions))
    lines = []
    for i in range(1, rows + 1):
        x = i / rows
        row = {
            "step": total * i // rows,
            "loss": 0.14 + 0.03 * math.exp(-6 * x) + 0.004 * rng.normal(),
            "grad_norm": 0.8 * math.exp(rng.normal() * 0.4) * (1 + 4 * math.exp(-8 * x)),
            "lr": 1e-4 * 0.5 * (1 + math.cos(math.pi * x)),
            "images_per_s": 812 + 20 * rng.normal(),
            "data_wait": 0.01,
            "broken_images": 3 * i // rows,
            "seconds": 7200 * (x if x <= 0.5 else x - 0.5),
        }
        lines.append(json.dumps(row))
        if i % max(1, rows // 6) == 0:
            gap = {"feedback/gap_other": 0.0004, "feedback/gap_other/low": -0.0003, "feedback/gap_other/high": 0.0011}
            lost = 231 * x if collapses else 20 * x
            gap |= {"eval/drift/effective_rank": 234 - lost, "eval/drift/effective_rank_change": -lost}
            lines.append(json.dumps({"step": row["step"], "eval/mmvp/pooled": 19 + 6 * x, **gap}))
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))


def write_steps(folder):
    """An evaluation of three steps of a run, whose tables have many columns: its folder."""
    images = write_images(folder, 4)
    write_run(folder / "run", rows=30)
    task = mmvp_task(images)
    for label in ("runs/vitl14:1000", "runs/vitl14:2000"):
        task["weights"][label] = task["weights"][AFTER]
        task["comparisons"].append(task["comparisons"][0] | {"after": label, "flipped": []})
    results = write_evaluation(folder / "out", images, folder / "run", mmvp=task)
    for step in (1000, 2000):
        results["weights"].append({"label": f"runs/vitl14:{step}", "source": str(folder / "run"), "step": step})
    (folder / "out" / "results.json").write_text(json.dumps(results))
    return folder / "out"


def write_full(folder):
    """An evaluation of a run that is still there, every section of a report: its folder; the run is `folder/run`."""
    images = write_images(folder, 28)
    write_run(folder / "run")
    tasks = {"mmvp": mmvp_task(images), "feedback": feedback_task(), "retrieval": retrieval_task()}
    tasks["segmentation"] = segmentation_task(images[-2:])
    tasks |= {"drift": drift_task(), "zeroshot": zeroshot_task()}
    write_evaluation(folder / "out", images, folder / "run", **tasks)
    return folder / "out"
