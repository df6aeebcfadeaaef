"""Parts on the device: what is moved, when, and that it changes no bit of the result.

All of it is logic on the CPU, over both engines where both can do it (tests/support/cards.py). Speed,
overlap, peak memory and page-locking itself need a card and are not tested here.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import logging
import types
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from models.z_image.text_encoder.prompt_cache import PromptCache
from shared.errors import Cancelled
from shared.gpu import interrupt, offloading
from shared.gpu.offloading import Residency
from shared.gpu.offloading_stream import sizes_of
from shared.gpu.placement import Placement, resident_blocks
from shared.gpu.transport import PAGE, CudaTransport, pinned_bytes
from tests.support import mini
from tests.support.cards import Card
from tests.support.counting import CountingTransport
from tests.support.fake_cuda import FakeCuda
from tests.support.streamed import Model, equal, inputs

CPU = torch.device("cpu")
PROMPT = "a red circle above a blue square on a yellow background"


def watched(model: Model, **options) -> tuple[CountingTransport, Residency]:
    transport = CountingTransport(**options)
    transport.watch(model.blocks())
    return transport, Residency(CPU, pinned_limit=1 << 30, transport=transport)


def model_for(card: Card, **sizes: int) -> Model:
    """For mmgp without a buffer that is a parameter's memory, which it cannot move."""
    return Model(**sizes, tied=card.engine == "stream")


def state(model: nn.Module) -> list[Tensor]:
    return [x.clone() for x in (*model.parameters(), *model.buffers())]


def attributes_of(model: nn.Module) -> list[set[str]]:
    """Of each module, but for one that torch has in the class until it is set."""
    return [set(vars(module)) - {"_compiled_call_impl"} for module in model.modules()]


ORDERS = {"whole": None, "reversed": [6, 5, 4, 3, 2, 1, 0], "some twice": [0, 2, 2, 5, 2, 6], "one": [4]}


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("resident", [None, 0, 1, 3, 5, 6, 7, 20])
def test_streamed_equals_untouched(card: Card, resident: int | None, prefetch: bool, pinned: bool) -> None:
    """Logic: whatever stays, in whatever order the blocks are called, pass after pass, use after use."""
    model = model_for(card)
    before, identities = state(model), [id(x) for x in (*model.parameters(), *model.buffers())]
    strides = [x.stride() for x in (*model.parameters(), *model.buffers())]
    attributes = attributes_of(model)
    plain = copy.deepcopy(model)
    residency = card.watched(model.blocks())
    residency.place(model, Placement(resident, pinned=pinned, prefetch=prefetch))
    for _ in range(2):
        with torch.set_grad_enabled(resident == 1), residency.use(model):
            for order in (*ORDERS.values(), None):
                assert equal(model(inputs(2), order), plain(inputs(2), order))
        residency.evict()
        assert card.live == 0 and residency.status().on_card == {"Model": 0}
    assert (card.pinned > 0) == pinned
    assert equal(state(model), before)
    assert attributes == attributes_of(model)
    assert identities == [id(x) for x in (*model.parameters(), *model.buffers())]
    assert strides == [x.stride() for x in (*model.parameters(), *model.buffers())]
    assert all(block._compiled_call_impl is None for block in model.blocks())


def test_a_block_is_one_copy_and_the_next_one_is_under_way_while_it_computes() -> None:
    """Logic: order of the copies, one ahead, from the second pass on as learned from the first."""
    model = Model()
    sizes = sizes_of(model)[1:]
    transport, residency = watched(model)
    seen: list[tuple[int, int]] = []  # (block that computes, copies that were started before)
    for i, block in enumerate(model.blocks()):
        block.register_forward_pre_hook(lambda *_, i=i: seen.append((i, len(transport.copies))))
    residency.place(model, Placement(0))
    with torch.inference_mode(), residency.use(model):
        model(inputs())
        model(inputs(), list(range(2, 7)))
        model(inputs(), list(range(2, 7)))
    started = [n for _, n in seen]
    base = 1
    assert started[:7] == [base + n for n in (2, 3, 4, 5, 6, 7, 7)]  # one ahead; none is known after the last
    assert started[7:12] == [base + n for n in (9, 10, 11, 12, 13)]  # a first surprise, after the last block
    assert started[12:] == [base + n for n in (14, 15, 16, 17, 18)]  # then the pass begins ahead, too
    assert transport.copies[1:8] == sizes


def test_from_ordinary_ram_the_next_block_is_copied_when_the_current_one_is_queued() -> None:
    """Logic: such a copy holds the thread, so it may not come before the block's own kernels."""
    model = Model(first=0, layers=5)
    transport, residency = watched(model)
    seen: list[int] = []
    for block in model.blocks():
        block.register_forward_pre_hook(lambda *_: seen.append(transport.moved))
    residency.place(model, Placement(0, pinned=False))
    with torch.inference_mode(), residency.use(model):
        model(inputs(3))
    grew = [a < b for a, b in zip(seen, seen[1:], strict=False)]
    after_the_first_call = [True, False, False] * 4  # of three calls per block
    assert grew == [*after_the_first_call, False, False]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("resident", [0, 7, 13, 18])
def test_bytes_per_step(card: Card, resident: int, batch: int) -> None:
    """Logic: at most 1.05 times the streamed bytes, also for a batch, and nothing for what stays."""
    model = model_for(card, first=1, layers=20)
    residency = card.watched(model.blocks())
    stays = resident_blocks([list(model.first), list(model.layers)], resident)
    sizes = dict(zip(model.blocks(), sizes_of(model)[1:], strict=True))
    if card.engine == "mmgp":  # copies tensor by tensor, without gaps
        sizes = {block: sum(x.nbytes for x in (*block.parameters(), *block.buffers())) for block in sizes}
    streamed = sum(sizes[block] for block in model.layers if block not in stays)
    residency.place(model, Placement(resident))
    steps = 4
    with torch.inference_mode(), residency.use(model):
        model(inputs(), [0, 1])
        before = card.moved
        for _ in range(steps):
            model(inputs(batch), list(range(1, 21)))
    moved = card.moved - before
    assert residency.status().moved["Model"] == card.moved
    if resident == 18 and card.engine == "stream":  # two blocks have two slots
        assert moved <= streamed
    else:
        one = max(sizes.values())  # which a surprise costs, and which was fetched before
        assert 0.9 * steps * streamed - one < moved <= 1.05 * steps * streamed + one
    residency.forget()
    del model, stays, sizes
    gc.collect()
    assert card.live == card.pinned == 0


@torch.inference_mode()
@pytest.mark.parametrize("keep", [True, False])
def test_an_exception_and_a_cancel_leave_the_part_usable(card: Card, keep: bool) -> None:
    """Logic: the next run is clean and the weights are whole."""
    model = model_for(card)
    before, plain = state(model), copy.deepcopy(model)(inputs())
    residency = card.watched(model.blocks())
    residency.place(model, Placement(2, keep=keep))
    for stop in range(8):
        with pytest.raises((Cancelled, IndexError)), residency.use(model):
            model(inputs(), None if stop < 7 else [0, 1, 99], stop)
        with residency.use(model):
            assert equal(model(inputs()), plain)
    residency.evict()
    assert card.live == 0 and equal(state(model), before)


@torch.inference_mode()
def test_cancel_is_heard_while_a_part_is_page_locked(card: Card) -> None:
    """Logic: at the first question after the start; the part is whole, and comes at the next use."""
    model = model_for(card)
    before, attributes, plain = state(model), attributes_of(model), copy.deepcopy(model)(inputs())
    residency = card.watched(model.blocks())
    for placement in (Placement(0), Placement(2)):
        for cancelled in (True, False, True):
            residency.place(model, replace(placement, prefetch=cancelled))
            answers = iter([False, False, cancelled])
            ends = pytest.raises(Cancelled) if cancelled else contextlib.nullcontext()
            with ends, interrupt.listening(functools.partial(next, answers, cancelled)), residency.use(model):
                assert not cancelled and equal(model(inputs()), plain)
        residency.evict()
        assert card.live == 0 and equal(state(model), before)
        assert attributes_of(model)[0] == attributes[0]


def test_no_room_on_the_device_leaves_the_part_in_ram() -> None:
    """Logic: an allocation that fails half way."""
    model = Model()
    plain = copy.deepcopy(model)(inputs())
    transport, residency = watched(model)
    before = state(model)
    empty, calls = transport.empty, []

    def limited(nbytes: int) -> Tensor:
        calls.append(nbytes)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("no room")
        return empty(nbytes)

    transport.empty = limited  # type: ignore[method-assign]
    residency.place(model, Placement(4))
    with pytest.raises(torch.OutOfMemoryError), residency.use(model):
        raise AssertionError("not reached")
    assert transport.live == 0 and equal(state(model), before)
    with torch.inference_mode(), residency.use(model):
        assert equal(model(inputs()), plain)


def test_a_card_that_is_full_leaves_the_part_in_ram(monkeypatch) -> None:
    """Logic: mmgp, wherever the room ends; the part then runs where there is more of it."""
    model = Model(tied=False)
    before, plain = state(model), copy.deepcopy(model)(inputs())
    side = FakeCuda()
    side.install(monkeypatch)
    residency = Card("mmgp", side).watched(model.blocks())
    residency.place(model, Placement(4))
    for room in range(0, sum(sizes_of(model)), 1500):
        side.room = room
        with contextlib.suppress(torch.OutOfMemoryError), torch.inference_mode(), residency.use(model):
            assert equal(model(inputs()), plain)
        residency.evict()
        gc.collect()
        assert side.live == 0 and equal(state(model), before)
    side.room = 1 << 30
    with torch.inference_mode(), residency.use(model):
        assert equal(model(inputs()), plain)


@torch.inference_mode()
@pytest.mark.parametrize("keep", [True, False])
def test_parts_take_turns(card: Card, keep: bool) -> None:
    """Logic: a kept part is not moved again; another leaves when the next one comes, and not before."""
    first, second = model_for(card), nn.Linear(8, 8)
    plain = copy.deepcopy(first)(inputs())
    residency = card.watched(first.blocks())
    residency.place(first, Placement(None, keep=keep))
    with residency.use(first):
        whole = card.live
    for _ in range(3):
        with residency.use(first):
            assert equal(first(inputs()), plain)
        assert residency.status().on_card["Model"] == whole
        with residency.use(second):
            second(inputs()[0])
            assert residency.status().on_card["Model"] == (whole if keep else 0)
            assert card.live == residency.status().on_card["Linear"] + (whole if keep else 0)
    assert residency.status().moved["Model"] == (0 if keep else whole)
    residency.forget(first)
    assert card.live == residency.status().on_card["Linear"] and residency.status().pinned >= card.live
    residency.forget()
    del first, second
    gc.collect()
    assert card.live == card.pinned == 0


@torch.inference_mode()
def test_a_part_that_is_kept_streams_on_in_its_next_use(card: Card) -> None:
    """Logic: the slots are filled again only behind the last use's computing (the transport asserts it)."""
    model = model_for(card)
    plain = copy.deepcopy(model)(inputs())
    residency = card.watched(model.blocks())
    residency.place(model, Placement(1, keep=True))
    for _ in range(3):
        with residency.use(model):
            for _ in range(2):
                assert equal(model(inputs()), plain)


@torch.inference_mode()
def test_uses_nest(card: Card) -> None:
    """Logic: the same part again, and another one inside, which does not send the outer one away."""
    model, other = model_for(card), model_for(card, first=0, layers=2)
    plain = copy.deepcopy(model)(inputs())
    residency = card.watched([*model.blocks(), *other.blocks()])
    for part in (model, other):
        residency.place(part, Placement(1))
    with residency.use(model):
        with residency.use(model), residency.use(other):
            assert equal(model(inputs()), plain)
            other(inputs())
        assert equal(model(inputs()), plain)
        with pytest.raises(RuntimeError, match="computing"):
            residency.evict(model)
    residency.evict()
    assert residency.status().on_card == {"Model": 0}


class Shared(nn.Module):
    """A part made of another part's blocks and one of its own."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.layers = model.layers
        self.model_end = model.end
        self.own = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.own(self.model_end(x))


@torch.inference_mode()
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("resident", [None, 0, 2])
def test_parts_that_share_a_module(resident: int | None, keep: bool) -> None:
    """Logic: in turns and one within the other; the shared weights lie in RAM once."""
    model = Model()
    control = Shared(model)
    plain, other = copy.deepcopy((model, control))
    expected = plain(inputs()), other(inputs()[0])
    transport, residency = watched(model)
    for part in (model, control):
        residency.place(part, Placement(resident, keep=keep))
    for _ in range(2):
        with residency.use(model):
            assert equal(model(inputs()), expected[0])
            with residency.use(control):
                assert torch.equal(control(inputs()[0]), expected[1])
            assert equal(model(inputs()), expected[0])
        with residency.use(control):
            assert torch.equal(control(inputs()[0]), expected[1])
    once = sum(sizes_of(model)) + 512  # and two small tensors
    assert transport.pinned == residency.status().pinned == once
    residency.evict()
    assert transport.live == 0
    residency.forget()
    assert transport.pinned == 0


@torch.inference_mode()
def test_weights_that_change_between_runs(card: Card) -> None:
    """Logic: replaced, edited in RAM, added (a LoRA) and removed again; what stays is not packed again."""
    model = model_for(card)
    residency = card.watched(model.blocks())
    residency.place(model, Placement(1, keep=True))

    def check() -> None:
        residency.evict()
        plain = model_for(card)
        values = {name: x.clone() for name, x in (*model.named_parameters(), *model.named_buffers())}
        for name, x in (*plain.named_parameters(), *plain.named_buffers()):
            x.copy_(values[name])
        expected = plain(inputs())
        with residency.use(model):
            assert equal(model(inputs()), expected)

    check()
    pinned = residency.status().pinned
    residency.evict()
    model.end.weight = nn.Parameter(torch.randn(8, 8), requires_grad=False)
    check()
    residency.refresh(model)
    assert card.live == 0
    model.layers[2].linear.weight.add_(1)
    check()
    for block in model.blocks():
        block.linear.register_buffer("lora_down", torch.randn(2, 8), persistent=False)
    check()
    if card.engine == "stream":
        assert card.pinned == pinned + 256 * len(model.blocks())
    residency.evict()
    for block in model.blocks():
        del block.linear.lora_down
    check()
    residency.evict()
    if card.engine == "stream":
        assert card.pinned == pinned
    model.layers[3].halves.data = torch.randn(308).bfloat16()
    check()


def test_a_tensor_of_two_blocks(card: Card) -> None:
    """Logic: it cannot be in two places at once."""
    model = model_for(card)
    model.layers[1].halves = model.layers[3].halves = model.layers[0].halves
    plain = copy.deepcopy(model)
    residency = card.watched(model.blocks())
    residency.place(model, Placement(0))
    with torch.inference_mode(), residency.use(model):
        assert equal(model(inputs()), plain(inputs()))


def test_what_stays_in_ram_is_not_touched(card: Card) -> None:
    model = model_for(card)
    model.stays_in_ram = ("table",)  # type: ignore[assignment]
    where = model.table.weight.data_ptr()
    children = list(dict(model.named_children()))
    residency = card.watched(model.blocks())
    with residency.use(model):
        assert children == list(dict(model.named_children()))
        assert model.table.weight.data_ptr() == where
    assert sizes_of(model)[0] == 512 + 256 + 0 * where  # start, end.weight, end.bias


@torch.inference_mode()
@pytest.mark.parametrize(("limit", "refuses"), [(0, False), (4000, False), (1 << 30, True)])
def test_ram_that_cannot_be_locked(limit: int, refuses: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Logic: a limit and a system that refuses; said once, and the rest goes from ordinary RAM."""
    model = Model()
    plain = copy.deepcopy(model)(inputs())
    transport = CountingTransport(pinnable=4000 if refuses else None)
    residency = Residency(CPU, pinned_limit=limit, transport=transport)
    residency.place(model, Placement(0))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with residency.use(model):
                assert equal(model(inputs()), plain)
            residency.evict()
    assert transport.pinned <= min(limit, 4000)
    assert sum("page-locked" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("refusals", [0, 2])
def test_the_cards_side_with_a_stand_in_for_torch_cuda(refusals: int, monkeypatch) -> None:
    """Logic: which calls are made, in which order; what they do on a card is not tested here."""
    calls: list[str] = []
    errors = [2] * refusals  # cudaErrorMemoryAllocation

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def record_event(self) -> str:
            calls.append(f"{self.name} records")
            return f"event of {self.name}"

        def wait_event(self, event: str) -> None:
            calls.append(f"{self.name} waits for {event}")

        def synchronize(self) -> None:
            calls.append(f"{self.name} synchronizes")

    def register(address: int, size: int, flags: int) -> int:
        assert address % PAGE == size % PAGE == 0 and flags == 1
        return errors.pop() if errors else 0

    cudart = types.SimpleNamespace(
        cudaHostRegister=register, cudaHostUnregister=lambda address: calls.append("unlocks")
    )
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copies"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("kernels"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    model = Model()
    plain = copy.deepcopy(model)(inputs())
    residency = Residency(CPU, pinned_limit=1 << 30, transport=CudaTransport(CPU))
    residency.place(model, Placement(0))
    with torch.inference_mode(), residency.use(model):
        calls.clear()
        assert equal(model(inputs()), plain)
    assert not any("synchronizes" in call for call in calls)
    if not refusals:
        assert residency.status().pinned == sum(sizes_of(model))
        block = ["kernels records", "kernels waits for event of copies"]
        copied = ["copies waits for event of kernels", "copies records"]
        assert calls[: len(block + copied)] == block + copied
    else:
        assert residency.status().pinned == 0
    residency.forget()
    assert calls.count("unlocks") == (0 if refusals else 1 + len(model.blocks()))


def test_the_cpu_leaves_everything_alone() -> None:
    model = Model()
    residency = Residency(CPU)
    where = [x.data_ptr() for x in model.parameters()]
    residency.place(model, Placement(0))
    with residency.use(model):
        assert all(block._compiled_call_impl is None for block in model.blocks())
        assert where == [x.data_ptr() for x in model.parameters()]
    residency.evict()
    residency.forget()
    assert torch.get_default_device() == CPU


def test_compiled_blocks_are_not_compiled_again() -> None:
    """Logic: a graph is made when its first step runs; streaming, and another placement, make none."""
    model = Model(first=0, layers=4)
    plain = copy.deepcopy(model)(inputs())
    _, residency = watched(model)
    graphs: list[object] = []
    counts: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    for block in model.layers:
        block.compile(backend=backend, fullgraph=False)
    with torch.inference_mode():
        for placement in (Placement(0), Placement(2), Placement(None)):
            residency.place(model, placement)
            with residency.use(model):
                for _ in range(3):
                    assert equal(model(inputs()), plain)
                    counts.append(len(graphs))
    torch._dynamo.reset()
    assert counts[0] > 0 and len(set(counts)) == 1


# -- the Mini -----------------------------------------------------------------------------------------------


@pytest.fixture
def mini_pipe():
    _, pipe = mini.load("z_image_mini_base")
    yield pipe
    pipe.residency.forget()
    pipe.residency = Residency(CPU)


HOW = dict(height=128, width=128, num_inference_steps=3, guidance_scale=2.5, output_type="pt", flow_shift=6.0)


def picture(pipe, **how) -> Tensor:
    latents = torch.randn(
        how.get("num_images_per_prompt", 1), 16, 16, 16, generator=torch.Generator().manual_seed(3)
    )
    return pipe(PROMPT, latents=latents, **HOW, **how).images


def test_the_mini_streamed_is_the_mini_bit_for_bit(card: Card, mini_pipe) -> None:
    """Logic, through the real pipeline: fp32, text encoder, transformer and VAE, at every resident count."""
    plain = picture(mini_pipe)
    mini_pipe.residency = card.residency()
    for resident in (0, 1, 3, 5, 8, None):
        mini_pipe.prompt_cache = PromptCache()  # or the text encoder would not come by
        mini_pipe.residency.place(mini_pipe.transformer, Placement(resident))
        mini_pipe.residency.place(mini_pipe.text_encoder, Placement(resident))
        assert torch.equal(picture(mini_pipe), plain)
        if card.engine == "stream":
            sizes = [sizes_of(part) for part in mini_pipe.values()]
            assert card.pinned == sum(map(sum, sizes))  # all three came by
        assert card.live == mini_pipe.residency.status().on_card["AutoencoderKL"] > 0
    mini_pipe.residency.forget()
    assert card.live == 0
    assert torch.equal(picture(mini_pipe), plain)


@torch.inference_mode()
def test_the_mini_in_bf16_and_its_arguments_keep_their_dtype(card: Card, mini_pipe) -> None:
    """Logic: bit-identical, with the time still fp32 where the transformer receives and scales it."""
    model = copy.deepcopy(mini_pipe.transformer).bfloat16()
    times: list[torch.dtype] = []
    model.t_embedder.register_forward_pre_hook(lambda _, args: times.append(args[0].dtype))
    x, features = (
        torch.randn(s, generator=torch.Generator().manual_seed(2)) for s in ((16, 16, 16), (40, 96))
    )
    t = torch.tensor([0.3141592])

    def run() -> list[Tensor]:
        prepared = model.prepare(features, 16, 16)
        return [model([x.bfloat16()] * 3, t, [prepared] * 3)[0] for _ in range(2)]

    plain = run()
    residency = card.residency()
    for resident in range(9):
        residency.place(model, Placement(resident))
        with residency.use(model):
            assert equal(run(), plain)
    assert set(times) == {torch.float32}


def test_the_minis_blocks_move_once_per_step_for_any_batch(card: Card, mini_pipe) -> None:
    """Logic, through the real pipeline."""
    moved = []
    for count in (1, 3):
        mini_pipe.residency = card.residency()
        mini_pipe.residency.place(mini_pipe.transformer, Placement(0))
        picture(mini_pipe, num_images_per_prompt=count)
        moved.append(mini_pipe.residency.status().moved["ZImageTransformer2DModel"])
        mini_pipe.residency.forget()
    assert moved[0] == moved[1]


def test_a_cancelled_picture_leaves_the_next_one_as_it_was(card: Card, mini_pipe) -> None:
    """Logic, through the real pipeline."""
    plain = picture(mini_pipe)
    mini_pipe.residency = card.residency()
    mini_pipe.residency.place(mini_pipe.transformer, Placement(2))
    asked: list[int] = []
    with pytest.raises(Cancelled):
        picture(mini_pipe, interrupt=lambda: len(asked) > 9 or asked.append(1))
    assert torch.equal(picture(mini_pipe), plain)


# -- how much of what goes where ----------------------------------------------------------------------------


@pytest.mark.parametrize(("gib", "blocks"), [(3, 0), (3.5, 0), (5, 3), (10, 18), (15, None)])
def test_a_part_that_nobody_placed_stays_as_far_as_it_fits(
    gib: float, blocks: int | None, monkeypatch
) -> None:
    """3 GiB are left free; 34 blocks of 345 MiB and a base of 20, as the real transformer in bf16."""
    monkeypatch.setattr(offloading, "sizes_of", lambda part: [20 << 20, *[345 << 20] * 34])
    found = offloading._fitting(nn.Identity(), int(gib * 2**30) - offloading.ACTIVATION_BYTES)
    assert found == Placement(blocks)


def test_blocks_that_stay_are_spread_over_the_last_list_first() -> None:
    first, layers = ([nn.Identity() for _ in range(n)] for n in (2, 6))

    def positions(count: int | None) -> list[int]:
        chosen = resident_blocks([first, layers], count)
        return [i for i, block in enumerate([*first, *layers]) if block in chosen]

    assert positions(0) == [] and positions(3) == [3, 5, 7] and positions(2) == [4, 7]
    assert positions(6) == [2, 3, 4, 5, 6, 7] and positions(7) == [1, 2, 3, 4, 5, 6, 7]
    assert positions(None) == positions(99) == list(range(8))


def test_sizes_are_those_of_the_buffers() -> None:
    model = Model()
    transport, residency = watched(model)
    with residency.use(model):
        assert transport.live == sum(sizes_of(model))
    assert sizes_of(model)[1] == 8 * 256  # eight small tensors of their own
    assert 0.3 * pinned_bytes(1.0) <= pinned_bytes() <= pinned_bytes(0.5)


@pytest.mark.parametrize("device", ["meta"])
def test_weights_that_are_not_there_are_named(device: str) -> None:
    with pytest.raises(TypeError, match="Linear has an empty tensor"):
        sizes_of(nn.Linear(2, 2, device=device))
