"""Finished collections of trajectories, written file by file: what `TrajectoryBuilder` leaves in its output folder."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset
from pyarrow import parquet

from cllm_hf.trajectories.schema import features, num_blocks
from cllm_hf.trajectories.statistics import measure_trajectories


def make_record(number, rng, block_size=4, vocabulary=50, augmented=False):
    """A record whose drafts come right from left to right."""
    response = rng.integers(2, vocabulary, int(rng.integers(1, 4 * block_size))).tolist()
    blocks = num_blocks(len(response), block_size)
    padded = response + [0] * (blocks * block_size - len(response))
    states, extra = [], []
    for block in range(blocks):
        end = padded[block * block_size : (block + 1) * block_size]
        right = sorted(rng.choice(block_size, int(rng.integers(0, block_size)), replace=False).tolist())
        draft = rng.integers(2, vocabulary, block_size).tolist()
        states.append([end[:known] + draft[known:] for known in right] + [end])
        extra.append([end[:known] + draft[known:] for known in right[1:]])
    record = {
        "data_id": str(number),
        "prompt": f"prompt {number}",
        "response": f"response {number}",
        "prompt_ids": rng.integers(2, vocabulary, int(rng.integers(1, 6))).tolist(),
        "response_ids": response,
        "states": states,
        "is_greedy": True,
    }
    return {**record, "augmented_states": extra} if augmented else record


def make_records(number, seed=0, **options):
    rng = np.random.default_rng(seed)
    return [make_record(index, rng, **options) for index in range(number)]


def write_shard(path: Path, records, augmented=False):
    """Write a shard; one without records has no row group, which the host can read."""
    schema = features(augmented).arrow_schema
    path.parent.mkdir(parents=True, exist_ok=True)
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        if records:
            writer.write_table(pa.Table.from_pylist(records, schema=schema))


def write_collection(folder: Path, shards, block_size=4, augmented=False, **changes):
    """
    Write a finished collection.

    `shards` is a mapping of a split to lists of records, one a shard; `changes` replace entries of the manifest.
    """
    entries, statistics = {}, {}
    for split, groups in shards.items():
        for number, records in enumerate(groups):
            name = f"data/{split}-{number:05d}-of-{len(groups):05d}.parquet"
            write_shard(folder / name, records, augmented)
            data = (folder / name).read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            entries[name] = {"records": len(records), "bytes": len(data), "sha256": digest}
        measured = measure_trajectories([record for group in groups for record in group], block_size)
        statistics[split] = measured.to_dict()
    kept = sum(entry["records"] for entry in entries.values())
    manifest = {
        "format": 1,
        "complete": True,
        "prompts_done": kept + 3,
        "made_with": {"cllm_hf": "0.1.0", "torch": "2.13", "transformers": "5.23"},
        "model": {
            "name": "user/model",
            "revision": None,
            "architecture": "LlamaForCausalLM",
            "num_parameters": 1234,
            "dtype": "float32",
            "attention": "sdpa",
            "fingerprint": "f" * 64,
        },
        "tokenizer": {"name": "user/model", "fingerprint": "e" * 64},
        "prompts": {
            "count": kept + 3,
            "fingerprint": "d" * 64,
            "with_responses": False,
            "source": "openai/gsm8k",
            "license": "mit",
        },
        "options": {
            "block_size": block_size,
            "max_new_tokens": 64,
            "seed": 0,
            "augment": augmented,
            "cleaning": {"max_token_run": 10, "drop_truncated": False},
        },
        "counts": {"kept": kept, "duplicate": 2, "token_repetition": 1, "not_greedy": 0},
        "statistics": statistics,
        "shards": entries,
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))
    (folder / "statistics.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"picture" * 20)
    (folder / "README.md").write_text("local card")
    return manifest


def rows(dataset):
    """Rows as a plain list, to compare."""
    return [dict(row) for row in dataset.with_format(None)] if isinstance(dataset, Dataset) else list(dataset)
