"""How tokens lie in blocks, the lists of blocks, and what every selector keeps."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch

from videoattn.call import Grid
from videoattn.selection.arrangement import ORDERS, SLACK, Tokens, arrange, best_tile, block_sums
from videoattn.selection.block_list import BlockList
from videoattn.selection.recall import recall
from videoattn.selection.selector import SELECTORS, label, required, select, selector_of

CPU = torch.device("cpu")
GRIDS = [(4, 6, 8), (5, 7, 9), (1, 9, 11), (13, 1, 1), (1, 1, 1), (3, 2, 2)]
TEXTS = [(0, 0), (5, 0), (0, 21), (3, 14)]
BLOCKS = [(16, 16), (24, 16), (8, 16)]


def tokens_of(grid, before=0, after=0):
    return Tokens(grid=Grid(frames=grid[0], height=grid[1], width=grid[2]), before=before, after=after)


def groups_of(arrangement, blocks):
    """The tokens of each block, without its empty places."""
    index = arrangement.index.tolist()
    return [index[at * blocks.size :][:live] for at, live in enumerate(blocks.live.tolist())]


def text_of(tokens):
    """Before the video, then behind it."""
    return [*range(tokens.before), *range(tokens.before + tokens.grid.tokens, tokens.count)]


def position(token, arrangement):
    grid, at = arrangement.tokens.grid, token - arrangement.tokens.before
    return at // (grid.height * grid.width), at // grid.width % grid.height, at % grid.width


CASES = list(itertools.product(GRIDS, ORDERS, TEXTS, BLOCKS))
COMPACT = [case for case in CASES if case[1] != "tiles"]
TILES = [case for case in CASES if case[1] == "tiles" and case[3] == (16, 16)]


@pytest.fixture(params=COMPACT + TILES, ids=str)
def arrangement(request):
    grid, order, (before, after), (block_q, block_k) = request.param
    return arrange(tokens_of(grid, before, after), order, CPU, block_q=block_q, block_k=block_k)


@pytest.fixture(params=["queries", "keys"])
def blocks(request, arrangement):
    return getattr(arrangement, request.param)


def test_there_and_back(arrangement):
    x = torch.randn(2, arrangement.tokens.count, 3)
    there = arrangement.arranged(x)
    assert there.shape == (2, arrangement.index.shape[0], 3)
    assert torch.equal(arrangement.restored(there), x)


def test_every_token_is_in_one_place(arrangement, blocks):
    count, places = arrangement.tokens.count, arrangement.index.shape[0]
    assert sorted(itertools.chain(*groups_of(arrangement, blocks))) == list(range(count))
    assert blocks.live.dtype == torch.int32 and int(blocks.live.sum()) == count
    assert blocks.live.min() >= 1 and blocks.live.max() <= blocks.size
    assert (blocks.count - 1) * blocks.size < places <= blocks.count * blocks.size
    assert torch.equal(arrangement.index[arrangement.places], torch.arange(count))


@pytest.mark.parametrize("arrangement", COMPACT, indirect=True, ids=str)
def test_raster_and_morton_order_are_compact(arrangement, blocks):
    """A permutation, video and then text; blocks are full but the last."""
    tokens = arrangement.tokens
    assert sorted(arrangement.index.tolist()) == list(range(tokens.count)) and not arrangement.empty.any()
    first, video = tokens.before, tokens.grid.tokens
    assert sorted(arrangement.index[:video].tolist()) == list(range(first, first + video))
    assert arrangement.index[video:].tolist() == text_of(tokens)
    left = tokens.count - (blocks.count - 1) * blocks.size
    assert blocks.live.tolist() == [blocks.size] * (blocks.count - 1) + [left]


@pytest.mark.parametrize("arrangement", TILES, indirect=True, ids=str)
def test_tiles_have_all_their_places_and_empty_ones_repeat_the_last(arrangement):
    blocks, tokens = arrangement.keys, arrangement.tokens
    assert blocks is arrangement.queries
    groups = groups_of(arrangement, blocks)
    for row, group in zip(arrangement.index.view(-1, 16).tolist(), groups, strict=True):
        assert row == group + [group[-1]] * (16 - len(group))
    assert (arrangement.empty.view(-1, 16).sum(1) == 16 - blocks.live).all()
    text = text_of(tokens)
    assert groups[blocks.video :] == [text[at : at + 16] for at in range(0, len(text), 16)]


def test_a_block_with_a_token_of_text_is_texts(arrangement, blocks):
    text = set(text_of(arrangement.tokens))
    pure = [text.isdisjoint(group) for group in groups_of(arrangement, blocks)]
    assert pure == [True] * blocks.video + [False] * (blocks.count - blocks.video)


def test_blocks_where_video_and_text_meet():
    arrangement = arrange(tokens_of((1, 5, 6), before=2, after=5), "raster", CPU, block_q=24, block_k=16)
    assert (arrangement.queries.video, arrangement.queries.count) == (1, 2)
    assert (arrangement.keys.video, arrangement.keys.count) == (1, 3)
    assert groups_of(arrangement, arrangement.keys)[1] == [*range(18, 32), 0, 1]
    assert arrangement.keys.live.tolist() == [16, 16, 5] and arrangement.queries.live.tolist() == [24, 13]


def test_fewer_tokens_than_a_block():
    alone = arrange(tokens_of((1, 2, 3)), "morton", CPU, block_q=192, block_k=128)
    for blocks in (alone.queries, alone.keys):
        assert (blocks.count, blocks.video, blocks.live.tolist()) == (1, 1, [6])
        assert blocks.boxes.tolist() == [[[0, 0], [0, 1], [0, 2]]]
    shared = arrange(tokens_of((1, 2, 3), after=1), "morton", CPU, block_q=192, block_k=128)
    for blocks in (shared.queries, shared.keys):
        assert (blocks.count, blocks.video, blocks.live.tolist()) == (1, 0, [7]) and blocks.boxes.shape == (0, 3, 2)
    assert required(shared).tolist() == [[True]]


def test_boxes_are_the_smallest_around_their_blocks(arrangement, blocks):
    assert blocks.boxes.shape == (blocks.video, 3, 2)
    for box, group in zip(blocks.boxes.tolist(), groups_of(arrangement, blocks), strict=False):
        axes = list(zip(*(position(token, arrangement) for token in group), strict=True))
        assert box == [[min(axis), max(axis)] for axis in axes]


def test_what_is_cut_and_what_is_taken(arrangement, blocks):
    """Rows of all the places of a block, of which those that are taken hold its tokens, and the others one of them."""
    rows, groups = blocks.cut(arrangement.index), groups_of(arrangement, blocks)
    assert rows.shape == blocks.taken.shape == (blocks.count, blocks.size)
    for row, taken, group in zip(rows, blocks.taken, groups, strict=True):
        assert row[taken].tolist() == group and row.tolist() == group + [group[-1]] * (blocks.size - len(group))


@pytest.mark.parametrize("size", [1, 3, 4, 12, 20])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_sums_over_blocks(size, dim):
    x = torch.randint(0, 9, (12, 12, 12))
    sums = block_sums(x, size, dim, torch.float32)
    assert sums.dtype == torch.float32
    assert torch.equal(sums, torch.stack([part.float().sum(dim) for part in x.split(size, dim)], dim))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("order", ["raster", "morton"])
def test_raster_and_morton_order(grid, order):
    arrangement = arrange(tokens_of(grid, before=3), order, CPU, block_q=16, block_k=16)

    def interleaved(token):
        bits = [f"{x:020b}" for x in position(token, arrangement)]
        return int("".join(itertools.chain(*zip(*bits, strict=True))), 2)

    tokens = range(3, 3 + math.prod(grid))
    ordered = list(tokens) if order == "raster" else sorted(tokens, key=interleaved)
    assert arrangement.index[: math.prod(grid)].tolist() == ordered
    assert arrangement.tile is None


@pytest.mark.parametrize("tile", [(2, 2, 4), (1, 4, 4), (1, 1, 16), (4, 2, 1), (16, 1, 1), None], ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_tiles_are_boxes_frame_by_frame(grid, tile):
    arrangement = arrange(tokens_of(grid, before=2), "tiles", CPU, block_q=16, block_k=16, tile=tile)
    assert arrangement.tile == (tile or best_tile(arrangement.tokens.grid, 16))
    tile = arrangement.tile
    corners = itertools.product(*(range(0, size, step) for size, step in zip(grid, tile, strict=True)))
    groups = groups_of(arrangement, arrangement.keys)[: arrangement.keys.video]
    for corner, group in itertools.zip_longest(corners, groups):
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
    def made(grid, block_q, block_k):
        return arrange(tokens_of(grid, after=3), "raster", CPU, block_q=block_q, block_k=block_k)

    assert made((2, 4, 4), 16, 8) is made((2, 4, 4), 16, 8)
    assert made((2, 4, 4), 16, 8) is not made((2, 4, 4), 8, 16)
    assert made((4, 2, 4), 16, 8).tokens.grid.frames == 4


@pytest.mark.parametrize(
    ("grid", "order", "blocks", "tile", "message"),
    [
        ((2, 2, 2), "hilbert", (4, 4), None, "order: wanted one of raster, tiles, morton, got 'hilbert'"),
        ((0, 2, 2), "raster", (4, 4), None, "Tokens: wanted a video, and 0 or more tokens of text"),
        ((2, 2, 2), "raster", (4, 0), None, "wanted blocks of one token at least, got 4 queries and 0 keys"),
        ((2, 2, 2), "tiles", (8, 4), None, "wanted blocks of one size in the order 'tiles', got 8 and 4"),
        ((2, 2, 2), "tiles", (4, 4), (2, 2, 2), "tile: wanted at most 4 tokens"),
        ((2, 2, 2), "tiles", (4, 4), (0, 2, 2), "tile: wanted at most 4 tokens"),
        ((2, 2, 2), "raster", (8, 8), (2, 2, 2), "in the order 'tiles', got .* in 'raster'"),
    ],
)
def test_what_cannot_be_arranged(grid, order, blocks, tile, message):
    with pytest.raises(ValueError, match=message):
        arrange(tokens_of(grid), order, CPU, block_q=blocks[0], block_k=blocks[1], tile=tile)


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
    """Place by place: what shares one, and what holds a token of text, or of the first frame alone."""
    keep = required(arrangement, first_frame=first_frame)
    text, places = set(text_of(arrangement.tokens)), range(arrangement.index.shape[0])
    of_queries, of_keys = (
        [(set(places[at * x.size :][: x.size]), set(group)) for at, group in enumerate(groups_of(arrangement, x))]
        for x in (arrangement.queries, arrangement.keys)
    )
    assert keep.shape == (len(of_queries), len(of_keys)) and keep.dtype == torch.bool
    for (i, (rows, queries)), (j, (columns, keys)) in itertools.product(enumerate(of_queries), enumerate(of_keys)):
        opening = not keys & text and all(position(token, arrangement)[0] == 0 for token in keys)
        wanted = bool(rows & columns or queries & text or keys & text or (first_frame and opening))
        assert keep[i, j] == wanted


@dataclass(frozen=True)
class Nothing:
    """A selector that keeps what it is given."""

    shape: tuple[int, int] = (1, 1)
    order: str = "raster"
    dynamic: bool = False

    def keep(self, arrangement, heads, q=None, k=None, scale=None):
        return torch.zeros(*self.shape, arrangement.queries.count, arrangement.keys.count, dtype=torch.bool)


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (3, 4)], ids=str)
def test_a_selection_has_what_is_required_for_all_rows_and_heads(shape):
    arrangement = arrange(tokens_of((4, 6, 8), 3, 14), "raster", CPU, block_q=24, block_k=16)
    q = torch.zeros(3, arrangement.index.shape[0], 4, 8)
    for first_frame in (True, False):
        lists = select(Nothing(shape), arrangement, 4, q, q, first_frame=first_frame)
        assert lists.keep.shape == (3, 4, arrangement.queries.count, arrangement.keys.count)
        assert (lists.keep == required(arrangement, first_frame=first_frame)).all()
        assert torch.equal(lists.counts, lists.keep.sum(-1, dtype=torch.int32))
        assert lists.live is arrangement.keys.live and (lists.block_q, lists.block_k) == (24, 16)
    if shape[0] == 1:
        assert select(Nothing(shape), arrangement, 4).keep.shape[:2] == (1, 4)


def test_a_selection_of_tokens_that_are_not_arranged():
    arrangement = arrange(tokens_of((4, 6, 8), 3, 14), "tiles", CPU, block_q=16, block_k=16)
    places, count = arrangement.index.shape[0], arrangement.tokens.count
    q = torch.zeros(1, places, 2, 8)
    with pytest.raises(ValueError, match="select: wanted tokens in the order 'raster', got 'tiles'"):
        select(Nothing(), arrangement, 2, q, q)
    assert count < places
    with pytest.raises(ValueError, match=f"select: wanted k of {places} places, got {count}"):
        select(Nothing(order="tiles"), arrangement, 2, q, q[:, :count])


def test_what_is_kept_may_be_used_outside_of_inference_mode():
    with torch.inference_mode():
        arrangement = arrange(tokens_of((2, 3, 5), 0, 7), "tiles", CPU, block_q=4, block_k=4)
    blocks = arrangement.keys
    assert not any(x.is_inference() for x in (arrangement.index, arrangement.places, blocks.live, blocks.boxes))


PARAMETERS = {"random": {"density": 0.5}}


@pytest.mark.parametrize("name", SELECTORS)
def test_the_contract_of_a_selector(name):
    """Hashable; a mask of blocks; who looks at q and k goes by the scale of their scores."""
    selector = selector_of(name, **PARAMETERS.get(name, {}))
    assert hash(selector) == hash(selector_of(name, **PARAMETERS.get(name, {})))
    arrangement = arrange(tokens_of((4, 6, 8), 3, 14), selector.order, CPU, block_q=16, block_k=16)
    q, k = (torch.randn(2, arrangement.tokens.count, heads, 8) for heads in (4, 2))
    q, k = arrangement.arranged(4 * q), arrangement.arranged(k)
    keep = selector.keep(arrangement, 4, q, k)
    assert keep.dtype == torch.bool and keep.shape[2:] == (arrangement.queries.count, arrangement.keys.count)
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


@pytest.mark.parametrize("order", ["raster", "morton"])
@pytest.mark.parametrize(("block_q", "block_k"), [(192, 128), (128, 64)])
@pytest.mark.parametrize(
    ("grid", "before", "after"),
    [
        ((5, 9, 13), 0, 0),
        ((5, 9, 13), 77, 150),
        ((1, 24, 24), 0, 226),
        ((1, 24, 24), 5, 0),
        ((1, 5, 7), 0, 0),
        ((1, 5, 7), 3, 9),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", [name for name in SELECTORS if name != "sliding_tiles"])
def test_every_selector_takes_blocks_of_two_sizes(name, grid, before, after, block_q, block_k, order):
    """Also one frame, fewer tokens than a block, and no block that is the video's alone."""
    selector = selector_of(name, order=order, **PARAMETERS.get(name, {}))
    arrangement = arrange(tokens_of(grid, before, after), order, CPU, block_q=block_q, block_k=block_k)
    queries, keys = arrangement.queries, arrangement.keys
    q, k = (torch.randn(2, arrangement.tokens.count, heads, 8) for heads in (4, 2))
    q, k = arrangement.arranged(4 * q), arrangement.arranged(k)
    keep = selector.keep(arrangement, 4, q, k)
    assert keep.dtype == torch.bool and keep.shape[2:] == (queries.count, keys.count)
    if keys.video and queries.video:
        assert keep[..., : queries.video, : keys.video].any()
    lists = select(selector, arrangement, 4, q, k)
    assert torch.equal(lists.keep, keep.expand(2, 4, -1, -1) | required(arrangement))
    assert lists.token_mask().shape[2:] == (queries.count * block_q, keys.count * block_k)
    kept = recall(q, k, lists.keep, arrangement)
    assert (kept > 0).all() and (kept < 1 + 1e-5).all()


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
