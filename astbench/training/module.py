"""What every task's LightningModule shares: backbone, swapped attention, losses, optimizer, bitwise resume."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from astbench import console
from astbench.backbones.adapters import adapter_folder, start_from_adapter
from astbench.backbones.depth.adaptive import DEPTH, AdaptiveDepth
from astbench.backbones.load import load_backbone
from astbench.backbones.presets import BackboneConfig, Head
from astbench.backbones.swap import WHERE, SwapHandle, Where, swap_attention
from astbench.errors import CheckpointError, ConfigError, NumericError
from astbench.runs.checkpoint_checks import check_content, check_weights
from astbench.runs.checkpoints import read_checkpoint
from astbench.training.averaging import final_weights
from astbench.training.depth import trained_policy
from astbench.training.optim import OptimConfig
from astbench.training.policy_gradient import policy_loss
from astbench.training.seeds import derived_seed, seed_devices
from astbench.training.sharding import FullyShardedStrategy, shard
from astbench_registry import Pattern


class TaskModule(pl.LightningModule):
    """Base of the tasks: a Hugging Face model with a registered attention in it.

    Args:
        attention: `{"name": ..., **options}`, plain data, so that checkpoints load with `weights_only`.
        backbone: Fields of :class:`BackboneConfig`.
        optim: Fields of :class:`OptimConfig`.
        task: Fields of the task's own config.
        seed: Initial weights and every random draw derive from it.
        init_from: Run folder whose trained backbone to start from, or an adapter.
        depth: `{"name": ..., **options}` of a depth policy; None runs every layer.
    """

    head: ClassVar[Head]
    fixed_task_options: ClassVar[tuple[str, ...]] = ()  # task options that belong to trained weights
    where: Sequence[Where] = tuple(dict.fromkeys(WHERE.values()))  # which attention is replaced

    def __init__(
        self,
        attention: dict[str, Any],
        backbone: dict[str, Any] | None = None,
        optim: dict[str, Any] | None = None,
        task: dict[str, Any] | None = None,
        seed: int = 0,
        init_from: str | None = None,
        depth: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.attention = dict(attention)
        self.backbone = BackboneConfig(**(backbone or {}))
        self.optim = OptimConfig(**(optim or {}))
        self.seed = seed
        self.init_from = init_from
        self.depth = dict(depth) if depth else None
        self.adaptive: AdaptiveDepth | None = None
        self._to_observe = self._to_budget = self.backbone.calibrate
        self._has_share = False  # of a calibrated budget, from another run
        self.model: PreTrainedModel | None = None
        self.handle: SwapHandle | None = None
        self.answers: dict[str, str] = {}

    @classmethod
    def patterns(cls, task: Any) -> dict[str, Pattern]:
        """How attention works at each place where these task options replace it."""
        return {"encoder_self": "bidirectional_self"} if cls.head != "causal_lm" else {"decoder_self": "causal_self"}

    @classmethod
    def needs(cls, command: str, data: Any) -> dict[str, bool]:
        """What a command asks of the attention with these data options, as :meth:`Capabilities.problems` takes it."""
        return {}

    def configure_model(self) -> None:
        """Build the backbone and swap its attention, once; the data module knows the tokenizer by now."""
        if self.model is not None:
            return
        with _float32():
            torch.manual_seed(self.seed)
            self.model = self.build_model()
            self.trainer.datamodule.check_model(self.model)  # type: ignore[attr-defined]
            options = {key: value for key, value in self.attention.items() if key != "name"}
            # A generator of its own for the variant's parameters: the backbone's are the same for every variant.
            torch.manual_seed(self.seed + 1)
            self.handle = swap_attention(self.model, self.attention["name"], options, where=self.where)
        if self.depth is not None:
            self._adapt_depth(self.depth)
        if self.backbone.gradient_checkpointing:
            # transformers 5.23 calls it by another name and warns of the old one.
            name = "activation_checkpointing_enable"
            enable = getattr(self.model, name, None) or self.model.gradient_checkpointing_enable
            # Not the reentrant kind, which would lose the gradients of the attention's own losses.
            enable({"use_reentrant": False})
        if self.backbone.compile and self._trains:
            self._compile_layers()
        if self.init_from:
            self._load_trained_backbone(self.init_from)
        if self.optim.train != "all":
            self._freeze_backbone()
        # Pretrained models come in evaluation mode.
        self.model.train()
        if isinstance(self.trainer.strategy, FullyShardedStrategy):
            shard(self, self._layers("--trainer.strategy=fsdp2"))

    @property
    def _trains(self) -> bool:
        return bool(self.trainer.state.fn == TrainerFn.FITTING)

    def _adapt_depth(self, depth: dict[str, Any]) -> None:
        """Put the policy on the model, its first weights from a generator of its own."""
        if self.trainer.world_size > 1 and self._trains:
            raise ConfigError(
                f"--depth={depth['name']} trains in one process: layers that one process leaves out have no gradient "
                "there; set --trainer.devices=1"
            )
        torch.manual_seed(self.seed + 2)
        options = {key: value for key, value in depth.items() if key != "name"}
        self.adaptive = AdaptiveDepth(self.swapped, depth["name"], options)

    def build_model(self) -> PreTrainedModel:
        """The backbone, before its attention is swapped."""
        tokenizer = self.trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        return load_backbone(self.backbone, self.head, tokenizer=tokenizer)

    def _load_trained_backbone(self, folder: str) -> None:
        """Weights of another run; the attention's own parameters only when that run had the same attention.

        Of an adapter the attention's own alone.
        """
        assert self.model is not None and self.handle is not None
        adapter = adapter_folder(folder)
        if adapter is not None:
            start_from_adapter(self.handle, adapter)
            self._own_weights_are_trained(set(self.handle.state_dict()))
            return
        checkpoint = check_content(read_checkpoint(folder), folder)
        same_attention = checkpoint["hyper_parameters"]["attention"]["name"] == self.attention["name"]
        weights = {
            name.removeprefix("model."): value
            for name, value in final_weights(checkpoint).items()
            if name.startswith("model.")
        }
        own = set(self.handle.state_dict())
        mine = self.model.state_dict()
        policy, note = trained_policy(
            folder, checkpoint["hyper_parameters"].get("depth"), self.depth, mine, weights, training=self._trains
        )
        self.handle.notes += [note] if note else []
        wanted = {n for n in mine if n not in own and not n.startswith(f"{DEPTH}.")}
        wrong = sorted(n for n in wanted if n not in weights or weights[n].shape != mine[n].shape)
        if wrong:
            raise CheckpointError(f"--init_from={folder} was trained on another backbone: {wrong[0]} differs")
        fitting = {n for n in own & weights.keys() if same_attention and weights[n].shape == mine[n].shape}
        self._own_weights_are_trained(fitting)
        if own - fitting:
            self.handle.notes.append(f"{len(own - fitting)} of the attention's {len(own)} own tensors start anew")
        usable = {n: w for n, w in weights.items() if n in wanted | fitting | policy}
        self.model.load_state_dict(usable, strict=False)

    def _own_weights_are_trained(self, names: set[str]) -> None:
        """The attention's own weights of these names begin where another run ended: calibration would undo that."""
        if names:
            self._to_observe = 0
        shares = {name for name in self.swapped.state_dict() if name.endswith(".calibrated_share")}
        if shares and shares <= names:
            self._to_budget, self._has_share = 0, True

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights that do not fit, in one line."""
        check_weights(checkpoint["state_dict"], self.state_dict(), "the checkpoint")

    def _compile_layers(self) -> None:
        """Layer by layer: one short compilation serves them all, and masks are made outside of it."""
        for layer in self._layers("--backbone.compile"):
            layer.compile()

    def _layers(self, option: str) -> list[nn.Module]:
        assert self.model is not None
        layers: list[nn.Module] = [m for m in self.model.modules() if isinstance(m, GradientCheckpointingLayer)]
        if not layers:
            raise ConfigError(f"{option} knows no layers in {type(self.model).__name__}; leave it off")
        return layers

    def _freeze_backbone(self) -> None:
        assert self.model is not None and self.handle is not None
        if self.optim.train == "depth":
            own = {id(p) for p in self.adaptive.own_parameters()} if self.adaptive else set()
            lacking = "a depth policy that learns: --depth=transformer_inverse"
        else:
            own = {id(p) for p in self.handle.parameters()}
            lacking = f"an attention with parameters; {self.attention['name']} has none"
        if not own:
            raise ConfigError(f"--optim.train={self.optim.train} needs {lacking}")
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in own)

    @property
    def swapped(self) -> SwapHandle:
        """The handle of the swapped attention."""
        assert self.handle is not None, "configure_model() has not run"
        return self.handle

    def total_loss(self, task_loss: Tensor, each: Tensor) -> Tensor:
        """The task's loss and the attention's auxiliary ones, each logged; not finite ends the run.

        Args:
            task_loss: Of the batch.
            each: `(batch,)`, of each sequence as the attention met them, for attention that learns by policy gradient.
        """
        auxiliary = self.swapped.losses()
        log_prob = self.swapped.log_prob()
        if log_prob is not None:
            auxiliary["policy"] = policy_loss(each, log_prob)
        if self.adaptive is not None:
            auxiliary |= {f"depth_{name}": loss for name, loss in self.adaptive.losses(each).items()}
        total = task_loss + sum(auxiliary.values()) if auxiliary else task_loss
        if not torch.isfinite(total):
            parts = {
                "task": float(task_loss.detach()),
                **{n: float(v.detach()) for n, v in auxiliary.items()},
            }
            raise NumericError(
                f"the loss is not finite at step {self.global_step}: {parts}; lower --optim.lr, or "
                "--trainer.gradient_clip_val (the weights are as they were before this step)"
            )
        self.log("train/loss", task_loss.detach(), prog_bar=True)
        for name, value in auxiliary.items():
            self.log(f"train/{name}", value.detach())
        return total

    def on_fit_start(self) -> None:
        """Calibrate the attention, if that is asked for."""
        self._calibrate()

    def on_validation_start(self) -> None:
        """As before training."""
        self._calibrate()

    def on_test_start(self) -> None:
        """As before training."""
        self._calibrate()

    def on_predict_start(self) -> None:
        """As before training."""
        self._calibrate()

    def _calibrate(self) -> None:
        """Let the attention look at the dense model, once and said; weights that it was given have that in them."""
        batches, observe, budget = self.backbone.calibrate, self._to_observe, self._to_budget
        self._to_observe = self._to_budget = 0
        trained = bool(self.trainer.ckpt_path)
        passes = [self.swapped.calibrating] if observe and not trained else []
        if self.swapped.budget_is_calibrated and not self._has_share and not trained:
            if not batches:
                console.say(
                    "note: --attention.budget=calibrated keeps what --attention.share says: no batches to "
                    "calibrate on, set --backbone.calibrate"
                )
            elif budget:  # a second time with what the first one found
                passes += [self.swapped.budgeting, self.swapped.budgeting]
            self._has_share = True
        transforming = self.swapped.transforming
        if transforming is not None and not transforming.started:
            passes.append(transforming.calibrating)
        if not passes:
            return
        if self.trainer.world_size > 1:
            raise ConfigError(
                "--backbone.calibrate takes one process: calibrate in a run of its own, and --init_from it"
            )
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.trainer.state.fn != TrainerFn.FITTING:
            data.setup("fit")
        assert self.model is not None
        training = self.model.training
        self.model.eval()
        for look in passes:
            with torch.no_grad(), look(), self.adaptive.full_depth() if self.adaptive else nullcontext():
                for batch in islice(data.train_dataloader(), batches):
                    self(self.trainer.strategy.batch_to_device(batch))
            found = f"--transform={transforming.name}" if transforming and look == transforming.calibrating else None
            console.say(f"calibrated: {found or self.swapped.notes[-1]}")
        self.model.train(training)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Randomness from (seed, batch number): a resumed run draws what the uninterrupted one would."""
        accumulate = self.trainer.accumulate_grad_batches
        count = self.global_step * accumulate + batch_idx % accumulate
        seed_devices(derived_seed(self.seed, count, self.global_rank))
        self.swapped.set_step(self.global_step)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """No update from a gradient that is not finite: better to stop with the weights intact."""
        if self.trainer.precision == "16-mixed":
            return  # its loss scaler meets infinities on purpose, and skips those steps itself
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if not torch.isfinite(norm):
            raise NumericError(
                f"the gradient is not finite at step {self.global_step}; lower --optim.lr, or "
                "--trainer.gradient_clip_val (the weights are as they were before this step)"
            )

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up, its schedule a function of the step and `max_steps` alone."""
        optim = self.optim
        own = {id(p): optim.attention_lr or optim.lr for p in self.swapped.parameters()}
        if self.adaptive is not None:
            policy_lr = getattr(self.adaptive.config, "lr", None) or optim.lr
            own |= {id(p): policy_lr for p in self.adaptive.own_parameters()}
        groups: dict[tuple[bool, float, bool], list[torch.nn.Parameter]] = {}
        for parameter in self.parameters():
            if parameter.requires_grad:
                lr, decays = own.get(id(parameter), optim.lr), parameter.dim() >= 2
                groups.setdefault((id(parameter) in own, lr, decays), []).append(parameter)
        optimizer = torch.optim.AdamW(
            [
                {
                    "params": parameters,
                    "lr": lr,
                    "weight_decay": optim.weight_decay if decays else 0.0,
                }
                for (_, lr, decays), parameters in groups.items()
            ],
            betas=(optim.beta1, optim.beta2),
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _factor(self, step: int) -> float:
        optim, steps = self.optim, self.trainer.max_steps
        if step < optim.warmup_steps:
            return (step + 1) / optim.warmup_steps
        if optim.schedule == "constant" or steps <= optim.warmup_steps:
            return 1.0
        left = max(0.0, (steps - step) / (steps - optim.warmup_steps))
        return left if optim.schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)

    def real_lengths(self, batch: dict[str, Any], pattern: Pattern) -> tuple[int, int] | None:
        """Queries and keys of the first sequence that are no padding, in attention of a pattern; None for all."""
        if "attention_mask" not in batch:
            return None
        real = int(batch["attention_mask"][0].sum())
        return real, real

    def input_tokens(self, batch: Any) -> int:
        """Input tokens of a batch, padding apart; 0 where there are none."""
        ids, real = (batch.get(name) if isinstance(batch, dict) else None for name in ("input_ids", "attention_mask"))
        if not isinstance(ids, Tensor):
            return 0
        return int(real.sum()) if isinstance(real, Tensor) else ids.numel()

    def counts(self) -> dict[str, int]:
        """Parameters in all, those that learn, and the attention's own."""
        own = sum(p.numel() for p in self.swapped.parameters())
        return {
            "total": sum(p.numel() for p in self.parameters()),
            "trainable": sum(p.numel() for p in self.parameters() if p.requires_grad),
            "attention": own,
        }


@contextmanager
def _float32() -> Iterator[None]:
    """Weights are drawn in float32 whatever --trainer.precision says: the same ones, and some draws know no half.

    Lightning makes half precision the default dtype, and turns the module into it afterwards.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
