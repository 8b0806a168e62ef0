"""Pyramids: models whose map halves its sides, and widens, from stage to stage."""
import dataclasses
from typing import Any, ClassVar

from .. import nn
from ..backend import Array
from ..tensor import Tensor
from .base import Model, Options, Output, is_whole
from .maps import Pair


class Widths(Options):
    """What the configuration of a pyramid makes of the sizes of a model with one width, see StagesConfig."""
    depths: Any
    patch_size: int
    by_stage: ClassVar[tuple[str, ...]] = ("depths",)

    @property
    def widths(self) -> tuple[int, ...]:
        """The width of each stage."""
        raise NotImplementedError

    @property
    def halvings(self) -> tuple[int, ...]:
        """How often the map has been halved when each stage begins."""
        return tuple(range(len(self.depths)))

    def settle_widths(self, stages: int, dim: int) -> None:
        """Set the options of the width that are not given."""
        raise NotImplementedError

    def settle_heads(self, stages: int) -> None:
        """Make `heads`, of a configuration that has it as an option, a number for each stage: one is of the
        first, doubled by each."""
        given: Any = self.heads  # type: ignore[attr-defined]
        heads = given if isinstance(given, tuple) else (given,)
        self.check(all(is_whole(n) and n > 0 for n in heads),
                   f"heads {given!r}, expected a positive whole number, or one for each stage")
        heads = heads if isinstance(given, tuple) else tuple(heads[0] << s for s in range(stages))
        self.check(len(heads) == stages, f"heads {heads}, expected a number for each of {stages} stages")
        self.settle("heads", heads)

    def __post_init__(self, *sizes: int) -> None:
        super().__post_init__()
        for name, size in zip(("dim", "depth", "heads"), sizes):
            self.check(is_whole(size) and size > 0, f"{name} {size!r}, expected a positive whole number")
        dim, depth, *_ = sizes
        given = [len(getattr(self, name)) for name in self.by_stage if getattr(self, name) is not None]
        stages = given[0] if given else self.stages_of_the_map()
        self.settle_widths(stages, dim)
        if self.depths is None:
            each = [max(1, depth // 6)] * stages
            each[max(0, stages - 2)] += depth - sum(each)
            self.check(min(each) > 0, f"depth {depth}, expected a block at least in each of {stages} stages")
            self.settle("depths", tuple(each))
        self.check(len(self.widths) == len(self.depths),
                   f"widths {self.widths} and depths {self.depths}, expected as many")
        halved = self.halvings[-1]
        stride = self.patch_size << halved
        self.check(not any(side % stride for side in nn.both_sides(self.image_size)),
                   f"image_size {self.image_size!r}, expected multiples of {stride}: patches of "
                   f"{self.patch_size} pixels, halved {halved} times")

    def stages_of_the_map(self) -> int:
        """One, and one more for each time that a map larger than 2 x 2 can be halved; at most 4."""
        grid, stages = [side // self.patch_size for side in nn.both_sides(self.image_size)], 1
        while stages < 4 and min(grid) > 2 and not any(side % 2 for side in grid):
            grid, stages = [side // 2 for side in grid], stages + 1
        return stages


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagesConfig(Widths):
    """The options of every pyramid, after its own: image_size, widths, depths (the blocks of each stage) and
    num_classes.

    patch_size: of the first stage, in pixels; each further stage halves the map. mlp_ratio: the hidden width
    of the MLPs, divided by the stage's. keys_as_queries: see nn.initialise.

    dim, depth, heads: the sizes of a model with one width. They make what is not given: dim is the first
    width, heads the first number of heads, doubled by each stage; of `depth` blocks a sixth is in each stage,
    at least one, and the rest in the last but one; there are as many stages as `stages_of_the_map` says. So
    image_size=224 and depth=18 make ConvNeXt-T, and with depth=12 and window_size=7 it is Swin-T."""
    patch_size: int = 4
    channels: int = 3
    mlp_ratio: float = 4
    keys_as_queries: bool = False
    dim: dataclasses.InitVar[int] = 96
    depth: dataclasses.InitVar[int] = 6
    heads: dataclasses.InitVar[int] = 3
    positive: ClassVar[tuple[str, ...]] = ("patch_size", "channels", "num_classes")


@dataclasses.dataclass(frozen=True)
class WidthsConfig(StagesConfig):
    """dims: the width of each stage, any."""
    image_size: int | tuple[int, int] = 32
    dims: tuple[int, ...] | None = None
    depths: tuple[int, ...] | None = None
    num_classes: int = 10
    by_stage = ("dims", "depths")

    @property
    def widths(self) -> tuple[int, ...]:
        return self.dims or ()


@dataclasses.dataclass
class StagesOutput(Output):
    """tokens (B, N, C): the last stage's map after the final norm, its positions row by row. maps[s]: the map
    at the end of stage s, (B, N_s, C_s); of the shapes model.grids."""
    maps: list[Tensor] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Map:
    """The state that goes from block to block. x (B, N, C): the map, its positions row by row. grid: its
    shape. paths (B, blocks, branches): factors of the residual branches, or None. maps: of the stages that
    are done."""
    x: Tensor
    grid: Pair
    paths: Array | None = None
    maps: list[Tensor] = dataclasses.field(default_factory=list)


class Stage(nn.Module):
    """blocks, and what comes before them: `downsample`, a module or a list of such; None in the first."""

    def __init__(self, downsample: Any, blocks: list[Any]) -> None:
        self.downsample, self.blocks = downsample, blocks


class Stages(Model):
    """A pyramid. images (B, channels, H, W) -> StagesOutput.

    A subclass says how pictures become the first map (`embed`), how a map is halved (`halve`), and how the
    last one is read (`read`); its blocks take (x, grid, paths (B, branches))."""
    stages: list[Stage]
    grids: list[Pair]

    def build(self, c: Any) -> None:
        height, width = (side // c.patch_size for side in nn.both_sides(c.image_size))
        self.grids = [(height >> n, width >> n) for n in c.halvings]

    @property
    def blocks(self) -> list[Any]:
        """The blocks of all stages."""
        return [block for stage in self.stages for block in stage.blocks]

    def embed(self, images: Tensor | Array) -> Tensor:
        """Pictures -> the first map (B, N, C)."""
        raise NotImplementedError

    def halve(self, stage: Stage, x: Tensor, grid: Pair) -> Tensor:
        """A map (B, N, C) with the shape `grid` -> that of half its sides with which `stage` begins."""
        raise NotImplementedError

    def read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The last map -> (logits, the map after the final norm)."""
        raise NotImplementedError

    def forward(self, images: Tensor | Array, trace: bool = False,
                paths: Array | None = None) -> StagesOutput:
        """paths: factors (B, blocks, branches) of the residual branches (tasks.drop_paths), in training.
        trace: as of every model; a pyramid has no attention over the whole picture to keep."""
        state = self.encode(Map(self.embed(images), self.grids[0], paths))
        return StagesOutput(*self.read(state.x), maps=state.maps)

    def encode(self, state: Any) -> Any:
        """Run a Map through all stages; returns it."""
        done = 0
        for s, stage in enumerate(self.stages):
            if s:
                state.x, state.grid = self.halve(stage, state.x, state.grid), self.grids[s]
            self.run_stage(s, stage.blocks, state, nn.column(state.paths, slice(done, None)))
            done += len(stage.blocks)
            state.maps.append(state.x)
        return state

    def by_patch(self, values: Array, s: int) -> Array:
        """Values (B, N_s) of the positions of stage s, for the patches that they are of: (B, N_0)."""
        size = self.grids[0][0] // self.grids[s][0]
        values = values.reshape(-1, *self.grids[s])
        return values.repeat(size, axis=1).repeat(size, axis=2).reshape(len(values), -1)

    def run_stage(self, s: int, blocks: list[Any], state: Any, paths: Array | None) -> None:
        """The blocks of stage s. paths: those of these blocks, and of the later ones."""
        for i, block in enumerate(blocks):
            state.x = block(state.x, state.grid, nn.column(paths, i))
