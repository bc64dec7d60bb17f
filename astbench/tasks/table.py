"""The table: every built-in task by name, its LightningModule, LightningDataModule and options. Imports nothing heavy.

To add one: its file or folder here, its row below, its test, its recipe.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Task:
    """One row of the table of tasks.

    Attributes:
        name: What `--task` takes.
        summary: One line for `astbench list`.
        module: `module:Class` of the LightningModule.
        data: `module:Class` of the LightningDataModule.
        config: `module:Class` of the options under `--task.`, torch-free.
        sources: What `--data.source` takes, the default first.
        real: How to run it on the real data set.
        metric: The headline metric's name.
        commands: Which of fit, validate, test and predict it can do.
        eval_limit: The option under `--data.` that evaluates on less.
        demo: Defaults that were measured for the first source, which is generated, for options that exist with the
            attention.
    """

    name: str
    summary: str
    module: str
    data: str
    config: str
    sources: tuple[str, ...]
    real: str
    metric: str
    commands: tuple[str, ...] = ("fit", "validate", "test", "predict")
    eval_limit: str = "max_eval"
    demo: dict[str, Any] = field(default_factory=dict)

    def load(self) -> tuple[Any, Any, Any]:
        """(module class, data class, config class), imported now."""
        return _attribute(self.module), _attribute(self.data), _attribute(self.config)


def _attribute(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="squad",
            summary="SQuAD v1.1 span extraction over Wikipedia paragraphs (EM, F1)",
            module="astbench.tasks.qa.task:SpanQA",
            data="astbench.tasks.qa.data:SquadData",
            config="astbench.tasks.qa.config:SpanQAConfig",
            sources=("local", "hub"),
            real="--data.source=hub",
            metric="f1",
        ),
        Task(
            name="triviaqa",
            summary="TriviaQA span extraction over long documents (EM, F1 over aliases)",
            module="astbench.tasks.qa.task:SpanQA",
            data="astbench.tasks.qa.data:TriviaQAData",
            config="astbench.tasks.qa.config:SpanQAConfig",
            sources=("demo", "hub", "local"),
            real="--data.source=hub --backbone=FacebookAI/roberta-base --backbone.max_positions=4096 "
            "--data.max_length=4096",
            metric="f1",
            demo={
                "data.demo_train": 14_400,
                "data.batch_size": 32,
                "data.negative_share": 0.0,
                "trainer.max_steps": 450,
                # Far below the usual norm, so that a step's size hardly depends on the batch: after hundreds of
                # steps of almost no loss, Adam turned the first surprise into a leap that lost what was learned.
                "trainer.gradient_clip_val": 0.05,
                "optim.lr": 3e-3,
                "optim.beta2": 0.98,
                "optim.warmup_steps": 50,
                "attention.block_size": 16,
                "attention.query_group": 16,
                "attention.density": 0.25,
                "attention.min_blocks": 6,
                "attention.local_blocks": 1,
                # A first block that every group sees is a relay to all others: with it, random blocks suffice.
                "attention.sink_block": False,
                # Dense first, then ever fewer dense steps: matching names is learned before choosing where to look
                # for them, and is kept up until the choice is learned too.
                "attention.density_start": 1.0,
                "attention.density_hold": 100,
                "attention.density_steps": 400,
                "attention.density_schedule": "mixed",
                "attention.sample": True,
                # Most rows of a layer attend to words like "the": in the end only the task knows what matters.
                "attention.distill_fraction": 1.0,
                "attention.distill_decay_steps": 250,
            },
        ),
        Task(
            name="wikitext103",
            summary="WikiText-103 language modelling (perplexity per token and word)",
            module="astbench.tasks.lm.task:LanguageModel",
            data="astbench.tasks.lm.data:WikiTextData",
            config="astbench.tasks.lm.config:LanguageModelConfig",
            sources=("demo", "hub", "local"),
            real="--data.source=hub --backbone=small",
            metric="perplexity",
            eval_limit="windows",
            demo={
                "backbone.name": "llama-copying-tiny",
                "data.documents": "separate",
                "data.context": 320,
                "data.batch_size": 16,
                "data.vocab_size": 1024,
                "trainer.max_steps": 400,
                "optim.lr": 5e-3,
                "optim.beta2": 0.98,
                # An article's first and last part are at least 48 tokens apart.
                "attention.window": 16,
                "attention.stride": 32,
                "attention.block_size": 16,
                "attention.density": 0.25,
                "attention.min_blocks": 4,
            },
        ),
        Task(
            name="wmt14",
            summary="WMT14 English-German translation, either direction (BLEU, chrF)",
            module="astbench.tasks.mt.task:Translation",
            data="astbench.tasks.mt.data:TranslationData",
            config="astbench.tasks.mt.config:TranslationConfig",
            sources=("demo", "hub", "local"),
            real="--data.source=hub --backbone=small",
            metric="bleu",
            demo={
                # One token a word: sentences of 9 to 38 tokens.
                "data.vocab_size": 1000,
                "data.max_length": 48,
                "trainer.max_steps": 800,
                "optim.lr": 3e-3,
                "optim.beta2": 0.98,
                "optim.warmup_steps": 100,
                # Sentences are short: blocks of two words, and a choice for every word.
                "attention.block_size": 2,
                "attention.query_group": 1,
                "attention.density": 0.25,
                "attention.min_blocks": 2,
                "attention.sink_block": False,
                # Dense first: which words belong together is learned before choosing among them.
                "attention.density_start": 1.0,
                "attention.density_hold": 100,
                "attention.density_steps": 400,
                "attention.density_schedule": "mixed",
                "attention.sample": True,
                "attention.distill_fraction": 1.0,
            },
        ),
        Task(
            name="mqar",
            summary="Multi-query associative recall: a key asks for the value that stood beside it (accuracy)",
            module="astbench.tasks.recall.task:Recall",
            data="astbench.tasks.recall.mqar:MQARData",
            config="astbench.tasks.recall.config:RecallConfig",
            sources=("generated",),
            real="",
            metric="accuracy",
            commands=("fit", "validate", "test"),
            demo={
                # What is asked is whether a far key is found, not how long heads that look for keys take to form.
                "backbone.name": "induction-tiny",
                "data.batch_size": 16,
                "data.num_eval": 200,
                "trainer.max_steps": 200,
                "optim.lr": 3e-3,
                "optim.beta2": 0.98,
                "optim.warmup_steps": 20,
                # The pairs fill 16 blocks of 64, of which a query may choose seven, beside its own.
                "attention.block_size": 4,
                "attention.density": 0.125,
                "attention.min_blocks": 8,
                "attention.sink_block": False,
                "attention.distill_fraction": 1.0,
            },
        ),
        Task(
            name="needle",
            summary="Multi-key needles in a haystack: a secret found again in a long text (accuracy by depth)",
            module="astbench.tasks.recall.task:Recall",
            data="astbench.tasks.recall.needle:NeedleData",
            config="astbench.tasks.recall.config:RecallConfig",
            sources=("generated",),
            real="",
            metric="accuracy",
            commands=("fit", "validate", "test"),
            demo={
                "backbone.name": "induction-tiny",
                "data.num_eval": 110,
                "trainer.max_steps": 200,
                "optim.lr": 1e-3,
                "optim.beta2": 0.98,
                # With the default blocks of 16, at least 8 of them, all 128 tokens would be kept.
                "attention.block_size": 4,
                "attention.density": 0.125,
                "attention.min_blocks": 4,
                "attention.sink_block": False,
                "attention.distill_fraction": 1.0,
                # Dense first: sparse from the start, it finds one of the needles and not the one asked for.
                "attention.density_start": 1.0,
                "attention.density_hold": 60,
                "attention.density_steps": 140,
                "attention.density_schedule": "mixed",
            },
        ),
        Task(
            name="images",
            summary="CIFAR-10 by a Compact Convolutional Transformer (accuracy)",
            module="astbench.tasks.images.task:ImageClassifier",
            data="astbench.tasks.images.data:ImageData",
            config="astbench.tasks.images.config:ImageClassifierConfig",
            sources=("demo", "local", "hub"),
            real="--data.source=hub",
            metric="accuracy",
            demo={
                "data.batch_size": 32,
                "trainer.max_steps": 500,
                "optim.lr": 2e-3,
                "optim.beta2": 0.98,
                # 8 x 8 tokens, row by row: a window reaches one row up and down, a block is half a row.
                "attention.window": 8,
                "attention.block_size": 4,
                "attention.query_group": 4,
                "attention.density": 0.25,
                "attention.min_blocks": 4,
                "attention.sink_block": False,
            },
        ),
        Task(
            name="lm_eval",
            summary="Any task of EleutherAI's lm-eval: RULER, LongBench and others (extra lmeval)",
            module="astbench.tasks.harness.task:Harness",
            data="astbench.tasks.harness.data:HarnessData",
            config="astbench.tasks.harness.config:HarnessConfig",
            sources=("lm_eval",),
            real="",
            metric="score",
            commands=("test",),
        ),
        *(
            Task(
                name=name,
                summary=f"Long Range Arena: {summary} (accuracy)",
                module="astbench.tasks.lra.task:SequenceClassifier",
                data=f"astbench.tasks.lra.data:{data}",
                config="astbench.tasks.lra.config:SequenceClassifierConfig",
                sources=sources,
                real="--data.source=local --data.path=FOLDER",
                metric="accuracy",
                commands=("fit", "validate", "test"),
            )
            for name, data, sources, summary in (
                ("lra_listops", "ListOpsData", ("generated", "local"), "nested list operations, ten classes"),
                ("lra_text", "TextData", ("local",), "IMDb reviews byte by byte, two classes"),
                ("lra_retrieval", "RetrievalData", ("local",), "pairs of papers byte by byte, does one cite the other"),
                ("lra_image", "ImageData", ("local",), "grey CIFAR-10 pixel by pixel, ten classes"),
                ("lra_pathfinder", "PathfinderData", ("generated", "local"), "are two marked ends those of one curve"),
            )
        ),
    )
}
