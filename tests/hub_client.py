"""A process that runs code for tests against a Hub whose address stood in its environment when it was imported."""

import json
import os
import sys
import traceback
import warnings


answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not get between the answers
warnings.filterwarnings("ignore")

for line in sys.stdin:
    job = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    if job["token"]:
        os.environ["HF_TOKEN"] = job["token"]
    names = dict(job["names"])
    try:
        exec("from cllm_hf.trajectories.hub import check_can_push, push_trajectories", names)
        exec("from cllm_hf import load_trajectories\nfrom datasets import load_dataset", names)
        exec(job["code"], names)
        answer = {"result": names.get("result")}
    except Exception as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        answer = {"error": kinds, "message": str(error), "trace": traceback.format_exc()}
    print(json.dumps(answer), file=answers, flush=True)
