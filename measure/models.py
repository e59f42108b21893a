"""The trainings of the page on the paper: every model that measure/paper.py compares, and what it starts from."""

from measure.study import Model

TOWNS, RECIPES, VARIANTS = "data/towns", "data/recipes", "runs/paper/data"
RATES = "--lr 0.005 --adam_lr 0.003 --warmup 100 --decay 1 --clip 1"
SMALL = f"--batch 16 {RATES} --d_model 64 --n_head 4 --n_kv_head 4 --d_ff 192 --n_layer 3"
HALF = f"--batch 16 {RATES} --d_model 48 --n_head 4 --n_kv_head 4 --d_ff 128 --n_layer 2"
LARGER = f"--batch 8 {RATES} --d_model 96 --n_head 4 --n_kv_head 4 --d_ff 288 --n_layer 4"
STEPS, WARM_UP = 1000, "warm-up"  # all towns models but the smaller one begin with the same autoregressive updates


def towns(train: str, data: str = TOWNS, start: str = WARM_UP) -> Model:
    return Model(data, f"{SMALL} {train} --steps {STEPS}", start)


METHODS = {
    WARM_UP: Model(TOWNS, f"{SMALL} --method ar --steps 500"),
    "ar": towns("--method ar"),
    "ar half": Model(TOWNS, f"{HALF} --method ar --steps {STEPS + 500}"),
    "ar drafts": towns("--method ar --ahead 8"),
    "skeleton": towns("--method ar", f"{VARIANTS}/skeleton"),
    "parallel-ar": towns("--method parallel-ar"),
    "block": towns("--method block --block 20"),
    "diffusion": towns("--method diffusion"),
    "planned": towns("--method planned"),
    "dense": towns("--method dense"),
    "joint": towns("--method joint --ahead 8"),
}
ABLATIONS = {
    "numbered topics": towns("--method planned --topics numbers"),
    "topic not repeated": towns("--method planned --no-repeat_topic"),
    "one round": towns("--method planned --rounds one"),
    "untagged": towns("--method planned", f"{VARIANTS}/untagged"),
    "named": towns("--method planned", f"{VARIANTS}/named"),
    "extra pads": towns("--method planned --extra_pads 10"),
    "noised history": towns("--method planned --history noised"),
    "1/t weights": towns("--method planned --weight elbo"),
    "no warm-up": Model(TOWNS, f"{SMALL} --method planned --steps {STEPS + 500}"),
}
EPOCHS, TEXTS = (2, 4, 8, 16), 400  # of the study of epochs, and training recipes


def epochs(method: str, n: int) -> Model:
    return Model(RECIPES, f"{LARGER} --method {method} --train_on {TEXTS} --steps {n * TEXTS // 8}")


STUDIED = ("ar", "planned", "dense", "diffusion", "joint")
OVER_EPOCHS = {f"{method} {n} epochs": epochs(method, n) for method in STUDIED for n in EPOCHS}
MODELS = METHODS | ABLATIONS | OVER_EPOCHS
