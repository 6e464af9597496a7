"""The names that a misspelt name, or one of another program, may mean: of fields, arguments and choices."""

import difflib
import re
from collections.abc import Collection, Iterable

from diva_jax.common.errors import listing

# Words for the same; a name ends with one of them.
_SAME = [
    frozenset(re.sub("[^a-z0-9 ]", "", line).split())
    for line in (
        "lr learning_rate learnrate base_lr max_lr peak_lr initial_lr",
        "batch_size batch bs global_batch_size train_batch_size per_device_train_batch_size samples_per_step",
        "steps step epochs epoch iterations iters num_steps max_steps train_steps total_steps num_epochs n_steps",
        "accum accumulation grad_accum gradient_accumulation gradient_accumulation_steps accumulate micro_batches",
        "weight_decay wd l2",
        "clip grad_clip clip_grad gradient_clip gradient_clipping clip_grad_norm max_grad_norm clip_norm",
        "warmup warmup_steps warmup_ratio warmup_fraction num_warmup_steps warm_up",
        "schedule scheduler lr_schedule lr_scheduler lr_scheduler_type",
        "b1 beta1 betas",
        "b2 beta2 betas",
        "name optimizer optim optimiser",
        "seed random_seed rng rng_seed random_state",
        "dtype precision mixed_precision amp bf16 fp16 compute_dtype param_dtype",
        "remat gradient_checkpointing grad_checkpointing checkpointing activation_checkpointing",
        "threads workers num_workers n_workers num_threads dataloader_num_workers",
        "prefetch prefetch_factor",
        "path dataset data dataset_path data_path data_dir train_data images",
        "image_size resolution img_size size input_size res",
        "source model pretrained weights checkpoint ckpt model_name pretrained_model model_path weights_path",
        "objective method loss algorithm",
        "decay ema ema_decay ema_rate",
        "every interval freq frequency save_every save_steps save_interval log_interval logging_steps eval_steps",
        "keep save_total_limit max_to_keep keep_last",
        "wandb wandb_project project report_to",
        "trainable freeze frozen unfreeze train_layers",
        "workdir work_dir output_dir out_dir log_dir save_dir run_dir",
        "out output output_dir out_dir save_dir path",
        "init_from resume resume_from init_checkpoint",
        "format fmt kind type",
        "normalise normalize normalized norm",
        "texts text captions prompts",
        "main train training fit tune finetune",
        "evaluate eval evaluation test validate",
        "export_torch export convert",
        "pt pytorch torch pth state_dict",
        "hf transformers huggingface hugging_face llava",
        "float32 fp32 f32 single float full",
        "float16 fp16 f16 half",
        "bfloat16 bf16",
    )
]


def _plain(text: str) -> str:
    return re.sub("[^a-z0-9]", "", text.lower())


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """The known names, which may be dotted paths, that a name may mean: at most three, the likeliest first."""
    section, _, end = name.rpartition(".")
    last, found = _plain(end), []
    same = {word for words in _SAME if last in words for word in words}
    for path in known:
        own = _plain(path.rpartition(".")[2])
        share = difflib.SequenceMatcher(None, last, own).ratio()
        inside = min(len(own), len(last)) >= 4 and (own in last or last in own)
        rank = 2 if own == last or name.startswith(f"{path}.") else 1 if own in same else 0
        if rank or share >= 0.75 or inside:
            alike = difflib.SequenceMatcher(None, _plain(name), _plain(path)).ratio()
            found.append((-rank, path.rpartition(".")[0] != section, -alike, path))
    found.sort()
    # Beside a name that is the same or of the same meaning, those that only look alike are left out.
    return [path for rank, *_, path in found if bool(rank) == bool(found[0][0])][:3]


def unknown(owner: str, names: Collection[str], known: Collection[str], otherwise: str) -> str:
    """One sentence on names that do not exist, with the known ones that are meant, or else what to do otherwise: `OWNER
    lr; did you mean optim.lr?`, where `owner` may be "the config has no field"."""
    near = dict.fromkeys(n for name in names for n in nearest(name, known)[: 1 if len(names) > 1 else None])
    advice = f"; did you mean {' or '.join(near)}?" if near else f": {otherwise}"
    return f"{owner} {listing(list(names))}{advice}"
