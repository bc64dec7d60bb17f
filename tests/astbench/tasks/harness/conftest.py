"""A small model with a start token and a chat template, and tasks in lm-eval's YAML that need no network."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from astbench.backbones.tokenizers import train_byte_tokenizer
from astbench.tasks.lm import demo

START = "<s>"
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}[go]{% endif %}"
)
WORDS = "ship harbour captain storm island lighthouse sailor anchor".split()


@pytest.fixture(scope="session")
def backbone(tmp_path_factory):
    """A folder with a random Llama, whose tokenizer begins every text with `<s>` and has a chat template."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_byte_tokenizer([demo.generate("test", 2).text], 400)
    tokenizer.add_special_tokens({"bos_token": START, "eos_token": "</s>"})
    inner = tokenizer.backend_tokenizer
    inner.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", special_tokens=[(START, inner.token_to_id(START))]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=START, eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(4)
    settings = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=2048, **settings))
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.data.mul_(4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def own_tasks(tmp_path_factory):
    """A folder with a task that chooses, one that writes, and the Python code that scores the second."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"text": f"The {word} and the {WORDS[n - 1]} met at the {WORDS[n - 2]}.", "choices": WORDS[:3], "answer": n % 3}
        for n, word in enumerate(WORDS)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = f"cache_dir: {folder / 'cache'}, data_files: {{test: {folder / 'rows.jsonl'}}}"
    data = f"dataset_path: json\ndataset_kwargs: {{{kept}}}\ntest_split: test\n"
    (folder / "own_choice.yaml").write_text(
        f"task: own_choice\n{data}output_type: multiple_choice\ndoc_to_text: '{{{{text}}}} Who came next? The'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: answer\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\nmetadata: {version: 2.0}\n"
    )
    (folder / "own_write.yaml").write_text(
        f"task: own_write\n{data}output_type: generate_until\ndoc_to_text: '{{{{text}}}} Then'\n"
        "doc_to_target: '{{choices[answer]}}'\nprocess_results: !function scoring.letters\n"
        "generation_kwargs: {max_gen_toks: 6, until: [], do_sample: false}\n"
        "metric_list: [{metric: letters, aggregation: mean, higher_is_better: true}]\n"
    )
    (folder / "own_unsafe.yaml").write_text(
        f"task: own_unsafe\n{data}output_type: generate_until\ndoc_to_text: '{{{{text}}}}'\ndoc_to_target: answer\n"
        "unsafe_code: true\n"
    )
    trace = folder / "trace"
    (folder / "scoring.py").write_text(
        "from pathlib import Path\n\n\ndef letters(doc, results):\n"
        f"    Path({str(trace)!r}).touch()\n    return {{'letters': float(len(results[0]))}}\n"
    )
    return folder


@pytest.fixture(scope="session", autouse=True)
def indexed_once():
    """lm-eval reads its 14,000 task files for every task manager; here once a session."""
    from lm_eval.tasks import _index, manager

    build, known = _index.TaskIndex.build, {}

    def remembered(paths, **options):
        first, *others = paths
        if first not in known:
            known[first] = build([first], **options)
        index = dict(known[first])
        for path in others:
            index.update(build([Path(path)], **options))
        return index

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manager.TaskIndex, "build", staticmethod(remembered))
        yield
