"""Evaluations and runs for the report's tests, in the files that diva_jax.evaluate and diva_jax.main write.

report_samples.json has a task of each kind with the scores of two encoders, and what else results.json has. Of MMVP the
pooled gain is beyond its interval; of the feedback the gap to another image's condition is zero within its interval
before tuning alone; of the two images of the segmentation, the truth has classes 0 and 1 and pixels without a label,
the predictions all four.
"""

import copy
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image

from diva_jax import config as configs
from diva_jax.evals import stats
from diva_jax.evals.results import summaries
from diva_jax.evals.tasks import mmvp

BEFORE, AFTER = "openai", "runs/vitl14:4600"
HOSTILE = 'a photo of <script>alert("1")</script> & \'two\' "mugs"'
_TASKS = json.loads(Path(__file__).with_suffix(".json").read_text())


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


def task(name):
    return copy.deepcopy(_TASKS[name])


def flips(images):
    """A flipped pair for every two images; every fifth is the published readout's, every fourth lost."""
    out = []
    for n in range(len(images) // 2):
        before, after = ([0.61, 0.55], [0.71, 0.45 - 0.1 * (n % 3)])[:: 1 if n % 4 != 3 else -1]
        texts = [HOSTILE, f"a photo of {n} butterflies whose wings are closed, seen from the side"]
        flip = dict(item=7 * n, group=mmvp.PATTERNS[n % 9], won=n % 4 != 3, before=before, after=after, texts=texts)
        out.append(flip | dict(metric="pooled" if n % 5 else "published", images=images[2 * n : 2 * n + 2]))
    return out


def pairs_task(pairs, matches):
    """Four numbers of a readout, whose differences are those of pairs and matches, with these intervals."""
    out, metrics = task("mmvp"), stats.pair_metrics("pooled", readout="pooled embedding")
    compared = {}
    for metric in metrics:
        ends = matches if metric == "pooled_match" else pairs
        test = {"won": 6, "lost": 4, "p": 0.7} if ends[0] <= 0 <= ends[1] else {"won": 9, "lost": 1, "p": 0.02}
        compared[metric] = {"difference": sum(ends) / 2, "interval": ends, "mcnemar": test}
    out["weights"] = {w: {"scores": {m: score(40.0, 5.0) for m in metrics}} for w in (BEFORE, AFTER)}
    out["comparisons"] = [{"before": BEFORE, "after": AFTER, "scores": compared}]
    return out | {"metrics": metrics}


def mmvp_task(images):
    """Both readouts, nine patterns, pairs that flipped both ways."""
    out = task("mmvp")
    out["comparisons"][0]["flipped"] = flips(images)
    return out


def drift_task(ranks=(231.4, 198.2), cosine=0.9731):
    out = task("drift")
    for found, rank in zip(out["weights"].values(), ranks, strict=True):
        found["scores"]["effective_rank"]["score"] = rank
    out["comparisons"][0]["scores"]["cosine"] = score(cosine, 0.002)
    return out


def segmentation_task(images):
    out = task("segmentation")
    for found in out["weights"].values():
        for picture, image in zip(found["pictures"], images, strict=True):
            picture["image"] = image
    return out


def write_evaluation(folder, images, source="runs/vitl14", **tasks):
    """results.json and predictions.csv as diva_jax.evals documents them."""
    results = task("results") | {"tasks": tasks or {"mmvp": mmvp_task(images)}}
    results["weights"][1]["source"] = str(source)
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
        row = {"step": total * i // rows, "loss": 0.14 + 0.03 * math.exp(-6 * x) + 0.004 * rng.normal()}
        row |= {"grad_norm": 0.8 * math.exp(rng.normal() * 0.4) * (1 + 4 * math.exp(-8 * x))}
        row |= {"lr": 1e-4 * 0.5 * (1 + math.cos(math.pi * x)), "images_per_s": 812 + 20 * rng.normal()}
        row |= {"data_wait": 0.01, "broken_images": 3 * i // rows, "seconds": 7200 * (x if x <= 0.5 else x - 0.5)}
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
    of_mmvp = mmvp_task(images)
    for label in ("runs/vitl14:1000", "runs/vitl14:2000"):
        of_mmvp["weights"][label] = of_mmvp["weights"][AFTER]
        of_mmvp["comparisons"].append(of_mmvp["comparisons"][0] | {"after": label, "flipped": []})
    results = write_evaluation(folder / "out", images, folder / "run", mmvp=of_mmvp)
    for step in (1000, 2000):
        results["weights"].append({"label": f"runs/vitl14:{step}", "source": str(folder / "run"), "step": step})
    (folder / "out" / "results.json").write_text(json.dumps(results))
    return folder / "out"


def write_full(folder):
    """An evaluation of a run that is still there, every section of a report: its folder; the run is `folder/run`."""
    images = write_images(folder, 28)
    write_run(folder / "run")
    tasks = {"mmvp": mmvp_task(images), "feedback": task("feedback"), "retrieval": task("retrieval")}
    tasks["segmentation"] = segmentation_task(images[-2:])
    tasks |= {"drift": drift_task(), "zeroshot": task("zeroshot")}
    write_evaluation(folder / "out", images, folder / "run", **tasks)
    return folder / "out"
