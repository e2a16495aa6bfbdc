"""lm-eval: scores by log-probabilities of a prompt, answers over completions and chat."""

import json

import lm_eval
import pytest
from conftest import TOKENIZER
from lm_eval.tasks import TaskManager

CLIENT, PACKAGE = "lm-eval", "lm-eval"
QUESTIONS = [{"question": f"{word} is a", "choices": ["city.", "number."], "answer": 0} for word in ("Paris", "Oslo")]
COMMON = {
    "dataset_path": "json",
    "validation_split": "validation",
    "doc_to_text": "{{question}}",
    "num_fewshot": 0,
    "metadata": {"version": 1},
}
TASKS = {
    "scored": {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    },
    "answered": {
        "output_type": "generate_until",
        "doc_to_target": "city",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture
def evaluate(demo, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    files = {"dataset_kwargs": {"data_files": {"validation": str(tmp_path / "q.jsonl")}}}
    for name, task in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"task": name, **COMMON, **files, **task}))

    def evaluate(task: str, kind: str, path: str, **more):
        arguments = {"model": demo.model, "base_url": f"{demo.url}{path}", "tokenizer": str(TOKENIZER)}
        arguments |= {"tokenizer_backend": "huggingface", "max_length": 512, "max_retries": 1, **more}
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        found = lm_eval.simple_evaluate(
            model=kind,
            model_args=arguments,
            tasks=[task],
            task_manager=manager,
            apply_chat_template=kind == "local-chat-completions",
            bootstrap_iters=0,
        )
        return found["samples"][task]

    return evaluate


@pytest.mark.parametrize("more", [{}, {"num_concurrent": 2}, {"tokenized_requests": False}], ids=["one", "two", "text"])
def test_scores(evaluate, more) -> None:
    samples = evaluate("scored", "local-completions", "/v1/completions", **more)
    assert len(samples) == len(QUESTIONS)
    for sample in samples:
        assert all(score < 0 for ((score, _),) in sample["resps"])


def test_conversation(evaluate) -> None:
    for kind, path in (
        ("local-completions", "/v1/completions"),
        ("local-chat-completions", "/v1/chat/completions"),
    ):
        samples = evaluate("answered", kind, path)
        assert all(isinstance(sample["resps"][0][0], str) for sample in samples)


def test_refusal(evaluate, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-nobody")
    with pytest.raises(Exception, match="401"):
        evaluate("scored", "local-completions", "/v1/completions")
