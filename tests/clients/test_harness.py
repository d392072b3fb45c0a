"""lm-evaluation-harness: `local-completions` over HTTP gives the scores of `tools/evaluate.py` on the same tasks."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stagdist.evaluation import harness
from tests.clients.conftest import Served
from tests.launch.runs import ROOT

pytestmark = pytest.mark.slow

CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = """
task: local_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}, {{metric: word_perplexity}}]
"""
UNTIL = """
task: local_until
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{text}}}}"
generation_kwargs: {{until: ["e"], max_gen_toks: 16, do_sample: false, temperature: 0.0}}
metric_list: [{{metric: exact_match}}]
"""
TASKS = "local_choice,local_rolling,local_until"


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with a task of each kind, which need no network."""
    rows = [
        {"question": f"def f{i}(", "choices": [" x", "self", f"{i}"], "answer": i % 3, "text": "import os\n" * (i + 1)}
        for i in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for text in (CHOICE, ROLLING, UNTIL):
        name = text.split()[1]
        (tmp_path / f"{name}.yaml").write_text(text.format(file=tmp_path / "rows.jsonl"))
    return tmp_path


def test_scores_over_http_are_those_of_the_evaluation(
    served: Served, client: Callable[..., subprocess.CompletedProcess[str]], tasks: Path, tmp_path: Path
) -> None:
    for module in harness.PACKAGES:
        pytest.importorskip(module, reason="needs the extra `eval`; `make clients` installs it")
    address = f"model=tiny,base_url={served.url}/v1/completions,tokenizer_backend=remote,max_length=255"
    done = client(
        "lm_eval", "run", "--model", "local-completions", "--model_args", address, "--include_path", str(tasks),
        "--tasks", TASKS, "--batch_size", "4", "--output_path", "theirs",
        cwd=tmp_path, HF_DATASETS_CACHE=str(tmp_path / "cache"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (written,) = tmp_path.glob("theirs/**/results_*.json")
    over_http = json.loads(written.read_text())["results"]
    expected = evaluated(served, tasks, tmp_path)
    assert over_http.keys() == expected.keys() == set(TASKS.split(","))
    for task, scores in expected.items():
        for name, value in scores.items():
            if isinstance(value, float) and "stderr" not in name:
                assert over_http[task][name] == pytest.approx(value, rel=1e-5), (task, name)


def evaluated(served: Served, tasks: Path, folder: Path) -> Any:
    """Results of `tools/evaluate.py harness`."""
    words = [sys.executable, str(ROOT / "tools" / "evaluate.py"), "harness", "--model", str(served.model)]
    words += ["--include-path", str(tasks), "--tasks", TASKS, "--device", "cpu", "--json", str(folder / "ours.json")]
    variables = os.environ | {"HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    done = subprocess.run(words, cwd=folder, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((folder / "ours.json").read_text())["results"]
