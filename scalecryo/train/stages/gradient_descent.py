"""The paper's recipe and its controls: gradient descent on pose source and volume together."""

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from scalecryo.config import Config
from scalecryo.distributed.gradients import Replica
from scalecryo.distributed.world import World
from scalecryo.errors import CheckpointError, TrainingError
from scalecryo.model.autoencoder import AutoEncoder, AutoEncoderOutput, build_autoencoder
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.runs.monitor import PassReport
from scalecryo.runs.paused import Pause
from scalecryo.runs.pictures import pictures_of
from scalecryo.train.particle_source import BatchRequest, RunContext
from scalecryo.train.stage import Learned

RECENT_POSES = 1024


class GradientDescent:
    """Steps of Adam; a pass lasts until something is due to be said or kept."""

    name = "gradient descent"

    def __init__(self, context: RunContext, learned: Learned) -> None:
        """
        Args:
            context: of the run.
            learned: gets the model.

        Raises:
            ConfigError: the store lacks the level, or the encoder does not suit it.
        """
        self._context, self._learned = context, learned
        config, level = context.config, context.training_level
        self._model = build_autoencoder(config, level, context.rows).to(context.device)
        self._optimiser = build_optimiser(config, self._model)
        self._replica: Replica | None = None
        self._pixels = context.pixels(level)
        learned.model = self._model
        self._step, self._until = 0, 0  # the last one of the pass under way; 0: none is
        self._losses = torch.zeros((), device=context.device)  # since the last checkpoint
        self._loss, self._images = self._losses, 0
        self._last: tuple[ParticleImages, AutoEncoderOutput] | None = None
        self._recent: deque[tuple[Tensor, Tensor]] = deque()

    def request(self) -> BatchRequest:
        """Steps until scalars, pictures or a checkpoint are due."""
        config, step = self._context.config, self._step
        every = (config.monitor.every, config.monitor.pictures_every, config.train.checkpoint_every)
        last = min(config.train.steps, *((step // period + 1) * period for period in every))
        self._images, self._until = 0, last
        if self._replica is None:  # collective, and after the parameters were loaded
            volume = self._model.volume
            self._replica = Replica(
                self._model, self._context.world, config.optim.reduce_dtype, voxels=volume.voxels, window=volume.window
            )
        return BatchRequest((self._pixels,), config.train.batch_size, start=step, batches=last - step, padding=True)

    def step(self, *images: ParticleImages) -> None:
        """One optimiser step."""
        (batch,) = images
        assert self._replica is not None, "request() comes first"
        self._loss, output = train_step(
            self._replica, self._optimiser, batch, self._context.world, self._context.config.optim.clip_norm
        )
        self._losses += self._loss
        self._last = batch, output
        self._images += len(batch)
        self._recent.append((batch.rows, output.poses.rotation.detach()))
        while sum(len(rows) for rows, _ in self._recent) > RECENT_POSES and len(self._recent) > 1:
            self._recent.popleft()
        self._step += 1

    def finish_pass(self, world: World) -> PassReport:
        """What is due at this step.

        Raises:
            TrainingError: the loss is no longer a number.
        """
        config, step = self._context.config, self._step
        last, self._until = step == config.train.steps, 0
        due = {name: step % period == 0 or last for name, period in (
            ("scalars", config.monitor.every), ("pictures", config.monitor.pictures_every),
            ("checkpoint", config.train.checkpoint_every))}  # fmt: skip
        loss, score = float(self._loss), 0.0  # host sync, as are those below: once per pass
        if due["checkpoint"]:
            if not bool(torch.isfinite(self._loss)):
                raise TrainingError(
                    f"loss is {loss} at step {step}: lower optim.encoder_rate or optim.volume_rate, "
                    "then --resume from the last checkpoint"
                )
            score = -float(self._losses) / ((step - 1) % config.train.checkpoint_every + 1)
            self._losses.zero_()
        report = PassReport(
            f"step {step} of {config.train.steps}: loss {loss:.4f}" if due["scalars"] else "", self._images, step,
            checkpoint=due["checkpoint"], score=score, progress=step / config.train.steps,
            **self._measured(loss, due["scalars"], due["pictures"]),
        )  # fmt: skip
        return report

    def pause(self) -> Pause | None:
        """A checkpoint between any two steps; before the last one of a pass is reported, not yet."""
        if self._step == self._until:
            return None
        return Pause({"state": self.state_dict(), "losses": self._losses.cpu()}, reached=self._step)

    def resume_pass(self, pause: Pause) -> BatchRequest:
        """The steps that are left of it."""
        self.load_state_dict(pause.common["state"])
        self._losses.copy_(pause.common["losses"])
        return self.request()

    def done(self) -> bool:
        """Whether all steps were made."""
        return self._step >= self._context.config.train.steps

    def state_dict(self) -> dict[str, Any]:
        """Parameters and the optimiser's moments."""
        return {"step": self._step, "model": self._model.state_dict(), "optimiser": self._optimiser.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after so many steps.

        Raises:
            CheckpointError: the checkpoint is of another model.
        """
        try:
            self._model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise CheckpointError(
                f"{self._context.run.url}: the checkpoint does not fit the configuration "
                f"({' '.join(str(error).split())[:200]}): use the settings that it was trained with"
            ) from None
        self._optimiser.load_state_dict(state["optimiser"])
        self._step = int(state["step"])

    @torch.no_grad()
    def _measured(self, loss: float, scalars: bool, pictures: bool) -> dict[str, Any]:
        """What a report holds of the last step."""
        assert self._last is not None, "a pass has steps"
        found: dict[str, Any] = {}
        images, output = self._last
        if scalars:
            found["scalars"] = {
                "loss": loss,
                "pose_spread": float(pose_spread(output.poses.rotation)),
                "gradient_norm/volume": _gradient_norm(self._model.volume),
                "gradient_norm/poses": _gradient_norm(self._model.pose_source),
            }
        if pictures:
            rows, rotation = (torch.cat(parts).cpu() for parts in zip(*self._recent, strict=True))
            present = rows >= 0  # the others are padding
            found |= {"density": self._model.volume.density(), "rows": rows[present], "rotation": rotation[present],
                      "pairs": pictures_of(images.transforms, output.predicted, images.pixels)}  # fmt: skip
        return found


def train_step(
    replica: Replica, optimiser: torch.optim.Optimizer, batch: ParticleImages, world: World, clip_norm: float
) -> tuple[Float[Tensor, ""], AutoEncoderOutput]:
    """One optimiser step; returns the global batch's mean loss and this worker's output.

    The global loss is Σ weight·loss / Σ weight over all workers. Gradients are averaged over workers, so each
    worker's share is scaled by their number: any split of the batch gives the same step.
    """
    weight = batch.weight.sum()
    wait = world.all_reduce_async(weight)  # its way is shorter than the forward pass
    output: AutoEncoderOutput = replica(batch)
    loss = (batch.weight * output.loss).sum()
    wait()
    share = loss * (world.size / weight)
    optimiser.zero_grad(set_to_none=True)
    share.backward()
    replica.finish()
    if clip_norm > 0:
        encoder = [p for g in optimiser.param_groups if g["name"] == "encoder" for p in g["params"]]
        nn.utils.clip_grad_norm_(encoder, clip_norm)
    optimiser.step()
    total = loss.detach()
    world.all_reduce_(total)  # last: by now every worker is here, since all have each other's gradients
    return total / weight, output


def build_optimiser(config: Config, model: AutoEncoder) -> torch.optim.Adam:
    """Adam with one learning rate for each kind of parameter."""
    rates = {
        "volume": (list(model.volume.parameters()), config.optim.volume_rate),
        "encoder": (list(model.pose_source.parameters()), config.optim.encoder_rate),
    }
    if config.pose.source == "table":
        rates["table"] = (rates.pop("encoder")[0], config.optim.table_rate)
    groups = [{"name": name, "params": params, "lr": rate} for name, (params, rate) in rates.items() if params]
    return torch.optim.Adam(groups, fused=True)


def pose_spread(rotation: Float[Tensor, "b 3 3"]) -> Float[Tensor, ""]:
    """How far a batch's rotations spread: 1 - |mean R| / √3; 0 when all agree, near 1 when uniform on SO(3)."""
    return 1.0 - rotation.mean(0).square().sum().div(3.0).sqrt()


def _gradient_norm(module: nn.Module) -> float:
    squares = [p.grad.square().sum() for p in module.parameters() if p.grad is not None]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0
