"""Moves a model's blocks with mmgp (`--offload mmgp`), Wan2GP's offloading: the only file that imports it.

mmgp 3.8.2 lists a part's blocks, page-locks their weights, and copies a block to the card when it is called
and the next one beside it. What it does besides does not suit this program, and is cured here; the tests
watch the internals that the cures touch:

* Its import replaces functions of safetensors, accelerate and transformers by some that transformers 5 cannot
  call: they are put back.
* It compares a block's name with one of another form, so every block it fetched ahead is fetched again: the
  names are made alike. Which block follows which is learned from the passes, as one pass goes over several
  lists of blocks.
* It hooks every module, casts fp32 arguments of some and hides a class that LoRAs swap: its hooks stay on the
  blocks that are streamed, while their part is in use; the rest is on the card by then.
* It makes blocks of the small embedders and of short lists: what `streamed_blocks` does not name stays on the
  card, and the planner's count of the others does.
* It cannot page-lock tensors that are not row-major: that is done before.
* A block that was fetched ahead outlives `unload_all`, and tensors come back as other objects: both are put
  right. `set_default_device` is undone.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from shared.errors import Cancelled, UserError
from shared.gpu import heap, interrupt
from shared.gpu.placement import Placement, Units, block_lists, resident_blocks, tensors_by_unit

log = logging.getLogger(__name__)

VERSION = "3.8.2"  # the one whose internals this file knows
MIB = 1 << 20


@functools.cache
def load_mmgp() -> Any:
    """mmgp's module `offload`, with what its import replaced elsewhere put back. UserError without mmgp."""
    import accelerate.utils.modeling as accelerate
    import safetensors.torch
    import transformers.modeling_utils as transformers

    replaced = [
        (module, name, getattr(module, name))
        for module in (safetensors, safetensors.torch, accelerate, transformers)
        for name in ("safe_open", "load_file", "safe_load_file")
        if hasattr(module, name)
    ]
    try:
        from mmgp import offload
    except ImportError as error:
        raise UserError(
            f"mmgp cannot be used ({error}): install mmgp=={VERSION}, or choose --offload stream."
        ) from error
    for module, name, original in replaced:
        setattr(module, name, original)
    if (found := importlib.metadata.version("mmgp")) != VERSION:
        log.warning("mmgp %s is installed; ZGP knows %s: --offload stream does without it.", found, VERSION)
    return offload


class MmgpEngine:
    """See `placement.Engine`. Each part has a manager of mmgp's own, so that a part that comes, goes or
    changes leaves the others alone. Two parts may not have a module in common, nor a parameter and a buffer
    their memory.
    """

    def __init__(self, device: torch.device, pinned_limit: int) -> None:
        """pinned_limit: bytes of RAM to page-lock at most."""
        self._device, self._limit = device, pinned_limit
        self._known: dict[nn.Module, ManagedPart] = {}

    def free(self) -> int:
        return torch.cuda.mem_get_info(self._device)[0]

    def trim(self) -> None:
        torch.cuda.empty_cache()

    def bring(self, part: nn.Module, units: Units, placement: Placement) -> ManagedPart:
        known = self._known.pop(part, None)  # should anything fail, it is made anew
        if known is None or known.placement != placement or not known.is_made_of(units):
            if known is not None:
                known.release()
            load_mmgp().total_pinned_bytes = self.pinned()  # its own count forgets parts that came twice
            known = ManagedPart(part, units, placement, self._limit)
        self._known[part] = known
        known.arrive()
        return known

    def unpin(self, part: nn.Module) -> None:
        """mmgp's page-locked RAM goes with the tensors in it."""
        if part in self._known:
            self._known.pop(part).release()
            load_mmgp().max_pinnable_bytes = 0  # there is room again

    def pinned(self) -> int:
        return sum(known.pinned for known in self._known.values())


class ManagedPart:
    """A part under a manager of mmgp's; on the card between `arrive` and `evict` (see `placement.OnCard`).

    pinned: bytes of page-locked RAM.
    """

    def __init__(self, part: nn.Module, units: Units, placement: Placement, pinned_limit: int) -> None:
        self.part, self.placement, self.moved = part, placement, 0
        self._made_of: Units = units
        self._present: Units | None = None  # what is where, between two uses; None while that is not known
        blocks = [[block for block in blocks if block in units] for blocks in block_lists(part)]
        resident = set(resident_blocks(blocks, placement.resident_blocks))
        self._streamed = [block for blocks in blocks for block in blocks if block not in resident]
        self._id = type(part).__name__
        self._hooks: dict[nn.Module, Hooks] = {}
        self._manager = self._managed(units, pinned_limit)
        tables = self._manager.blocks_of_modules
        self._homes = {entry: [Home.of(*row[:4]) for row in rows] for entry, rows in tables.items()}
        self._passes = self._lay_out()
        self._load_blocks = self._manager.gpu_load_blocks
        self._manager.gpu_load_blocks = self._load
        self.pinned = _pinned_bytes(home.tensor for homes in self._homes.values() for home in homes)

    # -- how mmgp sees the part

    def _managed(self, units: Units, pinned_limit: int) -> Any:
        """A manager for the part. What mmgp put on its modules is taken off again, and kept in `_hooks`.
        Raises Cancelled between two pieces of what is page-locked."""
        mmgp, marks = load_mmgp(), Marks(self.part)
        calls = {block: call for block in units if (call := block._compiled_call_impl) is not None}
        for block in calls:
            vars(block)["_compile_me"] = True  # the short lists of blocks, too
        pinned = self.placement.pinned and pinned_limit > 0 and _pin_unusual(units)
        try:
            with _lent(self.part):
                manager = mmgp.all(
                    {self._id: self.part},
                    quantizeTransformer=False,
                    convertWeightsFloatTo=None,
                    budgets={self._id: self._budget(units)} if self._streamed else None,
                    pinnedMemory=[self._id] if pinned else [],
                    partialPinning=self.placement.streamed_only,
                    perc_reserved_mem_max=pinned_limit / psutil.virtual_memory().total,
                    asyncTransfers=self.placement.prefetch,
                    compile=[self._id] if calls else False,
                    coTenantsMap={},
                    verboseLevel=0,
                    loading_callback=mmgp.LoadingCallback(interrupt.asked_to_stop),
                )
        except mmgp.LoadingCancelled:
            raise Cancelled from None
        finally:
            left = marks.taken_off()
            heap.trim()  # of what was page-locked meanwhile
        for block in {*self._streamed, *calls}:
            attributes, before = left[block]
            self._hooks[block] = Hooks(attributes["forward"], before, calls.get(block))
        return manager

    def _budget(self, units: Units) -> float:
        """In MiB: what stays and what passes through, and less than the whole part, which would stay then."""
        sizes = {unit: sum(x.nbytes for x in tensors) for unit, tensors in units.items()}
        passing = 2 * max(sizes[block] for block in self._streamed)
        stays = sum(size for unit, size in sizes.items() if unit not in set(self._streamed))
        return min(stays + passing, sum(sizes.values()) - 1) / MIB

    def _lay_out(self) -> list[str]:
        """Has mmgp stream the blocks that are to be streamed, one after the other, and keep all else. Returns
        its names of the streamed ones."""
        manager, names = self._manager, {module: name for name, module in self.part.named_modules()}
        streamed = [names[block] for block in self._streamed]
        sizes = {entry: size for entry, size in manager.blocks_of_modules_sizes.items() if entry != self._id}
        if missing := {f"{self._id}/{name}" for name in streamed} - set(sizes):
            raise RuntimeError(f"mmgp sees no blocks {sorted(missing)}: this file knows mmgp {VERSION}.")
        kept = {entry.partition("/")[2]: size for entry, size in sizes.items()}
        manager.preloaded_blocks_per_model[self._id] = {
            name: size for name, size in kept.items() if name not in set(streamed)
        }
        manager.prev_blocks_names = dict.fromkeys(sizes)
        manager.next_blocks_names = dict.fromkeys(sizes)
        for name, following in zip(streamed, streamed[1:], strict=False):
            self._follows(name, following)
        return [f"{self._id}/{name}" for name in streamed]

    def _follows(self, name: str, following: str) -> None:
        """From now on `following` is fetched while `name` computes, and nothing else is, nor from elsewhere.

        Here its names are of the two forms that mmgp compares and looks up.
        """
        before, after = self._manager.prev_blocks_names, self._manager.next_blocks_names
        entry, successor = f"{self._id}/{name}", f"{self._id}/{following}"
        if after[entry] is not None:
            before[after[entry]] = None
        if before[successor] is not None:
            after[f"{self._id}/{before[successor]}"] = None
        after[entry], before[successor] = successor, name

    def _load(self, model_id: str, name: str | None, preload: bool = False) -> None:
        """mmgp's copy of a block to the card, counted; an order of blocks that surprises is learned."""
        manager, sizes = self._manager, self._manager.blocks_of_modules_sizes
        entry = model_id if name is None else f"{model_id}/{name}"
        loaded, ahead = manager.loaded_blocks[model_id], name is not None and self.placement.prefetch
        fetched = ahead and loaded is not None and manager.prev_blocks_names[entry] == loaded
        if not fetched:
            for waiting in self._passing()[1:]:  # another block was fetched ahead, and mmgp forgets it
                self._send_home(waiting)
        following = manager.next_blocks_names[entry] if ahead else None
        self._load_blocks(model_id, name, preload)
        self.moved += (0 if fetched else sizes[entry]) + (0 if following is None else sizes[following])
        if name is not None and loaded is not None and not preload and not fetched:
            self._follows(loaded, name)

    # -- on the card

    @property
    def bytes(self) -> int:
        manager, sizes = self._manager, self._manager.blocks_of_modules_sizes
        if self._id not in manager.active_models_ids:
            return 0
        passing = sum(sizes[entry] for entry in self._passing())
        return sizes[self._id] + sum(manager.preloaded_blocks_per_model[self._id].values()) + passing

    def is_made_of(self, units: Units) -> bool:
        """Whether the part, off the card, has the tensors that its manager knows."""
        return _identity(units) == _identity(self._made_of)

    def holds(self, units: Units) -> bool:
        return self._present is not None and _identity(units) == _identity(self._present)

    def arrive(self) -> None:
        self.moved, self._present = 0, None
        try:
            self._manager.ensure_model_loaded(self._id)
        except BaseException:
            self.evict()
            raise
        self._present = tensors_by_unit(self.part)

    def attach(self) -> None:
        for module, hooks in self._hooks.items():
            hooks.put_on(module)

    def detach(self) -> None:
        for module, hooks in self._hooks.items():
            hooks.take_off(module)
        for entry in self._passes:
            self._send_home(entry)
        self._manager.loaded_blocks[self._id] = None

    def evict(self) -> None:
        mine = None if self._present is None else {id(x) for xs in self._present.values() for x in xs}
        for entry in self._homes:
            self._send_home(entry, mine)
        self._present = None
        self._manager.loaded_blocks[self._id] = None
        self._manager.active_models.clear()
        self._manager.active_models_ids.clear()

    def release(self) -> None:
        """The manager goes; the part is off the card."""
        self._manager.gpu_load_blocks = self._load_blocks
        self._manager.release()

    def _passing(self) -> list[str]:
        """The streamed block that is on the card, and the one that was fetched ahead."""
        loaded = self._manager.loaded_blocks[self._id]
        if loaded is None:
            return []
        entries = [f"{self._id}/{loaded}"]
        following = self._manager.next_blocks_names[entries[0]] if self.placement.prefetch else None
        return entries if following is None else [*entries, following]

    def _send_home(self, entry: str, mine: set[int] | None = None) -> None:
        """The tensors themselves, where mmgp would leave others of the same memory. mine: ids of those on the
        card, where what was put in their place since is to stay."""
        for home in self._homes[entry]:
            if mine is None or id(home.table.get(home.name)) in mine:
                home.restore()


@dataclass(frozen=True)
class Home:
    """Where a tensor belongs, and the one that lies in RAM. hidden: a module's names of buffers that are not
    saved, where this is one of them."""

    table: dict[str, Any]
    name: str
    tensor: Tensor
    hidden: set[str] | None

    @classmethod
    def of(cls, module: nn.Module, name: str, tensor: Tensor, is_buffer: bool) -> Home:
        """From a row of mmgp's table."""
        hidden = module._non_persistent_buffers_set if is_buffer else set()
        table = module._buffers if is_buffer else module._parameters
        return cls(table, name, tensor, hidden if name in hidden else None)

    def restore(self) -> None:
        self.table[self.name] = self.tensor
        if self.hidden is not None:
            self.hidden.add(self.name)


@dataclass(frozen=True)
class Hooks:
    """What mmgp has called in the place of a block's `forward`, and before it. compiled: what the block's own
    compile() had made, in whose place mmgp's compiling acts."""

    forward: Callable[..., Any]
    before: Mapping[int, Callable[..., Any]]
    compiled: Any

    def put_on(self, block: nn.Module) -> None:
        block._compiled_call_impl, block.forward = None, self.forward
        block._forward_pre_hooks.update(self.before)

    def take_off(self, block: nn.Module) -> None:
        block._compiled_call_impl = self.compiled
        del block.forward
        for key in self.before:
            del block._forward_pre_hooks[key]


def _identity(units: Units) -> list[tuple[int, list[int]]]:
    return [(id(unit), [id(x) for x in tensors]) for unit, tensors in units.items()]


def _pinned_bytes(tensors: Iterable[Tensor]) -> int:
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors if x.is_pinned()}
    return sum(storage.nbytes() for storage in storages.values())


def _pin_unusual(units: Units) -> bool:
    """Page-lock the tensors that are not row-major: mmgp cannot, and leaves those alone that are. False when
    the system refuses."""
    for x in (x for xs in units.values() for x in xs if not x.is_contiguous() and not x.is_pinned()):
        try:
            x.data = torch.empty_like(x.data, pin_memory=True).copy_(x.data)
        except RuntimeError:
            return False
    return True


@contextlib.contextmanager
def _lent(part: nn.Module) -> Iterator[None]:
    """Inside, what stays in RAM is out of mmgp's sight; then it is back, and so is the default device."""
    device = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    aside: dict[nn.Module, dict[str, nn.Module | None]] = {}
    for path in getattr(part, "stays_in_ram", ()):
        above, _, name = path.rpartition(".")
        parent = part.get_submodule(above)
        aside.setdefault(parent, dict(parent._modules))
        del parent._modules[name]
    try:
        yield
    finally:
        torch.set_default_device(device and device.device)
        for parent, children in aside.items():  # in the order in which they were
            parent._modules.clear()
            parent._modules.update(children)


class Marks:
    """What mmgp puts on a part's modules: attributes, and hooks before their forward."""

    def __init__(self, part: nn.Module) -> None:
        """Before mmgp sees the part."""
        self._known = {m: (set(vars(m)), set(m._forward_pre_hooks)) for m in part.modules()}
        for module in self._known:
            vars(module)["_lock_dtype"] = None  # neither mixed dtypes nor fp32 arguments are its business

    def taken_off(self) -> dict[nn.Module, tuple[dict[str, Any], dict[int, Callable[..., Any]]]]:
        """The modules as they were; what was new on each, the attributes by name and the hooks by key."""
        left = {}
        for module, (names, keys) in self._known.items():
            hooks = module._forward_pre_hooks
            before = {key: hooks.pop(key) for key in set(hooks) - keys}
            left[module] = {name: vars(module).pop(name) for name in set(vars(module)) - names}, before
        return left
