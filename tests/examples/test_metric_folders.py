"""`evaluate` loads metrics from their folders, where it copies what the own file of each imports, and no more."""

import sqlite3
from contextlib import closing
from pathlib import Path

import evaluate
import pytest


METRICS = Path(__file__).parents[2] / "examples" / "metrics"


@pytest.fixture(scope="module", autouse=True)
def copies(tmp_path_factory):
    """Python finds all copies in the first folder that there was."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluate.config.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


def test_gsm8k():
    metric = evaluate.load(str(METRICS / "gsm8k_accuracy"))
    assert metric.compute(predictions=["#### 1", "#### 2"], references=["#### 1", "#### 3"])["accuracy"] == 0.5


def test_spider(tmp_path):
    path = tmp_path / "pets.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript("CREATE TABLE pet (name, age); INSERT INTO pet VALUES ('Rex', 3), ('Tom', 7);")
    metric = evaluate.load(str(METRICS / "spider_accuracy"))
    reference = {"query": "SELECT name, age FROM pet", "database": str(path)}
    result = metric.compute(predictions=["SELECT age, name FROM pet", "DROP TABLE pet"], references=[reference] * 2)
    assert result["accuracy"] == result["exact_match"] == 0.5 and result["kinds"] == {"right": 1, "forbidden": 1}
