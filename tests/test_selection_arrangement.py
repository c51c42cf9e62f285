"""How tokens lie in blocks, the lists of blocks, and what every selector keeps."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch

from videoattn.call import Grid
from videoattn.selection.arrangement import ORDERS, SLACK, Tokens, arrange, best_tile
from videoattn.selection.block_list import BlockList
from videoattn.selection.selector import SELECTORS, label, required, select, selector_of

CPU = torch.device("cpu")
GRIDS = [(4, 6, 8), (5, 7, 9), (1, 9, 11), (13, 1, 1), (1, 1, 1), (3, 2, 2)]
TEXTS = [(0, 0), (5, 0), (0, 21), (3, 14)]


def tokens_of(grid, before=0, after=0):
    return Tokens(grid=Grid(frames=grid[0], height=grid[1], width=grid[2]), before=before, after=after)


def groups_of(arrangement):
    """The tokens of each block, without its empty places."""
    rows = arrangement.index.view(arrangement.blocks, arrangement.block).tolist()
    return [row[:live] for row, live in zip(rows, arrangement.live.tolist(), strict=True)]


def position(token, arrangement):
    grid, at = arrangement.tokens.grid, token - arrangement.tokens.before
    return at // (grid.height * grid.width), at // grid.width % grid.height, at % grid.width


@pytest.fixture(params=itertools.product(GRIDS, ORDERS, TEXTS), ids=str)
def arrangement(request):
    grid, order, (before, after) = request.param
    return arrange(tokens_of(grid, before, after), order, 16, CPU)


def test_there_and_back(arrangement):
    x = torch.randn(2, arrangement.tokens.count, 3)
    there = arrangement.arranged(x)
    assert there.shape == (2, arrangement.blocks * 16, 3)
    assert torch.equal(arrangement.restored(there), x)


def test_every_token_is_in_one_place_and_empty_places_repeat_the_last(arrangement):
    groups, count = groups_of(arrangement), arrangement.tokens.count
    assert sorted(itertools.chain(*groups)) == list(range(count))
    assert int(arrangement.live.sum()) == count and arrangement.live.min() >= 1 and arrangement.live.max() <= 16
    assert arrangement.live.dtype == torch.int32
    for row, group in zip(arrangement.index.view(-1, 16).tolist(), groups, strict=True):
        assert row == group + [group[-1]] * (16 - len(group))
    assert torch.equal(arrangement.index[arrangement.places], torch.arange(count))


def test_text_has_blocks_of_its_own_behind_the_video(arrangement):
    grid, first = arrangement.tokens.grid, arrangement.tokens.before
    groups = groups_of(arrangement)
    assert sorted(itertools.chain(*groups[: arrangement.video_blocks])) == list(range(first, first + grid.tokens))
    text = [*range(first), *range(first + grid.tokens, arrangement.tokens.count)]
    assert groups[arrangement.video_blocks :] == [text[at : at + 16] for at in range(0, len(text), 16)]


def test_boxes_are_the_smallest_around_their_blocks(arrangement):
    assert arrangement.boxes.shape == (arrangement.video_blocks, 3, 2)
    for box, group in zip(arrangement.boxes.tolist(), groups_of(arrangement), strict=False):
        axes = list(zip(*(position(token, arrangement) for token in group), strict=True))
        assert box == [[min(axis), max(axis)] for axis in axes]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("order", ["raster", "morton"])
def test_raster_and_morton_order_fill_blocks_in_turn(grid, order):
    arrangement = arrange(tokens_of(grid, before=3), order, 16, CPU)

    def interleaved(token):
        bits = [f"{x:020b}" for x in position(token, arrangement)]
        return int("".join(itertools.chain(*zip(*bits, strict=True))), 2)

    tokens = range(3, 3 + math.prod(grid))
    ordered = list(tokens) if order == "raster" else sorted(tokens, key=interleaved)
    groups = groups_of(arrangement)[: arrangement.video_blocks]
    assert list(itertools.chain(*groups)) == ordered
    assert all(len(group) == 16 for group in groups[:-1])
    assert arrangement.tile is None


@pytest.mark.parametrize("tile", [(2, 2, 4), (1, 4, 4), (1, 1, 16), (4, 2, 1), (16, 1, 1), None], ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_tiles_are_boxes_frame_by_frame(grid, tile):
    arrangement = arrange(tokens_of(grid, before=2), "tiles", 16, CPU, tile)
    assert arrangement.tile == (tile or best_tile(arrangement.tokens.grid, 16))
    tile = arrangement.tile
    corners = itertools.product(*(range(0, size, step) for size, step in zip(grid, tile, strict=True)))
    for corner, group in itertools.zip_longest(corners, groups_of(arrangement)[: arrangement.video_blocks]):
        ends = [min(a + step, size) for a, step, size in zip(corner, tile, grid, strict=True)]
        inside = list(itertools.product(*(range(a, b) for a, b in zip(corner, ends, strict=True))))
        assert [position(token, arrangement) for token in group] == inside


@pytest.mark.parametrize("block", [1, 7, 16, 64, 128])
@pytest.mark.parametrize("grid", [*GRIDS, (21, 30, 52), (21, 45, 80), (13, 30, 45), (7, 17, 19)], ids=str)
def test_the_best_tile_fits_and_needs_few_tiles(grid, block):
    def tiles(tile):
        return math.prod(math.ceil(size / step) for size, step in zip(grid, tile, strict=True))

    tile = best_tile(Grid(frames=grid[0], height=grid[1], width=grid[2]), block)
    assert math.prod(tile) <= block and all(1 <= step <= size for step, size in zip(tile, grid, strict=True))
    fits = [
        (t, y, block // (t * y))
        for t in range(1, min(grid[0], block) + 1)
        for y in range(1, min(grid[1], block // t) + 1)
    ]
    assert min(map(tiles, fits)) <= tiles(tile) <= SLACK * min(map(tiles, fits))


def test_arrangements_are_made_once():
    tokens = tokens_of((2, 4, 4), after=3)
    assert arrange(tokens, "tiles", 16, CPU) is arrange(tokens_of((2, 4, 4), after=3), "tiles", 16, CPU)
    assert arrange(tokens, "tiles", 16, CPU) is not arrange(tokens, "tiles", 8, CPU)
    assert arrange(tokens_of((4, 2, 4), after=3), "tiles", 16, CPU).tokens.grid.frames == 4


@pytest.mark.parametrize(
    ("grid", "order", "block", "tile", "message"),
    [
        ((2, 2, 2), "hilbert", 4, None, "order: wanted one of raster, tiles, morton, got 'hilbert'"),
        ((0, 2, 2), "raster", 4, None, "Tokens: wanted a video, and 0 or more tokens of text"),
        ((2, 2, 2), "raster", 0, None, "wanted blocks of one token at least, got 0"),
        ((2, 2, 2), "tiles", 4, (2, 2, 2), "tile: wanted at most 4 tokens"),
        ((2, 2, 2), "tiles", 4, (0, 2, 2), "tile: wanted at most 4 tokens"),
        ((2, 2, 2), "raster", 8, (2, 2, 2), "in the order 'tiles', got .* in 'raster'"),
    ],
)
def test_what_cannot_be_arranged(grid, order, block, tile, message):
    with pytest.raises(ValueError, match=message):
        arrange(tokens_of(grid), order, block, CPU, tile)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(1, 1, 3, 5), (2, 3, 7, 7), (1, 4, 1, 1)], ids=str)
def test_lists_are_those_of_the_mask(shape, share):
    keep = torch.rand(shape) < share
    live = torch.randint(1, 5, shape[-1:], dtype=torch.int32)
    lists = BlockList.of(keep, live, 8, 4)
    assert lists.counts.dtype == lists.indices.dtype == torch.int32 and lists.indices.is_contiguous()
    for at in itertools.product(*map(range, shape[:3])):
        wanted = [key for key in range(shape[3]) if keep[at][key]]
        assert lists.counts[at] == len(wanted)
        assert lists.indices[at][: len(wanted)].tolist() == wanted
        assert sorted(lists.indices[at].tolist()) == list(range(shape[3]))  # behind them still blocks


def test_lists_of_an_expanded_mask():
    keep = torch.rand(1, 1, 6, 6) < 0.5
    live = torch.full((6,), 4, dtype=torch.int32)
    shared, each = BlockList.of(keep, live, 4, 4).expand(2, 3), BlockList.of(keep.expand(2, 3, 6, 6), live, 4, 4)
    for name in ("counts", "indices", "keep"):
        assert torch.equal(getattr(shared, name), getattr(each, name))
        assert getattr(shared, name).stride()[:2] == (0, 0)
    assert (shared.block_q, shared.block_k) == (4, 4) and shared.live is live


def test_the_mask_of_tokens_and_its_density():
    keep = torch.rand(2, 3, 4, 5) < 0.5
    live = torch.tensor([4, 1, 3, 4, 2], dtype=torch.int32)
    lists = BlockList.of(keep, live, 3, 4)
    mask = lists.token_mask()
    assert mask.shape == (2, 3, 12, 20)
    for at in itertools.product(*map(range, mask.shape)):
        b, h, q, k = at
        assert mask[at] == (keep[b, h, q // 3, k // 4] and k % 4 < live[k // 4])
    assert lists.density.item() == pytest.approx((mask.sum() / (2 * 3 * 12 * live.sum())).item())
    assert BlockList.of(torch.ones_like(keep), live, 3, 4).density.item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("keep", "live"),
    [(torch.ones(1, 1, 2, 2), 2), (torch.ones(1, 2, 2) > 0, 2), (torch.ones(1, 1, 2, 2) > 0, 3)],
    ids=["dtype", "dimensions", "live"],
)
def test_what_is_no_mask(keep, live):
    with pytest.raises(ValueError, match=r"BlockList: wanted a mask bool \[B, H, nq, nk\] and live int32 \[nk\]"):
        BlockList.of(keep, torch.ones(live, dtype=torch.int32), 8, 8)


@pytest.mark.parametrize("first_frame", [True, False])
def test_what_is_required(arrangement, first_frame):
    keep = required(arrangement, first_frame=first_frame)
    groups, video = groups_of(arrangement), arrangement.video_blocks
    for query, key in itertools.product(range(arrangement.blocks), repeat=2):
        opening = key < video and all(position(token, arrangement)[0] == 0 for token in groups[key])
        wanted = query == key or query >= video or key >= video or (first_frame and opening)
        assert keep[query, key] == wanted


@dataclass(frozen=True)
class Nothing:
    """A selector that keeps what it is given."""

    shape: tuple[int, int] = (1, 1)
    order: str = "raster"
    dynamic: bool = False

    def keep(self, arrangement, heads, q=None, k=None, scale=None):
        return torch.zeros(*self.shape, arrangement.blocks, arrangement.blocks, dtype=torch.bool)


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (3, 4)], ids=str)
def test_a_selection_has_what_is_required_for_all_rows_and_heads(shape):
    arrangement = arrange(tokens_of((4, 6, 8), 3, 14), "raster", 16, CPU)
    q = torch.zeros(3, arrangement.blocks * 16, 4, 8)
    for first_frame in (True, False):
        lists = select(Nothing(shape), arrangement, 4, q, q, first_frame=first_frame)
        assert lists.keep.shape == (3, 4, arrangement.blocks, arrangement.blocks)
        assert (lists.keep == required(arrangement, first_frame=first_frame)).all()
        assert torch.equal(lists.counts, lists.keep.sum(-1, dtype=torch.int32))
        assert lists.live is arrangement.live and (lists.block_q, lists.block_k) == (16, 16)
    if shape[0] == 1:
        assert select(Nothing(shape), arrangement, 4).keep.shape[:2] == (1, 4)


def test_a_selection_of_tokens_that_are_not_arranged():
    arrangement = arrange(tokens_of((4, 6, 8), 3, 14), "morton", 16, CPU)
    q = torch.zeros(1, arrangement.blocks * 16, 2, 8)
    with pytest.raises(ValueError, match="select: wanted tokens in the order 'raster', got 'morton'"):
        select(Nothing(), arrangement, 2, q, q)
    count = arrangement.tokens.count
    with pytest.raises(ValueError, match=f"select: wanted k of {arrangement.blocks * 16} places, got {count}"):
        select(Nothing(order="morton"), arrangement, 2, q, q[:, :count])


def test_what_is_kept_may_be_used_outside_of_inference_mode():
    with torch.inference_mode():
        arrangement = arrange(tokens_of((2, 3, 5), 0, 7), "tiles", 4, CPU)
    assert not any(
        x.is_inference() for x in (arrangement.index, arrangement.places, arrangement.live, arrangement.boxes)
    )


PARAMETERS = {"random": {"density": 0.5}}


@pytest.mark.parametrize("name", SELECTORS)
def test_the_contract_of_a_selector(name):
    """Hashable; a mask of blocks; who looks at q and k goes by the scale of their scores."""
    selector = selector_of(name, **PARAMETERS.get(name, {}))
    assert hash(selector) == hash(selector_of(name, **PARAMETERS.get(name, {})))
    arrangement = arrange(tokens_of((4, 6, 8), 3, 14), selector.order, 16, CPU)
    q, k = (torch.randn(2, arrangement.tokens.count, heads, 8) for heads in (4, 2))
    q, k = arrangement.arranged(4 * q), arrangement.arranged(k)
    keep = selector.keep(arrangement, 4, q, k)
    assert keep.dtype == torch.bool and keep.shape[2:] == (arrangement.blocks, arrangement.blocks)
    assert keep.shape[0] in (1, 2) and keep.shape[1] in (1, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = select(selector, arrangement, 4, q, k).keep
    assert torch.equal(under_autocast, select(selector, arrangement, 4, q, k).keep)
    if selector.dynamic:  # NaN is kept, not hidden: in one key it concerns all queries of the heads that read it
        poisoned = k.clone()
        poisoned[0, 37, 0, 0] = torch.nan
        assert select(selector, arrangement, 4, q, poisoned).keep[0, :2, :, 37 // 16].all()
    for scale in (0.1, 1.0):
        scaled = selector.keep(arrangement, 4, q, k, scale)
        assert torch.equal(scaled, selector.keep(arrangement, 4, q * (scale * 8**0.5), k))
    if not selector.dynamic and name != "random":  # which draws for each row
        assert torch.equal(keep, selector.keep(arrangement, 4))


def test_selectors_go_by_name():
    with pytest.raises(ValueError, match="selector: wanted one of sliding_tiles, .*, got 'dense'"):
        selector_of("dense")
    with pytest.raises(TypeError):
        selector_of("sharded", size=3)


def test_a_selector_is_shown_by_its_name_and_what_is_unusual():
    assert label(selector_of("pooled")) == "pooled"
    assert label(selector_of("pooled", tau=0.8, order="raster")) == "pooled tau=0.8 order=raster"
    assert label(selector_of("xattention", density=0.3)) == "xattention density=0.3"
    assert label(selector_of("random", density=0.3)) == "random density=0.3 seed=0 order=raster"
    assert label(Nothing()) == "Nothing"
