"""Images drawn during training with the averaged weights: sample grids, and evaluation as `sfd evaluate` does it.

Every image is a function of (train.seed, its number) alone and no generator of training is touched, so a run has the
same bits with and without them; class i % num_classes belongs to image i.
Letters: B batch, C channels, H height, W width, N images of an evaluation.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sfd_fast.config import SFDConfig, require
from sfd_fast.diffusion import random_numbers
from sfd_fast.diffusion.statistics import LatentStatistics
from sfd_fast.diffusion.transport import noise, split_latents
from sfd_fast.formats.texture import load_codec
from sfd_fast.models.texture import to_uint8
from sfd_fast.pictures import square_grid
from sfd_fast.sampling.guidance import bind_labels, bind_null, cfg
from sfd_fast.sampling.sampler import check_settings, sample
from sfd_fast.training.engines.interface import Engine

Decode = Callable[[Tensor], Tensor]
"""texture latents (B, C_t, h, w) -> images (B, 1 or 3, H, W) in [-1, 1]"""
DECODED_AT_ONCE = 16
"""a layer of the released codec holds 1 GiB for 32 images of 256 x 256; the transformer's micro-batch may be larger"""
UNGUIDED = (
    "images drawn during training are unguided: autoguidance needs a guide model, which a training run has not "
    "(`sfd sample --guide` has)"
)


def texture_decoder(config: SFDConfig) -> Decode:
    """What turns texture latents into images for sample grids."""
    if not config.data.texture_codec:
        return lambda texture: texture
    codec = load_codec(config.data.texture_codec)
    return lambda texture: codec.to(texture.device).decode(texture)


@contextmanager
def drawing(
    engine: Engine, config: SFDConfig, statistics: LatentStatistics, decode: Decode
) -> Iterator[Callable[[Tensor], Tensor]]:
    """While inside, the network has its averaged weights; yields draw(ids (B,) int64) -> images (B, 3, H, W) fp32.

    Guided as config.guidance says where that is cfg; autoguidance needs a second model and is left out.
    """
    model_config, delta_t = config.model, config.transport.delta_t
    num_texture = model_config.texture_channels
    shape = (model_config.channels, model_config.grid_size, model_config.grid_size)

    def draw(ids: Tensor) -> Tensor:
        ids = ids.to(engine.device)
        labels = ids % model_config.num_classes
        x0 = noise(ids, shape, config.train.seed, random_numbers.SAMPLE_NOISE)
        with engine.autocast():
            velocity = bind_labels(model, labels)
            if config.guidance.mode == "cfg":
                null = bind_null(model, labels, model_config.num_classes)
                velocity = cfg(velocity, null, config.guidance, num_texture_channels=num_texture, delta_t=delta_t)
            latents = sample(
                velocity, x0, delta_t=delta_t, config=config.sampler, num_texture_channels=num_texture,
                callback=lambda *step: engine.beat(),
            )  # fmt: skip
        texture = statistics.denormalize_texture(split_latents(latents, model_config)[0].float())
        return torch.cat([colours(decode(part).float()) for part in texture.split(DECODED_AT_ONCE)])

    with engine.eval_mode(), engine.ema_weights() as model, torch.no_grad():
        yield draw


def colours(images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 3, H, W): the first three channels, or the first one as grey."""
    return images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)


def sample_picture(engine: Engine, config: SFDConfig, statistics: LatentStatistics, decode: Decode) -> Tensor:
    """A grid of the first run.num_sample_images images: (3, H, W) uint8, the same on every rank.

    Each rank draws its share, and those past the last in vain: under ZeRO 3 the ranks' forwards go together.
    """
    count = config.run.num_sample_images
    with drawing(engine, config, statistics, decode) as draw:
        if config.sampler.solver == "dopri5":
            # its steps depend on its images: ranks that drew different ones would not go together
            return picture_grid(draw(torch.arange(count)).cpu())
        share = -(-count // engine.world_size)
        mine = slice(engine.rank * share, (engine.rank + 1) * share)
        images = draw(torch.arange(mine.start, mine.stop))
    everyone = images.new_zeros(engine.world_size * share, *images.shape[1:])
    everyone[mine] = images
    return picture_grid(engine.sum_over_ranks(everyone)[:count].cpu())


def picture_grid(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1], B > 0, as one picture (3, rows * H, columns * W) uint8, about square."""
    picture = square_grid(to_uint8(images).numpy(), size=1, gap=0)
    return torch.from_numpy(picture).permute(2, 0, 1)


class Quality:
    """Metrics of run.eval_images generated images against run.eval_reference, as `sfd evaluate` computes them.

    Made before the first step, so that a missing reference or missing weights end a run at its start. Each rank draws
    the same number of full micro-batches, which ZeRO 3 needs: the ranks' forwards go together. Images past the last are
    drawn and dropped.
    Raises ValueError as Evaluator does, and for settings under which the images could not be drawn.
    """

    def __init__(
        self,
        engine: Engine,
        config: SFDConfig,
        statistics: LatentStatistics,
        decode: Decode,
        say: Callable[[str], None],
    ) -> None:
        """say: takes one line for whatever is left out of the figures or makes them incomparable."""
        from sfd_fast.evaluation import Evaluator, EvaluatorConfig

        train, run = config.train, config.run
        require(
            config.sampler.solver != "dopri5" or config.deepspeed.zero_stage < 3 or engine.world_size == 1,
            "sampler.solver 'dopri5' takes as many steps as its images need; under deepspeed.zero_stage 3 all ranks "
            "must evaluate the network equally often, so choose a solver with fixed steps for run.eval_every",
        )
        self.engine, self.config, self.statistics, self.decode = engine, config, statistics, decode
        self.say, self.said = say, set()
        share = max(1, train.global_batch_size // engine.world_size)
        self.size = min(train.micro_batch_size or share, run.eval_images)
        with torch.random.fork_rng(devices=[]):  # a network's construction draws its first weights
            self.evaluator = Evaluator(
                EvaluatorConfig(
                    reference=run.eval_reference,
                    features=run.eval_features,
                    weights=run.eval_weights or None,
                    device=str(engine.device),
                    progress=False,
                ),
                on_batch=engine.beat,
            )
        self.say_once()

    def say_once(self) -> None:
        lines = [f"evaluation leaves out {name}: {reason}" for name, reason in self.evaluator.skipped.items()]
        for line in [*lines, *(f"evaluation: {warning}" for warning in self.evaluator.warnings)]:
            if line not in self.said:
                self.said.add(line)
                self.say(line)

    def micro_batches(self) -> Iterator[Tensor]:
        """This rank's image numbers, (B,) at a time: ranks in order hold 0, 1, ..., as one process would have them."""
        batches = -(-self.config.run.eval_images // self.size)
        per_rank = -(-batches // self.engine.world_size)
        first = self.engine.rank * per_rank
        for batch in range(first, first + per_rank):
            yield torch.arange(batch * self.size, (batch + 1) * self.size)

    def __call__(self, stopping: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        """The figures, the same on every rank; None where `stopping` was true on any rank before they were complete.

        Where images are not finite there are no metrics, but their number as `not_finite`.
        """
        self.evaluator.reset()
        broken = torch.zeros((), device=self.engine.device)
        with drawing(self.engine, self.config, self.statistics, self.decode) as draw:
            for ids in self.micro_batches():
                if self.engine.agreed(stopping()):
                    return None
                images = draw(ids)[: max(0, self.config.run.eval_images - int(ids[0]))]
                broken += (~images.flatten(1).isfinite().all(dim=1)).sum()
                for part in to_uint8(images).split(DECODED_AT_ONCE) if len(images) else ():
                    self.evaluator.update(part)
        num_broken = int(self.engine.sum_over_ranks(broken))
        if num_broken:
            return {"not_finite": num_broken}
        self.engine.beat()
        figures = self.evaluator.compute()
        self.engine.beat()
        self.say_once()
        return figures


def check_drawing(config: SFDConfig, *, decoded: bool) -> None:
    """Raises ValueError where images could not be drawn as the sampler and guidance say, or not be evaluated.

    decoded: whether something turns texture latents into images.
    """
    check_settings(config.sampler, config.guidance, config.model, config.transport.delta_t)
    channels = config.model.texture_channels
    require(
        config.run.eval_every == 0 or decoded or channels in (1, 3),
        f"run.eval_every evaluates images, but {channels} texture channels are no pixels and data.texture_codec is "
        "empty: give data.texture_codec, or set run.eval_every to 0",
    )
