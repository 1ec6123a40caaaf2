"""What `test_device` looks at, run in a process of its own: the same calls on the CPU and on a simulated device."""

import copy
from contextlib import contextmanager

import torch
from conftest import make_model
from lossless_models import add_random_adapter
from simulated_device import NAME, SimulatedTensor, set_up, simulated_device
from training_cases import make_collator, make_config, make_record

from cllm_hf.blocks.parting import describe_parting, find_parting
from cllm_hf.decoding import compiled
from cllm_hf.training.batch import TrainingBatch
from cllm_hf.training.drafting import DraftingObjective
from cllm_hf.training.monitoring import measure_decoding
from cllm_hf.training.objective import ConsistencyObjective
from cllm_hf.trajectories.collector import Request, collect_trajectories
from cllm_hf.trajectories.continuous import ContinuousBatch


ONE = [[3, 4, 5, 6, 7]]
BATCH = [[0, 0, 5, 6, 7], [9, 8, 7, 6, 5], [0, 3, 4, 5, 6]]
DECODING = {
    "greedy": (ONE, {}),
    "batch": (BATCH, {}),
    "stop tokens": (BATCH, {"eos_token_id": [7, 9, 11]}),
    "candidates": (BATCH, {"jacobi_candidates": 3}),
    "auto": (BATCH, {"jacobi_block_size": "auto"}),
    "repetition penalty": (BATCH, {"repetition_penalty": 1.3}),
    "processors": (ONE, {"no_repeat_ngram_size": 3, "min_new_tokens": 5, "eos_token_id": 7}),
    "static cache": (BATCH, {"jacobi_compile": True}),
}
OBJECTIVES = {
    "stored states": {},
    "online states": {"trajectory_source": "online", "block_size": 5},
    "local": {"consistency": "local"},
    "ground truth": {"ar_labels": "ground_truth"},
    "noisy context": {"context": "noisy", "noise_window": 2},
    "progressive": {"state_sampling": "progressive", "noise_window": 3},
    "lossless": {"lossless": True, "block_size": 5},
}
PROMPTS = [[3 + number, 4, 5 + number] + [7] * (number % 4) for number in range(12)]


class _Eager:
    """In place of a compiled step: the static cache alone, which is what lies on a device."""

    def __init__(self, model, compiling):
        self._model = model

    def __call__(self, **inputs):
        return self._model(**inputs)


def check_everything(decoded_models):
    """
    Run each case on the CPU and on the device.

    Returns:
        `dict[str, dict]`: for each case `ours` and `expected`, which are to be equal, what was read back from the
            device by operation (`reads`), and the number of forward passes (`num_forwards`) where it is known.
    """
    set_up()
    torch.set_num_threads(1)
    compiled.CompiledStep = _Eager
    results = {}
    for name in decoded_models:
        model = make_model(name).eval()
        for decoding, one in (("jacobi", model), ("lossless", add_random_adapter(model))):
            results |= {f"{name}, {decoding}, {case}": check_decoding(one, decoding, case) for case in DECODING}
            results[f"{name}, {decoding}, samples"] = check_samples(one, decoding)
    model = make_model("llama").eval()
    results |= check_collecting(model)
    for case in OBJECTIVES:
        results[f"training, {case}"] = check_training(model, case)
    return results


@contextmanager
def on_device(model):
    """A copy of a model on the device, which counts from here on."""
    with simulated_device() as device:
        moved = copy.deepcopy(model).to(NAME)
        device.reads.clear()
        yield moved, device


def decode(model, decoding, prompts, **options):
    ids = torch.tensor(prompts, device=model.device)
    return model.generate(
        input_ids=ids,  # by name, as PEFT's models want it
        attention_mask=(ids > 0).long(),
        **{"pad_token_id": 0, "do_sample": False, "max_new_tokens": 24, "return_dict_in_generate": True, **options},
        decoding=decoding,
    )


def check_decoding(model, decoding, case):
    prompts, options = DECODING[case]
    expected = decode(model, decoding, prompts, **options)
    with on_device(model) as (moved, device):
        output = decode(moved, decoding, prompts, **options)
        reads = dict(device.reads)
        ours = output.sequences.tolist()
    return {
        "ours": ours,
        "expected": expected.sequences.tolist(),
        "reads": reads,
        "num_forwards": output.jacobi_stats.num_forwards,
        "num_tokens": len(ours[0]) - len(prompts[0]),
    }


def check_samples(model, decoding):
    """A device draws noise of its own; a sample does not depend on the block size."""
    options = {"do_sample": True, "temperature": 1.5, "top_k": 20, "jacobi_seed": 3}
    with on_device(model) as (moved, device):
        ours, expected = (
            decode(moved, decoding, BATCH, **options, jacobi_block_size=size).sequences.tolist() for size in (6, 2)
        )
    return {"ours": ours, "expected": expected, "reads": dict(device.reads)}


def check_collecting(model):
    records, results = [], {}

    def respond(model):
        return ContinuousBatch(model, 20, [7], num_rows=5, tokens_per_prefill=64).run(PROMPTS)

    responses = respond(model)
    for number, (prompt, response) in enumerate(zip(PROMPTS, responses)):
        records.append({"data_id": str(number), "prompt_ids": prompt, "response_ids": response})
    requests = [Request(one["prompt_ids"], one["response_ids"], (0, number)) for number, one in enumerate(records)]
    for case, run in {
        "responses": respond,
        "trajectories": lambda model: collect_trajectories(model, requests, 8, 0, [7], keep_not_greedy=True),
        "monitoring": lambda model: measure_decoding(model, records[:4], 8, 0, [7], 20).tolist(),
        "parting": lambda model: describe_parting(find_parting(model, PROMPTS[0], [3, 4, 5], [3, 6])),
    }.items():
        expected = run(model)
        with on_device(model) as (moved, device):
            results[case] = {"ours": run(moved), "expected": expected, "reads": dict(device.reads)}
    results["responses"]["num_tokens"] = sum(map(len, responses))
    return results


def check_training(model, case):
    """Both losses and the gradient, of three records and, for what is read back, of twelve."""
    options = OBJECTIVES[case]
    is_lossless = bool(options.get("lossless"))
    config = make_config(**options)
    objective = (DraftingObjective if is_lossless else ConsistencyObjective)(config, 5)
    model = add_random_adapter(model) if is_lossless else model
    records = [make_record(*lengths, num_states=7) for lengths in ((6, 12), (3, 1), (4, 18))]

    def step(model, records):
        columns = make_collator(config, 5).collate(records).columns()
        base = model.get_base_model() if is_lossless else model
        batch = TrainingBatch(**{name: values.to(model.device) for name, values in columns.items()})
        prepared = objective.prepare(model, base, batch, 1, 0.0)
        losses = objective.sum_losses(model, base, prepared)
        losses[0].backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        held = [one.held if isinstance(one, SimulatedTensor) else one for one in gradients]
        model.zero_grad()
        return [*losses.detach().cpu().tolist(), *(float(one.norm()) for one in held)]

    expected = step(model, records)
    with on_device(model) as (moved, device):
        ours = step(moved, records)
        reads = dict(device.reads)
        device.reads.clear()
        step(moved, records * 4)
    return {"ours": ours, "expected": expected, "reads": reads, "reads_of_many": dict(device.reads)}
