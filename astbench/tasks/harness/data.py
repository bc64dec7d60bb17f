"""lm-eval's tasks as a data module: which are asked, how their prompts are made, and what the record says of them."""

from __future__ import annotations

import hashlib
from typing import Any, ClassVar, Literal

from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from astbench.backbones.load import require_positions
from astbench.backbones.tokenizers import load_tokenizer, saved_tokenizer
from astbench.errors import ConfigError
from astbench.tasks.base import TaskData, at_least
from astbench.tasks.harness.catalogue import OTHER_SEED, described, load_tasks, require_lm_eval
from astbench.tasks.harness.haystack import Haystack
from astbench.tasks.harness.prompts import Prompt


class HarnessData(TaskData):
    """Tasks of EleutherAI's lm-eval (extra `lmeval`), which fetches their data or generates them.

    Args:
        source: lm-eval's task manager.
        tasks: Names of tasks, groups or tags, separated by commas: `niah_single_1,ruler_vt`, `longbench`.
        max_eval: Ask at most this many items of each task, the first ones.
        max_length: Most tokens of a prompt and what is written behind it; texts that are generated (RULER) are made
            as long as that.
        lengths: Generate texts of these lengths instead, each at most `max_length`.
        too_long: What becomes of a prompt that does not fit: "refuse" ends the run before anything is computed, "cut"
            takes tokens off its beginning, as lm-eval does.
        num_fewshot: Solved examples before each item; as the task says if not given.
        chat_template: Apply the tokenizer's chat template.
        system: With `chat_template`: the system's turn.
        haystack: Text file, or folder of `.txt` files, in place of the essays that RULER hides its needles in and that
            only the network has.
        include: Folder with tasks of your own in lm-eval's YAML. Python code that they name runs; a config cannot ask
            for it, only the command line.
    """

    length_option: ClassVar[str] = "max_length"
    pads: ClassVar[bool] = False
    code_options: ClassVar[tuple[str, ...]] = ("include",)
    eval_batch_size = 1

    def __init__(
        self,
        source: Literal["lm_eval"] = "lm_eval",
        tasks: str = "",
        max_eval: int | None = None,
        max_length: int = 4096,
        lengths: list[int] | None = None,
        too_long: Literal["refuse", "cut"] = "refuse",
        num_fewshot: int | None = None,
        chat_template: bool = False,
        system: str = "",
        haystack: str = "",
        include: str = "",
    ) -> None:
        super().__init__(source)
        require_lm_eval()
        self.tasks = list(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))
        if not self.tasks:
            raise ConfigError("--data.tasks=NAMES is required, such as niah_single_1; `lm-eval ls tasks` lists them")
        at_least(1, max_eval=max_eval)
        at_least(2, "tokens", max_length=max_length)
        at_least(0, num_fewshot=num_fewshot)
        self.lengths = lengths or [max_length]
        if wrong := [length for length in self.lengths if not 1 <= length <= max_length]:
            raise ConfigError(f"--data.lengths must lie between 1 and --data.max_length={max_length}, got {wrong[0]}")
        if system and not chat_template:
            raise ConfigError("--data.system is a turn of a chat; set --data.chat_template=true")
        self.max_eval, self.max_length, self.too_long = max_eval, max_length, too_long
        self.num_fewshot, self.chat_template, self.system = num_fewshot, chat_template, system
        self.haystack = Haystack.read(haystack) if haystack else None
        self.include = include
        self.loaded: dict[str, Any] = {}
        self.prompts: list[Prompt] = []
        self.audit: dict[str, Any] = {}

    @property
    def fewshot_seed(self) -> int:
        """Of the choice of solved examples."""
        return OTHER_SEED + self.seed

    @property
    def how(self) -> dict[str, Any]:
        """How prompts are made, as lm-eval's functions take it."""
        return {
            "limit": self.max_eval,
            "system_instruction": self.system or None,
            "apply_chat_template": self.chat_template,
            "fewshot_as_multiturn": self.chat_template,
        }

    def setup(self, stage: str) -> None:
        """Load the tasks.

        Raises:
            ConfigError: a chat template that is not there, or few-shot examples of a task that has none.
            AstbenchError: see :func:`load_tasks`.
        """
        if self._tokenizer is not None:
            return
        folder = self.tokenizer_folder
        self._tokenizer = load_tokenizer(self.backbone) if folder is None else saved_tokenizer(folder)
        if self.chat_template and self._tokenizer.chat_template is None:
            raise ConfigError("--data.chat_template=true: the backbone's tokenizer has no chat template")
        self.loaded = dict(
            load_tasks(
                self.tasks,
                include=self.include,
                lengths=self.lengths,
                tokenizer=self._tokenizer,
                haystack=self.haystack,
                seed=self.seed,
            )
        )
        for task in self.loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            if self.num_fewshot is not None and own != 0:  # tasks that say 0 cannot take any
                task.set_config(key="num_fewshot", value=self.num_fewshot)
            elif own is None:
                task.set_config(key="num_fewshot", value=0)
        if self.haystack and not self.haystack.used:
            self.notes.append("--data.haystack was not read: none of these tasks asks for essays")

    def check_model(self, model: PreTrainedModel) -> None:
        """Refuse inputs longer than the model's positions."""
        require_positions(model, self.max_length, f"--data.max_length={self.max_length}")

    def test_dataloader(self) -> DataLoader[Any]:
        """One batch: lm-eval itself goes through the items."""
        everything: Any = [{"everything": True}]
        return DataLoader(everything, batch_size=None)

    def describe(self) -> dict[str, Any]:
        """What the record says of the data."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            digest.update(f"{prompt.task} {prompt.item} {prompt.ids} ".encode())
        essays = self.haystack if self.haystack and self.haystack.used else None
        return {
            "source": self.source,
            "path": None,
            "tasks": described(self.loaded, self.include),
            "examples": {"test": len({(prompt.task, prompt.item) for prompt in self.prompts})},
            "length": self.max_length,
            "haystack_sha256": essays.sha256 if essays else None,
            "fingerprints": {"test": digest.hexdigest()[:16]},
            "notes": list(self.notes),
        }
