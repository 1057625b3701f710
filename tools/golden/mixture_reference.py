"""Write testdata/mixtures/reference.safetensors: mixtures of adapters on one linear layer, and the losses that balance them, by plain loops in f64."""

import zlib

from common import TESTDATA, provenance

import numpy as np
import safetensors
from safetensors.numpy import save_file

ROWS, LENGTH, WIDTH, OUT, EXPERTS, RANK, TASKS, EMBEDDING = 2, 5, 7, 6, 4, 2, 3, 5
SCALE, TOP, DELTA = 1.5, 2, 0.1
SHAPES = {
    "x": (ROWS, LENGTH, WIDTH), "w": (OUT, WIDTH), "bias": (OUT,), "router": (EXPERTS, WIDTH), "output_router": (EXPERTS, OUT),
    "a": (EXPERTS, RANK, WIDTH), "b": (EXPERTS, OUT, RANK), "vectors": (EXPERTS, OUT),
    "task_embedding": (TASKS, EMBEDDING), "task_gate": (EXPERTS, EMBEDDING),
}  # fmt: skip


def softmax(logits):
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def best(values, count):
    """The places of the greatest values; nothing here is near a tie."""
    order = np.argsort(-values)
    assert values[order[count - 1]] - values[order[count]] > 1e-3
    return order[:count]


def at_most(weights, count, normalise):
    """The greatest weights, all others zero."""
    kept = np.zeros_like(weights)
    for place in best(weights, count):
        kept[place] = weights[place]
    return kept / kept.sum() if normalise else kept


def each_token(function, *arguments):
    return np.array([[function(*(a[row, step] for a in arguments)) for step in range(LENGTH)] for row in range(ROWS)])


def mixed(t, x, weights):
    """W·x + w₀ + s·Σ wᵢ·Bᵢ·Aᵢ·x for one token."""
    y = t["w"] @ x + t["bias"]
    for expert in range(EXPERTS):
        y = y + SCALE * weights[expert] * (t["b"][expert] @ (t["a"][expert] @ x))
    return y


def scaled(t, y, weights):
    """y ⊙ Σ wᵢ·lᵢ for one token."""
    return y * sum(weights[expert] * t["vectors"][expert] for expert in range(EXPERTS))


def loramoe_balance(probabilities, types):
    """σ²/μ² of the importance of each expert for each row, where the wanted half of the experts counts more."""
    importance = []
    for row in range(ROWS):
        for expert in range(EXPERTS):
            wanted = (types[row] == 1) == (expert < EXPERTS // 2)
            weight = 1 + DELTA if wanted else 1 - DELTA
            importance.append(weight * sum(probabilities[row, step, expert] for step in range(LENGTH)))
    importance = np.array(importance)
    return importance.var(ddof=1) / (importance.mean() ** 2 + 1e-10)


def load_balance(probabilities, mask, count):
    """N·Σ fᵢ·Pᵢ over the tokens that count; f has the places among the best `count`."""
    share, mean, tokens = np.zeros(EXPERTS), np.zeros(EXPERTS), 0.0
    for row in range(ROWS):
        for step in range(LENGTH):
            if mask[row, step]:
                share[best(probabilities[row, step], count)] += 1
                mean += probabilities[row, step]
                tokens += 1
    return EXPERTS * sum(share / tokens * mean / tokens)


def z_loss(logits):
    return np.mean(each_token(lambda token: np.log(np.exp(token).sum()) ** 2, logits))


def main():
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(b"mixtures/reference")))
    t = {name: 0.7 * rng.standard_normal(shape) for name, shape in SHAPES.items()}
    y = t["x"] @ t["w"].T + t["bias"]
    logits, output_logits = t["x"] @ t["router"].T, y @ t["output_router"].T
    probabilities, output_probabilities = each_token(softmax, logits), each_token(softmax, output_logits)
    top = each_token(lambda p: at_most(p, TOP, normalise=True), probabilities)
    masked = each_token(lambda p: at_most(p, TOP, normalise=False), probabilities)
    tasks, types = np.array([2, 0]), np.array([1, 0])
    by_task = [softmax(t["task_gate"] @ t["task_embedding"][task]) for task in tasks]
    task_weights = np.array([[weights] * LENGTH for weights in by_task])
    mask = np.ones((ROWS, LENGTH), dtype=np.int64)
    mask[1, -2:] = 0

    t |= {"task_ids": tasks, "task_types": types, "mask": mask}
    t |= {
        "router_logits": logits,
        "probabilities": probabilities,
        "top_k_weights": top,
        "task_weights": np.array(by_task),
    }
    t["molora"] = each_token(lambda x, p: mixed(t, x, p), t["x"], probabilities)
    t["molora_top_k"] = each_token(lambda x, p: mixed(t, x, p), t["x"], masked)
    t["mixlora"] = each_token(lambda x, p: mixed(t, x, p), t["x"], top)
    t["moelora"] = each_token(lambda x, p: mixed(t, x, p), t["x"], task_weights)
    t["mov"] = each_token(lambda y, p: scaled(t, y, p), y, output_probabilities)
    t["mov_by_input"] = each_token(lambda y, p: scaled(t, y, p), y, probabilities)
    t["loramoe_balance"] = np.array([loramoe_balance(probabilities, types)])
    t["switch_loss"] = np.array([load_balance(probabilities, np.ones_like(mask), 1)])
    t["switch_loss_masked"] = np.array([load_balance(probabilities, mask, 1)])
    t["top_k_loss"] = np.array([load_balance(probabilities, np.ones_like(mask), TOP)])
    t["top_k_loss_masked"] = np.array([load_balance(probabilities, mask, TOP)])
    t["z_loss"] = np.array([z_loss(logits)])

    directory = TESTDATA / "mixtures"
    directory.mkdir(exist_ok=True)
    save_file({name: np.ascontiguousarray(value) for name, value in t.items()}, directory / "reference.safetensors")
    provenance(directory, "mixture_reference.py", "mixtures/reference", (np, safetensors))


if __name__ == "__main__":
    main()
