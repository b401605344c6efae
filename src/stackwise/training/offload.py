"""Offloaded Stacks: their weights are kept off the device and brought there one Stack at a time.

An offloaded Stack keeps its adapters; its other tensors are on the meta device and are fetched for a forward
pass (and again for the backward pass, which recomputes it), while a thread reads the one that will probably be next,
and on cuda copies it to the device from page-locked memory, on a stream of its own beside the stream that computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from stackwise.model.rack import Rack
from stackwise.model.stack import Stack
from stackwise.model.weights import drop_tensors, fill_tensors

Source = Callable[[], Mapping[str, Tensor]]

_Brought = tuple[dict[str, Tensor], "torch.cuda.Event | None"]
"""Tensors on the device, and the end of their copy, which the stream that computes must wait for."""


class Offload:
    """The Stacks offloaded from ``device``, and where their tensors are.

    The order in which Stacks are fetched repeats from step to step: after the pair (i, j) the one that followed it last
    time is read ahead, so at most two Stacks are on their way or in use.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._sources: dict[int, Source] = {}
        self._reader: ThreadPoolExecutor | None = None
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: tuple[int, Future[_Brought]] | None = None
        self._last: tuple[int | None, int | None] = (None, None)
        self._follows: dict[tuple[int | None, int | None], int] = {}

    @property
    def offloaded(self) -> set[int]:
        """Ids of offloaded Stacks."""
        return set(self._sources)

    def send(self, stack: Stack, source: Source) -> None:
        """Drops the tensors of ``stack``, frozen, which ``source`` gives when they are needed."""
        self._sources[stack.stack_id] = source
        drop_tensors(stack)
        stack.fetch = lambda: self._fetch(stack.stack_id)

    def bring(self, stack: Stack) -> None:
        """Puts the tensors of ``stack`` back on the device, if it is offloaded."""
        source = self._sources.pop(stack.stack_id, None)
        if source is None:
            return
        self._forget()
        stack.fetch = None
        fill_tensors(stack, self._ready(self._brought(source)))

    @contextmanager
    def holding(self, stack: Stack) -> Iterator[None]:
        """Keeps a Stack on the device for as long as it is used again and again, wherever it waits otherwise."""
        source = self._sources.get(stack.stack_id)
        if source is None:
            yield
            return
        self.bring(stack)
        try:
            yield
        finally:
            self.send(stack, source)

    def close(self) -> None:
        """Ends the reading thread; offloaded Stacks stay so, and can be fetched again."""
        self._forget()
        if self._reader is not None:
            self._reader.shutdown(wait=True)
        self._reader = None

    def _brought(self, source: Source) -> _Brought:
        """Reads a Stack and copies it to the device."""
        tensors = source()
        if self._copies is None:
            return {name: tensor.to(self.device) for name, tensor in tensors.items()}, None
        with torch.cuda.stream(self._copies):
            # Only from page-locked memory does a copy run beside what computes; what is locked already stays as it is.
            moved = {name: t.pin_memory().to(self.device, non_blocking=True) for name, t in tensors.items()}
            return moved, self._copies.record_event()

    def _ready(self, brought: _Brought) -> dict[str, Tensor]:
        """The tensors, for the stream that computes."""
        tensors, copied = brought
        if copied is not None:
            computing = torch.cuda.current_stream(self.device)
            computing.wait_event(copied)
            for tensor in tensors.values():
                tensor.record_stream(computing)  # else the next copy could take their memory while they are in use
        return tensors

    def _forget(self) -> None:
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead[1].result()

    def _fetch(self, stack: int) -> dict[str, Tensor]:
        if self._ahead is not None and self._ahead[0] == stack:
            future, self._ahead = self._ahead[1], None
            brought = future.result()
        else:
            self._forget()
            brought = self._brought(self._sources[stack])
        self._follows[self._last] = stack
        self._last = (self._last[1], stack)
        following = self._follows.get(self._last)
        if following in self._sources:
            assert following is not None
            if self._reader is None:
                self._reader = ThreadPoolExecutor(1, thread_name_prefix="offload")
            self._ahead = (following, self._reader.submit(self._brought, self._sources[following]))
        return self._ready(brought)


def all_tensors(rack: Rack, offload: Offload | None = None) -> Iterator[tuple[str, str, Tensor]]:
    """``Rack.part_tensors``, with those of offloaded Stacks; each Stack's are let go before the next one's come."""
    offloaded = {} if offload is None else {f"stack.{k}": source for k, source in offload._sources.items()}
    for part, module in rack.parts().items():
        fetched = dict(offloaded[part]()) if part in offloaded else {}
        for name, tensor in module.state_dict(keep_vars=True).items():
            yield rack.part_of(part, name), name, fetched.get(name, tensor)
