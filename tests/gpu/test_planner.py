"""The planner: what is chosen for which card, and that it is expected to fit."""

import functools
import itertools
import re
import types
from dataclasses import replace
from pathlib import Path

import pytest

from models.z_image.checkpoints import checkpoint_sizes
from models.z_image.family import QWEN3_4B
from models.z_image.z_image_handler import family_handler
from shared.errors import UserError
from shared.gpu import machine as machines
from shared.gpu.footprint import Needs, Offers, PartSize, Variant
from shared.gpu.planner import (
    GIB,
    KINDS,
    OVERHEAD,
    PARTS,
    PINNED_RATE,
    PROFILES,
    Machine,
    Overrides,
    careful,
    plan,
)
from shared.library.outlook import chosen
from shared.weights.files import Folders
from tests.support.dimensions import DIT
from tests.support.mini import ROOT, model_def

CARDS, SIDES = (6, 8, 10, 12, 16, 24), (512, 1024, 1536, 2048)
SENTENCE = re.compile(
    r"(mmgp|stream), (bf16|int8|int4), (all on the card|\d+ of 34 layers resident)"
    r"(, text encoder streamed)?(, VAE tiled)?: about \d+\.\d of \d+ GB"
)


def card(gib, ram=64, capability=(8, 6), **others):
    """A card that the desktop has half a GiB of."""
    free = int((gib - 0.5) * GIB)
    return Machine("Card", ram * GIB, int(ram * 0.9 * GIB), gib * GIB, free, capability, **others)


@functools.cache
def offers(*kinds):
    def variant(role, kind, config):
        return Variant(f"{role}_{kind}", kind, checkpoint_sizes.published_size(role, kind, config))

    return Offers(
        tuple(variant("transformer", kind, DIT) for kind in kinds),
        (variant("text_encoder", "bf16", QWEN3_4B), variant("text_encoder", "int8", QWEN3_4B)),
        PartSize(4 * checkpoint_sizes.PUBLISHED_VAE),
    )


@functools.cache
def needs(side, **settings):
    return family_handler.query_memory("z_image", {}, {"resolution": f"{side}x{side}", **settings})


ALL = ("bf16", "int8", "svdq-int4")
FUSED = frozenset(KINDS)
MMGP, STREAM = Overrides(offload="mmgp"), Overrides(offload="stream")


@pytest.mark.parametrize("kinds", [("bf16",), ("int8",), ("svdq-int4",), ALL])
@pytest.mark.parametrize("kernels", [frozenset(), FUSED])
@pytest.mark.parametrize("engine", [MMGP, STREAM])
def test_every_plan_is_expected_to_fit(kinds, kernels, engine):
    for gib, side, guidance in itertools.product(CARDS, SIDES, (0.0, 4.0)):
        here, job = card(gib, kernels=kernels), needs(side, guidance_scale=guidance, batch_size=2)
        for rung in range(5):
            found = plan(here, offers(*kinds), job, engine, rung=rung)
            assert found.engine == engine.offload
            assert found.peak <= 0.8 * gib * GIB, (gib, side, found.sentence())
            assert SENTENCE.fullmatch(found.sentence()), found.sentence()
            assert found.sentence().endswith(f" of {gib} GB")
            assert 0 <= found.resident_layers <= found.total_layers == 34


@pytest.mark.parametrize("kind", ALL)
def test_more_memory_never_means_fewer_resident_layers(kind):
    for side in SIDES:
        layers = [plan(card(gib), offers(kind), needs(side)).resident_layers for gib in range(6, 33)]
        assert layers == sorted(layers)
        assert layers[-1] == 34


def test_more_memory_never_means_slower_steps_nor_larger_pictures_more_layers():
    for kernels, side in itertools.product((frozenset(), FUSED), SIDES):
        seconds = [
            plan(card(gib, kernels=kernels), offers(*ALL), needs(side)).seconds for gib in range(6, 33)
        ]
        assert all(later <= 1.1 * earlier for earlier, later in itertools.pairwise(seconds))
    for gib in CARDS:
        layers = [plan(card(gib), offers("bf16"), needs(side)).resident_layers for side in SIDES]
        assert layers == sorted(layers, reverse=True)


# ---- by hand -----------------------------------------------------------------------------------------------

MIB = 1 << 20


def round_offers(count=10, on_disk=True):
    """Ten blocks of 500 MiB and 100 MiB besides; a text encoder of 8 blocks of 250 MiB."""
    blocks = PartSize(100 * MIB, (500 * MIB,) * count)
    small = PartSize(100 * MIB, (250 * MIB,) * count)
    encoder = PartSize(0, (250 * MIB,) * 8, 700 * MIB)
    return Offers(
        (Variant("big", "bf16", blocks, on_disk), Variant("small", "int8", small, on_disk)),
        (Variant("encoder", "bf16", encoder),),
        PartSize(300 * MIB),
    )


ROUND = Needs(
    encode=50 * MIB,
    denoise=400 * MIB,
    denoise_quantized=600 * MIB,
    decode={None: 3000 * MIB, 512: 800 * MIB, 256: 200 * MIB},
    linear_flops=8e13,
    attention_flops=0,
)


BIG = replace(round_offers(), transformer=round_offers().transformer[:1])


def test_a_card_of_6_by_hand():
    # budget 0.8 * 6144 = 4915; 384 of overhead, 400 of activations, 100 beside the blocks: 4031 for blocks.
    # Two slots of 500 leave 3031: 6 blocks. Denoising then takes 384 + 400 + 100 + 3000 + 1000 = 4884.
    # Decoding whole: 384 + 300 + 3000 = 3684. The encoder whole: 384 + 50 + 2000 = 2434. Both fit.
    # Kept beside the decoder the transformer would need 4100 + 384 + 300 + 800 even with tiles: no.
    found = plan(card(6), BIG, ROUND, STREAM)
    assert (found.resident_layers, found.peak, found.keep) == (6, 4884 * MIB, ())
    assert (found.vae_tile, found.encoder_whole) == (None, True)
    assert found.sentence() == "stream, bf16, 6 of 10 layers resident: about 4.8 of 6 GB"
    # 8e13 operations at 40e12 per second: 2 s; four streamed blocks of 500 MiB at 12.5 GB/s: 0.17 s
    assert found.seconds == 2.0
    # mmgp has a third place for streamed blocks: one layer less stays, and the peak is the same
    found = plan(card(6), BIG, ROUND, MMGP)
    assert (found.resident_layers, found.peak) == (5, 4884 * MIB)
    assert found.sentence() == "mmgp, bf16, 5 of 10 layers resident: about 4.8 of 6 GB"


def test_a_card_of_12_by_hand():
    # budget 9830: all ten blocks. Kept: 5100 + 300 beside the whole picture's 3000 and 384: 8784.
    # The encoder's 2000 beside that: 10784, too much; with tiles of 512 it would be 384 + 5100 + 2000 + 300
    # + 800 = 8584, and denoising 384 + 400 + 5100 + 2000 + 300 = 8184: everything is kept.
    found = plan(card(12), BIG, ROUND)
    assert (found.resident_layers, found.keep, found.vae_tile) == (10, PARTS, 512)
    assert found.peak == 8584 * MIB
    assert found.sentence() == "mmgp, bf16, all on the card, VAE tiled: about 8.4 of 12 GB"


def test_the_ladder_of_a_card_of_6_by_hand():
    # rung 1: 0.75 * 6 = 4 blocks, tiles of 512: 384 + 400 + 100 + 2000 + 1000 = 3884
    # rung 2: 3 blocks, tiles of 256, encoder streamed: 3384
    # rung 3: nothing resident: 384 + 400 + 100 + 1000 = 1884
    # rung 4: the int8 file streamed: 384 + 600 + 100 + 500 = 1584, and the last one
    ladder = [plan(card(6), round_offers(), ROUND, STREAM, rung=rung) for rung in range(6)]
    assert [p.peak // MIB for p in ladder] == [4884, 3884, 3384, 1884, 1584, 1584]
    assert [p.resident_layers for p in ladder[:4]] == [6, 4, 3, 0]
    assert [p.vae_tile for p in ladder[:4]] == [None, 512, 256, 256]
    assert [p.transformer.source for p in ladder] == ["big"] * 4 + ["small"] * 2
    assert [p.last for p in ladder] == [False] * 4 + [True] * 2
    assert [p.rung for p in ladder] == [0, 1, 2, 3, 4, 4]


def test_the_ladder_ends_where_no_smaller_file_is_on_disk():
    here = round_offers()
    only = Offers(
        (here.transformer[0], replace(here.transformer[1], on_disk=False)), here.text_encoder, here.vae
    )
    last = plan(card(6), only, ROUND, rung=9)
    assert (last.transformer.source, last.resident_layers, last.last) == ("big", 0, True)


# ---- which file --------------------------------------------------------------------------------------------


def test_kernels_make_int8_the_fastest_and_without_them_bf16_is():
    assert plan(card(12, kernels=FUSED), offers("bf16", "int8"), needs(1024)).transformer.kind == "int8"
    assert plan(card(12), offers("bf16", "int8"), needs(1024)).transformer.kind == "bf16"


def test_where_the_bus_is_the_limit_fewer_bytes_win():
    fast = card(8, capability=(9, 0))  # a card that computes a step in less time than bf16 takes to come
    assert plan(fast, offers("bf16", "int8"), needs(1024)).transformer.kind == "int8"


def test_precision_wins_near_ties():
    slow = replace(
        ROUND, linear_flops=1e12, attention_flops=1e16
    )  # all is attention, which no kind speeds up
    assert plan(card(24, kernels=FUSED), round_offers(), slow).transformer.kind == "bf16"


def test_a_file_on_disk_beats_a_faster_download_unless_it_cannot_run():
    big, small = round_offers().transformer
    here = replace(round_offers(), transformer=(big, replace(small, on_disk=False)))
    fused = card(6, kernels=FUSED)
    assert plan(fused, here, ROUND).transformer.source == "big"
    assert plan(fused, round_offers(on_disk=False), ROUND).transformer.source == "small"
    # 0.8 * 2 GiB = 1638: the bf16 file needs 1884 at least (see above), the int8 file 1584
    assert plan(replace(card(2), vram_free=2 * GIB), here, ROUND, STREAM).transformer.source == "small"


def test_too_little_ram_means_a_quantized_file_or_pageable_weights():
    plenty, little = card(8, ram=64), card(8, ram=12)
    assert plan(plenty, offers("bf16", "int8"), needs(512)).transformer.kind == "bf16"
    short = plan(little, offers("bf16", "int8"), needs(512))
    assert (short.transformer.kind, short.text_encoder.kind) == ("int8", "int8")
    only = plan(little, offers("bf16"), needs(512))
    assert "transformer" not in only.pinned and only.resident_layers > 0
    assert only.seconds > sum(only.transformer.size.block_bytes[only.resident_layers :]) / PINNED_RATE


def test_what_may_be_page_locked_is_limited():
    assert plan(card(8), offers("bf16"), needs(512)).pinned == ("transformer", "text_encoder")
    # 12.3 GB of transformer, 7.1 GB of text encoder; 0.5 * 32 GiB = 17.2 GB
    assert plan(card(8, ram=32), offers("bf16"), needs(512)).pinned == ("transformer",)
    none = plan(card(8, ram=32), offers("bf16"), needs(512), Overrides(reserved=0.01))
    assert none.pinned == ()


def test_nothing_fits_is_one_sentence_that_says_what_would():
    with pytest.raises(UserError) as error:
        plan(card(2), offers("bf16"), needs(2048))
    text = str(error.value)
    assert re.search(r"needs about 2\.\d GB .* 1\.5 GB of the 2 GB of Card may be used", text)
    assert "smaller resolution" in text and text.count(". ") == 0


def test_memory_that_other_programs_hold_is_not_planned_with():
    busy = replace(card(8), vram_free=4 * GIB)
    assert plan(busy, offers("bf16"), needs(1024)).peak <= 4 * GIB


# ---- what the user decided ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("profile", "layers", "pinned", "prefetch"),
    [
        ("1", 34, ("transformer", "text_encoder"), True),
        ("2", 0, ("transformer", "text_encoder"), True),
        ("3", 34, ("transformer",), True),
        ("3.5", 34, (), True),
        ("4", 0, ("transformer",), True),
        ("4.5", 0, ("transformer",), False),
        ("5", 0, (), True),
    ],
)
def test_profiles_are_obeyed(profile, layers, pinned, prefetch):
    assert list(PROFILES) == ["1", "2", "3", "3.5", "4", "4.5", "5"]
    found = plan(card(8), offers("bf16"), needs(1024), Overrides("stream", profile))
    assert (found.resident_layers, found.pinned, found.prefetch) == (layers, pinned, prefetch)
    assert found.placements()["transformer"] == {
        "resident_blocks": layers if layers < 34 else None,
        "keep": "transformer" in found.keep,
        "pinned": "transformer" in pinned,
        "streamed_only": False,
        "prefetch": prefetch,
    }
    # a plan that the user forced is left when it does not fit
    forced = Overrides("stream", profile)
    assert plan(card(8), offers("bf16"), needs(1024), forced, rung=1).resident_layers < 34


@pytest.mark.parametrize(
    ("profile", "gib", "layers", "encoder_whole"),
    [
        # 12.3 GB in 34 layers of 362 MB: whole in 0.8 of 16 GiB; of 8 GiB 6872 - 23 - 2 * 362 MB hold 16, and
        # the text encoder's 7.1 GB do not fit either
        ("1", 16, 34, True), ("1", 8, 16, False), ("3", 8, 16, False), ("3.5", 16, 34, True),
        ("2", 16, 0, False), ("4", 16, 0, False), ("4.5", 16, 0, False), ("5", 16, 0, False),
    ],
)  # fmt: skip
def test_mmgps_profiles_are_those_of_wan2gp(profile, gib, layers, encoder_whole):
    """2, 4 and 5 have a budget of 100 MB, with which no layer stays; one part at a time is on the card."""
    found = plan(card(gib), offers("bf16"), needs(512), Overrides("mmgp", profile))
    assert (found.resident_layers, found.encoder_whole, found.keep) == (layers, encoder_whole, ())
    assert found.sentence().startswith(f"mmgp profile {profile}, bf16, ")
    assert (found.pinned, found.prefetch) == (PROFILES[profile].pinned[:2], profile != "4.5")


def test_preload_is_obeyed():
    # a layer of the 6B model is 362 MB: 2000 MiB hold five; as mmgp's budget, beside two in transit, three
    for profile in ("", "4"):
        for engine, layers in (("stream", 5), ("mmgp", 3)):
            chosen = Overrides(engine, profile, preload=2000 * MIB)
            assert plan(card(8), offers("bf16"), needs(1024), chosen).resident_layers == layers
    whole = Overrides("mmgp", "4", preload=12000 * MIB)
    assert plan(card(24), offers("bf16"), needs(1024), whole).resident_layers == 34
    async_off = Overrides("mmgp", "4.5", preload=2000 * MIB)
    assert plan(card(8), offers("bf16"), needs(1024), async_off).resident_layers == 0


def test_mmgp_is_the_engine_where_it_is_installed():
    without = replace(card(8), mmgp=False)
    assert plan(card(8), BIG, ROUND).engine == "mmgp"
    assert plan(without, BIG, ROUND).engine == plan(without, BIG, ROUND, STREAM).engine == "stream"
    with pytest.raises(UserError, match="mmgp .* is not installed: .* or choose --offload stream"):
        plan(without, BIG, ROUND, MMGP)


def test_where_ram_is_short_the_streamed_blocks_alone_are_page_locked():
    # 0.5 * 16 GiB = 8.6 GB of the 12.3 GB may be locked; on a card of 12 GiB 3.6 GB are streamed
    found = plan(card(12, ram=16), offers("bf16"), needs(512), STREAM)
    assert 0 < 34 - found.resident_layers <= 12
    assert "transformer" in found.pinned and "transformer" in found.streamed_only
    assert found.placements()["transformer"]["streamed_only"]
    plenty = plan(card(12, ram=64), offers("bf16"), needs(512), STREAM)
    assert "transformer" in plenty.pinned and plenty.streamed_only == ()


def test_a_16_bit_dtype_asks_for_the_16_bit_file():
    found = plan(card(8, kernels=FUSED), offers("bf16", "int8"), needs(1024), Overrides(dtype="fp16"))
    assert (found.transformer.kind, found.dtype) == ("bf16", "fp16")
    assert plan(card(8), offers("int8"), needs(1024), Overrides(dtype="bf16")).transformer.kind == "int8"


def test_the_safety_coefficient_is_obeyed():
    plans = [plan(card(8), offers("bf16"), needs(1024), Overrides(safety=share)) for share in (0.5, 0.7, 0.9)]
    assert all(p.peak <= share * 8 * GIB for p, share in zip(plans, (0.5, 0.7, 0.9), strict=True))
    assert plans[0].resident_layers < plans[1].resident_layers < plans[2].resident_layers


# ---- on a CPU ----------------------------------------------------------------------------------------------


def cpu(ram, **others):
    return Machine("CPU", ram * GIB, ram * GIB, **others)


def test_a_cpu_takes_the_most_precise_file_that_fits_in_its_ram():
    found = plan(cpu(64, fast_bf16=True), offers("bf16", "int8"), needs(1024))
    assert found.transformer.kind == "bf16"
    assert re.fullmatch(r"computes on the CPU, bf16, about \d+\.\d GB of RAM", found.sentence())
    assert 11.4 < found.ram / GIB < 30 and not found.last and not found.warning
    assert plan(cpu(16), offers("bf16", "int8"), needs(512)).transformer.kind == "int8"
    assert plan(cpu(2), offers("bf16", "int8"), needs(512)).transformer.kind == "int8"
    slow = plan(cpu(64), offers("bf16"), needs(512)).sentence()
    assert slow.startswith("computes on the CPU, fp32, about")


def test_a_cpu_without_room_for_a_files_weights_reads_them_and_names_the_smaller_file():
    """They are mapped: what does not fit is read in each step."""
    two = offers("bf16", "int8")
    only = replace(two, transformer=(two.transformer[0], replace(two.transformer[1], on_disk=False)))
    assert plan(cpu(16), only, needs(512)).warning == ""
    found = plan(cpu(10), only, needs(512))
    assert re.fullmatch(
        r"10\.0 GB of RAM are free, so every step reads up to 11\.5 GB from the disk: take transformer_int8, "
        r"6\.5 GB instead of 11\.5",
        found.warning,
    )
    assert found.report() == f"{found.sentence()}; {found.warning}"
    alone = plan(cpu(4), offers("int8"), needs(512)).warning
    assert alone == "4.0 GB of RAM are free, so every step reads up to 6.5 GB from the disk"


def test_a_cpu_without_room_for_the_activations_is_refused_in_one_sentence():
    only = offers("bf16", "int8")
    with pytest.raises(UserError, match=r"about 3\.\d GB of RAM and 1\.0 GB are free: choose a smaller res"):
        plan(cpu(1), only, needs(2048))
    unpacked, two = offers("svdq-int4"), offers("svdq-int4", "int8")
    assert "some are read from the disk again" in plan(cpu(8), unpacked, needs(512)).warning  # the encoder's
    with pytest.raises(UserError, match=r"close other programs\.$"):
        plan(cpu(4), unpacked, needs(512))
    here = (two.transformer[0], replace(two.transformer[1], on_disk=False))
    with pytest.raises(UserError, match=r"or take transformer_int8, whose weights need not all lie in RAM"):
        plan(cpu(4), replace(two, transformer=here), needs(512))


def test_a_cpu_decodes_in_the_largest_tiles_that_fit():
    tiles = [plan(cpu(ram), offers("int8"), needs(1024)).vae_tile for ram in (64, 8, 2)]
    assert tiles[0] is None and tiles[2] == 256


def test_the_second_try_on_a_cpu_takes_the_smallest_file_and_tiles():
    two = offers("bf16", "int8")
    first, second = (plan(cpu(64), two, needs(1024), rung=rung) for rung in (0, 1))
    assert (first.transformer.kind, first.last, first.vae_tile) == ("bf16", False, None)
    assert (second.transformer.kind, second.last, second.vae_tile) == ("int8", True, 256)
    assert second.ram < first.ram
    assert plan(cpu(64), offers("int8"), needs(512)).last


def test_the_second_try_on_a_card_takes_the_smallest_files_and_locks_no_memory():
    offered, overrides = careful(offers("bf16", "int8"), Overrides(compile=True))
    assert [v.kind for v in (*offered.transformer, *offered.text_encoder)] == ["int8", "int8"]
    found = plan(card(8), offered, needs(1024), overrides)
    assert found.pinned == () and found.compile
    here = replace(offers("bf16", "int8").transformer[1], on_disk=False)
    two = replace(offers("bf16"), transformer=(*offers("bf16").transformer, here))
    assert [v.kind for v in careful(two, overrides)[0].transformer] == ["bf16"]


def test_a_16_bit_dtype_that_the_processor_is_slow_at_is_told():
    warned = "this processor is several times slower in bf16: leave --bf16 out"
    assert plan(cpu(64), offers("bf16"), needs(512), Overrides(dtype="bf16")).warning == warned
    assert not plan(cpu(64, fast_bf16=True), offers("bf16"), needs(512), Overrides(dtype="bf16")).warning
    assert "in fp16" in plan(cpu(64), offers("bf16"), needs(512), Overrides(dtype="fp16")).warning


def test_a_card_beside_little_ram_is_told_what_it_costs():
    two = offers("bf16", "int8")
    only = replace(two, transformer=(two.transformer[0], replace(two.transformer[1], on_disk=False)))
    found = plan(card(8, ram=6), only, needs(1024))
    read = sum(found.transformer.size.block_bytes[: 34 - found.resident_layers]) / GIB
    assert found.warning.startswith(f"5.4 GB of RAM are free, so every step reads up to {read:.1f} GB")
    assert found.warning.endswith("take transformer_int8, 6.5 GB instead of 11.5")
    assert "some are read from the disk again" in plan(card(16, ram=12), only, needs(1024)).warning
    assert plan(card(8), only, needs(1024)).warning == ""


def test_weights_on_a_cpu_count_in_the_dtype_that_they_compute_in():
    assert (cpu(8).float_bytes, cpu(8, fast_bf16=True).float_bytes, card(8).float_bytes) == (4, None, 2)


# ---- reading the machine -----------------------------------------------------------------------------------


def test_a_card_is_read_from_nvidia_smi(monkeypatch):
    rows = ["NVIDIA GeForce RTX 3060, 12288, 11000, 8.6", "NVIDIA GeForce RTX 4060, 8188, 7000, 8.9"]
    monkeypatch.setattr(machines, "nvidia_smi", lambda: rows)
    found = machines.survey("cuda:1")
    assert (found.name, found.capability) == ("NVIDIA GeForce RTX 4060", (8, 9))
    assert (found.vram_total, found.vram_free) == (8188 * MIB, 7000 * MIB)
    assert found.ram_total >= found.ram_free > 0
    assert machines.survey().capability == (8, 6)
    assert machines.survey("cpu").capability is None
    assert machines.survey("cuda:2").capability is None


def test_without_nvidias_driver_there_is_no_card(monkeypatch):
    monkeypatch.setattr(machines, "QUERY", ("no-such-program-as-this",))
    assert machines.survey().capability is None


def test_a_containers_limit_is_the_ram_and_own_weights_count_as_free(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text(str(3 * GIB))
    (tmp_path / "memory.current").write_text(str(2 * GIB))
    (tmp_path / "memory.stat").write_text(f"anon 5\nactive_file {GIB // 2}\ninactive_file {GIB // 4}\n")
    mine = types.SimpleNamespace(rss=300 * MIB, shared=200 * MIB)
    system = types.SimpleNamespace(total=8 * GIB, available=6 * GIB)
    monkeypatch.setattr(machines.psutil, "Process", lambda: types.SimpleNamespace(memory_info=lambda: mine))
    monkeypatch.setattr(machines.psutil, "virtual_memory", lambda: system)
    monkeypatch.setattr(machines, "CGROUP", tmp_path)
    # 3 GiB less (2 used, of which 0.75 cache files), and 100 MiB of its own
    assert machines.ram() == (3 * GIB, int(1.75 * GIB) + 100 * MIB)
    (tmp_path / "memory.max").write_text("max")
    assert machines.ram() == (8 * GIB, 6 * GIB + 100 * MIB)


def test_the_overhead_is_part_of_every_peak():
    assert plan(card(24), round_offers(), replace(ROUND, denoise=0)).peak > OVERHEAD


def test_the_control_networks_file_is_chosen_with_the_transformers():
    """bf16 where there is room for it, int8 where it saves streaming; what is on disk comes first."""
    plain, definition = (model_def(name) for name in ("z_image", "z_image_control2_1"))
    definition = {**definition, "URLs": plain["URLs"][:1]}
    found = family_handler.query_offers("z_image_control2_1", definition, Folders(ROOT, ROOT / "nowhere"))
    assert [(v.kind, v.module.kind) for v in found.transformer] == [("bf16", "bf16"), ("bf16", "int8")]
    job = family_handler.query_memory(
        "z_image_control2_1", definition, {"resolution": "512x512", "image_guide": "x"}
    )
    chosen_at = {gib: plan(card(gib), found, job) for gib in (8, 32)}
    assert [p.transformer.module.kind for p in chosen_at.values()] == ["int8", "bf16"]
    assert chosen_at[8].sentence().startswith("mmgp, bf16 with int8 control, ")
    bf16, int8 = found.transformer
    here = replace(found, transformer=(replace(bf16, on_disk=True), int8))
    assert plan(card(8), here, job).transformer.module.kind == "bf16"
    required = family_handler.query_model_files("z_image_control2_1", definition)
    files = {one.role: one.alternatives for one in chosen(required, chosen_at[8])}
    assert [Path(url).stem[-9:] for url in files["module0"]] == ["bf16_int8"]
