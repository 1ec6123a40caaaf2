"""
What people do with an exported folder who have not installed `cllm_hf`. Run by `test_export.py` in a process of its
own, with folders of a model, an adapter and a lossless adapter; prints what happened as JSON.
"""

import importlib.abc
import json
import sys


class _NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "cllm_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, _NotInstalled())

import copy  # noqa: E402

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin  # noqa: E402


torch.set_num_threads(1)
FOLDER, ADAPTER, LOSSLESS = sys.argv[1:4]
LENGTH = {"max_new_tokens": 30}
results = {"generate_of_the_host": GenerationMixin.generate.__module__}


def counted(model, *args, **kwargs):
    """What a call of `generate` returns, and its forward passes."""
    forwards = []
    hook = model.register_forward_hook(lambda *_: forwards.append(1))
    try:
        return model.generate(*args, **kwargs), len(forwards)
    finally:
        hook.remove()


def refused(model, *args, **kwargs):
    try:
        model.generate(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


tokenizer = AutoTokenizer.from_pretrained(FOLDER, padding_side="left")
plain = AutoModelForCausalLM.from_pretrained(FOLDER)  # without trust: the decoding of the host
model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
one = tokenizer("Mia has 7.", return_tensors="pt")
batch = tokenizer(["Mia has 7.", "Ben", "How many?"], padding=True, return_tensors="pt")
text = tokenizer.decode(plain.generate(**one, **LENGTH, do_sample=False)[0, one["input_ids"].shape[1] :])
with_stops = {**LENGTH, "stop_strings": [text[8:10]], "tokenizer": tokenizer}

for name, inputs, options in [
    ("keywords", one, LENGTH),
    ("batch", batch, LENGTH),
    ("processors", batch, {**LENGTH, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2}),
    ("stop strings", one, with_stops),
]:
    expected, expected_forwards = counted(plain, **inputs, **options, do_sample=False)
    decoded, forwards = counted(model, **inputs, **options)
    named, named_forwards = counted(plain, **inputs, **options, custom_generate=FOLDER, trust_remote_code=True)
    results[name] = {
        "expected": expected.tolist(),
        "decoded": decoded.tolist(),
        "named": named.tolist(),
        "forwards": [expected_forwards, forwards, named_forwards],
    }

expected = plain.generate(**one, **LENGTH, do_sample=False).tolist()
config = copy.deepcopy(model.generation_config)
config.max_new_tokens = 30
results["positional"] = [
    expected,
    model.generate(one["input_ids"], **LENGTH).tolist(),
    model.generate(one["input_ids"], config).tolist(),
    copy.deepcopy(model).generate(one["input_ids"], **LENGTH).tolist(),
    model.generate(**one, **LENGTH, decoding="autoregressive").tolist(),
]
results["autoregressive forwards"] = counted(model, **one, **LENGTH, decoding="autoregressive")[1]
output, forwards = counted(model, **one, **LENGTH, return_dict_in_generate=True)
results["statistics"] = [output.jacobi_stats.num_forwards, forwards, max(map(max, output.jacobi_stats.num_committed))]

results["refused"] = {
    "block size": refused(model, **one, jacobi_block_size=0),
    "decoding": refused(model, **one, decoding="jacoby"),
    "beams": refused(model, **one, num_beams=2),
    "unknown": refused(model, **one, jacobi_blok_size=4),
    "named": refused(plain, **one, jacobi_block_size=0, custom_generate=FOLDER, trust_remote_code=True),
}

pipe = {"max_new_tokens": 12, "do_sample": False}
results["pipeline"] = [
    transformers.pipeline("text-generation", model=FOLDER, trust_remote_code=trust)("Mia has 7.", **pipe)
    for trust in (False, True)
]

adapted = AutoModelForCausalLM.from_pretrained(ADAPTER)
decoded, forwards = counted(adapted, **one, **LENGTH, custom_generate=ADAPTER, trust_remote_code=True)
results["adapter"] = [adapted.generate(**one, **LENGTH, do_sample=False).tolist(), decoded.tolist(), forwards]

drafting = AutoModelForCausalLM.from_pretrained(LOSSLESS)
expected, greedy = counted(drafting, **one, **LENGTH, do_sample=False)
named = {"custom_generate": LOSSLESS, "trust_remote_code": True}
decoded, forwards = counted(drafting, **one, **LENGTH, **named, return_dict_in_generate=True)
results["lossless"] = {
    "expected": expected.tolist(),
    "decoded": [
        decoded.sequences.tolist(),
        drafting.generate(**one, **LENGTH, **named, jacobi_drafts=1, jacobi_block_size=3).tolist(),
        drafting.generate(**one, **LENGTH, **named, decoding="autoregressive").tolist(),
        drafting.generate(**one, **LENGTH, **named, lossless_adapter=LOSSLESS).tolist(),
    ],
    "forwards": [greedy, forwards, decoded.jacobi_stats.num_forwards],
    "refused": refused(drafting, **one, **named, jacobi_block_size=100),
    "imported": sorted({"trl", "datasets", "evaluate"} & set(sys.modules)),
}
drafting.disable_adapters()
off, off_forwards = counted(drafting, **one, **LENGTH, **named, do_sample=False)
results["lossless"]["decoded"].append(off.tolist())
results["lossless"]["forwards"].append(off_forwards)
results["still the host's"] = GenerationMixin.generate.__module__
print(json.dumps(results))
