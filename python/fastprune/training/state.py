"""The state of a training between two steps: taken, and put back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastprune.training.parts import Place

if TYPE_CHECKING:
    from fastprune.training.loop import Trainer


def state_of(trainer: Trainer) -> dict[str, Any]:
    """Everything that the rest of the run depends on. Collective."""
    done = trainer.place.phase == len(trainer.method.phases)
    return {
        "settings": trainer.settings.to_dict(),
        "place": dict(vars(trainer.place)),
        # Not state_dict(): it clears pruned weights, and storing must not change a run.
        "model": dict(_named(trainer.model)),
        "optimizer": None if done else trainer.optimizer.state_dict(),
        "scheduler": None if done else trainer.scheduler.state_dict(),
        "method": trainer.method.state_dict(),
        "random": _random(trainer),
        "sums": trainer.world.gather(trainer.sums),
        "epoch": dict(trainer.epoch),
        "log": [dict(entry) for entry in trainer.log.entries],
    }


def restore_(trainer: Trainer, state: Mapping[str, Any]) -> None:
    """Go on from what :func:`state_of` returned, on a trainer with the same settings."""
    trainer.place = Place(**state["place"])
    done = trainer.place.phase == len(trainer.method.phases)
    phase = min(trainer.place.phase, len(trainer.method.phases) - 1)
    trainer.place.phase = phase
    trainer.model.train()
    trainer.optimizer = trainer.method.resume(phase, trainer.model, trainer.make_optimizer)
    trainer.ready()
    trainer.method.load_state_dict(state["method"])
    if not done:
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.scheduler.load_state_dict(state["scheduler"])
    with torch.no_grad():
        for name, t in _named(trainer.model):
            t.copy_(state["model"][name])
    if done:
        trainer.place.phase += 1
    trainer.sums.copy_(state["sums"][trainer.world.rank])
    trainer.epoch = dict(state["epoch"])
    own = state["random"][trainer.world.rank]
    torch.set_rng_state(own["cpu"])
    if own["cuda"] is not None:
        torch.cuda.set_rng_state(own["cuda"], trainer.world.device)


def _random(trainer: Trainer) -> list[dict[str, Tensor | None]]:
    cpu = trainer.world.gather(torch.get_rng_state())
    if trainer.world.device.type != "cuda":
        return [{"cpu": t, "cuda": None} for t in cpu]
    cuda = trainer.world.gather(torch.cuda.get_rng_state(trainer.world.device))
    return [{"cpu": a, "cuda": b} for a, b in zip(cpu, cuda, strict=True)]


def _named(model: nn.Module) -> list[tuple[str, Tensor]]:
    """All parameters and stored buffers but masks, which pruners store."""
    buffers = [
        (f"{prefix}.{n}" if prefix else n, b)
        for prefix, module in model.named_modules()
        for n, b in module.named_buffers(recurse=False)
        if n != "weight_mask" and n not in module._non_persistent_buffers_set
    ]
    return [*((n, p.detach()) for n, p in model.named_parameters()), *buffers]
