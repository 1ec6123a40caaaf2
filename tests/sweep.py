"""
Jacobi decoding against greedy decoding on a tiny model of every causal architecture of the host.

    python tests/sweep.py docs/compatibility.md

writes that page; `tests/decoding/test_architectures.py` checks what stands there.
"""

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from architectures import CANNOT_BUILD, MODEL_TYPES, make_architecture
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import cllm_hf  # noqa: F401


BLOCK_SIZES = (2, 5, 16)
NUM_TOKENS = 30
EXACT, WRONG, REFUSED, HOST_FAILS = "exact", "WRONG", "refused", "the host's generate() fails"


@dataclass
class Finding:
    """What came of an architecture at a batch size, in one of the words above, and what there is to say of it."""

    outcome: str
    note: str = ""


def make_prompts(batch_size, length, seed, is_padded):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (batch_size, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch_size if is_padded else 1):
        mask[row, : (row * 3) % length] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


@torch.no_grad()
def compare(model, batch_size, is_padded, seeds=(0, 1), block_sizes=BLOCK_SIZES):
    """Decode prompts both ways at several block sizes."""
    options = {"do_sample": False, "max_new_tokens": NUM_TOKENS}
    for seed in seeds:
        prompts = make_prompts(batch_size, 12, seed, is_padded)
        try:
            greedy = model.generate(**prompts, **options)
        except Exception as error:
            return Finding(HOST_FAILS, str(error).split("\n")[0])
        for block_size in block_sizes:
            try:
                decoded = model.generate(
                    **prompts, **options, jacobi_block_size=block_size, return_dict_in_generate=True
                )
            except ValueError as error:
                if 'decoding="' not in str(error):
                    raise
                return Finding(REFUSED, str(error))
            if decoded.sequences.tolist() != greedy.tolist():
                return Finding(WRONG, f"block size {block_size}, seed {seed}")
            if decoded.jacobi_stats.num_forwards > NUM_TOKENS:
                return Finding(WRONG, f"{decoded.jacobi_stats.num_forwards} forward passes for {NUM_TOKENS} tokens")
    return Finding(EXACT)


def examine(model_type, **cases):
    """Findings for one row, and for a batch of three with padding on the left and, if that is refused, without."""
    if model_type in CANNOT_BUILD:
        return [Finding("not tried", CANNOT_BUILD[model_type])] * 2
    model = make_architecture(model_type)
    single = compare(model, 1, False, **cases)
    if single.outcome != EXACT:
        return [single, single]
    padded, unpadded = compare(model, 3, True, **cases), compare(model, 3, False, **{**cases, "seeds": (2,)})
    if padded.outcome == REFUSED and unpadded.outcome == EXACT:
        return [single, Finding("exact without padding", padded.note)]
    return [single, unpadded if padded.outcome == EXACT else padded]


def quiet():
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)


def table():
    """Lines of the Markdown table and how many architectures have each pair of findings."""
    lines = ["| `model_type` | class | one row | batch | note |", "|---|---|---|---|---|"]
    totals = {}
    for model_type in MODEL_TYPES:
        single, batch = examine(model_type)
        note = (single.note or batch.note).split(' Pass `decoding="')[0]
        name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
        lines.append(f"| {model_type} | {name} | {single.outcome} | {batch.outcome} | {note} |")
        for kind, finding in (("one row", single), ("batch", batch)):
            totals[kind, finding.outcome] = totals.get((kind, finding.outcome), 0) + 1
    return lines, totals


HEADER = """# Compatibility

Every entry of the causal language models of transformers {version}, as tiny models with random weights in float32 on a
CPU: greedy text of {tokens} tokens by Jacobi decoding, at block sizes {sizes}, against `generate(do_sample=False)`.
"One row" is a prompt alone, "batch" three prompts with padding on the left.

{totals}

What is refused raises a `ValueError` that says why and what to do. `python tests/sweep.py FILE` writes this page, and
a slow test checks it. For other models, such as remote code, the rules are those of [decoding.md](decoding.md).
"""


def main(path):
    quiet()
    lines, totals = table()
    counts = [f"- {kind}: {outcome}: {count}" for (kind, outcome), count in sorted(totals.items())]
    sizes = ", ".join(map(str, BLOCK_SIZES))
    header = HEADER.format(
        version=transformers.__version__,
        tokens=NUM_TOKENS,
        sizes=sizes,
        totals="\n".join(counts),
    )
    Path(path).write_text("\n".join([header, *lines, ""]))


if __name__ == "__main__":
    main(sys.argv[1])
