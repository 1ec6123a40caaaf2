"""A task and a config so small that all steps take a second or two, and examples loaded by their file."""

import importlib.util
import json
import sqlite3
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import yaml
from tasks.task import Problem, Task, task_option

from cllm_hf.evaluation.judgements import Judgement


ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"


@dataclass
class Letters(Task):
    """Say the letters of a word."""

    name = "letters"
    title = "Letters"

    count: int = task_option(12, "training problems")
    ending: str = task_option(".", "what ends an answer")

    def load(self, split):
        words = ["".join(chr(97 + (3 * row + 5 * place) % 26) for place in range(5)) for row in range(self.count + 6)]
        words = words[: self.count] if split == "train" else words[self.count :]
        return [Problem(f"{word}\n", " ".join(word) + self.ending, reference=word) for word in words]

    def judge(self, responses, problems):
        return [
            Judgement(response == problem.response, "same" if response == problem.response else "other")
            for response, problem in zip(responses, problems)
        ]


SHAPE = {
    "architecture": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
TRAINING = {
    "max_steps": 4,
    "save_steps": 1,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
}


def letters_config(**changes):
    """Options of a pipeline as YAML has them."""
    return {
        "block_size": 4,
        "max_new_tokens": 8,
        "model": {**SHAPE, "vocab_size": 280},
        "sft": dict(TRAINING),
        "collect": {
            "num_prompts": 6,
            "device": "cpu",
            "max_token_run": None,
            "max_sentence_repeats": None,
            "drop_empty": False,
        },
        "train": {**TRAINING, "plot_run": False},
        "evaluate": {"num_prompts": 2, "device": "cpu"},
        **changes,
    }


def write_config(path, **changes):
    path.write_text(yaml.safe_dump(letters_config(**changes)))
    return path


def load_example(name):
    """An example as a module, which finds what stands beside it."""
    if str(ROOT / "examples") not in sys.path:
        sys.path.append(str(ROOT / "examples"))
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def write_gsm8k(folder):
    """Data in the format of GSM8K."""
    folder.mkdir(parents=True)
    for split, count in (("train", 12), ("test", 6)):
        rows = [
            {
                "question": f"Ann has {number} pens and buys {count} more. How many has she?",
                "answer": f"She has {number}+{count}=<<{number}+{count}={number + count}>>{number + count}.\n"
                f"#### {number + count}",
            }
            for number in range(2, 2 + count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


SCHEMAS = {
    "pets": {"owner": ["owner_id", "Name"], "pet": ["pet_id", "owner_id", "weight"]},
    "shops": {"shop": ["shop_id", "city", "year opened"]},
}


def write_spider(folder, with_tables=True):
    """Data in the format of Spider: a database for training, another one for testing."""
    entries = []
    for name, schema in SCHEMAS.items():
        path = folder / "database" / name / f"{name}.sqlite"
        path.parent.mkdir(parents=True)
        with closing(sqlite3.connect(path)) as connection:
            for table, columns in schema.items():
                names = ", ".join(f'"{column}"' for column in columns)
                connection.execute(f"CREATE TABLE {table} ({names})")
                for row in range(3):
                    connection.execute(f"INSERT INTO {table} VALUES ({', '.join([str(row)] * len(columns))})")
            connection.commit()
        tables = list(schema)
        columns = [[-1, "*"]] + [[tables.index(table), column] for table in tables for column in schema[table]]
        words = [[number, column.lower().replace("_", " ")] for number, column in columns]
        entry = {"db_id": name, "table_names_original": tables, "column_names_original": columns}
        entries.append(
            {**entry, "table_names": tables, "column_names": words, "column_types": ["number"] * len(columns)}
        )
    if with_tables:
        (folder / "tables.json").write_text(json.dumps(entries))
    train, dev = [], []
    for number in range(8):
        query = f"SELECT pet_id FROM pet WHERE weight > {number}"
        train.append({"db_id": "pets", "question": f"Which pets weigh over {number}?", "query": query})
    for number in range(5):
        query = f"SELECT shop_id FROM shop WHERE city  = {number} ;"
        dev.append({"db_id": "shops", "question": f"Which shops are in {number}?", "query": query})
    (folder / "train.json").write_text(json.dumps(train))
    (folder / "dev.json").write_text(json.dumps(dev))
    return folder
